"""How the cost of attention grows with the length: dense, local and sparse.

    python -m benchmarks.attention                    # lengths 512 to 4096
    python -m benchmarks.attention --lengths 256 1024 --width 64 --heads 4 --window 32

Per kind and length: operations and memory of the compiled gradient (forward and backward pass) as
XLA counts them, memory being what is held at once beyond parameters, input and gradients, and the
best time of `--runs`. The forward pass alone would not do: on a CPU XLA may fuse dense attention
into one operation whose scratch memory it does not count. Below each kind, how many times more the
longest takes than the shortest.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import jaxlib
from flax import nnx

import flax_nets


def kinds(width: int, heads: int, window: int) -> dict[str, nnx.Module]:
    arguments = dict(rngs=nnx.Rngs(0))
    return {
        "dense": flax_nets.MultiHeadAttention(width, heads, **arguments),
        f"local, window {window}": flax_nets.LocalAttention(width, heads, window, **arguments),
        "sparse, strided": flax_nets.SparseAttention(width, heads, "strided", **arguments),
        "sparse, fixed": flax_nets.SparseAttention(width, heads, "fixed", **arguments),
    }


def measure(module: nnx.Module, length: int, width: int, runs: int) -> tuple[float, float, float]:
    """(GFLOP, MB, ms) of one sequence [1, length, width] in float32; `runs=0`: no time (NaN)."""
    graph, params = nnx.split(module)
    x = jax.random.normal(jax.random.key(0), (1, length, width), jnp.float32)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params)(x)).sum()

    run = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    best = float("inf") if runs else float("nan")
    for _ in range(runs and runs + 1):  # the first one warms up, and is never the best
        start = time.perf_counter()
        jax.block_until_ready(run(params, x))
        best = min(best, time.perf_counter() - start)
    memory = run.memory_analysis().temp_size_in_bytes
    return run.cost_analysis()["flops"] / 1e9, memory / 1e6, best * 1e3


def table(
    lengths: list[int], width: int = 64, heads: int = 4, window: int = 32, runs: int = 3
) -> list[str]:
    """Markdown lines."""
    lines = [
        "| attention | length | GFLOP | memory, MB | time, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, module in kinds(width, heads, window).items():
        found = [measure(module, length, width, runs) for length in lengths]
        for length, numbers in zip(lengths, found, strict=True):
            lines.append(f"| {name} | {length} | " + " | ".join(f"{n:.3g}" for n in numbers) + " |")
        ratios = [last / first for first, last in zip(found[0], found[-1], strict=True)]
        shown = " | ".join(f"x {r:.1f}" for r in ratios)
        lines.append(f"| *growth* | x {lengths[-1] / lengths[0]:g} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, jaxlib {jaxlib.__version__}\n")
    print("\n".join(table(given.lengths, given.width, given.heads, given.window, given.runs)))


if __name__ == "__main__":
    main()
