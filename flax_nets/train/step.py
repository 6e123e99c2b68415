"""The training step and the evaluation step: pure functions, jitted, free of host round trips.

A batch is a dict of arrays: "image" [N, H, W, C], "label" [N] of integers (or [N, classes]
probabilities) and, optionally, "mask" [N]: 0 for padding, which must count nothing, 1 elsewhere.
Both steps follow the shardings of what they are given: with a batch split over the devices of a
mesh they compute, batch statistics included, what one big device would, and each array of the
train state stays where it lay.

Metrics are sums over examples and stay on the device: {"loss", "correct", "count"}. Add them up
batch by batch, and take `summary` when somebody wants to look.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_nets.memory import collector_paused
from flax_nets.train import losses
from flax_nets.train.mesh import spread
from flax_nets.train.state import LossScale, TrainState, Tree

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Apply = Callable[..., tuple[Any, Tree]]
Loss = Callable[..., jax.Array]


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    loss: Loss = losses.cross_entropy,
    label_smoothing: float = 0.0,
    aux_weights: float | Sequence[float] = 0.3,
    accumulate: int = 1,
    ema_decay: float | None = None,
    batch_norm_groups: int = 1,
    scan: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted function (train_state, batch) -> (train_state, metrics); it donates its first.

    Args:
      apply: from `flax_nets.functional`.
      optimizer: an optax transformation, such as `flax_nets.train.sgd(0.1, momentum=0.9)`.
      loss: (logits, labels, weights=, reduction=) -> scalar, one of `flax_nets.train.losses`.
      label_smoothing: passed to `loss` where it is not 0. Default 0.
      aux_weights: what a network with auxiliary heads adds for each of them, one number for all
        or one per head in the order of its outputs. Default 0.3 (Szegedy et al. 2014, section 5).
      accumulate: the number of equal parts in which a batch is computed, one after the other;
        part i holds the examples i, i + accumulate, ... The gradient is that of the whole
        batch; batch norm sees one part at a time, and moves its statistics as often. Default 1.
      ema_decay: the share that the running averages keep per step, for a state created with
        `ema=True`: ema += (1 - ema_decay) * (new - ema), statistics included. Default None.
      batch_norm_groups: the equal parts of a batch, consecutive examples each, that batch norm
        normalises by their own statistics; the running ones move to the mean over the groups. As
        many as there are devices: per-device batch norm, which communicates nothing. Default 1:
        global batch norm.
      scan: take arrays [steps, N, ...] and make that many steps in one call; the metrics are
        [steps]. It saves the host's time per step where the input allows. Default False.

    A train state with a `LossScale` has its loss scaled and its broken steps skipped.

    Raises ValueError for an argument out of range, for smoothing with a `loss` that knows none,
    and (from the step) for a batch that does not divide into its parts, for a wrong number of
    `aux_weights`, and for averages in the state without a decay, or a decay without averages.

    >>> import flax_nets, jax.numpy as jnp
    >>> from flax_nets import train
    >>> apply, params, state = flax_nets.functional(flax_nets.create_model("lenet5"))
    >>> optimizer = train.sgd(0.1, momentum=0.9)
    >>> train_state = train.TrainState.create(params, state, optimizer)
    >>> step = train.make_train_step(apply, optimizer)
    >>> batch = {"image": jnp.zeros((4, 32, 32, 1)), "label": jnp.arange(4)}
    >>> train_state, metrics = step(train_state, batch)
    >>> float(metrics["count"])
    4.0
    """
    for name, value in dict(accumulate=accumulate, batch_norm_groups=batch_norm_groups).items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected a number of at least 1")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay: got {ema_decay}, expected a number in [0, 1)")
    smoothed = _smoothed(loss, label_smoothing)
    forward = _in_groups(apply, batch_norm_groups)

    def objective(
        params: Tree, state: Tree, key: jax.Array, batch: Batch, total: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Tree]]:
        """The batch's part in a mean over examples whose weights add up to `total`."""
        outputs, state = forward(params, state, batch["image"], key)
        logits, *extras = outputs if isinstance(outputs, tuple) else (outputs,)
        value = smoothed(logits, batch["label"], batch["mask"])
        for weight, extra in zip(_per_head(aux_weights, len(extras)), extras, strict=True):
            value += weight * smoothed(extra, batch["label"], batch["mask"])
        return value / total.astype(value.dtype), (_metrics(value, logits, batch), state)

    @collector_paused()  # while it is traced: afterwards it does not run
    def step(layout: Layout, train_state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if (train_state.ema is None) != (ema_decay is None):
            raise ValueError(
                f"ema_decay is {ema_decay}, and the state was created with "
                f"ema={train_state.ema is not None}: it takes both or neither"
            )
        places = layout.of(train_state)
        grad = jax.grad(objective, has_aux=True)

        def differentiate(params: Tree, *rest: Any) -> tuple[Tree, Any]:
            grads, others = grad(params, *rest)
            return _place(grads, places.params), others

        grads, (metrics, state) = _by_parts(differentiate, train_state, batch, accumulate)
        scale = train_state.scale
        if scale is not None:
            grads = jax.tree.map(lambda g: g / scale.value.astype(g.dtype), grads)
        new = _updated(train_state, grads, state, optimizer, ema_decay)
        if scale is not None:
            new = _unless_broken(train_state, new, grads, scale)
        return _place(new, places), jax.tree.map(layout.whole, metrics)

    def many(layout: Layout, train_state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(functools.partial(step, layout), train_state, batch)

    jitted = jax.jit(many if scan else step, static_argnums=0, donate_argnums=1)
    # What a step returns lies where it lay before: no need to ask each of its arrays again.
    returned: weakref.ref[TrainState] | None = None
    layout: Layout

    def run(train_state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal returned, layout
        if returned is None or returned() is not train_state:
            layout = Layout(train_state)
        new, metrics = jitted(layout, train_state, batch)
        returned = weakref.ref(new)
        return new, metrics

    return run


def make_eval_step(
    apply: Apply, loss: Loss = losses.cross_entropy
) -> Callable[[Tree, Tree, Batch], Metrics]:
    """A jitted function (params, state, batch) -> metrics, the network in eval mode.

    Where `mask` is 0 an example counts nothing, so that a padded last batch makes each example
    count exactly once.
    """

    @jax.jit
    def step(params: Tree, state: Tree, batch: Batch) -> Metrics:
        batch = _with_mask(batch)
        logits, _ = apply(params, state, batch["image"])
        value = loss(logits, batch["label"], weights=batch["mask"], reduction="sum")
        return _metrics(value, logits, batch)

    return step


def evaluate(
    step: Callable[[Tree, Tree, Batch], Metrics],
    params: Tree,
    state: Tree,
    batches: Iterable[Batch],
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The `summary` of `step`, from `make_eval_step`, over all batches.

    With a `mesh`, `batches` are this host's, of any size and number, and `mesh.spread` divides
    them: each example counts once, whatever the number of devices and hosts.
    """
    total: Metrics | None = None
    for batch in batches if mesh is None else spread(batches, mesh):
        metrics = step(params, state, batch)
        total = metrics if total is None else add_metrics(total, metrics)
    if total is None:
        raise ValueError("there is no batch to evaluate")
    return summary(total)


@jax.jit
def add_metrics(total: Metrics, more: Metrics) -> Metrics:
    """Sums of sums, on the device."""
    return jax.tree.map(jnp.add, total, more)


def summary(metrics: Metrics) -> dict[str, float]:
    """Sums over examples, of one step or [steps] -> {"loss", "accuracy" per example, "count"}."""
    host = {name: float(np.sum(value)) for name, value in jax.device_get(metrics).items()}
    count = host["count"]
    return {
        "loss": host["loss"] / count if count else 0.0,
        "accuracy": host["correct"] / count if count else 0.0,
        "count": count,
    }


class Layout:
    """Where the arrays of a tree lie, as a static argument of a jitted function.

    Without it XLA would choose where the results lie: the second step would be compiled anew,
    and what was split over "fsdp" could end up whole on every device.
    """

    def __init__(self, tree: Tree):
        self.shardings = tuple(_sharding(x) for x in jax.tree.leaves(tree))
        self._hash = hash(self.shardings)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.shardings == other.shardings

    def of(self, tree: Any) -> Any:
        """The shardings as a tree like `tree`; a string where there is none to keep."""
        return jax.tree.unflatten(jax.tree.structure(tree), self.shardings)

    def whole(self, x: jax.Array) -> jax.Array:
        """`x` on every device."""
        meshes = {s.mesh for s in self.shardings if isinstance(s, NamedSharding)}
        if not meshes:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(meshes.pop(), PartitionSpec()))


def _sharding(x: Any) -> Any:
    """A concrete array's place on a mesh."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return "anywhere"
    return x.sharding if isinstance(x.sharding, NamedSharding) else "anywhere"


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: x if isinstance(s, str) else jax.lax.with_sharding_constraint(x, s),
        tree,
        shardings,
    )


def _updated(
    train_state: TrainState,
    grads: Tree,
    state: Tree,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
    params, ema = optax.apply_updates(train_state.params, updates), train_state.ema
    if ema_decay is not None:
        new = {"params": params, "state": state}
        ema = jax.tree.map(lambda old, new: _average(old, new, ema_decay), ema, new)
    step, key = train_state.step + 1, train_state.key
    return TrainState(step, params, state, opt_state, key, ema, train_state.scale)


def _unless_broken(old: TrainState, new: TrainState, grads: Tree, scale: LossScale) -> TrainState:
    """The new state, or where a gradient overflowed the old one; the scale follows."""
    finite = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]).all()

    def kept(name: str) -> Tree:
        choose = functools.partial(jnp.where, finite)
        return jax.tree.map(choose, getattr(new, name), getattr(old, name))

    parts = {name: kept(name) for name in ("params", "state", "opt_state", "ema")}
    return TrainState(step=new.step, key=new.key, scale=scale.after(finite), **parts)


def _in_groups(apply: Apply, groups: int) -> Callable[..., tuple[Any, Tree]]:
    """(params, state, x, key) -> (output, state) in train mode, by groups of examples."""

    def forward(params: Tree, state: Tree, x: jax.Array, key: jax.Array) -> tuple[Any, Tree]:
        return apply(params, state, x, train=True, rngs=key)

    def grouped(params: Tree, state: Tree, x: jax.Array, key: jax.Array) -> tuple[Any, Tree]:
        if x.shape[0] % groups:
            raise ValueError(f"{x.shape[0]} examples do not divide into batch_norm_groups={groups}")
        x = x.reshape(groups, -1, *x.shape[1:])
        keys = jax.random.split(key, groups)
        outputs, states = jax.vmap(forward, (None, None, 0, 0))(params, state, x, keys)
        outputs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outputs)
        return outputs, jax.tree.map(_mean_of_groups, states)

    return forward if groups == 1 else grouped


def _mean_of_groups(x: jax.Array) -> jax.Array:
    return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]  # the counter


def _by_parts(
    differentiate: Callable[..., Any], train_state: TrainState, batch: Batch, parts: int
) -> tuple[Tree, tuple[Metrics, Tree]]:
    """Gradients, metrics and the new batch statistics, of one part of the batch at a time."""
    batch = _with_mask(batch)
    total = jnp.sum(batch["mask"])
    total = jnp.where(total == 0, jnp.ones_like(total), total)
    if train_state.scale is not None:
        total = total / train_state.scale.value

    def one(state: Tree, i: jax.Array | int, part: Batch) -> tuple[Tree, tuple[Metrics, Tree]]:
        key = jax.random.fold_in(train_state.key, train_state.step * parts + i)
        return differentiate(train_state.params, state, key, part, total)

    if parts == 1:
        return one(train_state.state, 0, batch)

    def add_one(carry: Any, part: Any) -> tuple[Any, None]:
        grads, (metrics, state) = carry
        more_grads, (more, state) = one(state, *part)
        grads, metrics = jax.tree.map(jnp.add, (grads, metrics), (more_grads, more))
        return (grads, (metrics, state)), None

    split = jax.tree.map(lambda x: _split(x, parts), batch)
    shapes = jax.eval_shape(one, train_state.state, 0, jax.tree.map(lambda x: x[0], split))
    grads, (metrics, _) = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (grads, (metrics, train_state.state))
    return jax.lax.scan(add_one, start, (jnp.arange(parts, dtype=jnp.int32), split))[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[N, ...] -> [parts, N / parts, ...], example n in part n % parts.

    So each device of a mesh splits what it holds, and none of it moves.
    """
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} does not divide into accumulate={parts} parts")
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def _with_mask(batch: Batch) -> dict[str, jax.Array]:
    """The three arrays; the mask in float32, and of ones where the batch has none."""
    image, label = batch["image"], batch["label"]
    mask = batch.get("mask")
    mask = jnp.ones(image.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
    return {"image": image, "label": label, "mask": mask}


def _smoothed(loss: Loss, label_smoothing: float) -> Callable[..., jax.Array]:
    """(logits, labels, mask) -> the sum of the losses."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 1]")
    known = "label_smoothing" in inspect.signature(loss).parameters
    if label_smoothing and not known:
        raise ValueError(f"label_smoothing: got {label_smoothing}, and {loss} knows no smoothing")
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}
    return lambda logits, labels, mask: loss(
        logits, labels, weights=mask, reduction="sum", **options
    )


def _per_head(weights: float | Sequence[float], heads: int) -> Sequence[float]:
    """One weight for each auxiliary output."""
    if not isinstance(weights, Sequence):
        return [weights] * heads
    if len(weights) != heads:
        raise ValueError(
            f"aux_weights: got {len(weights)} numbers, and the network has {heads} auxiliary "
            "outputs"
        )
    return weights


def _metrics(value: jax.Array, logits: jax.Array, batch: Batch) -> Metrics:
    label, mask = batch["label"], batch["mask"]
    hard = label if jnp.issubdtype(label.dtype, jnp.integer) else jnp.argmax(label, axis=-1)
    correct = losses.topk_correct(logits, hard, ks=(1,), weights=mask)[1]
    return {"loss": value, "correct": correct, "count": jnp.sum(mask)}


def _average(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return new  # batch norm's counter
    return old + (1 - decay) * (new - old)
