"""Training: steps, optimizers, schedules and losses with PyTorch's exact meaning.

Nothing below is imported before its first use, so that `import flax_nets.train` costs nothing.

>>> from flax_nets import train
>>> rate = train.schedules.cosine(0.1, t_max=90)
>>> optimizer = train.sgd(rate, momentum=0.9, weight_decay=1e-4, mask=train.decay_mask)
"""

import importlib
from typing import Any

_EXPORTS = {
    "checkpoint": ("Checkpoints",),
    "data": ("Batches", "Dataset", "Pipeline"),
    "groups": ("decay_mask", "freeze", "param_groups", "scale_rates"),
    "loop": ("Diverged", "Preempted", "fit"),
    "losses": ("binary_cross_entropy", "cross_entropy", "rbf_loss", "topk_correct"),
    "mesh": ("make_mesh", "replicate", "shard", "shard_state"),
    "optim": (
        "adam",
        "adamw",
        "clip_by_global_norm",
        "lamb",
        "rmsprop",
        "rmsprop_tf",
        "sgd",
    ),
    "recipes": (),
    "schedules": (),  # used as `train.schedules.cosine`: its names are too short to stand alone
    "state": ("LossScale", "TrainState"),
    "step": ("evaluate", "make_eval_step", "make_train_step", "summary"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted([*_EXPORTS, *_HOME])


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    module = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
