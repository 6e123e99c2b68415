"""ViT-B/16 fine-tuned at 384 pixels, as in its paper.

Source: Dosovitskiy et al. 2020 (https://arxiv.org/abs/2010.11929), appendix B.1.1, Tables 4 and 5.
Expected: 83.97% top-1 on ImageNet from weights of ImageNet-21k, 77.91% from `vit_b_16_2020`.
    Of torchvision's weights, the default here, it is not reported.
Hardware: not reported.

20,000 updates of 512 images, 8 epochs of ImageNet; for CIFAR the paper has 10,000. Of its rates,
0.003, 0.01, 0.03 and 0.06, the best on held-out images is taken; here it is 0.01.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vit_b_16",
    weights="DEFAULT",
    image_size=384,
    augment=("random_resized_crop(size, scale=(0.05, 1.0))", "flip()"),
    prepare=("resize(size)", "center_crop(size)"),
    batch_size=512,
    epochs=8,
    lr=0.01,
    momentum=0.9,
    weight_decay=0.0,
    clip=1.0,
    schedule="cosine",
    warmup_epochs=0.2,
    warmup_factor=0.0,
)
