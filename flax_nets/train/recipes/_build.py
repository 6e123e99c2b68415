"""What a recipe's numbers stand for: the network, its optimizer and schedule, its batches."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flax_nets
from flax_nets import preprocess, registry
from flax_nets.train import data, groups, loop, losses, optim, schedules
from flax_nets.train.data.pipeline import Transform
from flax_nets.train.recipes import load
from flax_nets.train.recipes._recipe import Recipe
from flax_nets.train.state import LossScale

# Name -> (the optimizer, its momentum where it has one).
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float | None]] = {
    "sgd": (optim.sgd, 0.9),
    "adam": (optim.adam, None),
    "adamw": (optim.adamw, None),
    "rmsprop": (optim.rmsprop, 0.0),
    "rmsprop_tf": (optim.rmsprop_tf, 0.9),
    "lamb": (optim.lamb, None),
}
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
    "rbf": losses.rbf_loss,
}
# What an expression of `augment` may hold besides calls of the functions by their names.
PLAIN = (
    ast.Expression, ast.Call, ast.keyword, ast.Constant, ast.Name, ast.Load, ast.Tuple, ast.List,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.UnaryOp, ast.USub,
)  # fmt: skip


def create(recipe: Recipe, num_classes: int | None = None, seed: int = 0) -> Any:
    """The network, with the recipe's weights."""
    given: dict[str, Any] = {"num_classes": num_classes} | parse_arguments(recipe.arguments)
    if recipe.dropout is not None:
        given["dropout"] = recipe.dropout
    if recipe.image_size and "image_size" in registry.resolve(recipe.model).complete:
        given.setdefault("image_size", recipe.image_size)
    return flax_nets.create_model(
        recipe.model, weights=recipe.weights, dtype=recipe.dtype, rngs=seed, **given
    )


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE -> {name: value}; a value that Python does not read is a string."""
    found = {}
    for text in given:
        name, equal, value = text.partition("=")
        if not equal:
            raise ValueError(f"arguments: got {text!r}, expected NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def rate(recipe: Recipe, steps: int) -> schedules.Schedule:
    """The learning rate by update, of which an epoch has `steps`."""
    if recipe.epochs < 1:
        raise ValueError(f"epochs: got {recipe.epochs}, expected at least 1")
    if not recipe.lr > 0:
        raise ValueError(f"lr: got {recipe.lr}, expected a number above 0")
    if not 0 <= recipe.warmup_epochs < recipe.epochs:
        raise ValueError(
            f"warmup_epochs: got {recipe.warmup_epochs}, expected 0 to less than {recipe.epochs}"
        )
    unit = 1 if recipe.stairs else steps
    total, warmup = recipe.epochs * unit, round(recipe.warmup_epochs * unit)
    schedule = _main(recipe, unit, total, warmup)
    if warmup and recipe.schedule not in ("timm_cosine", "inverse_sqrt"):  # those have their own
        schedule = _after(schedule, recipe.lr, recipe.warmup_factor, warmup)
    return schedules.per_epoch(schedule, steps) if recipe.stairs else schedule


def _main(recipe: Recipe, unit: int, total: int, warmup: int) -> schedules.Schedule:
    lr, kind = recipe.lr, recipe.schedule
    if kind == "cosine":
        falling = schedules.cosine(lr, max(total - warmup, 1), recipe.lr_min)
        return lambda t: falling(jnp.asarray(t) - warmup)
    if kind == "linear":
        line = schedules.polynomial(lr, total - warmup)
        return lambda t: line(jnp.asarray(t) - warmup)
    if kind == "timm_cosine":
        start = lr * recipe.warmup_factor
        return schedules.timm_cosine(lr, total, recipe.lr_min, warmup, start)
    if kind == "exponential":
        (gamma,) = _gammas(recipe, 1)
        return schedules.step(lr, round(recipe.decay_epochs * unit), gamma)
    if kind == "inverse_sqrt":
        peak = max(warmup, 1)

        def schedule(t: Any) -> jax.Array:
            n = jnp.asarray(t, float) + 1
            return lr * jnp.minimum(n / peak, jnp.sqrt(peak / n))

        return schedule
    milestones = recipe.milestones if kind == "steps" else ()
    gammas = _gammas(recipe, len(milestones))

    def steps_down(t: Any) -> jax.Array:
        value = jnp.full(jnp.shape(t), lr, float)
        for milestone, gamma in zip(milestones, gammas, strict=True):
            passed = jnp.asarray(t) >= round(milestone * unit)
            value = jnp.where(passed, value * gamma, value)
        return value

    return steps_down


def _gammas(recipe: Recipe, count: int) -> tuple[float, ...]:
    if len(recipe.gamma) not in (1, count):
        raise ValueError(f"gamma: got {recipe.gamma}, expected one number, or {count}")
    return recipe.gamma if len(recipe.gamma) == count else recipe.gamma * count


def _after(
    schedule: schedules.Schedule, lr: float, factor: float, warmup: int
) -> schedules.Schedule:
    """The schedule, but a line from factor * lr up to lr for the first `warmup` steps."""

    def warmed(t: Any) -> jax.Array:
        rising = lr * (factor + (1 - factor) * jnp.asarray(t, float) / warmup)
        return jnp.where(jnp.asarray(t) < warmup, rising, schedule(t))

    return warmed


def optimizer(recipe: Recipe, steps: int, model: Any = None) -> optax.GradientTransformation:
    """The optimizer: its schedule, decay and clipping, for what is not frozen.

    Args:
      steps: updates of an epoch.
      model: what is trained; a frozen "body" needs it. Default None.
    """
    make, momentum = OPTIMIZERS[recipe.optimizer]
    known = inspect.signature(make).parameters
    options: dict[str, Any] = {"weight_decay": recipe.weight_decay, "mask": _mask(recipe)}
    for name in ("momentum", "betas", "alpha", "eps"):
        options[name] = getattr(recipe, name)
    options["nesterov"] = recipe.nesterov or None
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in known:
            raise ValueError(f"{name}: {recipe.optimizer} has none")
    if momentum is not None:
        options.setdefault("momentum", momentum)
    made = make(rate(recipe, steps), **options)
    if recipe.clip is not None:
        made = optax.chain(optim.clip_by_global_norm(recipe.clip), made)
    if "body" in recipe.freeze:
        if len(recipe.freeze) > 1:
            raise ValueError(f'freeze: got {recipe.freeze}, expected "body" alone, or patterns')
        heads = dict.fromkeys(_heads(model), made)
        made = groups.param_groups(heads, default=optax.set_to_zero())
    elif recipe.freeze:
        made = groups.freeze(made, recipe.freeze)
    if recipe.lr_factors:
        made = optax.chain(made, groups.scale_rates(_factors(recipe.lr_factors)))
    return made


def _factors(given: Sequence[str]) -> dict[str, float]:
    """PATTERN=X -> {pattern: x}."""
    found = {}
    for text in given:
        pattern, _, number = text.rpartition("=")
        try:
            found[pattern] = float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise ValueError(f"lr_factors: got {text!r}, expected PATTERN=X such as layer4=0.1")
    return found


def _heads(model: Any) -> list[str]:
    """Those of the last layers that the model has."""
    flat, _ = jax.tree_util.tree_flatten_with_path(flax_nets.functional(model)[1])
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    heads = [h for h in model.output_layers if any(path.startswith(f"{h}.") for path in paths)]
    if not heads:
        raise ValueError(f"freeze: {model.spec.name} has no last layer to train")
    return heads


def _mask(recipe: Recipe) -> Callable[[Any], Any] | None:
    if recipe.decay == "matrices":
        return functools.partial(groups.decay_mask, exclude=recipe.decay_exclude)
    if recipe.decay_exclude:
        raise ValueError(f'decay_exclude: expected decay "matrices", got {recipe.decay!r}')
    return _not_norms if recipe.decay == "no_norms" else None


def _not_norms(params: Any) -> Any:
    """False for what normalises: scales, and the biases beside them."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = [jax.tree_util.keystr(path, simple=True, separator=".").split(".") for path, _ in flat]
    norms = {tuple(key[:-1]) for key in keys if key[-1] == "scale"}
    return jax.tree_util.tree_unflatten(structure, [tuple(key[:-1]) not in norms for key in keys])


def step_options(recipe: Recipe) -> dict[str, Any]:
    """What `make_train_step` is told besides."""
    loss = LOSSES[recipe.loss]
    if recipe.target_threshold is not None:
        if recipe.loss != "binary_cross_entropy":
            raise ValueError(f"target_threshold: {recipe.loss} has none")
        loss = functools.partial(loss, target_threshold=recipe.target_threshold)
    mixed = recipe.mixup > 0 or recipe.cutmix > 0  # then the labels are smooth already
    return dict(
        loss=loss,
        label_smoothing=0.0 if mixed else recipe.label_smoothing,
        aux_weights=recipe.aux_weight,
        accumulate=recipe.accumulate,
        batch_norm_groups=recipe.batch_norm_groups,
        ema_decay=recipe.ema_decay,
    )


def in_memory(recipe: Recipe, name: str) -> bool:
    """Whether the digits are taken as they are: normalised, in memory, without a pipeline."""
    given = (recipe.augment, recipe.mean, recipe.std, recipe.mixup, recipe.cutmix)
    asks = any(given) or recipe.repeats > 1 or recipe.prepare not in ((), Recipe.prepare)
    if recipe.shift and (name != "digits" or recipe.augment):
        raise ValueError(f"shift: moves the plain digits, got {name} and augment {recipe.augment}")
    return name == "digits" and not asks


def _side(recipe: Recipe, model: Any, training: bool) -> int:
    """Height and width of the images."""
    train = recipe.image_size or model.spec.input_shape[0]
    return train if training else recipe.test_size or train


def batches(
    recipe: Recipe,
    name: str,
    split: Any,
    model: Any,
    *,
    training: bool,
    seed: int = 0,
    source: data.Source | None = None,
    **options: Any,
) -> Any:
    """Batches of a data set: shuffled, augmented and all full if `training`, else each once.

    `source` is the data set, if it has been loaded already; `options` are those of `Pipeline`.
    """
    side, channels = _side(recipe, model, training), _channels(model)
    size = recipe.batch_size if training else recipe.test_batch or recipe.batch_size
    if in_memory(recipe, name):
        found = data.digits(split, side, channels)
        if not training:
            return data.Batches(found, size)
        moved = data.shift(recipe.shift) if recipe.shift else None
        return data.Batches(found, size, seed, drop_last=True, augment=moved)
    source = data.load(name, split) if source is None else source
    options |= dict(transform=transform(recipe, model, training), channels=channels)
    if not training:
        return data.Pipeline(source, size, **options)
    return data.Pipeline(
        source, size, seed=seed, drop_last=True, repeats=recipe.repeats,
        mix=_mix(recipe, len(source.classes)), **options,
    )  # fmt: skip


def fit(
    recipe: Recipe | str,
    model: Any,
    found: str | tuple[Any, Any],
    *,
    seed: int = 0,
    **options: Any,
) -> list[loop.Row]:
    """Train `model` in place as a recipe says, and return a row of figures per epoch.

    The second of the two lines of fine-tuning:

        model = flax_nets.create_model("resnet50", weights="DEFAULT", num_classes=37)
        rows = recipes.fit("finetune_head", model, "folder:DIR", out="RUN")

    Args:
      recipe: of which name, network and weights stay aside.
      model: from `create_model`.
      found: a data set by its name, or what to train and to test on, as `batches` gives them.
      seed: of order, augmentation and dropout. Default 0.
      options: of `flax_nets.train.fit`, such as `out`.

    Raises ValueError where the data have more classes than `model` tells apart.
    """
    recipe = load(recipe) if isinstance(recipe, str) else recipe
    if isinstance(found, str):
        held_out = data.load(found, "test")
        told, there = model.spec.complete["num_classes"], len(held_out.classes)
        if there > told:
            raise ValueError(
                f"{found} has {there} classes, and the model tells {told} apart: "
                f"create_model(..., num_classes={there})"
            )
        train = batches(recipe, found, "train", model, training=True, seed=seed)
        test = batches(recipe, found, "test", model, training=False, source=held_out)
    else:
        train, test = found
    return loop.fit(
        model,
        train,
        test,
        optimizer(recipe, len(train), model),
        recipe.epochs,
        seed=seed,
        loss_scale=LossScale.create() if recipe.dtype == "float16" else None,
        **step_options(recipe),
        **options,
    )


def _channels(model: Any) -> int:
    return model.spec.input_shape[2]


def _mix(recipe: Recipe, num_classes: int) -> Any:
    if recipe.mixup == recipe.cutmix == 0:
        return None
    from flax_nets.train.data import augment

    return augment.mix(
        num_classes,
        recipe.mixup,
        recipe.cutmix,
        p=recipe.mix_probability,
        label_smoothing=recipe.label_smoothing,
    )


def transform(recipe: Recipe, model: Any, training: bool) -> Transform:
    """From an image to an array, as the recipe trains or tests."""
    from flax_nets.train.data import augment

    side, channels = _side(recipe, model, training), _channels(model)
    usual = preprocess.for_model(model)
    texts = recipe.augment if training and recipe.augment else recipe.prepare
    if not texts:
        return augment.prepare(_resized(usual, side))
    mean, std = (
        _per_channel(given or own, channels)
        for given, own in ((recipe.mean, usual.mean), (recipe.std, usual.std))
    )
    erased = [n for n, text in enumerate(texts) if text.startswith("random_erasing")]
    steps = [parse_step(text, side) for text in texts]
    place = erased[0] if erased else len(steps)  # erasing is of what is normalised
    return augment.compose(*steps[:place], augment.normalize(mean, std), *steps[place:])


def _resized(found: preprocess.Preprocess, side: int) -> preprocess.Preprocess:
    """The same, for another size of images."""
    height, width, _ = found.shape
    if (height, width) == (side, side):
        return found
    up, across = found.resize_size  # type: ignore[misc]
    larger = round(up * side / height), round(across * side / width)
    return dataclasses.replace(found, image_size=side, resize_size=larger)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Of one grey channel the mean over the colours'."""
    if len(values) in (1, channels):
        return tuple(values)
    return (sum(values) / len(values),)


def parse_step(text: str, size: int) -> Transform:
    """A transformation from how it is written, such as "random_crop(size, padding=4)".

    Besides numbers and strings it may name `size` and Pillow's filters nearest, bilinear, bicubic.
    Raises ValueError for what is no such call, with the nearest names.
    """
    functions, names = _functions(), _names(size)
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        tree = ast.parse("None", mode="eval")
    call = tree.body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"augment: got {text!r}, expected a call such as flip(0.5)")
    if call.func.id not in functions:
        near = registry.suggest(call.func.id, functions)
        listed = ", ".join(functions)
        raise ValueError(f"augment: there is no {call.func.id!r}{near} There are: {listed}.")
    for node in ast.walk(tree):
        unknown = isinstance(node, ast.Name) and node is not call.func and node.id not in names
        if not isinstance(node, PLAIN) or unknown:
            raise ValueError(
                f"augment: got {text!r}, expected numbers, strings and {', '.join(names)} in it"
            )
    try:
        code = compile(tree, "augment", "eval")
        return eval(code, {"__builtins__": {}, **names, **functions})
    except TypeError as error:
        raise ValueError(f"augment: {text}: {error}") from None


def _names(size: int) -> dict[str, Any]:
    from flax_nets.train.data.augment import FILTERS

    return {"size": size, **FILTERS}


def _functions() -> dict[str, Callable[..., Transform]]:
    from flax_nets.train.data import augment, policies

    names = (
        "center_crop", "color_jitter", "flip", "pca_noise", "random_crop", "random_erasing",
        "random_resized_crop", "resize", "scale_jitter",
    )  # fmt: skip
    own = ("auto_augment", "rand_augment", "timm_rand_augment", "trivial_augment")
    found = {name: getattr(augment, name) for name in names}
    return found | {name: getattr(policies, name) for name in own}
