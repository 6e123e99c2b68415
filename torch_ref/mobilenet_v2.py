"""MobileNet-v2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381), the PyTorch twin.

Table 2. Attribute names are torchvision's. Rows named `mobilenetv2_*` are timm's networks: no
dropout, other initial values, and in those ending in "d" deeper stages between an unscaled stem
and head.
"""

import torch
from torch import nn

from torch_ref.layers import conv_norm_act, initialise_mobile, make_divisible


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 per channel, 1x1 down *without* activation, and a skip between the narrow ends
    (Table 1, Figure 4d)."""

    def __init__(self, in_channels, channels, stride=1, expansion=6, same=False, **norm):
        super().__init__()
        hidden = in_channels * expansion
        self.has_skip = stride == 1 and in_channels == channels
        expand = conv_norm_act(in_channels, hidden, 1, **norm) if expansion > 1 else None
        self.conv = nn.Sequential(
            *([] if expand is None else [expand]),
            conv_norm_act(hidden, hidden, 3, stride, hidden, same=same, **norm),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels, **norm),
        )

    def forward(self, x):
        return x + self.conv(x) if self.has_skip else self.conv(x)


class MobileNetV2(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where it is 0)."""

    expansions = (1, 6, 6, 6, 6, 6, 6)
    strides = (1, 2, 2, 2, 1, 2, 1)

    def __init__(
        self,
        width=1.0,
        divisor=8,
        depths=(1, 2, 3, 4, 3, 3, 1),
        widths=(32, 16, 24, 32, 64, 96, 160, 320, 1280),
        fixed_ends=False,
        same=False,
        eps=1e-5,
        momentum=0.1,
        num_classes=1000,
        in_channels=3,
        dropout=0.2,
        initialise="torchvision",
    ):
        super().__init__()
        stem, *stage_widths, head = widths
        if not fixed_ends:
            stem = make_divisible(width * stem, divisor)
            head = make_divisible(max(width, 1.0) * head, divisor)
        norm = dict(same=same, eps=eps, momentum=momentum)
        features = [conv_norm_act(in_channels, stem, 3, stride=2, **norm)]
        channels_in = stem
        for expansion, channels, depth, stride in zip(
            self.expansions, stage_widths, depths, self.strides, strict=True
        ):
            channels = make_divisible(width * channels, divisor)
            for j in range(depth):
                step = stride if j == 0 else 1
                block = InvertedResidual(channels_in, channels, step, expansion, **norm)
                features.append(block)
                channels_in = channels
        features.append(conv_norm_act(channels_in, head, 1, **norm))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(head, num_classes) if num_classes else nn.Identity(),
        )
        initialise_mobile(self, initialise)

    def forward(self, x):
        x = self.features(x)
        x = torch.mean(x, (2, 3))
        return self.classifier(x)


TIMM = dict(dropout=0.0, initialise="timm")

NETWORK = "MobileNetV2"

VARIANTS = {  # Table 4 and Figure 5; all but the first are timm's
    "mobilenet_v2": dict(),
    "mobilenetv2_035": dict(width=0.35, **TIMM),
    "mobilenetv2_050": dict(width=0.5, **TIMM),
    "mobilenetv2_075": dict(width=0.75, **TIMM),
    "mobilenetv2_140": dict(width=1.4, **TIMM),
    "mobilenetv2_110d": dict(width=1.1, depths=(1, 3, 4, 5, 4, 4, 1), fixed_ends=True, **TIMM),
    "mobilenetv2_120d": dict(width=1.2, depths=(1, 3, 5, 6, 5, 5, 1), fixed_ends=True, **TIMM),
}
