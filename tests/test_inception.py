"""GoogLeNet and its successors: the figures of their papers, and their auxiliary heads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision
from flax import nnx

import convert
import flax_nets
from benchmarks import libraries
from benchmarks.compare import (
    GRADIENT,
    OUTPUT,
    error,
    flax_pass,
    images,
    nchw,
    quick_jit,
    state_dict,
    torch_pass,
    twin,
    worst_errors,
)
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.functional import set_mode
from flax_nets.layers import init
from flax_nets.models import inception_v3


def shapes(name, side, **overrides):
    """(model of shapes alone, path -> output shape of every module that is called)."""
    model = build(registry.resolve(name).with_arguments(**overrides))
    set_mode(model, train=False)
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    outputs = jax.eval_shape(
        lambda state, x: flax_nets.features(nnx.merge(graph, state), x, ["*"]), state, x
    )
    return model, {path: tuple(output.shape[1:]) for path, output in outputs.items()}


def multiply_adds(model, outputs, prefix=""):
    """Of all convolutions and dense layers below `prefix`."""
    total = 0
    for path, module in nnx.iter_modules(model):
        path = ".".join(map(str, path))
        counted = path in outputs and path.startswith(prefix)
        if counted and isinstance(module, layers.Conv | layers.Linear):
            total += int(np.prod(outputs[path][:-1])) * int(np.prod(module.kernel.shape))
    return total


TABLE_1 = {  # of Szegedy et al. 2014: output size, millions of operations
    "conv1": ((112, 112, 64), None),  # prints 34M; 7x7x3x64 at 112x112 are 118M
    "maxpool1": ((56, 56, 64), None),
    "conv3": ((56, 56, 192), None),  # 360M together with its reduction
    "maxpool2": ((28, 28, 192), None),
    "inception3a": ((28, 28, 256), 128),
    "inception3b": ((28, 28, 480), 304),
    "maxpool3": ((14, 14, 480), None),
    "inception4a": ((14, 14, 512), 73),
    "inception4b": ((14, 14, 512), 88),
    "inception4c": ((14, 14, 512), 100),
    "inception4d": ((14, 14, 528), 119),
    "inception4e": ((14, 14, 832), 170),
    "maxpool4": ((7, 7, 832), None),
    "inception5a": ((7, 7, 832), None),  # prints 54M; the widths of its row give 51M
    "inception5b": ((7, 7, 1024), 71),
}


def test_googlenet_2014_is_table_1():
    model, outputs = shapes("googlenet_2014", 224)
    for path, (size, operations) in TABLE_1.items():
        assert outputs[path] == size, path
        if operations is not None:
            assert abs(multiply_adds(model, outputs, path + ".") / 1e6 - operations) < 1, path
    conv2 = multiply_adds(model, outputs, "conv2.") + multiply_adds(model, outputs, "conv3.")
    assert round(conv2 / 1e6) == 360


def test_googlenet_2014_normalises_locally_and_not_by_batch():
    kinds = [
        type(module) for _, module in nnx.iter_modules(build(registry.resolve("googlenet_2014")))
    ]
    assert kinds.count(layers.LocalResponseNorm) == 2
    assert layers.BatchNorm not in kinds
    kinds = [type(module) for _, module in nnx.iter_modules(build(registry.resolve("googlenet")))]
    assert layers.LocalResponseNorm not in kinds
    assert kinds.count(layers.BatchNorm) == 59


@pytest.mark.parametrize(("name", "billions"), [("googlenet", 1.498), ("inception_v3", 5.713)])
def test_multiply_adds_are_those_that_torchvision_states(name, billions):
    model, outputs = shapes(name, registry.resolve(name).input_shape[0])
    assert round(multiply_adds(model, outputs) / 1e9, 3) == billions


SIZES = {
    "inception_v3": {  # Table 1 of Szegedy et al. 2015, the stem as released
        "Conv2d_1a_3x3": (149, 149, 32),
        "Conv2d_2a_3x3": (147, 147, 32),
        "Conv2d_2b_3x3": (147, 147, 64),
        "maxpool1": (73, 73, 64),
        "Conv2d_3b_1x1": (73, 73, 80),
        "Conv2d_4a_3x3": (71, 71, 192),
        "maxpool2": (35, 35, 192),
        "Mixed_5d": (35, 35, 288),
        "Mixed_6e": (17, 17, 768),
        "Mixed_7a": (8, 8, 1280),
        "Mixed_7c": (8, 8, 2048),
    },
    "inception_v4": {  # Figures 3 and 9 of Szegedy et al. 2016
        "features.0": (149, 149, 32),
        "features.1": (147, 147, 32),
        "features.2": (147, 147, 64),
        "features.3": (73, 73, 160),
        "features.4": (71, 71, 192),
        "features.5": (35, 35, 384),
        "features.9": (35, 35, 384),
        "features.10": (17, 17, 1024),
        "features.17": (17, 17, 1024),
        "features.18": (8, 8, 1536),
        "features.21": (8, 8, 1536),
    },
    "inception_resnet_v2": {  # as released
        "maxpool_5a": (35, 35, 192),
        "repeat": (35, 35, 320),
        "repeat_1": (17, 17, 1088),
        "block8": (8, 8, 2080),
        "conv2d_7b": (8, 8, 1536),
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_output_sizes(name):
    _, outputs = shapes(name, registry.resolve(name).input_shape[0])
    assert {path: outputs[path] for path in SIZES[name]} == SIZES[name]


@pytest.mark.parametrize("name", ["googlenet", "googlenet_2014", "inception_v3"])
def test_dropout_zero_reaches_the_auxiliary_heads(name):
    def rates(**overrides):
        model = build(registry.resolve(name).with_arguments(**overrides))
        return [m.rate for _, m in nnx.iter_modules(model) if isinstance(m, layers.Dropout)]

    assert max(rates()) == (0.5 if name == "inception_v3" else 0.7)
    assert set(rates(dropout=0.0)) == {0.0}
    if name != "inception_v3":
        assert max(rates(dropout=0.0, dropout_aux=0.3)) == 0.3


HEADS = {
    "googlenet": (64, ("logits", "aux_logits2", "aux_logits1")),
    "googlenet_2014": (224, ("logits", "aux_logits2", "aux_logits1")),
    "inception_v3": (299, ("logits", "aux_logits")),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_speak_in_train_mode_alone(name):
    side, fields = HEADS[name]
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def call(train, **overrides):
        model = build(registry.resolve(name).with_arguments(num_classes=10, **overrides))
        apply, *trees = flax_nets.functional(model)
        output, _ = jax.eval_shape(partial(apply, train=train), *trees, x, rngs=key)
        return output

    output = call(train=True)
    assert output._fields == fields
    assert all(head.shape == (2, 10) for head in output)
    assert call(train=False).shape == (2, 10)
    assert call(train=True, aux_logits=False).shape == (2, 10)


@pytest.mark.parametrize("name", ["googlenet_2014", "inception_v3"])
def test_every_head_equals_the_twins(name):
    """At full size, where these heads fit; with batch statistics kept, of which there are few."""
    spec = registry.resolve(name).with_arguments(num_classes=10)
    reference = twin(spec, dropout=0.0).train()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model = flax_nets.create_model(name, weights=state_dict(reference), dropout=0.0)
    model.deterministic = False
    graph, state = nnx.split(model)
    x = images(spec, 1, HEADS[name][0])
    ours = quick_jit(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.asarray(x))
    with torch.no_grad():
        theirs = reference(torch.tensor(nchw(x)))
    assert ours._fields == theirs._fields == HEADS[name][1]
    for field in ours._fields:
        assert error(getattr(ours, field), getattr(theirs, field)) <= OUTPUT, field


def test_the_batch_normalised_head_equals_torchvisions():
    """In train mode with gradients, on maps of the size that the network gives it."""
    theirs = torchvision.models.inception.InceptionAux(768, 10)
    theirs = libraries.materialise(theirs)
    ours = inception_v3.InceptionAux(768, 10, rngs=None)
    convert.load(ours, state_dict(theirs))
    x = np.random.default_rng(0).normal(size=(16, 17, 17, 768))
    worst = worst_errors(flax_pass(ours, x, train=True), torch_pass(theirs, x, train=True))
    assert worst["outputs"] <= OUTPUT, worst
    assert worst["gradients"] <= GRADIENT, worst
    assert worst["input_gradient"] <= GRADIENT, worst
    assert worst["statistics"] <= OUTPUT, worst


def cut(name):
    """timm's network with one block of each kind, and the arguments of ours."""
    with torch.device("meta"):
        library = timm.create_model(name)
    if name == "inception_v4":
        kept = (0, 1, 2, 3, 4, 5, 6, 10, 11, 18, 19)
        library.features = torch.nn.Sequential(*(library.features[i] for i in kept))
    else:
        for stage in ("repeat", "repeat_1", "repeat_2"):
            setattr(library, stage, getattr(library, stage)[:1])
    return libraries.materialise(library)


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2"])
def test_every_block_equals_timms(name):
    theirs = cut(name)
    model = flax_nets.create_model(name, weights=state_dict(theirs), depths=(1, 1, 1))
    x = images(model.spec, 4, 107)
    worst = worst_errors(flax_pass(model, x, train=True), torch_pass(theirs, x, train=True))
    assert worst["outputs"] <= OUTPUT, worst
    assert worst["gradients"] <= GRADIENT, worst
    assert worst["input_gradient"] <= GRADIENT, worst
    assert worst["statistics"] <= OUTPUT, worst


def test_repeated_blocks_have_weights_of_their_own():
    model = build(registry.resolve("inception_v4").with_arguments(depths=(2, 2, 2)))
    state = nnx.to_flat_state(nnx.state(model))
    assert len({id(variable) for _, variable in state}) == len(state)
    init.fill(model, 0)
    for first, second in (("6", "7"), ("9", "10"), ("12", "13")):
        one, two = (getattr(model.features, i).branch0.conv.kernel[...] for i in (first, second))
        assert not jnp.array_equal(one, two)


@pytest.fixture(scope="module")
def googlenet():
    """A checkpoint with auxiliary heads of 10 classes."""
    return convert.export(flax_nets.create_model("googlenet", num_classes=10))


def without_heads(checkpoint):
    return {k: v for k, v in checkpoint.items() if not k.startswith("aux")}


def test_heads_are_there_where_the_checkpoint_has_them(googlenet):
    for none in ({}, {"aux_logits": None}):
        assert flax_nets.create_model("googlenet", weights=googlenet, **none).aux1 is not None
        plain = flax_nets.create_model("googlenet", weights=without_heads(googlenet), **none)
        assert plain.aux1 is None and plain.aux2 is None
    assert flax_nets.create_model("googlenet", aux_logits=None).aux1 is not None


def test_heads_are_dropped_or_drawn_on_request(googlenet, caplog):
    plain = flax_nets.create_model("googlenet", weights=googlenet, aux_logits=False)
    assert plain.aux1 is None
    assert "dropped" in caplog.text
    assert set(convert.export(plain)) == set(without_heads(googlenet))
    model = flax_nets.create_model("googlenet", weights=without_heads(googlenet), aux_logits=True)
    assert "fresh values" in caplog.text
    ours = convert.export(model)
    assert set(ours) == set(googlenet)
    assert np.array_equal(ours["fc.weight"], googlenet["fc.weight"])
    assert 0 < ours["aux1.fc2.weight"].std() < 0.02


def test_another_number_of_classes_gives_every_head_anew(googlenet):
    model = flax_nets.create_model("googlenet", weights=googlenet, num_classes=7)
    ours = convert.export(model)
    assert {ours[f"{head}.weight"].shape[0] for head in model.output_layers} == {7}
    assert np.array_equal(ours["aux1.fc1.weight"], googlenet["aux1.fc1.weight"])
    headless = flax_nets.create_model("googlenet", weights=googlenet, num_classes=0)
    apply, params, state = flax_nets.functional(headless)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    assert jax.eval_shape(apply, params, state, x)[0].shape == (1, 1024)


@pytest.mark.parametrize("name", ["timm/inception_v3", "inception_v3"])
def test_each_library_has_its_own_defaults(name):
    model = build(registry.resolve(name))
    timms = name.startswith("timm")
    assert (model.AuxLogits is None) == timms
    assert model.dropout.rate == (0.0 if timms else 0.5)


def test_transform_input_brings_torchvisions_images_to_googles_range():
    pixels = np.random.default_rng(0).uniform(size=(2, 4, 4, 3))
    x = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(layers.transform_input(jnp.asarray(x)), 2 * pixels - 1, atol=1e-14)
    assert layers.transform_input(jnp.zeros((1, 1, 1, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_transform_input_wants_three_channels(name):
    with pytest.raises(ValueError, match="in_channels=1"):
        flax_nets.create_model(name, transform_input=True, in_channels=1)


def test_the_head_of_inception_v3_says_what_images_it_takes():
    head = build(registry.resolve("inception_v3")).AuxLogits
    with pytest.raises(ValueError, match=r"299 pixels and above, or aux_logits=False"):
        head(jnp.zeros((1, 12, 12, 768), jnp.float32))


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2"])
@pytest.mark.parametrize("depths", [(1, 2), (1, -1, 1)])
def test_depths_are_three_numbers(name, depths):
    with pytest.raises(ValueError, match="three numbers"):
        flax_nets.create_model(name, depths=depths)
