"""EQ-VAE in a plain PyTorch loop: your own autoencoder, a folder of pictures, nothing of `eqvae` but the transforms.

python examples/pytorch.py PICTURES OUT.pt [STEPS]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from eqvae.transforms import TransformSampler


class Autoencoder(nn.Module):
    """Stride 8, 4 channels: where yours stands, with its `encoder` and `decoder`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.SiLU(), nn.Conv2d(width, 2 * width, 2, stride=2), nn.SiLU(),
            nn.Conv2d(2 * width, 4, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 2 * width, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            nn.SiLU(), nn.ConvTranspose2d(width, 3, 4, stride=4),
        )  # fmt: skip


def main(pictures: str, out: str, num_steps: int = 1000) -> None:
    """Train with Equation 5 in place of Equation 1, and save the weights."""
    crops = transforms.Compose([transforms.RandomCrop(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.ImageFolder(pictures, crops), batch_size=8, shuffle=True, drop_last=True)
    autoencoder = Autoencoder()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=1e-3)
    sampler = TransformSampler(equivariance_probability=0.5)

    step = 0
    while step < num_steps:
        for x, _ in loader:
            z = autoencoder.encoder(x)
            tau = sampler.draw(z.shape[-2:]).tau  # the same for the latent and for the picture
            loss = F.l1_loss(autoencoder.decoder(tau(z)), tau(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == num_steps:
                break
    print(f"step {step}: l1 {loss.item():.3f}")
    torch.save(autoencoder.state_dict(), Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
