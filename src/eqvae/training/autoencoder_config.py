"""How an autoencoder is trained: tau, the terms of Equation 5, the optimizer. Nested, and flat as flags."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.losses.adversarial import AdversarialConfig
from eqvae.losses.codebook import CodebookConfig
from eqvae.losses.reconstruction import ReconstructionConfig
from eqvae.methods import Mixture, Pair, Part, Term, names_of, normal_form, parse_method
from eqvae.methods.explicit import Explicit
from eqvae.methods.kl import Kl
from eqvae.methods.transform_config import TransformConfig
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, change_flat, check_ranges


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


_METHOD_HELP = f"""What shapes the latents: NAME(parameter=value):NUMBER, joined by ' + '. Of pairs one is drawn for
each step: a pair's number is its share of the steps, what is left over is Equation 1, and without numbers pairs share
alike. A term is added in each step: its number is its weight. Pairs: {names_of(Pair)}; terms: {names_of(Term)}; or
FILE.py:CLASS. For example 'eq', 'eq + vf:0.1', 'detok(gamma=1.5) + esm'; parameters and sources: docs/methods.md."""

_PAPERS_SIZE = ImageSize(256, 256)


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

    method: Annotated[str, arg(help=_METHOD_HELP)] = "eq"
    """What shapes the latents, `NAME(parameter=value):NUMBER + ...`; see `eqvae.methods`."""

    transform: Annotated[TransformConfig, OmitArgPrefixes] = field(default_factory=TransformConfig)

    objective: Literal["implicit", "explicit", "explicit-stop-gradient"] = "implicit"
    """`implicit` is what `method` says; the others are `--method explicit` and `--method explicit(stop_gradient=true)`:
    Equation 4 beside Equation 1, for the ablation of Table 7."""

    freeze_encoder: bool = False
    """Train the decoder alone, as SD-VAE-FT-MSE was: latents, and with them equivariance errors and tokens, stay as
    they are."""

    freeze_decoder: bool = False
    """Train the encoder alone, and codes: a latent's picture stays what it is. The discriminator still learns from
    reconstructions, and pulls at the encoder through the decoder; its weight is measured where it always is."""

    lora_rank: int = 0
    """Train adapters of this rank on convolutions and linear layers instead of their weights (LoRA), merged where the
    autoencoder is exported; 0 trains all weights. Averages are of the adapters. Needs `pip install 'eqvae[lora]'`."""

    explicit_weight: float | None = None
    """Weight of Equation 4 where `explicit` adds it, without effect elsewhere; None: 0.1."""

    reconstruction: Annotated[ReconstructionConfig, OmitArgPrefixes] = field(default_factory=ReconstructionConfig)

    kl_weight: float | None = None
    """lambda_reg: weight of the divergence to N(0, I), without effect on deterministic encoders; None: 1e-6, or 0 with
    a method whose source trains without."""

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
        if self.freeze_encoder and self.freeze_decoder:
            raise UserError("--freeze-encoder and --freeze-decoder leave nothing to train", "Leave out one of them")
        if self.freeze_encoder and self.polish_steps:
            raise UserError(
                f"--polish-steps {self.polish_steps} follows steps that train the encoder, which --freeze-encoder "
                "leaves as it is",
                "Use more --max-steps instead",
            )
        parts, weights = self._parts()
        self.mixture()  # says what its shares come to
        twentieth = min(self.max_steps // 20, 1000)
        lr_warmup = self.optimizer.lr_warmup_steps
        adversarial = self.adversarial.resolved(warmup_steps=twentieth)
        warmup = adversarial.discriminator_warmup_steps or 0
        if warmup >= self.max_steps:
            raise UserError(
                f"--discriminator-warmup-steps {warmup} leaves no step to the autoencoder",
                f"Use fewer than --max-steps {self.max_steps}",
            )
        return change_flat(
            replace(
                self,
                method=normal_form(self.method),
                transform=self._resolved_transform(parts),
                kl_weight=weights["kl"],
                explicit_weight=weights["explicit"],
                adversarial=adversarial,
            ),
            lr_warmup_steps=twentieth if lr_warmup is None else lr_warmup,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of both phases."""
        return self.max_steps + self.polish_steps

    def at(self, step: int) -> "AutoencoderTraining":
        """How the next step trains after so many: from `max_steps` on the decoder alone, by Equation 1."""
        return self if step < self.max_steps else self._polishing

    def began_at(self, step: int) -> int:
        """The first step of the phase that the next one belongs to."""
        return 0 if step < self.max_steps else self.max_steps

    @cached_property
    def _polishing(self) -> "AutoencoderTraining":
        return change_flat(
            self, max_steps=self.total_steps, discriminator_warmup_steps=self.max_steps, freeze_encoder=True,
            freeze_decoder=False, method="eq", transforms="plain", equivariance_probability=0.0, objective="implicit",
            codebook="gradient", restart_dead_codes=0,
            lr_warmup_steps=min(self.optimizer.lr_warmup_steps or 0, self.polish_steps // 20),
        )  # fmt: skip

    def mixture(self) -> Mixture:
        """What `method` and the flags of its parameters come to."""
        return self._mixture

    @cached_property
    def _mixture(self) -> Mixture:
        parts, weights = self._parts()
        found = Mixture.of(parts)
        others = [(weights.get(term.name, weight), term) for weight, term in found.terms if not isinstance(term, Kl)]
        kl = next((term for _, term in found.terms if isinstance(term, Kl)), Kl())
        return replace(found, terms=((weights["kl"], kl), *others) if weights["kl"] > 0 else tuple(others))

    def _parts(self) -> tuple[tuple[Part, ...], dict[str, float]]:
        """The methods with what flags say of them, and the weights of terms that have a flag."""
        parts = parse_method(self.method)
        if self.objective != "implicit":
            if self.method != "eq":
                raise UserError(
                    f"--objective {self.objective} contradicts --method '{self.method}'",
                    "Give --method alone: explicit is one of its names",
                )
            stops = self.objective == "explicit-stop-gradient"
            parts = (Part(method=Explicit(stop_gradient=stops), number=None),)
        flags = self.transform.given()
        if flags and not any(isinstance(part.method, TransformConfig) for part in parts):
            flag = next(iter(flags)).replace("_", "-")
            raise UserError(
                f"--{flag} is a parameter of eq and explicit, and --method '{self.method}' holds neither",
                "Leave it out",
            )
        parts = tuple(_with_flags(part, flags) for part in parts)
        wants_kl = all(part.method.wants_kl for part in parts)
        defaults = {"kl": (self.kl_weight, 1e-6 if wants_kl else 0.0), "explicit": (self.explicit_weight, 0.1)}
        return parts, {name: _weight_of(name, parts, *given) for name, given in defaults.items()}

    def _resolved_transform(self, parts: tuple[Part, ...]) -> TransformConfig:
        """Fill in the preset's values where flags, and not the method's text, speak of tau."""
        drawn = [part for part in parts if isinstance(part.method, TransformConfig)]
        if not drawn or any(part.named & self.transform.__dataclass_fields__.keys() for part in drawn):
            return self.transform
        return self.transform.resolved()

    def check_autoencoder(
        self, autoencoder: Autoencoder, *, image_size: ImageSize = _PAPERS_SIZE, num_processes: int = 1
    ) -> None:
        """Refuse what the autoencoder does not have, or what the methods can't work with."""
        self.mixture().check(
            autoencoder,
            named={part.method.name for part in parse_method(self.method)},
            image_size=image_size,
            num_images=self.batch_size // (self.gradient_accumulation_steps * num_processes),
            freeze_encoder=self.freeze_encoder,
        )
        if self.freeze_encoder and next(autoencoder.encoder_parameters(), None) is None:
            raise UserError(
                f"--freeze-encoder finds no parameters of an encoder in '{autoencoder.name}'",
                "Call its encoder 'encoder', or override Autoencoder.encoder_parameters",
            )
        if isinstance(autoencoder, DiscreteAutoencoder):
            return
        for flag, asked in (("--codebook ema", self.codes.codebook == "ema"),
                            ("--restart-dead-codes", self.codes.restart_dead_codes > 0)):  # fmt: skip
            if asked:
                raise UserError(f"{flag} is for discrete autoencoders, and '{autoencoder.name}' has no codebook",
                                "Leave it out")  # fmt: skip

    def rows(self, rank: int, count: int) -> list[int]:
        """Which images of a batch are a process's: as many of each micro-batch as any other's, in its order."""
        num_rows = self.batch_size // (count * self.gradient_accumulation_steps)
        firsts = range(rank * num_rows, self.batch_size, count * num_rows)
        return [first + row for first in firsts for row in range(num_rows)]


def _with_flags(part: Part, flags: dict[str, Any]) -> Part:
    """Give a method that draws tau what flags say of it."""
    if not isinstance(part.method, TransformConfig):
        return part
    for name in part.named & flags.keys():
        said = getattr(part.method, name)
        if said != flags[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {flags[name]} contradicts --method '{part}', where it is {said}", "Give it once")
    changed: Any = replace(part.method, **{name: value for name, value in flags.items() if name not in part.named})
    return replace(part, method=changed.resolved())


def _weight_of(name: str, parts: tuple[Part, ...], flag: float | None, default: float) -> float:
    """A term's weight by its flag, or by the text."""
    said = next((part.number for part in parts if part.method.name == name), None)
    if said is not None and flag is not None and said != flag:
        raise UserError(f"--{name}-weight {flag:g} contradicts --method '{name}:{said:g}'", "Give it once")
    is_named = any(part.method.name == name for part in parts)
    if said is None and flag is None:
        return {"kl": 1e-6}.get(name, default) if is_named else default
    return flag if said is None else said  # type: ignore[return-value]


_RANGES = (
    (AT_LEAST_1, ("max_steps", "batch_size", "gradient_accumulation_steps")),
    (POSITIVE, ("learning_rate",)),
    (NOT_NEGATIVE,
     ("seed", "polish_steps", "lora_rank", "lr_warmup_steps", "discriminator_warmup_steps", "weight_decay",
      "max_grad_norm", "explicit_weight", "perceptual_weight", "kl_weight", "adversarial_weight", "codebook_weight",
      "commitment_weight", "restart_dead_codes", "discriminator_regularization_weight")),
    (BELOW_1, ("adam_beta1", "adam_beta2", "ema_decay", "codebook_decay")),
)  # fmt: skip
