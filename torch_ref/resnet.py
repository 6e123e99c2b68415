"""ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385), the PyTorch twin.

Attribute names are torchvision's. As there, the 3x3 convolution of a bottleneck carries the
stride ("v1.5"); the paper's Figure 5 has it on the first 1x1. The CIFAR family is section 4.2.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torch_ref.layers import StochasticDepth


class Downsample(nn.Module):
    """Shortcut A (section 4.2): every second pixel, new channels zero, no parameters."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.extra // 2
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))


def projection(in_channels, channels, stride):
    """Shortcut B: a 1x1 convolution and a batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip (Figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut
        self.drop_path = nn.Identity()  # its network may set another

    def residual(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.drop_path(self.residual(x)) + identity)

    @property
    def last_norm(self):
        return self.bn2


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (grouped in ResNeXt), 1x1 up, and a skip (Figure 5 right)."""

    expansion = 4

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__()
        width = channels * base_width // 64 * groups
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut
        self.drop_path = nn.Identity()  # its network may set another

    def residual(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(self.drop_path(self.residual(x)) + identity)

    @property
    def last_norm(self):
        return self.bn3


class StrideFirst(Bottleneck):
    """The paper's own: the stride on the first 1x1."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, 1, groups, base_width, shortcut)
        width = self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride, bias=False)


class ResNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (0: pooled features)."""

    blocks = {"basic": BasicBlock, "bottleneck": Bottleneck, "stride_first": StrideFirst}

    def __init__(
        self,
        block="bottleneck",
        depths=(3, 4, 6, 3),
        widths=(64, 128, 256, 512),
        groups=1,
        base_width=64,
        stem="imagenet",
        stem_width=None,
        first_stride=1,
        shortcut="B",
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        zero_init_last=False,
        stochastic_depth=0.0,
    ):
        super().__init__()
        channels_in = stem_width or widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, channels_in, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels_in, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 1 if j > 0 else 2 if i > 0 else first_stride
                made = self._block(
                    block, channels_in, channels, stride, groups, base_width, shortcut
                )
                share = (sum(depths[:i]) + j) / max(sum(depths) - 1, 1)
                made.drop_path = StochasticDepth(stochastic_depth * share)
                stage.append(made)
                channels_in = channels * made.expansion
            setattr(self, self.stages[i], nn.Sequential(*stage))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels_in, num_classes) if num_classes else nn.Identity()
        self._initialise(zero_init_last)

    def _block(self, block, in_channels, channels, stride, groups, base_width, shortcut):
        cls = self.blocks[block]
        out_channels = channels * cls.expansion
        skip = None
        if stride != 1 or in_channels != out_channels:
            make = projection if shortcut == "B" else Downsample
            skip = make(in_channels, out_channels, stride)
        return cls(in_channels, channels, stride, groups, base_width, skip)

    def _initialise(self, zero_init_last):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = torch.mean(x, (2, 3))
        return self.fc(self.dropout(x))


CIFAR = dict(block="basic", widths=(16, 32, 64), stem="cifar", shortcut="A", num_classes=10)

NETWORK = "ResNet"

VARIANTS = {  # Table 1; wide_*: Zagoruyko & Komodakis 2016; resnet26: timm's; CIFAR: Table 6
    "resnet18": dict(block="basic", depths=(2, 2, 2, 2)),
    "resnet26": dict(block="bottleneck", depths=(2, 2, 2, 2), zero_init_last=True),
    "resnet34": dict(block="basic", depths=(3, 4, 6, 3)),
    "resnet50": dict(block="bottleneck", depths=(3, 4, 6, 3)),
    "resnet101": dict(block="bottleneck", depths=(3, 4, 23, 3)),
    "resnet152": dict(block="bottleneck", depths=(3, 8, 36, 3)),
    "wide_resnet50_2": dict(block="bottleneck", depths=(3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": dict(block="bottleneck", depths=(3, 4, 23, 3), base_width=128),
    "resnet20_cifar": dict(depths=(3, 3, 3), **CIFAR),
    "resnet32_cifar": dict(depths=(5, 5, 5), **CIFAR),
    "resnet44_cifar": dict(depths=(7, 7, 7), **CIFAR),
    "resnet56_cifar": dict(depths=(9, 9, 9), **CIFAR),
    "resnet110_cifar": dict(depths=(18, 18, 18), **CIFAR),
}
