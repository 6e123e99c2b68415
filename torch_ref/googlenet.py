"""GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842), Table 1; the PyTorch twin.

Attribute names are torchvision's. `googlenet` is torchvision's network: batch norm (epsilon 1e-3)
in place of biases and of local response normalisation, 3x3 where the paper has 5x5, a 2x2 fourth
pooling, and auxiliary heads that pool adaptively. `googlenet_2014` is the paper's; what the paper
leaves open (the constants of the normalisation, the initial values) is as in BVLC's Caffe model.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_ref.layers import BasicConv2d, transform_input


class GoogLeNetOutputs(NamedTuple):
    """What the network returns in train mode, each [N, num_classes], in torchvision's order."""

    logits: torch.Tensor
    aux_logits2: torch.Tensor
    aux_logits1: torch.Tensor


class Inception(nn.Module):
    """Figure 2(b): four branches, 1x1 reductions before the costly ones."""

    def __init__(self, in_channels, ch1x1, red3x3, ch3x3, red5x5, ch5x5, pool_proj, original=False):
        super().__init__()
        conv = partial(BasicConv2d, batch_norm=not original)
        large = 5 if original else 3
        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(
            conv(in_channels, red3x3, 1),
            conv(red3x3, ch3x3, 3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, red5x5, 1),
            conv(red5x5, ch5x5, large, padding=large // 2),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, 1),
        )

    def forward(self, x):
        branches = (self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x))
        return torch.cat(branches, 1)


class InceptionAux(nn.Module):
    """The auxiliary classifier on top of 4a and 4d (section 5)."""

    def __init__(self, in_channels, num_classes, dropout, original):
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3) if original else nn.AdaptiveAvgPool2d(4)
        self.conv = BasicConv2d(in_channels, 128, 1, batch_norm=not original)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes) if num_classes else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.conv(self.pool(x))
        x = torch.flatten(x, 1)  # [N, 128 * 4 * 4]
        x = F.relu(self.fc1(x))
        return self.fc2(self.dropout(x))


class GoogLeNet(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes], pooled features where that is 0."""

    def __init__(
        self,
        original=False,
        aux_logits=True,
        transform_input=False,
        num_classes=1000,
        in_channels=3,
        dropout=0.2,
        dropout_aux=None,
        local_norm=None,
        pool4=None,
    ):
        super().__init__()
        self.transform_input = transform_input
        if dropout_aux is None:
            dropout_aux = 0.7 if dropout else 0.0
        local_norm = original if local_norm is None else local_norm
        pool4 = pool4 or (3 if original else 2)
        conv = partial(BasicConv2d, batch_norm=not original)
        inception = partial(Inception, original=original)
        aux = partial(InceptionAux, dropout=dropout_aux, original=original)
        lrn = partial(nn.LocalResponseNorm, 5, alpha=1e-4, beta=0.75)
        norm = lrn if local_norm else nn.Identity
        self.conv1 = conv(in_channels, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm1 = norm()
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.norm2 = norm()
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = nn.MaxPool2d(pool4, 2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = aux(512, num_classes) if aux_logits else None
        self.aux2 = aux(528, num_classes) if aux_logits else None
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes) if num_classes else nn.Identity()
        self._initialise(original)

    def _initialise(self, original):
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            if original:  # Caffe's "xavier": uniform within sqrt(3 / fan_in)
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                classifier = name in ("fc", "aux1.fc2", "aux2.fc2")
                nn.init.constant_(module.bias, 0.0 if classifier else 0.2)
            else:
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x):
        if self.transform_input:
            x = transform_input(x)
        heads = self.training and self.aux1 is not None
        x = self.norm1(self.maxpool1(self.conv1(x)))  # [N, 64, H/4, W/4]
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))  # [N, 192, H/8, W/8]
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(self.maxpool3(x))  # [N, 512, H/16, W/16]
        aux1 = self.aux1(x) if heads else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if heads else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))  # [N, 1024, H/32, W/32]
        x = torch.mean(x, (2, 3))
        x = self.fc(self.dropout(x))
        return GoogLeNetOutputs(x, aux2, aux1) if heads else x


NETWORK = "GoogLeNet"

VARIANTS = {
    "googlenet": dict(),
    "googlenet_2014": dict(original=True, dropout=0.4),  # dropout: Table 1
}
