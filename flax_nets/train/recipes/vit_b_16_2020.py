"""ViT-B/16 on ImageNet alone, as in its paper.

Source: Dosovitskiy et al. 2020 (https://arxiv.org/abs/2010.11929), appendix B.1, Tables 3 and 5.
Expected: 77.91% top-1 on ImageNet after fine-tuning at 384 pixels (`vit_b_16_finetune`).
Hardware: TPU-v3; how many for this run is not reported.

Adam with decoupled weight decay, on 224 pixels; 10,000 updates of warm-up are 32 epochs of 312. The
head has a hidden layer with tanh.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vit_b_16",
    arguments=("representation_size=768",),
    dropout=0.1,
    augment=("random_resized_crop(size, scale=(0.05, 1.0))", "flip()"),
    prepare=("resize(size)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    batch_size=4096,
    epochs=300,
    optimizer="adamw",
    lr=3e-3,
    betas=(0.9, 0.999),
    weight_decay=0.3,
    clip=1.0,
    schedule="cosine",
    warmup_epochs=32,
    warmup_factor=0.0,
)
