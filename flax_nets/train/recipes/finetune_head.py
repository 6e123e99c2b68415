"""A new last layer on a frozen body, for a small data set of one's own.

Source: PyTorch's tutorial "Transfer learning for computer vision", "ConvNet as fixed feature
    extractor" (https://pytorch.org/tutorials/beginner/transfer_learning_tutorial.html).
Expected: not reported for other data than its 397 photographs of ants and bees.
Hardware: not reported.

Any --model with published weights will do. --freeze without patterns trains all of it.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet18",
    weights="DEFAULT",
    freeze=("body",),
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=4,
    test_batch=64,
    epochs=25,
    lr=1e-3,
    momentum=0.9,
    weight_decay=0.0,
    schedule="steps",
    milestones=(7, 14, 21),
)
