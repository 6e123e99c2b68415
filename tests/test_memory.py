"""Memory kept between the steps of a program."""

import os
import subprocess
import sys

import pytest

import flax_nets

STEPS = """
import resource
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
print(min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is glibc under Linux")
def test_pages_are_kept():
    def faults(keep: str) -> int:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "FLAX_NETS_KEEP_MEMORY": keep}
        command = [sys.executable, "-c", STEPS]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert faults("1") < faults("0") / 10


@pytest.mark.parametrize(
    "environment",
    [{"FLAX_NETS_KEEP_MEMORY": "0"}, {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "1"}, {"JAX_PLATFORMS": ""}],
)
def test_memory_is_left_alone(environment, monkeypatch):
    """On request, and beside a plugin for other devices."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not flax_nets.keep_memory()
