"""Inception-v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).

Attribute names are torchvision's, which timm shares. Against the paper's Table 1, as in Google's
release: a 1x1 of 80 channels and a pooling in the stem where the table has two strided 3x3.
torchvision's network has its auxiliary head and dropout 0.5, timm's has neither.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init


class InceptionOutputs(NamedTuple):
    """What the network returns in train mode, each [N, num_classes]."""

    logits: jax.Array
    aux_logits: jax.Array


class InceptionA(nnx.Module):
    """Figure 5: two 3x3 in a row see as much as a 5x5. (The released network keeps one 5x5.)

    Call: x [N, H, W, in_channels] -> [N, H, W, 224 + pool_features].
    """

    def __init__(self, in_channels: int, pool_features: int, *, rngs: nnx.Rngs | None):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.branch1x1 = conv(in_channels, 64, 1)
        self.branch5x5_1 = conv(in_channels, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, padding=1)
        self.pool = layers.AvgPool(3, 1, 1)
        self.branch_pool = conv(in_channels, pool_features, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(self.pool(x))
        return jnp.concatenate((branch1x1, branch5x5, branch3x3dbl, branch_pool), -1)


class InceptionB(nnx.Module):
    """Figure 10: halves the grid; the pooling and the strided convolutions stand side by side.

    Call: x [N, H, W, in_channels] -> [N, (H-1)/2, (W-1)/2, 480 + in_channels], rounded down.
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs | None):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.branch3x3 = conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)
        self.pool = layers.MaxPool(3, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate((branch3x3, branch3x3dbl, self.pool(x)), -1)


class InceptionC(nnx.Module):
    """Figure 6: a 7x7 as 1x7 and 7x1, with `channels_7x7` between the two.

    Call: x [N, H, W, in_channels] -> [N, H, W, 768].
    """

    def __init__(self, in_channels: int, channels_7x7: int, *, rngs: nnx.Rngs | None):
        conv, c7 = partial(layers.BasicConv2d, rngs=rngs), channels_7x7
        self.branch1x1 = conv(in_channels, 192, 1)
        self.branch7x7_1 = conv(in_channels, c7, 1)
        self.branch7x7_2 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = conv(c7, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = conv(in_channels, c7, 1)
        self.branch7x7dbl_2 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = conv(c7, 192, (1, 7), padding=(0, 3))
        self.pool = layers.AvgPool(3, 1, 1)
        self.branch_pool = conv(in_channels, 192, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(self.pool(x))
        return jnp.concatenate((branch1x1, branch7x7, branch7x7dbl, branch_pool), -1)


class InceptionD(nnx.Module):
    """Halves the grid, as `InceptionB` does, after factorised 7x7.

    Call: x [N, H, W, in_channels] -> [N, (H-1)/2, (W-1)/2, 512 + in_channels], rounded down.
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs | None):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.branch3x3_1 = conv(in_channels, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = conv(in_channels, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2)
        self.pool = layers.MaxPool(3, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return jnp.concatenate((branch3x3, branch7x7x3, self.pool(x)), -1)


class InceptionE(nnx.Module):
    """Figure 7: 1x3 and 3x1 side by side, for many features on a coarse grid.

    Call: x [N, H, W, in_channels] -> [N, H, W, 2048].
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs | None):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.branch1x1 = conv(in_channels, 320, 1)
        self.branch3x3_1 = conv(in_channels, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1), padding=(1, 0))
        self.pool = layers.AvgPool(3, 1, 1)
        self.branch_pool = conv(in_channels, 192, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        branch1x1 = self.branch1x1(x)
        y = self.branch3x3_1(x)
        branch3x3 = (self.branch3x3_2a(y), self.branch3x3_2b(y))
        y = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = (self.branch3x3dbl_3a(y), self.branch3x3dbl_3b(y))
        branch_pool = self.branch_pool(self.pool(x))
        return jnp.concatenate((branch1x1, *branch3x3, *branch3x3dbl, branch_pool), -1)


class InceptionAux(nnx.Module):
    """The auxiliary head with batch norm (section 4, Figure 8).

    Call: x [N, H, W, in_channels] -> [N, num_classes]. Raises ValueError below 17x17.
    """

    def __init__(self, in_channels, num_classes, *, rngs):
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.pool = layers.AvgPool(5, 3)
        self.conv0 = conv(in_channels, 128, 1)
        self.conv1 = conv(128, 768, 5)
        self.fc = layers.Linear(768, num_classes, rngs=rngs) if num_classes else layers.Identity()

    def __call__(self, x: jax.Array) -> jax.Array:
        if min(x.shape[1:3]) < 17:
            raise ValueError(
                f"the auxiliary head takes maps of 17x17 and above, got {x.shape}: use images of "
                "299 pixels and above, or aux_logits=False"
            )
        x = self.conv1(self.conv0(self.pool(x)))  # 17x17 -> 5x5 -> 1x1
        return self.fc(layers.global_avg_pool(x))


class InceptionV3(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    The side is 299 pixels in the paper, 75 at least, and 299 at least in train mode with the
    auxiliary head. Then it returns an `InceptionOutputs`; torchvision's recipe adds the loss of
    the head with a weight of 0.4.

    Args:
      aux_logits: whether it has the auxiliary head. Default True.
      transform_input: whether images normalised as torchvision does are brought to [-1, 1] first,
        as torchvision's published weights expect. Default False.
      dropout: before the last layer. Default 0.5.

    Raises ValueError for `transform_input` on other than 3 channels.
    """

    image_size = 299
    input_layer, output_layers = "Conv2d_1a_3x3.conv", ("fc", "AuxLogits.fc")
    aux_layers = ("AuxLogits",)

    def __init__(
        self,
        aux_logits: bool = True,
        transform_input: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs | None,
    ):
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input needs in_channels=3, got in_channels={in_channels}")
        self.transform_input = transform_input
        self.deterministic = False
        conv = partial(layers.BasicConv2d, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(in_channels, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)
        self.maxpool1 = layers.MaxPool(3, 2)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3)
        self.maxpool2 = layers.MaxPool(3, 2)
        self.Mixed_5b = InceptionA(192, pool_features=32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, pool_features=64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, pool_features=64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, channels_7x7=128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, channels_7x7=160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, channels_7x7=160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, channels_7x7=192, rngs=rngs)
        self.AuxLogits = InceptionAux(768, num_classes, rngs=rngs) if aux_logits else None
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.Linear(2048, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self._initialise(rngs)

    def _initialise(self, rngs):
        for path, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv | layers.Linear):
                std = 0.001 if path == ("AuxLogits", "fc") else 0.1
                init.reinit(module.kernel, init.trunc_normal(std), rngs)

    def __call__(self, x: jax.Array) -> jax.Array | InceptionOutputs:
        if self.transform_input:
            x = layers.transform_input(x)
        heads = not self.deterministic and self.AuxLogits is not None
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5b(self.maxpool2(x))
        x = self.Mixed_5d(self.Mixed_5c(x))  # 299 pixels: [N, 35, 35, 288]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))  # [N, 17, 17, 768]
        aux = self.AuxLogits(x) if heads else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 8, 8, 2048]
        x = layers.global_avg_pool(x)
        x = self.fc(self.dropout(x))
        return InceptionOutputs(x, aux) if heads else x


NETWORK = "InceptionV3"

VARIANTS = {
    "inception_v3": dict(),
}
