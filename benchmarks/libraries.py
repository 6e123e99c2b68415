"""The networks of the installed torchvision and timm, as references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def build(name: str, **arguments: Any) -> torch.nn.Module:
    """ "torchvision/resnet50" or "timm/resnet50", of shapes alone (on the meta device)."""
    library, _, bare = name.partition("/")
    with torch.device("meta"):
        if library == "torchvision":
            import torchvision

            extra = {"init_weights": False} if bare in ("googlenet", "inception_v3") else {}
            return torchvision.models.get_model(bare, weights=None, **extra, **arguments)
        import timm

        return timm.create_model(bare, **arguments)


def shorten(model: torch.nn.Module, blocks: int = 1) -> torch.nn.Module:
    """Keep the first `blocks` blocks of each repeated stage: the same function at less cost.

    Only stages whose further blocks all have the same shapes may be cut.
    """
    for name in ("layer1", "layer2", "layer3", "layer4"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name)[:blocks])
    if hasattr(model, "encoder"):
        model.encoder.layers = model.encoder.layers[:blocks]
    if hasattr(model, "blocks"):
        model.blocks = model.blocks[:blocks]
    return model


def shapes(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A state dict of the right shapes that takes no memory."""
    return {
        key: np.broadcast_to(np.float32(0), tuple(value.shape))
        if value.is_floating_point()
        else np.broadcast_to(np.int64(0), tuple(value.shape))
        for key, value in model.state_dict().items()
    }


def materialise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random float64 numbers for a model of shapes alone.

    Kernels keep the scale of activations; scales, biases and statistics are drawn as `randomise`
    in `benchmarks.compare` draws them.
    """
    from benchmarks.compare import randomise

    model = model.double().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            else:
                parameter.zero_()
    return randomise(model, seed)


def numpy_state(model: torch.nn.Module) -> Mapping[str, np.ndarray]:
    """Views, not copies, of a model's state dict."""
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}
