"""Inception-v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567), the PyTorch twin.

Attribute names are torchvision's, which timm shares. Against the paper's Table 1, as in Google's
release: a 1x1 of 80 channels and a pooling in the stem where the table has two strided 3x3.
torchvision's network has its auxiliary head and dropout 0.5, timm's has neither.
"""

from typing import NamedTuple

import torch
from torch import nn

from torch_ref.layers import BasicConv2d, transform_input


class InceptionOutputs(NamedTuple):
    """What the network returns in train mode, each [N, num_classes]."""

    logits: torch.Tensor
    aux_logits: torch.Tensor


class InceptionA(nn.Module):
    """Figure 5: two 3x3 in a row see as much as a 5x5. (The released network keeps one 5x5.)"""

    def __init__(self, in_channels, pool_features):
        super().__init__()
        conv = BasicConv2d
        self.branch1x1 = conv(in_channels, 64, 1)
        self.branch5x5_1 = conv(in_channels, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, pool_features, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, branch5x5, branch3x3dbl, branch_pool), 1)


class InceptionB(nn.Module):
    """Figure 10: halves the grid; the pooling and the strided convolutions stand side by side."""

    def __init__(self, in_channels):
        super().__init__()
        conv = BasicConv2d
        self.branch3x3 = conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x):
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((branch3x3, branch3x3dbl, self.pool(x)), 1)


class InceptionC(nn.Module):
    """Figure 6: a 7x7 as 1x7 and 7x1."""

    def __init__(self, in_channels, channels_7x7):
        super().__init__()
        conv, c7 = BasicConv2d, channels_7x7
        self.branch1x1 = conv(in_channels, 192, 1)
        self.branch7x7_1 = conv(in_channels, c7, 1)
        self.branch7x7_2 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = conv(c7, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = conv(in_channels, c7, 1)
        self.branch7x7dbl_2 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = conv(c7, 192, (1, 7), padding=(0, 3))
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, 192, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, branch7x7, branch7x7dbl, branch_pool), 1)


class InceptionD(nn.Module):
    """Halves the grid, as `InceptionB` does, after factorised 7x7."""

    def __init__(self, in_channels):
        super().__init__()
        conv = BasicConv2d
        self.branch3x3_1 = conv(in_channels, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = conv(in_channels, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat((branch3x3, branch7x7x3, self.pool(x)), 1)


class InceptionE(nn.Module):
    """Figure 7: 1x3 and 3x1 side by side, for many features on a coarse grid."""

    def __init__(self, in_channels):
        super().__init__()
        conv = BasicConv2d
        self.branch1x1 = conv(in_channels, 320, 1)
        self.branch3x3_1 = conv(in_channels, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1), padding=(1, 0))
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.branch_pool = conv(in_channels, 192, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        y = self.branch3x3_1(x)
        branch3x3 = (self.branch3x3_2a(y), self.branch3x3_2b(y))
        y = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = (self.branch3x3dbl_3a(y), self.branch3x3dbl_3b(y))
        branch_pool = self.branch_pool(self.pool(x))
        return torch.cat((branch1x1, *branch3x3, *branch3x3dbl, branch_pool), 1)


class InceptionAux(nn.Module):
    """The auxiliary head with batch norm (section 4, Figure 8); takes maps of 17x17 and above."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.pool = nn.AvgPool2d(5, 3)
        self.conv0 = BasicConv2d(in_channels, 128, 1)
        self.conv1 = BasicConv2d(128, 768, 5)
        self.fc = nn.Linear(768, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        x = self.conv1(self.conv0(self.pool(x)))  # 17x17 -> 5x5 -> 1x1
        return self.fc(torch.mean(x, (2, 3)))


class InceptionV3(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes], pooled features where that is 0."""

    def __init__(
        self,
        aux_logits=True,
        transform_input=False,
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__()
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(in_channels, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.AuxLogits = InceptionAux(768, num_classes) if aux_logits else None
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self):
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                std = 0.001 if name == "AuxLogits.fc" else 0.1
                nn.init.trunc_normal_(module.weight, std=std)

    def forward(self, x):
        if self.transform_input:
            x = transform_input(x)
        heads = self.training and self.AuxLogits is not None
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5b(self.maxpool2(x))
        x = self.Mixed_5d(self.Mixed_5c(x))  # 299 pixels: [N, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))  # [N, 768, 17, 17]
        aux = self.AuxLogits(x) if heads else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        x = torch.mean(x, (2, 3))
        x = self.fc(self.dropout(x))
        return InceptionOutputs(x, aux) if heads else x


NETWORK = "InceptionV3"

VARIANTS = {
    "inception_v3": dict(),
}
