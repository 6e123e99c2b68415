"""SqueezeNet (Iandola et al. 2016, https://arxiv.org/abs/1602.07360).

Attribute names are torchvision's. Version 1.0 is the paper's Table 1; 1.1, its authors' later
one, has a smaller first convolution and pools earlier. Pooling rounds up, as in their Caffe model.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu

BYPASSES = ("none", "simple", "complex")


class Fire(nnx.Module):
    """A 1x1 layer that squeezes, then 1x1 and 3x3 filters side by side (section 3.2).

    Call: x [N, H, W, in_channels] -> [N, H, W, expand1x1 + expand3x3].

    Args:
      squeeze: channels after the squeeze, fewer than are expanded to.
      expand1x1, expand3x3: channels of either kind of filter.
      bypass: what is added to the output (section 6): "none" (default); "simple", the input, where
        the channels agree; "complex", likewise, and elsewhere a 1x1 convolution of it.

    Raises ValueError for another bypass.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> fire = flax_nets.Fire(96, 16, 64, 64, rngs=nnx.Rngs(0))
    >>> fire(jax.numpy.ones((2, 7, 7, 96))).shape
    (2, 7, 7, 128)
    """

    def __init__(
        self,
        in_channels: int,
        squeeze: int,
        expand1x1: int,
        expand3x3: int,
        bypass: str = "none",
        *,
        rngs: nnx.Rngs | None,
    ):
        layers.choose("bypass", bypass, dict.fromkeys(BYPASSES))
        self.squeeze = layers.Conv(in_channels, squeeze, 1, rngs=rngs)
        self.expand1x1 = layers.Conv(squeeze, expand1x1, 1, rngs=rngs)
        self.expand3x3 = layers.Conv(squeeze, expand3x3, 3, padding=1, rngs=rngs)
        self.bypass = self._bypass(bypass, in_channels, expand1x1 + expand3x3, rngs)

    def _bypass(self, kind, in_channels, channels, rngs):
        if kind != "none" and in_channels == channels:
            return layers.Identity()
        return layers.Conv(in_channels, channels, 1, rngs=rngs) if kind == "complex" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        squeezed = relu(self.squeeze(x))
        y = jnp.concatenate([relu(self.expand1x1(squeezed)), relu(self.expand3x3(squeezed))], -1)
        return y if self.bypass is None else y + self.bypass(x)


class SqueezeNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (where that is 0: features).

    Args:
      stem: channels and kernel of the first convolution, whose stride is 2.
      fires: number of Fire modules.
      pools: before which of them (counted from 0) the map is halved: late, at 3 and 7, in the
        paper, so that layers see large maps (section 3.1).
      base, increment, frequency: module i gives base + increment * (i // frequency) channels
        (section 5.1).
      squeeze_ratio: the squeeze layer's channels, as a share of those (section 5.2).
      share3x3: the share of those that comes from 3x3 filters (section 5.3).
      bypass: around the Fire modules (section 6): "none" (default), "simple" where the channels
        agree, or "complex": there and, through a 1x1 convolution, elsewhere.
      dropout: before the last convolution. Default 0.5.

    Raises ValueError for another bypass.
    """

    input_layer, output_layers = "features.0", ("classifier.1",)

    def __init__(
        self,
        stem: tuple[int, int] = (96, 7),
        fires: int = 8,
        pools: tuple[int, ...] = (0, 3, 7),
        base: int = 128,
        increment: int = 128,
        frequency: int = 2,
        squeeze_ratio: float = 0.125,
        share3x3: float = 0.5,
        bypass: str = "none",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs | None,
    ):
        channels, kernel = stem
        features = [layers.Conv(in_channels, channels, kernel, stride=2, rngs=rngs), relu]
        for i in range(fires):
            if i in pools:
                features.append(layers.MaxPool(3, 2, ceil_mode=True))
            expand = base + increment * (i // frequency)
            squeeze, expand3x3 = int(squeeze_ratio * expand), int(share3x3 * expand)
            features.append(
                Fire(channels, squeeze, expand - expand3x3, expand3x3, bypass, rngs=rngs)
            )
            channels = expand
        self.features = layers.Sequential(*features)
        self.classifier = layers.Sequential(
            layers.Dropout(dropout, rngs=rngs),
            layers.Conv(channels, num_classes, 1, rngs=rngs) if num_classes else layers.Identity(),
            relu,
        )
        self._initialise(rngs)

    def _initialise(self, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                if module is self.classifier[1]:
                    init.reinit(module.kernel, init.normal(0.01), rngs)
                else:
                    bound = math.sqrt(6 / init.fans(module.kernel.shape)[0])  # He et al., uniform
                    init.reinit(module.kernel, init.uniform(bound), rngs)
                init.reinit(module.bias, init.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.classifier(self.features(x))
        return layers.global_avg_pool(x)


NETWORK = "SqueezeNet"

VARIANTS = {  # Tables 1 and 3
    "squeezenet1_0": dict(),
    "squeezenet1_1": dict(stem=(64, 3), pools=(0, 2, 4)),
    "squeezenet1_0_bypass": dict(bypass="simple"),
    "squeezenet1_0_complex_bypass": dict(bypass="complex"),
}
