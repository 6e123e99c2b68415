"""What the machine's processor can do, as Linux tells it."""

from __future__ import annotations

import functools
import re
from pathlib import Path


@functools.cache
def features() -> str:
    """Their names in one line, e.g. "flags : fpu vme ... avx2"; empty under other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    line = re.search(r"^(flags|Features)\b.*", about, re.MULTILINE)
    return line[0] if line else ""
