"""Initial values: each parameter's distribution here against what PyTorch drew there.

A parameter here carries its distribution; of PyTorch's there is a sample. Kind and scale must fit:
constants exactly, uniform ones within their bounds and up to them, normal ones by spread and tails.
"""

import math

import numpy as np
import pytest
import torch
from cases import FAMILIES, in_ours

import convert
from benchmarks import libraries
from benchmarks.compare import state_dict
from convert.rules import entries
from flax_nets import registry
from flax_nets.create import build


def expected_std(init):
    """Of a distribution without factors."""
    if init.kind == "constant":
        return 0.0
    if init.kind == "uniform":
        return (init.high - init.low) / math.sqrt(12)
    if math.isinf(init.high):
        return init.std
    a, b = (init.low - init.mean) / init.std, (init.high - init.mean) / init.std

    def density(z):
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    inside = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    slope = (a * density(a) - b * density(b)) / inside
    shift = (density(a) - density(b)) / inside
    return init.std * math.sqrt(1 + slope - shift**2)


def disagreement(init, sample):
    """What does not fit, in words; None where all does."""
    sample = np.asarray(sample, np.float64)
    if init.factors:
        sample = sample / np.array(init.factors).reshape(-1, *[1] * (sample.ndim - 1))
    sample = sample.ravel()
    if init.kind == "constant":
        return None if (sample == np.float32(init.mean)).all() else f"not all {init.mean}"
    if sample.std() == 0 and sample.size > 1:
        return "a constant"
    rounding = 1e-6 * np.abs(sample).max()  # to float32
    if sample.min() < init.low - rounding or sample.max() > init.high + rounding:
        return f"outside of [{init.low}, {init.high}]"
    std, size = expected_std(init), sample.size
    center = (init.low + init.high) / 2 if init.kind == "uniform" else init.mean
    slack = 6 / math.sqrt(size)
    if abs(sample.mean() - center) > slack * std:
        return f"mean {sample.mean():.3g}, expected {center:.3g}"
    if size >= 50 and abs(sample.std() / std - 1) > slack:
        return f"std {sample.std():.4g}, expected {std:.4g}"
    if size >= 2000:
        reach = np.abs(sample - center).max() / std
        if init.kind == "uniform" and reach > 1.7321:
            return "tails beyond a uniform distribution's"
        if init.kind == "normal" and reach < 2.2 and init.high - center > 2.5 * init.std:
            return "no tails, as a uniform distribution"
    return None


def disagreements(spec, tensors):
    inits = {e.key: e.variable.get_metadata("init") for e in entries(build(spec))}
    found = {}
    for key, init in inits.items():
        trouble = disagreement(init, tensors[key])
        if trouble:
            found[key] = f"{init}: {trouble}"
    return found


CASES = [
    pytest.param(file, name, id=name)
    for file, family in FAMILIES.items()
    for name in registry.module(file).VARIANTS
]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_the_twin_draws_from_our_distributions(file, name):
    family = FAMILIES[file]
    spec = registry.resolve(name)
    small = family.full.get(name, family.reduce(spec.arguments))
    spec = spec.with_arguments(**{k: v for k, v in small.items() if k != "aux_logits"})
    torch.manual_seed(1)
    twin = spec.cls("torch_ref")(**spec.arguments)
    assert disagreements(spec, state_dict(twin)) == {}


LIBRARIES = [
    pytest.param(name, arguments, id=name)
    for family in FAMILIES.values()
    for name, arguments in family.libraries.items()
]


@pytest.mark.parametrize(("name", "arguments"), LIBRARIES)
def test_the_library_draws_from_our_distributions(name, arguments):
    torch.manual_seed(1)
    library = libraries.build(name, device="cpu", **arguments)
    spec = registry.resolve(name).with_arguments(**in_ours(arguments))
    spec, checkpoint = convert.prepare(spec, libraries.numpy_state(library), {})
    assert disagreements(spec, checkpoint.tensors) == {}


def test_the_check_can_fail():
    from flax_nets.layers import init

    rng = np.random.default_rng(0)
    sample = rng.normal(size=4000)
    assert disagreement(init.normal(1.0), sample) is None
    assert "std" in disagreement(init.normal(1.2), sample)
    assert "outside" in disagreement(init.uniform(math.sqrt(3)), sample)
    flat = rng.uniform(-math.sqrt(3), math.sqrt(3), size=4000)
    assert "tails" in disagreement(init.normal(1.0), flat)
    assert (
        disagreement(init.trunc_normal(1.0, low=-1.0, high=1.0), sample[np.abs(sample) < 1]) is None
    )
    assert "not all" in disagreement(init.zeros, sample)
