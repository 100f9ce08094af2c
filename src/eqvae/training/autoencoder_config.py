"""How an autoencoder is trained: tau, the terms of Equation 5, the optimizer. Nested, and flat as flags."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError, nearest_name
from eqvae.losses.adversarial import AdversarialConfig
from eqvae.losses.codebook import CodebookConfig
from eqvae.losses.reconstruction import ReconstructionConfig
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, change_flat, check_ranges
from eqvae.transforms import PRESETS, Interpolation, TransformSampler


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Which transformations are drawn, and how often."""

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

    def sampler(self) -> TransformSampler:
        """Build the sampler of tau."""
        if self.transforms not in PRESETS:
            raise UserError(f"--transforms '{self.transforms}' is no preset", nearest_name(self.transforms, PRESETS))
        changes = {name: getattr(self, name) for name in _DRAWN if getattr(self, name) is not None}
        try:
            return replace(PRESETS[self.transforms], **changes)
        except ValueError as error:
            raise UserError(str(error)) from None

    def resolved(self) -> "TransformConfig":
        """Fill in the preset's values."""
        sampler = self.sampler()
        return replace(self, **{name: getattr(sampler, name) for name in _DRAWN})


_DRAWN = ("equivariance_probability", "rotation_probability", "min_scale", "interpolation", "antialias")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for encoder, decoder and discriminator, and the average of the weights."""

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


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """How an autoencoder is trained: all that a step depends on."""

    max_steps: int = 10_000
    """Optimizer steps; the paper's 5 epochs are 50,000, its first 10,000 bring most of the gain (Figure 5)."""

    polish_steps: int = 0
    """Further steps that train the decoder alone, by Equation 1: latents stay as they are, and detail comes back."""

    batch_size: int = 10
    """Images per optimizer step, of all processes together; 10 in the paper, 160 in the released code."""

    gradient_accumulation_steps: int = 1
    """Parts into which a batch is split to save memory; each part draws its own tau."""

    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = field(default_factory=OptimizerConfig)

    transform: Annotated[TransformConfig, OmitArgPrefixes] = field(default_factory=TransformConfig)

    objective: Literal["implicit", "explicit", "explicit-stop-gradient"] = "implicit"
    """`implicit` is EQ-VAE, Equation 5; the others add Equation 4 to Equation 1, for the ablation of Table 7."""

    freeze_encoder: bool = False
    """Train the decoder alone, as SD-VAE-FT-MSE was: latents, and with them equivariance errors and tokens, stay as
    they are."""

    explicit_weight: float = 0.1
    """Weight of Equation 4 where the objective is explicit."""

    reconstruction: Annotated[ReconstructionConfig, OmitArgPrefixes] = field(default_factory=ReconstructionConfig)

    kl_weight: float = 1e-6
    """lambda_reg: weight of the divergence to N(0, I); none for deterministic encoders."""

    codes: Annotated[CodebookConfig, OmitArgPrefixes] = field(default_factory=CodebookConfig)

    adversarial: Annotated[AdversarialConfig, OmitArgPrefixes] = field(default_factory=AdversarialConfig)

    seed: int = 0
    """Of data order, crops, tau, posterior samples and the discriminator's first weights."""

    precision: Precision = "bf16"
    """Autocast precision of the networks; weights stay fp32."""

    def resolved(self) -> "AutoencoderTraining":
        """Fill in every None and refuse what does not go together."""
        check_ranges(self, _RANGES)
        if self.batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"--batch-size {self.batch_size} can't be split into {self.gradient_accumulation_steps} equal parts",
                "Choose --gradient-accumulation-steps that divides it",
            )
        if self.freeze_encoder and (self.codes.codebook == "ema" or self.codes.restart_dead_codes):
            flag = "--codebook ema" if self.codes.codebook == "ema" else "--restart-dead-codes"
            raise UserError(
                f"{flag} moves codes, and --freeze-encoder leaves tokens as they are", "Leave out one of them"
            )
        if self.freeze_encoder and self.objective != "implicit":
            raise UserError(
                f"--objective {self.objective} trains the encoder, which --freeze-encoder leaves as it is",
                "Use --objective implicit, or no --freeze-encoder",
            )
        if self.freeze_encoder and self.polish_steps:
            raise UserError(
                f"--polish-steps {self.polish_steps} follows steps that train the encoder, which --freeze-encoder "
                "leaves as it is",
                "Use more --max-steps instead",
            )
        twentieth = min(self.max_steps // 20, 1000)
        lr_warmup, warmup = self.optimizer.lr_warmup_steps, self.adversarial.discriminator_warmup_steps
        warmup = twentieth if warmup is None else warmup
        warmup = warmup if self.adversarial.adversarial_weight > 0 else 0
        if warmup >= self.max_steps:
            raise UserError(
                f"--discriminator-warmup-steps {warmup} leaves no step to the autoencoder",
                f"Use fewer than --max-steps {self.max_steps}",
            )
        return change_flat(
            replace(self, transform=self.transform.resolved()),
            lr_warmup_steps=twentieth if lr_warmup is None else lr_warmup,
            discriminator_warmup_steps=warmup,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.max_steps + self.polish_steps

    def at(self, step: int) -> "AutoencoderTraining":
        """How the next step trains after so many: from `max_steps` on the decoder alone, by Equation 1."""
        return self if step < self.max_steps else self._polishing

    @cached_property
    def _polishing(self) -> "AutoencoderTraining":
        return change_flat(
            self, max_steps=self.total_steps, discriminator_warmup_steps=self.max_steps, freeze_encoder=True,
            transforms="plain", equivariance_probability=0.0, objective="implicit", codebook="gradient",
            restart_dead_codes=0,
        )  # fmt: skip

    def check_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Refuse what the autoencoder does not have."""
        if isinstance(autoencoder, DiscreteAutoencoder):
            return
        for flag, asked in (("--codebook ema", self.codes.codebook == "ema"),
                            ("--restart-dead-codes", self.codes.restart_dead_codes > 0)):  # fmt: skip
            if asked:
                raise UserError(f"{flag} is for discrete autoencoders, and '{autoencoder.name}' has no codebook",
                                "Leave it out")  # fmt: skip

    def check_processes(self, count: int) -> None:
        """Refuse a batch that can't be split over processes."""
        num_parts = count * self.gradient_accumulation_steps
        if self.batch_size % num_parts:
            raise UserError(
                f"--batch-size {self.batch_size} can't be split over {count} processes and "
                f"{self.gradient_accumulation_steps} equal parts",
                f"Choose a multiple of {num_parts}",
            )

    def rows(self, rank: int, count: int) -> list[int]:
        """Which images of a batch are a process's: as many of each micro-batch as any other's, in its order."""
        num_rows = self.batch_size // (count * self.gradient_accumulation_steps)
        firsts = range(rank * num_rows, self.batch_size, count * num_rows)
        return [first + row for first in firsts for row in range(num_rows)]


_RANGES = (
    (AT_LEAST_1, ("max_steps", "batch_size", "gradient_accumulation_steps")),
    (POSITIVE, ("learning_rate",)),
    (NOT_NEGATIVE,
     ("seed", "polish_steps", "lr_warmup_steps", "discriminator_warmup_steps", "weight_decay", "max_grad_norm",
      "explicit_weight", "perceptual_weight", "kl_weight", "adversarial_weight", "codebook_weight", "commitment_weight",
      "restart_dead_codes")),
    (BELOW_1, ("adam_beta1", "adam_beta2", "ema_decay", "codebook_decay")),
)  # fmt: skip
