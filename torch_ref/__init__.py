"""The PyTorch twins of `flax_nets.models`: the same file names, classes and `VARIANTS`."""
