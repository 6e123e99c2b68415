"""Names: which network and which constructor arguments a name stands for.

A network that torchvision has carries torchvision's name, one that only timm has timm's; the
other library's name is an alias, with that library's defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

# One file per network in `flax_nets.models`, in the order of their papers.
FILES = (
    "lenet",
    "alexnet",
    "nin",
    "vgg",
    "googlenet",
    "highway",
    "resnet",
    "inception_v3",
    "squeezenet",
    "inception_v4",
    "densenet",
    "xception",
    "resnext",
    "mobilenet_v1",
    "shufflenet",
    "senet",
    "mobilenet_v2",
    "cbam",
    "mobilenet_v3",
    "vit",
)

LEAST = {"num_classes": 0, "in_channels": 1}  # that an argument may be

# The other library's name -> (our name, the arguments in which that library's defaults differ).
# Where both libraries have the same name for different defaults, the other's carries its library.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm/vgg11": ("vgg11", dict(head="conv", dropout=0.0)),
    "timm/vgg11_bn": ("vgg11_bn", dict(head="conv", dropout=0.0)),
    "timm/vgg13": ("vgg13", dict(head="conv", dropout=0.0)),
    "timm/vgg13_bn": ("vgg13_bn", dict(head="conv", dropout=0.0)),
    "timm/vgg16": ("vgg16", dict(head="conv", dropout=0.0)),
    "timm/vgg16_bn": ("vgg16_bn", dict(head="conv", dropout=0.0)),
    "timm/vgg19": ("vgg19", dict(head="conv", dropout=0.0)),
    "timm/vgg19_bn": ("vgg19_bn", dict(head="conv", dropout=0.0)),
    "timm/inception_v3": ("inception_v3", dict(aux_logits=False, dropout=0.0)),
    "legacy_xception": ("xception", dict()),
    "mobilenetv2_100": ("mobilenet_v2", dict(dropout=0.0, initialise="timm")),
    "mobilenetv3_large_100": (
        "mobilenet_v3_large",
        dict(eps=1e-5, momentum=0.1, dropout=0.0, initialise="timm"),
    ),
    "mobilenetv3_small_100": (
        "mobilenet_v3_small",
        dict(eps=1e-5, momentum=0.1, dropout=0.0, initialise="timm"),
    ),
    "vit_base_patch16_224": ("vit_b_16", dict(initialise="timm")),
    "vit_base_patch32_224": ("vit_b_32", dict(initialise="timm")),
    "vit_large_patch16_224": ("vit_l_16", dict(initialise="timm")),
    "vit_large_patch32_224": ("vit_l_32", dict(initialise="timm", num_classes=0)),
    "vit_huge_patch14_224": ("vit_h_14", dict(initialise="timm", num_classes=0)),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a name stands for: the file, the class in it, and the constructor's arguments.

    `weights` says where a model's weights came from; networks are equal whatever they are.
    """

    name: str
    file: str
    network: str
    arguments: Mapping[str, Any]
    weights: str | None = dataclasses.field(default=None, compare=False)

    def __hash__(self) -> int:  # a model carries its spec, and `jax.jit` hashes models
        return hash((self.name, self.file, self.network, repr(sorted(self.arguments.items()))))

    def cls(self, package: str = "flax_nets.models") -> Any:
        """The network's class, or with "torch_ref" its twin's."""
        return getattr(module(self.file, package), self.network)

    @property
    def complete(self) -> dict[str, Any]:
        """Every argument of the constructor: those of the name, and defaults for the others."""
        parameters = inspect.signature(self.cls().__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return defaults | dict(self.arguments)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the network was made for."""
        parameters = inspect.signature(self.cls().__init__).parameters

        def argument(name: str, default: int) -> int:
            known = parameters[name].default if name in parameters else default
            return self.arguments.get(name, known)

        usual = getattr(self.cls(), "image_size", 32 if "cifar" in self.name else 224)
        side = argument("image_size", usual)
        return side, side, argument("in_channels", 3)

    def with_arguments(self, **overrides: Any) -> Spec:
        """The same network with other arguments; ValueError for one that it cannot have."""
        known = [n for n in inspect.signature(self.cls().__init__).parameters if n != "rngs"][1:]
        for name, value in overrides.items():
            if isinstance(value, int) and value < LEAST.get(name, value):
                raise ValueError(f"{name}={value}: expected at least {LEAST[name]}")
            if name not in known:
                raise ValueError(
                    f"{self.name} has no argument {name!r}{suggest(name, known)} "
                    f"It takes: {', '.join(known)}."
                )
        return dataclasses.replace(self, arguments={**self.arguments, **overrides})


def module(file: str, package: str = "flax_nets.models") -> Any:
    """A file of networks, of `flax_nets.models` or of their twins in `torch_ref`."""
    return importlib.import_module(f"{package}.{file}")


@functools.cache
def _table() -> dict[str, Spec]:
    table: dict[str, Spec] = {}
    for file in FILES:
        networks = module(file)
        for name, row in networks.VARIANTS.items():
            if name in table:
                raise ValueError(f"{name!r} stands in both {table[name].file}.py and {file}.py")
            arguments = dict(row)
            network = arguments.pop("network", None) or networks.NETWORK
            table[name] = Spec(name, file, network, arguments)
    for alias, (name, differences) in ALIASES.items():
        if alias in table:
            raise ValueError(f"the alias {alias!r} is a network's own name")
        table[alias] = dataclasses.replace(
            table[name], name=alias, arguments={**table[name].arguments, **differences}
        )
    return table


def resolve(name: str) -> Spec:
    """The spec of a name; "torchvision/" and "timm/" before a name are allowed.

    Raises ValueError with the nearest names where there is none.
    """
    bare = name.removeprefix("torchvision/").removeprefix("timm/")
    found = _table().get(name) or _table().get(bare)
    if found is None:
        raise ValueError(
            f"there is no network {name!r}{suggest(bare, _table())} "
            "flax_nets.list_models() lists all names."
        )
    return found


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the image classifiers, aliases included, that match a glob pattern.

    >>> import flax_nets
    >>> flax_nets.list_models("resnet1*")
    ['resnet101', 'resnet110_cifar', 'resnet152', 'resnet18']
    """
    return sorted(name for name in _table() if fnmatch.fnmatchcase(name, pattern))


def suggest(name: str, known: Iterable[str]) -> str:
    """ ": did you mean 'a' or 'b'?" for the names nearest to `name`, or "." where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if not near:
        return "."
    return ": did you mean " + " or ".join(repr(n) for n in near) + "?"
