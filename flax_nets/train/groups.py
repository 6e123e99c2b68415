"""Which parameters an optimizer treats how: PyTorch's parameter groups, by patterns of paths.

A pattern (as in `fnmatch`) matches a parameter whose path, such as "layer1.0.conv1.kernel", or a
module above it ("layer1.0", "layer*") it matches. One that matches nothing is a ValueError.
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax


def param_groups(
    groups: Mapping[str, optax.GradientTransformation], default: optax.GradientTransformation
) -> optax.GradientTransformation:
    """PyTorch's parameter groups: an optimizer for each pattern of module paths.

    >>> from flax_nets.train import sgd
    >>> optimizer = param_groups({"fc": sgd(0.1)}, default=sgd(0.01))  # a faster head

    Args:
        groups: pattern -> optimizer; the first pattern that matches a parameter wins.
        default: the optimizer of all others.

    Raises:
        ValueError: (from `init`) a pattern matches no parameter.
    """

    def labels(params: Any) -> Any:
        return _first_match(params, tuple(groups), otherwise="")

    return optax.multi_transform({**groups, "": default}, labels)


def scale_rates(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Learning rates by layer, to come after any of `flax_nets.train`'s optimizers.

    >>> from flax_nets.train import adamw
    >>> optimizer = optax.chain(adamw(1e-3), scale_rates({"fc": 10.0}))  # a faster head

    What PyTorch's parameter groups do with rates in the same proportion, decay included. A factor
    of 0 stops a layer, but its gradients enter global norms: see `freeze`.

    Args:
        factors: pattern -> factor; the first pattern that matches a parameter wins.

    Raises:
        ValueError: (from `init`) a pattern matches no parameter, or a factor is negative.
    """
    if not all(factor >= 0 for factor in factors.values()):
        raise ValueError(f"factors: got {dict(factors)}, expected numbers of at least 0")

    def init(params: Any) -> optax.EmptyState:
        _first_match(params, tuple(factors), otherwise="")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        labels = _first_match(updates, tuple(factors), otherwise="")
        return jax.tree.map(lambda u, label: u * factors.get(label, 1.0), updates, labels), state

    return optax.GradientTransformation(init, update)


def freeze(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """Leave the parameters that match a pattern as they are.

    Like `requires_grad_(False)` it keeps them out of what `optimizer` sees: their gradients enter
    no global norm, and they have no optimizer state.
    """
    return param_groups(dict.fromkeys(patterns, optax.set_to_zero()), default=optimizer)


def decay_mask(params: Any, exclude: Sequence[str] = ()) -> Any:
    """True where weight decay is usual: not on biases, norms and other vectors (timm's rule).

    Args:
        params: the parameters, or any tree of arrays shaped like them.
        exclude: further patterns to leave out, such as "pos_embedding".

    Raises:
        ValueError: a pattern matches no parameter.
    """
    excluded = _first_match(params, tuple(exclude), otherwise="")
    return jax.tree.map(lambda p, label: p.ndim > 1 and not label, params, excluded)


def _first_match(params: Any, patterns: tuple[str, ...], otherwise: str) -> Any:
    """A tree like `params`: for each leaf the first pattern that matches its path or a parent."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    labels, names, used = [], [], set()
    for path, _ in flat:
        if path and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]  # an nnx.Variable's own attribute is no part of the module path
        keys = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        prefixes = list(itertools.accumulate(keys, "{}.{}".format))
        hits = [p for p in patterns if any(fnmatch.fnmatchcase(x, p) for x in prefixes)]
        used.update(hits)
        labels.append(hits[0] if hits else otherwise)
        names.append(prefixes[-1])
    if unused := [p for p in patterns if p not in used]:
        raise ValueError(
            f"patterns {unused} match no parameter; the parameters are {', '.join(names)}"
        )
    return jax.tree_util.tree_unflatten(structure, labels)
