"""The configuration of a fine-tuning run. Every field is a flag of `eqvae finetune`."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError, nearest_name
from eqvae.losses.reconstruction import Perceptual
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_ranges
from eqvae.transforms import PRESETS, Interpolation, TransformSampler


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune an autoencoder with EQ-VAE (Equations 5 and 7 of arXiv:2502.09509)."""

    autoencoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER")]
    """Preset, hub id or path; `untrained:NAME` trains an architecture from scratch."""

    data: str
    """`photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[:SPLIT]`."""

    out: Path
    """Output folder; the same command run again resumes what lies there."""

    max_steps: int = 10_000
    """Optimizer steps; the paper's 5 epochs are 50,000, its first 10,000 bring most of the gain (Figure 5)."""

    image_size: int = 256
    """Side of the training crops, in px."""

    batch_size: int = 10
    """Images per optimizer step; 10 in the paper, 160 in the released code."""

    gradient_accumulation_steps: int = 1
    """Parts into which a batch is split to save memory; each part draws its own tau."""

    learning_rate: float = 1e-4
    """Peak rate of AdamW for encoder, decoder and discriminator."""

    lr_scheduler: Literal["cosine", "constant"] = "cosine"
    """How the rate goes on after its warm-up; the released code's is constant."""

    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; None: a twentieth of max_steps, at most 1,000."""

    adam_beta1: float = 0.5
    """LDM's value for autoencoders."""

    adam_beta2: float = 0.9
    """LDM's value for autoencoders."""

    weight_decay: float = 0.0
    """Decoupled weight decay; 0 in LDM."""

    max_grad_norm: float = 1.0
    """Largest norm of the gradient of the loss per input pixel and colour; 0 does not clip."""

    ema_decay: float = 0.999
    """Decay of the averaged weights that are validated and exported; 0 exports the last weights."""

    transforms: str = "paper"
    """Preset for tau: `paper`, `released-code`, `plain`, `rotation`, `scale` or `anisotropic` (Table 5)."""

    equivariance_probability: float | None = None
    """Probability of the equivariance branch, else tau is the identity; None: the preset's (0.5)."""

    rotation_probability: float | None = None
    """Probability that the equivariance branch rotates, else it only scales; None: the preset's (1)."""

    min_scale: float | None = None
    """Smallest scale; None: the preset's (0.25)."""

    interpolation: Interpolation | None = None
    """How scales resize images and latents; None: the preset's (bicubic in the paper)."""

    antialias: bool | None = None
    """Whether scales low-pass first; None: the preset's (no)."""

    objective: Literal["implicit", "explicit", "explicit-stop-gradient"] = "implicit"
    """`implicit` is EQ-VAE, Equation 5; the others add Equation 4 to Equation 1, for the ablation of Table 7."""

    freeze_encoder: bool = False
    """Train the decoder alone, as SD-VAE-FT-MSE was: latents, and with them equivariance errors and tokens, stay as
    they are."""

    explicit_weight: float = 0.1
    """Weight of Equation 4 where the objective is explicit."""

    perceptual: Perceptual = "efficientnet-lite0"
    """`lpips` is the paper's and needs VGG16's weights; `efficientnet-lite0` works offline; or `none`."""

    perceptual_weight: float = 1.0
    """Weight of the perceptual distance beside L1."""

    resolution_weighting: Literal["area", "equal"] = "area"
    """How much a picture scaled by s weighs: its pixels' number s^2, as LDM's sums do, or as much as a whole one."""

    kl_weight: float = 1e-6
    """lambda_reg: weight of the divergence to N(0, I); none for deterministic encoders."""

    codebook: Literal["gradient", "ema"] = "gradient"
    """How a discrete autoencoder's codes learn: by `codebook_weight`'s gradient, as in VQ-GAN, or as averages of the
    latents that they stand for."""

    codebook_weight: float = 1.0
    """Weight of `|sg[z] - e|^2` per value, which pulls codes to latents; taming-transformers trained with 0.25."""

    commitment_weight: float = 0.25
    """Weight of `|z - sg[e]|^2` per value, which pulls latents to codes: beta of arXiv:1711.00937, Equation 3;
    taming-transformers trained with 1, its beta being on the other term."""

    codebook_decay: float = 0.99
    """Of the averages of `ema`."""

    restart_dead_codes: int = 0
    """Steps without use after which a code starts again at a latent of the batch; 0: never."""

    adversarial_weight: float = 0.5
    """Weight of L_gan on top of LDM's adaptive weight; 0 trains no discriminator."""

    discriminator_warmup_steps: int | None = None
    """First steps, in which only the discriminator learns; None: a twentieth of max_steps, at most 1,000."""

    seed: int = 0
    """Of data order, crops, tau, posterior samples and the discriminator's first weights."""

    validation_data: str = "photos"
    """Images for validation; of `photos`, the photographs held out from training."""

    num_validation_images: int = 32
    """How many of them at most, spread over the data."""

    num_statistics_images: int = 512
    """Training images, spread over the data, on which the exported scaling and shift factors are measured."""

    validate_every: int | None = None
    """Steps between validations; None: a tenth of max_steps."""

    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written when the run is interrupted."""

    log_every: int = 10
    """Steps between records of the journal."""

    flip: bool = True
    """Mirror half of the training crops."""

    precision: Precision = "bf16"
    """Autocast precision of the networks; weights stay fp32."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    compile: bool = False
    """Compile encoder and decoder with torch.compile."""

    tensorboard: bool = False
    """Write losses and validations for TensorBoard too; needs `pip install eqvae[tensorboard]`."""

    num_workers: int = 1
    """Processes that read images ahead; 0 reads in the training process. Changes no result."""

    dry_run: bool = False
    """Print the resolved configuration, sizes, FLOPs and memory, and stop."""

    def resolved(self) -> "FinetuneConfig":
        """Fill in every None and check what can be checked without reading data."""
        check_ranges(self, _RANGES)
        if self.batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"--batch-size {self.batch_size} can't be split into {self.gradient_accumulation_steps} equal parts",
                "Choose --gradient-accumulation-steps that divides it",
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs TensorBoard", "Run: pip install 'eqvae[tensorboard]'")
        if self.freeze_encoder and (self.codebook == "ema" or self.restart_dead_codes):
            flag = "--codebook ema" if self.codebook == "ema" else "--restart-dead-codes"
            raise UserError(
                f"{flag} moves codes, and --freeze-encoder leaves tokens as they are", "Leave out one of them"
            )
        if self.freeze_encoder and self.objective != "implicit":
            raise UserError(
                f"--objective {self.objective} trains the encoder, which --freeze-encoder leaves as it is",
                "Use --objective implicit, or no --freeze-encoder",
            )
        sampler = self.sampler()
        twentieth = min(self.max_steps // 20, 1000)
        adversarial = self.adversarial_weight > 0
        config = replace(
            self,
            lr_warmup_steps=twentieth if self.lr_warmup_steps is None else self.lr_warmup_steps,
            discriminator_warmup_steps=(
                0 if not adversarial
                else twentieth if self.discriminator_warmup_steps is None
                else self.discriminator_warmup_steps
            ),
            validate_every=max(self.max_steps // 10, 1) if self.validate_every is None else self.validate_every,
            equivariance_probability=sampler.equivariance_probability,
            rotation_probability=sampler.rotation_probability,
            min_scale=sampler.min_scale,
            interpolation=sampler.interpolation,
            antialias=sampler.antialias,
        )  # fmt: skip
        if (config.discriminator_warmup_steps or 0) >= config.max_steps:
            raise UserError(
                f"--discriminator-warmup-steps {config.discriminator_warmup_steps} leaves no step to the autoencoder",
                f"Use fewer than --max-steps {config.max_steps}",
            )
        return config

    def check_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Refuse what the autoencoder does not have."""
        if isinstance(autoencoder, DiscreteAutoencoder):
            return
        for flag, asked in (("--codebook ema", self.codebook == "ema"),
                            ("--restart-dead-codes", self.restart_dead_codes > 0)):  # fmt: skip
            if asked:
                raise UserError(f"{flag} is for discrete autoencoders, and '{self.autoencoder}' has no codebook",
                                "Leave it out")  # fmt: skip

    def sampler(self) -> TransformSampler:
        """Build the sampler of tau."""
        if self.transforms not in PRESETS:
            raise UserError(f"--transforms '{self.transforms}' is no preset", nearest_name(self.transforms, PRESETS))
        names = ("equivariance_probability", "rotation_probability", "min_scale", "interpolation", "antialias")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        try:
            return replace(PRESETS[self.transforms], **changes)
        except ValueError as error:
            raise UserError(str(error)) from None


_RANGES = (
    (AT_LEAST_1,
     ("max_steps", "image_size", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every",
      "validate_every", "num_validation_images", "num_statistics_images")),
    (POSITIVE, ("learning_rate",)),
    (NOT_NEGATIVE,
     ("seed", "num_workers", "lr_warmup_steps", "discriminator_warmup_steps", "weight_decay", "max_grad_norm",
      "explicit_weight", "perceptual_weight", "kl_weight", "adversarial_weight", "codebook_weight",
      "commitment_weight", "restart_dead_codes")),
    (BELOW_1, ("adam_beta1", "adam_beta2", "ema_decay", "codebook_decay")),
)  # fmt: skip

FREE_TO_CHANGE = frozenset(
    {"out", "num_workers", "device", "log_every", "validate_every", "checkpoint_every", "tensorboard", "dry_run",
     "compile", "num_statistics_images"}
)  # fmt: skip
"""Fields that may differ between a run and its resumption."""
