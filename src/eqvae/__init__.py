"""EQ-VAE: equivariance-regularized latent spaces for image generation (arXiv:2502.09509).

from eqvae import FinetuneConfig, finetune                     # every command is a function of its configuration
finetune(FinetuneConfig(autoencoder="tiny-kl", data="photos", out=Path("runs/eq")))

from eqvae import TransformSampler, eq_vae_loss, load_autoencoder              # or the loss, in a loop of your own
loss = eq_vae_loss(load_autoencoder("tiny-kl"), x, TransformSampler()).mean()
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eqvae.autoencoders import Autoencoder, DiscreteAutoencoder, Posterior, build_autoencoder, load_autoencoder
    from eqvae.autoencoders.padding import set_padding_mode
    from eqvae.autoencoders.tiling import in_tiles
    from eqvae.equivariance import Decoded, decode_transformed, eq_vae_loss, equivariance_loss, explicit_loss, vae_loss
    from eqvae.errors import Interrupted, UserError
    from eqvae.generators.alignment import AdaptationConfig
    from eqvae.generators.diffusion import DitConfig
    from eqvae.generators.gat import GatConfig
    from eqvae.generators.interpolant import SitConfig
    from eqvae.generators.maskgit import MaskgitConfig
    from eqvae.generators.protocol import ReadingConfig
    from eqvae.generators.repa import RepaConfig
    from eqvae.images.bands import RangeConfig
    from eqvae.losses.adversarial import AdversarialConfig
    from eqvae.losses.codebook import CodebookConfig
    from eqvae.losses.reconstruction import ReconstructionConfig
    from eqvae.methods import Batch, Drawn, Encoded, Mixture, Pair, Term, method, parse_method
    from eqvae.methods.transform_config import TransformConfig
    from eqvae.metrics.frechet import frechet_distance
    from eqvae.metrics.intrinsic_dimension import intrinsic_dimension
    from eqvae.metrics.per_image import equivariance_error, psnr_db, ssim
    from eqvae.runs.adapt import AdaptConfig, adapt
    from eqvae.runs.compare import CompareConfig, compare
    from eqvae.runs.convert import ConvertConfig, convert
    from eqvae.runs.demo import DemoConfig, demo
    from eqvae.runs.encode import EncodeConfig, encode
    from eqvae.runs.evaluate import EvaluateConfig, evaluate
    from eqvae.runs.explore import ExploreConfig, explore
    from eqvae.runs.finetune import FinetuneConfig, finetune
    from eqvae.runs.push import PushConfig, push
    from eqvae.runs.rank import RankConfig, rank
    from eqvae.runs.report import ReportConfig, report
    from eqvae.runs.reproduce import ReproduceConfig, reproduce
    from eqvae.runs.sample import SampleConfig, sample
    from eqvae.runs.score import ScoreConfig, score
    from eqvae.runs.train import TrainConfig, train
    from eqvae.training.autoencoder_config import AutoencoderTraining, OptimizerConfig
    from eqvae.transforms import IDENTITY, Compose, Draw, Rotate, Scale, Transform, TransformSampler

_HOMES = {
    "eqvae.transforms": ("IDENTITY", "Compose", "Draw", "Rotate", "Scale", "Transform", "TransformSampler"),
    "eqvae.equivariance": (
        "Decoded", "decode_transformed", "eq_vae_loss", "equivariance_loss", "explicit_loss", "vae_loss",
    ),
    "eqvae.autoencoders": (
        "Autoencoder", "DiscreteAutoencoder", "Posterior", "build_autoencoder", "load_autoencoder",
    ),
    "eqvae.autoencoders.padding": ("set_padding_mode",),
    "eqvae.autoencoders.tiling": ("in_tiles",),
    "eqvae.metrics.per_image": ("equivariance_error", "psnr_db", "ssim"),
    "eqvae.metrics.frechet": ("frechet_distance",),
    "eqvae.metrics.intrinsic_dimension": ("intrinsic_dimension",),
    "eqvae.errors": ("Interrupted", "UserError"),
    "eqvae.images.bands": ("RangeConfig",),
    "eqvae.losses.adversarial": ("AdversarialConfig",),
    "eqvae.losses.codebook": ("CodebookConfig",),
    "eqvae.losses.reconstruction": ("ReconstructionConfig",),
    "eqvae.generators.protocol": ("ReadingConfig",),
    "eqvae.methods.transform_config": ("TransformConfig",),
    "eqvae.methods": ("Batch", "Drawn", "Encoded", "Mixture", "Pair", "Term", "method", "parse_method"),
    "eqvae.training.autoencoder_config": ("AutoencoderTraining", "OptimizerConfig"),
    "eqvae.generators.alignment": ("AdaptationConfig",),
    "eqvae.generators.diffusion": ("DitConfig",),
    "eqvae.generators.gat": ("GatConfig",),
    "eqvae.generators.interpolant": ("SitConfig",),
    "eqvae.generators.repa": ("RepaConfig",),
    "eqvae.generators.maskgit": ("MaskgitConfig",),
} | {
    f"eqvae.runs.{name}": (name, f"{name.title()}Config")
    for name in ("finetune", "evaluate", "encode", "train", "adapt", "sample", "score", "compare", "rank", "reproduce",
                 "explore", "report", "convert", "push", "demo")
}  # fmt: skip
"""Where the public names are; imported when first used, since diffusers and torchmetrics take seconds."""

_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IDENTITY",
    "AdaptConfig",
    "AdaptationConfig",
    "AdversarialConfig",
    "Autoencoder",
    "AutoencoderTraining",
    "Batch",
    "CodebookConfig",
    "CompareConfig",
    "Compose",
    "ConvertConfig",
    "Decoded",
    "DemoConfig",
    "DiscreteAutoencoder",
    "DitConfig",
    "Draw",
    "Drawn",
    "EncodeConfig",
    "Encoded",
    "EvaluateConfig",
    "ExploreConfig",
    "FinetuneConfig",
    "GatConfig",
    "Interrupted",
    "MaskgitConfig",
    "Mixture",
    "OptimizerConfig",
    "Pair",
    "Posterior",
    "PushConfig",
    "RangeConfig",
    "RankConfig",
    "ReadingConfig",
    "ReconstructionConfig",
    "RepaConfig",
    "ReportConfig",
    "ReproduceConfig",
    "Rotate",
    "SampleConfig",
    "Scale",
    "ScoreConfig",
    "SitConfig",
    "Term",
    "TrainConfig",
    "Transform",
    "TransformConfig",
    "TransformSampler",
    "UserError",
    "adapt",
    "build_autoencoder",
    "compare",
    "convert",
    "decode_transformed",
    "demo",
    "encode",
    "eq_vae_loss",
    "equivariance_error",
    "equivariance_loss",
    "evaluate",
    "explicit_loss",
    "explore",
    "finetune",
    "frechet_distance",
    "in_tiles",
    "intrinsic_dimension",
    "load_autoencoder",
    "method",
    "parse_method",
    "psnr_db",
    "push",
    "rank",
    "report",
    "reproduce",
    "sample",
    "score",
    "set_padding_mode",
    "ssim",
    "train",
    "vae_loss",
]

try:
    __version__ = version("eqvae")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """List the public names, those too that are not imported yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'eqvae' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
