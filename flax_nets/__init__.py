"""Classic vision networks in Flax NNX, each equal to its PyTorch twin.

import flax_nets
model = flax_nets.create_model("resnet50", weights="resnet50.pth")
logits = model(x)                                    # x [N, H, W, C]
apply, params, state = flax_nets.functional(model)   # for jit, grad and vmap
"""

from flax_nets.create import create_model
from flax_nets.functional import functional
from flax_nets.inspect.features import features
from flax_nets.inspect.summary import summary
from flax_nets.layers import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    BatchNorm,
    Conv,
    Dropout,
    LayerNorm,
    Linear,
    LocalResponseNorm,
    MaxPool,
    Sequential,
    StochasticDepth,
)
from flax_nets.models.attention import (
    LocalAttention,
    MultiHeadAttention,
    SparseAttention,
    Transformer,
    transformer_base,
)
from flax_nets.models.cbam import CBAM, ChannelAttention, SpatialAttention
from flax_nets.models.highway import Highway
from flax_nets.models.senet import SqueezeExcite
from flax_nets.registry import list_models

__version__ = "0.1.0"

__all__ = [
    "CBAM",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "BatchNorm",
    "ChannelAttention",
    "Conv",
    "Dropout",
    "Highway",
    "LayerNorm",
    "Linear",
    "LocalAttention",
    "LocalResponseNorm",
    "MaxPool",
    "MultiHeadAttention",
    "Sequential",
    "SparseAttention",
    "SpatialAttention",
    "SqueezeExcite",
    "StochasticDepth",
    "Transformer",
    "create_model",
    "features",
    "functional",
    "list_models",
    "summary",
    "transformer_base",
]
