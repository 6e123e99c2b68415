"""Shapes, parameters and multiply-adds of networks, counted without computing anything."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import flax_nets
from flax_nets import cli, registry
from flax_nets.create import build


def of(name, input_shape=None, **arguments):
    return flax_nets.summary(build(registry.resolve(name).with_arguments(**arguments)), input_shape)


def convolution(side, kernel, in_channels, channels, groups=1):
    return side**2 * kernel**2 * (in_channels // groups) * channels


def resnet50(image=224):
    """Multiply-adds by Table 1 of the paper (stride on the 3x3)."""
    side = image // 4
    total = convolution(image // 2, 7, 3, 64)
    in_channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            if block == 0:
                before, side = side, side // (2 if stage else 1)
                total += convolution(side, 1, in_channels, 4 * width)  # the shortcut
            else:
                before = side
            total += convolution(before, 1, in_channels, width)
            total += convolution(side, 3, width, width)
            total += convolution(side, 1, width, 4 * width)
            in_channels = 4 * width
    return total + in_channels * 1000


def test_resnet50():
    found = of("resnet50")
    assert found.multiply_adds == resnet50() == 4_089_184_256
    assert found.parameters == 25_557_032
    assert found.output_shape == (1, 1000)
    rows = {row.path: row for row in found.rows}
    assert rows["layer4"].output_shape == (1, 7, 7, 2048)
    assert rows["conv1"].multiply_adds == convolution(112, 7, 3, 64)
    assert rows["layer1.0.conv2"].multiply_adds == convolution(56, 3, 64, 64)
    assert rows["layer2.0.downsample"].multiply_adds == convolution(28, 1, 256, 512)
    top = [row for row in found.rows if "." not in row.path]
    assert sum(row.multiply_adds for row in top) == found.multiply_adds
    assert sum(row.parameters for row in top) == found.parameters
    assert top[0].path == "conv1" and top[-1].path == "fc"


def test_alexnet():
    convolutions = ((55, 11, 3, 64), (27, 5, 64, 192), (13, 3, 192, 384), (13, 3, 384, 256))
    expected = sum(convolution(*c) for c in (*convolutions, (13, 3, 256, 256)))
    expected += 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    found = of("alexnet")
    assert found.multiply_adds == expected == 714_188_480
    assert found.parameters == 61_100_840


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # MobileNet's Table 8, -v2's Table 4, ShuffleNet's Table 1
        ("mobilenetv1_100", 569),
        ("mobilenet_v2", 300),
        ("shufflenet_v1_x1_0_g3", 137),
    ],
)
def test_papers(name, millions):
    assert of(name).multiply_adds / 1e6 == pytest.approx(millions, abs=1)


def test_attention_is_counted():
    """Two products of queries, keys and values in each block, beside the dense layers."""
    tokens, width, depth = 5, 192, 2
    found = of("vit_tiny_patch16_224", image_size=32, depth=depth, num_classes=10)
    block = tokens * width * width * (3 + 1 + 8) + 2 * tokens * tokens * width
    patches = 4 * 16 * 16 * 3 * width
    assert found.multiply_adds == patches + depth * block + width * 10
    rows = {row.path: row.multiply_adds for row in found.rows}
    attention = rows["encoder.layers.encoder_layer_0.self_attention"]
    assert attention == tokens * width * width * 4 + 2 * tokens * tokens * width


def test_auxiliary_heads_take_no_part():
    found = of("googlenet")
    heads = [row for row in found.rows if row.path in ("aux1", "aux2")]
    assert [(row.output_shape, row.multiply_adds) for row in heads] == [(None, 0)] * 2
    assert all(row.parameters > 0 for row in heads)
    without = of("googlenet", aux_logits=False)
    assert without.multiply_adds == found.multiply_adds
    assert found.parameters - without.parameters == sum(row.parameters for row in heads)


def test_a_model_with_values_stays_as_it_is():
    model = flax_nets.create_model("lenet5", param_dtype=jnp.bfloat16)
    model.train()
    x = np.ones((1, 32, 32, 1), jnp.bfloat16)
    before = np.asarray(model(x))
    found = flax_nets.summary(model)
    assert found == of("lenet5")
    assert type(model.conv1) is flax_nets.Conv and not model.dropout.deterministic
    np.testing.assert_array_equal(np.asarray(model(x)), before)


def test_no_input_shape_known():
    layer = flax_nets.Linear(3, 4, rngs=None)
    with pytest.raises(ValueError, match="pass one"):
        flax_nets.summary(layer)
    assert flax_nets.summary(layer, (3,)).multiply_adds == 12


def test_table():
    lines = str(of("lenet5")).splitlines()
    assert lines[0].split() == ["module", "class", "output", "parameters", "multiply-adds"]
    assert lines[2].split()[0] == "conv1"
    assert lines[-1].split()[-2:] == ["61,706", "416,520"]
    assert len({len(line) for line in lines}) == 1


def test_command(capsys):
    assert cli.main(["summary", "lenet5"]) == 0
    assert capsys.readouterr().out.strip() == str(of("lenet5"))
    assert cli.main(["summary", "resnet20_cifar", "--image-size", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input_shape"] == [16, 16, 3]
    assert found["multiply_adds"] == of("resnet20_cifar", (16, 16, 3)).multiply_adds
    assert found["rows"][0]["path"] == "conv1"
    assert cli.main(["summary", "vit_tiny_patch16_224", "--image-size", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [32, 32, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O"], "did you mean"),
        (["lenet5", "--image-size", "0"], "number of pixels"),
        (["lenet5", "--image-size", "31"], "too small"),
        ([], "name"),
    ],
)
def test_command_mistakes(arguments, message, capsys):
    assert cli.main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
