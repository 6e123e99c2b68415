"""Recipes: each is complete, takes real steps, and has the rates that its source tells."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.optim
import timm.scheduler
import torch
from PIL import Image

import convert
import flax_nets
from benchmarks.compare import error
from flax_nets import registry, train
from flax_nets.train import recipes
from flax_nets.train.recipes import __main__ as page
from flax_nets.train.recipes import _build

ROOT = Path(__file__).parent.parent
# Instead of a recipe's network a small one with the same kinds of parameters takes the steps: what
# the recipe decides (images, loss, optimizer, rate, averages) is all its own. Those with a row in
# OWN, of which something holds for their own network only, have that, made cheap.
STAND_IN = dict(
    model="resnet20_cifar",
    arguments=("depths=()", "widths=()", "stem_width=8"),
    dropout=None,
    weights=None,
)
OWN = {
    "lenet5_1998": (),  # its loss
    "resnet50_a1": ("depths=(1,1)", "widths=(8,8)", "stochastic_depth=0.05"),  # which it drops
    "mobilenetv1_100_2017": ("depths=(1,1)", "widths=(8,16,32)"),  # depthwise kernels
    "resnet18_cifar10": ("stem=cifar", "depths=(1,1)", "widths=(8,16)"),
    "finetune_head": ("depths=(1,1)", "widths=(8,16)"),  # a frozen body
    "vit_s16_90ep": (
        "depth=1", "width=48", "num_heads=2", "class_token=False", "pool=mean",
        "representation_size=24",
    ),  # positions
}  # fmt: skip


def cheap(name):
    """The recipe, on images of 32 pixels and 8 at a time."""
    recipe = recipes.load(name)
    changes = dict(
        image_size=32, test_size=None, batch_size=min(recipe.batch_size, 8), test_batch=8
    )
    own = dict(arguments=OWN[name], weights=None) if name in OWN else STAND_IN
    return dataclasses.replace(recipe, **changes | own)


def begin(recipe):
    model = recipes.create(recipe, num_classes=10)
    apply, params, state = flax_nets.functional(model)
    optimizer = recipes.optimizer(recipe, 100, model)
    now = train.TrainState.create(params, state, optimizer, ema=recipe.ema_decay is not None)
    return model, now, train.make_train_step(apply, optimizer, **recipes.step_options(recipe))


@pytest.mark.parametrize("name", recipes.names())
def test_two_steps(name):
    recipe = cheap(name)
    model, now, step = begin(recipe)
    batches = recipes.batches(recipe, "digits", "train", model, training=True)
    batch = next(iter(batches))
    shape = (32, 32, model.spec.input_shape[2])
    assert batch["image"].shape == (recipe.batch_size, *shape)
    assert batch["image"].dtype == np.float32
    held_out = recipes.batches(recipe, "digits", "test", model, training=False)
    assert next(iter(held_out))["image"].shape == (8, *shape)
    before = jax.tree.map(np.asarray, now.params)
    for _ in range(2):
        now, metrics = step(now, batch)
        assert np.isfinite(train.summary(metrics)["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, now.params)
    trained = moved["fc"] if "body" in recipe.freeze else moved
    assert all(jax.tree.leaves(trained))
    if "body" in recipe.freeze:
        assert sum(jax.tree.leaves(moved)) == 2
    if recipe.mixup:
        assert batch["label"].shape == (recipe.batch_size, 10)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_names_what_there_is(name):
    recipe, about = recipes.load(name), recipes.about(name)
    for word in ("Source", "Expected", "Hardware"):
        assert len(re.findall(rf"^{word}: \S", about, re.MULTILINE)) == 1
    if name == "transformer_base_2017":
        assert recipe.model in flax_nets.models.attention.TRANSFORMERS
        return
    spec = registry.resolve(recipe.model)
    given = _build.parse_arguments(recipe.arguments)
    if recipe.dropout is not None:
        given["dropout"] = recipe.dropout
    spec.with_arguments(**given)
    if recipe.decay_exclude:  # against the network itself, whose paths it means
        shapes = flax_nets.functional(flax_nets.create_model(spec.name, **given))[1]
        decayed = _build._mask(recipe)(shapes)
        kernels = jax.tree.map(lambda p: p.ndim > 1, shapes)
        assert 0 < sum(jax.tree.leaves(decayed)) < sum(jax.tree.leaves(kernels))


def test_every_paper_has_one():
    files = {
        registry.resolve(recipes.load(n).model).file for n in recipes.names() if "former" not in n
    }
    assert files == set(registry.FILES)


RATES = [  # recipe, updates of an epoch, {update: rate}
    ("alexnet_2012", 10_009, {0: 0.01, 90 * 10_009 - 1: 1e-5}),  # three times a tenth
    ("vgg16_2014", 5_004, {0: 0.01, 74 * 5_004 - 1: 1e-5}),
    ("lenet5_1998", 60_000, {60_000 * e: 1e-3 * r / 5e-4 for e, r in (
        (0, 5e-4), (1, 5e-4), (2, 2e-4), (4, 2e-4), (5, 1e-4), (7, 1e-4), (8, 5e-5), (11, 5e-5),
        (12, 1e-5), (19, 1e-5))}),
    ("resnet20_cifar", 390, {0: 0.1, 31_900: 0.1, 32_000: 0.01, 48_000: 0.001, 63_959: 0.001}),
    ("resnet110_cifar", 390, {0: 0.01, 400: 0.1, 32_000: 0.01, 48_000: 0.001}),
    ("googlenet_2014", 100, {799: 0.01, 800: 0.0096, 1_600: 0.01 * 0.96**2}),
    ("densenet_bc100_k12_cifar", 781, {149 * 781: 0.1, 150 * 781: 0.01, 225 * 781: 0.001}),
    ("inception_v3_2015", 100, {199: 0.045, 200: 0.0423, 400: 0.045 * 0.94**2}),
    ("xception_2016", 100, {199: 0.045, 200: 0.0423}),
    ("squeezenet1_0_2016", 2_500, {0: 0.04, 85_000: 0.02, 127_500: 0.01}),
    ("shufflenet_v1_x1_0_g3_2017", 1_250, {0: 0.5, 75_000: 0.375, 150_000: 0.25}),
    ("mobilenet_v2_2018", 100, {99: 0.045, 100: 0.0441}),
    ("mobilenet_v3_large_2019", 100, {299: 0.1, 300: 0.099, 600: 0.09801}),
    ("seresnet50_2017", 1_251, {0: 0.6, 30 * 1_251: 0.06, 90 * 1_251: 6e-4}),
    ("resnext29_8x64d_cifar", 390, {0: 0.1, 150 * 390: 0.01, 225 * 390: 0.001}),
    ("vit_b_16_2020", 312, {0: 0.0, 4_992: 1.5e-3, 9_984: 3e-3, (9_984 + 93_600) // 2: 1.5e-3}),
    ("vit_s16_90ep", 1_251, {0: 0.0, 10_008: 1e-3, (10_008 + 112_590) // 2: 5e-4}),
    ("transformer_base_2017", 4_000, {
        n - 1: 512**-0.5 * min(n**-0.5, n * 4000**-1.5) for n in (1, 100, 4_000, 4_001, 100_000)}),
    ("finetune_head", 61, {0: 1e-3, 7 * 61: 1e-4, 21 * 61: 1e-6}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "rates"), RATES, ids=[row[0] for row in RATES])
def test_rates_are_the_papers(name, steps, rates):
    found = recipes.rate(recipes.load(name), steps)(np.array(list(rates)))
    assert error(found, np.array(list(rates.values()))) <= 1e-12


# A parameter of each kind that some recipe treats in its own way.
LAYERS = {
    "blocks": {
        "conv_dw": {"kernel": (3, 3, 1, 4)},
        "conv_pw": {"kernel": (1, 1, 4, 4)},
        "bn": {"bias": (4,), "scale": (4,)},
    },
    "encoder": {"pos_embedding": (1, 5, 4)},
    "fc": {"bias": (3,), "kernel": (4, 3)},
}
NAMES = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop"}


def references_optimizer(recipe, leaves):
    """PyTorch's, or timm's: with a group of what decays and one of what does not."""
    known = dict(lr=recipe.lr, betas=recipe.betas, alpha=recipe.alpha, eps=recipe.eps)
    known["momentum"] = recipe.momentum
    if recipe.optimizer == "sgd" and recipe.momentum is None:
        known["momentum"] = 0.9
    if recipe.nesterov:
        known["nesterov"] = True
    own = timm.optim if recipe.optimizer in ("rmsprop_tf", "lamb") else torch.optim
    cls = {"rmsprop_tf": "RMSpropTF", "lamb": "Lamb"} | NAMES
    groups = {True: [], False: []}
    for name, leaf in leaves.items():
        decays = {
            "all": True,
            "matrices": leaf.ndim > 1
            and not any(pattern.lstrip("*.") in name for pattern in recipe.decay_exclude),
            "no_norms": ".bn." not in name,
        }
        groups[decays[recipe.decay]].append(leaf)
    split = [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
    if recipe.weight_decay is not None:
        split[0]["weight_decay"] = recipe.weight_decay
    given = {name: value for name, value in known.items() if value is not None}
    return getattr(own, cls[recipe.optimizer])([g for g in split if g["params"]], **given)


def references_rates(recipe, steps):
    """Of every update, by PyTorch's and timm's schedulers, moved by update or by epoch."""
    unit = 1 if recipe.stairs else steps
    total, warmup = recipe.epochs * unit, round(recipe.warmup_epochs * unit)
    optimizer = torch.optim.SGD([torch.zeros(1)], recipe.lr)
    scheduler = torch.optim.lr_scheduler
    if recipe.schedule == "timm_cosine":
        theirs = timm.scheduler.CosineLRScheduler(
            optimizer, total, lr_min=recipe.lr_min, warmup_t=warmup,
            warmup_lr_init=recipe.warmup_factor * recipe.lr,
        )  # fmt: skip
        found = [theirs._get_lr(t)[0] for t in range(total)]
        return np.repeat(found, steps // unit)
    if recipe.schedule == "inverse_sqrt":  # equation 3 of its paper, but for the constant
        n = np.arange(1, total + 1)
        return recipe.lr * warmup**0.5 * np.minimum(n**-0.5, n * float(warmup) ** -1.5)
    if recipe.schedule == "cosine":
        main = scheduler.CosineAnnealingLR(optimizer, total - warmup, recipe.lr_min)
    elif recipe.schedule == "linear":
        main = scheduler.PolynomialLR(optimizer, total - warmup)
    elif recipe.schedule == "exponential":
        main = scheduler.StepLR(optimizer, round(recipe.decay_epochs * unit), recipe.gamma[0])
    elif len(set(recipe.gamma)) == 1:
        main = scheduler.MultiStepLR(
            optimizer, [round(m * unit) for m in recipe.milestones], recipe.gamma[0]
        )
    else:
        changes = {round(m * unit): g for m, g in zip(recipe.milestones, recipe.gamma, strict=True)}
        main = scheduler.MultiplicativeLR(optimizer, lambda t: changes.get(t, 1.0))
    if warmup:
        start = max(recipe.warmup_factor, 1e-300)  # PyTorch takes no zero
        rising = scheduler.LinearLR(optimizer, start, total_iters=warmup)
        main = scheduler.SequentialLR(optimizer, [rising, main], [warmup])
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    return np.repeat(found, steps // unit)


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own
@pytest.mark.parametrize("name", recipes.names())
def test_every_rate_is_pytorchs(name):
    recipe = recipes.load(name)
    wanted = references_rates(recipe, 3)
    assert len(wanted) == 3 * recipe.epochs
    assert error(recipes.rate(recipe, 3)(np.arange(len(wanted))), wanted) <= 1e-11


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", recipes.names())
def test_ten_steps_are_pytorchs(name):
    """Optimizer, schedule, what decays, clipping and what is frozen; an epoch for each update."""
    recipe, rng = recipes.load(name), np.random.default_rng(0)
    steps = 1 if recipe.epochs >= 10 else 2

    def draw(scale):
        return jax.tree.map(
            lambda shape: jnp.asarray(scale * rng.normal(size=shape)),
            LAYERS,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    params, grads = draw(1.0), [draw(3.0) for _ in range(10)]
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    theirs = {n: torch.tensor(np.asarray(p)) for n, (_, p) in zip(names, flat, strict=True)}
    trained = {n: p for n, p in theirs.items() if not recipe.freeze or n.startswith("fc.")}
    reference, rates = references_optimizer(recipe, trained), references_rates(recipe, steps)
    model = flax_nets.create_model("resnet20_cifar", depths=(1,), widths=(4,))  # its head is "fc"
    optimizer = recipes.optimizer(recipe, steps, model)
    state = optimizer.init(params)
    for rate, gradient in zip(rates[:10], grads, strict=True):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for n, g in zip(names, jax.tree.leaves(gradient), strict=True):
            theirs[n].grad = torch.tensor(np.asarray(g))
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        for n, ours in zip(names, jax.tree.leaves(params), strict=True):
            assert error(ours, theirs[n]) <= 1e-12, n


def test_what_decays():
    recipe = cheap("resnet50_torchvision_v2")
    recipe = dataclasses.replace(recipe, arguments=("depths=(1,)", "widths=(8,)"))
    _, now, _ = begin(recipe)

    def decayed(**changes):
        mask = _build._mask(dataclasses.replace(recipe, **changes))
        flat, _ = jax.tree_util.tree_flatten_with_path(mask(now.params))
        return {jax.tree_util.keystr(p, simple=True, separator=".") for p, yes in flat if yes}

    kernels = {"conv1.kernel", "layer1.0.conv1.kernel", "layer1.0.conv2.kernel", "fc.kernel"}
    assert decayed() == kernels | {"fc.bias"}
    assert decayed(decay="matrices") == kernels
    assert decayed(decay="matrices", decay_exclude=("layer1",)) == {"conv1.kernel", "fc.kernel"}
    assert _build._mask(dataclasses.replace(recipe, decay="all")) is None


@pytest.mark.parametrize("file", registry.FILES)
def test_every_network_has_a_body_and_a_head(file):
    networks = registry.module(file)
    spec = registry.resolve(next(iter(networks.VARIANTS)))
    model = flax_nets.create.build(spec)
    heads = _build._heads(model)
    optimizer = train.param_groups(dict.fromkeys(heads, train.sgd(0.1)), default=train.sgd(0.1))
    jax.eval_shape(optimizer.init, flax_nets.functional(model)[1])  # each names some parameter


def test_rates_by_layer_and_batch_norm_by_device():
    """What a recipe says of them reaches the optimizer and the step."""
    changes = dict(lr_factors=("fc=0", "conv*=1"), batch_norm_groups=2)
    recipe = dataclasses.replace(
        cheap("resnet20_cifar"), arguments=("depths=(1,)", "widths=(4,)", "stem_width=4"), **changes
    )
    assert recipes.step_options(recipe)["batch_norm_groups"] == 2
    model, now, step = begin(recipe)
    batch = next(iter(recipes.batches(recipe, "digits", "train", model, training=True)))
    before = jax.tree.map(np.asarray, now.params)
    now, _ = step(now, batch)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, now.params)
    assert not any(jax.tree.leaves(moved.pop("fc"))) and all(jax.tree.leaves(moved))


def test_fine_tuning_is_two_lines():
    """A new head for a network that has learnt something else, and a recipe with a frozen body."""
    small = dict(depths=(1,), widths=(8,))
    before = convert.export(flax_nets.create_model("resnet20_cifar", num_classes=7, **small))
    model = flax_nets.create_model("resnet20_cifar", weights=before, num_classes=10, **small)
    recipe = dataclasses.replace(
        recipes.load("finetune_head"), image_size=16, batch_size=128, epochs=1, milestones=()
    )
    (row,) = recipes.fit(recipe, model, "digits", progress=False)
    assert (row["epoch"], row["step"]) == (1, 11)
    after = convert.export(model)
    assert np.array_equal(after["conv1.weight"], before["conv1.weight"])
    assert np.any(after["fc.bias"])
    seven = flax_nets.create_model("resnet20_cifar", weights=before, **small)
    with pytest.raises(ValueError, match=r"digits has 10 classes, and the model tells 7 apart: cr"):
        recipes.fit("finetune_head", seven, "digits")


def test_labels_are_smoothed_once():
    """By the mixing where there is one, else by the loss."""
    recipe = cheap("resnet50_torchvision_v2")
    assert recipes.step_options(recipe)["label_smoothing"] == 0
    model = recipes.create(recipe, num_classes=10)
    batch = next(iter(recipes.batches(recipe, "digits", "train", model, training=True)))
    assert error(batch["label"].sum(1), np.ones(8)) <= 1e-6
    assert error(batch["label"].min(), 0.01) <= 1e-6
    alone = dataclasses.replace(recipe, mixup=0.0, cutmix=0.0)
    assert recipes.step_options(alone)["label_smoothing"] == 0.1


def test_images_are_those_of_the_recipe():
    """Trained on at one size, tested at another, and normalised as it says."""
    recipe = dataclasses.replace(cheap("resnet50_a3"), image_size=24, test_size=32, mean=(0.25,))
    recipe = dataclasses.replace(recipe, std=(0.5,), prepare=("resize(size)",))
    model = recipes.create(recipe, num_classes=10)
    made = [
        next(iter(recipes.batches(recipe, "digits", "test", model, training=training)))
        for training in (True, False)
    ]
    assert [batch["image"].shape[1:3] for batch in made] == [(24, 24), (32, 32)]
    raw = train.data.load("digits", "test").images[:8] / 255
    assert error(made[1]["image"][..., 0], (raw[..., 0] - 0.25) / 0.5) <= 1e-6


@pytest.mark.parametrize("size", [None, 48])
def test_images_as_the_weights_expect_them(size):
    """Where nothing else is said: here a crop of 87.5%, in proportion at another size."""
    recipe = recipes.Recipe(model="resnet20_cifar", prepare=(), image_size=size)
    model = recipes.create(recipe)
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    found = recipes.transform(recipe, model, training=True)(Image.fromarray(image), None)
    wanted = flax_nets.preprocess.Preprocess(size or 32, 54 if size else 36)(image)
    assert np.array_equal(found, wanted[0])


def test_erasing_comes_after_normalising():
    recipe = dataclasses.replace(
        cheap("resnet50_torchvision_v1"), augment=("random_erasing(1.0)",), mean=(0.1,), std=(1,)
    )
    model = recipes.create(recipe, num_classes=10)
    transform = recipes.transform(recipe, model, training=True)
    image = transform(np.zeros((32, 32, 3), np.uint8), np.random.default_rng(0))
    assert set(np.unique(image)) == {np.float32(-0.1), np.float32(0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=0), "epochs: got 0"),
        (dict(lr=-1.0), "lr: got -1.0"),
        (dict(warmup_epochs=600), "warmup_epochs: got 600, expected 0 to less than 600"),
        (dict(optimizer="adam", momentum=0.9), "momentum: adam has none"),
        (dict(optimizer="adam", momentum=None, nesterov=True), "nesterov: adam has none"),
        (dict(schedule="steps", milestones=(1, 2, 3), gamma=(1, 2)), "expected one number, or 3"),
        (dict(decay_exclude=("fc",)), "decay_exclude: expected decay \"matrices\", got 'no_norms'"),
        (dict(target_threshold=0.2), "target_threshold: cross_entropy has none"),
        (dict(shift=2), "shift: moves the plain digits"),
        (dict(freeze=("body", "fc")), 'freeze: got .*, expected "body" alone'),
        (dict(freeze=("fcc",)), "patterns .'fcc'. match no parameter"),
        (dict(lr_factors=("layer4",)), "lr_factors: got 'layer4', expected PATTERN=X such as"),
        (dict(lr_factors=("layer=1",)), "patterns .'layer'. match no parameter"),
        (dict(batch_norm_groups=0), "batch_norm_groups: got 0"),
        (dict(augment=("filp()",)), r"there is no 'filp': did you mean 'flip'\?"),
        (dict(augment=("flip(",)), r"got 'flip\(', expected a call such as flip\(0.5\)"),
        (dict(augment=("flip(p=x)",)), "expected numbers, strings and size, nearest"),
        (dict(augment=("flip(print())",)), "expected numbers, strings and size, nearest"),
        (dict(augment=("flip(q=1)",)), r"flip\(q=1\): .*unexpected keyword"),
        (dict(augment=("flip(2)",)), "flip: got"),
        (dict(arguments=("depths",)), "arguments: got 'depths', expected NAME=VALUE"),
        (dict(arguments=("deepness=2",)), "has no argument 'deepness'"),
    ],
)
def test_mistakes(changes, message):
    recipe = dataclasses.replace(cheap("resnet50_torchvision_v2"), **changes)
    with pytest.raises(ValueError, match=message):
        _, _, _ = begin(recipe)
        model = recipes.create(recipe, num_classes=10)
        recipes.batches(recipe, "digits", "train", model, training=True)


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="there is no recipe 'resnet50_a4': did you mean 'resnet5"):
        recipes.load("resnet50_a4")
    with pytest.raises(AttributeError, match="has no attribute 'loda'"):
        _ = recipes.loda


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "recipes.md").read_text() == page.page()


def test_rates_are_as_exact_in_float32():
    """A run of today has no float64: the rate must not drift."""
    rate = recipes.rate(recipes.load("inception_v3_2015"), 40_036)
    t = 4_000_000
    assert error(jnp.asarray(rate(t), jnp.float32), 0.045 * 0.94**49) <= 1e-6
