"""Train the PyTorch LeNet-5 whose checkpoint `flax-nets demo` converts, and store its outputs.

    python -m benchmarks.make_demo_checkpoint

Writes two files into flax_nets/assets: lenet5_digits.pth, the float32 state dict, and
lenet5_digits.npz with what PyTorch answers, in float64, to the held-out digits: `logits` [N, 10],
the SHA-256 of the `images` that they belong to, and the version of `torch`.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flax_nets.train.data import Batches, digits
from torch_ref.lenet import LeNet5

ASSETS = Path(__file__).parent.parent / "flax_nets" / "assets"
EPOCHS, LEAST = 5, 0.975


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def train() -> LeNet5:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LeNet5()
    batches = Batches(digits("train"), batch_size=16, seed=0, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            labels = torch.from_numpy(batch["label"]).long()
            F.cross_entropy(model(nchw(batch["image"])), labels).backward()
            optimizer.step()
            rate.step()
    return model


def main() -> None:
    model, held_out = train(), digits("test")
    ASSETS.mkdir(exist_ok=True)
    torch.save(model.state_dict(), ASSETS / "lenet5_digits.pth")
    with torch.no_grad():
        logits = model.double().eval()(nchw(held_out.images).double()).numpy()
    accuracy = np.mean(logits.argmax(1) == held_out.labels)
    if accuracy < LEAST:
        raise SystemExit(f"only {accuracy:.2%} of the held-out digits right, expected {LEAST:.1%}")
    np.savez(
        ASSETS / "lenet5_digits.npz",
        logits=logits,
        images=hashlib.sha256(held_out.images.tobytes()).hexdigest(),
        torch=torch.__version__,
    )
    print(f"{accuracy:.2%} of {len(held_out)} held-out digits right; wrote {ASSETS}")


if __name__ == "__main__":
    main()
