"""Recipes: how published results were trained, a file for each.

`load(name)` gives the numbers as a `Recipe`, and `about(name)` the words: the source, the accuracy
that it reports, the hardware, and where the recipe departs from it.

    flax-nets train --recipe resnet50_a1 --data folder:DIR --out RUN --epochs 100

>>> from flax_nets.train import recipes
>>> recipes.load("resnet50_a1").optimizer
'lamb'
>>> recipes.about("resnet50_a1").splitlines()[0]
'ResNet-50 by procedure A1.'

`fit(recipe, model, data)` trains a network of one's own choice as a recipe says. For loops of one's
own there are `create(recipe)`, `rate(recipe, steps)` and `optimizer(recipe,
steps)`, `steps` of them to an epoch, `batches(recipe, data, split, model, training=...)`,
`transform(recipe, model, training)` and `step_options(recipe)`.

>>> rate = recipes.rate(recipes.load("resnet20_cifar"), steps=390)
>>> [round(float(rate(step)), 6) for step in (0, 32_000, 48_000)]
[0.1, 0.01, 0.001]
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from flax_nets.registry import suggest
from flax_nets.train.recipes._recipe import Recipe

_BUILD = ("batches", "create", "fit", "optimizer", "rate", "step_options", "transform")
__all__ = ["Recipe", "about", "load", "names", *_BUILD]


def __getattr__(name: str) -> Any:  # what they need is imported when they are
    if name not in _BUILD:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f"{__name__}._build"), name)


def names() -> list[str]:
    """The recipes there are, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> Recipe:
    """The numbers of a recipe. Raises ValueError with the nearest names where there is none."""
    return _file(name).RECIPE


def about(name: str) -> str:
    """The docstring of a recipe's file. Raises as `load` does."""
    return (_file(name).__doc__ or "").strip()


def _file(name: str) -> ModuleType:
    if name not in names():
        near = suggest(name, names())
        listed = f" There are: {', '.join(names())}." if near == "." else ""
        raise ValueError(f"there is no recipe {name!r}{near}{listed}")
    return importlib.import_module(f"{__name__}.{name}")
