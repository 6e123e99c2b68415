"""Squeeze-and-Excitation (Hu et al. 2017, https://arxiv.org/abs/1709.01507).

`SqueezeExcite` plugs into any network; here into ResNet, ResNeXt and Inception-v3 (section 3.3),
and into SENet-154 (section 6.5 and appendix). Attribute names are timm's, of which there are two
sets: the present ones, and those of its `legacy_*` networks, which the authors' Caffe weights went
to. The legacy networks pool their stem with ceil_mode and no padding, some of their bottlenecks
carry the stride on the first 1x1, and their basic blocks apply a ReLU before the excitation:
functions of their own, not other names for the same. SE-Inception-v3 has no published weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu, sigmoid
from flax_nets.models import inception_v3
from flax_nets.models.resnet import BasicBlock, Bottleneck, ResNet

WIDTHS = (64, 128, 256, 512)
INCEPTION_WIDTHS = {  # channels out of each module of Inception-v3
    **{"Mixed_5b": 256, "Mixed_5c": 288, "Mixed_5d": 288},
    **{"Mixed_6a": 768, "Mixed_6b": 768, "Mixed_6c": 768, "Mixed_6d": 768, "Mixed_6e": 768},
    **{"Mixed_7a": 1280, "Mixed_7b": 2048, "Mixed_7c": 2048},
}


class SqueezeExcite(nnx.Module):
    """x * sigmoid(W2 relu(W1 mean(x))): one scale per channel (equations 2 to 4).

    Call: x [N, H, W, channels] -> [N, H, W, channels].

    Args:
      reduction: channels per hidden unit (r, section 6.1). Default 16.
      hidden: hidden units. None (default): channels / reduction, rounded to a multiple of 8 as
        timm does.
      bias: whether the two layers have biases. Default True.

    Raises ValueError where `hidden` is below 1.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> excite = flax_nets.SqueezeExcite(64, rngs=nnx.Rngs(0))
    >>> excite(jax.numpy.zeros((2, 7, 7, 64))).shape
    (2, 7, 7, 64)
    """

    def __init__(
        self,
        channels: int,
        reduction: float = 16,
        hidden: int | None = None,
        bias: bool = True,
        *,
        rngs: nnx.Rngs | None,
    ):
        if hidden is None:
            hidden = max(8, int(channels / reduction + 4) // 8 * 8)
        if hidden < 1:
            raise ValueError(f"at least 1 hidden unit is needed, got {hidden} for {channels}")
        self.fc1 = layers.Conv(channels, hidden, 1, bias=bias, rngs=rngs)
        self.fc2 = layers.Conv(hidden, channels, 1, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.mean(x, (1, 2), keepdims=True)
        scale = sigmoid(self.fc2(relu(self.fc1(scale))))
        return x.astype(scale.dtype) * scale


class SEBasicBlock(BasicBlock):
    """A basic block whose residual is excited before the skip joins it (Figure 3)."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, rngs=rngs)
        self.se = SqueezeExcite(channels, rngs=rngs)
        move_last(self, "downsample", shortcut)  # after `se`, as in timm

    def residual(self, x: jax.Array) -> jax.Array:
        return self.se(super().residual(x))


class SEBottleneck(Bottleneck):
    """The same of a bottleneck."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, rngs=rngs)
        self.se = SqueezeExcite(channels * self.expansion, rngs=rngs)
        move_last(self, "downsample", shortcut)

    def residual(self, x: jax.Array) -> jax.Array:
        return self.se(super().residual(x))


def move_last(module: nnx.Module, name: str, child: nnx.Module | None) -> None:
    """Make `child` the last attribute: NNX lets none become a module only once it is gone."""
    delattr(module, name)
    setattr(module, name, child)


class SE154Bottleneck(SEBottleneck):
    """SENet-154's: the first 1x1 has half the channels of the 3x3."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut, rngs=rngs)
        halve(self, in_channels, stride, groups, rngs)


def halve(block: Bottleneck, in_channels: int, stride: int, groups: int, rngs) -> None:
    """Replace the first two convolutions of a bottleneck by ones that meet at half the width."""
    width = block.conv2.out_channels
    block.conv1 = layers.Conv(in_channels, width // 2, 1, bias=False, rngs=rngs)
    block.bn1 = layers.BatchNorm(width // 2, rngs=rngs)
    block.conv2 = layers.Conv(
        width // 2, width, 3, stride, padding=1, groups=groups, bias=False, rngs=rngs
    )


class SEResNet(ResNet):
    """Images [N, H, W, in_channels] -> logits [N, num_classes]. SE-ResNet and SE-ResNeXt.

    Arguments as in `ResNet`.
    """

    blocks = {"basic": SEBasicBlock, "bottleneck": SEBottleneck}


def stages(block, in_channels, depths, groups, base_width, down_kernel, *, rngs):
    """Four stages of blocks; strided projections have kernels of `down_kernel`."""
    made = []
    for i, (depth, channels) in enumerate(zip(depths, WIDTHS, strict=True)):
        out_channels = channels * block.expansion
        stage = []
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            shortcut = None
            if stride != 1 or in_channels != out_channels:
                kernel = down_kernel if stride != 1 else 1
                shortcut = layers.Sequential(
                    layers.Conv(
                        in_channels,
                        out_channels,
                        kernel,
                        stride,
                        kernel // 2,
                        bias=False,
                        rngs=rngs,
                    ),
                    layers.BatchNorm(out_channels, rngs=rngs),
                )
            stage.append(
                block(in_channels, channels, stride, groups, base_width, shortcut, rngs=rngs)
            )
            in_channels = out_channels
        made.append(layers.Sequential(*stage))
    return made


class SENet154(SEResNet):
    """Images [N, H, W, in_channels] -> logits [N, num_classes]. SENet-154 in timm's present form.

    A ResNeXt-152 of 64 groups whose stem is three 3x3, whose bottlenecks are `SE154Bottleneck`
    and whose strided projections are 3x3. Arguments as in `ResNet`.
    """

    input_layer, output_layers = "conv1.0", ("fc",)

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 8, 36, 3),
        groups: int = 64,
        base_width: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        zero_init_last: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.conv1 = layers.Sequential(
            layers.Conv(in_channels, 64, 3, 2, padding=1, bias=False, rngs=rngs),
            layers.BatchNorm(64, rngs=rngs),
            relu,
            layers.Conv(64, 64, 3, padding=1, bias=False, rngs=rngs),
            layers.BatchNorm(64, rngs=rngs),
            relu,
            layers.Conv(64, 128, 3, padding=1, bias=False, rngs=rngs),
        )
        self.bn1 = layers.BatchNorm(128, rngs=rngs)
        self.maxpool = layers.MaxPool(3, 2, 1)
        made = stages(SE154Bottleneck, 128, depths, groups, base_width, down_kernel=3, rngs=rngs)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(made)))
        for name, stage in zip(self.stages, made, strict=True):
            setattr(self, name, stage)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.Linear(2048, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self._initialise(zero_init_last, rngs)


class LegacyBasicBlock(BasicBlock):
    """timm's `SEResNetBlock`: a ReLU before the excitation, too."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, rngs=rngs)
        self.se_module = SqueezeExcite(channels, hidden=channels // 16, rngs=rngs)
        move_last(self, "downsample", shortcut)

    def residual(self, x: jax.Array) -> jax.Array:
        return self.se_module(relu(super().residual(x)))


class LegacyBottleneck(Bottleneck):
    """timm's `SEResNeXtBottleneck`: the stride on the 3x3."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, rngs=rngs)
        out_channels = channels * self.expansion
        self.se_module = SqueezeExcite(out_channels, hidden=out_channels // 16, rngs=rngs)
        move_last(self, "downsample", shortcut)

    def residual(self, x: jax.Array) -> jax.Array:
        return self.se_module(super().residual(x))


class LegacyStrideFirst(LegacyBottleneck):
    """timm's `SEResNetBottleneck`: the stride on the first 1x1."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, 1, groups, base_width, shortcut, rngs=rngs)
        width = self.conv1.out_channels
        self.conv1 = layers.Conv(in_channels, width, 1, stride, bias=False, rngs=rngs)


class Legacy154Bottleneck(LegacyBottleneck):
    """timm's `SEBottleneck`."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut, rngs=rngs)
        halve(self, in_channels, stride, groups, rngs)


class SENet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes]. timm's `legacy_*` networks.

    Args:
      block: "basic", "bottleneck" (SE-ResNeXt), "stride_first" (SE-ResNet) or "senet154", which
        brings the stem of three 3x3 and the 3x3 projections with it.
      depths, groups, base_width: as in `ResNet`.
      dropout: before the last layer. Default 0.2, as in timm for all of them.

    Raises ValueError for another block. With num_classes=0: pooled features.
    """

    blocks = {
        "basic": LegacyBasicBlock,
        "bottleneck": LegacyBottleneck,
        "stride_first": LegacyStrideFirst,
        "senet154": Legacy154Bottleneck,
    }
    input_layer, output_layers = "layer0.conv1", ("last_linear",)

    def __init__(
        self,
        block: str = "stride_first",
        depths: tuple[int, ...] = (3, 4, 6, 3),
        groups: int = 1,
        base_width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        *,
        rngs: nnx.Rngs | None,
    ):
        cls, deep = layers.choose("block", block, self.blocks), block == "senet154"
        stem = [(64, 3, 2), (64, 3, 1), (128, 3, 1)] if deep else [(64, 7, 2)]
        parts, channels_in = {}, in_channels
        for i, (channels, kernel, stride) in enumerate(stem, start=1):
            parts[f"conv{i}"] = layers.Conv(
                channels_in, channels, kernel, stride, kernel // 2, bias=False, rngs=rngs
            )
            parts[f"bn{i}"] = layers.BatchNorm(channels, rngs=rngs)
            parts[f"relu{i}"] = relu
            channels_in = channels
        self.layer0 = layers.Sequential(**parts)
        self.pool0 = layers.MaxPool(3, 2, ceil_mode=True)
        made = stages(
            cls, channels_in, depths, groups, base_width, down_kernel=3 if deep else 1, rngs=rngs
        )
        self.stages = tuple(f"layer{i + 1}" for i in range(len(made)))
        for name, stage in zip(self.stages, made, strict=True):
            setattr(self, name, stage)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        features = WIDTHS[-1] * cls.expansion
        self.last_linear = (
            layers.Linear(features, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.pool0(self.layer0(x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = layers.global_avg_pool(x)
        return self.last_linear(self.dropout(x))


class SEInceptionV3(inception_v3.InceptionV3):
    """Images [N, H, W, in_channels] -> logits, and auxiliary logits in train mode.

    Inception-v3 with an excitation after each of its Inception modules (Figure 2). Arguments as
    in `InceptionV3`.
    """

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
        super().__init__(aux_logits, transform_input, num_classes, in_channels, dropout, rngs=rngs)
        for name, channels in INCEPTION_WIDTHS.items():
            excited = layers.Sequential(getattr(self, name), SqueezeExcite(channels, rngs=rngs))
            setattr(self, name, excited)


NETWORK = "SEResNet"

# timm starts the last scale of each block at 0, its legacy networks do not.
SE = dict(zero_init_last=True)
LEGACY = dict(network="SENet")
X101 = dict(block="bottleneck", depths=(3, 4, 23, 3), **SE)

VARIANTS = {  # Tables 1 and 2; senet154: appendix
    "seresnet18": dict(block="basic", depths=(2, 2, 2, 2), **SE),
    "seresnet34": dict(block="basic", depths=(3, 4, 6, 3), **SE),
    "seresnet50": dict(block="bottleneck", depths=(3, 4, 6, 3), **SE),
    "seresnet101": dict(block="bottleneck", depths=(3, 4, 23, 3), **SE),
    "seresnet152": dict(block="bottleneck", depths=(3, 8, 36, 3), **SE),
    "seresnext50_32x4d": dict(
        block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4, **SE
    ),
    "seresnext101_32x4d": dict(groups=32, base_width=4, **X101),
    "seresnext101_32x8d": dict(groups=32, base_width=8, **X101),
    "seresnext101_64x4d": dict(groups=64, base_width=4, **X101),
    "senet154": dict(network="SENet154", depths=(3, 8, 36, 3), **SE),
    "legacy_seresnet18": dict(block="basic", depths=(2, 2, 2, 2), **LEGACY),
    "legacy_seresnet34": dict(block="basic", depths=(3, 4, 6, 3), **LEGACY),
    "legacy_seresnet50": dict(block="stride_first", depths=(3, 4, 6, 3), **LEGACY),
    "legacy_seresnet101": dict(block="stride_first", depths=(3, 4, 23, 3), **LEGACY),
    "legacy_seresnet152": dict(block="stride_first", depths=(3, 8, 36, 3), **LEGACY),
    "legacy_seresnext26_32x4d": dict(
        block="bottleneck", depths=(2, 2, 2, 2), groups=32, base_width=4, **LEGACY
    ),
    "legacy_seresnext50_32x4d": dict(
        block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4, **LEGACY
    ),
    "legacy_seresnext101_32x4d": dict(
        block="bottleneck", depths=(3, 4, 23, 3), groups=32, base_width=4, **LEGACY
    ),
    "legacy_senet154": dict(
        block="senet154", depths=(3, 8, 36, 3), groups=64, base_width=4, **LEGACY
    ),
    "se_inception_v3": dict(network="SEInceptionV3"),
}
