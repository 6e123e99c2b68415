"""Networks for other programs: Orbax, ONNX and StableHLO, each against the network itself."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import orbax.checkpoint
import pytest
import torch

import convert
import flax_nets
from benchmarks.compare import error, images, nchw, twin
from convert import deploy
from flax_nets import registry

TINY = dict(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), num_classes=7)  # padded maximum pooling
SPEC = registry.resolve("resnet18").with_arguments(**TINY)
BATCHES = (1, 3)


@pytest.fixture(scope="module")
def reference():
    return twin(SPEC)


@pytest.fixture(scope="module")
def model(reference):
    single = {k: v.detach().float() for k, v in reference.state_dict().items()}
    return flax_nets.create_model("resnet18", weights=single, **TINY)


def distance(output, reference, x):
    """From the float64 truth."""
    with torch.no_grad():
        return error(output, reference(torch.tensor(nchw(x), dtype=torch.float64)))


def run_onnx(path, x):
    # its own remarks on a graph are not warnings of Python's, and go to stderr
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    return session.run(["logits"], {"images": x})[0]


def test_onnx(model, reference, tmp_path):
    """As near to the truth as PyTorch in the same precision, which the rule for float32 allows."""
    path = tmp_path / "net.onnx"
    convert.to_onnx(model, path, image_size=32)
    onnx.checker.check_model(path, full_check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    single = twin(SPEC).float().eval()
    for batch in BATCHES:
        x = images(SPEC, batch, 32, seed=batch).astype(np.float32)
        with torch.no_grad():
            allowed = 1.5 * distance(single(torch.tensor(nchw(x))), reference.eval(), x)
        assert distance(run_onnx(path, x), reference, x) <= max(allowed, 1e-6)


def test_onnx_of_16_bits_and_beside_its_numbers(tmp_path, monkeypatch):
    """What one file cannot hold lies beside it; parameters of 16 bits are widened."""
    monkeypatch.setattr(deploy, "MESSAGE_LIMIT", 1000)
    model = flax_nets.create_model("lenet5", param_dtype=jnp.bfloat16)  # average pooling
    path = tmp_path / "lenet.onnx"
    convert.to_onnx(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lenet.onnx", "lenet.onnx.data"]
    x = images(registry.resolve("lenet5"), 2, 32).astype(np.float32)
    wide = flax_nets.create_model("lenet5", weights=convert.export(model), param_dtype=jnp.float32)
    assert error(run_onnx(path, x), wide(jnp.asarray(x))) <= 1e-6


def test_stablehlo(model, tmp_path):
    """Read back it computes the same bits, for any number of images, and for every platform."""
    path = tmp_path / "net.stablehlo"
    convert.to_stablehlo(model, path, image_size=(32, 40))
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    apply, params, state = flax_nets.functional(model)
    compute = jax.jit(lambda x: apply(params, state, x)[0])
    for batch in BATCHES:
        x = np.random.default_rng(batch).normal(size=(batch, 32, 40, 3)).astype(np.float32)
        assert error(exported.call(x), compute(x)) <= 1e-6
        assert exported.call(x).shape == (batch, 7)


def test_stablehlo_says_what_it_cannot_hold(model, tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "MESSAGE_LIMIT", 1000)
    with pytest.raises(ValueError, match="bytes of numbers, and StableHLO files hold 2 GiB"):
        convert.to_stablehlo(model, tmp_path / "net.stablehlo")
    assert not list(tmp_path.iterdir())


def test_orbax(model, tmp_path):
    """Orbax restores the trees that `functional` gives; `convert.read` PyTorch's names."""
    path = tmp_path / "net.orbax"
    for _ in range(2):  # the second replaces the first
        convert.to_orbax(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.orbax"]
    tree = orbax.checkpoint.PyTreeCheckpointer().restore(path)
    apply, params, state = flax_nets.functional(model)
    assert jax.tree.structure(tree) == jax.tree.structure({"params": params, "state": state})
    x = jnp.ones((1, 32, 32, 3), jnp.float32)
    restored = jax.tree.map(jnp.asarray, tree)
    wanted = apply(params, state, x)[0]
    np.testing.assert_array_equal(apply(restored["params"], restored["state"], x)[0], wanted)
    ours = convert.export(model)
    theirs = convert.read(path)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[key].dtype, theirs[key].shape)
        assert value.tobytes() == theirs[key].tobytes()


@pytest.mark.parametrize("to", [convert.to_onnx, convert.to_stablehlo])
def test_what_cannot_be_written_leaves_nothing(to, model, tmp_path):
    for size in (-1, 4.5):
        with pytest.raises(ValueError, match="image_size"):
            to(model, tmp_path / "net", image_size=size)
    with pytest.raises(ValueError, match="expected a model made by create_model"):
        to(model.layer1, tmp_path / "net")
    assert not list(tmp_path.iterdir())
