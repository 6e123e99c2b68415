"""How convolutions and poolings are computed: PyTorch's semantics, in the form a backend runs best.

All functions take NHWC images and work under every JAX transformation, forward and reverse. Which
form they take is decided when a traced function is lowered for its backend; `use("xla")`,
`set_lowering("xla")` or FLAX_NETS_LOWERING=xla keep XLA's own operations everywhere.
"""

from flax_nets.lowering.conv import conv
from flax_nets.lowering.dense import dense
from flax_nets.lowering.pool import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_max,
    max_pool,
)
from flax_nets.lowering.select import current, set_lowering, use

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "conv",
    "current",
    "dense",
    "global_max",
    "max_pool",
    "set_lowering",
    "use",
]
