"""`eqvae evaluate AUTOENCODER --data DATA --out DIR`."""

from collections.abc import Sequence

from eqvae.autoencoders import load_autoencoder
from eqvae.cli.arguments import parse
from eqvae.metrics.evaluation import EvaluateConfig, evaluate


def command(arguments: Sequence[str]) -> None:
    """Measure and print the main figures.

    Args:
        arguments: What follows the command's name.
    """
    config = parse(EvaluateConfig, "evaluate", arguments)
    figures = evaluate(config, load_autoencoder(config.autoencoder))
    for name in ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "lpips", "latent_std"):
        if name in figures:
            print(f"{name:28} {figures[name]:.4f}")  # noqa: T201
    print(f"{'num_images':28} {figures['num_images']:.0f}")  # noqa: T201
