"""Network in Network (Lin et al. 2013, https://arxiv.org/abs/1312.4400).

The paper gives no sizes: layers, names and initial values are those of its authors' Caffe models
("cccp", cascaded cross-channel parametric pooling, is a 1x1 convolution). There pooling rounds
up, and the class maps pass a ReLU before they are averaged.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


def mlpconv(x: jax.Array, *convs: layers.Conv) -> jax.Array:
    """A convolution whose filter is a perceptron (section 3.1): a ReLU after each layer."""
    for conv in convs:
        x = relu(conv(x))
    return x


class MLPConv(nnx.Module):
    """A convolution and two 1x1 on top, which see one position as a perceptron does (section 3.1).

    For networks of your own: `NIN` keeps these three layers under its authors' flat names.

    Call: x [N, H, W, in_channels] -> [N, H', W', widths[-1]], the size that of the convolution.

    Args:
      widths: channels of the convolution and of the two 1x1.
      kernel_size, stride, padding: of the convolution. Defaults 3, 1 and 0.

    Raises ValueError for other than three widths.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> block = flax_nets.MLPConv(3, (16, 12, 8), kernel_size=5, padding=2, rngs=nnx.Rngs(0))
    >>> block(jax.numpy.ones((2, 9, 9, 3))).shape
    (2, 9, 9, 8)
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int],
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if len(widths) != 3:
            raise ValueError(f"widths are those of three layers, got {widths}")
        channels, first, second = widths
        self.conv = layers.Conv(in_channels, channels, kernel_size, stride, padding, rngs=rngs)
        self.cccp1 = layers.Conv(channels, first, 1, rngs=rngs)
        self.cccp2 = layers.Conv(first, second, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return mlpconv(x, self.conv, self.cccp1, self.cccp2)


class NIN(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (where that is 0: features).

    Global average pooling of one map per class takes the place of dense layers (section 3.2).

    Args:
      blocks: one row per mlpconv block: channels, kernel, stride and padding of its convolution,
        channels of its two 1x1 layers (None for the last one: `num_classes`), and the pooling
        after it, "max", "avg" or None: 3x3 of stride 2.
      dropped: the numbers of the blocks, from 1, that dropout follows.
      narrow: the layers that start with a standard deviation of 0.01; the others have 0.05.
      dropout: default 0.5.
      ceil_mode: whether pooled sizes round up (default), as the authors' do. Many ports round down.

    Raises ValueError for another pooling.
    """

    input_layer, output_layers = "conv1", ("cccp8",)
    pools = {"max": layers.MaxPool, "avg": layers.AvgPool}

    def __init__(
        self,
        blocks: Sequence[tuple[Any, ...]],
        dropped: tuple[int, ...],
        narrow: tuple[str, ...] = (),
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        ceil_mode: bool = True,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.blocks, self.dropped = len(blocks), dropped
        for i, (channels, kernel, stride, padding, first, second, pool) in enumerate(blocks, 1):
            conv = layers.Conv(
                in_channels, channels, kernel, stride=stride, padding=padding, rngs=rngs
            )
            setattr(self, f"conv{i}", conv)
            setattr(self, f"cccp{2 * i - 1}", layers.Conv(channels, first, 1, rngs=rngs))
            second = second or num_classes
            last = layers.Conv(first, second, 1, rngs=rngs) if second else layers.Identity()
            setattr(self, f"cccp{2 * i}", last)
            pooling = (
                layers.choose("pooling", pool, self.pools)(3, 2, ceil_mode=ceil_mode)
                if pool
                else layers.Identity()
            )
            setattr(self, f"pool{i}", pooling)
            in_channels = second
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self._initialise(narrow, rngs)

    def _initialise(self, narrow, rngs):
        for path, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                std = 0.01 if path[0] in narrow else 0.05
                init.reinit(module.kernel, init.normal(std), rngs)
                init.reinit(module.bias, init.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.blocks + 1):
            names = (f"conv{i}", f"cccp{2 * i - 1}", f"cccp{2 * i}")
            x = mlpconv(x, *(getattr(self, name) for name in names))
            x = getattr(self, f"pool{i}")(x)
            if i in self.dropped:
                x = self.dropout(x)
        return layers.global_avg_pool(x)


class NINCifar10(NIN):
    """The same with three blocks, so that cccp6 gives the class maps."""

    output_layers = ("cccp6",)


NETWORK = "NIN"

VARIANTS = {  # a block: channels, kernel, stride and padding, then two 1x1 layers, then pooling
    "nin_imagenet": dict(
        blocks=(
            (96, 11, 4, 0, 96, 96, "max"),
            (256, 5, 1, 2, 256, 256, "max"),
            (384, 3, 1, 1, 384, 384, "max"),
            (1024, 3, 1, 1, 1024, None, None),
        ),
        dropped=(3,),
        narrow=("conv1", "conv3", "cccp8"),
    ),
    "nin_cifar10": dict(
        network="NINCifar10",
        blocks=(
            (192, 5, 1, 2, 160, 96, "max"),
            (192, 5, 1, 2, 192, 192, "avg"),
            (192, 3, 1, 1, 192, None, None),
        ),
        dropped=(1, 2),
        num_classes=10,
    ),
}
