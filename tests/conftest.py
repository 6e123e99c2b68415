"""Everything is compared in float64, with JAX's strictest rules for types and shapes."""

import jax
import pytest
import torch

from flax_nets import processor
from flax_nets.lowering import select

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def narrow_vectors(monkeypatch):
    """As on a processor without AVX-512, where some forms are others."""
    yield from _vectors(monkeypatch, wide=False)


@pytest.fixture
def wide_vectors(monkeypatch):
    """As on a processor with AVX-512."""
    yield from _vectors(monkeypatch, wide=True)


@pytest.fixture
def halved_vectors(monkeypatch):
    """As on one that computes AVX-512 in two halves."""
    yield from _vectors(monkeypatch, wide=True, halves=True)


def _vectors(monkeypatch, wide, halves=False):
    monkeypatch.setattr(select, "wide_vectors", lambda: wide)
    monkeypatch.setattr(processor, "halves", lambda: halves)
    jax.clear_caches()
    yield
    jax.clear_caches()
