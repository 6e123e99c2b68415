"""CBAM (Woo et al. 2018, https://arxiv.org/abs/1807.06521).

Attribute names are those of the authors' code (Jongchan/attention-module), and so is all in which
it differs from the paper: the MLP has biases, the two maps are stacked as [max, mean] where the
paper writes [mean; max], and a batch norm of momentum 0.01 follows the 7x7.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers, lowering
from flax_nets.layers import init, relu, sigmoid
from flax_nets.models.resnet import BasicBlock, Bottleneck, ResNet


class ChannelAttention(nnx.Module):
    """Scales channels by sigmoid(MLP(mean) + MLP(max)), one MLP for both (equation 2).

    Call: x [N, H, W, channels] -> the same shape.

    Args:
      reduction: channels per hidden unit of the MLP. Default 16.

    Raises ValueError where that leaves no hidden unit.
    """

    def __init__(self, channels: int, reduction: int = 16, *, rngs: nnx.Rngs | None):
        if channels < reduction:
            raise ValueError(
                f"reduction={reduction} leaves no hidden unit for {channels} channels: give a "
                "smaller reduction"
            )
        self.mlp = layers.Sequential(
            layers.flatten,
            layers.Linear(channels, channels // reduction, rngs=rngs),
            relu,
            layers.Linear(channels // reduction, channels, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        mean, largest = layers.global_avg_pool(x), lowering.global_max(x, (1, 2))
        scale = sigmoid(self.mlp(mean) + self.mlp(largest))
        return x.astype(scale.dtype) * scale[:, None, None, :]


class SpatialAttention(nnx.Module):
    """Scales positions by a 7x7 convolution over the channels' [max, mean] (equation 3).

    Call: x [N, H, W, C] -> the same shape, for any C.

    Args:
      kernel_size: odd. Default 7.

    Raises ValueError for an even kernel.
    """

    def __init__(self, kernel_size: int = 7, *, rngs: nnx.Rngs | None):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.spatial = layers.Sequential(
            conv=layers.Conv(2, 1, kernel_size, padding=kernel_size // 2, bias=False, rngs=rngs),
            bn=layers.BatchNorm(1, momentum=0.01, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        largest, mean = lowering.global_max(x, -1, keepdims=True), jnp.mean(x, -1, keepdims=True)
        scale = sigmoid(self.spatial(jnp.concatenate((largest, mean), -1)))
        return x.astype(scale.dtype) * scale


class CBAM(nnx.Module):
    """Channel attention, then spatial attention (Figure 1).

    Call: x [N, H, W, channels] -> the same shape. Arguments as in the two parts.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> attend = flax_nets.CBAM(64, rngs=nnx.Rngs(0))
    >>> attend(jax.numpy.ones((2, 8, 8, 64))).shape
    (2, 8, 8, 64)
    """

    def __init__(
        self, channels: int, reduction: int = 16, kernel_size: int = 7, *, rngs: nnx.Rngs | None
    ):
        self.ChannelGate = ChannelAttention(channels, reduction, rngs=rngs)
        self.SpatialGate = SpatialAttention(kernel_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.SpatialGate(self.ChannelGate(x))


class CBAMBasicBlock(BasicBlock):
    """A basic block whose residual is attended to before the skip joins it (Figure 3)."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut, rngs=rngs)
        self.cbam = CBAM(channels, rngs=rngs)

    def residual(self, x: jax.Array) -> jax.Array:
        return self.cbam(super().residual(x))


class CBAMBottleneck(Bottleneck):
    """The same of a bottleneck."""

    def __init__(
        self, in_channels, channels, stride=1, groups=1, base_width=64, shortcut=None, *, rngs
    ):
        super().__init__(in_channels, channels, stride, groups, base_width, shortcut, rngs=rngs)
        self.cbam = CBAM(channels * self.expansion, rngs=rngs)

    def residual(self, x: jax.Array) -> jax.Array:
        return self.cbam(super().residual(x))


class CBAMResNet(ResNet):
    """Images [N, H, W, in_channels] -> logits [N, num_classes]. Arguments as in `ResNet`."""

    blocks = {"basic": CBAMBasicBlock, "bottleneck": CBAMBottleneck}

    def _initialise(self, zero_init_last, rngs):
        """As the authors do: by names, so that the projections keep PyTorch's default."""
        for path, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv) and "conv" in path[-1]:
                init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape), rngs)
            elif isinstance(module, layers.Linear):
                init.reinit(module.bias, init.zeros, rngs)
            elif isinstance(module, SpatialAttention):
                init.reinit(module.spatial.bn.scale, init.zeros, rngs)
            if zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                init.reinit(module.last_norm.scale, init.zeros, rngs)
        if isinstance(self.fc, layers.Linear):
            distribution = init.kaiming_normal(self.fc.kernel.shape, mode="fan_in")
            init.reinit(self.fc.kernel, distribution, rngs)

    @staticmethod
    def arguments_shown(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """What a checkpoint's shapes show: the stem, which the authors' CIFAR networks have 3x3."""
        stems = {7: "imagenet", 3: "cifar"}
        kernel = shapes.get("conv1.weight", (0,))[-1]
        return {"stem": stems[kernel]} if kernel in stems else {}


NETWORK = "CBAMResNet"

VARIANTS = {  # Table 4
    "cbam_resnet18": dict(block="basic", depths=(2, 2, 2, 2)),
    "cbam_resnet34": dict(block="basic", depths=(3, 4, 6, 3)),
    "cbam_resnet50": dict(block="bottleneck", depths=(3, 4, 6, 3)),
    "cbam_resnet101": dict(block="bottleneck", depths=(3, 4, 23, 3)),
    "cbam_resnext50_32x4d": dict(block="bottleneck", depths=(3, 4, 6, 3), groups=32, base_width=4),
}
