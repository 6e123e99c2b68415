"""CBAM (Woo et al. 2018, https://arxiv.org/abs/1807.06521), the PyTorch twin.

Attribute names are those of the authors' code (Jongchan/attention-module), and so is all in which
it differs from the paper: the MLP has biases, the two maps are stacked as [max, mean] where the
paper writes [mean; max], and a batch norm of momentum 0.01 follows the 7x7.
"""

from collections import OrderedDict

import torch
from torch import nn

from torch_ref.resnet import BasicBlock, Bottleneck, ResNet


class ChannelAttention(nn.Module):
    """Scales channels by sigmoid(MLP(mean) + MLP(max)), one MLP for both (equation 2)."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
        )

    def forward(self, x):
        mean, largest = torch.mean(x, (2, 3)), nn.functional.adaptive_max_pool2d(x, 1)
        scale = torch.sigmoid(self.mlp(mean) + self.mlp(largest))
        return x * scale[:, :, None, None]


class SpatialAttention(nn.Module):
    """Scales positions by a 7x7 convolution over the channels' [max, mean] (equation 3)."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.spatial = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False),
                bn=nn.BatchNorm2d(1, momentum=0.01),
            )
        )

    def forward(self, x):
        largest, mean = torch.max(x, 1, keepdim=True).values, torch.mean(x, 1, keepdim=True)
        scale = torch.sigmoid(self.spatial(torch.cat((largest, mean), 1)))
        return x * scale


class CBAM(nn.Module):
    """Channel attention, then spatial attention (Figure 1)."""

    def __init__(self, channels, reduction=16, kernel_size=7):
        super().__init__()
        self.ChannelGate = ChannelAttention(channels, reduction)
        self.SpatialGate = SpatialAttention(kernel_size)

    def forward(self, x):
        return self.SpatialGate(self.ChannelGate(x))


class CBAMBasicBlock(BasicBlock):
    """A basic block whose residual is attended to before the skip joins it (Figure 3)."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut)
        self.cbam = CBAM(channels)

    def residual(self, x):
        return self.cbam(super().residual(x))


class CBAMBottleneck(Bottleneck):
    """The same of a bottleneck."""

    def __init__(self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut)
        self.cbam = CBAM(channels * self.expansion)

    def residual(self, x):
        return self.cbam(super().residual(x))


class CBAMResNet(ResNet):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]."""

    blocks = {"basic": CBAMBasicBlock, "bottleneck": CBAMBottleneck}

    def _initialise(self, zero_init_last):
        """As the authors do: by names, so that the projections keep PyTorch's default."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and "conv" in name:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, SpatialAttention):
                nn.init.zeros_(module.spatial.bn.weight)
            if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)
        if isinstance(self.fc, nn.Linear):
            nn.init.kaiming_normal_(self.fc.weight)


NETWORK = "CBAMResNet"

VARIANTS = {  # Table 4
    "cbam_resnet18": dict(block="basic", depths=(2, 2, 2, 2)),
    "cbam_resnet34": dict(block="basic", depths=(3, 4, 6, 3)),
    "cbam_resnet50": dict(block="bottleneck", depths=(3, 4, 6, 3)),
    "cbam_resnet101": dict(block="bottleneck", depths=(3, 4, 23, 3)),
    "cbam_resnext50_32x4d": dict(block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4),
}
