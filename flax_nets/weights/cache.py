"""Where downloads are kept, and what the environment says of them."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from pathlib import Path


def home() -> Path:
    """`FLAX_NETS_HOME`, or flax_nets in `XDG_CACHE_HOME`, or ~/.cache/flax_nets.

    Weights of torchvision's lie in torchvision/, those of the hub in hub/ORG/NAME/REVISION/, files
    by address in url/. What is there is used as it is: to fetch a file anew, delete it.
    """
    own = os.environ.get("FLAX_NETS_HOME")
    if own:
        return Path(own).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "flax_nets"


def offline() -> bool:
    """Whether `FLAX_NETS_OFFLINE` forbids every request."""
    return os.environ.get("FLAX_NETS_OFFLINE", "").lower() not in ("", "0", "false", "no")


def endpoint() -> str:
    """The Hugging Face hub or, by `HF_ENDPOINT`, a mirror of it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def of_url(url: str) -> Path:
    """Where the file at an address is kept; the same name at another address is another file."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return home() / "url" / digest / file_name(url)


def file_name(url: str) -> str:
    """The last part of an address, as a name that every file system takes."""
    last = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", last).lstrip(".")[-120:] or "weights"
