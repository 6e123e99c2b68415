"""The networks of the installed torchvision and timm, as references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def build(name: str, device: str = "meta", **arguments: Any) -> torch.nn.Module:
    """ "torchvision/resnet50" or "timm/resnet50"; by default of shapes alone."""
    library, _, bare = name.partition("/")
    with torch.device(device):
        if library == "torchvision":
            import torchvision

            slow = bare in ("googlenet", "inception_v3")  # their initialisation takes a minute
            extra = {"init_weights": device != "meta"} if slow else {}
            return torchvision.models.get_model(bare, weights=None, **extra, **arguments)
        import timm

        return timm.create_model(bare, **arguments)


NARROW = {
    "AlexNet": {64: 8, 192: 8, 384: 12, 256: 8, 256 * 36: 8 * 36, 4096: 24},
    "VGG": {64: 8, 128: 8, 256: 12, 512: 16, 512 * 49: 16 * 49, 4096: 24},
}


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
    if type(model).__name__ in NARROW:  # nothing repeats, and most of it is dense layers
        narrow(model, NARROW[type(model).__name__])
    return model


def narrow(model: torch.nn.Module, sizes: Mapping[int, int]) -> torch.nn.Module:
    """Give each layer whose number of inputs or outputs is in `sizes` the number there."""
    for name, module in model.named_children():
        if isinstance(module, torch.nn.Conv2d):
            made = torch.nn.Conv2d(
                sizes.get(module.in_channels, module.in_channels),
                sizes.get(module.out_channels, module.out_channels),
                module.kernel_size,
                module.stride,
                module.padding,
                device="meta",
            )
        elif isinstance(module, torch.nn.Linear):
            inputs, outputs = module.in_features, module.out_features
            made = torch.nn.Linear(
                sizes.get(inputs, inputs), sizes.get(outputs, outputs), device="meta"
            )
        elif isinstance(module, torch.nn.BatchNorm2d):
            made = torch.nn.BatchNorm2d(sizes[module.num_features], device="meta")
        else:
            made = narrow(module, sizes)
        setattr(model, name, made)
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

    model = draw_kernels(model.double().to_empty(device="cpu"), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.zero_()
    return randomise(model, seed)


def draw_kernels(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every kernel and matrix anew, so that what comes out is as large as what goes in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.normal_(0, fan_in**-0.5, generator=generator)
    return model


def numpy_state(model: torch.nn.Module) -> Mapping[str, np.ndarray]:
    """Views, not copies, of a model's state dict."""
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}
