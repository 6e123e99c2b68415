"""VGG (Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556), the PyTorch twin.

Attribute names are torchvision's. The paper has no batch norm (the `_bn` forms are torchvision's)
and starts the deeper networks from configuration A, where the references draw once and for all.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class Dense(nn.Linear):
    """A dense layer over `size` x `size` windows, which also slides over larger maps (section 3.2).

    [N, in_features] -> [N, out_features], or a map [N, C, H, W], where C * size^2 = in_features,
    -> [N, out_features, H - size + 1, W - size + 1].
    """

    def __init__(self, in_features, out_features, size=1):
        super().__init__(in_features, out_features)
        self.size = size

    def forward(self, x):
        if x.ndim == 2:
            return super().forward(x)
        kernel = self.weight.reshape(self.out_features, -1, self.size, self.size)
        return F.conv2d(x, kernel, self.bias)


class AtLeast(nn.Module):
    """Stretches maps smaller than `size` x `size` (adaptive average pooling), and keeps others."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        size = max(x.shape[2], self.size), max(x.shape[3], self.size)
        return F.adaptive_avg_pool2d(x, size)


class VGG(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] ([N, hidden] where that is 0)."""

    def __init__(
        self,
        depths,
        widths=(64, 128, 256, 512, 512),
        batch_norm=False,
        pointwise=False,
        hidden=4096,
        head="dense",
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
    ):
        super().__init__()
        features = []
        for stage, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            for i in range(depth):
                kernel = 1 if pointwise and stage >= 2 and i == depth - 1 else 3
                features.append(nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2))
                if batch_norm:
                    features.append(nn.BatchNorm2d(channels))
                features.append(nn.ReLU())
                in_channels = channels
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7) if head == "dense" else AtLeast(7)
        self.classifier = nn.Sequential(
            Dense(in_channels * 7 * 7, hidden, size=7),
            nn.ReLU(),
            nn.Dropout(dropout),
            Dense(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            Dense(hidden, num_classes) if num_classes else nn.Identity(),
        )
        self.head = head
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, Dense):
                hidden = module is not self.classifier[6]
                kernels = hidden and self.head == "conv"  # timm draws these as convolutions
                std = (2 / (module.out_features * module.size**2)) ** 0.5 if kernels else 0.01
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.avgpool(self.features(x))
        if self.head == "dense":
            return self.classifier(torch.flatten(x, 1))
        return self.slide(x)

    def slide(self, x):
        """The head as convolutions: class scores for each window of 7x7, and their mean."""
        return torch.mean(self.classifier(x), (2, 3))


def rescale(images, size):
    """Images [N, C, H, W] with their shorter side resized to `size`, antialiased."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = (round(height * scale), round(width * scale))
    return F.interpolate(images, shape, mode="bilinear", align_corners=False, antialias=True)


def mirrored(images):
    """Images [N, C, H, W] and their mirror images -> [2 * N, C, H, W]."""
    return torch.cat([images, torch.flip(images, (3,))])


def dense_evaluation(model, images, sizes=(256, 384, 512)):
    """Class probabilities [N, num_classes] over whole images, the mean of scales and flips."""
    means = []
    for size in sizes:
        x = mirrored(rescale(images, size))
        probabilities = torch.softmax(model.slide(model.features(x)), 1)  # [2 * N, num_classes]
        means.append(torch.mean(probabilities.reshape(2, len(images), -1), 0))
    return sum(means) / len(means)


def multi_crop_evaluation(model, images, sizes=(256, 384, 512), crop=224, grid=5):
    """Class probabilities [N, num_classes], the mean of scales, flips and a grid of crops."""
    means = []
    for size in sizes:
        x = rescale(images, size)
        tops = [round(i * (x.shape[2] - crop) / (grid - 1)) for i in range(grid)]
        lefts = [round(i * (x.shape[3] - crop) / (grid - 1)) for i in range(grid)]
        corners = itertools.product(tops, lefts)
        windows = [x[:, :, i : i + crop, j : j + crop] for i, j in corners]
        probabilities = torch.cat([torch.softmax(model(mirrored(x)), 1) for x in windows])
        means.append(torch.mean(probabilities.reshape(2 * grid**2, len(images), -1), 0))
    return sum(means) / len(means)


NETWORK = "VGG"

VARIANTS = {  # Table 1: configurations A, B, C, D and E
    "vgg11": dict(depths=(1, 1, 2, 2, 2)),
    "vgg11_bn": dict(depths=(1, 1, 2, 2, 2), batch_norm=True),
    "vgg13": dict(depths=(2, 2, 2, 2, 2)),
    "vgg13_bn": dict(depths=(2, 2, 2, 2, 2), batch_norm=True),
    "vgg16": dict(depths=(2, 2, 3, 3, 3)),
    "vgg16_bn": dict(depths=(2, 2, 3, 3, 3), batch_norm=True),
    "vgg16_c": dict(depths=(2, 2, 3, 3, 3), pointwise=True),
    "vgg19": dict(depths=(2, 2, 4, 4, 4)),
    "vgg19_bn": dict(depths=(2, 2, 4, 4, 4), batch_norm=True),
}
