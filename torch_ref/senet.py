"""Squeeze-and-Excitation (Hu et al. 2017, https://arxiv.org/abs/1709.01507), the PyTorch twin.

`SqueezeExcite` plugs into any network; here into ResNet, ResNeXt and Inception-v3 (section 3.3),
and into SENet-154 (section 6.5 and appendix). Attribute names are timm's, of which there are two
sets: the present ones, and those of its `legacy_*` networks, which the authors' Caffe weights went
to. The legacy networks pool their stem with ceil_mode and no padding, some of their bottlenecks
carry the stride on the first 1x1, and their basic blocks apply a ReLU before the excitation:
functions of their own, not other names for the same. SE-Inception-v3 has no published weights.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from torch_ref import inception_v3
from torch_ref.resnet import BasicBlock, Bottleneck, ResNet

WIDTHS = (64, 128, 256, 512)
INCEPTION_WIDTHS = {  # channels out of each module of Inception-v3
    **{"Mixed_5b": 256, "Mixed_5c": 288, "Mixed_5d": 288},
    **{"Mixed_6a": 768, "Mixed_6b": 768, "Mixed_6c": 768, "Mixed_6d": 768, "Mixed_6e": 768},
    **{"Mixed_7a": 1280, "Mixed_7b": 2048, "Mixed_7c": 2048},
}


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 relu(W1 mean(x))): one scale per channel (equations 2 to 4).

    hidden=None is channels / reduction, rounded to a multiple of 8 as timm does.
    """

    def __init__(self, channels, reduction=16, hidden=None, bias=True):
        super().__init__()
        if hidden is None:
            hidden = max(8, int(channels / reduction + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x):
        scale = torch.mean(x, (2, 3), keepdim=True)
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(scale))))
        return x * scale


class SEBasicBlock(BasicBlock):
    """A basic block whose residual is excited before the skip joins it (Figure 3)."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width)
        self.se = SqueezeExcite(channels)
        self.downsample = shortcut  # after `se`, as in timm

    def residual(self, x):
        return self.se(super().residual(x))


class SEBottleneck(Bottleneck):
    """The same of a bottleneck."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width)
        self.se = SqueezeExcite(channels * self.expansion)
        self.downsample = shortcut

    def residual(self, x):
        return self.se(super().residual(x))


class SE154Bottleneck(SEBottleneck):
    """SENet-154's: the first 1x1 has half the channels of the 3x3."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut)
        halve(self, in_channels, stride, groups)


def halve(block, in_channels, stride, groups):
    """Replace the first two convolutions of a bottleneck by ones that meet at half the width."""
    width = block.conv2.out_channels
    block.conv1 = nn.Conv2d(in_channels, width // 2, 1, bias=False)
    block.bn1 = nn.BatchNorm2d(width // 2)
    block.conv2 = nn.Conv2d(width // 2, width, 3, stride, padding=1, groups=groups, bias=False)


class SEResNet(ResNet):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]. SE-ResNet and SE-ResNeXt."""

    blocks = {"basic": SEBasicBlock, "bottleneck": SEBottleneck}


def stages(block, in_channels, depths, groups, base_width, down_kernel):
    """Four stages of blocks; strided projections have kernels of `down_kernel`."""
    made = []
    for i, (depth, channels) in enumerate(zip(depths, WIDTHS, strict=True)):
        out_channels = channels * block.expansion
        stage = []
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            shortcut = None
            if stride != 1 or in_channels != out_channels:
                kernel = down_kernel if stride != 1 else 1
                shortcut = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
                    nn.BatchNorm2d(out_channels),
                )
            stage.append(block(in_channels, channels, stride, groups, base_width, shortcut))
            in_channels = out_channels
        made.append(nn.Sequential(*stage))
    return made


class SENet154(SEResNet):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]. SENet-154 in timm's present form.

    A ResNeXt-152 of 64 groups whose stem is three 3x3, whose bottlenecks are `SE154Bottleneck`
    and whose strided projections are 3x3.
    """

    def __init__(
        self,
        depths=(3, 8, 36, 3),
        groups=64,
        base_width=4,
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        zero_init_last=False,
    ):
        nn.Module.__init__(self)
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
        )
        self.bn1 = nn.BatchNorm2d(128)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        made = stages(SE154Bottleneck, 128, depths, groups, base_width, down_kernel=3)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(made)))
        for name, stage in zip(self.stages, made, strict=True):
            setattr(self, name, stage)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes) if num_classes else nn.Identity()
        self._initialise(zero_init_last)


class LegacyBasicBlock(BasicBlock):
    """timm's `SEResNetBlock`: a ReLU before the excitation, too."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width)
        self.se_module = SqueezeExcite(channels, hidden=channels // 16)
        self.downsample = shortcut

    def residual(self, x):
        return self.se_module(F.relu(super().residual(x)))


class LegacyBottleneck(Bottleneck):
    """timm's `SEResNeXtBottleneck`: the stride on the 3x3."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width)
        out_channels = channels * self.expansion
        self.se_module = SqueezeExcite(out_channels, hidden=out_channels // 16)
        self.downsample = shortcut

    def residual(self, x):
        return self.se_module(super().residual(x))


class LegacyStrideFirst(LegacyBottleneck):
    """timm's `SEResNetBottleneck`: the stride on the first 1x1."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, 1, groups, base_width, shortcut)
        width = self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride, bias=False)


class Legacy154Bottleneck(LegacyBottleneck):
    """timm's `SEBottleneck`."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut)
        halve(self, in_channels, stride, groups)


class SENet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]. timm's `legacy_*` networks."""

    blocks = {
        "basic": LegacyBasicBlock,
        "bottleneck": LegacyBottleneck,
        "stride_first": LegacyStrideFirst,
        "senet154": Legacy154Bottleneck,
    }

    def __init__(
        self,
        block="stride_first",
        depths=(3, 4, 6, 3),
        groups=1,
        base_width=64,
        num_classes=1000,
        in_channels=3,
        dropout=0.2,
    ):
        super().__init__()
        cls, deep = self.blocks[block], block == "senet154"
        stem = [(64, 3, 2), (64, 3, 1), (128, 3, 1)] if deep else [(64, 7, 2)]
        parts, channels_in = OrderedDict(), in_channels
        for i, (channels, kernel, stride) in enumerate(stem, start=1):
            parts[f"conv{i}"] = nn.Conv2d(
                channels_in, channels, kernel, stride, kernel // 2, bias=False
            )
            parts[f"bn{i}"] = nn.BatchNorm2d(channels)
            parts[f"relu{i}"] = nn.ReLU()
            channels_in = channels
        self.layer0 = nn.Sequential(parts)
        self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
        made = stages(cls, channels_in, depths, groups, base_width, down_kernel=3 if deep else 1)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(made)))
        for name, stage in zip(self.stages, made, strict=True):
            setattr(self, name, stage)
        self.dropout = nn.Dropout(dropout)
        features = WIDTHS[-1] * cls.expansion
        self.last_linear = nn.Linear(features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.pool0(self.layer0(x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = torch.mean(x, (2, 3))
        return self.last_linear(self.dropout(x))


class SEInceptionV3(inception_v3.InceptionV3):
    """Images [N, in_channels, H, W] -> logits, and auxiliary logits in train mode.

    Inception-v3 with an excitation after each of its Inception modules (Figure 2).
    """

    def __init__(
        self,
        aux_logits=True,
        transform_input=False,
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__(aux_logits, transform_input, num_classes, in_channels, dropout)
        for name, channels in INCEPTION_WIDTHS.items():
            excited = nn.Sequential(getattr(self, name), SqueezeExcite(channels))
            setattr(self, name, excited)


NETWORK = "SEResNet"

# timm starts the last scale of each block at 0, its legacy networks do not.
SE = dict(zero_init_last=True)
LEGACY = dict(network="SENet")
X101 = dict(block="bottleneck", depths=(3, 4, 23, 3), **SE)

VARIANTS = {  # Tables 1 and 2; senet154: appendix
    "seresnet18": dict(block="basic", depths=(2, 2, 2, 2), **SE),
    "seresnet34": dict(block="basic", depths=(3, 4, 6, 3), **SE),
    "seresnet50": dict(block="bottleneck", depths=(3, 4, 6, 3), **SE),
    "seresnet101": dict(block="bottleneck", depths=(3, 4, 23, 3), **SE),
    "seresnet152": dict(block="bottleneck", depths=(3, 8, 36, 3), **SE),
    "seresnext50_32x4d": dict(
        block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4, **SE
    ),
    "seresnext101_32x4d": dict(groups=32, base_width=4, **X101),
    "seresnext101_32x8d": dict(groups=32, base_width=8, **X101),
    "seresnext101_64x4d": dict(groups=64, base_width=4, **X101),
    "senet154": dict(network="SENet154", depths=(3, 8, 36, 3), **SE),
    "legacy_seresnet18": dict(block="basic", depths=(2, 2, 2, 2), **LEGACY),
    "legacy_seresnet34": dict(block="basic", depths=(3, 4, 6, 3), **LEGACY),
    "legacy_seresnet50": dict(block="stride_first", depths=(3, 4, 6, 3), **LEGACY),
    "legacy_seresnet101": dict(block="stride_first", depths=(3, 4, 23, 3), **LEGACY),
    "legacy_seresnet152": dict(block="stride_first", depths=(3, 8, 36, 3), **LEGACY),
    "legacy_seresnext26_32x4d": dict(
        block="bottleneck", depths=(2, 2, 2, 2), groups=32, base_width=4, **LEGACY
    ),
    "legacy_seresnext50_32x4d": dict(
        block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4, **LEGACY
    ),
    "legacy_seresnext101_32x4d": dict(
        block="bottleneck", depths=(3, 4, 23, 3), groups=32, base_width=4, **LEGACY
    ),
    "legacy_senet154": dict(
        block="senet154", depths=(3, 8, 36, 3), groups=64, base_width=4, **LEGACY
    ),
    "se_inception_v3": dict(network="SEInceptionV3"),
}
