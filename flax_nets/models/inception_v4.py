"""Inception-v4 and Inception-ResNet-v2 (Szegedy et al. 2016, https://arxiv.org/abs/1602.07261).

Attribute names are timm's. Inception-v4 is the paper's, Figures 3 to 9. Of Inception-ResNet-v2 it
is the network that Google released, with Inception-v3's stem and other widths (320, 1088, 2080)
than the paper's Figures 15 to 19. No average pooling counts its padding. timm's default has no
dropout; the paper keeps 0.8 before the last layer.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import relu


class Branches(nnx.Module):
    """Named branches side by side, their channels concatenated.

    Call: x [N, H, W, C] -> [N, H', W', sum of the branches' channels].
    """

    def __init__(self, **branches):
        self.names = tuple(branches)
        for name, branch in branches.items():
            setattr(self, name, branch)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([getattr(self, name)(x) for name in self.names], -1)


def pool_branch(in_channels: int, channels: int, rngs: nnx.Rngs | None) -> layers.Sequential:
    """Average pooling, then a 1x1."""
    return layers.Sequential(
        layers.AvgPool(3, 1, 1, count_include_pad=False),
        layers.BasicConv2d(in_channels, channels, 1, rngs=rngs),
    )


class Mixed3a(Branches):
    """Figure 3, the first concatenation of the stem: 160 channels, a quarter of the side."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(maxpool=layers.MaxPool(3, 2), conv=conv(64, 96, 3, stride=2))


class Mixed4a(Branches):
    """Figure 3, the second: 192 channels."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=layers.Sequential(conv(160, 64, 1), conv(64, 96, 3)),
            branch1=layers.Sequential(
                conv(160, 64, 1),
                conv(64, 64, (1, 7), padding=(0, 3)),
                conv(64, 64, (7, 1), padding=(3, 0)),
                conv(64, 96, 3),
            ),
        )


class Mixed5a(Branches):
    """Figure 3, the third: 384 channels, an eighth of the side."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(conv=conv(192, 192, 3, stride=2), maxpool=layers.MaxPool(3, 2))


class InceptionA(Branches):
    """Figure 4: the 35x35 grid."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=conv(384, 96, 1),
            branch1=layers.Sequential(conv(384, 64, 1), conv(64, 96, 3, padding=1)),
            branch2=layers.Sequential(
                conv(384, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)
            ),
            branch3=pool_branch(384, 96, rngs),
        )


class ReductionA(Branches):
    """Figure 7 with the widths k, l, m, n of Table 1: from 35x35 to 17x17."""

    def __init__(self, in_channels, widths, *, rngs):
        conv, (k, ell, m, n) = partial(layers.BasicConv2d, rngs=rngs), widths
        super().__init__(
            branch0=conv(in_channels, n, 3, stride=2),
            branch1=layers.Sequential(
                conv(in_channels, k, 1), conv(k, ell, 3, padding=1), conv(ell, m, 3, stride=2)
            ),
            branch2=layers.MaxPool(3, 2),
        )


class InceptionB(Branches):
    """Figure 5: the 17x17 grid."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=conv(1024, 384, 1),
            branch1=layers.Sequential(
                conv(1024, 192, 1),
                conv(192, 224, (1, 7), padding=(0, 3)),
                conv(224, 256, (7, 1), padding=(3, 0)),
            ),
            branch2=layers.Sequential(
                conv(1024, 192, 1),
                conv(192, 192, (7, 1), padding=(3, 0)),
                conv(192, 224, (1, 7), padding=(0, 3)),
                conv(224, 224, (7, 1), padding=(3, 0)),
                conv(224, 256, (1, 7), padding=(0, 3)),
            ),
            branch3=pool_branch(1024, 128, rngs),
        )


class ReductionB(Branches):
    """Figure 8: from 17x17 to 8x8."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=layers.Sequential(conv(1024, 192, 1), conv(192, 192, 3, stride=2)),
            branch1=layers.Sequential(
                conv(1024, 256, 1),
                conv(256, 256, (1, 7), padding=(0, 3)),
                conv(256, 320, (7, 1), padding=(3, 0)),
                conv(320, 320, 3, stride=2),
            ),
            branch2=layers.MaxPool(3, 2),
        )


class InceptionC(nnx.Module):
    """Figure 6: the 8x8 grid."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.branch0 = conv(1536, 256, 1)
        self.branch1_0 = conv(1536, 384, 1)
        self.branch1_1a = conv(384, 256, (1, 3), padding=(0, 1))
        self.branch1_1b = conv(384, 256, (3, 1), padding=(1, 0))
        self.branch2_0 = conv(1536, 384, 1)
        self.branch2_1 = conv(384, 448, (3, 1), padding=(1, 0))
        self.branch2_2 = conv(448, 512, (1, 3), padding=(0, 1))
        self.branch2_3a = conv(512, 256, (1, 3), padding=(0, 1))
        self.branch2_3b = conv(512, 256, (3, 1), padding=(1, 0))
        self.branch3 = pool_branch(1536, 256, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.branch1_0(x)
        branch1 = (self.branch1_1a(y), self.branch1_1b(y))
        y = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        branch2 = (self.branch2_3a(y), self.branch2_3b(y))
        return jnp.concatenate((self.branch0(x), *branch1, *branch2, self.branch3(x)), -1)


def _check_depths(depths: tuple[int, ...]) -> None:
    if len(depths) != 3 or min(depths) < 0:
        raise ValueError(f"depths must be three numbers of blocks, got {depths}")


class InceptionV4(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    The side is 299 pixels in the paper, 75 at least.

    Args:
      depths: how many blocks A, B and C there are, each with weights of its own. Default (4, 7, 3).
      dropout: before the last layer. Default 0.

    Raises ValueError where `depths` is not three numbers.
    """

    image_size = 299
    input_layer, output_layers = "features.0.conv", ("last_linear",)

    def __init__(
        self,
        depths: tuple[int, int, int] = (4, 7, 3),
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        _check_depths(depths)
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.features = layers.Sequential(
            conv(in_channels, 32, 3, stride=2),
            conv(32, 32, 3),
            conv(32, 64, 3, padding=1),
            Mixed3a(rngs=rngs),
            Mixed4a(rngs=rngs),
            Mixed5a(rngs=rngs),
            *(InceptionA(rngs=rngs) for _ in range(depths[0])),
            ReductionA(384, widths=(192, 224, 256, 384), rngs=rngs),
            *(InceptionB(rngs=rngs) for _ in range(depths[1])),
            ReductionB(rngs=rngs),
            *(InceptionC(rngs=rngs) for _ in range(depths[2])),
        )
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.last_linear = (
            layers.Linear(1536, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.global_avg_pool(x)
        return self.last_linear(self.dropout(x))


class Mixed5b(Branches):
    """The last part of the released stem: 320 channels on the 35x35 grid."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=conv(192, 96, 1),
            branch1=layers.Sequential(conv(192, 48, 1), conv(48, 64, 5, padding=2)),
            branch2=layers.Sequential(
                conv(192, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)
            ),
            branch3=pool_branch(192, 64, rngs),
        )


class ResidualBlock(Branches):
    """Branches, a linear 1x1 to the width of the input, scaled down and added (Figure 20).

    Scaling by 0.1 to 0.3 keeps wide residual networks from dying early (section 3.3).
    """

    def __init__(self, in_channels, channels, scale, activate=True, *, rngs, **branches):
        super().__init__(**branches)
        self.scale, self.activate = scale, activate
        self.conv2d = layers.Conv(channels, in_channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv2d(super().__call__(x)) * self.scale + x
        return relu(x) if self.activate else x


class Block35(ResidualBlock):
    """Inception-ResNet-A, Figure 16."""

    def __init__(self, scale, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            320,
            128,
            scale,
            rngs=rngs,
            branch0=conv(320, 32, 1),
            branch1=layers.Sequential(conv(320, 32, 1), conv(32, 32, 3, padding=1)),
            branch2=layers.Sequential(
                conv(320, 32, 1), conv(32, 48, 3, padding=1), conv(48, 64, 3, padding=1)
            ),
        )


class Block17(ResidualBlock):
    """Inception-ResNet-B, Figure 17."""

    def __init__(self, scale, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            1088,
            384,
            scale,
            rngs=rngs,
            branch0=conv(1088, 192, 1),
            branch1=layers.Sequential(
                conv(1088, 128, 1),
                conv(128, 160, (1, 7), padding=(0, 3)),
                conv(160, 192, (7, 1), padding=(3, 0)),
            ),
        )


class Mixed7a(Branches):
    """Reduction-B, Figure 18: from 17x17 to 8x8."""

    def __init__(self, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            branch0=layers.Sequential(conv(1088, 256, 1), conv(256, 384, 3, stride=2)),
            branch1=layers.Sequential(conv(1088, 256, 1), conv(256, 288, 3, stride=2)),
            branch2=layers.Sequential(
                conv(1088, 256, 1), conv(256, 288, 3, padding=1), conv(288, 320, 3, stride=2)
            ),
            branch3=layers.MaxPool(3, 2),
        )


class Block8(ResidualBlock):
    """Inception-ResNet-C, Figure 19."""

    def __init__(self, scale, activate=True, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        super().__init__(
            2080,
            448,
            scale,
            activate,
            rngs=rngs,
            branch0=conv(2080, 192, 1),
            branch1=layers.Sequential(
                conv(2080, 192, 1),
                conv(192, 224, (1, 3), padding=(0, 1)),
                conv(224, 256, (3, 1), padding=(1, 0)),
            ),
        )


class InceptionResNetV2(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    The side is 299 pixels in the paper, 75 at least.

    Args:
      depths: how many residual blocks of 35x35, 17x17 and 8x8 there are; a last one, not scaled
        and linear, follows. Default (10, 20, 9).
      dropout: before the last layer. Default 0.

    Raises ValueError where `depths` is not three numbers.
    """

    image_size = 299
    input_layer, output_layers = "conv2d_1a.conv", ("classif",)

    def __init__(
        self,
        depths: tuple[int, int, int] = (10, 20, 9),
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        _check_depths(depths)
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.conv2d_1a = conv(in_channels, 32, 3, stride=2)
        self.conv2d_2a = conv(32, 32, 3)
        self.conv2d_2b = conv(32, 64, 3, padding=1)
        self.maxpool_3a = layers.MaxPool(3, 2)
        self.conv2d_3b = conv(64, 80, 1)
        self.conv2d_4a = conv(80, 192, 3)
        self.maxpool_5a = layers.MaxPool(3, 2)
        self.mixed_5b = Mixed5b(rngs=rngs)
        self.repeat = layers.Sequential(*(Block35(0.17, rngs=rngs) for _ in range(depths[0])))
        self.mixed_6a = ReductionA(320, widths=(256, 256, 384, 384), rngs=rngs)
        self.repeat_1 = layers.Sequential(*(Block17(0.10, rngs=rngs) for _ in range(depths[1])))
        self.mixed_7a = Mixed7a(rngs=rngs)
        self.repeat_2 = layers.Sequential(*(Block8(0.20, rngs=rngs) for _ in range(depths[2])))
        self.block8 = Block8(1.0, activate=False, rngs=rngs)
        self.conv2d_7b = conv(2080, 1536, 1)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.classif = (
            layers.Linear(1536, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.repeat(self.mixed_5b(self.maxpool_5a(x)))  # 299 pixels: [N, 35, 35, 320]
        x = self.repeat_1(self.mixed_6a(x))  # [N, 17, 17, 1088]
        x = self.block8(self.repeat_2(self.mixed_7a(x)))  # [N, 8, 8, 2080]
        x = self.conv2d_7b(x)
        x = layers.global_avg_pool(x)
        return self.classif(self.dropout(x))


NETWORK = "InceptionV4"

VARIANTS = {
    "inception_v4": dict(),
    "inception_resnet_v2": dict(network="InceptionResNetV2"),
}
