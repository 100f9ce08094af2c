"""EQ-VAE in a LightningModule: the training step of your own autoencoder, with three more lines.

python examples/lightning_autoencoder.py PICTURES OUT.ckpt [STEPS]
"""

import sys

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from eqvae.transforms import TransformSampler


class Autoencoder(L.LightningModule):
    """Stride 8, 4 channels: where yours stands."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(width, 3, 8, 8))
        self.sampler = TransformSampler()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Equation 5 in place of Equation 1."""
        x, _ = batch
        z = self.encoder(x)
        tau = self.sampler.draw(z.shape[-2:]).tau  # the same for the latent and for the picture
        loss = F.l1_loss(self.decoder(tau(z)), tau(x))
        self.log("l1", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(pictures: str, out: str, num_steps: int = 1000) -> None:
    """Train, and save Lightning's checkpoint."""
    crops = transforms.Compose([transforms.RandomCrop(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.ImageFolder(pictures, crops), batch_size=4, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_steps=num_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Autoencoder(), loader)
    print(f"step {trainer.global_step}: l1 {trainer.callback_metrics['l1']:.3f}")
    trainer.save_checkpoint(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
