"""The numbers of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train a network: each field is an option of the command, with the recipe's default.

    Epochs may be fractions of one wherever they only say when something happens.

    Args:
      model: a network, see flax-nets list.
      arguments: of the network's constructor, each as NAME=VALUE, such as depths=(1,1,1).
      weights: published ones by name, a checkpoint or an address to start from; with another
        number of classes the head is new.
      freeze: parameters that stay as they are, by patterns of their paths; "body" is all but the
        last layers. Batch norms go on following the data, as PyTorch's do in train mode.
      dropout: the rate. Default: the network's.
      dtype: what the network computes in; parameters are float32. With float16 the loss is scaled.
      image_size: height and width to train at, in pixels. Default: the network's.
      test_size: height and width to test at. Default: image_size.
      augment: what is done to an image to train on, functions of train.data.augment and policies
        in their order, such as "random_resized_crop(size)"; size is the image's. Default: prepare.
      prepare: likewise, to test. With none, as the network's weights expect it.
      mean: of the channels, for values in [0, 1]. Default: as the network's weights expect it.
      std: likewise, the deviation.
      shift: move each digit by up to so many pixels at random (of --data digits as it is).
      repeats: how often an image comes in a batch, each time augmented anew.
      mixup: alpha of mixup, 0 for none.
      cutmix: alpha of cutmix, 0 for none.
      mix_probability: the share of the batches that are mixed.
      batch_size: images per update, of all devices and hosts together.
      test_batch: images at a time in a test. Default: batch_size.
      epochs: passes over the data.
      loss: of the logits; rbf is LeNet-5's of 1998.
      label_smoothing: the share that goes to all classes.
      target_threshold: targets of the binary cross entropy above it become 1, all others 0.
      aux_weight: what each auxiliary head adds to the loss.
      optimizer: as PyTorch or timm defines it.
      lr: the learning rate at its highest.
      lr_factors: of some layers, each as PATTERN=X with a pattern of paths, such as "layer4=0.1";
        the first that matches counts.
      momentum: 0.9 for sgd and rmsprop_tf, 0 for rmsprop.
      nesterov: momentum as Nesterov has it, of sgd.
      betas: of adam, adamw and lamb. Default: the optimizer's.
      alpha: of the running mean of rmsprop. Default: the optimizer's.
      eps: Default: the optimizer's.
      weight_decay: Default: the optimizer's.
      decay: what decays: all parameters, matrices (and kernels) alone, or all but norms.
      decay_exclude: of the matrices those that do not, by patterns of their paths.
      clip: bound on the global norm of the gradients.
      ema_decay: of running averages of the parameters, which are tested and kept.
      accumulate: parts a batch is computed in, one after the other.
      batch_norm_groups: parts of a batch, each normalised by its own statistics; as many as there
        are devices for per-device batch norm.
      schedule: of the learning rate: along half a cosine, constant, multiplied by gamma at the
        milestones (steps) or after every decay_epochs (exponential), down to 0 along a line, timm's
        cosine (of which the warm-up hides the beginning), or the inverse square root of the step.
      milestones: the epochs of steps.
      gamma: what the rate is multiplied by: one number, or one for each milestone.
      decay_epochs: of the exponential schedule.
      lr_min: where a cosine ends.
      warmup_epochs: of a rate that rises along a line.
      warmup_factor: the share of lr at which it begins.
      stairs: change the rate between epochs only.
    """

    model: str
    arguments: tuple[str, ...] = ()
    weights: str | None = None
    freeze: tuple[str, ...] = ()
    dropout: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    image_size: int | None = None
    test_size: int | None = None
    augment: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ("resize(size)", "center_crop(size)")
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    shift: int = 0
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    batch_size: int = 64
    test_batch: int | None = None
    epochs: int = 10
    loss: Literal["cross_entropy", "binary_cross_entropy", "rbf"] = "cross_entropy"
    label_smoothing: float = 0.0
    target_threshold: float | None = None
    aux_weight: float = 0.3

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "rmsprop_tf", "lamb"] = "sgd"
    lr: float = 0.05
    lr_factors: tuple[str, ...] = ()
    momentum: float | None = None
    nesterov: bool = False
    betas: tuple[float, float] | None = None
    alpha: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    decay: Literal["all", "matrices", "no_norms"] = "all"
    decay_exclude: tuple[str, ...] = ()
    clip: float | None = None
    ema_decay: float | None = None
    accumulate: int = 1
    batch_norm_groups: int = 1

    schedule: Literal[
        "cosine", "constant", "steps", "exponential", "linear", "timm_cosine", "inverse_sqrt"
    ] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: tuple[float, ...] = (0.1,)
    decay_epochs: float = 1.0
    lr_min: float = 0.0
    warmup_epochs: float = 0.0
    warmup_factor: float = 0.01
    stairs: bool = False
