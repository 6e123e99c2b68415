"""What the papers of the mobile networks brought: MobileNet v1 to v3, ShuffleNet v1 and v2."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
import flax_nets
from benchmarks import libraries
from benchmarks.compare import OUTPUT, error, quick_jit
from convert import rules
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.inspect.features import modules
from flax_nets.layers.mobile import make_divisible
from flax_nets.models import mobilenet_v3, shufflenet
from torch_ref import layers as torch_layers


@functools.cache
def layer_costs(name, side=224):
    """Path -> (layer, multiply-adds, parameters) of each convolution and dense layer."""
    model = flax_nets.create_model(name)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    outputs = jax.eval_shape(lambda x: flax_nets.features(model, x, ["*"]), x)
    costs = {}
    for path, module in modules(model).items():
        if isinstance(module, layers.Conv | layers.Linear):
            positions = math.prod(outputs[path].shape[1:-1])
            costs[path] = (module, positions * module.kernel.size, module.kernel.size)
    return costs


def sizes(name, paths, side=224):
    """(side, channels) of the outputs of the named modules."""
    model = flax_nets.create_model(name)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    found = jax.eval_shape(lambda x: flax_nets.features(model, x, paths), x)
    return [found[path].shape[2:] for path in paths]


@pytest.mark.parametrize(
    ("name", "side", "millions"),
    [
        # MobileNet, Table 6: the width multiplier; Table 7: the resolution multiplier
        ("mobilenetv1_100", 224, 569),
        ("mobilenetv1_075", 224, 325),
        ("mobilenetv1_050", 224, 149),
        ("mobilenetv1_025", 224, 41),
        ("mobilenetv1_100", 192, 418),
        ("mobilenetv1_100", 160, 290),
        ("mobilenetv1_100", 128, 186),
        # MobileNet-v2, Table 4, and the table beside its authors' checkpoints
        ("mobilenet_v2", 224, 300),
        ("mobilenetv2_140", 224, 582),
        ("mobilenetv2_075", 224, 209),
        ("mobilenetv2_050", 224, 97),
        ("mobilenetv2_035", 224, 59),
        # MobileNet-v3, Table 3, and for the minimal form the authors' table
        ("mobilenet_v3_large", 224, 219),
        ("mobilenetv3_large_075", 224, 155),
        ("mobilenet_v3_small", 224, 56),
        ("mobilenetv3_small_075", 224, 44),
        ("tf_mobilenetv3_large_minimal_100", 224, 209),
        # ShuffleNet, Table 1
        ("shufflenet_v1_x1_0_g1", 224, 143),
        ("shufflenet_v1_x1_0_g2", 224, 140),
        ("shufflenet_v1_x1_0_g3", 224, 137),
        ("shufflenet_v1_x1_0_g4", 224, 133),
        ("shufflenet_v1_x1_0_g8", 224, 137),
        # ShuffleNet, Tables 2 and 5: its width
        ("shufflenet_v1_x0_5_g3", 224, 38),
        ("shufflenet_v1_x1_5_g3", 224, 292),
        ("shufflenet_v1_x2_0_g3", 224, 524),
        # ShuffleNet-v2, Table 8
        ("shufflenet_v2_x0_5", 224, 41),
        ("shufflenet_v2_x1_0", 224, 146),
        ("shufflenet_v2_x1_5", 224, 299),
        ("shufflenet_v2_x2_0", 224, 591),
    ],
)
def test_multiply_adds_of_the_papers(name, side, millions):
    """Of convolutions and dense layers; papers differ in what little else they count."""
    total = sum(cost for _, cost, _ in layer_costs(name, side).values())
    assert abs(total / (millions * 1e6) - 1) < 0.015


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mobilenetv1_100", 4.2),
        ("mobilenetv1_075", 2.6),
        ("mobilenetv1_050", 1.3),
        ("mobilenetv1_025", 0.5),
        ("mobilenetv3_large_075", 4.0),
        ("mobilenet_v3_small", 2.5),
        # the authors' tables
        ("shufflenet_v1_x0_5_g3", 0.7),
        ("shufflenet_v1_x1_0_g3", 1.9),
        ("shufflenet_v1_x1_5_g3", 3.4),
        ("shufflenet_v1_x2_0_g3", 5.4),
        ("shufflenet_v1_x0_5_g8", 1.0),
        ("shufflenet_v1_x1_0_g8", 2.4),
        ("shufflenet_v1_x1_5_g8", 4.3),
        ("shufflenet_v1_x2_0_g8", 6.5),
    ],
)
def test_parameters_of_the_papers(name, millions):
    trained = sum(
        math.prod(e.torch_shape)
        for e in rules.entries(build(registry.resolve(name)))
        if isinstance(e.variable, nnx.Param)
    )
    assert round(trained / 1e6, 1) == millions


def test_mobilenet_spends_on_1x1_convolutions():
    """MobileNet, Table 2: shares of multiply-adds and of parameters."""
    kinds = {}
    for layer, cost, size in layer_costs("mobilenetv1_100").values():
        kind = "dense"
        if isinstance(layer, layers.Conv):
            kind = f"{layer.kernel_size[0]}x{layer.kernel_size[0]}" + "dw" * (layer.groups > 1)
        before = kinds.get(kind, (0, 0))
        kinds[kind] = before[0] + cost, before[1] + size
    totals = [sum(column) for column in zip(*kinds.values(), strict=True)]
    paper = {"1x1": (94.86, 74.59), "3x3dw": (3.06, 1.06), "3x3": (1.19, 0.02)}
    paper |= {"dense": (0.18, 24.33)}
    assert set(kinds) == set(paper)
    for kind, counts in kinds.items():
        for count, total, share in zip(counts, totals, paper[kind], strict=True):
            assert abs(100 * count / total - share) < 1, kind


def test_output_sizes_of_mobilenet():
    """Table 1."""
    found = sizes("mobilenetv1_100", ["bn1", *(f"blocks.{i}" for i in range(5))])
    assert found == [(112, 32), (112, 64), (56, 128), (28, 256), (14, 512), (7, 1024)]


def test_output_sizes_of_mobilenet_v2():
    """Table 2: the last block of each row."""
    found = sizes("mobilenet_v2", [f"features.{i}" for i in (0, 1, 3, 6, 10, 13, 16, 17, 18)])
    stages = [(112, 32), (112, 16), (56, 24), (28, 32), (14, 64), (14, 96), (7, 160), (7, 320)]
    assert found == [*stages, (7, 1280)]


def test_output_sizes_of_mobilenet_v3():
    """Tables 1 and 2."""
    found = sizes("mobilenet_v3_large", [f"features.{i}" for i in (0, 1, 3, 6, 10, 12, 15, 16)])
    stages = [(112, 16), (112, 16), (56, 24), (28, 40), (14, 80), (14, 112), (7, 160)]
    assert found == [*stages, (7, 960)]
    found = sizes("mobilenet_v3_small", [f"features.{i}" for i in (0, 1, 3, 6, 8, 11, 12)])
    assert found == [(112, 16), (56, 16), (28, 24), (14, 40), (14, 48), (7, 96), (7, 576)]


def test_output_sizes_of_shufflenet():
    """Table 1."""
    for groups, width in {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}.items():
        paths = ["first_conv", "maxpool", "features.3", "features.11", "features.15"]
        found = sizes(f"shufflenet_v1_x1_0_g{groups}", paths)
        stages = [(28, width), (14, 2 * width), (7, 4 * width)]
        assert found == [(112, 24), (56, 24), *stages]


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("shufflenet_v2_x0_5", (48, 96, 192, 1024)),
        ("shufflenet_v2_x1_0", (116, 232, 464, 1024)),
        ("shufflenet_v2_x1_5", (176, 352, 704, 1024)),
        ("shufflenet_v2_x2_0", (244, 488, 976, 2048)),
    ],
)
def test_output_sizes_of_shufflenet_v2(name, widths):
    """Table 5."""
    found = sizes(name, ["conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"])
    assert found == [(112, 24), (56, 24), *zip((28, 14, 7, 7), widths, strict=True)]


def test_bottlenecks_of_mobilenet_v2_are_linear_and_skipped():
    """Section 3: nothing after the projection, and a skip wherever shapes allow one."""
    blocks = list(build(registry.resolve("mobilenet_v2")).features)[1:-1]
    assert all(isinstance(block.conv[-1], layers.BatchNorm) for block in blocks)
    assert sum(block.has_skip for block in blocks) == 10
    depthwise = [block.conv[-3][0] for block in blocks]
    assert all(conv.groups == conv.in_channels == conv.out_channels for conv in depthwise)


def test_every_repeated_block_of_mobilenet_v2_adds_its_input():
    """With all scales of the last batch norm at zero the block is the identity."""
    model = flax_nets.create_model("mobilenetv2_035")
    block = model.features[3]
    block.conv[-1].scale.set_value(jnp.zeros_like(block.conv[-1].scale.get_value()))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 8)), jnp.float32)
    np.testing.assert_array_equal(block(x), x)


def test_mobilenet_v3_is_relu_early_and_hard_swish_late():
    for name, first_late in (("mobilenet_v3_large", 7), ("mobilenet_v3_small", 4)):
        features = list(build(registry.resolve(name)).features)
        assert features[0][2] is layers.hard_swish  # the stem already
        late = [block.block[0][2] is layers.hard_swish for block in features[1:-1]]
        assert late == [i >= first_late for i in range(1, len(late) + 1)]


def test_squeeze_of_mobilenet_v3_is_a_quarter_of_the_expansion():
    """Section 5.3."""
    blocks = list(build(registry.resolve("mobilenet_v3_large")).features)[1:-1]
    gates = [m for b in blocks for m in b.block if isinstance(m, mobilenet_v3.SqueezeExcitation)]
    assert [gate.fc1.in_channels for gate in gates] == [72, 120, 120, 480, 672, 672, 960, 960]
    assert [gate.fc1.out_channels for gate in gates] == [24, 32, 32, 120, 168, 168, 240, 240]


def test_minimal_mobilenet_v3_is_plain():
    model = build(registry.resolve("tf_mobilenetv3_small_minimal_100"))
    for _, module in nnx.iter_modules(model):
        assert not isinstance(module, mobilenet_v3.SqueezeExcitation)
        if isinstance(module, layers.Conv):
            assert module.kernel_size in ((1, 1), (3, 3))
            assert module.padding == "same"
        if isinstance(module, layers.Sequential):
            assert layers.hard_swish not in list(module)


@given(
    st.integers(5, 12),
    st.integers(5, 12),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 2),
)
@settings(max_examples=12, deadline=None)
def test_same_padding_is_tensorflows(height, width, stride, kernel, dilation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, height, width, 2))
    ours = layers.Conv(
        2, 2, kernel, stride, "same", dilation, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )
    twin = torch_layers.Conv2dSame(2, 2, kernel, stride, 0, dilation, 2).double()
    twin.load_state_dict({k: torch.tensor(v) for k, v in convert.export(ours).items()})
    wanted = jax.lax.conv_general_dilated(
        x,
        ours.kernel[...],
        (stride, stride),
        "SAME",  # XLA's is TensorFlow's
        rhs_dilation=(dilation, dilation),
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + ours.bias[...].reshape(1, 1, 1, 2)
    theirs = twin(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(jnp.asarray(x)), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(theirs, wanted, rtol=0, atol=1e-12)


@given(st.floats(1, 3000), st.sampled_from([4, 8]))
def test_widths_are_divisible_and_lose_at_most_a_tenth(channels, divisor):
    rounded = make_divisible(channels, divisor)
    assert rounded == torch_layers.make_divisible(channels, divisor)
    assert rounded % divisor == 0
    assert rounded >= 0.9 * channels
    assert rounded <= max(channels + divisor, divisor)


def test_channel_shuffle_deals_channels_round():
    x = jnp.arange(12).reshape(1, 1, 1, 12)
    shuffled = shufflenet.channel_shuffle(x, 3)
    assert shuffled.ravel().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    np.testing.assert_array_equal(shufflenet.channel_shuffle(shuffled, 4), x)


@pytest.mark.parametrize("shuffle", [True, False])
def test_without_the_shuffle_groups_never_meet(shuffle, monkeypatch):
    """Figure 1: which groups of the input reach which groups of the output."""
    if not shuffle:
        monkeypatch.setattr(shufflenet, "channel_shuffle", lambda x, groups: x)
    groups, channels = 3, 36
    block = shufflenet.ShuffleV1Block(channels, channels, 1, groups, groups, rngs=nnx.Rngs(0))
    block.set_attributes(use_running_average=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, channels)), jnp.float32)
    slope = jax.jacobian(lambda x: block(x.reshape(1, 1, 1, channels)).ravel())
    slopes = jax.jit(jax.vmap(slope))(x)
    jacobian = (np.asarray(slopes) != 0).any(0)  # one image alone may meet ReLUs that are off
    reached = jacobian.reshape(groups, -1, groups, channels // groups).any((1, 3))
    assert (reached == (np.ones((3, 3)) if shuffle else np.eye(3))).all()


def test_half_of_the_channels_pass_a_block_of_shufflenet_v2():
    """Figure 3c: the left half is found again in every second channel."""
    block = shufflenet.InvertedResidual(8, 8, 1, rngs=nnx.Rngs(0))
    block.set_attributes(use_running_average=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 8)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: block(x))(x)[..., ::2], x[..., :4])


@pytest.mark.parametrize(
    ("name", "library", "eps", "momentum"),
    [
        ("mobilenet_v3_small", "timm/mobilenetv3_small_100", 1e-5, 0.1),
        ("mobilenetv3_small_100", "torchvision/mobilenet_v3_small", 1e-3, 0.01),
    ],
)
def test_a_checkpoint_of_either_library_loads_under_either_name(name, library, eps, momentum):
    """What its keys do not show comes with it, unless the caller says otherwise."""
    reference = libraries.materialise(libraries.build(library)).eval()
    tensors = libraries.numpy_state(reference)
    model = flax_nets.create_model(name, weights=tensors)
    norm = model.features[1].block[0][1]
    assert (norm.eps, norm.momentum) == (eps, momentum)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    with torch.no_grad():
        wanted = reference(torch.tensor(x.transpose(0, 3, 1, 2)))
    apply, params, state = flax_nets.functional(model)
    assert error(quick_jit(apply)(params, state, x)[0], wanted) <= OUTPUT
    norm = flax_nets.create_model(name, weights=tensors, eps=0.5).features[1].block[0][1]
    assert (norm.eps, norm.momentum) == (0.5, momentum)


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        (
            "mobilenetv2_035",
            dict(depths=(1, 3, 1, 2, 1, 1, 1)),
            ("blocks.1.2.conv_pwl.weight", "blocks.3.1.bn3.bias", "bn2.weight", "classifier.bias"),
        ),
        (
            "mobilenetv3_small_050",
            dict(rows=mobilenet_v3.SMALL[:3] + mobilenet_v3.LARGE[3:6]),
            ("blocks.0.0.se.conv_expand.bias", "blocks.2.2.conv_pwl.weight", "conv_head.weight"),
        ),
    ],
)
def test_timms_names_follow_the_depths(name, arguments, names):
    model = flax_nets.create_model(name, **arguments)
    ours, theirs = convert.export(model), convert.export(model, "timm")
    assert len(theirs) == len(ours)
    assert set(names) <= set(theirs)
    assert not any(key.startswith("features") for key in theirs)
    back = convert.load(flax_nets.create_model(name, rngs=1, **arguments), theirs)
    for key, value in convert.export(back).items():
        np.testing.assert_array_equal(value, ours[key])


def test_a_tree_of_any_variant_gets_timms_names():
    for name in ("mobilenet_v2", "mobilenetv2_110d", "mobilenet_v3_large", "mobilenetv3_rw"):
        model = flax_nets.create_model(name)
        tree = convert.export(flax_nets.functional(model)[1], "timm")
        assert set(tree) < set(convert.export(model, "timm"))


@pytest.mark.parametrize(
    ("name", "arguments", "shown"),
    [
        ("mobilenetv1_100", dict(width=0.0), "0.0"),
        ("mobilenetv1_100", dict(depths=(1, 1)), r"\(1, 1\)"),
        ("mobilenet_v2", dict(depths=(1, 1)), r"\(1, 1\)"),
        ("mobilenet_v2", dict(initialise="keras"), "keras"),
        ("mobilenet_v3_small", dict(rows=((3, 16, 16, False, "SW", 1),)), "SW"),
        ("shufflenet_v1_x1_0_g3", dict(groups=7), "groups=7"),
        ("shufflenet_v2_x1_0", dict(widths=(24, 25, 50, 100, 64)), "25"),
    ],
)
def test_bad_arguments_are_shown(name, arguments, shown):
    with pytest.raises(ValueError, match=shown):
        flax_nets.create_model(name, **arguments)
