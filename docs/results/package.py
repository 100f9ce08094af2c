"""Put the model that a fine-tuning run exported into the package, in half precision, as a preset's weights.

    python docs/results/package.py tiny-kl runs/tiny-kl
    python docs/results/package.py tiny-vq runs/tiny-vq

Takes any preset whose weights lie in the package. Says what half precision costs on the built-in photographs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from eqvae.artifacts.files import read_json
from eqvae.artifacts.names import AUTOENCODER, MODEL_CARD
from eqvae.artifacts.records import ModelCard, to_uint8
from eqvae.autoencoders import Autoencoder, LatentStatistics, build_autoencoder, load_autoencoder
from eqvae.autoencoders.presets import PACKAGED, PACKAGED_NAMES
from eqvae.autoencoders.protocol import DiscreteAutoencoder
from eqvae.images import evaluation_batches, open_images
from eqvae.metrics.per_image import psnr_db, token_agreement


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put a run's model into the package."""

    preset: Annotated[str, tyro.conf.Positional]
    """Whose weights they become: `tiny-kl` or `tiny-vq`."""

    run: Annotated[Path, tyro.conf.Positional]
    """A finished run of `eqvae finetune`."""

    into: Path = PACKAGED
    """The folder of all packaged weights."""

    image_size: int = 256
    """Of the photographs, in px."""


def package(preset: str, run: Path, into: Path) -> Path:
    """Write the weights, the config and the card.

    Args:
        preset: Whose weights they become.
        run: A finished run.
        into: The folder of all packaged weights.

    Returns:
        The preset's folder.

    Raises:
        SystemExit: If the package has no place for the preset, or the run's model is not of its architecture, or too
            large for half precision.
    """
    if preset not in PACKAGED_NAMES:
        raise SystemExit(f"The package carries no weights of '{preset}', only of {', '.join(PACKAGED_NAMES)}")
    autoencoder = load_autoencoder(str(run))
    if shapes(autoencoder) != shapes(build_autoencoder(preset, seed=0)):
        raise SystemExit(f"The model of '{run}' has another architecture than '{preset}'")
    autoencoder.half()
    if not all(bool(value.isfinite().all()) for value in autoencoder.parameters()):
        raise SystemExit(f"Weights of '{run}' are too large for half precision")
    content = read_json(run / AUTOENCODER / MODEL_CARD)
    statistics = LatentStatistics(mean=tuple(content["latent_mean"]), std=tuple(content["latent_std"]))
    autoencoder.set_latent_statistics(statistics)
    folder = into / preset
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder.save(folder)
    card = content | {
        "latent_mean": statistics.mean,
        "latent_std": statistics.std,
        "fingerprint": load_autoencoder(str(folder)).fingerprint(),
        "data": without_machine(content["data"]),
        "recipe": {name: without_machine(value) for name, value in content["recipe"].items()},
    }
    ModelCard(**card).write(folder)
    return folder


def shapes(autoencoder: Autoencoder) -> dict[str, torch.Size]:
    """What two models of one architecture share."""
    return {name: value.shape for name, value in autoencoder.state_dict().items()}


def without_machine(value: Any) -> Any:
    """Keep the last part of an absolute path, which nobody else has."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


@torch.inference_mode()
def compare(full: Autoencoder, half: Autoencoder, image_size_px: int) -> str:
    """Reconstruct the built-in photographs with both.

    Args:
        full: The run's model.
        half: The packaged one, which computes in fp32 with rounded weights.
        image_size_px: Side of the images.

    Returns:
        What is lost, in a sentence.
    """
    source = open_images("photos", split="evaluation")
    (batch,) = evaluation_batches(
        source, image_size_px=image_size_px, batch_size=len(source), num_images=len(source), num_workers=0
    )
    latents = [model.encode(batch.images).mean for model in (full, half)]
    decoded = [to_uint8(model.decode(z)) for model, z in zip((full, half), latents, strict=True)]
    before, after = (float(psnr_db(to_uint8(batch.images), images).mean()) for images in decoded)
    moved = float((latents[1] - latents[0]).square().mean().sqrt() / latents[0].std())
    said = f"PSNR {before:.3f} -> {after:.3f} dB, latents move by {100 * moved:.3f}% of their deviation"
    if isinstance(full, DiscreteAutoencoder) and isinstance(half, DiscreteAutoencoder):
        tokens = [model.quantize(z).tokens for model, z in zip((full, half), latents, strict=True)]
        said += f", {100 * float(token_agreement(*tokens).mean()):.2f}% of the tokens stay"
    return said


def main(options: Options) -> None:
    """Package, and say what it costs.

    Args:
        options: As given to the command.
    """
    folder = package(options.preset, options.run, options.into)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    lost = compare(load_autoencoder(str(options.run)), load_autoencoder(str(folder)), options.image_size)
    print(f"{options.preset}: {num_bytes / 1e6:.1f} MB in half precision; {lost}")  # noqa: T201


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
