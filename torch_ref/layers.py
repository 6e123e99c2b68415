"""What several PyTorch twins share."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Conv2dSame(nn.Conv2d):
    """A convolution that pads as TensorFlow's "same": the output has ceil(size / stride) pixels,
    and where the padding is odd, the extra zero stands below and to the right."""

    def forward(self, x):
        sides = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides = [total // 2, total - total // 2, *sides]  # F.pad starts at the last axis
        x = F.pad(x, sides)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StochasticDepth(nn.Module):
    """Drops whole examples in train mode (Huang et al. 2016), torchvision's "row" mode."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return torch.where(keep, x / max(1 - self.rate, 1e-12), torch.zeros_like(x))


def make_divisible(channels, divisor=8):
    """The multiple of `divisor` nearest to `channels`, the next one where that loses over 10%."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def conv_norm_act(
    in_channels,
    channels,
    kernel_size=3,
    stride=1,
    groups=1,
    activation=nn.ReLU6,
    same=False,
    eps=1e-5,
    momentum=0.1,
):
    """Convolution, batch norm and activation (or none), "0", "1" and "2" of a `Sequential`.

    same: whether it pads as TensorFlow does, or by kernel_size // 2 on every side.
    """
    conv = Conv2dSame if same else nn.Conv2d
    padding = 0 if same else kernel_size // 2
    stack = [
        conv(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels, eps=eps, momentum=momentum),
    ]
    return nn.Sequential(*stack, *([] if activation is None else [activation()]))


def initialise_mobile(model, library):
    """The initial values of the MobileNets: "torchvision"'s, or "timm"'s, which are Google's.

    Both draw a convolution from a normal distribution by its fan-out; torchvision counts every
    group of a depthwise convolution, timm one.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            gain = 2 if library == "torchvision" else 2 * module.groups
            fan_out = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, 0, math.sqrt(gain / fan_out))
        elif isinstance(module, nn.Linear) and library == "torchvision":
            nn.init.normal_(module.weight, 0, 0.01)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class BasicConv2d(nn.Module):
    """Convolution, batch norm (epsilon 1e-3), ReLU: the unit of the Inception networks.

    Without batch norm the convolution has a bias.
    """

    def __init__(self, in_channels, channels, kernel_size, stride=1, padding=0, batch_norm=True):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, stride, padding, bias=not batch_norm
        )
        self.bn = nn.BatchNorm2d(channels, eps=1e-3) if batch_norm else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def transform_input(x):
    """Images normalised by ImageNet's mean and deviation -> images normalised to [-1, 1].

    Google's weights of GoogLeNet and Inception-v3 expect the latter, torchvision feeds the former.
    """
    mean = x.new_tensor((0.485, 0.456, 0.406))[:, None, None]
    std = x.new_tensor((0.229, 0.224, 0.225))[:, None, None]
    return x * (std / 0.5) + (mean - 0.5) / 0.5
