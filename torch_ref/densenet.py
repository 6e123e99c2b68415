"""DenseNet (Huang et al. 2016, https://arxiv.org/abs/1608.06993), the PyTorch twin.

Attribute names are torchvision's. Table 1 has the ImageNet networks, Table 2 those for CIFAR;
the latter start with a bare 3x3 convolution and have three dense blocks.
"""

import contextlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 to `bottleneck * growth` channels, BN-ReLU-3x3 to `growth` (section 3).

    With bottleneck=0 the 3x3 alone. Takes the list of all earlier maps of its block.
    """

    def __init__(self, in_channels, growth, bottleneck=4, dropout=0.0, remat=False, bias=False):
        super().__init__()
        self.bottleneck, self.remat = bottleneck, remat
        self.norm1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            width = bottleneck * growth
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=bias)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=bias)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def first(self, *features):
        x = torch.cat(features, 1)
        return self.conv1(F.relu(self.norm1(x)))

    def forward(self, features):
        if self.remat and self.training:
            x = checkpoint(self.first, *features, use_reentrant=False, context_fn=self._contexts)
        else:
            x = self.first(*features)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x)))
        return self.dropout(x)

    def _contexts(self):
        return contextlib.nullcontext(), self._second_time()

    @contextlib.contextmanager
    def _second_time(self):
        """While recomputing, the running statistics stay: the first pass has counted the batch."""
        momentum, self.norm1.momentum = self.norm1.momentum, 0.0
        try:
            yield
        finally:
            self.norm1.momentum = momentum
            self.norm1.num_batches_tracked.sub_(1)


class DenseBlock(nn.Sequential):
    """Layers that each see the maps of all layers before (Figure 1), concatenated."""

    def __init__(
        self, depth, in_channels, growth, bottleneck=4, dropout=0.0, remat=False, bias=False
    ):
        made = OrderedDict()
        for i in range(depth):
            made[f"denselayer{i + 1}"] = DenseLayer(
                in_channels + i * growth, growth, bottleneck, dropout, remat, bias
            )
        super().__init__(made)

    def forward(self, x):
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


def transition(in_channels, channels, bias=False):
    """BN-ReLU-1x1 and 2x2 average pooling between two blocks."""
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, channels, 1, bias=bias),
            pool=nn.AvgPool2d(2, 2),
        )
    )


class DenseNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (where that is 0: features)."""

    def __init__(
        self,
        growth=32,
        depths=(6, 12, 24, 16),
        stem_channels=64,
        bottleneck=4,
        compression=0.5,
        stem="imagenet",
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        remat=False,
        bias=False,
    ):
        super().__init__()
        channels = stem_channels
        if stem == "imagenet":
            parts = OrderedDict(
                conv0=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=bias),
                norm0=nn.BatchNorm2d(channels),
                relu0=nn.ReLU(),
                pool0=nn.MaxPool2d(3, 2, 1),
            )
        else:
            parts = OrderedDict(conv0=nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias))
        for i, depth in enumerate(depths):
            if i > 0:
                compressed = int(channels * compression)
                parts[f"transition{i}"] = transition(channels, compressed, bias)
                channels = compressed
            parts[f"denseblock{i + 1}"] = DenseBlock(
                depth, channels, growth, bottleneck, dropout, remat, bias
            )
            channels += depth * growth
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.relu(self.features(x))
        x = torch.mean(x, (2, 3))
        return self.classifier(x)


CIFAR = dict(growth=12, stem="cifar", num_classes=10)

NETWORK = "DenseNet"

VARIANTS = {  # Table 1 (161: the authors' release, k=48); CIFAR: Table 2, L=40 and BC L=100
    "densenet121": dict(depths=(6, 12, 24, 16)),
    "densenet161": dict(depths=(6, 12, 36, 24), growth=48, stem_channels=96),
    "densenet169": dict(depths=(6, 12, 32, 32)),
    "densenet201": dict(depths=(6, 12, 48, 32)),
    "densenet264": dict(depths=(6, 12, 64, 48)),
    "densenet40_k12_cifar": dict(
        depths=(12, 12, 12), stem_channels=16, bottleneck=0, compression=1.0, **CIFAR
    ),
    "densenet_bc100_k12_cifar": dict(depths=(16, 16, 16), stem_channels=24, **CIFAR),
}
