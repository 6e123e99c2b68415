"""Inception-v4 and Inception-ResNet-v2 (Szegedy et al. 2016, https://arxiv.org/abs/1602.07261).

The PyTorch twin. Attribute names are timm's. Inception-v4 is the paper's, Figures 3 to 9. Of
Inception-ResNet-v2 it is the network that Google released, with Inception-v3's stem and other
widths (320, 1088, 2080) than the paper's Figures 15 to 19. No average pooling counts its padding.
timm's default has no dropout; the paper keeps 0.8 before the last layer.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torch_ref.layers import BasicConv2d


class Branches(nn.Module):
    """Named branches side by side, their channels concatenated."""

    def __init__(self, **branches):
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            setattr(self, name, branch)

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in self.names], 1)


def pool_branch(in_channels, channels):
    """Average pooling, then a 1x1."""
    return nn.Sequential(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), BasicConv2d(in_channels, channels, 1)
    )


class Mixed3a(Branches):
    """Figure 3, the first concatenation of the stem: 160 channels, a quarter of the side."""

    def __init__(self):
        super().__init__(maxpool=nn.MaxPool2d(3, 2), conv=BasicConv2d(64, 96, 3, stride=2))


class Mixed4a(Branches):
    """Figure 3, the second: 192 channels."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=nn.Sequential(conv(160, 64, 1), conv(64, 96, 3)),
            branch1=nn.Sequential(
                conv(160, 64, 1),
                conv(64, 64, (1, 7), padding=(0, 3)),
                conv(64, 64, (7, 1), padding=(3, 0)),
                conv(64, 96, 3),
            ),
        )


class Mixed5a(Branches):
    """Figure 3, the third: 384 channels, an eighth of the side."""

    def __init__(self):
        super().__init__(conv=BasicConv2d(192, 192, 3, stride=2), maxpool=nn.MaxPool2d(3, 2))


class InceptionA(Branches):
    """Figure 4: the 35x35 grid."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=conv(384, 96, 1),
            branch1=nn.Sequential(conv(384, 64, 1), conv(64, 96, 3, padding=1)),
            branch2=nn.Sequential(
                conv(384, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)
            ),
            branch3=pool_branch(384, 96),
        )


class ReductionA(Branches):
    """Figure 7 with the widths k, l, m, n of Table 1: from 35x35 to 17x17."""

    def __init__(self, in_channels, widths):
        conv, (k, ell, m, n) = BasicConv2d, widths
        super().__init__(
            branch0=conv(in_channels, n, 3, stride=2),
            branch1=nn.Sequential(
                conv(in_channels, k, 1), conv(k, ell, 3, padding=1), conv(ell, m, 3, stride=2)
            ),
            branch2=nn.MaxPool2d(3, 2),
        )


class InceptionB(Branches):
    """Figure 5: the 17x17 grid."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=conv(1024, 384, 1),
            branch1=nn.Sequential(
                conv(1024, 192, 1),
                conv(192, 224, (1, 7), padding=(0, 3)),
                conv(224, 256, (7, 1), padding=(3, 0)),
            ),
            branch2=nn.Sequential(
                conv(1024, 192, 1),
                conv(192, 192, (7, 1), padding=(3, 0)),
                conv(192, 224, (1, 7), padding=(0, 3)),
                conv(224, 224, (7, 1), padding=(3, 0)),
                conv(224, 256, (1, 7), padding=(0, 3)),
            ),
            branch3=pool_branch(1024, 128),
        )


class ReductionB(Branches):
    """Figure 8: from 17x17 to 8x8."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=nn.Sequential(conv(1024, 192, 1), conv(192, 192, 3, stride=2)),
            branch1=nn.Sequential(
                conv(1024, 256, 1),
                conv(256, 256, (1, 7), padding=(0, 3)),
                conv(256, 320, (7, 1), padding=(3, 0)),
                conv(320, 320, 3, stride=2),
            ),
            branch2=nn.MaxPool2d(3, 2),
        )


class InceptionC(nn.Module):
    """Figure 6: the 8x8 grid."""

    def __init__(self):
        super().__init__()
        conv = BasicConv2d
        self.branch0 = conv(1536, 256, 1)
        self.branch1_0 = conv(1536, 384, 1)
        self.branch1_1a = conv(384, 256, (1, 3), padding=(0, 1))
        self.branch1_1b = conv(384, 256, (3, 1), padding=(1, 0))
        self.branch2_0 = conv(1536, 384, 1)
        self.branch2_1 = conv(384, 448, (3, 1), padding=(1, 0))
        self.branch2_2 = conv(448, 512, (1, 3), padding=(0, 1))
        self.branch2_3a = conv(512, 256, (1, 3), padding=(0, 1))
        self.branch2_3b = conv(512, 256, (3, 1), padding=(1, 0))
        self.branch3 = pool_branch(1536, 256)

    def forward(self, x):
        y = self.branch1_0(x)
        branch1 = (self.branch1_1a(y), self.branch1_1b(y))
        y = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        branch2 = (self.branch2_3a(y), self.branch2_3b(y))
        return torch.cat((self.branch0(x), *branch1, *branch2, self.branch3(x)), 1)


class InceptionV4(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes], pooled features where that is 0."""

    def __init__(self, depths=(4, 7, 3), num_classes=1000, in_channels=3, dropout=0.0):
        super().__init__()
        self.features = nn.Sequential(
            BasicConv2d(in_channels, 32, 3, stride=2),
            BasicConv2d(32, 32, 3),
            BasicConv2d(32, 64, 3, padding=1),
            Mixed3a(),
            Mixed4a(),
            Mixed5a(),
            *(InceptionA() for _ in range(depths[0])),
            ReductionA(384, widths=(192, 224, 256, 384)),
            *(InceptionB() for _ in range(depths[1])),
            ReductionB(),
            *(InceptionC() for _ in range(depths[2])),
        )
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1536, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        x = self.features(x)
        x = torch.mean(x, (2, 3))
        return self.last_linear(self.dropout(x))


class Mixed5b(Branches):
    """The last part of the released stem: 320 channels on the 35x35 grid."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=conv(192, 96, 1),
            branch1=nn.Sequential(conv(192, 48, 1), conv(48, 64, 5, padding=2)),
            branch2=nn.Sequential(
                conv(192, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)
            ),
            branch3=pool_branch(192, 64),
        )


class ResidualBlock(Branches):
    """Branches, a linear 1x1 to the width of the input, scaled down and added (Figure 20).

    Scaling by 0.1 to 0.3 keeps wide residual networks from dying early (section 3.3).
    """

    def __init__(self, in_channels, channels, scale, activate=True, **branches):
        super().__init__(**branches)
        self.scale, self.activate = scale, activate
        self.conv2d = nn.Conv2d(channels, in_channels, 1)

    def forward(self, x):
        x = self.conv2d(super().forward(x)) * self.scale + x
        return F.relu(x) if self.activate else x


class Block35(ResidualBlock):
    """Inception-ResNet-A, Figure 16."""

    def __init__(self, scale):
        conv = BasicConv2d
        super().__init__(
            320,
            128,
            scale,
            branch0=conv(320, 32, 1),
            branch1=nn.Sequential(conv(320, 32, 1), conv(32, 32, 3, padding=1)),
            branch2=nn.Sequential(
                conv(320, 32, 1), conv(32, 48, 3, padding=1), conv(48, 64, 3, padding=1)
            ),
        )


class Block17(ResidualBlock):
    """Inception-ResNet-B, Figure 17."""

    def __init__(self, scale):
        conv = BasicConv2d
        super().__init__(
            1088,
            384,
            scale,
            branch0=conv(1088, 192, 1),
            branch1=nn.Sequential(
                conv(1088, 128, 1),
                conv(128, 160, (1, 7), padding=(0, 3)),
                conv(160, 192, (7, 1), padding=(3, 0)),
            ),
        )


class Mixed7a(Branches):
    """Reduction-B, Figure 18: from 17x17 to 8x8."""

    def __init__(self):
        conv = BasicConv2d
        super().__init__(
            branch0=nn.Sequential(conv(1088, 256, 1), conv(256, 384, 3, stride=2)),
            branch1=nn.Sequential(conv(1088, 256, 1), conv(256, 288, 3, stride=2)),
            branch2=nn.Sequential(
                conv(1088, 256, 1), conv(256, 288, 3, padding=1), conv(288, 320, 3, stride=2)
            ),
            branch3=nn.MaxPool2d(3, 2),
        )


class Block8(ResidualBlock):
    """Inception-ResNet-C, Figure 19."""

    def __init__(self, scale, activate=True):
        conv = BasicConv2d
        super().__init__(
            2080,
            448,
            scale,
            activate,
            branch0=conv(2080, 192, 1),
            branch1=nn.Sequential(
                conv(2080, 192, 1),
                conv(192, 224, (1, 3), padding=(0, 1)),
                conv(224, 256, (3, 1), padding=(1, 0)),
            ),
        )


class InceptionResNetV2(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes], pooled features where that is 0."""

    def __init__(self, depths=(10, 20, 9), num_classes=1000, in_channels=3, dropout=0.0):
        super().__init__()
        self.conv2d_1a = BasicConv2d(in_channels, 32, 3, stride=2)
        self.conv2d_2a = BasicConv2d(32, 32, 3)
        self.conv2d_2b = BasicConv2d(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = BasicConv2d(64, 80, 1)
        self.conv2d_4a = BasicConv2d(80, 192, 3)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = Mixed5b()
        self.repeat = nn.Sequential(*(Block35(0.17) for _ in range(depths[0])))
        self.mixed_6a = ReductionA(320, widths=(256, 256, 384, 384))
        self.repeat_1 = nn.Sequential(*(Block17(0.10) for _ in range(depths[1])))
        self.mixed_7a = Mixed7a()
        self.repeat_2 = nn.Sequential(*(Block8(0.20) for _ in range(depths[2])))
        self.block8 = Block8(1.0, activate=False)
        self.conv2d_7b = BasicConv2d(2080, 1536, 1)
        self.dropout = nn.Dropout(dropout)
        self.classif = nn.Linear(1536, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.repeat(self.mixed_5b(self.maxpool_5a(x)))  # 299 pixels: [N, 320, 35, 35]
        x = self.repeat_1(self.mixed_6a(x))  # [N, 1088, 17, 17]
        x = self.block8(self.repeat_2(self.mixed_7a(x)))  # [N, 2080, 8, 8]
        x = self.conv2d_7b(x)
        x = torch.mean(x, (2, 3))
        return self.classif(self.dropout(x))


NETWORK = "InceptionV4"

VARIANTS = {
    "inception_v4": dict(),
    "inception_resnet_v2": dict(network="InceptionResNetV2"),
}
