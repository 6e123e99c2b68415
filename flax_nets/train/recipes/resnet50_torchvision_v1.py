"""ResNet-50 as torchvision first trained it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 76.130% top-1 on ImageNet (the weights IMAGENET1K_V1); 69.758% with --model resnet18.
Hardware: eight V100 GPUs, with 32 images each.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet50",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=90,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60),
)
