"""Checkpoints of authors' repositories and of torch.nn's attention: the same function, and back.

A network here is its forward pass under its author's names; a weight is drawn where it is first
met. So names, shapes and function are stated once, apart from both twins.
"""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import convert
import flax_nets
import torch_ref.inception_v3
import torch_ref.senet
from benchmarks.compare import OUTPUT, error, quick_jit, randomise, state_dict
from convert import dialects, rules
from flax_nets import layers, registry
from flax_nets.create import build
from flax_nets.functional import set_mode


class Author:
    """Layers by the names they have in a checkpoint; `tensors` collects its state dict."""

    def __init__(self):
        self.tensors = {}
        self.random = np.random.default_rng(0)

    def draw(self, key, shape, low=-0.5, high=0.5):
        self.tensors[key] = self.random.uniform(low, high, shape)
        return torch.tensor(self.tensors[key])

    def affine(self, key, shape, bias):
        weight = self.draw(f"{key}.weight", shape)
        return weight, self.draw(f"{key}.bias", shape[:1]) if bias else None

    def conv(self, key, x, channels, kernel, stride=1, padding=0, groups=1, bias=False):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        made = self.affine(key, (channels, x.shape[1] // groups, *kernel), bias)
        return F.conv2d(x, *made, stride=stride, padding=padding, groups=groups)

    def dense(self, key, x, features, bias=True):
        return F.linear(x, *self.affine(key, (features, x.shape[-1]), bias))

    def norm(self, key, x, eps=1e-5):
        size = x.shape[1:2]
        scale, bias = self.draw(f"{key}.weight", size, 0.5, 1.5), self.draw(f"{key}.bias", size)
        mean, var = (
            self.draw(f"{key}.running_mean", size),
            self.draw(f"{key}.running_var", size, 0.5, 1.5),
        )
        self.tensors[f"{key}.num_batches_tracked"] = np.array(7)
        return F.batch_norm(x, mean, var, scale, bias, eps=eps)


def stated(forward, shape, **options):
    """(state dict, input NCHW, output) of a network written as above."""
    net, x = Author(), np.random.default_rng(1).normal(size=shape)
    return net.tensors, x, forward(net, torch.tensor(x), **options).numpy()


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def same(exported, tensors):
    assert set(exported) == set(tensors)
    for key, value in tensors.items():
        assert exported[key].shape == value.shape, key
        assert exported[key].dtype == value.dtype, key
        assert exported[key].tobytes() == value.tobytes(), key


def check(name, stated, dialect, **given):
    """Recognised from the keys, the same outputs, and back bit by bit. Returns the model."""
    tensors, x, wanted = stated
    model = flax_nets.create_model(name, weights=tensors, **given)
    assert error(quick_jit(lambda x: model(x))(nhwc(x)), wanted) <= OUTPUT
    check_twin(model, x, wanted)
    same(convert.export(model, dialect=dialect), tensors)
    return model


def check_twin(model, x, wanted):
    twin = model.spec.cls("torch_ref")(**model.spec.arguments)
    loaded(twin, convert.export(model))
    assert error(twin(torch.tensor(x)), wanted) <= OUTPUT


def loaded(module, tensors):
    tensors = {key: torch.tensor(value) for key, value in tensors.items()}
    module.double().eval().load_state_dict(tensors, strict=True)
    return module


def lenet(net, x):
    x = F.avg_pool2d(torch.sigmoid(net.conv("conv.0", x, 6, 5, bias=True)), 2)
    x = F.avg_pool2d(torch.sigmoid(net.conv("conv.3", x, 16, 5, bias=True)), 2)
    x = torch.sigmoid(net.dense("fc.0", x.flatten(1), 120))
    return net.dense("fc.4", torch.sigmoid(net.dense("fc.2", x, 84)), 10)


def test_windxy_lenet():
    model = check("lenet5", stated(lenet, (2, 1, 32, 32)), "windxy")
    assert model.spec.complete["activation"] == "sigmoid"
    tensors = convert.export(model, dialect="windxy")
    tensors["fc.0.weight"] = tensors["fc.0.weight"][:, 1:]
    with pytest.raises(ValueError, match=r"conv3\.weight: has shape \(120, 399\)"):
        flax_nets.create_model("lenet5", weights=tensors)


def nin(net, x, widths):
    for i, (channels, (kernel, stride, padding)) in enumerate(
        zip(widths, ((11, 4, 0), (5, 1, 2), (3, 1, 1), (3, 1, 1)), strict=True)
    ):
        place = 7 if i == 3 else 2 * i  # a pooling follows each block, dropout the third pooling
        x = net.conv(f"model.{place}.0", x, channels, kernel, stride, padding, bias=True).relu()
        x = net.conv(f"model.{place}.2", x, channels, 1, bias=True).relu()
        x = net.conv(f"model.{place}.4", x, channels, 1, bias=True).relu()
        x = F.max_pool2d(x, 3, 2) if i < 3 else x
    return x.mean((2, 3))


def test_windxy_nin(tmp_path):
    implied = dialects.by_name("windxy", registry.resolve("nin_imagenet")).arguments["blocks"]
    assert [row[0] for row in implied] == [96, 256, 384, 10]
    narrow = tuple(
        (c, *rest[:3], c, pool and c, pool)
        for (_, *rest, _, pool), c in zip(implied, (6, 8, 9, 10), strict=True)
    )
    given = stated(nin, (1, 3, 96, 96), widths=(6, 8, 9, 10))
    model = check("nin_imagenet", given, "windxy", blocks=narrow)
    assert model.spec.complete["ceil_mode"] is False
    path = tmp_path / "nin.pth"  # reading takes "model." off
    torch.save({k: torch.tensor(v) for k, v in given[0].items()}, path)
    again = flax_nets.create_model("nin_imagenet", weights=path, blocks=narrow)
    same(convert.export(again, dialect="windxy"), given[0])


def vgg(net, x, depths, widths, hidden):
    for stage, (depth, channels) in enumerate(zip(depths, widths, strict=True), 1):
        for i in range(depth):
            key = f"net.vgg_block_{stage}.{2 * i}"
            x = net.conv(key, x, channels, 3, padding=1, bias=True).relu()
        x = F.max_pool2d(x, 2)
    x = net.dense("net.fc.1", x.flatten(1), hidden).relu()
    return net.dense("net.fc.7", net.dense("net.fc.4", x, hidden).relu(), 10)


def test_windxy_vgg():
    sizes = dict(depths=(2, 1), widths=(4, 5), hidden=6)
    check("vgg16", stated(vgg, (2, 3, 28, 28), **sizes), "windxy", **sizes)


def densenet(net, x, blocks, depth, growth):
    x = net.norm("net.1", net.conv("net.0", x, 2 * growth, 7, 2, 3, bias=True)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i in range(blocks):
        for j in range(depth):
            key = f"net.DenseBlosk_{i}.net.{j}"
            y = net.norm(f"{key}.0", x).relu()
            x = torch.cat((x, net.conv(f"{key}.2", y, growth, 3, padding=1, bias=True)), 1)
        if i < blocks - 1:
            key = f"net.transition_block_{i}"
            y = net.norm(f"{key}.0", x).relu()
            x = F.avg_pool2d(net.conv(f"{key}.2", y, x.shape[1] // 2, 1, bias=True), 2)
    return net.dense("net.fc.1", net.norm("net.BN", x).relu().mean((2, 3)), 5)


def test_windxy_densenet():
    """Any name of the family takes it: what differs is implied."""
    sizes = dict(growth=4, depths=(2, 2), stem_channels=8)
    given = stated(densenet, (2, 3, 33, 33), blocks=2, depth=2, growth=4)
    model = check("densenet_bc100_k12_cifar", given, "windxy", **sizes)
    implied = {k: model.spec.complete[k] for k in ("bottleneck", "compression", "stem", "bias")}
    assert implied == dict(bottleneck=0, compression=0.5, stem="imagenet", bias=True)


def test_windxy_densenet_is_identified():
    """By its names: no network here has its sizes."""
    tensors, _, _ = stated(densenet, (1, 3, 32, 32), blocks=4, depth=4, growth=32)
    first, *_ = convert.identify(tensors)
    assert (first.model, first.dialect, first.fits) == ("densenet121", "windxy", True)


def googlenet(net, x):
    conv = functools.partial(net.conv, bias=True)
    grow = functools.partial(F.max_pool2d, kernel_size=3, stride=2, ceil_mode=True)
    x = grow(conv("conv1.conv", x, 64, 7, 2, 3).relu())
    x = conv("conv3.conv", conv("conv2.conv", x, 64, 1).relu(), 192, 3, padding=1).relu()
    x = grow(x)
    for name, a, b, c, d, e, f in MODULES:
        one = conv(f"{name}.branch1.conv", x, a, 1).relu()
        three = conv(f"{name}.branch2.0.conv", x, b, 1).relu()
        three = conv(f"{name}.branch2.1.conv", three, c, 3, padding=1).relu()
        five = conv(f"{name}.branch3.0.conv", x, d, 1).relu()
        five = conv(f"{name}.branch3.1.conv", five, e, 5, padding=2).relu()
        pool = conv(f"{name}.branch4.1.conv", F.max_pool2d(x, 3, 1, 1), f, 1).relu()
        x = torch.cat((one, three, five, pool), 1)
        if name == "inception3b":
            x = grow(x)
        if name == "inception4e":
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    return net.dense("fc", x.mean((2, 3)), 5)


MODULES = (  # Table 1 of the paper
    ("inception3a", 64, 96, 128, 16, 32, 32),
    ("inception3b", 128, 128, 192, 32, 96, 64),
    ("inception4a", 192, 96, 208, 16, 48, 64),
    ("inception4b", 160, 112, 224, 24, 64, 64),
    ("inception4c", 128, 128, 256, 24, 64, 64),
    ("inception4d", 112, 144, 288, 32, 64, 64),
    ("inception4e", 256, 160, 320, 32, 128, 128),
    ("inception5a", 256, 160, 320, 32, 128, 128),
    ("inception5b", 384, 192, 384, 48, 128, 128),
)


def test_windxy_googlenet(caplog):
    """Its names are those of the paper's network here; which it is, the name asked for says."""
    tensors, x, wanted = stated(googlenet, (1, 3, 40, 40))
    model = flax_nets.create_model("googlenet", weights=tensors)
    assert "local_norm=False, pool4=2, as windxy names imply" in caplog.text
    arguments = {k: model.spec.complete[k] for k in ("original", "local_norm", "pool4")}
    assert arguments == dict(original=True, local_norm=False, pool4=2)
    check_twin(model, x, wanted)
    assert isinstance(model.norm1, layers.Identity)
    assert isinstance(model.norm2, layers.Identity)
    assert model.maxpool4.kernel_size == (2, 2)
    same(convert.export(model, dialect="windxy"), tensors)
    caplog.clear()
    papers = flax_nets.create_model("googlenet_2014", weights=tensors)
    assert "windxy" not in caplog.text
    assert isinstance(papers.norm1, layers.LocalResponseNorm)


A = {
    1: [(64, 1)],
    2: [(48, 1), (64, 5)],
    3: [(64, 1), (96, 3), (96, 3)],
    4: ["mean", (24, 1)],
}
B = {1: [(384, 3, 2)], 2: [(64, 1), (96, 3), (96, 3, 2)], 3: ["max"]}
C = {
    1: [(192, 1)],
    2: [(20, 1), (20, (1, 7)), (192, (7, 1))],
    3: [(20, 1), (20, (7, 1)), (20, (1, 7)), (20, (7, 1)), (192, (1, 7))],
    4: ["mean", (192, 1)],
}
D = {
    1: [(192, 1), (320, 3, 2)],
    2: [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
    3: ["max"],
}
POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "max": lambda x: F.max_pool2d(x, 3, 2),
}


def inception(net, x, branches):
    """A row of `branches`: channels, kernel, stride; strided ones are not padded."""
    outputs = []
    for i, steps in branches.items():
        y = x
        for j, step in enumerate(steps):
            key = f"branch{i}" if len(steps) == 1 else f"branch{i}.{j}"
            if isinstance(step, str):
                y = POOLS[step](y)
                continue
            channels, kernel, *stride = step
            sides = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (0, 0) if stride else tuple(side // 2 for side in sides)
            y = net.conv(f"{key}.conv", y, channels, sides, *(stride or [1]), padding)
            y = net.norm(f"{key}.bn", y, eps=1e-3).relu()
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("module", "kind", "branches", "option"),
    [
        ("Mixed_5c", "InceptionA", A, (24,)),
        ("Mixed_6a", "InceptionB", B, ()),
        ("Mixed_6d", "InceptionC", C, (20,)),
        ("Mixed_7a", "InceptionD", D, ()),
    ],
)
def test_windxy_inception_v3_blocks(module, kind, branches, option):
    tensors, x, wanted = stated(inception, (1, 12, 9, 9), branches=branches)
    dialect = dialects.by_name("windxy", registry.resolve("inception_v3"))
    native = {
        dialect.to_native(f"{module}.{k}").removeprefix(f"{module}."): v for k, v in tensors.items()
    }
    block = getattr(torch_ref.inception_v3, kind)(12, *option)
    assert error(loaded(block, native)(torch.tensor(x)), wanted) <= OUTPUT
    assert {dialect.from_native(f"{module}.{k}") for k in native} == {
        f"{module}.{k}" for k in tensors
    }


def test_windxy_inception_v3_is_recognised():
    spec = registry.resolve("inception_v3")
    native = [entry.key for entry in rules.entries(build(spec))]
    dialect = dialects.by_name("windxy", spec)
    keys = [dialect.from_native(key) for key in native]
    modules = {key.split(".")[0] for key in keys if ".branch2.0." in key}
    assert modules == {f"Mixed_{m}" for m in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a")}
    assert not any("branch7x7" in key for key in keys)
    assert dialects.recognise(keys, native, spec) == dialect
    assert [dialect.to_native(key) for key in keys] == native


def resnext(net, x, widening, cardinality, base_width):
    """Stages of 8, 16 and 32 times the widening; one bottleneck each."""
    x = net.norm("bn_1", net.conv("conv_1_3x3", x, 8, 3, padding=1)).relu()
    for i, channels in enumerate((8, 16, 32), 1):
        key, stride = f"stage_{i}.stage_{i}_bottleneck_0", 1 if i == 1 else 2
        out, width = channels * widening, channels * base_width // 64 * cardinality
        y = net.norm(f"{key}.bn_reduce", net.conv(f"{key}.conv_reduce", x, width, 1)).relu()
        y = net.conv(f"{key}.conv_conv", y, width, 3, stride, 1, cardinality)
        y = net.norm(f"{key}.bn", y).relu()
        y = net.norm(f"{key}.bn_expand", net.conv(f"{key}.conv_expand", y, out, 1))
        x = net.conv(f"{key}.shortcut.shortcut_conv", x, out, 1, stride)
        x = (net.norm(f"{key}.shortcut.shortcut_bn", x) + y).relu()
    return net.dense("classifier", F.avg_pool2d(x, 8, 1).flatten(1), 10)


@pytest.mark.parametrize("widening", [4, 3])
def test_prlz77_resnext(widening):
    """Windxy's ResNeXt-29 is a copy of it, with a widening of 3."""
    sizes = dict(cardinality=4, base_width=16)
    given = stated(resnext, (1, 3, 32, 32), widening=widening, **sizes)
    reduced = dict(depths=(1, 1, 1), widths=(8, 16, 32), **sizes)
    model = check("resnext29_8x64d_cifar", given, "prlz77", **reduced)
    assert model.spec.complete["widening"] == widening


def shufflenet_v1(net, x, groups, widths):
    x = net.norm("first_conv.1", net.conv("first_conv.0", x, widths[0], 3, 2, 1)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i, (channels, stride) in enumerate(((widths[1], 2), (widths[1], 1), (widths[2], 2))):
        one, two, width = (
            f"features.{i}.branch_main_1",
            f"features.{i}.branch_main_2",
            channels // 4,
        )
        y = net.conv(f"{one}.0", x, width, 1, groups=groups if i else 1)
        y = net.conv(f"{one}.3", net.norm(f"{one}.1", y).relu(), width, 3, stride, 1, width)
        y = net.norm(f"{one}.4", y)
        y = y.unflatten(1, (width // groups, groups)).transpose(1, 2).flatten(1, 2)
        new = channels - x.shape[1] if stride == 2 else channels
        y = net.norm(f"{two}.1", net.conv(f"{two}.0", y, new, 1, groups=groups))
        pooled = F.avg_pool2d(x, 3, 2, 1)
        x = torch.cat((pooled, y.relu()), 1) if stride == 2 else (x + y).relu()
    return net.dense("classifier.0", x.mean((2, 3)), 5, bias=False)


def test_megvii_shufflenet_v1_is_native(tmp_path):
    sizes = dict(groups=3, widths=(6, 24, 48))
    given = stated(shufflenet_v1, (2, 3, 64, 64), **sizes)
    model = check("shufflenet_v1_x1_0_g3", given, "native", depths=(2, 1), **sizes)
    path = tmp_path / "of its train.py.pth"
    tensors = {f"module.{k}": torch.tensor(v) for k, v in given[0].items()}
    torch.save({"state_dict": tensors}, path)
    assert set(convert.read(path)) == set(convert.export(model))


def shufflenet_v2(net, x, widths):
    x = net.norm("first_conv.1", net.conv("first_conv.0", x, widths[0], 3, 2, 1)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i, (channels, stride) in enumerate(((widths[1], 2), (widths[1], 1), (widths[2], 2))):
        passing, x = (x[:, ::2], x[:, 1::2]) if stride == 1 else (x, x)
        key, width, inputs = f"features.{i}.branch_main", channels // 2, x.shape[1]
        y = net.norm(f"{key}.1", net.conv(f"{key}.0", x, width, 1)).relu()
        y = net.norm(f"{key}.4", net.conv(f"{key}.3", y, width, 3, stride, 1, width))
        y = net.norm(f"{key}.6", net.conv(f"{key}.5", y, channels - inputs, 1)).relu()
        if stride == 2:
            key = f"features.{i}.branch_proj"
            passing = net.norm(f"{key}.1", net.conv(f"{key}.0", x, inputs, 3, 2, 1, inputs))
            passing = net.norm(f"{key}.3", net.conv(f"{key}.2", passing, inputs, 1)).relu()
        x = torch.cat((passing, y), 1)
    x = net.norm("conv_last.1", net.conv("conv_last.0", x, widths[3], 1)).relu()
    return net.dense("classifier.0", x.mean((2, 3)), 5, bias=False)


def test_megvii_shufflenet_v2():
    """Its first stage splits unevenly: 6 channels come in, 10 are new."""
    widths = (6, 16, 24, 20)
    given = stated(shufflenet_v2, (2, 3, 64, 64), widths=widths)
    check("shufflenet_v2_x1_0", given, "megvii", depths=(2, 1), widths=widths)


def cbam_resnet(net, x, attention):
    """Two stages of one basic block, with the stem for CIFAR."""
    x = net.norm("bn1", net.conv("conv1", x, 16, 3, padding=1)).relu()
    for i, (channels, stride) in enumerate(((16, 1), (32, 2)), 1):
        key = f"layer{i}.0"
        y = net.norm(f"{key}.bn1", net.conv(f"{key}.conv1", x, channels, 3, stride, 1)).relu()
        y = net.norm(f"{key}.bn2", net.conv(f"{key}.conv2", y, channels, 3, padding=1))
        if stride == 2:
            x = net.conv(f"{key}.downsample.0", x, channels, 1, stride)
            x = net.norm(f"{key}.downsample.1", x)
        x = (x + attention(net, f"{key}.cbam", y)).relu()
    return net.dense("fc", x.mean((2, 3)), 5)


def cbam(net, key, x):
    pooled = torch.cat((x.mean((2, 3)), x.amax((2, 3))))  # one perceptron for both
    hidden = net.dense(f"{key}.ChannelGate.mlp.1", pooled, x.shape[1] // 16).relu()
    scores = net.dense(f"{key}.ChannelGate.mlp.3", hidden, x.shape[1])
    x = x * sum(scores.chunk(2)).sigmoid()[:, :, None, None]
    maps = torch.stack((x.amax(1), x.mean(1)), 1)
    place = f"{key}.SpatialGate.spatial"
    return x * net.norm(f"{place}.bn", net.conv(f"{place}.conv", maps, 1, 7, padding=3)).sigmoid()


def test_cbam_names_are_its_authors(tmp_path):
    tensors, x, wanted = stated(cbam_resnet, (2, 3, 8, 8), attention=cbam)
    path = tmp_path / "checkpoint.pth"
    saved = {f"module.{k}": torch.tensor(v) for k, v in tensors.items()}
    torch.save({"epoch": 3, "state_dict": saved, "optimizer": {"state": {}}}, path)
    sizes = dict(depths=(1, 1), widths=(16, 32))
    model = flax_nets.create_model("cbam_resnet18", weights=path, **sizes)
    assert model.spec.complete["stem"] == "cifar"
    assert error(quick_jit(lambda x: model(x))(nhwc(x)), wanted) <= OUTPUT
    check_twin(model, x, wanted)
    same(convert.export(model), tensors)


def test_bam_is_refused():
    tensors, _, _ = stated(cbam_resnet, (1, 3, 8, 8), attention=cbam)
    tensors["bam1.channel_att.gate_c.gate_c_fc_0.weight"] = np.zeros((1, 16))
    with pytest.raises(ValueError, match=r"\+ bam1\.channel_att.*unexpected"):
        flax_nets.create_model("cbam_resnet18", weights=tensors, depths=(1, 1), widths=(16, 32))


def excite(net, x):
    hidden = net.dense("fc.0", x.mean((2, 3)), 3, bias=False).relu()
    return x * net.dense("fc.2", hidden, x.shape[1], bias=False).sigmoid()[:, :, None, None]


def test_windxy_squeeze_excite():
    tensors, x, wanted = stated(excite, (2, 12, 4, 5))
    ours = flax_nets.SqueezeExcite(12, hidden=3, bias=False, rngs=nnx.Rngs(0))
    convert.load(ours, tensors)
    assert error(ours(nhwc(x)), wanted.transpose(0, 2, 3, 1)) <= OUTPUT
    twin = loaded(torch_ref.senet.SqueezeExcite(12, hidden=3, bias=False), convert.export(ours))
    assert error(twin(torch.tensor(x)), wanted) <= OUTPUT
    same(convert.export(ours, dialect="windxy"), tensors)


def highway(net, x, depth):
    for i in range(depth):
        gate = net.dense(f"gate.{i}", x, 6).sigmoid()
        x = gate * net.dense(f"nonlinear.{i}", x, 6).relu() + (1 - gate) * net.dense(
            f"linear.{i}", x, 6
        )
    return x


def test_windxy_highway():
    tensors, x, wanted = stated(highway, (4, 6), depth=3)
    layer = functools.partial(flax_nets.Highway, 6, linear_carry=True, rngs=nnx.Rngs(0))
    ours = flax_nets.Sequential(layer(), layer(), layer())
    convert.load(ours, tensors)
    assert error(ours(jnp.asarray(x)), wanted) <= OUTPUT
    same(convert.export(ours, dialect="windxy"), tensors)


def attention(net, x, heads, features, value_features):
    parts = {"q": features, "k": features, "v": value_features}
    q, k, v = (
        net.dense(f"fc_{part}", x, heads * size).unflatten(-1, (heads, size)).transpose(1, 2)
        for part, size in parts.items()
    )
    weights = (q @ k.mT / features**0.5).softmax(-1)
    return net.dense("fc_o", (weights @ v).transpose(1, 2).flatten(2), x.shape[-1])


@pytest.mark.parametrize("value_features", [5, 7])
def test_windxy_self_attention(value_features):
    sizes = dict(heads=3, features=5, value_features=value_features)
    tensors, x, wanted = stated(attention, (2, 6, 8), **sizes)
    of_head = functools.partial(flax_nets.MultiHeadAttention, 8, 3, head_dim=5, rngs=nnx.Rngs(0))
    ours = convert.load(of_head(value_head_dim=value_features), tensors)
    set_mode(ours, train=False)
    assert error(ours(jnp.asarray(x)), wanted) <= OUTPUT
    same(convert.export(ours, dialect="windxy"), tensors)
    with pytest.raises(ValueError, match=r"\(dialect windxy\)(.|\n)*in_proj_weight: has shape"):
        convert.load(of_head(value_head_dim=value_features + 1), tensors)


def ported(ours, theirs):
    """`ours` with the numbers of `theirs`, which go back bit by bit."""
    randomise(theirs.double().eval())
    convert.load(ours, state_dict(theirs), dialect="auto")
    same(convert.export(ours), state_dict(theirs))
    set_mode(ours, train=False)
    return ours


@pytest.mark.parametrize("widths", [{}, dict(kdim=5, vdim=7)], ids=str)
def test_torch_attention_is_native(widths):
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    ours = ported(flax_nets.MultiHeadAttention(8, 2, **widths, rngs=nnx.Rngs(0)), theirs)
    random = np.random.default_rng(0)
    sizes = (8, widths.get("kdim", 8), widths.get("vdim", 8))
    inputs = [random.normal(size=(2, n, size)) for n, size in zip((3, 4, 4), sizes, strict=True)]
    wanted, _ = theirs(*map(torch.tensor, inputs))
    assert error(ours(*map(jnp.asarray, inputs)), wanted) <= OUTPUT


def test_torch_attention_with_biased_keys_is_refused():
    theirs = torch.nn.MultiheadAttention(8, 2, add_bias_kv=True).double()
    ours = flax_nets.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\+ bias_k: unexpected(.|\n)*2 unexpected"):
        convert.load(ours, state_dict(theirs))


def test_torch_transformer_layers_are_native():
    sizes = dict(dim_feedforward=10, activation="gelu", norm_first=True)
    x, memory = (np.random.default_rng(i).normal(size=(2, 3 + i, 8)) for i in range(2))
    for kind, inputs in (("Encoder", [x]), ("Decoder", [x, memory])):
        theirs = getattr(torch.nn, f"Transformer{kind}Layer")(8, 2, batch_first=True, **sizes)
        ours = getattr(flax_nets, f"Transformer{kind}Layer")(8, 2, **sizes, rngs=nnx.Rngs(0))
        ported(ours, theirs)
        wanted = theirs(*map(torch.tensor, inputs))
        assert error(ours(*map(jnp.asarray, inputs)), wanted) <= OUTPUT


def test_torch_transformer_is_native():
    sizes = dict(num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=10)
    theirs = torch.nn.Transformer(8, 2, batch_first=True, **sizes)
    ours = ported(flax_nets.Transformer(8, 2, **sizes, rngs=nnx.Rngs(0)), theirs)
    x, y = (np.random.default_rng(i).normal(size=(2, 3 + i, 8)) for i in range(2))
    wanted = theirs(torch.tensor(x), torch.tensor(y))
    assert error(ours(jnp.asarray(x), jnp.asarray(y)), wanted) <= OUTPUT
    stack = convert.load(ours.encoder, state_dict(theirs.encoder))  # nn.TransformerEncoder's
    same(convert.export(stack), state_dict(theirs.encoder))


def test_a_module_of_one_s_own_exports_in_the_dialects_of_modules():
    ours = flax_nets.SqueezeExcite(8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'prlz78'; it has native.* windxy"):
        convert.export(ours, dialect="prlz78")


def test_the_docs_name_every_dialect():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "dialects.md").read_text()
    missing = {d.name for d in dialects.all_dialects() if f"`{d.name}`" not in page}
    assert missing == set()
