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

    def mlpconv(self, i: int, x: jax.Array) -> jax.Array:
        """A convolution whose filter is a perceptron of three layers (section 3.1)."""
        x = relu(getattr(self, f"conv{i}")(x))
        x = relu(getattr(self, f"cccp{2 * i - 1}")(x))
        return relu(getattr(self, f"cccp{2 * i}")(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"pool{i}")(self.mlpconv(i, x))
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
