"""Classic vision networks in Flax NNX, each equal to its PyTorch twin.

import flax_nets
model = flax_nets.create_model("resnet50", weights="resnet50.pth")
logits = model(x)                                    # x [N, H, W, C]
apply, params, state = flax_nets.functional(model)   # for jit, grad and vmap
"""

from flax_nets import preprocess as preprocess
from flax_nets import weights as weights
from flax_nets.create import create_model
from flax_nets.functional import functional
from flax_nets.inspect.features import features
from flax_nets.inspect.fold import fold_batch_norm
from flax_nets.inspect.summary import summary
from flax_nets.layers import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    BasicConv2d,
    BatchNorm,
    Conv,
    Dropout,
    Identity,
    LayerNorm,
    Linear,
    LocalResponseNorm,
    MaxPool,
    Sequential,
    StochasticDepth,
)
from flax_nets.lowering import set_lowering
from flax_nets.memory import keep_memory
from flax_nets.models.attention import (
    LocalAttention,
    MultiHeadAttention,
    SparseAttention,
    Transformer,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    causal_mask,
    transformer_base,
    transformer_big,
)
from flax_nets.models.cbam import CBAM, ChannelAttention, SpatialAttention
from flax_nets.models.densenet import DenseBlock, DenseLayer
from flax_nets.models.googlenet import Inception
from flax_nets.models.highway import Highway
from flax_nets.models.inception_v3 import (
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)
from flax_nets.models.mobilenet_v1 import DepthwiseSeparableConv
from flax_nets.models.mobilenet_v2 import InvertedResidual
from flax_nets.models.nin import MLPConv
from flax_nets.models.resnet import BasicBlock, Bottleneck
from flax_nets.models.senet import SqueezeExcite
from flax_nets.models.shufflenet import ShuffleV1Block, channel_shuffle
from flax_nets.models.squeezenet import Fire
from flax_nets.models.xception import SeparableConv2d
from flax_nets.registry import list_models

__version__ = "0.1.0"

keep_memory()

__all__ = [
    "CBAM",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "BasicBlock",
    "BasicConv2d",
    "BatchNorm",
    "Bottleneck",
    "ChannelAttention",
    "Conv",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseSeparableConv",
    "Dropout",
    "Fire",
    "Highway",
    "Identity",
    "Inception",
    "InceptionA",
    "InceptionB",
    "InceptionC",
    "InceptionD",
    "InceptionE",
    "InvertedResidual",
    "LayerNorm",
    "Linear",
    "LocalAttention",
    "LocalResponseNorm",
    "MLPConv",
    "MaxPool",
    "MultiHeadAttention",
    "SeparableConv2d",
    "Sequential",
    "ShuffleV1Block",
    "SparseAttention",
    "SpatialAttention",
    "SqueezeExcite",
    "StochasticDepth",
    "Transformer",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "causal_mask",
    "channel_shuffle",
    "create_model",
    "features",
    "fold_batch_norm",
    "functional",
    "keep_memory",
    "list_models",
    "set_lowering",
    "summary",
    "transformer_base",
    "transformer_big",
]
