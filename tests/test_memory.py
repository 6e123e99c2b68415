"""Memory kept between the steps of a program."""

import gc
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest

import flax_nets
from flax_nets import train
from flax_nets.memory import collector_paused

STEPS = """
import json, resource
import jax, jax.numpy as jnp
import flax_nets
sums = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME")
step = jax.jit(lambda x: sums(jnp.outer(x, x)).max())  # of some 100 MiB
x = jnp.linspace(0, 1, 4096)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap may take a few steps to its highest mark: how soon is up to the order of the threads.
print(json.dumps([flax_nets.keep_memory(), min(faults() for _ in range(8))]))
"""


def run(keep: str) -> tuple[bool, int]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "FLAX_NETS_KEEP_MEMORY": keep}
    return tuple(
        json.loads(subprocess.check_output([sys.executable, "-c", STEPS], env=environment))
    )


def test_pages_are_kept():
    (kept, few), (left, many) = run("1"), run("0")
    assert not left
    assert kept == (sys.platform == "linux")
    assert few < many / 10 or not kept


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FLAX_NETS_KEEP_MEMORY", "0"), ("JAX_CPU_ENABLE_ASYNC_DISPATCH", "1"), ("JAX_PLATFORMS", "")],
)
def test_memory_is_left_alone(variable, value, monkeypatch):
    """On request, and beside a plugin for other devices."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("FLAX_NETS_KEEP_MEMORY", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert flax_nets.keep_memory() == (sys.platform == "linux")
    monkeypatch.setenv(variable, value)
    assert not flax_nets.keep_memory()


def test_collector_is_paused_while_tracing():
    """And runs afterwards, if it did before, whatever happens inside."""
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_steps_are_traced_without_the_collector():
    seen = []

    def apply(params, state, x, train=False, rngs=None):
        seen.append(gc.isenabled())
        return x @ params["kernel"], state

    optimizer = optax.sgd(0.1)
    params = {"kernel": jnp.ones((3, 2))}
    state = train.TrainState.create(params, {}, optimizer)
    batch = {"image": jnp.ones((4, 3)), "label": jnp.zeros(4, jnp.int32)}
    train.make_train_step(apply, optimizer)(state, batch)
    assert seen == [False]
    assert gc.isenabled()
