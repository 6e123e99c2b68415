"""PyTorch checkpoints into Flax models, and back.

state_dict = convert.read("resnet50.pth")            # names and layouts as PyTorch has them
model = convert.load(model, "resnet50.pth")
convert.write("resnet50.safetensors", convert.export(model))
convert.to_onnx(model, "resnet50.onnx")
print(convert.verify("resnet50", "resnet50.pth"))     # against the PyTorch twin
"""

from convert.deploy import to_onnx, to_orbax, to_stablehlo
from convert.formats import CheckpointError, read, write
from convert.identify import identify
from convert.inspection import inspect
from convert.port import export, fill, load, prepare
from convert.verify import Report, verify

__all__ = [
    "CheckpointError",
    "Report",
    "export",
    "fill",
    "identify",
    "inspect",
    "load",
    "prepare",
    "read",
    "to_onnx",
    "to_orbax",
    "to_stablehlo",
    "verify",
    "write",
]
