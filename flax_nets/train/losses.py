"""Losses and accuracy over [N, classes], reduced as PyTorch does.

All compute in float32 at least (bfloat16 logits give a float32 loss). `weights` [N] weighs the
examples: a mask of zeros and ones lets padded examples count nothing, whatever they hold, and
`reduction="mean"` then divides by the sum of the weights (a batch of padding alone gives 0).
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float = 0.0,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """Softmax cross entropy, `torch.nn.functional.cross_entropy`.

    The target distribution is (1 - label_smoothing) * target + label_smoothing / classes
    (Szegedy et al. 2015, section 7).

    Args:
        logits: [N, classes].
        targets: labels [N] of an integer dtype, or probabilities [N, classes]. A label outside
            0..classes-1 gives NaN.
        label_smoothing: in [0, 1].
        weights: [N], one per example; None: all 1.
        reduction: "mean", "sum", or "none" for [N].

    Raises:
        ValueError: a shape, the smoothing or the reduction is not as above.
    """
    logits, hard = _prepare(logits, targets, label_smoothing)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    smooth = label_smoothing / logits.shape[-1]
    if hard:
        loss = -(1 - label_smoothing) * _pick(log_p, targets)
    else:
        loss = -jnp.sum(((1 - label_smoothing) * targets.astype(log_p.dtype)) * log_p, axis=-1)
    if label_smoothing:
        loss -= smooth * jnp.sum(log_p, axis=-1)
    return _reduce(loss, weights, reduction)


def binary_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """One binary cross entropy per class, averaged over the classes.

    `torch.nn.functional.binary_cross_entropy_with_logits`, with the targets of timm's
    `BinaryCrossEntropy` (Wightman et al. 2021, "ResNet strikes back", procedures A1 to A3): labels
    become one-hot rows with smoothing / classes added and 1 - smoothing as factor, probabilities
    are taken as they are (mixup has smoothed them).

    Args:
        logits, targets, weights, reduction: as in `cross_entropy`.
        label_smoothing: in [0, 1], for labels only.
        target_threshold: targets above it become 1, all others 0; None: left as they are.

    Raises:
        ValueError: as in `cross_entropy`.
    """
    logits, hard = _prepare(logits, targets, label_smoothing)
    soft = targets
    if hard:
        soft = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
        soft = (1 - label_smoothing) * soft + label_smoothing / logits.shape[-1]
    if target_threshold is not None:
        soft = soft > target_threshold
    loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, soft.astype(logits.dtype)), axis=-1)
    if hard:
        loss = jnp.where(_is_class(targets, logits.shape[-1]), loss, jnp.nan)
    return _reduce(loss, weights, reduction)


def rbf_loss(
    logits: jax.Array,
    labels: jax.Array,
    j: float = 0.1,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> jax.Array:
    """LeNet-5's discriminative loss (LeCun et al. 1998, equation 9).

    y_label + log(exp(-j) + sum_i exp(-y_i)), where the penalties y are minus the logits of the
    radial-basis output: pull the right class's penalty down, push the others' up until they
    exceed `j` (positive; the paper gives no value).

    Args:
        logits: [N, classes], minus the squared distances.
        labels: [N], integers.
        weights, reduction: as in `cross_entropy`.

    Raises:
        ValueError: as in `cross_entropy`, or labels that are not integers.
    """
    logits, hard = _prepare(logits, labels, 0.0)
    if not hard:
        raise ValueError(f"labels: got dtype {labels.dtype}, expected an integer dtype")
    total = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), jnp.asarray(-j, logits.dtype))
    return _reduce(total - _pick(logits, labels), weights, reduction)


def topk_correct(
    logits: jax.Array,
    labels: jax.Array,
    ks: Sequence[int] = (1, 5),
    weights: ArrayLike | None = None,
) -> dict[int, jax.Array]:
    """For each k, how many examples have their label among the k largest logits.

    Among equal logits the lower class index ranks first, as in `argmax`, and NaN beats every
    number, so that a network that has diverged scores nothing. With fewer than k classes every
    example that is not NaN counts.

    Args:
        logits: [N, classes].
        labels: [N], integers.
        ks: the ks.
        weights: [N], one per example; None: all 1.

    Returns:
        k -> float32 scalar, the weighted count.

    Raises:
        ValueError: a shape or a dtype is not as above.
    """
    logits, hard = _prepare(logits, labels, 0.0)
    if not hard:
        raise ValueError(f"labels: got dtype {labels.dtype}, expected an integer dtype")
    own = _pick(logits, labels)[:, None]
    index = jnp.arange(logits.shape[-1])[None]
    earlier = (logits == own) & (index < labels.astype(index.dtype)[:, None])
    rank = jnp.sum(~(logits <= own) | earlier, axis=-1)  # sorting would not shard as well
    return {
        k: _reduce((rank < min(k, logits.shape[-1])).astype(jnp.float32), weights, "sum")
        for k in ks
    }


def _prepare(logits: jax.Array, targets: jax.Array, smoothing: float) -> tuple[jax.Array, bool]:
    """Check, and return the logits in float32 or wider and whether the targets are labels."""
    if logits.ndim != 2:
        raise ValueError(f"logits: got shape {logits.shape}, expected [N, classes]")
    hard = jnp.issubdtype(targets.dtype, jnp.integer)
    expected = logits.shape[:1] if hard else logits.shape
    if targets.shape != expected:
        raise ValueError(
            f"targets: got {targets.dtype} of shape {targets.shape} for logits {logits.shape}; "
            "expected integer labels [N] or float probabilities [N, classes]"
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing: got {smoothing}, expected a number in [0, 1]")
    return logits.astype(np.promote_types(logits.dtype, np.float32)), hard


def _pick(rows: jax.Array, labels: jax.Array) -> jax.Array:
    """rows[n, labels[n]], NaN where the label is no class: [N, classes], [N] -> [N]."""
    labels = labels.astype(jnp.int32)
    picked = jnp.take_along_axis(rows, labels[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.where(_is_class(labels, rows.shape[-1]), picked, jnp.nan)


def _is_class(labels: jax.Array, classes: int) -> jax.Array:
    return (labels >= 0) & (labels < classes)


def _reduce(loss: jax.Array, weights: ArrayLike | None, reduction: Reduction) -> jax.Array:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction: got {reduction!r}, expected "mean", "sum" or "none"')
    if weights is None:
        weights = jnp.ones(loss.shape, loss.dtype)
    weights = jnp.asarray(weights)
    if weights.shape != loss.shape:
        raise ValueError(f"weights: got shape {weights.shape}, expected {loss.shape}")
    weights = weights.astype(loss.dtype)
    loss = jnp.where(weights == 0, 0, loss * weights)  # a padded example may hold NaN
    if reduction == "none":
        return loss
    total = jnp.sum(weights) if reduction == "mean" else 1
    return jnp.sum(loss) / jnp.where(total == 0, 1, total)
