"""Attention and the Transformer against torch.nn, their twins and each other, in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
import flax_nets
from benchmarks.attention import kinds, measure
from benchmarks.compare import GRADIENT, OUTPUT, error, quick_jit, randomise, state_dict
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


def twin_of(twin, theirs):
    twin.double().eval().load_state_dict(theirs.state_dict(), strict=True)
    return twin


def compare(ours, references, inputs, **masks):
    """Outputs, and the gradients of every parameter and every input that has one.

    References: (a PyTorch model, how it is called or None for as ours is).
    """
    graph, params, rest = nnx.split(ours, nnx.Param, ...)
    arrays = {k: jnp.asarray(m) for k, m in masks.items()}
    floats = [i for i, x in enumerate(inputs) if x.dtype == np.float64]

    def run(params, floating):
        def call(params, floating):
            given = [jnp.asarray(x) for x in inputs]
            for i, x in zip(floats, floating, strict=True):
                given[i] = x
            return nnx.merge(graph, params, rest)(*given, **arrays)

        out, back = jax.vjp(call, params, floating)
        return out, *back(jnp.asarray(array(*out.shape, seed=9)))

    run = quick_jit(run)
    got, gradients, input_gradients = run(params, [jnp.asarray(inputs[i]) for i in floats])
    gradients = convert.export(nnx.to_pure_dict(gradients))
    for model, call in references:
        tensors = [torch.tensor(x, requires_grad=x.dtype == np.float64) for x in inputs]
        if call is None:
            wanted = model(*tensors, **{k: torch.tensor(m) for k, m in masks.items()})
        else:
            wanted = call(model, *tensors)
        wanted.backward(torch.tensor(array(*wanted.shape, seed=9)))
        assert error(got, wanted) <= OUTPUT
        named = {k: p.grad for k, p in model.named_parameters()}
        assert set(gradients) == set(named)
        floor = 1e-6 * max(float(g.abs().max()) for g in named.values())
        for key, gradient in named.items():
            assert error(gradients[key], gradient, floor) <= GRADIENT, key
        for mine, i in zip(input_gradients, floats, strict=True):
            assert error(mine, tensors[i].grad, floor) <= GRADIENT
    return got


def torch_attention(mask=None):
    """nn.MultiheadAttention's output, without weights."""
    mask = None if mask is None else torch.tensor(np.asarray(mask))

    def call(model, query, key=None, value=None):
        key = query if key is None else key
        value = key if value is None else value
        return model(query, key, value, attn_mask=mask, need_weights=False)[0]

    return call


HIDES = np.random.default_rng(1).random((5, 7)) < 0.4
HIDES[:, 0] = False


@pytest.mark.parametrize(
    ("widths", "mask"),
    [
        ({}, None),
        ({}, HIDES),
        (dict(kdim=5, vdim=9), array(5, 7, seed=2)),
        (dict(bias=False, vdim=9), HIDES),
    ],
    ids=["plain", "boolean", "widths-additive", "no-bias"],
)
def test_multi_head_attention_is_pytorchs(widths, mask):
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **widths)
    ours = ported(flax_nets.MultiHeadAttention(WIDTH, HEADS, rngs=None, **widths), theirs)
    twin = twin_of(reference.MultiHeadAttention(WIDTH, HEADS, **widths), theirs)
    kdim, vdim = widths.get("kdim", WIDTH), widths.get("vdim", WIDTH)
    inputs = array(2, 5, WIDTH), array(2, 7, kdim, seed=1), array(2, 7, vdim, seed=2)
    masks = {} if mask is None else {"mask": mask}
    compare(ours, [(theirs, torch_attention(mask)), (twin, None)], inputs, **masks)
    weights = quick_jit(lambda *x: ours(*x, **masks, need_weights=True)[1])(*inputs)
    mask = None if mask is None else torch.tensor(mask)
    _, wanted = theirs(*map(torch.tensor, inputs), attn_mask=mask, average_attn_weights=False)
    assert weights.shape == (2, HEADS, 5, 7)
    assert error(weights, wanted) <= OUTPUT


@pytest.mark.parametrize(
    "mask", [HIDES, array(2, HEADS, 5, 7, seed=3)], ids=["boolean", "additive"]
)
def test_head_sizes_score_weights_and_masks_of_each_head(mask):
    sizes = dict(head_dim=5, value_head_dim=2, qkv_bias=False)
    theirs = reference.MultiHeadAttention(WIDTH, HEADS, **sizes)
    ours = ported(flax_nets.MultiHeadAttention(WIDTH, HEADS, rngs=None, **sizes), theirs)
    assert ours.in_proj_kernel.shape == (WIDTH, HEADS * (5 + 5 + 2))
    inputs = array(2, 5, WIDTH), array(2, 7, WIDTH, seed=1)
    weights = array(2, 1, 5, 7, seed=4)
    compare(ours, [(theirs, None)], inputs, mask=mask, score_weights=weights)


def test_score_weights_come_before_the_mask():
    q, k, v = (jnp.asarray(array(1, 1, n, 4, seed=n)) for n in (2, 3, 3))
    factors, mask = jnp.asarray(array(2, 3, seed=5)), jnp.asarray(array(2, 3, seed=6))
    scores = np.asarray(q[0, 0] @ k[0, 0].T) / 2 * np.asarray(factors) + np.asarray(mask)
    wanted = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out, weights = attention.scaled_dot_product(q, k, v, mask, factors)
    assert error(weights[0, 0], wanted) <= OUTPUT
    assert error(out[0, 0], wanted @ np.asarray(v[0, 0])) <= OUTPUT


@pytest.mark.parametrize("scale", [1, 1000])
def test_answers_and_gradients_of_a_softmax_s_product(scale):
    """Its sums divide late where only an answer is asked for, and first for a gradient."""
    scores, value = jnp.asarray(array(2, 3, 5, 7) * scale), jnp.asarray(array(2, 3, 7, 4, seed=1))

    def plain(scores, value):
        return jax.nn.softmax(scores, -1) @ value

    def slopes(product):
        return jax.grad(lambda *a: jnp.sin(product(*a)).sum(), (0, 1))

    def curve(product):
        return jax.grad(lambda *a: sum(jnp.square(g).sum() for g in slopes(product)(*a)), (0, 1))

    for of, limit in ((lambda product: product, OUTPUT), (slopes, GRADIENT), (curve, GRADIENT)):
        got, want = (jax.tree.leaves(of(f)(scores, value)) for f in (attention.attended, plain))
        for one, other in zip(got, want, strict=True):
            assert error(one, other) <= limit


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
    twin = twin_of(reference.MultiHeadAttention(WIDTH, HEADS), theirs)
    got = compare(ours, [(theirs, torch_attention(mask)), (twin, None)], inputs, mask=mask)
    assert error(got[:, 2], np.broadcast_to(ours.out_proj.bias[...], (2, WIDTH))) <= OUTPUT
    weights = quick_jit(lambda *x: ours(*x, mask=jnp.asarray(mask), need_weights=True)[1])(*inputs)
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


def blocked(name, causal, dense):
    """The module and its twin with the numbers of a dense attention."""
    cls, arguments = BLOCKED[name]
    ours = getattr(flax_nets, cls)(WIDTH, HEADS, causal=causal, rngs=None, **arguments)
    twin = getattr(reference, cls)(WIDTH, HEADS, causal=causal, **arguments)
    return ported(ours, dense), twin_of(twin, dense)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("name", ["local", "strided", "fixed"])
def test_blocks_are_dense_attention_under_the_mask(name, causal):
    dense = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    ours, twin = blocked(name, causal, dense)
    mask = np.asarray(ours.mask(14))  # no multiple of any block: padding inside
    assert mask.sum() > 0
    np.testing.assert_array_equal(mask, twin.mask(14))
    compare(ours, [(dense, torch_attention(mask)), (twin, None)], [array(2, 14, WIDTH)])


@pytest.mark.parametrize("length", [1, 12])
def test_every_kind_of_block_at_other_lengths(length):
    dense = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    pairs = [blocked(name, causal, dense) for name in BLOCKED for causal in (False, True)]
    x = array(2, length, WIDTH)
    outputs = quick_jit(lambda x: [ours(x) for ours, _ in pairs])(jnp.asarray(x))
    x = torch.tensor(x)
    with torch.no_grad():
        for (ours, twin), output in zip(pairs, outputs, strict=True):
            wanted = torch_attention(ours.mask(length))(dense, x)
            assert error(output, wanted) <= OUTPUT
            assert error(twin(x), wanted) <= OUTPUT


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


def test_cost_grows_less_than_quadratically():
    """Operations and memory of a gradient at eight times the length.

    64 times those of dense attention, 8 of local, and 8^1.5 = 22.6 of sparse attention.
    """
    short, long = 256, 2048
    growth = {
        name: np.divide(*(measure(module, length, 8, runs=0)[:2] for length in (long, short)))
        for name, module in kinds(width=8, heads=2, window=8).items()
    }
    assert (growth.pop("dense") > 40).all()
    assert (growth.pop("local, window 8") < 10).all()
    assert set(growth) == {"sparse, strided", "sparse, fixed"}
    for name, times in growth.items():
        assert (times < 8**1.5 * 1.15).all(), (name, times)


def test_fused_attention_gets_what_ours_gets(monkeypatch):
    """Its own implementation in place of cuDNN's: layouts, mask and hidden rows."""
    ours = flax_nets.MultiHeadAttention(16, 2, fused=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x, memory = (jnp.asarray(array(2, n, 16), jnp.bfloat16) for n in (5, 7))
    mask = HIDES.copy()
    mask[2] = True
    wanted = [ours(x, memory), ours(x, memory, mask=jnp.asarray(mask))]
    calls, plain = [], jax.nn.dot_product_attention

    def fused(*inputs, mask, implementation):
        assert mask is None or mask.any(-1).all()  # NaN in cuDNN's gradient
        calls.append(implementation)
        return plain(*inputs, mask=mask, implementation="xla")

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


def test_fused_attention_of_odd_length_has_our_gradient(monkeypatch):
    """cuDNN has none."""
    ours = flax_nets.MultiHeadAttention(16, 2, fused=True, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    mask = HIDES.copy()
    mask[2] = True
    x, memory = (jnp.asarray(array(2, n, 16), jnp.bfloat16) for n in (5, 7))

    def gradients(mask):
        return jax.grad(lambda x: jnp.sin(ours(x, memory, mask=mask)).sum(dtype=jnp.float32))(x)

    masks = None, jnp.asarray(mask)
    wanted = [gradients(mask) for mask in masks]
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for mask, gradient in zip(masks, wanted, strict=True):
        assert error(gradients(mask), gradient) <= 2**-6


def test_the_twin_s_fused_attention():
    arguments = dict(head_dim=4, qkv_bias=True)
    one, other = (reference.MultiHeadAttention(8, 2, fused=f, **arguments) for f in (True, False))
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 5, 8)
    assert error(one(x), other(x)) <= 1e-6


SMALL = dict(
    d_model=WIDTH, nhead=HEADS, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=20
)


def torch_transformer(**arguments):
    with warnings.catch_warnings():  # about speed, for an odd number of heads and norms first
        warnings.filterwarnings("ignore", ".*enable_nested_tensor.*")
        return torch.nn.Transformer(**arguments, batch_first=True)


@pytest.mark.parametrize(
    "arguments", [{}, dict(norm_first=True, activation="gelu", layer_norm_eps=1e-3)], ids=str
)
def test_transformer_is_pytorchs(arguments):
    theirs = torch_transformer(**SMALL, **arguments, dropout=0.0)
    ours = ported(flax_nets.transformer_base(**SMALL, **arguments, rngs=None), theirs)
    twin = twin_of(reference.transformer_base(**SMALL, **arguments), theirs)
    inputs = array(2, 6, WIDTH), array(2, 4, WIDTH, seed=1)
    padding = np.zeros((2, 6), bool)
    padding[1, 4:] = True
    source = padding[:, None, None]
    causal = np.asarray(attention.causal_mask(4))

    def call(model, src, tgt):
        hidden = torch.tensor(padding)
        named = dict(src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return model(src, tgt, tgt_mask=torch.tensor(causal), **named)

    theirs.train()  # its eval mode is other code, and nothing is dropped
    masks = dict(src_mask=source, tgt_mask=causal, memory_mask=source)
    compare(ours, [(theirs, call), (twin, None)], inputs, **masks)


@pytest.mark.parametrize(
    "arguments",
    [dict(share_embeddings=True, final_norm=False), dict(tgt_vocab_size=7)],
    ids=["shared", "own"],
)
def test_transformer_of_tokens(arguments):
    arguments = SMALL | dict(num_encoder_layers=1, num_decoder_layers=1, vocab_size=9) | arguments
    theirs = reference.Transformer(**arguments)
    ours = ported(flax_nets.Transformer(**arguments, rngs=None), theirs)
    draw = np.random.default_rng(0)
    inputs = draw.integers(0, 9, (2, 6)), draw.integers(0, 7, (2, 4))

    compare(ours, [(theirs, None)], inputs, tgt_mask=np.asarray(attention.causal_mask(4)))


def test_no_position_of_the_target_sees_a_later_one():
    model = flax_nets.Transformer(**SMALL, vocab_size=9, share_embeddings=True, rngs=nnx.Rngs(0))
    set_mode(model, train=False)
    src, tgt = jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6, 7]])
    mask = attention.causal_mask(4)
    run = quick_jit(lambda tgt: model(src, tgt, tgt_mask=mask))
    before, after = run(tgt), run(tgt.at[0, 2].set(0))
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
    """Millions of parameters with the vocabulary of 37,000 that the paper gives as "about"."""
    assert attention.TRANSFORMERS == reference.TRANSFORMERS
    of_paper = dict(final_norm=False, vocab_size=37000, share_embeddings=True)
    with torch.device("meta"):
        twin = getattr(reference, name)(**of_paper)
        theirs = torch_transformer(**attention.TRANSFORMERS[name])
    ours = getattr(attention, name)(**of_paper, rngs=None)
    shapes = {e.key: e.torch_shape for e in convert.rules.entries(ours)}
    assert shapes == {k: tuple(v.shape) for k, v in twin.state_dict().items()}
    count = sum(p.numel() for p in twin.parameters())
    norms = 4 * theirs.d_model
    assert count == sum(p.numel() for p in theirs.parameters()) - norms + 37000 * theirs.d_model
    assert abs(count / 1e6 - paper) < 0.03 * paper
    assert len(ours.encoder.layers) == len(ours.decoder.layers) == 6


def test_initial_values_are_pytorchs():
    """Each tensor has the deviation of nn.Transformer's, and zeros where it has them."""
    sizes = dict(SMALL, d_model=96, dim_feedforward=192)
    theirs = torch_transformer(**sizes).state_dict()
    ours = convert.export(flax_nets.Transformer(**sizes, rngs=nnx.Rngs(0)))
    for key, value in theirs.items():
        spread, wanted = float(ours[key].std()), float(value.std(correction=0))
        assert abs(spread - wanted) <= 0.15 * wanted, key
    table = attention.Embedding(100, 64, rngs=nnx.Rngs(0)).embedding[...]
    assert abs(float(table.std()) * 8 - 1) < 0.05


def test_dropout_falls_on_the_weights_and_only_in_train_mode():
    arguments = dict(dropout=0.5, rngs=nnx.Rngs(0))
    models = (
        flax_nets.MultiHeadAttention(WIDTH, HEADS, **arguments),
        flax_nets.LocalAttention(WIDTH, HEADS, window=2, **arguments),
    )
    x = jnp.asarray(array(1, 6, WIDTH), jnp.float32)
    run = nnx.jit(lambda models, x: [model(x) for model in models])
    dropped = run(models, x)
    for model in models:
        model.eval()
    for a, b in zip(dropped, run(models, x), strict=True):
        assert (a != b).any()


def test_bfloat16_stays_bfloat16():
    model = flax_nets.Transformer(**SMALL, rngs=nnx.Rngs(0))
    set_mode(model, train=False)
    flax_nets.create.set_dtype(model, jnp.bfloat16)
    src, tgt = (jnp.asarray(array(1, n, WIDTH), jnp.float32) for n in (6, 4))
    run = jax.eval_shape(lambda *x: model(*x, tgt_mask=attention.causal_mask(4)), src, tgt)
    assert run.dtype == jnp.bfloat16
    for cls, arguments in BLOCKED.values():
        given = dict(rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **arguments)
        graph, params = nnx.split(getattr(flax_nets, cls)(WIDTH, HEADS, **given))
        out = jax.eval_shape(lambda p, x, graph=graph: nnx.merge(graph, p)(x), params, src)
        assert out.dtype == jnp.bfloat16


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
