"""MobileNet (Howard et al. 2017, https://arxiv.org/abs/1704.04861), the PyTorch twin.

Table 1. Attribute names are timm's, and so is ReLU6, where the paper writes ReLU. The width
multiplier (section 3.3) is `width`; the resolution multiplier (section 3.4) is the size of the
images: the network takes any.
"""

import torch
import torch.nn.functional as F
from torch import nn

from torch_ref.layers import Conv2dSame, initialise_mobile, make_divisible


class DepthwiseSeparableConv(nn.Module):
    """A 3x3 per channel, then a 1x1 across channels (Figure 3 right)."""

    def __init__(self, in_channels, channels, stride=1, same=False, eps=1e-5, momentum=0.1):
        super().__init__()
        n = in_channels
        norm = dict(eps=eps, momentum=momentum)
        conv, padding = (Conv2dSame, 0) if same else (nn.Conv2d, 1)
        self.conv_dw = conv(n, n, 3, stride, padding, groups=n, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels, **norm)
        self.conv_pw = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, **norm)

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv_dw(x)))
        return F.relu6(self.bn2(self.conv_pw(x)))


class MobileNetV1(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where it is 0)."""

    def __init__(
        self,
        width=1.0,
        divisor=8,
        depths=(1, 2, 2, 6, 2),
        widths=(32, 64, 128, 256, 512, 1024),
        same=False,
        eps=1e-5,
        momentum=0.1,
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
    ):
        super().__init__()
        channels_in, *stage_widths = (make_divisible(width * n, divisor) for n in widths)
        norm = dict(eps=eps, momentum=momentum)
        conv, padding = (Conv2dSame, 0) if same else (nn.Conv2d, 1)
        self.conv_stem = conv(in_channels, channels_in, 3, 2, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in, **norm)
        stages = []
        for i, (depth, channels) in enumerate(zip(depths, stage_widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(DepthwiseSeparableConv(channels_in, channels, stride, same, **norm))
                channels_in = channels
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels_in, num_classes) if num_classes else nn.Identity()
        initialise_mobile(self, "timm")

    def forward(self, x):
        x = F.relu6(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = torch.mean(x, (2, 3))
        return self.classifier(self.dropout(x))


NETWORK = "MobileNetV1"

VARIANTS = {  # Tables 5 and 6; timm publishes 100 and 125
    "mobilenetv1_025": dict(width=0.25),
    "mobilenetv1_050": dict(width=0.5),
    "mobilenetv1_075": dict(width=0.75),
    "mobilenetv1_100": dict(width=1.0),
    "mobilenetv1_125": dict(width=1.25),
}
