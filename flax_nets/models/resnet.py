"""ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385).

Attribute names are torchvision's. As there, the 3x3 convolution of a bottleneck carries the
stride ("v1.5"); the paper's Figure 5 has it on the first 1x1. The CIFAR family is section 4.2.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


class Downsample(nnx.Module):
    """Shortcut A (section 4.2): every second pixel, new channels zero, no parameters."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs | None):
        self.stride, self.extra = stride, channels - in_channels

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride, :]
        before = self.extra // 2
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.extra - before)))


def projection(
    in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs | None
) -> layers.Sequential:
    """Shortcut B: a 1x1 convolution and a batch norm."""
    return layers.Sequential(
        layers.Conv(in_channels, channels, 1, stride=stride, bias=False, rngs=rngs),
        layers.BatchNorm(channels, rngs=rngs),
    )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a skip (Figure 5 left).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].

    Args:
      stride: of the first convolution. Default 1.
      groups, base_width: 1 and 64, since only a bottleneck has others.
      shortcut: what the input passes on its way around, None (default) for nothing: a `projection`,
        say, where stride or channels change the shape.

    Raises ValueError for other groups and base_width.
    """

    expansion = 1

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        if (groups, base_width) != (1, 64):
            raise ValueError(
                f"a basic block has no groups, got groups={groups}, base_width={base_width}: "
                'take block="bottleneck"'
            )
        self.conv1 = layers.Conv(
            in_channels, channels, 3, stride=stride, padding=1, bias=False, rngs=rngs
        )
        self.bn1 = layers.BatchNorm(channels, rngs=rngs)
        self.conv2 = layers.Conv(channels, channels, 3, padding=1, bias=False, rngs=rngs)
        self.bn2 = layers.BatchNorm(channels, rngs=rngs)
        self.downsample = shortcut
        self.drop_path = layers.Identity()  # its network may set another

    def residual(self, x: jax.Array) -> jax.Array:
        x = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        identity = x if self.downsample is None else self.downsample(x)
        return relu(self.drop_path(self.residual(x)) + identity)

    @property
    def last_norm(self) -> layers.BatchNorm:
        return self.bn2


class Bottleneck(nnx.Module):
    """1x1 down, 3x3 (grouped in ResNeXt), 1x1 up, and a skip (Figure 5 right).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, 4 * channels].

    Args:
      stride, shortcut: of the 3x3, and as in `BasicBlock`.
      groups, base_width: the 3x3 has channels * base_width / 64 * groups channels. Defaults 1, 64.
    """

    expansion = 4

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        width = channels * base_width // 64 * groups
        out_channels = channels * self.expansion
        self.conv1 = layers.Conv(in_channels, width, 1, bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(width, rngs=rngs)
        self.conv2 = layers.Conv(
            width, width, 3, stride, padding=1, groups=groups, bias=False, rngs=rngs
        )
        self.bn2 = layers.BatchNorm(width, rngs=rngs)
        self.conv3 = layers.Conv(width, out_channels, 1, bias=False, rngs=rngs)
        self.bn3 = layers.BatchNorm(out_channels, rngs=rngs)
        self.downsample = shortcut
        self.drop_path = layers.Identity()  # its network may set another

    def residual(self, x: jax.Array) -> jax.Array:
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        identity = x if self.downsample is None else self.downsample(x)
        return relu(self.drop_path(self.residual(x)) + identity)

    @property
    def last_norm(self) -> layers.BatchNorm:
        return self.bn3


class StrideFirst(Bottleneck):
    """The paper's own: the stride on the first 1x1."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, 1, groups, base_width, shortcut, rngs=rngs)
        width = self.conv1.out_channels
        self.conv1 = layers.Conv(in_channels, width, 1, stride, bias=False, rngs=rngs)


class ResNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (0: pooled features).

    Args:
      block: "basic", "bottleneck" or "stride_first", the bottleneck of the paper.
      depths, widths: blocks and channels per stage; a bottleneck widens them fourfold.
      groups, base_width: of the 3x3 in a bottleneck: ResNeXt and wide ResNets.
      stem: "imagenet" (7x7 of stride 2, max pooling) or "cifar" (3x3).
      stem_width: its channels. Default: those of the first stage, widths[0].
      first_stride: of the first stage. Default 1.
      shortcut: "B", projections where shapes change, or "A", padding without parameters.
      dropout: before the last layer. Default 0.
      zero_init_last: whether the last scale of each block starts at 0. Default False.
      stochastic_depth: the rate at which the last block's residual is dropped (Huang et al. 2016);
        before it, the rates rise from 0 along a line, as in timm. Default 0.
    """

    blocks = {"basic": BasicBlock, "bottleneck": Bottleneck, "stride_first": StrideFirst}
    input_layer, output_layers = "conv1", ("fc",)

    def __init__(
        self,
        block: str = "bottleneck",
        depths: tuple[int, ...] = (3, 4, 6, 3),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        groups: int = 1,
        base_width: int = 64,
        stem: str = "imagenet",
        stem_width: int | None = None,
        first_stride: int = 1,
        shortcut: str = "B",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        zero_init_last: bool = False,
        stochastic_depth: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if stem not in ("imagenet", "cifar") or shortcut not in ("A", "B"):
            raise ValueError(
                f"stem must be imagenet or cifar, shortcut A or B; got {stem!r} and {shortcut!r}"
            )
        if not 0 <= stochastic_depth <= 1:
            raise ValueError(f"stochastic_depth: got {stochastic_depth}, expected a rate in [0, 1]")
        channels_in = stem_width or widths[0]
        if stem == "imagenet":
            self.conv1 = layers.Conv(
                in_channels, channels_in, 7, stride=2, padding=3, bias=False, rngs=rngs
            )
        else:
            self.conv1 = layers.Conv(in_channels, channels_in, 3, padding=1, bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(channels_in, rngs=rngs)
        self.maxpool = layers.MaxPool(3, 2, 1) if stem == "imagenet" else layers.Identity()
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            stage = []
            for j in range(depth):
                stride = 1 if j > 0 else 2 if i > 0 else first_stride
                made = self._block(
                    block, channels_in, channels, stride, groups, base_width, shortcut, rngs
                )
                share = (sum(depths[:i]) + j) / max(sum(depths) - 1, 1)
                made.drop_path = layers.StochasticDepth(stochastic_depth * share, rngs=rngs)
                stage.append(made)
                channels_in = channels * made.expansion
            setattr(self, self.stages[i], layers.Sequential(*stage))
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = (
            layers.Linear(channels_in, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )
        self._initialise(zero_init_last, rngs)

    def _block(self, block, in_channels, channels, stride, groups, base_width, shortcut, rngs):
        cls = layers.choose("block", block, self.blocks)
        out_channels = channels * cls.expansion
        skip = None
        if stride != 1 or in_channels != out_channels:
            make = projection if shortcut == "B" else Downsample
            skip = make(in_channels, out_channels, stride, rngs=rngs)
        return cls(in_channels, channels, stride, groups, base_width, skip, rngs=rngs)

    def _initialise(self, zero_init_last, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape), rngs)
            if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                init.reinit(module.last_norm.scale, init.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = layers.global_avg_pool(x)
        return self.fc(self.dropout(x))


CIFAR = dict(block="basic", widths=(16, 32, 64), stem="cifar", shortcut="A", num_classes=10)

NETWORK = "ResNet"

VARIANTS = {  # Table 1; wide_*: Zagoruyko & Komodakis 2016; resnet26: timm's; CIFAR: Table 6
    "resnet18": dict(block="basic", depths=(2, 2, 2, 2)),
    "resnet26": dict(block="bottleneck", depths=(2, 2, 2, 2), zero_init_last=True),
    "resnet34": dict(block="basic", depths=(3, 4, 6, 3)),
    "resnet50": dict(block="bottleneck", depths=(3, 4, 6, 3)),
    "resnet101": dict(block="bottleneck", depths=(3, 4, 23, 3)),
    "resnet152": dict(block="bottleneck", depths=(3, 8, 36, 3)),
    "wide_resnet50_2": dict(block="bottleneck", depths=(3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": dict(block="bottleneck", depths=(3, 4, 23, 3), base_width=128),
    "resnet20_cifar": dict(depths=(3, 3, 3), **CIFAR),
    "resnet32_cifar": dict(depths=(5, 5, 5), **CIFAR),
    "resnet44_cifar": dict(depths=(7, 7, 7), **CIFAR),
    "resnet56_cifar": dict(depths=(9, 9, 9), **CIFAR),
    "resnet110_cifar": dict(depths=(18, 18, 18), **CIFAR),
}
