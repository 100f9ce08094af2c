"""From a trained generator to 8-bit images: chooses the sampler, guides it, decodes what it drew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqvae.artifacts.channels import shown
from eqvae.artifacts.files import write_atomically
from eqvae.artifacts.names import SHEET_GAP_PX, SHEET_SIDE
from eqvae.artifacts.records import to_uint8
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError, printable
from eqvae.generators.checkpoints import Generator, GeneratorCard
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.gat_transformer import STYLE_SIZE
from eqvae.generators.protocol import Latents, LatentSpecification
from eqvae.images.sizes import ImageSize
from eqvae.metrics.autoencoder import check_image_size
from eqvae.runtime.device import Precision, autocast
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.diffusion import ddim, ddpm
from eqvae.sampling.guidance import autoguidance, classifier_free_guidance
from eqvae.sampling.noise import ImageNoise, TokenNoise, balanced_labels, listed_labels, random_labels
from eqvae.sampling.ode import dopri5, euler, heun
from eqvae.sampling.sde import euler_maruyama
from eqvae.sampling.tokens import TokenDecoding, confidence, halton

_OF_TOKENS = ("guidance_schedule", "schedule", "temperature", "top_k", "choice_temperature")
_OF_PROCESSES = (
    "guidance_low", "guidance_high", "guidance_channels", "weak_run", "ddim_eta", "diffusion_form", "diffusion_norm",
    "last_step", "last_step_size", "rtol", "atol", "step_spacing", "timestep_shift",
)  # fmt: skip
_FOREIGN = {
    "process": (*_OF_TOKENS, "truncation"),
    "tokens": (*_OF_PROCESSES, "truncation"),
    "pass": (*_OF_PROCESSES, *_OF_TOKENS),
}
"""Flags that would change nothing, by how a generator draws."""

_OF_SAMPLERS: dict[str, tuple[str, ...]] = {
    "timestep_shift": ("euler", "heun"),
    "step_spacing": ("ddpm", "ddim"),
    "ddim_eta": ("ddim",),
    **dict.fromkeys(("rtol", "atol"), ("dopri5",)),
    **dict.fromkeys(("diffusion_form", "diffusion_norm", "last_step", "last_step_size"), ("sde",)),
    "choice_temperature": ("confidence",),
}
_OF_GUIDANCE = ("weak_run", "guidance_low", "guidance_high", "guidance_channels", "guidance_schedule")
"""Flags that would change nothing with another sampler, or without guidance."""

_MAX_NAME = 24


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """A generator, its decoder and how to sample: image i of a seed is the same however it is drawn."""

    generator: Generator
    """On `device`."""

    autoencoder: Autoencoder
    """Its decoder, on `device`."""

    config: SamplerConfig

    device: torch.device

    weak: Generator | None = None
    """Of autoguidance."""

    image_size: ImageSize | None = None
    """Of the pictures; None: as those that the generator was trained on most."""

    def __post_init__(self) -> None:
        """Check that sampler, guidance and classes are the generator's, and that the sampler takes its settings."""
        card = self.generator.card
        self._check_size()
        card.kind.check_sampler(self.config.sampler, "--sampler", card.recipe)
        for name in _FOREIGN[card.kind.draws]:
            self._refuse(name, f"is not for '{card.recipe}'", "Leave it out")
        for name, samplers in _OF_SAMPLERS.items():
            if self.sampler not in samplers:
                self._refuse(name, f"is not for the sampler {self.sampler}", f"It is for {' and '.join(samplers)}")
        if self.sampler == "dopri5":
            self._refuse("num_steps", "is not for the sampler dopri5", "It takes as many as --rtol and --atol ask for")
        for name in _OF_GUIDANCE if self.config.guidance_scale == 1.0 else ():
            self._refuse(name, "changes nothing without guidance", "Give --guidance-scale too, or leave it out")
        wanted, there = self.config.guidance_channels, card.transformer.latents.channels
        if wanted is not None and wanted > there:
            raise UserError(f"--guidance-channels {wanted} is more than the {there} that latents have", "Leave it out")
        is_classifier_free = self.weak is None and card.kind.draws != "pass"
        if self.config.guidance_scale != 1.0 and is_classifier_free and card.label_dropout == 0.0:
            raise UserError(
                f"'{card.recipe}' was trained with --label-dropout 0, and knows no picture without a class to guide by",
                "Use --weak-run, or no guidance",
            )
        if self.config.guidance_scale != 1.0 and self.num_classes == 0 and self.weak is None:
            raise UserError("an unconditional generator has nothing to guide by", "Use --weak-run, or no guidance")
        if self.weak is not None:
            strong, weak = self.generator.card, self.weak.card
            if _latents_and_process(strong) != _latents_and_process(weak):
                raise UserError(
                    f"--weak-run is a '{weak.recipe}' of other latents or another process", "Train both alike"
                )
        self.labels([0])
        if card.kind.draws == "pass":
            if self.config.num_steps not in (None, 1):
                raise UserError(f"--num-steps {self.config.num_steps} is not for '{card.recipe}'", "It takes one pass")
        elif card.models_tokens:
            self._decoding()
        elif self.config.sampler != "dopri5":  # whose tolerances the configuration has checked
            # Each sampler knows what it can't do: drawing no images, it says so before a folder is begun.
            self._solve(_predict_nothing, [])

    def _refuse(self, name: str, why: str, mend: str) -> None:
        """Refuse a flag that was given and would change nothing."""
        if (value := getattr(self.config, name)) != getattr(SamplerConfig, name):
            raise UserError(f"--{name.replace('_', '-')} {value} {why}", mend)

    def _check_size(self) -> None:
        """Refuse pictures that are no whole number of patches, or that the network has no positions for."""
        card = self.generator.card
        if self.size == card.image_sizes()[0]:
            return
        if card.kind.draws != "process":  # other networks have a weight for each place
            raise UserError(f"--image-size {self.size} is not for '{card.recipe}'", f"It draws {card.image_sizes()[0]}")
        check_image_size(self.size, card.stride, patch_size=getattr(card.transformer, "patch_size", 1))

    @property
    def size(self) -> ImageSize:
        """Of the pictures."""
        return self.image_size or self.generator.card.image_sizes()[0]

    @property
    def latent_specification(self) -> LatentSpecification:
        """What is drawn."""
        card = self.generator.card
        if self.size == card.image_sizes()[0]:
            return card.transformer.latents
        return card.transformer.latents.resized(*(side // card.stride for side in self.size))

    @property
    def num_steps(self) -> int:
        """Those asked for, or the published ones."""
        return self.config.num_steps or self.generator.card.kind.samplers[self.sampler]

    @property
    def sampler(self) -> str:
        """That asked for, or the published one."""
        return self.config.sampler or self.generator.card.kind.sampler

    @property
    def num_classes(self) -> int:
        """Of the generator; 0 where it is unconditional."""
        return self.generator.card.transformer.latents.num_classes

    def labels(self, indices: Sequence[int]) -> Int64[Tensor, " n"]:
        """Say which classes images show."""
        config = self.config
        if config.classes == "balanced":
            return balanced_labels(indices, self.num_classes)
        if config.classes == "random":
            return random_labels(config.seed, indices, self.num_classes)
        return listed_labels(indices, config.listed_classes(self.generator.card.class_names), self.num_classes)

    def row_names(self, indices: Sequence[int]) -> list[str] | None:
        """Name the class of each row of a contact sheet, where each shows one and the classes have names."""
        names, labels = self.generator.card.class_names, self.labels(indices).tolist()
        rows = [labels[start : start + SHEET_SIDE] for start in range(0, len(labels), SHEET_SIDE)]
        if names is None or any(len(set(row)) > 1 for row in rows):
            return None
        return [names[row[0]] for row in rows]

    def latents(self, indices: Sequence[int]) -> Latents:
        """Draw normalized latents, or tokens."""
        if self.generator.card.models_tokens:
            return self._tokens(_predict(self.generator, self.device, self.config.precision), indices)
        z = self._pass(indices) if self.generator.card.kind.draws == "pass" else self._solve(self._guided(), indices)
        if not bool(z.isfinite().all()):
            raise UserError("the sampler's latents became NaN or infinite", "Try --precision fp32 or more --num-steps")
        return z

    def _pass(self, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Draw latents at once, from a style for each image."""
        noise = ImageNoise(self.config.seed, indices, (STYLE_SIZE, 1, 1), device=self.device).next().flatten(1)
        predict = _predict(self.generator, self.device, self.config.precision)
        labels = self.labels(indices).to(self.device)
        return predict(noise, labels, self.config.truncation, self.config.guidance_scale)[-1]

    @torch.no_grad()
    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "n k h w"]:
        z, card = self.latents(indices), self.generator.card
        with autocast(self.device, "fp32"):
            if card.models_tokens:
                return to_uint8(cast(DiscreteAutoencoder, self.autoencoder).decode_tokens(z))
            z = card.denormalize(z)
            return to_uint8(self.autoencoder.decode(z.contiguous(memory_format=torch.channels_last)))

    def _tokens(self, predict: Callable[..., Tensor], indices: Sequence[int]) -> Int64[Tensor, "n h w"]:
        specification, labels = self.generator.card.transformer.latents, self.labels(indices)
        grid = (specification.height, specification.width)
        noise = TokenNoise(self.config.seed, indices, grid, device=self.device)
        if self.sampler == "halton":
            return halton(predict, noise, labels, specification, self._decoding())
        choice_temperature = self.config.choice_temperature
        return confidence(
            predict, noise, labels, specification, self._decoding(), choice_temperature=choice_temperature
        )

    def _decoding(self) -> TokenDecoding:
        config = self.config
        return TokenDecoding(
            num_steps=self.num_steps,
            schedule=config.schedule or self.generator.card.schedule or "arccos",
            temperature=config.temperature,
            top_k=config.top_k,
            guidance_scale=config.guidance_scale,
            guidance_schedule=config.guidance_schedule or ("constant" if self.sampler == "halton" else "linear"),
        )

    def _solve(self, predict: Callable[..., Tensor], indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
        config, card = self.config, self.generator.card
        noise = ImageNoise(config.seed, indices, self.latent_specification.shape, device=self.device)
        labels = self.labels(indices).to(self.device)
        if card.interpolant is None:
            diffusion = GaussianDiffusion()
            if self.sampler == "ddpm":
                return ddpm(predict, noise, labels, diffusion, num_steps=self.num_steps, spacing=config.step_spacing)
            return ddim(
                predict, noise, labels, diffusion, num_steps=self.num_steps, eta=config.ddim_eta,
                spacing=config.step_spacing,
            )  # fmt: skip
        if self.sampler in ("euler", "heun"):
            step = euler if self.sampler == "euler" else heun
            shift = config.timestep_shift
            return step(predict, noise, labels, card.interpolant, num_steps=self.num_steps, timestep_shift=shift)
        if self.sampler == "dopri5":
            return dopri5(predict, noise, labels, card.interpolant, rtol=config.rtol, atol=config.atol)
        return euler_maruyama(
            predict,
            noise,
            labels,
            card.interpolant,
            num_steps=self.num_steps,
            diffusion_form=config.diffusion_form,
            diffusion_norm=config.diffusion_norm,
            last_step=config.last_step,
            last_step_size=config.last_step_size,
        )

    def _guided(self) -> Callable[..., Tensor]:
        config, interval = self.config, self._interval()
        predict = _predict(self.generator, self.device, config.precision)
        if self.weak is not None:
            weak = _predict(self.weak, self.device, config.precision)
            return autoguidance(
                predict, weak, config.guidance_scale, interval=interval, channels=config.guidance_channels
            )
        return classifier_free_guidance(
            predict, config.guidance_scale, self.num_classes, interval=interval, channels=config.guidance_channels
        )

    def _interval(self) -> tuple[float, float] | None:
        """The guidance interval in the time that the transformer knows."""
        low, high, interpolant = self.config.guidance_low, self.config.guidance_high, self.generator.card.interpolant
        if (low, high) == (0.0, 1.0):
            return None
        if interpolant is None:
            last = GaussianDiffusion().num_steps - 1
            return low * last, high * last
        return (low, high) if interpolant.time_of_data == 0 else (1.0 - high, 1.0 - low)


def contact_sheet(
    images: UInt8[Tensor, "n k h w"],
    path: Path,
    *,
    num_columns: int = SHEET_SIDE,
    row_names: Sequence[str] | None = None,
) -> None:
    """Draw images side by side, and to the right of each row its name; grey ones as a grey picture."""
    from torchvision.utils import make_grid

    grid = make_grid(shown(images).cpu(), nrow=num_columns, padding=SHEET_GAP_PX, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    if row_names is not None:
        picture = _with_names(picture, images.shape[-2] + SHEET_GAP_PX, row_names)
    picture = picture.convert("L") if images.shape[1] == 1 else picture
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))


def _with_names(sheet: Image.Image, row_px: int, names: Sequence[str]) -> Image.Image:
    """Write a name beside each row."""
    font = ImageFont.load_default(min(max(row_px // 3, 9), 20))
    shown = [printable(name[:_MAX_NAME]) for name in names]
    width = max(int(font.getlength(name)) for name in shown)
    wide = Image.new("RGB", (sheet.width + width + 4 * SHEET_GAP_PX, sheet.height), "white")
    wide.paste(sheet)
    draw = ImageDraw.Draw(wide)
    for row, name in enumerate(shown):
        draw.text(
            (sheet.width + SHEET_GAP_PX, SHEET_GAP_PX + row * row_px + row_px // 2), name, "black", font, anchor="lm"
        )
    return wide


def sheet_indices(num_samples: int, num_classes: int) -> list[int]:
    """Choose the images of a contact sheet: with balanced labels, a row for each of the first classes."""
    num_rows = min(num_classes, SHEET_SIDE) if num_classes > 1 else 0
    by_class = [row + num_classes * column for row in range(num_rows) for column in range(SHEET_SIDE)]
    if by_class and max(by_class) < num_samples:
        return by_class
    return list(range(min(num_samples, SHEET_SIDE**2)))


def _latents_and_process(card: GeneratorCard) -> tuple[Any, ...]:
    """What two generators must share for one to guide the other."""
    encoder = card.encoder_fingerprint or card.autoencoder_fingerprint  # an older card knows the whole alone
    return card.transformer.latents, card.interpolant, card.kind.draws, encoder, card.shift, card.scale


def _predict_nothing(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    del t, labels
    return torch.zeros_like(z)


def _predict(generator: Generator, device: torch.device, precision: Precision) -> Callable[..., Tensor]:
    def predict(*inputs: Any) -> Tensor:
        with autocast(device, precision):
            return generator.transformer(*inputs)

    return predict
