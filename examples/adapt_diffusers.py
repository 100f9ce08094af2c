"""A UNet or transformer of diffusers under another VAE: its first and last layer aligned, without a step of training.

    python examples/adapt_diffusers.py MODEL PREDICTION OLD_VAE NEW_VAE PICTURES OUT [SIZE_PX]

MODEL is the folder of a `UNet2DConditionModel` (SD 1.5, SDXL), `SD3Transformer2DModel` or `FluxTransformer2DModel`,
PREDICTION what it predicts: `epsilon` or `v_prediction` as in its scheduler's config, or `flow` (SD3, Flux). Some
thousand PICTURES do. Training goes on from OUT with diffusers' own scripts and NEW_VAE: first of `ends(model)` alone.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoModel, DDPMScheduler, ModelMixin
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from eqvae.generators.alignment import AffineMap, PatchMoments, align
from eqvae.generators.protocol import Coupling


class Ends(NamedTuple):
    """The first and the last layer of a model, the side of its patches, and how the last one orders their values."""

    first: nn.Conv2d | nn.Linear
    last: nn.Conv2d | nn.Linear
    side: int
    channels_last: bool


def ends(model: ModelMixin) -> Ends:
    """Find them."""
    if hasattr(model, "conv_in"):  # UNets: 3 x 3 kernels over single cells
        return Ends(model.conv_in, model.conv_out, 1, False)
    if hasattr(model, "x_embedder"):  # Flux, whose pipeline packs patches of 2 x 2 cells
        return Ends(model.x_embedder, model.proj_out, 2, False)
    return Ends(model.pos_embed.proj, model.proj_out, model.config.patch_size, True)  # SD3


def main(model: str, prediction: str, old_vae: str, new_vae: str, pictures: str, out: str, size_px: int = 512) -> None:
    """Align the model in the folder `model`, and save it for diffusers."""
    network = AutoModel.from_pretrained(model)
    crop = [transforms.Resize(size_px), transforms.CenterCrop(size_px)]
    crops = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(datasets.ImageFolder(pictures, crops), batch_size=8)
    vaes = [AutoencoderKL.from_pretrained(each).eval() for each in (old_vae, new_vae)]
    found = moments(vaes[0], vaes[1], loader, ends(network).side)
    of_old, of_new = found.explained()
    print(f"aligned: {of_old:.1%} of the old latents' variance is affine in the new ones, {of_new:.1%} the other way")
    fold(network, found, coupling(prediction))
    network.save_pretrained(out)


@torch.inference_mode()
def moments(old: AutoencoderKL, new: AutoencoderKL, loader: DataLoader, side: int) -> PatchMoments:
    """Means and covariances of both autoencoders' latents of the same pictures, scaled as the model sees them."""
    total, count = torch.zeros(()).double(), 0
    for x, _ in loader:
        z, w = (F.unfold(latents(vae, x), side, stride=side).transpose(1, 2).flatten(0, 1) for vae in (old, new))
        joint = torch.cat([torch.ones(len(z), 1), z, w], dim=1).double()  # its square has sums and products
        total, count, size = total + joint.T @ joint, count + len(z), z.shape[1] + 1
    mean = total[0] / count
    covariance = total / count - mean.outer(mean)
    z, w = slice(1, size), slice(size, None)
    return PatchMoments(mean_z=mean[z], mean_w=mean[w], zz=covariance[z, z], wz=covariance[w, z], ww=covariance[w, w])


def latents(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Encode and normalize as the model's pipeline does; measure the factors of a VAE that was fine-tuned anew."""
    return (vae.encode(x).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def coupling(prediction: str) -> Coupling:
    """Say how latents and noise are mixed in what the model sees and predicts, over the times of its training."""
    if prediction == "flow":  # rectified flow: noise minus latent
        t = torch.linspace(0.0, 1.0, 1001).double()
        return Coupling.of(1 - t, t, -torch.ones_like(t), torch.ones_like(t))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # SD's and SDXL's
    alphas_bar = scheduler.alphas_cumprod.double()
    alpha, sigma = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
    if prediction == "v_prediction":
        return Coupling.of(alpha, sigma, -sigma, alpha)
    return Coupling.of(alpha, sigma, torch.zeros_like(alpha), torch.ones_like(alpha))


@torch.no_grad()
def fold(network: ModelMixin, found: PatchMoments, mixed: Coupling) -> None:
    """Put both maps into the layers, in place. Both autoencoders have the same channels here."""
    alignment, (first, last, side, channels_last) = align(found, mixed), ends(network)
    seen = first.weight.double()
    if side == 1:  # the map acts on channels at each place of the kernel; outside of the picture there is no offset
        first.weight.copy_(torch.einsum("oiyx,ij->ojyx", seen, alignment.of_input.matrix))
        first.bias += seen.sum((2, 3)) @ alignment.of_input.offset
    else:
        first.weight.copy_((seen.flatten(1) @ alignment.of_input.matrix).view_as(seen))
        first.bias += seen.flatten(1) @ alignment.of_input.offset
    said = alignment.of_output
    if channels_last:  # (row, column, channel) in place of (channel, row, column)
        order = torch.arange(len(said.offset)).view(-1, side, side).permute(1, 2, 0).flatten()
        said = AffineMap(matrix=said.matrix[order][:, order], offset=said.offset[order])
    last.weight.copy_((said.matrix @ last.weight.double().flatten(1)).view_as(last.weight))
    last.bias.copy_(said.matrix @ last.bias.double() + said.offset)


if __name__ == "__main__":
    main(*sys.argv[1:7], *map(int, sys.argv[7:]))
