"""Network in Network (Lin et al. 2013, https://arxiv.org/abs/1312.4400), the PyTorch twin.

The paper gives no sizes: layers, names and initial values are those of its authors' Caffe models
("cccp", cascaded cross-channel parametric pooling, is a 1x1 convolution). There pooling rounds
up, and the class maps pass a ReLU before they are averaged.
"""

import torch
import torch.nn.functional as F
from torch import nn


def mlpconv(x, *convs):
    """A convolution whose filter is a perceptron (section 3.1): a ReLU after each layer."""
    for conv in convs:
        x = F.relu(conv(x))
    return x


class MLPConv(nn.Module):
    """A convolution and two 1x1 on top, which see one position as a perceptron does (section 3.1).

    For networks of your own: `NIN` keeps these three layers under its authors' flat names.
    """

    def __init__(self, in_channels, widths, kernel_size=3, stride=1, padding=0):
        super().__init__()
        channels, first, second = widths
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, padding)
        self.cccp1 = nn.Conv2d(channels, first, 1)
        self.cccp2 = nn.Conv2d(first, second, 1)

    def forward(self, x):
        return mlpconv(x, self.conv, self.cccp1, self.cccp2)


class NIN(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (where that is 0: features)."""

    pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}

    def __init__(
        self,
        blocks,
        dropped,
        narrow=(),
        num_classes=1000,
        in_channels=3,
        dropout=0.5,
        ceil_mode=True,
    ):
        super().__init__()
        self.blocks, self.dropped = len(blocks), dropped
        for i, (channels, kernel, stride, padding, first, second, pool) in enumerate(blocks, 1):
            conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"cccp{2 * i - 1}", nn.Conv2d(channels, first, 1))
            second = second or num_classes
            last = nn.Conv2d(first, second, 1) if second else nn.Identity()
            setattr(self, f"cccp{2 * i}", last)
            pooling = self.pools[pool](3, 2, ceil_mode=ceil_mode) if pool else nn.Identity()
            setattr(self, f"pool{i}", pooling)
            in_channels = second
        self.dropout = nn.Dropout(dropout)
        self._initialise(narrow)

    def _initialise(self, narrow):
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01 if name in narrow else 0.05)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        for i in range(1, self.blocks + 1):
            names = (f"conv{i}", f"cccp{2 * i - 1}", f"cccp{2 * i}")
            x = mlpconv(x, *(getattr(self, name) for name in names))
            x = getattr(self, f"pool{i}")(x)
            if i in self.dropped:
                x = self.dropout(x)
        return torch.mean(x, (2, 3))


class NINCifar10(NIN):
    """The same with three blocks, so that cccp6 gives the class maps."""


NETWORK = "NIN"

VARIANTS = {  # a block: channels, kernel, stride and padding, then two 1x1 layers, then pooling
    "nin_imagenet": dict(
        blocks=(
            (96, 11, 4, 0, 96, 96, "max"),
            (256, 5, 1, 2, 256, 256, "max"),
            (384, 3, 1, 1, 384, 384, "max"),
            (1024, 3, 1, 1, 1024, None, None),
        ),
        dropped=(3,),
        narrow=("conv1", "conv3", "cccp8"),
    ),
    "nin_cifar10": dict(
        network="NINCifar10",
        blocks=(
            (192, 5, 1, 2, 160, 96, "max"),
            (192, 5, 1, 2, 192, 192, "avg"),
            (192, 3, 1, 1, 192, None, None),
        ),
        dropped=(1, 2),
        num_classes=10,
    ),
}
