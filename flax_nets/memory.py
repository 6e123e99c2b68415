"""Memory on a CPU: kept from one step to the next; and Python's collector of what is unused."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

import jax

VARIABLE = "FLAX_NETS_KEEP_MEMORY"
# of mallopt: M_MMAP_MAX, M_TRIM_THRESHOLD: one heap that grows by itself, and never shrinks
SETTINGS = {-4: 0, -1: -1}


def keep_memory() -> bool:
    """Let the C library keep what XLA frees. `import flax_nets` calls it, on a CPU under Linux.

    XLA's CPU backend allocates the buffers of a step at each step. From the system they come as
    pages that must be cleared first: a third of the processor's time in a MobileNet's training
    step. So the process keeps its memory at the highest mark; and JAX computes in the thread that
    calls it, since only the main thread's heap can hold what is large. Both concern the whole
    process, and programs that use the memory themselves between steps may want
    FLAX_NETS_KEEP_MEMORY=0. What JAX has begun before stays as it was.

    Returns:
      Whether there was something to do: not where the C library is another than glibc, nor where
      JAX has a GPU or a TPU to run on, nor where the environment says otherwise
      (JAX_CPU_ENABLE_ASYNC_DISPATCH for the calling thread).
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = ("libtpu", "jax_plugins")
    elsewhere = platforms != "cpu" and any(map(importlib.util.find_spec, plugins))
    unwanted = os.environ.get(VARIABLE) == "0" or "JAX_CPU_ENABLE_ASYNC_DISPATCH" in os.environ
    if elsewhere or unwanted or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return all(library.mallopt(*setting) for setting in SETTINGS.items())


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collector inside, as a decorator too.

    Tracing a network makes many objects that stay. The collector looks through them again and
    again for what is unused: a seventh to a third of the time of tracing.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
