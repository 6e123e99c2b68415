"""torchvision's older names, which its published files still have."""

from convert.dialects import Dialect

LAYER = "features.denseblock{block}.denselayer{layer}"

DENSENET = Dialect(  # made when a module's name could have a dot in it
    "torchvision-old",
    "densenet",
    renames=(
        (f"{LAYER}.norm{{n}}.{{rest}}", f"{LAYER}.norm.{{n}}.{{rest}}"),
        (f"{LAYER}.conv{{n}}.{{rest}}", f"{LAYER}.conv.{{n}}.{{rest}}"),
    ),
)

DIALECTS: tuple[Dialect, ...] = (DENSENET,)

MADE: dict = {}
