"""Begin a discrete autoencoder as a continuous one: tiny-kl's layers in tiny-vq's, with codes among its latents.

    python docs/results/tiny-vq/start.py DIR runs/tiny-vq-start

Trained from random weights, tiny-vq's codes gather where the first latents differ, in brightness; what differs in
colour only is then quantized away, no gradient asks for it, and the pictures stay grey. tiny-kl's latents hold colours
already. Its four channels, normalized, become the first four of sixteen; the others begin as small random projections.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from scipy.cluster.vq import kmeans2

from eqvae.autoencoders import build_autoencoder, load_autoencoder
from eqvae.images import evaluation_batches, open_images


@dataclass(frozen=True, kw_only=True)
class Options:
    """Begin tiny-vq as tiny-kl."""

    data: Annotated[str, tyro.conf.Positional]
    """Images whose latents become codes."""

    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write: diffusers' layout."""

    num_images: int = 200

    image_size: int = 128
    """In px."""


@torch.no_grad()
def main(options: Options) -> None:
    """Write the folder."""
    continuous, discrete = load_autoencoder("tiny-kl").eval(), build_autoencoder("tiny-vq", seed=0).eval()
    source = open_images(options.data)
    batches = evaluation_batches(
        source, image_size_px=options.image_size, batch_size=20, num_images=options.num_images, num_workers=0
    )
    images = torch.cat([batch.images for batch in batches])
    latents = torch.cat([continuous.encode(part).mean for part in images.split(20)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))

    theirs, ours = continuous.state_dict(), discrete.state_dict()
    merged = {name: theirs[name] if name in theirs and theirs[name].shape == value.shape else value.clone()
              for name, value in ours.items()}  # fmt: skip
    to_mean = theirs["model.quant_conv.weight"][:4, :, 0, 0] / std[:, None]
    weight, bias = theirs["model.encoder.conv_out.weight"], theirs["model.encoder.conv_out.bias"]
    merged["model.encoder.conv_out.weight"][:4] = torch.einsum("oc,cikl->oikl", to_mean, weight)
    merged["model.encoder.conv_out.bias"][:4] = to_mean @ bias + (theirs["model.quant_conv.bias"][:4] - mean) / std
    for layer in ("quant_conv", "post_quant_conv"):
        merged[f"model.{layer}.weight"] = torch.eye(16)[:, :, None, None]
        merged[f"model.{layer}.bias"] = torch.zeros(16)
    back = theirs["model.post_quant_conv.weight"][..., 0, 0]
    merged["model.post_quant_conv.weight"][:4, :4, 0, 0] = back * std
    merged["model.post_quant_conv.bias"][:4] = back @ mean + theirs["model.post_quant_conv.bias"]
    merged["model.decoder.conv_in.weight"][:, :4] = theirs["model.decoder.conv_in.weight"]
    merged["model.decoder.conv_in.weight"][:, 4:] *= 0.1
    discrete.load_state_dict(merged)

    def features() -> torch.Tensor:
        return torch.cat([discrete.encode(part).mean for part in images.split(20)]).movedim(1, -1).flatten(0, -2)

    own_mean, own_std = features().mean(0)[4:], features().std(0)[4:]
    scale = 0.3 / own_std
    merged["model.encoder.conv_out.weight"][4:] *= scale[:, None, None, None]
    merged["model.encoder.conv_out.bias"][4:] = (merged["model.encoder.conv_out.bias"][4:] - own_mean) * scale
    discrete.load_state_dict(merged)
    codes, _ = kmeans2(features().numpy(), 1024, minit="points", iter=10, rng=0)
    merged["model.quantize.embedding.weight"] = torch.from_numpy(codes)
    discrete.load_state_dict(merged)
    options.out.mkdir(parents=True, exist_ok=True)
    discrete.save(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options))
