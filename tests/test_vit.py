"""Vision Transformer: the sizes of its paper, tokens and heads, recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
import flax_nets
from benchmarks.compare import error, quick_jit
from flax_nets import registry
from flax_nets.create import build

SMALL = dict(image_size=32, patch_size=16, width=8, num_heads=2, num_classes=3)


def small(**arguments):
    return flax_nets.create_model("vit_tiny_patch16_224", **SMALL | arguments)


@pytest.mark.parametrize(
    ("name", "depth", "width", "mlp", "heads", "millions"),
    [
        ("vit_b_16", 12, 768, 3072, 12, 86),
        ("vit_b_32", 12, 768, 3072, 12, None),
        ("vit_l_16", 24, 1024, 4096, 16, 307),
        ("vit_l_32", 24, 1024, 4096, 16, None),
        ("vit_h_14", 32, 1280, 5120, 16, 632),
    ],
)
def test_sizes_of_table_1(name, depth, width, mlp, heads, millions):
    """Millions of parameters with a head that the paper does not tell, hence the room."""
    model = build(registry.resolve(name))
    assert len(model.encoder.layers) == depth
    for block in model.encoder.layers:
        assert block.mlp[0].kernel.shape == (width, mlp)
        assert (block.self_attention.num_heads, block.self_attention.head_dim) == (
            heads,
            width // heads,
        )
    if millions:
        leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "width", "heads", "millions"),
    [
        ("deit_tiny_patch16_224", 192, 3, 5),
        ("deit_small_patch16_224", 384, 6, 22),
        ("deit_base_patch16_224", 768, 12, 86),
    ],
)
def test_sizes_of_table_1_of_deit(name, width, heads, millions):
    """Touvron et al. 2020; whole millions, rounded down."""
    found = flax_nets.summary(build(registry.resolve(name)))
    block = build(registry.resolve(name)).encoder.layers[0]
    assert (block.ln_1.scale.shape, block.self_attention.num_heads) == ((width,), heads)
    assert found.parameters // 1_000_000 == millions


def test_an_image_is_a_sequence_of_patches_behind_its_tokens():
    """Equation 1: a linear map of each patch, a class token in front, a position for each."""
    model = small(depth=0, distilled=True)
    tokens = (model.class_token, model.dist_token)
    for i, token in enumerate(tokens):
        token[...] = jnp.full_like(token[...], i + 1.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)), jnp.float32)
    maps = flax_nets.features(model, x, ["conv_proj", "encoder.dropout"])
    sequence = maps["encoder.dropout"] - model.encoder.pos_embedding[...]
    assert sequence.shape == (1, 2 + 4, SMALL["width"])
    np.testing.assert_allclose(sequence[:, 0], np.ones((1, 8)), rtol=1e-5)
    np.testing.assert_allclose(sequence[:, 1], 2 * np.ones((1, 8)), rtol=1e-5)
    patch = x[0, :16, 16:32].reshape(-1) @ model.conv_proj.kernel[...].reshape(-1, SMALL["width"])
    np.testing.assert_allclose(sequence[0, 3], patch + model.conv_proj.bias[...], atol=1e-5)


@pytest.mark.parametrize(("pool", "first"), [("mean", 1), ("all", 0)])
def test_pooling_takes_the_mean_of_patches_or_of_all(pool, first):
    model = small(depth=1, pool=pool, num_classes=0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    found = flax_nets.features(model, x, ["encoder"])["encoder"]
    np.testing.assert_allclose(model(x), found[:, first:].mean(1), rtol=1e-5, atol=1e-6)


def test_the_pre_training_head_is_a_tanh_layer():
    """Section 3.1: one hidden layer at pre-training time."""
    model = small(depth=1, representation_size=12)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    token = flax_nets.features(model, x, ["encoder"])["encoder"][:, 0]
    wanted = model.heads.head(jnp.tanh(model.heads.pre_logits(token)))
    assert model.heads.pre_logits.kernel.shape == (8, 12)
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_both_heads_of_a_distilled_network_speak_while_it_trains():
    """DeiT, section 4: their mean in eval mode; both, on request, in train mode."""
    model = small(depth=1, distilled=True, distilled_training=True)
    for head in (model.heads.head, model.head_dist):
        head.kernel[...] = jnp.ones_like(head.kernel[...])
    model.head_dist.bias[...] = jnp.full_like(model.head_dist.bias[...], 3.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    mean = model(x)
    model.train()
    logits, distilled = model(x)
    assert not np.allclose(logits, distilled)
    np.testing.assert_allclose(mean, (logits + distilled) / 2, rtol=1e-5, atol=1e-6)


def test_recomputation_changes_neither_outputs_nor_gradients_nor_names():
    """With the same dropout, of the stream and of the attention's weights."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)))
    found = []
    for remat in (False, True):
        model = small(
            depth=2, remat=remat, dropout=0.3, attention_dropout=0.3, param_dtype=jnp.float64
        )
        apply, params, state = flax_nets.functional(model)

        def loss(params, x, apply=apply, state=state):
            output, _ = apply(params, state, x, train=True, rngs=jax.random.key(2))
            return jnp.sum(output**2), output

        run = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        found.append(run(params, x))
    for plain, recomputed in zip(*map(jax.tree.leaves, found), strict=True):
        assert error(recomputed, plain) <= 1e-12
    names = [list(convert.export(gradients)) for (gradients, _), _ in found]
    assert names[0] == names[1]


def kept_by_a_block(remat):
    """Numbers that a further block keeps for the backward pass, per token and channel."""
    kept = []
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    for depth in (1, 2):
        apply, params, state = flax_nets.functional(small(depth=depth, remat=remat))

        def residuals(params, x, apply=apply, state=state):
            return jax.vjp(lambda p: apply(p, state, x, train=True)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, x))
        kept.append(sum(leaf.size for leaf in leaves if leaf.shape[:1] == (2,)))
    return (kept[1] - kept[0]) / (2 * 5 * SMALL["width"])


def test_a_recomputed_block_keeps_its_input_alone():
    """XLA for CPUs drops the barriers that hold the second pass back, so that only what is handed
    over from the first is the same on all machines."""
    assert kept_by_a_block(remat=True) == 1
    assert kept_by_a_block(remat=False) > 15


def test_features_within_a_recomputed_block():
    model = small(depth=1, remat=True)
    model.train()
    name = "encoder.layers.encoder_layer_0.mlp.0"
    x = jnp.ones((1, 32, 32, 3), jnp.float32)
    found = quick_jit(lambda x: flax_nets.features(model, x, [name]))(x)
    assert found[name].shape == (1, 5, 4 * SMALL["width"])


def test_the_twin_recomputes_too():
    spec = registry.resolve("vit_b_16").with_arguments(**SMALL, depth=2, dropout=0.3)
    found = []
    for remat in (False, True):
        torch.manual_seed(0)
        model = spec.cls("torch_ref")(**spec.arguments | dict(remat=remat)).double()
        torch.nn.init.normal_(model.heads.head.weight)
        model(torch.ones(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
