"""MobileNet (Howard et al. 2017, https://arxiv.org/abs/1704.04861).

Table 1. Attribute names are timm's, and so is ReLU6, where the paper writes ReLU. The width
multiplier (section 3.3) is `width`; the resolution multiplier (section 3.4) is the size of the
images: the network takes any.
"""

import jax
from flax import nnx

from flax_nets import layers
from flax_nets.layers import relu6
from flax_nets.layers.mobile import initialise_mobile, make_divisible


class DepthwiseSeparableConv(nnx.Module):
    """A 3x3 per channel, then a 1x1 across channels (Figure 3 right).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        same: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        rngs: nnx.Rngs | None,
    ):
        n = in_channels
        norm = dict(eps=eps, momentum=momentum, rngs=rngs)
        padding = "same" if same else 1
        self.conv_dw = layers.Conv(n, n, 3, stride, padding, groups=n, bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(in_channels, **norm)
        self.conv_pw = layers.Conv(in_channels, channels, 1, bias=False, rngs=rngs)
        self.bn2 = layers.BatchNorm(channels, **norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu6(self.bn1(self.conv_dw(x)))
        return relu6(self.bn2(self.conv_pw(x)))


class MobileNetV1(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where it is 0).

    Args:
      width: the width multiplier (the paper's alpha) of all channels.
      divisor: what they are rounded to multiples of. Default 8.
      depths: blocks per stage.
      widths: channels of the stem and of each stage, before the multiplier.
      same: whether to pad as TensorFlow does. Default False.
      eps, momentum: of the batch norms. Defaults 1e-5 and 0.1.
      dropout: before the last layer. Default 0.
    """

    input_layer, output_layers = "conv_stem", ("classifier",)

    def __init__(
        self,
        width: float = 1.0,
        divisor: int = 8,
        depths: tuple[int, ...] = (1, 2, 2, 6, 2),
        widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024),
        same: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if width <= 0:
            raise ValueError(f"width multiplies the channels and must be above 0, got {width}")
        if len(widths) != len(depths) + 1:
            raise ValueError(f"widths={widths} must be one longer than depths={depths}: the stem's")
        channels_in, *stage_widths = (make_divisible(width * n, divisor) for n in widths)
        norm = dict(eps=eps, momentum=momentum, rngs=rngs)
        padding = "same" if same else 1
        self.conv_stem = layers.Conv(in_channels, channels_in, 3, 2, padding, bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(channels_in, **norm)
        stages = []
        for i, (depth, channels) in enumerate(zip(depths, stage_widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(DepthwiseSeparableConv(channels_in, channels, stride, same, **norm))
                channels_in = channels
            stages.append(layers.Sequential(*stage))
        self.blocks = layers.Sequential(*stages)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.classifier = (
            layers.Linear(channels_in, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )
        initialise_mobile(self, "timm", rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu6(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = layers.global_avg_pool(x)
        return self.classifier(self.dropout(x))


NETWORK = "MobileNetV1"

VARIANTS = {  # Tables 5 and 6; timm publishes 100 and 125
    "mobilenetv1_025": dict(width=0.25),
    "mobilenetv1_050": dict(width=0.5),
    "mobilenetv1_075": dict(width=0.75),
    "mobilenetv1_100": dict(width=1.0),
    "mobilenetv1_125": dict(width=1.25),
}
