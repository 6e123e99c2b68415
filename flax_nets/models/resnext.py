"""ResNeXt (Xie et al. 2016, https://arxiv.org/abs/1611.05431).

A ResNet whose bottlenecks aggregate `cardinality` parallel paths: one grouped 3x3 convolution
(Figure 3c). Attribute names are torchvision's.
"""

from collections.abc import Mapping

from flax import nnx

from flax_nets.models.resnet import Bottleneck, ResNet


class NarrowBottleneck(Bottleneck):
    """A bottleneck that widens threefold: what many ports of the CIFAR networks have."""

    expansion = 3


class ResNeXt(ResNet):
    """Images [N, H, W, in_channels] -> logits [N, num_classes].

    Args:
      cardinality, base_width: paths per bottleneck, and the width of each in the first stage.
      widening: of a bottleneck's output: 4 as in the paper (default), or 3.
      Others as in `ResNet`.
    """

    blocks = {4: Bottleneck, 3: NarrowBottleneck}

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        cardinality: int = 32,
        base_width: int = 4,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        widening: int = 4,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        zero_init_last: bool = False,
        stochastic_depth: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        super().__init__(
            block=widening,
            depths=depths,
            widths=widths,
            groups=cardinality,
            base_width=base_width,
            stem=stem,
            num_classes=num_classes,
            in_channels=in_channels,
            dropout=dropout,
            zero_init_last=zero_init_last,
            stochastic_depth=stochastic_depth,
            rngs=rngs,
        )

    @classmethod
    def arguments_shown(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """What a checkpoint's shapes show: how much its bottlenecks widen."""
        stem, expanded = shapes.get("conv1.weight"), shapes.get("layer1.0.conv3.weight")
        widening = expanded[0] // stem[0] if stem and expanded else None
        return {"widening": widening} if widening in cls.blocks else {}


CIFAR = dict(depths=(3, 3, 3), widths=(64, 128, 256), stem="cifar", num_classes=10)

TIMM = dict(depths=(3, 4, 23, 3), zero_init_last=True)  # names that only timm has

NETWORK = "ResNeXt"

VARIANTS = {  # Tables 1 and 3; CIFAR: section 5.3
    "resnext50_32x4d": dict(depths=(3, 4, 6, 3), cardinality=32, base_width=4),
    "resnext101_32x4d": dict(cardinality=32, base_width=4, **TIMM),
    "resnext101_32x8d": dict(depths=(3, 4, 23, 3), cardinality=32, base_width=8),
    "resnext101_32x16d": dict(cardinality=32, base_width=16, **TIMM),
    "resnext101_32x32d": dict(cardinality=32, base_width=32, **TIMM),
    "resnext101_64x4d": dict(depths=(3, 4, 23, 3), cardinality=64, base_width=4),
    "resnext29_8x64d_cifar": dict(cardinality=8, base_width=64, **CIFAR),
    "resnext29_16x64d_cifar": dict(cardinality=16, base_width=64, **CIFAR),
}
