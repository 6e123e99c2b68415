"""Xception (Chollet 2016, https://arxiv.org/abs/1610.02357), the PyTorch twin.

Attribute names are timm's. `Xception` is Figure 5 as timm's `legacy_xception` has it: a stem
without padding, batch norms of epsilon 1e-5 and no dropout (the paper: 0.5). `XceptionAligned` is
the form that DeepLab v3+ made of it (Chen et al. 2018, https://arxiv.org/abs/1802.02611, section
3.2): deeper, strided separable convolutions for max pooling, and a batch norm after each depthwise.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class SeparableConv2d(nn.Module):
    """3x3 depthwise, then 1x1, nothing between them (section 3)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class Block(nn.Module):
    """ReLU, separable convolution and batch norm, once per entry of `widths`, and a skip."""

    def __init__(self, in_channels, widths, stride=1, start_with_relu=True):
        super().__init__()
        if stride != 1 or in_channels != widths[-1]:
            self.skip = nn.Conv2d(in_channels, widths[-1], 1, stride=stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])
        else:
            self.skip = None
        parts = []
        for i, width in enumerate(widths):
            if i > 0 or start_with_relu:
                parts.append(nn.ReLU())
            parts += [SeparableConv2d(in_channels, width), nn.BatchNorm2d(width)]
            in_channels = width
        if stride != 1:
            parts.append(nn.MaxPool2d(3, stride, 1))
        self.rep = nn.Sequential(*parts)

    def forward(self, x):
        identity = x if self.skip is None else self.skipbn(self.skip(x))
        return self.rep(x) + identity


class Xception(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (where that is 0: features)."""

    def __init__(self, middle=8, num_classes=1000, in_channels=3, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        blocks = [
            Block(64, (128, 128), 2, start_with_relu=False),
            Block(128, (256, 256), 2),
            Block(256, (728, 728), 2),
            *(Block(728, (728, 728, 728)) for _ in range(middle)),
            Block(728, (728, 1024), 2),
        ]
        self.blocks = tuple(f"block{i + 1}" for i in range(len(blocks)))
        for name, block in zip(self.blocks, blocks, strict=True):
            setattr(self, name, block)
        self.conv3 = SeparableConv2d(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536)
        self.conv4 = SeparableConv2d(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        for block in self.blocks:
            x = getattr(self, block)(x)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        x = torch.mean(x, (2, 3))
        return self.fc(self.dropout(x))


EPS = 1e-3  # of every batch norm in the aligned networks


def conv_norm(in_channels, channels, kernel_size, stride=1, **more):
    """Convolution and batch norm, and what `more` names."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(
                in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False
            ),
            bn=nn.BatchNorm2d(channels, eps=EPS),
            **more,
        )
    )


class AlignedSeparableConv2d(nn.Module):
    """3x3 depthwise and 1x1, each with a batch norm, and with a ReLU where `relu` says so."""

    def __init__(self, in_channels, channels, stride=1, relu=False):
        super().__init__()
        self.relu = relu
        self.conv_dw = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.bn_dw = nn.BatchNorm2d(in_channels, eps=EPS)
        self.conv_pw = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn_pw = nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x):
        x = self.bn_dw(self.conv_dw(x))
        x = self.bn_pw(self.conv_pw(F.relu(x) if self.relu else x))
        return F.relu(x) if self.relu else x


class XceptionModule(nn.Module):
    """Three separable convolutions, the last one strided, and a skip (none in the last module)."""

    def __init__(self, in_channels, widths, stride=1, skip=True):
        super().__init__()
        self.skip = skip
        if skip and (stride != 1 or in_channels != widths[-1]):
            self.shortcut = conv_norm(in_channels, widths[-1], 1, stride)
        else:
            self.shortcut = None
        parts = OrderedDict()
        for i, width in enumerate(widths):
            if skip:
                parts[f"act{i + 1}"] = nn.ReLU()
            parts[f"conv{i + 1}"] = AlignedSeparableConv2d(
                in_channels, width, stride if i == 2 else 1, relu=not skip
            )
            in_channels = width
        self.stack = nn.Sequential(parts)

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.stack(x)
        return x + identity if self.skip else x


class XceptionAligned(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where that is 0).

    `entry` has (channels, stride) of each module of the entry flow.
    """

    def __init__(
        self,
        entry=((128, 2), (256, 2), (728, 2)),
        middle=8,
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
    ):
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm(in_channels, 32, 3, 2, act=nn.ReLU()),
            conv_norm(32, 64, 3, act=nn.ReLU()),
        )
        blocks, channels_in = [], 64
        for channels, stride in entry:
            blocks.append(XceptionModule(channels_in, (channels,) * 3, stride))
            channels_in = channels
        blocks += [XceptionModule(channels_in, (channels_in,) * 3) for _ in range(middle)]
        blocks.append(XceptionModule(channels_in, (728, 1024, 1024), 2))
        blocks.append(XceptionModule(1024, (1536, 1536, 2048), skip=False))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            OrderedDict(
                drop=nn.Dropout(dropout),
                fc=nn.Linear(2048, num_classes) if num_classes else nn.Identity(),
            )
        )

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = torch.mean(x, (2, 3))
        return self.head(x)


NETWORK = "Xception"

VARIANTS = {  # Xception: Figure 5; xception65: Chen et al. 2018, Figure 4; 41 and 71: timm's
    "xception": dict(),
    "xception41": dict(network="XceptionAligned"),
    "xception65": dict(network="XceptionAligned", middle=16),
    "xception71": dict(
        network="XceptionAligned",
        entry=((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)),
        middle=16,
    ),
}
