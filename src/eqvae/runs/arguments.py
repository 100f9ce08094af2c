"""Being moved: `eqvae.cli.parse`."""

from eqvae.cli import parse

__all__ = ["parse"]
