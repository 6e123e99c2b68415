"""SqueezeNet (Iandola et al. 2016, https://arxiv.org/abs/1602.07360), the PyTorch twin.

Attribute names are torchvision's. Version 1.0 is the paper's Table 1; 1.1, its authors' later
one, has a smaller first convolution and pools earlier. Pooling rounds up, as in their Caffe model.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Fire(nn.Module):
    """A 1x1 layer that squeezes, then 1x1 and 3x3 filters side by side (section 3.2)."""

    def __init__(self, in_channels, squeeze, expand1x1, expand3x3, bypass="none"):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, 3, padding=1)
        self.bypass = self._bypass(bypass, in_channels, expand1x1 + expand3x3)

    def _bypass(self, kind, in_channels, channels):
        if kind != "none" and in_channels == channels:
            return nn.Identity()
        return nn.Conv2d(in_channels, channels, 1) if kind == "complex" else None

    def forward(self, x):
        squeezed = F.relu(self.squeeze(x))
        y = torch.cat([F.relu(self.expand1x1(squeezed)), F.relu(self.expand3x3(squeezed))], 1)
        return y if self.bypass is None else y + self.bypass(x)


class SqueezeNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (where that is 0: features)."""

    def __init__(
        self,
        stem=(96, 7),
        fires=8,
        pools=(0, 3, 7),
        base=128,
        increment=128,
        frequency=2,
        squeeze_ratio=0.125,
        share3x3=0.5,
        bypass="none",
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__()
        channels, kernel = stem
        features = [nn.Conv2d(in_channels, channels, kernel, stride=2), nn.ReLU()]
        for i in range(fires):
            if i in pools:
                features.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            expand = base + increment * (i // frequency)
            squeeze, expand3x3 = int(squeeze_ratio * expand), int(share3x3 * expand)
            features.append(Fire(channels, squeeze, expand - expand3x3, expand3x3, bypass))
            channels = expand
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(channels, num_classes, 1) if num_classes else nn.Identity(),
            nn.ReLU(),
        )
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is self.classifier[1]:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    bound = math.sqrt(6 / module.weight[0].numel())  # He et al. 2015, uniform
                    nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.classifier(self.features(x))
        return torch.mean(x, (2, 3))


NETWORK = "SqueezeNet"

VARIANTS = {  # Tables 1 and 3
    "squeezenet1_0": dict(),
    "squeezenet1_1": dict(stem=(64, 3), pools=(0, 2, 4)),
    "squeezenet1_0_bypass": dict(bypass="simple"),
    "squeezenet1_0_complex_bypass": dict(bypass="complex"),
}
