"""AlexNet (Krizhevsky et al. 2012), the PyTorch twin.

`AlexNet` is torchvision's, with its attribute names: the single column of Krizhevsky 2014
(https://arxiv.org/abs/1404.5997), narrower, and without response normalisation. `AlexNet2012`
is the paper's (section 3, Figure 2), and its two GPUs are two groups.
"""

import torch
from torch import nn


class AlexNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] ([N, hidden] where that is 0)."""

    def __init__(
        self,
        widths=(64, 192, 384, 256, 256),
        hidden=4096,
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, a, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(e * 6 * 6, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes) if num_classes else nn.Identity(),
        )

    def forward(self, x):
        x = self.features(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.classifier(x)


class AlexNet2012(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] ([N, hidden] where that is 0)."""

    def __init__(
        self,
        widths=(96, 256, 384, 384, 256),
        hidden=4096,
        groups=2,
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__()
        a, b, c, d, e = widths
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, a, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(a, b, 5, padding=2, groups=groups),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(b, c, 3, padding=1),  # the one that sees both GPUs
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)  # the identity at the paper's 224 pixels
        self.classifier = nn.Sequential(
            nn.Linear(e * 6 * 6, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes) if num_classes else nn.Identity(),
        )
        self._initialise()

    def _initialise(self):  # section 5: offsets of 1 give the ReLUs positive inputs early on
        for module in (*self.features, *self.classifier):
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        second, fourth, fifth = self.features[4], self.features[10], self.features[12]
        for module in (second, fourth, fifth, self.classifier[0], self.classifier[3]):
            nn.init.ones_(module.bias)

    def forward(self, x):
        x = self.features(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.classifier(x)


NETWORK = "AlexNet"

VARIANTS = {
    "alexnet": dict(),
    "alexnet_2012": dict(network="AlexNet2012"),
}
