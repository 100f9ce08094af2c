"""`eqvae evaluate AUTOENCODER --data DATA --out DIR`."""

from collections.abc import Sequence

from eqvae.artifacts import claim_output_folder
from eqvae.autoencoders import load_autoencoder
from eqvae.images import open_images
from eqvae.runs.arguments import parse
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runtime.device import choose_device


def command(arguments: Sequence[str]) -> None:
    """Measure and print the main figures."""
    config = parse(EvaluateConfig, "evaluate", arguments)
    # What is cheap to check comes before the autoencoder, which may be gigabytes from the hub.
    choose_device(config.device)
    open_images(config.data, split="evaluation")
    claim_output_folder(config.out, "evaluate")
    figures = evaluate(config, load_autoencoder(config.autoencoder))
    for name, value in figures.items():
        if name in _MAIN or name.startswith(_MAIN_DISTANCES):
            print(f"{name:36} {value:.4f}")  # noqa: T201
    print(f"{'num_images':36} {figures['num_images']:.0f}")  # noqa: T201


_MAIN = frozenset(
    {"equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "lpips", "latent_std",
     "token_agreement_rotation", "token_agreement_scale", "codebook_usage", "codebook_perplexity",
     "intrinsic_dimension", "spectrum_excess_db"}
)  # fmt: skip
_MAIN_DISTANCES = ("rfid", "rfd_", "ifid", "ifd_")
