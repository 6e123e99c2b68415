"""PyTorch checkpoints into Flax models, and back.

state_dict = convert.read("resnet50.pth")            # names and layouts as PyTorch has them
model = convert.load(model, "resnet50.pth")
convert.write("resnet50.safetensors", convert.export(model))
print(convert.verify("resnet50", "resnet50.pth"))     # against the PyTorch twin
"""

from convert.formats import CheckpointError, read, write
from convert.port import export, fill, load, prepare
from convert.verify import Report, verify

__all__ = [
    "CheckpointError",
    "Report",
    "export",
    "fill",
    "load",
    "prepare",
    "read",
    "verify",
    "write",
]
