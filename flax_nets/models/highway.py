"""Highway networks (Srivastava et al. 2015, https://arxiv.org/abs/1505.00387 and, longer,
https://arxiv.org/abs/1507.06228).

`HighwayMLP` is the network for MNIST of section 3 of the first paper. `HighwayNet` is the
convolutional one as in the authors' Caffe code (flukeskywalker/highway-networks), whose names the
attributes follow: a plain convolution wherever the number of channels changes, then highway
layers. The papers give the depth and the size of the 32-layer network (about 1.25 million
parameters), not its widths: those are ours.
"""

import jax
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu, sigmoid, tanh

ACTIVATIONS = {"relu": relu, "tanh": tanh}


def affine(
    in_channels: int, channels: int, kernel_size: int, *, rngs: nnx.Rngs | None
) -> layers.Linear | layers.Conv:
    """A dense layer for kernel_size=0, else a convolution that keeps the image's size."""
    if kernel_size == 0:
        return layers.Linear(in_channels, channels, rngs=rngs)
    return layers.Conv(in_channels, channels, kernel_size, padding=kernel_size // 2, rngs=rngs)


class Highway(nnx.Module):
    """y = H(x) T(x) + x (1 - T(x)) (equation 3): T is the transform gate, 1 - T the carry gate.

    With linear_carry, y = H(x) T(x) + Q(x) (1 - T(x)), Q linear, so that the width may change.

    Call: x [..., in_channels] -> [..., channels]; images [N, H, W, in_channels] keep their size.

    Args:
      channels: of the output. Default `in_channels`.
      kernel_size: 0 (default) for a dense layer, else of a convolution, odd.
      activation: of H, "relu" (default) or "tanh".
      gate_bias: what T's bias starts at. Negative, so that a deep network starts by carrying its
        input through (section 2.2). Default -2; deeper networks want less (-4 at 50 layers).
      linear_carry: whether Q takes the place of the identity. Default False.

    Raises ValueError where the width changes without `linear_carry`, for an even kernel and for
    an unknown activation.

    >>> import flax_nets, jax
    >>> from flax import nnx
    >>> highway = flax_nets.Highway(50, rngs=nnx.Rngs(0))
    >>> highway(jax.numpy.zeros((2, 50))).shape
    (2, 50)
    """

    def __init__(
        self,
        in_channels: int,
        channels: int | None = None,
        kernel_size: int = 0,
        activation: str = "relu",
        gate_bias: float = -2.0,
        linear_carry: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        channels = in_channels if channels is None else channels
        if channels != in_channels and not linear_carry:
            raise ValueError(
                f"the input of {in_channels} channels can't be carried to {channels}: put a plain "
                "layer before it, or use linear_carry=True"
            )
        if kernel_size < 0 or (kernel_size > 0 and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is 0 (dense) or odd, got {kernel_size}")
        layers.choose("activation", activation, ACTIVATIONS)
        self.activation, self.linear_carry = activation, linear_carry
        self.transform = affine(in_channels, channels, kernel_size, rngs=rngs)
        self.gate = affine(in_channels, channels, kernel_size, rngs=rngs)
        if linear_carry:
            self.carry = affine(in_channels, channels, kernel_size, rngs=rngs)
        initialise(self, rngs)
        init.reinit(self.gate.bias, init.constant(gate_bias), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        transformed, gate = layers.side_by_side(x, self.transform, self.gate)
        transformed = ACTIVATIONS[self.activation](transformed)
        gate = sigmoid(gate)
        carried = self.carry(x) if self.linear_carry else x.astype(gate.dtype)
        return transformed * gate + carried * (1 - gate)


def initialise(module: nnx.Module, rngs: nnx.Rngs | None) -> None:
    """Weights that keep the variance through ReLUs (He et al. 2015), zero biases."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, layers.Linear | layers.Conv):
            distribution = init.kaiming_normal(layer.kernel.shape, mode="fan_in")
            init.reinit(layer.kernel, distribution, rngs)
            init.reinit(layer.bias, init.zeros, rngs)


class HighwayMLP(nnx.Module):
    """Images [N, image_size, image_size, in_channels] -> logits [N, num_classes].

    One plain layer and depth - 1 highway layers; the output layer is not counted. Features
    [N, width] where num_classes is 0.

    Args:
      depth: 10 (default), 20, 50 and 100 in the paper.
      width: units per layer. Default 50, as there.
      image_size: side of the images. Default 28.
      activation, gate_bias, linear_carry: as in `Highway`.
      dropout: before the last layer. Default 0.

    Raises ValueError where depth is below 1.
    """

    input_layer, output_layers = "plain", ("fc",)

    def __init__(
        self,
        depth: int = 10,
        width: int = 50,
        image_size: int = 28,
        activation: str = "relu",
        gate_bias: float = -2.0,
        linear_carry: bool = False,
        num_classes: int = 10,
        in_channels: int = 1,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if depth < 1:
            raise ValueError(f"depth counts the plain layer, so it is 1 at least; got {depth}")
        layers.choose("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.plain = layers.Linear(in_channels * image_size * image_size, width, rngs=rngs)
        highways = (
            Highway(width, None, 0, activation, gate_bias, linear_carry, rngs=rngs)
            for _ in range(depth - 1)
        )
        self.highways = layers.Sequential(*highways)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.Linear(width, num_classes, rngs=rngs) if num_classes else layers.Identity()
        for layer in (self.plain, self.fc):
            initialise(layer, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.plain(layers.flatten(x)))
        x = self.highways(x)
        return self.fc(self.dropout(x))


class HighwayNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    Each stage is a plain convolution and `highways` highway layers; max pooling between stages,
    and a plain 1x1 convolution to `hidden` channels before the global average.

    Args:
      widths, highways: channels and highway layers per stage.
      hidden: channels of the 1x1. Default 100.
      gate_bias, linear_carry: as in `Highway`.
      dropout: of the image, after each pooling, and before the last layer. Default 0.2.
    """

    input_layer, output_layers = "features.conv1", ("ip2",)

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 80, 128),
        highways: tuple[int, ...] = (4, 5, 5),
        hidden: int = 100,
        gate_bias: float = -2.0,
        linear_carry: bool = False,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.2,
        *,
        rngs: nnx.Rngs | None,
    ):
        parts, count, channels = {}, 0, in_channels
        for i, (width, depth) in enumerate(zip(widths, highways, strict=True)):
            if i > 0:
                parts[f"pool{i}"] = layers.MaxPool(2, 2)
            parts[f"drop{i + 1}"] = layers.Dropout(dropout, rngs=rngs)
            count += 1
            parts[f"conv{count}"] = affine(channels, width, 3, rngs=rngs)
            parts[f"relu{count}"] = relu
            for _ in range(depth):
                count += 1
                parts[f"conv{count}"] = Highway(
                    width, None, 3, "relu", gate_bias, linear_carry, rngs=rngs
                )
            channels = width
        parts[f"conv{count + 1}"] = affine(channels, hidden, 1, rngs=rngs)
        parts[f"relu{count + 1}"] = relu
        self.features = layers.Sequential(**parts)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.ip2 = (
            layers.Linear(hidden, num_classes, rngs=rngs) if num_classes else layers.Identity()
        )
        for layer in (*self.features, self.ip2):
            if isinstance(layer, layers.Conv | layers.Linear):
                initialise(layer, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.global_avg_pool(x)
        return self.ip2(self.dropout(x))


NETWORK = "HighwayNet"

VARIANTS = {  # section 3; Table 1 of the second paper: 19 and 32 layers
    "highway_mlp": dict(network="HighwayMLP"),
    "highway_mlp_linear": dict(network="HighwayMLP", linear_carry=True),
    "highway19_cifar": dict(widths=(32, 80, 128), highways=(4, 5, 5)),
    "highway32_cifar": dict(widths=(32, 48, 64), highways=(9, 9, 9)),
}
