"""Data sets, their batches, and what makes more of too few images.

- `load`: a data set by name, "digits", "cifar10:DIR", "folder:DIR" and others.
- `Batches`: one in memory, for small ones. `Pipeline`: any, decoded and augmented in the background
  through Grain. Both give {"image", "label", "mask"}, each batch a function of (seed, epoch, its
  number), so that these three are all that a run must know to go on exactly where it stopped.
- `augment` and `policies`: transformations of images, of which `compose` makes one.

Neither Grain nor Pillow is imported before its first use.
"""

from flax_nets.train.data.memory import Augment, Batches, Dataset, digits, resize, shift
from flax_nets.train.data.pipeline import Pipeline, prefetch
from flax_nets.train.data.sources import Source, load

__all__ = [
    "Augment",
    "Batches",
    "Dataset",
    "Pipeline",
    "Source",
    "digits",
    "load",
    "prefetch",
    "resize",
    "shift",
]
