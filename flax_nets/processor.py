"""What the machine's processor is and can do, as Linux tells it."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path


def name() -> str:
    """E.g. "AMD EPYC"; under other systems what Python knows."""
    found = re.search(r"^model name\s*: (.*)", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache  # asked for at every convolution that is lowered
def features() -> str:
    """Their names in one line, e.g. "flags : fpu vme ... avx2"; empty under other systems."""
    line = re.search(r"^(flags|Features)\b.*", _cpuinfo(), re.MULTILINE)
    return line[0] if line else ""


@functools.cache
def halves() -> bool:
    """Whether it computes AVX-512's 512 bits in two halves, as AMD's Zen 4 does (family 25)."""
    zen4 = r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: 25$"
    return "avx512f" in features() and bool(re.search(zen4, _cpuinfo(), re.MULTILINE))


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""
