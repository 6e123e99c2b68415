"""Attention and the Transformer against torch.nn, their twins and each other, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
import flax_nets
from benchmarks.compare import GRADIENT, OUTPUT, error, randomise, state_dict
from flax_nets.functional import set_mode
from flax_nets.models import attention
from torch_ref import attention as reference

WIDTH, HEADS = 12, 3


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def ported(ours, theirs):
    """`ours` with the numbers of `theirs`, in eval mode, all scales and biases drawn anew."""
    randomise(theirs.double().eval())
    convert.load(ours, state_dict(theirs))
    assert list(convert.export(ours)) == list(theirs.state_dict())
    set_mode(ours, train=False)
    return ours


def compare(ours, theirs, inputs, call=None, their_call=None, **masks):
    """Outputs, and the gradients of every parameter and every input."""
    call = call or (lambda model, *x: model(*x, **{k: jnp.asarray(m) for k, m in masks.items()}))
    their_call = their_call or (
        lambda model, *x: model(*x, **{k: torch.tensor(m) for k, m in masks.items()})
    )
    graph, params, rest = nnx.split(ours, nnx.Param, ...)

    @jax.jit
    def run(params, inputs, towards):
        out, back = jax.vjp(lambda p, x: call(nnx.merge(graph, p, rest), *x), params, inputs)
        return out, *back(towards(out) if callable(towards) else towards)

    tensors = [torch.tensor(x, requires_grad=x.dtype == np.float64) for x in inputs]
    wanted = their_call(theirs, *tensors)
    towards = array(*wanted.shape, seed=9)
    theirs.zero_grad()
    wanted.backward(torch.tensor(towards))
    got, gradients, input_gradients = run(params, [jnp.asarray(x) for x in inputs], towards)
    assert error(got, wanted) <= OUTPUT
    gradients = convert.export(nnx.to_pure_dict(gradients))
    named = {k: p.grad for k, p in theirs.named_parameters()}
    assert set(gradients) == set(named)
    floor = 1e-6 * max(float(g.abs().max()) for g in named.values())
    for key, gradient in named.items():
        assert error(gradients[key], gradient, floor) <= GRADIENT, key
    for mine, tensor in zip(input_gradients, tensors, strict=True):
        if tensor.requires_grad:
            assert error(mine, tensor.grad, floor) <= GRADIENT
    return got


def torch_attention(need_weights):
    def call(model, *inputs, mask=None):
        mask = None if mask is None else torch.tensor(mask)
        return model(
            *inputs, attn_mask=mask, need_weights=need_weights, average_attn_weights=False
        )

    return call


HIDES = np.random.default_rng(1).random((5, 7)) < 0.4
HIDES[:, 0] = False
MASKS = {"none": None, "boolean": HIDES, "additive": array(5, 7, seed=2)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("widths", [{}, dict(kdim=5, vdim=9), dict(bias=False)], ids=str)
def test_multi_head_attention_is_pytorchs(widths, mask):
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **widths)
    ours = ported(flax_nets.MultiHeadAttention(WIDTH, HEADS, rngs=None, **widths), theirs)
    mirror = reference.MultiHeadAttention(WIDTH, HEADS, **widths).double().eval()
    mirror.load_state_dict(theirs.state_dict(), strict=True)
    kdim, vdim = widths.get("kdim", WIDTH), widths.get("vdim", WIDTH)
    inputs = array(2, 5, WIDTH), array(2, 7, kdim, seed=1), array(2, 7, vdim, seed=2)
    mask = MASKS[mask]
    masks = {} if mask is None else {"mask": mask}
    for model, call in ((theirs, torch_attention(False)), (mirror, None)):
        their_call = call and (lambda m, *x, call=call: call(m, *x, mask=mask)[0])
        compare(ours, model, inputs, their_call=their_call, **masks)
    _, weights = ours(*map(jnp.asarray, inputs), **masks, need_weights=True)
    wanted = torch_attention(True)(theirs, *map(torch.tensor, inputs), mask=mask)[1]
    assert weights.shape == (2, HEADS, 5, 7)
    assert error(weights, wanted) <= OUTPUT


@pytest.mark.parametrize("mask", [HIDES, array(2, HEADS, 5, 7, seed=3)], ids=["boolean", "additive"])
def test_head_sizes_score_weights_and_masks_of_each_head(mask):
    sizes = dict(head_dim=5, value_head_dim=2, qkv_bias=False)
    theirs = reference.MultiHeadAttention(WIDTH, HEADS, **sizes)
    ours = ported(flax_nets.MultiHeadAttention(WIDTH, HEADS, rngs=None, **sizes), theirs)
    assert ours.in_proj_kernel.shape == (WIDTH, HEADS * (5 + 5 + 2))
    inputs = array(2, 5, WIDTH), array(2, 7, WIDTH, seed=1)
    weights = array(2, 1, 5, 7, seed=4)
    compare(ours, theirs, inputs, mask=mask, score_weights=weights)


def test_score_weights_come_before_the_mask():
    q, k, v = (jnp.asarray(array(1, 1, n, 4, seed=n)) for n in (2, 3, 3))
    factors, mask = jnp.asarray(array(2, 3, seed=5)), jnp.asarray(array(2, 3, seed=6))
    scores = np.asarray(q[0, 0] @ k[0, 0].T) / 2 * np.asarray(factors) + np.asarray(mask)
    wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out, weights = attention.scaled_dot_product(q, k, v, mask, factors)
    assert error(weights[0, 0], wanted) <= OUTPUT
    assert error(out[0, 0], wanted @ np.asarray(v[0, 0])) <= OUTPUT


@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_sees_nothing_attends_to_nothing(additive):
    """As PyTorch has it without weights, gradients included; the others are untouched."""
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours = ported(flax_nets.MultiHeadAttention(WIDTH, HEADS, rngs=None), theirs)
    mask = HIDES.copy()
    mask[2] = True
    if additive:
        mask = np.where(mask, -np.inf, 0.0)
    inputs = array(2, 5, WIDTH), array(2, 7, WIDTH, seed=1), array(2, 7, WIDTH, seed=2)
    call = torch_attention(False)
    got = compare(
        ours, theirs, inputs, their_call=lambda m, *x: call(m, *x, mask=mask)[0], mask=mask
    )
    assert error(got[:, 2], np.broadcast_to(ours.out_proj.bias[...], (2, WIDTH))) <= OUTPUT
    _, weights = ours(*map(jnp.asarray, inputs), mask=jnp.asarray(mask), need_weights=True)
    np.testing.assert_array_equal(weights[:, :, 2], 0.0)
    np.testing.assert_allclose(weights[:, :, 3].sum(-1), 1.0, rtol=1e-12)


BLOCKED = {
    "local": ("LocalAttention", dict(window=3)),
    "local-self": ("LocalAttention", dict(window=0)),
    "local-wide": ("LocalAttention", dict(window=40)),
    "strided": ("SparseAttention", dict(pattern="strided", stride=4)),
    "strided-root": ("SparseAttention", dict(pattern="strided")),
    "fixed": ("SparseAttention", dict(pattern="fixed", stride=4, summaries=2)),
    "fixed-root": ("SparseAttention", dict(pattern="fixed")),
}


@pytest.mark.parametrize("length", [1, 12, 14])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_are_dense_attention_under_the_mask(name, causal, length):
    cls, arguments = BLOCKED[name]
    dense = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    made = getattr(flax_nets, cls)(WIDTH, HEADS, causal=causal, rngs=None, **arguments)
    ours = ported(made, dense)
    twin = getattr(reference, cls)(WIDTH, HEADS, causal=causal, **arguments).double().eval()
    twin.load_state_dict(dense.state_dict(), strict=True)
    x = array(2, length, WIDTH)
    mask = twin.mask(length)
    np.testing.assert_array_equal(ours.mask(length), mask)
    call = torch_attention(False)
    compare(ours, dense, [x], their_call=lambda m, x: call(m, x, x, x, mask=mask.numpy())[0])
    with torch.no_grad():
        assert error(twin(torch.tensor(x)), call(dense, *[torch.tensor(x)] * 3, mask=mask.numpy())[0]) <= OUTPUT


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_masks_are_the_papers_sets(causal):
    """Child et al. 2019, section 4.2, spelled out position by position."""
    length, step, c = 11, 4, 2
    for i in range(length):
        seen = [j for j in range(length) if j <= i or not causal]
        near = {j for j in seen if abs(i - j) <= step}
        strided = near | {j for j in seen if (i - j) % step == 0}
        fixed = {j for j in seen if i // step == j // step}
        fixed |= {j for j in seen if j % step in range(step - c, step)}
        for mask, wanted in (
            (attention.local_mask(length, step, causal), near),
            (attention.strided_mask(length, step, causal), strided),
            (attention.fixed_mask(length, step, c, causal), fixed),
        ):
            assert set(np.flatnonzero(~np.asarray(mask)[i])) == wanted
    hidden = [[j > i for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(attention.causal_mask(4), hidden)


def growth(module, short, long):
    """How many times more operations and memory the longer sequence takes."""
    graph, params = nnx.split(module)
    costs = []
    for length in (short, long):
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        run = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
        compiled = run.lower(params, x).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        costs.append(np.array([compiled.cost_analysis()["flops"], memory]))
    return costs[1] / costs[0]


def test_cost_grows_less_than_quadratically():
    """Eight times the length: 64 times the cost of dense attention, 8 of local, 8^1.5 of sparse."""
    arguments = dict(rngs=nnx.Rngs(0))
    assert (growth(flax_nets.MultiHeadAttention(8, 2, **arguments), 256, 2048) > 45).all()
    local = flax_nets.LocalAttention(8, 2, window=8, **arguments)
    assert (growth(local, 256, 2048) < 8.5).all()
    for pattern in ("strided", "fixed"):
        sparse = flax_nets.SparseAttention(8, 2, pattern, **arguments)
        assert (growth(sparse, 256, 2048) < 8**1.5 * 1.1).all()


def test_fused_attention_gets_what_ours_gets(monkeypatch):
    """Its own implementation in place of cuDNN's: layouts, mask and hidden rows."""
    ours = flax_nets.MultiHeadAttention(16, 2, fused=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x, memory = (jnp.asarray(array(2, n, 16), jnp.bfloat16) for n in (5, 7))
    mask = HIDES.copy()
    mask[2] = True
    wanted = [ours(x, memory), ours(x, memory, mask=jnp.asarray(mask))]
    calls, plain = [], jax.nn.dot_product_attention

    def fused(*inputs, implementation, **arguments):
        calls.append(implementation)
        return plain(*inputs, implementation="xla", **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = [ours(x, memory), ours(x, memory, mask=jnp.asarray(mask))]
    assert calls == ["cudnn", "cudnn"]
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) <= 2**-6  # two roundings of 8 bits
    ours(x, memory, mask=jnp.asarray(array(5, 7)))
    ours(x, memory, need_weights=True)
    ours(x, memory, score_weights=jnp.ones((5, 7)))
    assert len(calls) == 2


SMALL = dict(
    d_model=WIDTH, nhead=HEADS, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=20
)


@pytest.mark.parametrize(
    "arguments", [{}, dict(norm_first=True, activation="gelu", layer_norm_eps=1e-3)], ids=str
)
def test_transformer_is_pytorchs(arguments):
    theirs = torch.nn.Transformer(**SMALL, **arguments, dropout=0.0, batch_first=True)
    ours = ported(flax_nets.transformer_base(**SMALL, **arguments, rngs=None), theirs)
    twin = reference.transformer_base(**SMALL, **arguments).double().eval()
    twin.load_state_dict(theirs.state_dict(), strict=True)
    inputs = array(2, 6, WIDTH), array(2, 4, WIDTH, seed=1)
    padding = np.zeros((2, 6), bool)
    padding[1, 4:] = True
    source = padding[:, None, None]
    causal = np.asarray(attention.causal_mask(4))

    def their_call(model, src, tgt):
        hidden = torch.tensor(padding)
        return model(
            src,
            tgt,
            tgt_mask=torch.tensor(causal),
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
        )

    masks = dict(src_mask=source, tgt_mask=causal, memory_mask=source)
    theirs.train()  # its eval mode is another code; nothing is dropped
    compare(ours, theirs, inputs, their_call=their_call, **masks)
    compare(ours, twin, inputs, **masks)


@pytest.mark.parametrize(
    "arguments",
    [dict(share_embeddings=True, final_norm=False), dict(tgt_vocab_size=7)],
    ids=["shared", "own"],
)
def test_transformer_of_tokens(arguments):
    arguments = dict(SMALL, vocab_size=9, **arguments)
    theirs = reference.Transformer(**arguments)
    ours = ported(flax_nets.Transformer(**arguments, rngs=None), theirs)
    draw = np.random.default_rng(0)
    inputs = draw.integers(0, 9, (2, 6)), draw.integers(0, 7, (2, 4))

    def call(model, src, tgt):
        return model(src, tgt, tgt_mask=attention.causal_mask(4))

    graph, params, rest = nnx.split(ours, nnx.Param, ...)
    wanted = theirs(*map(torch.tensor, inputs), tgt_mask=reference.causal_mask(4))
    towards = array(*wanted.shape)
    wanted.backward(torch.tensor(towards))
    got, back = jax.vjp(
        jax.jit(lambda p: call(nnx.merge(graph, p, rest), *map(jnp.asarray, inputs))), params
    )
    assert error(got, wanted) <= OUTPUT
    gradients = convert.export(nnx.to_pure_dict(back(jnp.asarray(towards))[0]))
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    floor = 1e-6 * max(float(p.grad.abs().max()) for p in named.values())
    for key, parameter in named.items():
        assert error(gradients[key], parameter.grad, floor) <= GRADIENT, key


def test_no_position_of_the_target_sees_a_later_one():
    model = flax_nets.Transformer(
        **SMALL, vocab_size=9, share_embeddings=True, rngs=nnx.Rngs(0)
    )
    set_mode(model, train=False)
    src, tgt = jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6, 7]])
    mask = attention.causal_mask(4)
    before, after = (model(src, t, tgt_mask=mask) for t in (tgt, tgt.at[0, 2].set(0)))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).any(-1).all()


def test_positions_are_the_papers():
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    for width in (8, 7):
        table = attention.sinusoidal_positions(5, width)
        np.testing.assert_array_equal(table, reference.sinusoidal_positions(5, width))
        for position in range(5):
            for k in range(width):
                angle = position / 10000 ** ((k - k % 2) / width)
                wanted = np.cos(angle) if k % 2 else np.sin(angle)
                assert abs(table[position, k] - wanted) < 1e-15


@pytest.mark.parametrize(("name", "paper"), [("transformer_base", 65), ("transformer_big", 213)])
def test_sizes_of_table_3(name, paper):
    """Millions of parameters with a vocabulary of 37,000; the table's own count is a little more."""
    assert attention.TRANSFORMERS == reference.TRANSFORMERS
    of_paper = dict(final_norm=False, vocab_size=37000, share_embeddings=True)
    with torch.device("meta"):
        twin = getattr(reference, name)(**of_paper)
        theirs = torch.nn.Transformer(**{**attention.TRANSFORMERS[name], "batch_first": True})
    ours = getattr(attention, name)(**of_paper, rngs=None)
    shapes = {e.key: e.torch_shape for e in convert.rules.entries(ours)}
    assert shapes == {k: tuple(v.shape) for k, v in twin.state_dict().items()}
    count = sum(p.numel() for p in twin.parameters())
    norms = 4 * theirs.d_model
    assert count == sum(p.numel() for p in theirs.parameters()) - norms + 37000 * theirs.d_model
    assert 0.96 * paper < count / 1e6 < paper
    assert len(ours.encoder.layers) == len(ours.decoder.layers) == 6


def test_initial_values_are_pytorchs():
    """Each tensor's distribution: the same deviation as nn.Transformer's, zeros where it has them."""
    sizes = dict(SMALL, d_model=96, dim_feedforward=192)
    theirs = torch.nn.Transformer(**sizes).state_dict()
    ours = convert.export(flax_nets.Transformer(**sizes, rngs=nnx.Rngs(0)))
    for key, value in theirs.items():
        spread, wanted = float(ours[key].std()), float(value.std(correction=0))
        assert abs(spread - wanted) <= 0.15 * wanted, key
    table = attention.Embedding(100, 64, rngs=nnx.Rngs(0)).embedding[...]
    assert abs(float(table.std()) * 8 - 1) < 0.05


def test_dropout_falls_on_the_weights_and_only_in_train_mode():
    for model in (
        flax_nets.MultiHeadAttention(WIDTH, HEADS, dropout=0.5, rngs=nnx.Rngs(0)),
        flax_nets.LocalAttention(WIDTH, HEADS, window=2, dropout=0.5, rngs=nnx.Rngs(0)),
        flax_nets.SparseAttention(WIDTH, HEADS, dropout=0.5, rngs=nnx.Rngs(0)),
    ):
        x = jnp.asarray(array(1, 6, WIDTH), jnp.float32)
        assert (model(x) != model(x)).any()
        model.eval()
        np.testing.assert_array_equal(model(x), model(x))


def test_bfloat16_stays_bfloat16():
    model = flax_nets.Transformer(**SMALL, rngs=nnx.Rngs(0))
    set_mode(model, train=False)
    flax_nets.create.set_dtype(model, jnp.bfloat16)
    src, tgt = (jnp.asarray(array(1, n, WIDTH), jnp.float32) for n in (6, 4))
    assert model(src, tgt, tgt_mask=attention.causal_mask(4)).dtype == jnp.bfloat16
    for cls, arguments in BLOCKED.values():
        made = getattr(flax_nets, cls)(
            WIDTH, HEADS, **arguments, rngs=nnx.Rngs(0), dtype=jnp.bfloat16
        )
        assert made(src).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: flax_nets.MultiHeadAttention(10, 3, rngs=None), "num_heads=3"),
        (lambda: flax_nets.LocalAttention(WIDTH, HEADS, -1, rngs=None), "got -1"),
        (lambda: flax_nets.SparseAttention(WIDTH, HEADS, "random", rngs=None), "'random'"),
        (lambda: flax_nets.SparseAttention(WIDTH, HEADS, stride=0, rngs=None), "got 0"),
        (
            lambda: flax_nets.SparseAttention(WIDTH, HEADS, stride=4, summaries=5, rngs=None),
            "summaries=5",
        ),
        (lambda: flax_nets.Transformer(activation="tanh", rngs=None), "'tanh'"),
        (lambda: flax_nets.Transformer(num_encoder_layers=0, rngs=None), "num_encoder_layers=0"),
        (lambda: flax_nets.Transformer(share_embeddings=True, rngs=None), "vocab_size=None"),
        (lambda: flax_nets.Transformer(tgt_vocab_size=5, rngs=None), "tgt_vocab_size=5"),
        (
            lambda: flax_nets.Transformer(**SMALL, rngs=nnx.Rngs(0))(
                jnp.zeros((1, 3, 5)), jnp.zeros((1, 3, WIDTH))
            ),
            r"\(1, 3, 5\)",
        ),
        (
            lambda: flax_nets.Transformer(**SMALL, vocab_size=5, rngs=nnx.Rngs(0))(
                jnp.zeros((1, 3)), jnp.zeros((1, 3))
            ),
            "integers",
        ),
    ],
)
def test_mistakes_are_shown(make, shown):
    with pytest.raises(ValueError, match=shown):
        make()
