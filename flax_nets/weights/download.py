"""Files from the web: resumed, checked, and whole or not there.

A file grows beside its place, under the same name and ".part", and is renamed when its length and
hash are right. Who finds it growing waits for it; who finds it given up goes on where it ended,
unless the server says that it has changed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import secrets
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from flax_nets.weights.cache import offline

try:
    import fcntl
except ImportError:  # Windows: two processes then download a file twice, and one of them wins
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30.0  # seconds without an answer
ATTEMPTS = 5  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second attempt; twice as long before each further one
CHUNK = 1 << 20
QUIET = 2.0  # seconds after which a download is mentioned where there is no terminal


class DownloadError(OSError):
    """A file that could not be had.

    Attributes: `why`, a few words, where no answer served; `status`, the last answer's, or None.
    """

    def __init__(self, message: str, why: str = "", status: int | None = None):
        super().__init__(message)
        self.why, self.status = why, status


class _TryAgain(Exception):
    """What may go better a second time; `stale`: not from where the file has grown to."""

    def __init__(self, why: str, stale: bool = False):
        super().__init__(why)
        self.stale = stale


class _Unfinished(Exception):
    """The end of all attempts; the part so far may be of use another time."""

    def __init__(self, why: str, status: int | None = None):
        super().__init__(why)
        self.why, self.status = why, status


def download(url: str, target: Path, sha256: str | None = None, token: str | None = None) -> Path:
    """Fetch a file unless it is there already; returns `target`.

    Args:
      url: http or https; redirections are followed, but not from https to http.
      target: the file's place. Without a request, what is there is taken to be right.
      sha256: its hash, or the first digits. Default: what the hub says of it, if it does.
      token: sent to this host alone.

    Raises DownloadError, which tells what to do by hand: where there is no network, for an answer
    such as 404, for a hash that differs (nothing is kept then), for a full disk.
    """
    if target.exists():
        return target
    if offline():
        raise _by_hand(url, target, "FLAX_NETS_OFFLINE forbids it")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {url}: expected an address of http or https")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = _claim(target)
    except OSError as error:
        raise _by_hand(
            url, target, f"{error}; FLAX_NETS_HOME can name another directory"
        ) from error
    if stream is None:
        return target
    part = Path(stream.name)
    kept = False
    try:
        told = _persist(url, target, stream, token)
        _check(url, stream, sha256 or told)
        stream.flush()
        os.fsync(stream.fileno())
        if fcntl is None:  # an open file cannot be renamed there
            stream.close()
        os.replace(part, target)
    except _Unfinished as error:
        kept = os.fstat(stream.fileno()).st_size > 0
        raise _by_hand(url, target, error.why, error.status) from error
    except KeyboardInterrupt:
        kept = True
        raise
    finally:
        if not kept:
            for path in (_validator_of(part), part):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take
            stream.close()
    return target


def _by_hand(url: str, target: Path, why: str, status: int | None = None) -> DownloadError:
    hint = f"It can be downloaded by hand, and put at {target}"
    return DownloadError(f"cannot download {url}: {why}. {hint}", why, status)


def _claim(target: Path) -> IO[bytes] | None:
    """The growing file, for this process alone; None where another one has finished it."""
    part = target.with_name(target.name + ".part")
    while not target.exists():
        if fcntl is None:
            return open(f"{part}.{secrets.token_hex(4)}", "x+b")
        stream = open(part, "a+b")  # noqa: SIM115, it stays open with its lock
        try:
            _lock(stream, target.name)
        except OSError:  # a file system without locks
            stream.close()
            return open(f"{part}.{secrets.token_hex(4)}", "x+b")
        with contextlib.suppress(FileNotFoundError):  # renamed by the one we waited for
            if os.path.samestat(os.stat(part), os.fstat(stream.fileno())):
                if not target.exists():
                    return stream
                part.unlink()
        stream.close()
    return None


def _lock(stream: IO[bytes], name: str) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process to download {name}", file=sys.stderr, flush=True)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _validator_of(part: Path) -> Path:
    """Beside a growing file lies what tells a changed file from the same one."""
    return part.with_name(part.name + ".etag")


def _persist(url: str, target: Path, stream: IO[bytes], token: str | None) -> str | None:
    """Fetch until the file is complete; returns the hash that the hub tells of it."""
    failures, longest = 0, 0
    while True:
        try:
            return _transfer(url, target.name, stream, token)
        except _TryAgain as error:
            if error.stale:
                stream.truncate(0)
            size = stream.seek(0, os.SEEK_END)
            failures = 1 if size > longest else failures + 1
            longest = max(size, longest)
            if failures >= ATTEMPTS:
                raise _Unfinished(f"{error}, {failures} times in a row") from error
            time.sleep(BACKOFF * 2 ** (failures - 1))


def _transfer(url: str, name: str, stream: IO[bytes], token: str | None) -> str | None:
    """One request: the rest of the file, or all of it where that is not to be had."""
    validator = _validator_of(Path(stream.name))
    size = stream.seek(0, os.SEEK_END)
    known = validator.read_text() if size and validator.exists() else ""
    headers = {"User-Agent": "flax_nets", "Accept-Encoding": "identity"}
    if known:
        headers |= {"Range": f"bytes={size}-", "If-Range": known}
    redirects = _Redirects()
    with _ask(url, headers, token, redirects) as response:
        told = redirects.told or response.headers.get("X-Linked-Etag")
        total = _length(response, size if known else 0)
        if response.status == 206:
            if _validator(response) not in ("", known) or total is None:
                raise _TryAgain("the server sent another part than was asked for", stale=True)
        else:
            size = 0
            stream.truncate(0)
            validator.write_text(_validator(response))
        with _progress(name, size, total) as advance:
            for chunk in _chunks(response):
                _write(stream, chunk)
                size += len(chunk)
                advance(len(chunk))
    if total is not None and size != total:
        raise _TryAgain(f"the connection ended after {size:,} of {total:,} bytes")
    digest = (told or "").strip('"')
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def _ask(url: str, headers: dict[str, str], token: str | None, redirects: _Redirects) -> Any:
    """The opened answer; raises _TryAgain or _Unfinished for every other outcome."""
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        why = f"the server answered {error.code} {error.reason}"
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _TryAgain(why, stale=error.code == 416) from error  # longer than the file
        raise _Unfinished(why, error.code) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = f"{reason}" or type(reason).__name__
        lasting = (socket.gaierror, ssl.SSLCertVerificationError, ConnectionRefusedError, str)
        if isinstance(reason, lasting):
            raise _Unfinished(why) from error
        raise _TryAgain(why) from error


def _chunks(response: Any) -> Iterator[bytes]:
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _TryAgain(str(error) or type(error).__name__) from error


def _write(stream: IO[bytes], chunk: bytes) -> None:
    try:
        stream.write(chunk)
        stream.flush()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; FLAX_NETS_HOME can name a directory on a larger disk" if full else ""
        raise DownloadError(f"cannot write {stream.name}: {error.strerror}{hint}") from error


def _length(response: Any, start: int) -> int | None:
    """Of the whole file; None where it is not said, or where a part begins elsewhere."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        return int(found[2]) if found and int(found[1]) == start else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _validator(response: Any) -> str:
    """What `If-Range` takes: a strong ETag, else a date, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _check(url: str, stream: IO[bytes], expected: str | None) -> None:
    stream.seek(0)
    found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    if expected and not found.startswith(expected.lower()):
        raise DownloadError(
            f"{url}: its SHA-256 is {found}, expected {expected}"
            f"{'' if len(expected) == 64 else '...'}; what came was removed"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections, keeps the token from other hosts, and hears what the hub says."""

    told: str | None = None

    def redirect_request(  # type: ignore[no-untyped-def]
        self, req, fp, code, msg, headers, newurl
    ) -> urllib.request.Request | None:
        self.told = self.told or headers.get("X-Linked-Etag")
        old, new = (urllib.parse.urlsplit(u) for u in (req.full_url, newurl))
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise urllib.error.HTTPError(newurl, code, f"({msg}) {newurl}", headers, fp)
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            made.unredirected_hdrs |= {
                k: v for k, v in req.unredirected_hdrs.items() if k == "Authorization"
            }
        return made


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that is told of each new piece, and a bar on standard error."""
    if sys.stderr.isatty():
        try:
            from rich import console, progress
        except ImportError:
            pass
        else:
            columns = (progress.TextColumn("{task.description}"), progress.BarColumn())
            figures = (progress.DownloadColumn(), progress.TransferSpeedColumn())
            out = console.Console(stderr=True)
            with progress.Progress(*columns, *figures, console=out, transient=True) as bar:
                task = bar.add_task(name, total=total, completed=done)
                yield lambda new: bar.advance(task, new)
            return
    line = _Line(name, done, total)
    yield line.advance
    line.close()


class _Line:
    """Progress without rich: on a terminal a line that changes, elsewhere one line if it lasts."""

    def __init__(self, name: str, done: int, total: int | None):
        self.name, self.done, self.total = name, done, total
        self.start, self.shown = time.monotonic(), 0.0

    def advance(self, new: int) -> None:
        self.done += new
        now = time.monotonic() - self.start
        if sys.stderr.isatty():
            if now - self.shown > 0.1:
                self.shown = now
                print(f"\r{self}", end="", file=sys.stderr, flush=True)
        elif now > QUIET and not self.shown:
            self.shown = now
            print(f"{self} ...", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            print(f"\r{self}" if sys.stderr.isatty() else f"{self}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total / 1e6:.1f}"
        return f"downloading {self.name}: {self.done / 1e6:.1f}{of} MB"
