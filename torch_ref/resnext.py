"""ResNeXt (Xie et al. 2016, https://arxiv.org/abs/1611.05431), the PyTorch twin.

A ResNet whose bottlenecks aggregate `cardinality` parallel paths: one grouped 3x3 convolution
(Figure 3c). Attribute names are torchvision's.
"""

from torch_ref.resnet import Bottleneck, ResNet


class NarrowBottleneck(Bottleneck):
    """A bottleneck that widens threefold: what many ports of the CIFAR networks have."""

    expansion = 3


class ResNeXt(ResNet):
    """Images [N, in_channels, H, W] -> logits [N, num_classes]."""

    blocks = {4: Bottleneck, 3: NarrowBottleneck}

    def __init__(
        self,
        depths=(3, 4, 6, 3),
        cardinality=32,
        base_width=4,
        widths=(64, 128, 256, 512),
        widening=4,
        stem="imagenet",
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        zero_init_last=False,
        stochastic_depth=0.0,
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
        )


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
