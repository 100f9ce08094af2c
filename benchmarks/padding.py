"""What padding by reflection does to the borders of pictures decoded from scaled latents.

    python -m benchmarks padding [--max-steps 150] [--image-size 128] [--num-images 12] [--json FILE]

Two fine-tunings by one recipe differ in `--padding-mode` alone, from the packaged `tiny-kl`, on the built-in
photographs; both are measured, and the base, on crops of the photographs held out. For each scale of Section C.3 of
arXiv:2502.09509 the error |D(tau z) - tau x| is averaged over a frame as wide as one latent cell and over what is
inside; their quotient is what a border costs. `reconstruction` is the same of D(E(x)).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.machine import describe_machine
from eqvae import load_autoencoder, set_padding_mode
from eqvae.artifacts.files import write_json
from eqvae.autoencoders import Autoencoder
from eqvae.autoencoders.padding import PaddingMode
from eqvae.images import adm_crop, open_images, to_images
from eqvae.metrics.per_image import evaluation_transforms
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runtime.run_folder import from_flat
from eqvae.transforms import IDENTITY


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What padding by reflection does to the borders of pictures decoded from scaled latents."""

    max_steps: int = 150
    """Of each fine-tuning."""

    image_size: int = 128
    """Side of the crops, in px."""

    num_images: int = 12
    """Crops of the held-out photographs."""

    json: Path | None = None
    """Where the figures go."""

    threads: int = 1
    """Of PyTorch."""


def run(benchmark: str, options: Padding) -> None:
    """Fine-tune under both, measure, and print a table."""
    torch.set_num_threads(options.threads)
    x = crops(options)
    figures = {"base, zeros": borders(load_autoencoder("tiny-kl"), x)}
    switched = load_autoencoder("tiny-kl")
    set_padding_mode(switched, "reflect")
    figures["base, switched to reflect"] = borders(switched, x)
    with tempfile.TemporaryDirectory() as folder:
        for mode in get_args(PaddingMode):
            out = Path(folder) / mode
            settings = {
                "image_size": options.image_size, "max_steps": options.max_steps, "batch_size": 4,
                "adversarial_weight": 0.0, "perceptual": "none", "learning_rate": 1e-4, "num_validation_images": 2,
                "num_statistics_images": 4, "validate_every": options.max_steps, "device": "cpu", "num_workers": 0,
            }  # fmt: skip
            finetune(
                from_flat(FinetuneConfig, autoencoder="tiny-kl", data="photos", out=out, padding_mode=mode, **settings)
            )
            figures[f"EQ, {mode}"] = borders(load_autoencoder(str(out)), x)
    for name, own in figures.items():
        print(f"{name:28}", "  ".join(f"{key} {value:.3f}" for key, value in own.items()))
    if options.json is not None:
        write_json(options.json, describe_machine(benchmark, options) | {"figures": figures})


def crops(options: Padding) -> Float[Tensor, "n 3 h w"]:
    """Cut the held-out photographs into squares that do not overlap, each twice the crop's side."""
    source, side, found = open_images("photos", split="evaluation"), 2 * options.image_size, []
    pictures = [source.read(index) for index in range(len(source))]
    places = [
        (picture, left, top)
        for picture in pictures
        for top in range(0, picture.height - side + 1, side)
        for left in range(0, picture.width - side + 1, side)
    ]
    step = max(len(places) // options.num_images, 1)
    for picture, left, top in places[::step][: options.num_images]:
        found.append(adm_crop(picture.crop((left, top, left + side, top + side)), options.image_size))
    return to_images(found)


@torch.inference_mode()
def borders(autoencoder: Autoencoder, x: Float[Tensor, "n 3 h w"]) -> dict[str, float]:
    """Average the error over the frame and inside; `border` and `interior` are means over the scales."""
    z, sums = autoencoder.encode(x).mean, dict[str, float]()
    scales = {name: tau for name, tau in evaluation_transforms().items() if name.startswith("scale")}
    errors = dict[str, tuple[float, float]]()
    for name, tau in {"reconstruction": IDENTITY, **scales}.items():
        error = (autoencoder.decode(tau(z)) - tau(x)).abs().mean((0, 1))
        frame = torch.ones_like(error, dtype=torch.bool)
        inside = slice(autoencoder.stride, -autoencoder.stride)
        frame[inside, inside] = False
        errors[name] = float(error[frame].mean()), float(error[~frame].mean())
        sums[f"{name}_border_over_interior"] = errors[name][0] / errors[name][1]
    for index, kind in enumerate(("border", "interior")):
        sums[kind] = sum(errors[name][index] for name in scales) / len(scales)
    return sums | {"border_over_interior": sums["border"] / sums["interior"]}
