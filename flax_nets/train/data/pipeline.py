"""Batches of any source, decoded and augmented in the background by Grain.

train = Pipeline(load("folder:DIR"), 256, augment.compose(...), seed=0, drop_last=True)
for batch in prefetch(train.epoch(3, start=17), lambda batch: shard(batch, mesh)):
    train_state, metrics = step(train_state, batch)
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
import os
import re
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from flax_nets.train.data.sources import Source

Transform = Callable[[Any, np.random.Generator], Any]  # of one image
Batch = dict[str, np.ndarray]
Mix = Callable[[Batch, np.random.Generator], Batch]
T = TypeVar("T")
FOREVER = 1 << 40  # batches: more than any run sees
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name for it


@dataclasses.dataclass(eq=False)
class Pipeline:
    """Batches {"image" [N, H, W, C], "label" [N], "mask" [N]} of a source, in the background.

    The order is new in each epoch. The n-th batch of an epoch is a function of (seed, epoch, n)
    alone, augmentation included, whatever the number of workers: (epoch, n) is the whole position,
    and `epoch(epoch, n)` goes on from there. With several hosts each makes its share of the same
    batches, of equal size (`mix` pairs the examples of one host).

    `mask` is 1 for an example, and 0 for what must count nothing: what fills up the last batch of
    an epoch, and what stands for an image that cannot be read (both are copies of an example).

    Args:
      source: from `load`; an array of uint8 becomes a PIL image for the transformation.
      batch_size: N, of all hosts together.
      transform: (image, generator) -> image, such as `augment.compose(...)`; all of one size. A
        PIL image has `channels`, and one from a file may not be decoded yet. Default: none.
      channels: 3 (RGB) or 1 (grey). Default 3.
      seed: of order and augmentation; None: the source's own order. Default None.
      drop_last: leave out the last batch of an epoch where it is short. Default False.
      repeats: how often an image comes in a batch, each time augmented anew (Hoffer et al. 2020,
        "Augment your batch"); an epoch has as many examples as ever, of fewer images. Default 1.
      mix: (batch, generator) -> batch, such as `augment.mix(...)`; needs a seed. Default: none.
      skip_broken: go on where an image cannot be read, and count it in `broken`. Default False.
      workers: processes that decode. 0: threads of this process, which suffice while Pillow does
        most of the work. With processes, a script needs `if __name__ == "__main__"`. Default 0.
      threads: in each process. Default: one for each core, or one where there are workers.
      host, hosts: which share of each batch is this process's. Default: as jax.distributed says.

    Attributes: `broken`, the unreadable images met so far: name -> what is wrong.

    Raises ValueError for arguments that cannot be; and while iterating, without `skip_broken`, for
    an image that cannot be read, with its name.

    >>> import numpy as np
    >>> from flax_nets.train.data import Dataset, Pipeline
    >>> images = np.zeros((10, 8, 8, 3), np.uint8)
    >>> pipeline = Pipeline(Dataset(images, np.arange(10), ()), 4)
    >>> [batch["label"].tolist() for batch in pipeline]
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 8]]
    >>> pipeline.close()
    """

    source: Source
    batch_size: int
    transform: Transform | None = None
    channels: int = 3
    seed: int | None = None
    drop_last: bool = False
    repeats: int = 1
    mix: Mix | None = None
    skip_broken: bool = False
    workers: int = 0
    threads: int | None = None
    host: int | None = None
    hosts: int | None = None

    def __post_init__(self) -> None:
        self.hosts = jax.process_count() if self.hosts is None else self.hosts
        self.host = jax.process_index() if self.host is None else self.host
        if self.threads is None:
            self.threads = 1 if self.workers else min(16, os.cpu_count() or 1)
        least = {"batch_size": 1, "repeats": 1, "workers": 0, "threads": 1, "hosts": 1}
        for name, low in least.items():
            if (given := getattr(self, name)) < low:
                raise ValueError(f"{name}: got {given}, expected at least {low}")
        if not 0 <= self.host < self.hosts:
            raise ValueError(f"host: got {self.host}, expected 0 to {self.hosts - 1}")
        if self.batch_size % self.hosts:
            raise ValueError(f"batch_size: got {self.batch_size} for {self.hosts} equal hosts")
        if self.channels not in MODES:
            raise ValueError(f"channels: got {self.channels}, expected 1 or 3")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected a number of at least 0")
        if self.seed is None and (self.mix or self.repeats > 1):
            raise ValueError("seed: got None, expected a number, since there is an augmentation")
        if not len(self):
            raise ValueError(
                f"batch_size: got {self.batch_size}, and there are only {len(self.source)} examples"
            )
        self.broken: dict[str, str] = {}
        self._live: list[Any] = []  # Grain's iterator, if it runs
        self._next, self._last = -1, Batch()  # where it goes on, and the batch before that
        weakref.finalize(self, _close, self._live)  # at exit too, while that still works

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from its `start`-th on.

        Meanwhile what follows is prepared, the next epoch too.
        """
        for n in range(start, len(self)):
            position = epoch * len(self) + n
            if self.seed is None and (self._next - n) % len(self) == 0:
                position = self._next  # of another epoch, which is as good, and under way
            yield self._batch(position)

    def names(self, epoch: int, n: int) -> list[str]:
        """The examples of this host's part of a batch, for messages."""
        return [self.source.name(i) for i in self._maker().chosen(epoch, n)[1]]

    def close(self) -> None:
        """End the threads and processes; another epoch would start them anew."""
        _close(self._live)
        self._next, self._last = -1, {}

    def _maker(self) -> _Maker:
        assert self.host is not None and self.hosts is not None
        return _Maker(
            self.source, self.batch_size, self.transform, MODES[self.channels], self.seed,
            self.repeats, self.mix, self.host, self.hosts, len(self),
        )  # fmt: skip

    def _batch(self, position: int) -> Batch:
        if self._last and position == self._next - 1:
            return dict(self._last)
        self._last = {}
        if position == self._next:
            if not self._live:
                self._live.append(self._start(position))
            batch = next(self._live[0])
            if self.workers:  # out of the shared memory, which is scarce
                batch = {name: np.array(value) for name, value in batch.items()}
        else:  # made here and now: the workers follow if there is a second one
            self.close()
            batch = self._maker()[position]
        self._next = position + 1
        for index in np.unique(batch.pop("broken")).tolist():
            self._report(index)
        self._last = batch
        return dict(batch)

    def _start(self, position: int) -> Any:
        """Grain's iterator over the batches from `position` on."""
        import grain  # takes its time
        from absl import flags

        assert self.threads is not None
        reading = grain.ReadOptions(self.threads, prefetch_buffer_size=self.threads + 1)
        batches = grain.MapDataset.source(self._maker())[position:].to_iter_dataset(reading)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # by an absl app, which we are not
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(self.workers, 2)
            batches = batches.mp_prefetch(options, worker_init_fn=_follow_parent)
        return iter(batches)

    def _report(self, index: int) -> None:
        name = self.source.name(index)
        if name in self.broken:
            return
        why = _why_broken(self.source, index)
        if not self.skip_broken:
            self.close()
            raise ValueError(f"{name}: found a broken image ({why}); skip_broken goes on without")
        self.broken[name] = why
        warnings.warn(f"{name}: a broken image ({why}), skipped", stacklevel=3)


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Makes the batches by their number: Grain's data source, which goes to the workers."""

    source: Source
    batch_size: int
    transform: Transform | None
    mode: str
    seed: int | None
    repeats: int
    mix: Mix | None
    host: int
    hosts: int
    per_epoch: int

    def __len__(self) -> int:
        return FOREVER

    def chosen(self, epoch: int, n: int) -> tuple[int, np.ndarray]:
        """The place in the epoch where this host's part of a batch begins, and its examples."""
        share = self.batch_size // self.hosts
        begin = n * self.batch_size + self.host * share
        seed = None if self.seed is None else (self.seed, epoch)
        return begin, _order(len(self.source), seed, self.repeats)[begin : begin + share]

    def __getitem__(self, position: int) -> Batch:
        epoch, n = divmod(position, self.per_epoch)
        epoch = 0 if self.seed is None else epoch  # which are all alike then
        begin, chosen = self.chosen(epoch, n)
        rows = [self._example(i, epoch, begin + k) for k, i in enumerate(chosen.tolist())]
        broken = [i for i, row in zip(chosen, rows, strict=True) if row is None]
        filler = next((row for row in rows if row), None) or self._any()
        rows += [None] * (self.batch_size // self.hosts - len(rows))
        images, labels = zip(*(row or filler for row in rows), strict=True)
        if len(shapes := {(x.shape, str(x.dtype)) for x in images}) > 1:
            raise ValueError(f"transform: made {sorted(shapes)}, expected images of one size")
        batch = {
            "image": np.stack(images),
            "label": np.array(labels, np.int32),
            "mask": np.array([row is not None for row in rows], np.float32),
        }
        if self.mix:
            batch = self.mix(batch, self._generator(epoch, n, self.host + 1))
        return batch | {"broken": np.array(broken, np.int64)}

    def _generator(self, epoch: int, *place: int) -> np.random.Generator:
        """Each example's own, and each batch's; (seed, epoch) alone is the order's."""
        first, *rest = place
        return np.random.default_rng((self.seed or 0, epoch, first + 1, *rest))

    def _example(self, index: int, epoch: int, place: int) -> tuple[np.ndarray, int] | None:
        """An image [H, W, C] and its label, or None where the image cannot be read."""
        try:
            image, label = self.source[index]
            image = _pillow(image, self.mode)
            if self.transform:
                image = self.transform(image, self._generator(epoch, place))
            image = np.asarray(image)
        except Exception:
            if _why_broken(self.source, index):
                return None
            raise  # the transformation's own mistake
        return image if image.ndim == 3 else image[..., None], label

    def _any(self) -> tuple[np.ndarray, int]:
        """Some example, where this host's part of a batch has none."""
        for index in range(len(self.source)):
            if example := self._example(index, 0, 0):
                return example
        raise ValueError("none of the images can be read")


@functools.lru_cache(2)  # this epoch's and the next one's
def _order(examples: int, seed: tuple[int, int] | None, repeats: int) -> np.ndarray:
    """Of an epoch: a permutation of the examples, or the first few each `repeats` times."""
    if seed is None:
        return np.arange(examples)
    return np.repeat(np.random.default_rng(seed).permutation(examples), repeats)[:examples]


def _pillow(image: Any, mode: str) -> Any:
    """A PIL image of the mode; floats stay the array they are."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            return image
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return image if image.mode == mode else image.convert(mode)


def _why_broken(source: Source, index: int) -> str:
    """What is wrong with an image; nothing where it can be read."""
    try:
        image, _ = source[index]
        if hasattr(image, "load"):
            image.load()
    except Exception as error:  # Pillow's decoders raise many types
        return re.sub(r" <\S+ object at \w+>", "", str(error)) or type(error).__name__
    return ""


def _close(live: list[Any]) -> None:
    while live:
        live.pop().close()


def _follow_parent(_worker: int, _workers: int) -> None:
    """Ends this process when its parent has ended, be it killed, and not before (by Ctrl-C)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def prefetch(batches: Iterable[Any], place: Callable[[Any], T], ahead: int = 2) -> Iterator[T]:
    """The batches as `place` puts them on the devices, `ahead` of them on their way at any time.

    >>> list(prefetch([1, 2, 3], float))
    [1.0, 2.0, 3.0]
    """
    if ahead < 1:
        raise ValueError(f"ahead: got {ahead}, expected at least 1")
    waiting: collections.deque[T] = collections.deque()
    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
