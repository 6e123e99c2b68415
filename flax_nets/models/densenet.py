"""DenseNet (Huang et al. 2016, https://arxiv.org/abs/1608.06993).

Attribute names are torchvision's. Table 1 has the ImageNet networks, Table 2 those for CIFAR;
the latter start with a bare 3x3 convolution and have three dense blocks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


class DenseLayer(nnx.Module):
    """BN-ReLU-1x1 to `bottleneck * growth` channels, BN-ReLU-3x3 to `growth` (section 3).

    With bottleneck=0 the 3x3 alone. Takes the list of all earlier maps of its block.

    Call: features, a list of [N, H, W, channels], `in_channels` together -> [N, H, W, growth]. In
    train mode also with the `batch_moments` of each, where they are known.
    Arguments as in `DenseBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        growth: int,
        bottleneck: int = 4,
        dropout: float = 0.0,
        remat: bool = False,
        bias: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.bottleneck, self.remat = bottleneck, remat
        self.norm1 = layers.BatchNorm(in_channels, rngs=rngs)
        if bottleneck:
            width = bottleneck * growth
            self.conv1 = layers.Conv(in_channels, width, 1, bias=bias, rngs=rngs)
            self.norm2 = layers.BatchNorm(width, rngs=rngs)
            self.conv2 = layers.Conv(width, growth, 3, padding=1, bias=bias, rngs=rngs)
        else:
            self.conv1 = layers.Conv(in_channels, growth, 3, padding=1, bias=bias, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)

    def first(self, features: Sequence[jax.Array], moments: Sequence) -> jax.Array:
        x = jnp.concatenate(features, -1)
        moments = [jnp.concatenate(parts) for parts in zip(*moments, strict=True)]
        return self.conv1(relu(self.norm1(x, moments)))

    def __call__(self, features: Sequence[jax.Array], moments: Sequence = ()) -> jax.Array:
        if self.remat and not self.norm1.use_running_average:  # in train mode
            x = nnx.remat(DenseLayer.first)(self, features, moments)
        else:
            x = self.first(features, moments)
        if self.bottleneck:
            x = self.conv2(relu(self.norm2(x)))
        return self.dropout(x)


class DenseBlock(layers.Sequential):
    """Layers that each see the maps of all layers before (Figure 1), concatenated.

    Call: x [N, H, W, in_channels] -> [N, H, W, in_channels + depth * growth].

    Args:
      depth: how many layers there are.
      growth: channels that each adds.
      bottleneck, dropout, remat, bias: as in `DenseNet`. Defaults 4, 0, False and False.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> block = flax_nets.DenseBlock(3, in_channels=16, growth=12, rngs=nnx.Rngs(0))
    >>> block(jax.numpy.ones((2, 7, 7, 16))).shape
    (2, 7, 7, 52)
    """

    def __init__(
        self,
        depth: int,
        in_channels: int,
        growth: int,
        bottleneck: int = 4,
        dropout: float = 0.0,
        remat: bool = False,
        bias: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        made = {}
        for i in range(depth):
            made[f"denselayer{i + 1}"] = DenseLayer(
                in_channels + i * growth, growth, bottleneck, dropout, remat, bias, rngs=rngs
            )
        super().__init__(**made)

    def __call__(self, x: jax.Array) -> jax.Array:
        features: list[jax.Array] = [x]
        moments: list = []
        for layer in self:
            # of each map once, for all layers that normalise it
            if not layer.norm1.use_running_average:
                moments += map(layers.batch_moments, features[len(moments) :])
            features.append(layer(features, moments))
            if features[0].dtype != features[-1].dtype:  # the block's input alone
                features[0] = features[0].astype(features[-1].dtype)
                moments = []
        return jnp.concatenate(features, -1)


def transition(
    in_channels: int, channels: int, bias: bool = False, *, rngs: nnx.Rngs | None
) -> layers.Sequential:
    """BN-ReLU-1x1 and 2x2 average pooling between two blocks."""
    return layers.Sequential(
        norm=layers.BatchNorm(in_channels, rngs=rngs),
        relu=relu,
        conv=layers.Conv(in_channels, channels, 1, bias=bias, rngs=rngs),
        pool=layers.AvgPool(2, 2),
    )


class DenseNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    Args:
      growth: channels that each layer adds (k in the paper). Default 32.
      depths: layers per dense block.
      stem_channels: channels of the first convolution. Default 64.
      bottleneck: width of the 1x1 before each 3x3, in units of `growth`; 0 leaves the 1x1 out.
        Default 4, the paper's DenseNet-B.
      compression: share of the channels that a transition keeps (theta, section 3, within (0, 1]);
        the paper's DenseNet-C has 0.5, which is the default.
      stem: "imagenet" (7x7 of stride 2, batch norm, max pooling) or "cifar" (3x3 alone).
      dropout: after each layer (section 4.2: 0.2 without data augmentation). Default 0.
      remat: whether training recomputes, in the backward pass, what each layer concatenates and
        normalises, so that memory grows linearly with depth in place of quadratically (Pleiss et
        al. 2017, https://arxiv.org/abs/1707.06990). Same outputs and gradients. Default False.
      bias: whether the convolutions have biases, as in some ports. Default False.

    Raises ValueError for a negative bottleneck, for a compression outside (0, 1] and for an
    unknown stem.
    """

    input_layer, output_layers = "features.conv0", ("classifier",)

    def __init__(
        self,
        growth: int = 32,
        depths: tuple[int, ...] = (6, 12, 24, 16),
        stem_channels: int = 64,
        bottleneck: int = 4,
        compression: float = 0.5,
        stem: str = "imagenet",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        remat: bool = False,
        bias: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        if bottleneck < 0:
            raise ValueError(f"bottleneck is 0 (none) or a positive width, got {bottleneck}")
        if not 0 < compression <= 1:
            raise ValueError(f"compression lies within (0, 1], got {compression}")
        layers.choose("stem", stem, dict.fromkeys(("imagenet", "cifar")))
        channels = stem_channels
        if stem == "imagenet":
            parts = dict(
                conv0=layers.Conv(
                    in_channels, channels, 7, stride=2, padding=3, bias=bias, rngs=rngs
                ),
                norm0=layers.BatchNorm(channels, rngs=rngs),
                relu0=relu,
                pool0=layers.MaxPool(3, 2, 1),
            )
        else:
            parts = dict(
                conv0=layers.Conv(in_channels, channels, 3, padding=1, bias=bias, rngs=rngs)
            )
        for i, depth in enumerate(depths):
            if i > 0:
                compressed = int(channels * compression)
                parts[f"transition{i}"] = transition(channels, compressed, bias, rngs=rngs)
                channels = compressed
            parts[f"denseblock{i + 1}"] = DenseBlock(
                depth, channels, growth, bottleneck, dropout, remat, bias, rngs=rngs
            )
            channels += depth * growth
        parts["norm5"] = layers.BatchNorm(channels, rngs=rngs)
        self.features = layers.Sequential(**parts)
        self.classifier = (
            layers.Linear(channels, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )
        self._initialise(rngs)

    def _initialise(self, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                distribution = init.kaiming_normal(module.kernel.shape, mode="fan_in")
                init.reinit(module.kernel, distribution, rngs)
            elif isinstance(module, layers.Linear):
                init.reinit(module.bias, init.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu(self.features(x))
        x = layers.global_avg_pool(x)
        return self.classifier(x)


CIFAR = dict(growth=12, stem="cifar", num_classes=10)

NETWORK = "DenseNet"

VARIANTS = {  # Table 1 (161: the authors' release, k=48); CIFAR: Table 2, L=40 and BC L=100
    "densenet121": dict(depths=(6, 12, 24, 16)),
    "densenet161": dict(depths=(6, 12, 36, 24), growth=48, stem_channels=96),
    "densenet169": dict(depths=(6, 12, 32, 32)),
    "densenet201": dict(depths=(6, 12, 48, 32)),
    "densenet264": dict(depths=(6, 12, 64, 48)),
    "densenet40_k12_cifar": dict(
        depths=(12, 12, 12), stem_channels=16, bottleneck=0, compression=1.0, **CIFAR
    ),
    "densenet_bc100_k12_cifar": dict(depths=(16, 16, 16), stem_channels=24, **CIFAR),
}
