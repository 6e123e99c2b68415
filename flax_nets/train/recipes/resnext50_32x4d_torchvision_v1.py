"""ResNeXt-50 as torchvision first trained it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 77.618% top-1 on ImageNet (the weights IMAGENET1K_V1).
Hardware: eight V100 GPUs with 32 images each, as its command has it; the weights come from 64 GPUs
    with 16 images each and a rate of 0.4: --batch-size 1024 --lr 0.4.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnext50_32x4d",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=100,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60, 90),
)
