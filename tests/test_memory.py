"""Memory kept between the steps of a program."""

import json
import os
import subprocess
import sys

STEPS = """
import json, resource, sys
from flax_nets import lowering
asked = "keep" in sys.argv and lowering.keep_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), 0).max())  # of some 100 MiB
x = jnp.linspace(0, 1, 4096)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap may take a few steps to its highest mark: how soon is up to the order of the threads.
print(json.dumps([asked, min(faults() for _ in range(8))]))
"""


def run(*arguments: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout))


def test_pages_are_kept():
    asked, faults = run("keep")
    assert asked == (sys.platform == "linux")
    assert faults < run()[1] / 10 or not asked
