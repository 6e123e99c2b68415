"""ResNet and ResNeXt: the tables of their papers, shortcuts, and paths as groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_nets
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.models.resnet import BasicBlock, Bottleneck


def of(name, **arguments):
    return flax_nets.summary(build(registry.resolve(name).with_arguments(**arguments)))


def sizes(name):
    """Stage -> (side, channels)."""
    return {row.path: row.output_shape[2:] for row in of(name).rows if len(row.output_shape) == 4}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("resnet18", 1.8),
        ("resnet34", 3.6),
        ("resnet50", 3.8),
        ("resnet101", 7.6),
        ("resnet152", 11.3),
    ],
)
def test_multiply_adds_of_table_1(name, billions):
    """He et al. 2015. The paper's bottleneck has its stride on the first 1x1, torchvision's on the
    3x3, which makes a ResNet-50 one of 4.1 billion."""
    arguments = {} if name in ("resnet18", "resnet34") else dict(block="stride_first")
    assert of(name, **arguments).multiply_adds / 1e9 == pytest.approx(billions, abs=0.07)


@pytest.mark.parametrize(("name", "widening"), [("resnet34", 1), ("resnet50", 4)])
def test_output_sizes_of_table_1(name, widening):
    found = sizes(name)
    assert found["conv1"] == (112, 64)
    stages = {f"layer{i + 1}": (56 // 2**i, widening * 64 * 2**i) for i in range(4)}
    assert {stage: found[stage] for stage in stages} == stages


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20_cifar", 0.27),
        ("resnet32_cifar", 0.46),
        ("resnet44_cifar", 0.66),
        ("resnet56_cifar", 0.85),
        ("resnet110_cifar", 1.7),
    ],
)
def test_parameters_of_table_6(name, millions):
    digits = 1 if name == "resnet110_cifar" else 2
    assert round(of(name).parameters / 1e6, digits) == millions


def test_parameters_of_the_wide_resnet():
    """Zagoruyko & Komodakis 2016, Table 8: WRN-50-2-bottleneck."""
    assert round(of("wide_resnet50_2").parameters / 1e6, 1) == 68.9


@pytest.mark.parametrize("name", [n for n in flax_nets.list_models("resnet*_cifar")])
def test_cifar_networks_have_6n_plus_2_layers(name):
    """Section 4.2: 32x32 in 1 + 2n layers, 16x16 and 8x8 in 2n each."""
    modules = [m for _, m in nnx.iter_modules(build(registry.resolve(name)))]
    depth = int(name.removeprefix("resnet").removesuffix("_cifar"))
    assert sum(isinstance(m, layers.Conv | layers.Linear) for m in modules) == depth
    found = sizes(name)
    stages = {"conv1": (32, 16), "layer1": (32, 16), "layer2": (16, 32), "layer3": (8, 64)}
    assert {stage: found[stage] for stage in stages} == stages


def test_a_shortcut_without_parameters_takes_every_second_pixel_and_adds_zeros():
    skip = build(registry.resolve("resnet20_cifar")).layer2[0].downsample
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 16))
    wanted = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (8, 8)))
    np.testing.assert_array_equal(skip(jnp.asarray(x)), wanted)
    assert not jax.tree.leaves(nnx.state(skip))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_add_the_residual_to_their_input(name):
    """A last scale of zero, an option for the start, leaves the input and the ReLU."""
    model = flax_nets.create_model(name, depths=(2, 1), widths=(8, 8), zero_init_last=True)
    block = model.layer1[1]
    assert block.downsample is None
    shape = (2, 5, 5, 8 * block.expansion)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    np.testing.assert_array_equal(block(x), jnp.maximum(x, 0))
    plain = flax_nets.create_model(name, depths=(2, 1), widths=(8, 8))
    assert np.all(np.asarray(plain.layer1[1].last_norm.scale[...]) == 1)


@pytest.mark.parametrize(("block", "strided"), [("bottleneck", "conv2"), ("stride_first", "conv1")])
def test_which_convolution_carries_the_stride(block, strided):
    first = build(registry.resolve("resnet50").with_arguments(block=block)).layer2[0]
    assert isinstance(first, Bottleneck) and not isinstance(first, BasicBlock)
    assert [n for n in ("conv1", "conv2") if getattr(first, n).stride == (2, 2)] == [strided]


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [
        ("resnet50", 25.5, 4.1),
        ("resnext50_32x4d", 25.0, 4.2),
    ],
)
def test_table_1_of_resnext(name, millions, billions):
    """Xie et al. 2016: as large as a ResNet-50, and as costly."""
    found = of(name)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert found.multiply_adds / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.parametrize("cardinality, width", [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)])
def test_cardinality_and_width_of_table_2_trade_at_equal_size(cardinality, width):
    """About 70 thousand weights in a block of the first stage."""
    block = Bottleneck(256, 64, groups=cardinality, base_width=width, rngs=None)
    kernels = sum(m.kernel.size for m in (block.conv1, block.conv2, block.conv3))
    assert abs(kernels / 70_000 - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "millions"), [("resnext29_8x64d_cifar", 34.4), ("resnext29_16x64d_cifar", 68.1)]
)
def test_parameters_of_table_7_of_resnext(name, millions):
    assert of(name).parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_grouped_convolution_is_a_sum_of_paths():
    """Figure 3: (a), each path a bottleneck of its own, is (c), one grouped convolution."""
    paths, width, channels = 4, 2, 16
    block = Bottleneck(channels, 4, groups=paths, base_width=32, rngs=nnx.Rngs(0))
    assert block.conv2.groups == paths and block.conv2.out_channels == paths * width
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, channels)), jnp.float32)
    first, second, third = (c.kernel[...] for c in (block.conv1, block.conv2, block.conv3))

    def conv(x, kernel, padding):
        numbers = ("NHWC", "HWIO", "NHWC")
        pads = ((padding, padding),) * 2
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=numbers)

    total = 0.0
    for path in range(paths):
        own = slice(path * width, (path + 1) * width)
        y = jax.nn.relu(conv(x, first[..., own], 0))
        y = jax.nn.relu(conv(y, second[..., own], 1))
        total += conv(y, third[:, :, own], 0)
    y = jax.nn.relu(block.conv1(x))
    y = block.conv3(jax.nn.relu(block.conv2(y)))
    np.testing.assert_allclose(y, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(groups=32, base_width=4), 'groups=32, base_width=4: take block="bottleneck"'),
        (dict(block="wide"), "basic, bottleneck, stride_first; got 'wide'"),
        (dict(stem="mnist"), "'mnist'"),
        (dict(shortcut="C"), "'C'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        flax_nets.create_model("resnet18", **arguments)
