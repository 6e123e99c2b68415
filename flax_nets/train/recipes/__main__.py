"""Writes the table of docs/recipes.md: `python -m flax_nets.train.recipes > docs/recipes.md`."""

from __future__ import annotations

import re

from flax_nets.train import recipes

PAGE = """\
# Recipes

```
flax-nets train --recipe resnet50_a1 --data folder:DIR --out RUN
```

`--recipe` names a file of `flax_nets/train/recipes`, which gives every option its default. Each
file says where its numbers come from, what they reached there, and where it departs from them;
`flax-nets train --recipe NAME --help` prints that. The accuracies are the sources' own: nothing in
these tables but `lenet5_digits` was measured here. Where a paper lowers the rate when the error
stops falling, the recipe has fixed epochs, and says so. The tests take two steps with each recipe,
and ten with its optimizer and schedule, beside PyTorch's or timm's.

Torchvision's recipes, big_vision's ViT, and those of CBAM, DenseNet, MobileNet-v2 and v3, ResNet,
ResNeXt, SENet, ShuffleNet, SqueezeNet and Xception were compared with what their authors publish
beside the papers; the others quote the papers alone.

## Recipes of the papers

{papers}

## Stronger and later ones

{later}

## One more

A file in `flax_nets/train/recipes` is a recipe by its name: a docstring with a paragraph each for
`Source:`, `Expected:` and `Hardware:`, "not reported" where nobody tells, then what differs from
the source, and `RECIPE = Recipe(...)`, of which every field has a default. The tests find it.
`python -m flax_nets.train.recipes > docs/recipes.md` writes this page.
"""
LATER = ("torchvision", "_a1", "_a2", "_a3", "_90ep", "resnet18_cifar10", "finetune", "digits")


def page() -> str:
    """docs/recipes.md."""
    later = [name for name in recipes.names() if any(word in name for word in LATER)]
    papers = [name for name in recipes.names() if name not in later]
    return PAGE.format(papers=_table(papers), later=_table(later))


def _table(names: list[str]) -> str:
    head = "| recipe | epochs | batch | optimizer | rate | expected | hardware | source |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name in names:
        recipe = recipes.load(name)
        said = [_said(name, what) for what in ("Expected", "Hardware", "Source")]
        rate = f"{recipe.lr:.4g}, {recipe.schedule}"
        cells = (f"`{name}`", recipe.epochs, recipe.batch_size, recipe.optimizer, rate, *said)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _said(name: str, what: str) -> str:
    """A paragraph of the docstring, such as "Source: ..."."""
    found = re.search(rf"^{what}: (.*(?:\n    .*)*)", recipes.about(name), re.MULTILINE)
    if not found:
        raise ValueError(f"the recipe {name} does not say its {what.lower()}")
    return " ".join(found[1].split())


if __name__ == "__main__":
    print(page(), end="")
