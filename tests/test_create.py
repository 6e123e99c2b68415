"""The public API: names, creation, the functional form, features, and clear errors."""

import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_nets
from benchmarks.compare import quick_jit
from flax_nets import registry
from flax_nets.layers import init


@pytest.fixture
def small():
    return flax_nets.create_model("lenet5", dropout=0.5)


def numbers(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_list_models_is_sorted_and_takes_a_pattern():
    names = flax_nets.list_models()
    assert names == sorted(names)
    assert "vit_base_patch16_224" in names, "aliases are names"
    assert flax_nets.list_models("resnet5*") == ["resnet50", "resnet56_cifar"]


def test_importing_costs_no_torch_and_no_data_library():
    heavy = ["torch", "matplotlib", "orbax", "grain", "sklearn", "PIL", "tyro"]
    code = f"import sys, flax_nets, convert; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_seed_gives_the_same_numbers():
    first, second, other = (flax_nets.create_model("lenet5", rngs=s) for s in (3, 3, 4))
    for a, b, c in zip(numbers(first), numbers(second), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    by_rngs = [flax_nets.create_model("lenet5", rngs=nnx.Rngs(3)) for _ in range(2)]
    for a, b in zip(numbers(by_rngs[0]), numbers(by_rngs[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fresh_head_leaves_the_body_as_it_was():
    one, other = (flax_nets.create_model("lenet5", num_classes=n) for n in (10, 3))
    np.testing.assert_array_equal(one.conv1.kernel[...], other.conv1.kernel[...])
    assert other(jnp.zeros((1, 32, 32, 1))).shape == (1, 3)


def test_creation_works_while_tracing():
    @jax.jit
    def total(seed):
        model = flax_nets.create_model("lenet5", rngs=nnx.Rngs(jax.random.key(seed)))
        return sum(jnp.sum(jnp.abs(v)) for v in numbers(model))

    assert total(0) != total(1)


@pytest.mark.parametrize("switch", [gc.enable, gc.disable])
def test_the_garbage_collector_is_left_as_it_was(switch):
    before = gc.isenabled()
    try:
        switch()
        flax_nets.create_model("lenet5")
        with pytest.raises(ValueError, match="missing"):
            flax_nets.create_model("lenet5", weights={"conv1.weight": np.zeros((6, 1, 5, 5))})
        assert gc.isenabled() == (switch is gc.enable)
    finally:
        (gc.enable if before else gc.disable)()


def test_a_model_comes_in_eval_mode_and_switches(small):
    x = jnp.ones((4, 32, 32, 1))
    np.testing.assert_array_equal(small(x), small(x))
    small.train()
    assert not np.array_equal(small(x), small(x))
    small.eval()
    np.testing.assert_array_equal(small(x), small(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    computed = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1), dtype=dtype)
    assert {v.dtype for v in numbers(computed)} == {jnp.dtype("float32")}
    assert computed(jnp.zeros((1, 8, 8, 3), jnp.float32)).dtype == dtype
    kept = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1), param_dtype=dtype)
    assert {v.dtype for v in numbers(kept)} == {jnp.dtype(dtype)}
    assert kept(jnp.zeros((1, 8, 8, 3), jnp.float32)).dtype == dtype


def test_float64_needs_x64():
    code = "import flax_nets; flax_nets.create_model('lenet5', param_dtype='float64')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "jax_enable_x64" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: flax_nets.create_model("resnet51"), "resnet50"),
        (lambda: flax_nets.create_model("lenet5", drop=0.1), "'dropout'"),
        (lambda: flax_nets.create_model("lenet5", dropout=2.0), r"within \[0, 1\], got 2.0"),
        (lambda: flax_nets.create_model("lenet5", activation="gelu"), "got 'gelu'"),
        (lambda: flax_nets.create_model("vit_b_16", image_size=225), "225"),
        (lambda: flax_nets.create_model("resnet18", block="wide"), "basic, bottleneck"),
        (lambda: flax_nets.create_model("resnet18", num_classes=-1), "num_classes=-1: expected at"),
        (lambda: flax_nets.create_model("resnet18", in_channels=0), "in_channels=0: expected at"),
    ],
)
def test_mistakes_at_creation(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


def test_mistakes_in_the_input():
    lenet = flax_nets.create_model("lenet5")
    with pytest.raises(ValueError, match=r"\[N, H, W, 1\].*\(1, 32, 32, 3\)"):
        lenet(jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="too small"):
        lenet(jnp.zeros((1, 3, 3, 1)))
    with pytest.raises(ValueError, match="120 features"):
        lenet(jnp.zeros((1, 64, 64, 1)))
    vit = flax_nets.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
    with pytest.raises(ValueError, match="32, 32"):
        vit(jnp.zeros((1, 64, 64, 3)))


def test_functional_is_pure_and_complete(small):
    apply, params, state = flax_nets.functional(small)
    assert state == {}, "no random state"
    x = jnp.ones((2, 32, 32, 1))
    key = jax.random.key(0)
    eval_output, _ = quick_jit(apply)(params, state, x)
    np.testing.assert_allclose(eval_output, small(x), rtol=1e-5)
    train = jax.jit(apply, static_argnames="train")
    one, _ = train(params, state, x, train=True, rngs=key)
    same, _ = train(params, state, x, train=True, rngs=key)
    other, _ = train(params, state, x, train=True, rngs=jax.random.key(1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    apply(params, state, x, train=True, rngs=nnx.Rngs(0))
    apply(params, state, x, train=True, rngs=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="pass rngs"):
        apply(params, state, x, train=True)


def test_functional_carries_statistics():
    model = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1))
    apply, params, state = flax_nets.functional(model)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    _, same = apply(params, state, x)
    _, new = apply(params, state, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert new["bn1"]["count"] == 1
    assert not np.array_equal(new["bn1"]["mean"], state["bn1"]["mean"])
    assert model.bn1.count[...] == 0, "the model itself is left as it is"


def test_functional_composes():
    apply, params, state = flax_nets.functional(flax_nets.create_model("lenet5"))
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 1))

    def loss(params, x):
        return jnp.sum(apply(params, state, x)[0] ** 2)

    plain = quick_jit(jax.grad(loss))(params, x)
    saved = quick_jit(jax.grad(jax.checkpoint(loss)))(params, x)
    each = quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x[:, None])
    _, scanned = jax.lax.scan(lambda c, v: (c, loss(params, v[None])), 0, x)
    for a, b, c in zip(*map(jax.tree.leaves, (plain, saved, each)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a, c.sum(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scanned.sum(), loss(params, x), rtol=1e-5)


def test_features_by_name_and_pattern():
    model = flax_nets.create_model("resnet18", depths=(1, 2, 1, 1))
    x = jnp.ones((1, 32, 32, 3))
    got = flax_nets.features(model, x, ["layer1", "layer2.*"])
    assert list(got).index("layer1") < list(got).index("layer2.0")
    assert {"layer1", "layer2.0", "layer2.1", "layer2.0.conv1", "layer2.1.bn2"} <= set(got)
    assert got["layer1"].shape == (1, 8, 8, 64)
    under_jit = quick_jit(lambda x: flax_nets.features(model, x, ["layer4"]))(x)
    assert under_jit["layer4"].shape == (1, 1, 1, 512)
    assert "layer3.0.downsample.1" in flax_nets.features.names(model)
    assert {"conv1", "layer2", "layer2.1", "fc"} <= set(flax_nets.features.stages(model))
    with pytest.raises(ValueError, match="'layer4'"):
        flax_nets.features(model, x, ["layer5"])


def test_features_in_train_mode_leave_the_model_as_it_was():
    model = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1), dropout=0.5)
    model.train()
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    first = flax_nets.features(model, x, ["bn1"])["bn1"]
    again = quick_jit(lambda x: flax_nets.features(model, x, ["bn1"]))(x)["bn1"]
    np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-5)
    assert model.bn1.count[...] == 0
    assert not model.bn1.mean[...].any()


def test_parameters_are_drawn_from_the_distribution_they_carry():
    model = flax_nets.create_model("resnet18")
    kernel = model.layer1[0].conv1.kernel
    assert kernel.get_metadata("init") == init.kaiming_normal(kernel.shape)
    assert abs(float(kernel[...].std()) / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    vit = flax_nets.create_model("vit_tiny_patch16_224", depth=1, image_size=32)
    weight = vit.encoder.layers[0].mlp[0].kernel[...]
    assert abs(float(weight.std()) / 0.02 - 1) < 0.02


@pytest.mark.parametrize(
    "distribution",
    [init.uniform(0.3), init.normal(0.5, 1.0), init.trunc_normal(1.0, 0.5, -1.0, 1.5)],
    ids=["uniform", "normal", "trunc_normal"],
)
def test_both_ways_of_drawing_agree(distribution):
    by_numpy = distribution.draw(np.random.default_rng(0), (100_000,), np.float32)
    by_jax = np.asarray(distribution.sample(jax.random.key(0), (100_000,), jnp.float32))
    for measure in (np.mean, np.std, np.min, np.max):
        assert abs(measure(by_numpy) - measure(by_jax)) < 0.02 * max(1, abs(measure(by_jax))) + (
            0.6 if measure in (np.min, np.max) and distribution.high == np.inf else 0
        )


def test_every_network_takes_dropout_and_no_rngs():
    for file in registry.FILES:
        for name in registry.module(file).VARIANTS:
            registry.resolve(name).with_arguments(dropout=0.0, num_classes=3, in_channels=2)


def test_nnx_s_own_transformations_work():
    model = flax_nets.create_model("resnet20_cifar", depths=(1, 1, 1))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), model(x), rtol=1e-5, atol=1e-6)
    gradients = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2))(model, x)
    assert gradients["conv1"]["kernel"].shape == (3, 3, 3, 16)
    model.train()
    nnx.jit(lambda m, x: m(x))(model, x)
    assert model.bn1.count[...] == 1


def test_a_symbolic_batch_can_be_exported():
    apply, params, state = flax_nets.functional(flax_nets.create_model("lenet5"))
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 32, 32, 1), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: apply(params, state, x)[0]))(shape)
    x = jax.random.normal(jax.random.key(0), (3, 32, 32, 1), jnp.float32)
    served = exported.call(x)
    np.testing.assert_allclose(served, apply(params, state, x)[0], rtol=1e-5, atol=1e-5)
