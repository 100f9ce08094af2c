"""EQ-VAE under Hugging Face's Trainer: a model whose forward pass is the loss, with three more lines.

    python examples/transformers_trainer.py MODEL PICTURES OUT [STEPS]

Trainer brings mixed precision, several GPUs, accumulation and checkpoints; MODEL and OUT are folders of diffusers.
"""

import sys

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision import datasets, transforms
from transformers import Trainer, TrainingArguments

from eqvae.transforms import TransformSampler


class Reconstruction(nn.Module):
    """An autoencoder, and what it is trained for."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.sampler = vae, TransformSampler()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Equation 5 in place of Equation 1, and the KL term."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample()
        tau = self.sampler.draw(z.shape[-2:]).tau  # the same for the latent and for the picture
        loss = F.l1_loss(self.vae.decode(tau(z)).sample, tau(x))
        return {"loss": loss + 1e-6 * posterior.kl().mean() / x[0].numel()}


def main(model: str, pictures: str, out: str, num_steps: int = 1000) -> None:
    """Fine-tune the autoencoder in the folder or hub id `model`, and save it for diffusers."""
    crops = transforms.Compose([transforms.RandomCrop(64), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    reconstruction = Reconstruction(AutoencoderKL.from_pretrained(model))
    trainer = Trainer(
        model=reconstruction,
        args=TrainingArguments(
            output_dir=out, max_steps=num_steps, per_device_train_batch_size=4, learning_rate=1e-4, max_grad_norm=1.0,
            remove_unused_columns=False, save_strategy="no", report_to=[], dataloader_drop_last=True,
        ),
        train_dataset=datasets.ImageFolder(pictures, crops),
        data_collator=lambda batch: {"x": torch.stack([x for x, _ in batch])},
    )  # fmt: skip
    done = trainer.train()
    if trainer.is_world_process_zero():
        reconstruction.vae.save_pretrained(out)  # measure its scaling factor anew: examples/diffusers_autoencoder.py
        print(f"step {done.global_step}: loss {done.training_loss:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
