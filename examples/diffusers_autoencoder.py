"""EQ-VAE in diffusers' way of training an autoencoder: `AutoencoderKL`, accelerate, `save_pretrained`.

The loop is that of diffusers' `examples/research_projects/autoencoderkl`, without its logging; what EQ-VAE adds stands
between the two rules.

    accelerate launch examples/diffusers_autoencoder.py MODEL PICTURES OUT [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from eqvae.transforms import TransformSampler


class Loss(nn.Module):
    """The loss as a module: what accelerate wraps has to be what is called, or processes don't share gradients."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.sampler = vae, TransformSampler()

    def forward(self, x: Tensor) -> Tensor:
        """Encode, transform, decode, compare."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample()
        # --------------------------------------------------------------------------------------------------------
        tau = self.sampler.draw(z.shape[-2:]).tau
        z, target = tau(z), tau(x)
        # --------------------------------------------------------------------------------------------------------
        reconstruction = self.vae.decode(z).sample
        return F.l1_loss(reconstruction, target) + 1e-6 * posterior.kl().mean() / x[0].numel()


def main(model: str, pictures: str, out: str, num_steps: int = 1000, size_px: int = 64) -> None:
    """Fine-tune the autoencoder in the folder or hub id `model`, and save it for diffusers."""
    accelerator = Accelerator()
    vae = AutoencoderKL.from_pretrained(model)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, betas=(0.5, 0.9))
    crops = transforms.Compose([transforms.RandomCrop(size_px), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.ImageFolder(pictures, crops), batch_size=4, shuffle=True, drop_last=True)
    loss_of, optimizer, loader = accelerator.prepare(Loss(vae), optimizer, loader)

    step = 0
    while step < num_steps:
        for x, _ in loader:
            loss = loss_of(x)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step == num_steps:
                break

    vae.eval()
    vae.register_to_config(scaling_factor=1 / latent_deviation(vae, loader), shift_factor=0.0)
    if accelerator.is_main_process:
        vae.save_pretrained(out)
        print(f"step {step}: l1 {loss.item():.3f}, scaling factor {vae.config.scaling_factor:.3f}")


@torch.inference_mode()
def latent_deviation(vae: AutoencoderKL, loader: DataLoader) -> float:
    """Measure what the old scaling factor no longer fits: fine-tuning moves the latents."""
    return torch.cat([vae.encode(x).latent_dist.sample().flatten() for x, _ in loader]).std().item()


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
