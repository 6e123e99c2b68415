"""Vision Transformer: recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

import convert
import flax_nets
from benchmarks.compare import error
from flax_nets import registry

SMALL = dict(image_size=32, patch_size=16, width=8, num_heads=2, num_classes=3)


def small(**arguments):
    return flax_nets.create_model("vit_tiny_patch16_224", **SMALL | arguments)


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

        run = jax.jit(
            jax.grad(loss, argnums=(0, 1), has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
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
    found = jax.jit(lambda x: flax_nets.features(model, x, [name]))(x)
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
