"""ShuffleNet-v2 of double width as torchvision trains it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 76.230% top-1 on ImageNet; 72.996% with --model shufflenet_v2_x1_5.
Hardware: eight GPUs, with 128 images each.

The averages move after every update by a 32nd of what the script moves them by after every 32nd,
and from the start on.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="shufflenet_v2_x2_0",
    image_size=176,
    test_size=224,
    augment=(
        "random_resized_crop(size)",
        "flip()",
        "trivial_augment(method=bilinear)",
        "random_erasing(0.1)",
    ),
    prepare=("resize(size * 232 // 224)", "center_crop(size)"),
    repeats=4,
    mixup=0.2,
    cutmix=1.0,
    batch_size=1024,
    epochs=600,
    label_smoothing=0.1,
    optimizer="sgd",
    lr=0.5,
    momentum=0.9,
    weight_decay=2e-5,
    decay="no_norms",
    ema_decay=1 - 2e-5 * 1024 / 600,
    schedule="cosine",
    warmup_epochs=5,
    warmup_factor=0.01,
    stairs=True,
)
