"""Layers with PyTorch's semantics, shared by the networks.

Each takes the arguments of its `torch.nn` counterpart, works on NHWC arrays, and computes what
PyTorch computes, gradients included. `init` holds the distributions of initial values.
"""

from flax_nets.layers import init
from flax_nets.layers.activation import (
    gelu,
    hard_sigmoid,
    hard_swish,
    relu,
    relu6,
    sigmoid,
    silu,
    tanh,
)
from flax_nets.layers.container import Identity, Sequential, along_last, chain, choose, flatten
from flax_nets.layers.dropout import Dropout, StochasticDepth
from flax_nets.layers.inception import BasicConv2d, transform_input
from flax_nets.layers.linear import Conv, Linear, side_by_side
from flax_nets.layers.norm import BatchNorm, LayerNorm, LocalResponseNorm, batch_moments
from flax_nets.layers.pool import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    MaxPool,
    global_avg_pool,
)

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "BasicConv2d",
    "BatchNorm",
    "Conv",
    "Dropout",
    "Identity",
    "LayerNorm",
    "Linear",
    "LocalResponseNorm",
    "MaxPool",
    "Sequential",
    "StochasticDepth",
    "along_last",
    "batch_moments",
    "chain",
    "choose",
    "flatten",
    "gelu",
    "global_avg_pool",
    "hard_sigmoid",
    "hard_swish",
    "init",
    "relu",
    "relu6",
    "side_by_side",
    "sigmoid",
    "silu",
    "tanh",
    "transform_input",
]
