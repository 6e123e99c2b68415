"""What VGG's paper brought: Simonyan & Zisserman 2014; and timm's form of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
from timm.models.vgg import ConvMlp

import convert
import flax_nets
from benchmarks.compare import OUTPUT, error, nchw, quick_jit, randomise, state_dict, twin
from convert.rules import entries
from flax_nets import registry
from flax_nets.create import build
from flax_nets.models import vgg
from torch_ref import vgg as torch_vgg

SMALL = dict(depths=(1, 1, 1, 1, 1), widths=(4, 4, 6, 6, 8), hidden=16, num_classes=5)


def lively(model):
    """Kernels that keep the scale of activations: the image decides which ReLUs are open."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    """The twin, and the Flax network with its numbers."""
    reference = lively(twin(registry.resolve("vgg11"), dropout=0.0, **SMALL))
    weights = state_dict(reference)
    return reference, flax_nets.create_model("vgg11", weights=weights, dropout=0.0, **SMALL)


def timm_vgg(batch_norm=False):
    """timm's network at a small size, in float64, with randomised numbers."""
    config = [c for width in SMALL["widths"] for c in (width, "M")]
    norm = torch.nn.BatchNorm2d if batch_norm else None
    with torch.device("meta"):
        model = timm.models.vgg.VGG(config, num_classes=5, norm_layer=norm)
    model.pre_logits = ConvMlp(8, 16, 7, drop_rate=0.0)
    model.head = timm.layers.ClassifierHead(16, 5)
    model.features = model.features.to_empty(device="cpu")
    return lively(randomise(model.double()))


def images(height, width, batch=2):
    return np.random.default_rng(0).normal(size=(batch, height, width, 3))


def torch_logits(model, x):
    with torch.no_grad():
        return model(torch.tensor(nchw(x)))


def run(model, x):
    return quick_jit(lambda x: model(x))(jnp.asarray(x))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vgg11", 133), ("vgg13", 133), ("vgg16_c", 134), ("vgg16", 138), ("vgg19", 144)],
)
def test_parameters_of_table_2(name, millions):
    found = entries(build(registry.resolve(name)))
    assert round(sum(np.prod(e.torch_shape) for e in found) / 1e6) == millions


def test_configuration_c_has_three_convolutions_of_1x1():
    kernels = [
        e.torch_shape
        for e in entries(build(registry.resolve("vgg16_c")))
        if e.key.endswith("weight")
    ]
    pointwise = [i for i, shape in enumerate(kernels) if shape[2:] == (1, 1)]
    assert pointwise == [6, 9, 12]
    assert [kernels[i][0] for i in pointwise] == [256, 512, 512]


@pytest.mark.parametrize("side", [64, 224])
def test_both_heads_are_one_function_up_to_224_pixels(pair, side):
    _, dense = pair
    conv = flax_nets.create_model(
        "vgg11", weights=convert.export(dense), head="conv", dropout=0.0, **SMALL
    )
    x = images(side, side)
    assert error(run(conv, x), run(dense, x)) <= OUTPUT


def test_the_sliding_head_is_the_mean_of_the_dense_head_over_windows(pair):
    _, model = pair
    x = jnp.asarray(images(288, 256))  # a map of 9x8: 3x2 windows
    maps = model.features(x)
    assert maps.shape[1:3] == (9, 8)
    windows = [maps[:, i : i + 7, j : j + 7] for i, j in itertools.product(range(3), range(2))]
    scores = [model.classifier(flax_nets.layers.flatten(window)) for window in windows]
    assert error(model.slide(maps), sum(scores) / 6) <= OUTPUT
    model.head = "conv"
    model.avgpool = vgg.AtLeast(7)
    assert error(model(x), sum(scores) / 6) <= OUTPUT


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="dense, conv; got 'convolution'"):
        flax_nets.create_model("vgg11", head="convolution")


@pytest.mark.parametrize("batch_norm", [False, True], ids=["vgg", "bn"])
@pytest.mark.parametrize("shape", [(48, 64), (288, 256), (192, 256)], ids=str)
def test_a_checkpoint_of_timm_brings_its_sliding_head(batch_norm, shape):
    reference = timm_vgg(batch_norm)
    model = flax_nets.create_model(
        "vgg11", weights=state_dict(reference), batch_norm=batch_norm, **SMALL
    )
    assert model.spec.arguments["head"] == "conv"
    x = images(*shape)
    assert error(run(model, x), torch_logits(reference, x)) <= OUTPUT


def test_gradients_reach_timm_through_the_tensor_rules():
    reference = timm_vgg()
    model = flax_nets.create_model("vgg11", weights=state_dict(reference), dropout=0.0, **SMALL)
    x = images(256, 256)
    apply, params, state = flax_nets.functional(model)
    loss = quick_jit(jax.grad(lambda p: jnp.sum(apply(p, state, jnp.asarray(x))[0] ** 2)))
    ours = convert.export(loss(params), dialect="timm")
    (reference(torch.tensor(nchw(x))) ** 2).sum().backward()
    theirs = {k: p.grad for k, p in reference.named_parameters()}
    assert set(ours) == set(theirs)
    assert ours["pre_logits.fc1.weight"].shape == (16, 8, 7, 7)
    assert max(error(ours[k], theirs[k]) for k in theirs) <= 1e-9


def test_timm_and_back_is_bit_identical():
    wanted = state_dict(timm_vgg(batch_norm=True))
    model = flax_nets.create_model("vgg11", weights=wanted, batch_norm=True, **SMALL)
    back = convert.export(model, dialect="timm")
    assert list(back) == list(wanted)
    for key, value in wanted.items():
        assert (back[key].shape, back[key].tobytes()) == (value.shape, value.tobytes()), key


def test_the_caller_s_head_wins_over_the_dialect():
    reference = timm_vgg()
    model = flax_nets.create_model("vgg11", weights=state_dict(reference), head="dense", **SMALL)
    assert model.head == "dense"
    x = images(256, 256)
    assert error(run(model, x), torch_logits(reference, x)) > 1e-3


def test_what_the_dialect_implies_is_said(caplog, pair):
    weights = state_dict(timm_vgg())
    flax_nets.create_model("vgg11", weights=weights, **SMALL)
    assert "head='conv'" in caplog.text
    caplog.clear()
    _, dense = pair
    convert.load(flax_nets.create_model("vgg11", param_dtype=jnp.float64, **SMALL), weights)
    assert "head='conv', not this" in caplog.text
    caplog.clear()
    flax_nets.create_model("vgg11", weights=convert.export(dense), **SMALL)
    assert "head" not in caplog.text


def test_the_same_name_carries_its_library_s_defaults():
    ours, timm_s = registry.resolve("vgg16"), registry.resolve("timm/vgg16")
    assert registry.resolve("torchvision/vgg16") == ours
    assert "head" not in ours.arguments
    assert timm_s.arguments == ours.arguments | dict(head="conv", dropout=0.0)


def test_a_kernel_of_another_size_is_reported_not_reshaped():
    weights = state_dict(timm_vgg())
    weights["pre_logits.fc1.weight"] = weights["pre_logits.fc1.weight"].reshape(16, 2, 14, 14)
    with pytest.raises(ValueError, match=r"classifier\.0\.weight: .*\(16, 2, 14, 14\)"):
        flax_nets.create_model("vgg11", weights=weights, **SMALL)


@pytest.mark.parametrize("shape", [(70, 90), (300, 260)], ids=["enlarged", "reduced"])
def test_dense_evaluation_equals_the_twin(pair, shape):
    reference, model = pair
    x, sizes = images(*shape, batch=1), (224, 256)
    evaluate = quick_jit(lambda x: vgg.dense_evaluation(model, x, sizes))
    ours = evaluate(jnp.asarray(x))
    with torch.no_grad():
        theirs = torch_vgg.dense_evaluation(reference, torch.tensor(nchw(x)), sizes)
    assert error(ours, theirs) <= OUTPUT
    np.testing.assert_allclose(ours.sum(1), 1)
    assert error(evaluate(jnp.asarray(x[:, :, ::-1])), ours) <= OUTPUT


def test_multi_crop_evaluation_equals_the_twin(pair):
    reference, model = pair
    x, arguments = images(60, 80), dict(sizes=(48, 64), crop=40, grid=2)
    ours = quick_jit(lambda x: vgg.multi_crop_evaluation(model, x, **arguments))(jnp.asarray(x))
    with torch.no_grad():
        theirs = torch_vgg.multi_crop_evaluation(reference, torch.tensor(nchw(x)), **arguments)
    assert error(ours, theirs) <= OUTPUT


def test_crops_larger_than_a_scale_are_refused(pair):
    with pytest.raises(ValueError, match="side of 256"):
        vgg.multi_crop_evaluation(pair[1], jnp.zeros((1, 300, 300, 3)), crop=280)
    with pytest.raises(ValueError, match="side of 200"):
        vgg.scale_jitter(jnp.zeros((1, 300, 300, 3)), jax.random.key(0), scales=(200, 300))


def test_scale_jitter_at_the_images_own_size_changes_nothing():
    x = jnp.asarray(images(32, 32))
    found = vgg.scale_jitter(x, jax.random.key(0), size=32, scales=(32, 32))
    np.testing.assert_allclose(found, x, atol=1e-12)


def test_scale_jitter_draws_scale_and_place():
    """On a ramp the step between pixels tells the scale, the first value tells the place."""
    side, size, scales = 64, 16, (32, 128)
    ramp = np.broadcast_to(np.arange(side, dtype=float)[None, :, None, None], (48, side, side, 3))
    found = np.asarray(vgg.scale_jitter(jnp.asarray(ramp), jax.random.key(0), size, scales))
    assert found.shape == (48, size, size, 3)
    steps = found[:, 8, 8, 0] - found[:, 7, 8, 0]
    factors = side / scales[1], side / scales[0]
    assert factors[0] - 1e-9 <= steps.min() < 0.8 and 1.3 < steps.max() <= factors[1] + 1e-9
    assert len(np.unique(found[:, 8, 8, 0].round(6))) > 40
