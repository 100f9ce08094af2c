"""`eqvae encode AUTOENCODER --data DATA --out DIR`."""

from collections.abc import Sequence

from eqvae.artifacts import claim_output_folder
from eqvae.autoencoders import load_autoencoder
from eqvae.images import open_images
from eqvae.runs.arguments import parse
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runtime.device import choose_device

_SHOWN = ("latent_mean", "latent_std")


def command(arguments: Sequence[str]) -> None:
    """Encode and print what the cache holds."""
    config = parse(EncodeConfig, "encode", arguments)
    # What is cheap to check comes before the autoencoder, which may be gigabytes from the hub.
    choose_device(config.device)
    open_images(config.data, label_column=config.label_column)
    claim_output_folder(config.out, "encode")
    figures = encode(config, load_autoencoder(config.autoencoder))
    if figures is not None:
        rate = f" at {figures['images_per_sec']:.3g} images/s" if "images_per_sec" in figures else ""
        latent = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in _SHOWN if name in figures)
        size = f"{figures['num_images']} images{rate}, {figures['num_bytes'] / 1e6:.1f} MB"
        print(f"{size}; {latent or 'tokens'}; cache in '{config.out}'")  # noqa: T201
