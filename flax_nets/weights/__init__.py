"""Published weights: where they are, what they expect of an image, and how they get here.

flax_nets.weights.names("resnet50")                       # what there is for a network
found = flax_nets.weights.find("resnet50", "DEFAULT")     # address, classes, accuracy, ...
path = flax_nets.weights.fetch("resnet50", "DEFAULT")     # downloaded, or from the cache
model = flax_nets.create_model("resnet50", weights="DEFAULT")
"""

from flax_nets.weights.cache import home
from flax_nets.weights.published import Weights, class_names, find, names, table
from flax_nets.weights.source import fetch

__all__ = ["Weights", "class_names", "fetch", "find", "home", "names", "table"]
