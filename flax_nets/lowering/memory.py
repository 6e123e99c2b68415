"""Memory on a CPU: kept from one step to the next."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

SETTINGS = {  # of mallopt: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    -8: 1,  # one arena for all threads
    -4: 0,  # which grows by itself, not by maps of its own for what is large
    -1: -1,  # and never shrinks
}


def keep_memory() -> bool:
    """Let the C library keep what XLA frees; call it before JAX runs anything.

    XLA's CPU backend allocates the buffers of a step at each step. From the system they come as
    pages that must be cleared first: a third of the processor's time in a MobileNet's training
    step. With this, the process keeps its memory at the highest mark, and all its threads share
    one heap. The commands that compute call it; `import flax_nets` does not.

    Returns:
      Whether there was something to do: not where the C library is another than glibc, nor where
      JAX has a GPU or a TPU to run on.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = ("libtpu", "jax_plugins")
    elsewhere = platforms != "cpu" and any(map(importlib.util.find_spec, plugins))
    if elsewhere or sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    return all(ctypes.CDLL(None).mallopt(*setting) for setting in SETTINGS.items())
