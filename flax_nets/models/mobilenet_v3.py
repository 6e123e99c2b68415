"""MobileNet-v3 (Howard et al. 2019, https://arxiv.org/abs/1905.02244).

Tables 1 and 2. Attribute names are torchvision's. Rows named `mobilenetv3_*` are timm's networks,
and `tf_mobilenetv3_*` those of Google's own checkpoints, padded as TensorFlow pads. They differ
in the batch norm's epsilon and momentum, in dropout and in initial values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import hard_sigmoid, hard_swish, init, relu
from flax_nets.layers.mobile import conv_norm_act, initialise_mobile, make_divisible


class SqueezeExcitation(nnx.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2017), with a
    hard-sigmoid for a sigmoid (section 5.3).

    Call: x [N, H, W, channels] -> the same shape.
    """

    def __init__(
        self, channels: int, squeeze: int, activation: Callable = relu, *, rngs: nnx.Rngs | None
    ):
        self.fc1 = layers.Conv(channels, squeeze, 1, rngs=rngs)
        self.fc2 = layers.Conv(squeeze, channels, 1, rngs=rngs)
        self.activation = activation
        self.scale_activation = hard_sigmoid

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.mean(x, (1, 2), keepdims=True)
        scale = self.fc2(self.activation(self.fc1(scale)))
        return x * self.scale_activation(scale)


class InvertedResidual(nnx.Module):
    """1x1 up, a convolution per channel, squeeze-and-excite, 1x1 down without activation, and a
    skip (Figure 4).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].

    Args:
      expanded: channels within. squeeze: channels within the squeeze-and-excite, 0 for none.
      norm: `same`, `eps` and `momentum` of its convolutions and batch norms.
    """

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        squeeze: int = 0,
        activation: Callable = relu,
        squeeze_activation: Callable = relu,
        skip: bool = True,
        *,
        rngs: nnx.Rngs | None,
        **norm: Any,
    ):
        norm |= dict(rngs=rngs)
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
            block.append(SqueezeExcitation(expanded, squeeze, squeeze_activation, rngs=rngs))
        block.append(conv_norm_act(expanded, channels, 1, activation=None, **norm))
        self.block = layers.Sequential(*block)

    def __call__(self, x: jax.Array) -> jax.Array:
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


class MobileNetV3(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (features where it is 0).

    Without a head it gives the `head` features before the last layer, as timm's does.

    Args:
      rows: one block each: kernel, expansion size, channels, squeeze-and-excite, "RE" (ReLU) or
        "HS" (hard-swish), stride.
      head: channels of the layer before the last; `width` leaves it as it is. Default 1280.
      width: multiplier of all other channels, rounded to multiples of 8. Default 1.
      fixed_stem: whether the stem keeps its 16 channels. Default False.
      minimal: whether all is 3x3 and ReLU without squeeze-and-excite. Default False.
      rw: timm's `mobilenetv3_rw`: no skip in the first block, squeezed widths not rounded to 8,
        each block's own activation within its squeeze-and-excite, no bias before the last layer.
      same: whether to pad as TensorFlow does. Default False.
      eps, momentum: of the batch norms. Defaults 1e-3 and 0.01, torchvision's.
      dropout: before the last layer. Default 0.2.
      initialise: whose initial values, "torchvision"'s or "timm"'s.
    """

    activations = {"RE": relu, "HS": hard_swish}
    input_layer, output_layers = "features.0.0", ("classifier.3",)

    def __init__(
        self,
        rows: tuple[tuple, ...] = LARGE,
        head: int = 1280,
        width: float = 1.0,
        fixed_stem: bool = False,
        minimal: bool = False,
        rw: bool = False,
        same: bool = False,
        eps: float = 1e-3,
        momentum: float = 0.01,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        initialise: str = "torchvision",
        *,
        rngs: nnx.Rngs | None,
    ):
        if width <= 0:
            raise ValueError(f"width multiplies the channels and must be above 0, got {width}")
        if any(len(row) != 6 or row[4] not in self.activations for row in rows):
            raise ValueError(
                "a row is (kernel, expansion size, channels, squeeze-and-excite, "
                f'"RE" or "HS", stride), got {rows}'
            )
        norm = dict(same=same, eps=eps, momentum=momentum, rngs=rngs)
        late = relu if minimal else hard_swish
        unscaled = 16
        channels_in = unscaled if fixed_stem else make_divisible(width * unscaled)
        stack = [conv_norm_act(in_channels, channels_in, 3, 2, activation=late, **norm)]
        for i, (kernel_size, expanded, channels, excite, name, stride) in enumerate(rows):
            activation = relu if minimal else self.activations[name]
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
                    activation if rw else relu,
                    skip=not (rw and i == 0),
                    **norm,
                )
            )
            channels_in = channels
        last = 6 * channels_in
        stack.append(conv_norm_act(channels_in, last, 1, activation=late, **norm))
        self.features = layers.Sequential(*stack)
        self.classifier = layers.Sequential(
            layers.Linear(last, head, bias=not rw, rngs=rngs),
            late,
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(head, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )
        initialise_mobile(self, initialise, rngs)
        if initialise == "timm":  # this layer is a convolution there
            kernel = self.classifier[0].kernel
            init.reinit(kernel, init.kaiming_normal(kernel.shape), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.global_avg_pool(x)
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
