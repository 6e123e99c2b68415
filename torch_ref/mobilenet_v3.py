"""MobileNet-v3 (Howard et al. 2019, https://arxiv.org/abs/1905.02244), the PyTorch twin.

Tables 1 and 2. Attribute names are torchvision's. Rows named `mobilenetv3_*` are timm's networks,
and `tf_mobilenetv3_*` those of Google's own checkpoints, padded as TensorFlow pads. They differ
in the batch norm's epsilon and momentum, in dropout and in initial values.
"""

import torch
from torch import nn

from torch_ref.layers import conv_norm_act, initialise_mobile, make_divisible


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2017), with a
    hard-sigmoid for a sigmoid (section 5.3)."""

    def __init__(self, channels, squeeze, activation=nn.ReLU):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = activation()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x):
        scale = torch.mean(x, (2, 3), keepdim=True)
        scale = self.fc2(self.activation(self.fc1(scale)))
        return x * self.scale_activation(scale)


class InvertedResidual(nn.Module):
    """1x1 up, a convolution per channel, squeeze-and-excite, 1x1 down without activation, and a
    skip (Figure 4)."""

    def __init__(
        self,
        in_channels,
        expanded,
        channels,
        kernel_size=3,
        stride=1,
        squeeze=0,
        activation=nn.ReLU,
        squeeze_activation=nn.ReLU,
        skip=True,
        **norm,
    ):
        super().__init__()
        self.has_skip = skip and stride == 1 and in_channels == channels
        block = []
        if expanded != in_channels:
            block.append(conv_norm_act(in_channels, expanded, 1, activation=activation, **norm))
        block.append(
            conv_norm_act(
                expanded, expanded, kernel_size, stride, expanded, activation=activation, **norm
            )
        )
        if squeeze:
            block.append(SqueezeExcitation(expanded, squeeze, squeeze_activation))
        block.append(conv_norm_act(expanded, channels, 1, activation=None, **norm))
        self.block = nn.Sequential(*block)

    def forward(self, x):
        return x + self.block(x) if self.has_skip else self.block(x)


# As in the paper: kernel, expansion size, channels, squeeze-and-excite, nonlinearity, stride.
LARGE = (  # Table 1
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2),
    (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2),
    (5, 120, 40, True, "RE", 1),
    (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2),
    (3, 200, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1),
    (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2),
    (5, 960, 160, True, "HS", 1),
    (5, 960, 160, True, "HS", 1),
)
SMALL = (  # Table 2
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2),
    (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2),
    (5, 240, 40, True, "HS", 1),
    (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1),
    (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2),
    (5, 576, 96, True, "HS", 1),
    (5, 576, 96, True, "HS", 1),
)


class MobileNetV3(nn.Module):
    """Images [N, in_channels, H, W] -> logits [N, num_classes] (features where it is 0)."""

    activations = {"RE": nn.ReLU, "HS": nn.Hardswish}

    def __init__(
        self,
        rows=LARGE,
        head=1280,
        width=1.0,
        fixed_stem=False,
        minimal=False,
        rw=False,
        same=False,
        eps=1e-3,
        momentum=0.01,
        num_classes=1000,
        in_channels=3,
        dropout=0.2,
        initialise="torchvision",
    ):
        super().__init__()
        norm = dict(same=same, eps=eps, momentum=momentum)
        late = nn.ReLU if minimal else nn.Hardswish
        unscaled = 16
        channels_in = unscaled if fixed_stem else make_divisible(width * unscaled)
        stack = [conv_norm_act(in_channels, channels_in, 3, 2, activation=late, **norm)]
        for i, (kernel_size, expanded, channels, excite, name, stride) in enumerate(rows):
            activation = nn.ReLU if minimal else self.activations[name]
            expanded = make_divisible(channels_in * expanded / unscaled)
            squeeze = round(expanded / 4) if rw else make_divisible(expanded / 4)
            unscaled, channels = channels, make_divisible(width * channels)
            stack.append(
                InvertedResidual(
                    channels_in,
                    expanded,
                    channels,
                    3 if minimal else kernel_size,
                    stride,
                    squeeze if excite and not minimal else 0,
                    activation,
                    activation if rw else nn.ReLU,
                    skip=not (rw and i == 0),
                    **norm,
                )
            )
            channels_in = channels
        last = 6 * channels_in
        stack.append(conv_norm_act(channels_in, last, 1, activation=late, **norm))
        self.features = nn.Sequential(*stack)
        self.classifier = nn.Sequential(
            nn.Linear(last, head, bias=not rw),
            late(),
            nn.Dropout(dropout),
            nn.Linear(head, num_classes) if num_classes else nn.Identity(),
        )
        initialise_mobile(self, initialise)
        if initialise == "timm":  # this layer is a convolution there
            nn.init.kaiming_normal_(self.classifier[0].weight, mode="fan_out")

    def forward(self, x):
        x = self.features(x)
        x = torch.mean(x, (2, 3))
        return self.classifier(x)


TIMM = dict(eps=1e-5, momentum=0.1, dropout=0.0, initialise="timm")
TF = dict(same=True, eps=1e-3, momentum=0.1, dropout=0.0, initialise="timm")
L, S = dict(rows=LARGE, head=1280), dict(rows=SMALL, head=1024)

NETWORK = "MobileNetV3"

VARIANTS = {  # Table 3; the first two are torchvision's, all others timm's
    "mobilenet_v3_large": dict(**L),
    "mobilenet_v3_small": dict(**S),
    "mobilenetv3_large_075": dict(**L, width=0.75, **TIMM),
    "mobilenetv3_small_050": dict(**S, width=0.5, fixed_stem=True, **TIMM),
    "mobilenetv3_small_075": dict(**S, width=0.75, **TIMM),
    "mobilenetv3_rw": dict(**L, rw=True, **{**TIMM, "eps": 1e-3}),
    "tf_mobilenetv3_large_075": dict(**L, width=0.75, **TF),
    "tf_mobilenetv3_large_100": dict(**L, **TF),
    "tf_mobilenetv3_large_minimal_100": dict(**L, minimal=True, **TF),
    "tf_mobilenetv3_small_075": dict(**S, width=0.75, **TF),
    "tf_mobilenetv3_small_100": dict(**S, **TF),
    "tf_mobilenetv3_small_minimal_100": dict(**S, minimal=True, **TF),
}
