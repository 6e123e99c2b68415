"""ShuffleNet (Zhang et al. 2017, https://arxiv.org/abs/1707.01083) and ShuffleNet-v2 (Ma et al.
2018, https://arxiv.org/abs/1807.11164), the PyTorch twins.

Attribute names are the authors' (megvii-model/ShuffleNet-Series) for v1, torchvision's for v2.
"""

import torch
import torch.nn.functional as F
from torch import nn


def channel_shuffle(x, groups):
    """Channels as a table of `groups` rows, read column by column (Figure 1c)."""
    n, c, h, w = x.shape
    x = x.reshape(n, groups, c // groups, h, w)
    return x.transpose(1, 2).reshape(n, c, h, w)


class ShuffleV1Block(nn.Module):
    """Grouped 1x1 down, 3x3 per channel, shuffle, grouped 1x1 up, and a skip (Figure 2b); with
    stride 2 the skip is an average pooling, and the two are stacked (Figure 2c).

    The shuffle is that of the authors' code: after the 3x3, where the paper has it before (the same
    network with its 3x3 kernels in another order), and with the table of channels transposed.
    """

    def __init__(self, in_channels, channels, stride=1, groups=3, first_groups=None):
        super().__init__()
        self.stride, self.groups = stride, groups
        first_groups = groups if first_groups is None else first_groups
        middle = channels // 4
        new = channels - in_channels if stride == 2 else channels
        self.branch_main_1 = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, groups=first_groups, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
        )
        self.branch_main_2 = nn.Sequential(
            nn.Conv2d(middle, new, 1, groups=groups, bias=False),
            nn.BatchNorm2d(new),
        )
        self.branch_proj = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()

    def forward(self, x):
        identity = self.branch_proj(x)
        x = self.branch_main_1(x)
        x = channel_shuffle(x, x.shape[1] // self.groups)
        x = self.branch_main_2(x)
        if self.stride == 2:
            return torch.cat((identity, F.relu(x)), 1)  # in_channels, then the new ones
        return F.relu(x + identity)


class ShuffleNetV1(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where it is 0)."""

    def __init__(
        self,
        groups=3,
        depths=(4, 8, 4),
        widths=(24, 240, 480, 960),
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
    ):
        super().__init__()
        channels_in, *stage_widths = widths
        self.first_conv = nn.Sequential(
            nn.Conv2d(in_channels, channels_in, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        features = []
        for depth, channels in zip(depths, stage_widths, strict=True):
            for j in range(depth):
                stride = 2 if j == 0 else 1
                first_groups = groups if features else 1  # too few channels come in to be split
                block = ShuffleV1Block(channels_in, channels, stride, groups, first_groups)
                features.append(block)
                channels_in = channels
        self.features = nn.Sequential(*features)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Sequential(
            nn.Linear(channels_in, num_classes, bias=False) if num_classes else nn.Identity()
        )
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 1 / module.weight.shape[1])
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 1e-4)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
        nn.init.normal_(self.first_conv[0].weight, 0, 0.01)

    def forward(self, x):
        x = self.first_conv(x)
        x = self.maxpool(x)
        x = self.features(x)
        x = torch.mean(x, (2, 3))
        return self.classifier(self.dropout(x))


class InvertedResidual(nn.Module):
    """One half of the channels passes, the other takes 1x1, 3x3 per channel, 1x1 (v2, Figure 3c);
    with stride 2 both branches see all channels (Figure 3d). Then a shuffle of the two."""

    def __init__(self, in_channels, channels, stride, authors=False):
        super().__init__()
        self.stride, self.authors = stride, authors
        n, half = in_channels, channels // 2
        left = n if authors and stride == 2 else half  # channels that the first branch gives
        if stride == 1:
            self.branch1 = nn.Sequential()
        else:
            self.branch1 = nn.Sequential(
                nn.Conv2d(n, n, 3, stride, 1, groups=n, bias=False),
                nn.BatchNorm2d(n),
                nn.Conv2d(n, left, 1, bias=False),
                nn.BatchNorm2d(left),
                nn.ReLU(),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(half if stride == 1 else n, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, channels - left, 1, bias=False),
            nn.BatchNorm2d(channels - left),
            nn.ReLU(),
        )

    def forward(self, x):
        if self.authors and self.stride == 1:
            x = channel_shuffle(x, x.shape[1] // 2)  # even channels, then odd ones
        left, right = torch.chunk(x, 2, 1) if self.stride == 1 else (x, x)
        x = torch.cat((self.branch1(left), self.branch2(right)), 1)
        return x if self.authors else channel_shuffle(x, 2)


class ShuffleNetV2(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where it is 0)."""

    def __init__(
        self,
        depths=(4, 8, 4),
        widths=(24, 116, 232, 464, 1024),
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        authors=False,
    ):
        super().__init__()
        channels_in, *stage_widths, features = widths
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, channels_in, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stages = tuple(f"stage{i + 2}" for i in range(len(depths)))
        for name, depth, channels in zip(self.stages, depths, stage_widths, strict=True):
            stage = []
            for j in range(depth):
                stride = 2 if j == 0 else 1
                stage.append(InvertedResidual(channels_in, channels, stride, authors))
                channels_in = channels
            setattr(self, name, nn.Sequential(*stage))
        self.conv5 = nn.Sequential(
            nn.Conv2d(channels_in, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = (
            nn.Linear(features, num_classes, bias=not authors) if num_classes else nn.Identity()
        )

    def forward(self, x):
        x = self.conv1(x)
        x = self.maxpool(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = self.conv5(x)
        x = torch.mean(x, (2, 3))
        return self.fc(self.dropout(x))


NETWORK = "ShuffleNetV1"

V2 = "ShuffleNetV2"

VARIANTS = {  # v1: Tables 1 and 2, g1, g2 and g4 by the paper alone; v2: Table 5
    "shufflenet_v1_x0_5_g3": dict(groups=3, widths=(12, 120, 240, 480)),
    "shufflenet_v1_x1_0_g3": dict(groups=3, widths=(24, 240, 480, 960)),
    "shufflenet_v1_x1_5_g3": dict(groups=3, widths=(24, 360, 720, 1440)),
    "shufflenet_v1_x2_0_g3": dict(groups=3, widths=(48, 480, 960, 1920)),
    "shufflenet_v1_x0_5_g8": dict(groups=8, widths=(16, 192, 384, 768)),
    "shufflenet_v1_x1_0_g8": dict(groups=8, widths=(24, 384, 768, 1536)),
    "shufflenet_v1_x1_5_g8": dict(groups=8, widths=(24, 576, 1152, 2304)),
    "shufflenet_v1_x2_0_g8": dict(groups=8, widths=(48, 768, 1536, 3072)),
    "shufflenet_v1_x1_0_g1": dict(groups=1, widths=(24, 144, 288, 576)),
    "shufflenet_v1_x1_0_g2": dict(groups=2, widths=(24, 200, 400, 800)),
    "shufflenet_v1_x1_0_g4": dict(groups=4, widths=(24, 272, 544, 1088)),
    "shufflenet_v2_x0_5": dict(network=V2, widths=(24, 48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": dict(network=V2, widths=(24, 116, 232, 464, 1024)),
    "shufflenet_v2_x1_5": dict(network=V2, widths=(24, 176, 352, 704, 1024)),
    "shufflenet_v2_x2_0": dict(network=V2, widths=(24, 244, 488, 976, 2048)),
}
