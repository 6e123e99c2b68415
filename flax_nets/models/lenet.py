"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition").

`LeNet5` is the form that everybody trains today; `LeNet5_1998` is section II of the paper.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers, lowering
from flax_nets.layers import init

ACTIVATIONS = {"tanh": layers.tanh, "sigmoid": layers.sigmoid, "relu": layers.relu}


class LeNet5(nnx.Module):
    """Images [N, 32, 32, in_channels] -> logits [N, num_classes]; 61,706 parameters.

    Args:
      activation: "tanh" (default), "sigmoid" or "relu".
      dropout: before the last layer. Default 0.
    """

    input_layer, output_layers, image_size = "conv1", ("fc2",), 32

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        activation: str = "tanh",
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.conv1 = layers.Conv(in_channels, 6, 5, rngs=rngs)
        self.pool1 = layers.AvgPool(2)
        self.conv2 = layers.Conv(6, 16, 5, rngs=rngs)
        self.pool2 = layers.AvgPool(2)
        self.conv3 = layers.Conv(16, 120, 5, rngs=rngs)
        self.fc1 = layers.Linear(120, 84, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc2 = layers.Linear(84, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self.activation = layers.choose("activation", activation, ACTIVATIONS)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.pool1(self.activation(self.conv1(x)))  # [N, 14, 14, 6]
        x = self.pool2(self.activation(self.conv2(x)))  # [N, 5, 5, 16]
        x = self.activation(self.conv3(x))  # [N, 1, 1, 120]
        x = layers.flatten(x)
        x = self.activation(self.fc1(x))
        return self.fc2(self.dropout(x))


def scaled_tanh(x: jax.Array) -> jax.Array:
    """1.7159 tanh(2x/3), Appendix A: f(1) = 1 and f(-1) = -1."""
    return 1.7159 * jnp.tanh(2 / 3 * x)


class SubSampling(nnx.Module):
    """Layers S2 and S4: the sum of each 2x2 times a trained coefficient, plus a trained bias.

    Call: x [N, H, W, channels] -> [N, H/2, W/2, channels].
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs | None):
        self.coefficient = init.param((channels,), fan_in_bound(4), rngs)
        self.bias = init.param((channels,), fan_in_bound(4), rngs)
        self.dtype = None

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.dtype or self.bias.dtype
        x = lowering.avg_pool(x.astype(dtype), window=2, stride=2, padding=0) * 4
        coefficient, bias = self.coefficient[...].astype(dtype), self.bias[...].astype(dtype)
        return x * layers.along_last(coefficient, 4) + layers.along_last(bias, 4)


# Table I: which maps of S2 each of the 16 maps of C3 sees; 60 links.
CONNECTIONS = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)


class SparseConv(nnx.Module):
    """Layer C3: 5x5 kernels for the links of a table alone, 25 * 60 + 16 = 1,516 parameters.

    `weight` is [links, 5, 5], the links in the order of the table.
    Call: x [N, H, W, 6] -> [N, H-4, W-4, 16].
    """

    def __init__(self, connections=CONNECTIONS, *, rngs: nnx.Rngs | None):
        self.links = tuple((i, j) for i, row in enumerate(connections) for j in row)
        self.in_channels = 1 + max(j for _, j in self.links)
        fans = [25 * len(row) for row in connections]
        links = fan_in_bounds(fans[i] for i, _ in self.links)
        self.weight = init.param((len(self.links), 5, 5), links, rngs)
        self.bias = init.param((len(connections),), fan_in_bounds(fans), rngs)
        self.dtype = None

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.dtype or self.weight.dtype
        weight, bias = self.weight[...].astype(dtype), self.bias[...].astype(dtype)
        kernel = jnp.zeros((5, 5, self.in_channels, bias.size), dtype)
        rows, columns = (jnp.array(side) for side in zip(*self.links, strict=True))
        kernel = kernel.at[:, :, columns, rows].set(jnp.moveaxis(weight, 0, -1))
        x = lowering.conv(x.astype(dtype), kernel, stride=1, padding=0, dilation=1, groups=1)
        return x + layers.along_last(bias, 4)


class RadialBasis(nnx.Module):
    """The output layer: minus the squared distance of 84 features to each class's fixed code.

    Call: x [N, 84] -> [N, classes].
    """

    def __init__(self, codes):
        self.codes = codes

    def __call__(self, x: jax.Array) -> jax.Array:
        codes = jnp.array(self.codes, x.dtype)
        return -jnp.sum((x[:, None, :] - codes[None]) ** 2, -1)


# Figure 3's kind of code: the ten digits as bitmaps, 7 pixels wide and 12 high, drawn by us.
DIGITS = """
..###.. ...#... .#####. ####### .....#. ####### ...###. ####### ..###.. ..###..
.#...#. ..##... #.....# ......# ....##. #...... ..#.... ......# .#...#. .#...#.
#.....# .#.#... ......# .....#. ...#.#. #...... .#..... ......# #.....# #.....#
#.....# ...#... ......# ....#.. ..#..#. #...... #...... .....#. #.....# #.....#
#.....# ...#... .....#. ...###. .#...#. #.####. #...... .....#. .#...#. #.....#
#.....# ...#... ....#.. .....#. #....#. ##....# #.####. ....#.. ..###.. .#...##
#.....# ...#... ...#... ......# #....#. ......# ##....# ....#.. .#...#. ..###.#
#.....# ...#... ..#.... ......# ####### ......# #.....# ...#... #.....# ......#
#.....# ...#... .#..... ......# .....#. ......# #.....# ...#... #.....# ......#
#.....# ...#... #...... ......# .....#. ......# #.....# ..#.... #.....# .....#.
.#...#. ...#... #...... #....#. .....#. #.....# .#...#. ..#.... .#...#. ....#..
..###.. .#####. ####### .####.. .....#. .#####. ..###.. ..#.... ..###.. .###...
"""


def code_vectors(drawing):
    """Bitmaps of "#" and "." side by side -> for each a vector of +1 and -1, row by row."""
    bitmaps = zip(*(line.split() for line in drawing.strip().splitlines()), strict=True)
    return tuple(tuple(1.0 if p == "#" else -1.0 for p in "".join(b)) for b in bitmaps)


CODES = code_vectors(DIGITS)


def fan_in_bound(fan_in):
    """Uniform within 2.4 / fan_in (section II-B and Appendix A)."""
    return init.uniform(2.4 / fan_in)


def fan_in_bounds(fans):
    """The same with a fan-in of its own for each index of the first axis."""
    return dataclasses.replace(init.uniform(1.0), factors=tuple(2.4 / fan for fan in fans))


class LeNet5_1998(nnx.Module):
    """The network of the paper: 60,000 trained parameters, logits are minus squared distances.

    Images [N, 32, 32, 1] -> [N, 10].

    Args:
      codes: a vector of 84 numbers, +1 or -1, for each class.
      dropout: before the output layer (not in the paper). Default 0.
    """

    input_layer, output_layers, image_size = "c1", (), 32  # the output layer has no parameters

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        codes=CODES,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if num_classes > len(codes):
            raise ValueError(f"num_classes={num_classes} needs as many codes, got {len(codes)}")
        self.c1 = layers.Conv(in_channels, 6, 5, rngs=rngs)
        self.s2 = SubSampling(6, rngs=rngs)
        self.c3 = SparseConv(rngs=rngs)
        self.s4 = SubSampling(16, rngs=rngs)
        self.c5 = layers.Conv(16, 120, 5, rngs=rngs)
        self.f6 = layers.Linear(120, 84, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.output = RadialBasis(codes[:num_classes]) if num_classes else layers.Identity()
        for module in (self.c1, self.c5, self.f6):
            distribution = fan_in_bound(init.fans(module.kernel.shape)[0])
            init.reinit(module.kernel, distribution, rngs)
            init.reinit(module.bias, distribution, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = scaled_tanh(self.c1(x))  # [N, 28, 28, 6]
        x = scaled_tanh(self.s2(x))  # [N, 14, 14, 6]
        x = scaled_tanh(self.c3(x))  # [N, 10, 10, 16]
        x = scaled_tanh(self.s4(x))  # [N, 5, 5, 16]
        x = scaled_tanh(self.c5(x))  # [N, 1, 1, 120]
        x = scaled_tanh(self.f6(layers.flatten(x)))
        return self.output(self.dropout(x))


NETWORK = "LeNet5"

VARIANTS = {
    "lenet5": dict(),
    "lenet5_1998": dict(network="LeNet5_1998"),
}
