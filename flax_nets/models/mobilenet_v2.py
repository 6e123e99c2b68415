"""MobileNet-v2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381).

Table 2. Attribute names are torchvision's. Rows named `mobilenetv2_*` are timm's networks: no
dropout, other initial values, and in those ending in "d" deeper stages between an unscaled stem
and head.
"""

import jax
from flax import nnx

from flax_nets import layers
from flax_nets.layers.mobile import conv_norm_act, initialise_mobile, make_divisible


class InvertedResidual(nnx.Module):
    """1x1 up, 3x3 per channel, 1x1 down *without* activation, and a skip between the narrow ends
    (Table 1, Figure 4d).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        expansion: int = 6,
        same: bool = False,
        *,
        rngs: nnx.Rngs | None,
        **norm: float,
    ):
        hidden = in_channels * expansion
        self.has_skip = stride == 1 and in_channels == channels
        expand = conv_norm_act(in_channels, hidden, 1, rngs=rngs, **norm) if expansion > 1 else None
        self.conv = layers.Sequential(
            *([] if expand is None else [expand]),
            conv_norm_act(hidden, hidden, 3, stride, hidden, same=same, rngs=rngs, **norm),
            layers.Conv(hidden, channels, 1, bias=False, rngs=rngs),
            layers.BatchNorm(channels, rngs=rngs, **norm),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv(x) if self.has_skip else self.conv(x)


class MobileNetV2(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where it is 0).

    Args:
      width: multiplier of all channels; the head never gets narrower.
      divisor: what they are rounded to multiples of. Default 8.
      depths: blocks per stage, seven of them.
      widths: channels of the stem, of each stage and of the head, before the multiplier.
      fixed_ends: whether stem and head keep their widths. Default False.
      same: whether to pad as TensorFlow does. Default False.
      eps, momentum: of the batch norms. Defaults 1e-5 and 0.1.
      dropout: before the last layer. Default 0.2.
      initialise: whose initial values, "torchvision"'s or "timm"'s.
    """

    expansions = (1, 6, 6, 6, 6, 6, 6)
    strides = (1, 2, 2, 2, 1, 2, 1)
    input_layer, output_layers = "features.0.0", ("classifier.1",)

    def __init__(
        self,
        width: float = 1.0,
        divisor: int = 8,
        depths: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1),
        widths: tuple[int, ...] = (32, 16, 24, 32, 64, 96, 160, 320, 1280),
        fixed_ends: bool = False,
        same: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        initialise: str = "torchvision",
        *,
        rngs: nnx.Rngs | None,
    ):
        if width <= 0:
            raise ValueError(f"width multiplies the channels and must be above 0, got {width}")
        if (len(depths), len(widths)) != (7, 9):
            raise ValueError(
                "there are 7 stages between a stem and a head, "
                f"got depths={depths}, widths={widths}"
            )
        stem, *stage_widths, head = widths
        if not fixed_ends:
            stem = make_divisible(width * stem, divisor)
            head = make_divisible(max(width, 1.0) * head, divisor)
        norm = dict(same=same, eps=eps, momentum=momentum, rngs=rngs)
        features = [conv_norm_act(in_channels, stem, 3, stride=2, **norm)]
        channels_in = stem
        for expansion, channels, depth, stride in zip(
            self.expansions, stage_widths, depths, self.strides, strict=True
        ):
            channels = make_divisible(width * channels, divisor)
            for j in range(depth):
                step = stride if j == 0 else 1
                block = InvertedResidual(channels_in, channels, step, expansion, **norm)
                features.append(block)
                channels_in = channels
        features.append(conv_norm_act(channels_in, head, 1, **norm))
        self.features = layers.Sequential(*features)
        self.classifier = layers.Sequential(
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(head, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )
        initialise_mobile(self, initialise, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.global_avg_pool(x)
        return self.classifier(x)


TIMM = dict(dropout=0.0, initialise="timm")

NETWORK = "MobileNetV2"

VARIANTS = {  # Table 4 and Figure 5; all but the first are timm's
    "mobilenet_v2": dict(),
    "mobilenetv2_035": dict(width=0.35, **TIMM),
    "mobilenetv2_050": dict(width=0.5, **TIMM),
    "mobilenetv2_075": dict(width=0.75, **TIMM),
    "mobilenetv2_140": dict(width=1.4, **TIMM),
    "mobilenetv2_110d": dict(width=1.1, depths=(1, 3, 4, 5, 4, 4, 1), fixed_ends=True, **TIMM),
    "mobilenetv2_120d": dict(width=1.2, depths=(1, 3, 5, 6, 5, 5, 1), fixed_ends=True, **TIMM),
}
