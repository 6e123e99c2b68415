"""The chain to the libraries: our twins equal the installed torchvision and timm.

Every name in scope: names and shapes at full size, and outputs in float64. The smallest network
of each family: the Flax side against the library itself, in full.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import FAMILIES, in_ours

import convert
import flax_nets
from benchmarks import libraries
from benchmarks.compare import (
    GRADIENT,
    OUTPUT,
    error,
    flax_pass,
    images,
    leaves,
    nchw,
    quick_jit,
    torch_pass,
    worst_errors,
)
from convert.rules import entries
from flax_nets import registry
from flax_nets.create import build

NAMES = (pathlib.Path(__file__).parent / "data" / "names.txt").read_text().split()
HUGE = 60_000_000  # parameters beyond which blocks are cut before numbers are drawn


def known(name):
    return name.partition("/")[2] in flax_nets.list_models()


def test_every_name_in_scope_is_there():
    assert len(NAMES) == 138
    assert [name for name in NAMES if not known(name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes(name):
    """A checkpoint of the library has what our network has, and nothing else."""
    tensors = libraries.shapes(libraries.build(name))
    spec, checkpoint = convert.prepare(registry.resolve(name), tensors, {})
    ours = {e.key: e.torch_shape for e in entries(build(spec))}
    assert {k: v.shape for k, v in checkpoint.tensors.items()} == ours


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_computes_what_the_library_computes(name):
    spec = registry.resolve(name)
    family = FAMILIES[spec.file]
    arguments, ours = {}, {}
    if spec.file == "vit":
        side = 2 * spec.cls("torch_ref")(**spec.arguments | TINY).conv_proj.kernel_size[0]
        arguments = {"image_size" if name.startswith("torchvision") else "img_size": side}
    else:
        side = family.side(name.partition("/")[2])
    library = libraries.build(name, **arguments)
    if sum(p.numel() for p in library.parameters()) > HUGE:
        library = libraries.shorten(library)
        ours = family.reduce(spec.arguments)
    library = libraries.materialise(library).eval()
    ours = {k: v for k, v in ours.items() if k != "image_size"}
    spec, checkpoint = convert.prepare(spec, libraries.numpy_state(library), ours)
    spec = spec.with_arguments(**ours)
    with torch.device("meta"):
        twin = spec.cls("torch_ref")(**spec.arguments)
    twin.load_state_dict(
        {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in checkpoint.tensors.items()},
        strict=True,
        assign=True,
    )
    x = torch.tensor(nchw(images(spec, 2, side)))
    with torch.no_grad():
        for mine, wanted in zip(leaves(twin.eval()(x)), leaves(library(x)), strict=True):
            assert error(mine, wanted) <= OUTPUT


TINY = dict(depth=0, width=8, num_heads=1, num_classes=0, image_size=224)
SMALLEST = [
    (name, arguments)
    for family in FAMILIES.values()
    for name, arguments in family.libraries.items()
]


@pytest.mark.parametrize(("name", "arguments"), SMALLEST, ids=[name for name, _ in SMALLEST])
def test_flax_equals_the_library_itself(name, arguments, tmp_path):
    """Through a checkpoint that torch saved: outputs in both modes, gradients, statistics."""
    library, ours = libraries.build(name, **arguments), in_ours(arguments)
    if sum(p.numel() for p in library.parameters()) > HUGE:
        library = libraries.shorten(library)
        ours = FAMILIES[registry.resolve(name).file].reduce(registry.resolve(name).arguments)
    library = libraries.materialise(library)
    for module in library.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.save(library.state_dict(), tmp_path / "checkpoint.pth")
    model = flax_nets.create_model(name, weights=tmp_path / "checkpoint.pth", dropout=0.0, **ours)
    family = FAMILIES[model.spec.file]
    side = model.spec.arguments.get("image_size", family.side(name.partition("/")[2]))
    x = images(model.spec, family.batch, side)
    with torch.no_grad():
        wanted = library.eval()(torch.tensor(nchw(x)))
    apply, params, state = flax_nets.functional(model)
    run = quick_jit(apply)
    assert error(run(params, state, jnp.asarray(x))[0], wanted) <= OUTPUT
    theirs = torch_pass(library, x, train=True)
    native = convert.port.open_checkpoint(
        {k: v.numpy() for k, v in theirs["gradients"].items()},
        [e.key for e in entries(model)],
        model.spec,
        "auto",
    )
    theirs["gradients"] = {k: torch.from_numpy(v.copy()) for k, v in native.tensors.items()}
    theirs["state"] = {native.dialect.to_native(k): v for k, v in theirs["state"].items()}
    worst = worst_errors(flax_pass(model, x, train=True), theirs)
    assert worst["outputs"] <= OUTPUT, worst
    assert worst["gradients"] <= GRADIENT, worst
    assert worst["input_gradient"] <= GRADIENT, worst
    assert worst["statistics"] <= OUTPUT, worst
