"""Highway networks (Srivastava et al. 2015, https://arxiv.org/abs/1505.00387 and, longer,
https://arxiv.org/abs/1507.06228), the PyTorch twin.

`HighwayMLP` is the network for MNIST of section 3 of the first paper. `HighwayNet` is the
convolutional one as in the authors' Caffe code (flukeskywalker/highway-networks), whose names the
attributes follow: a plain convolution wherever the number of channels changes, then highway
layers. The papers give the depth and the size of the 32-layer network (about 1.25 million
parameters), not its widths: those are ours.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh}


def affine(in_channels, channels, kernel_size):
    """A dense layer for kernel_size=0, else a convolution that keeps the image's size."""
    if kernel_size == 0:
        return nn.Linear(in_channels, channels)
    return nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)


class Highway(nn.Module):
    """y = H(x) T(x) + x (1 - T(x)) (equation 3): T is the transform gate, 1 - T the carry gate.

    With linear_carry, y = H(x) T(x) + Q(x) (1 - T(x)), Q linear, so that the width may change.
    """

    def __init__(
        self,
        in_channels,
        channels=None,
        kernel_size=0,
        activation="relu",
        gate_bias=-2.0,
        linear_carry=False,
    ):
        super().__init__()
        channels = in_channels if channels is None else channels
        self.activation, self.linear_carry = activation, linear_carry
        self.transform = affine(in_channels, channels, kernel_size)
        self.gate = affine(in_channels, channels, kernel_size)
        if linear_carry:
            self.carry = affine(in_channels, channels, kernel_size)
        initialise(self)
        nn.init.constant_(self.gate.bias, gate_bias)

    def forward(self, x):
        transformed = ACTIVATIONS[self.activation](self.transform(x))
        gate = torch.sigmoid(self.gate(x))
        carried = self.carry(x) if self.linear_carry else x
        return transformed * gate + carried * (1 - gate)


def initialise(module):
    """Weights that keep the variance through ReLUs (He et al. 2015), zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


class HighwayMLP(nn.Module):
    """Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    One plain layer and depth - 1 highway layers; the output layer is not counted.
    """

    def __init__(
        self,
        depth=10,
        width=50,
        image_size=28,
        activation="relu",
        gate_bias=-2.0,
        linear_carry=False,
        num_classes=10,
        in_channels=1,
        dropout=0.0,
    ):
        super().__init__()
        self.activation = activation
        self.plain = nn.Linear(in_channels * image_size * image_size, width)
        highways = (
            Highway(width, None, 0, activation, gate_bias, linear_carry) for _ in range(depth - 1)
        )
        self.highways = nn.Sequential(*highways)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for layer in (self.plain, self.fc):
            initialise(layer)

    def forward(self, x):
        x = ACTIVATIONS[self.activation](self.plain(torch.flatten(x, 1)))
        x = self.highways(x)
        return self.fc(self.dropout(x))


class HighwayNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (pooled features where that is 0).

    Each stage is a plain convolution and `highways` highway layers; max pooling between stages,
    and a plain 1x1 convolution to `hidden` channels before the global average.
    """

    def __init__(
        self,
        widths=(32, 80, 128),
        highways=(4, 5, 5),
        hidden=100,
        gate_bias=-2.0,
        linear_carry=False,
        num_classes=10,
        in_channels=3,
        dropout=0.2,
    ):
        super().__init__()
        parts, count, channels = OrderedDict(), 0, in_channels
        for i, (width, depth) in enumerate(zip(widths, highways, strict=True)):
            if i > 0:
                parts[f"pool{i}"] = nn.MaxPool2d(2, 2)
            parts[f"drop{i + 1}"] = nn.Dropout(dropout)
            count += 1
            parts[f"conv{count}"] = affine(channels, width, 3)
            parts[f"relu{count}"] = nn.ReLU()
            for _ in range(depth):
                count += 1
                parts[f"conv{count}"] = Highway(width, None, 3, "relu", gate_bias, linear_carry)
            channels = width
        parts[f"conv{count + 1}"] = affine(channels, hidden, 1)
        parts[f"relu{count + 1}"] = nn.ReLU()
        self.features = nn.Sequential(parts)
        self.dropout = nn.Dropout(dropout)
        self.ip2 = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()
        for layer in (*self.features, self.ip2):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                initialise(layer)

    def forward(self, x):
        x = self.features(x)
        x = torch.mean(x, (2, 3))
        return self.ip2(self.dropout(x))


NETWORK = "HighwayNet"

VARIANTS = {  # section 3; Table 1 of the second paper: 19 and 32 layers
    "highway_mlp": dict(network="HighwayMLP"),
    "highway_mlp_linear": dict(network="HighwayMLP", linear_carry=True),
    "highway19_cifar": dict(widths=(32, 80, 128), highways=(4, 5, 5)),
    "highway32_cifar": dict(widths=(32, 48, 64), highways=(9, 9, 9)),
}
