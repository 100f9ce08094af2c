"""Measure an autoencoder on real images: equivariance, reconstruction, latents, speed; keep pictures for the report."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.artifacts.channels import describe_shown, shown
from eqvae.artifacts.records import Pictures, to_uint8
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.methods.warping import turn
from eqvae.metrics.measures import CodedBatch, Measure
from eqvae.metrics.per_image import equivariance_figures, evaluation_transforms, psnr_db, ssim
from eqvae.runtime.device import Precision, autocast, synchronize
from eqvae.runtime.processes import Processes
from eqvae.transforms import Transform

PICTURED = ("scale_0.5", "rotation_90")
"""Transforms whose decodings are kept for Figures 2 and 6."""

_NUM_QUARTERS = 4
"""The scales of Section C.3 are quarters, so a latent's side must be divisible by four."""


@dataclass(kw_only=True)
class LatentMoments:
    """Streams per-channel mean and variance of raw latents in float64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    total_of_squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, z: Float[Tensor, "n c h w"]) -> None:
        values = z.detach().cpu().double().transpose(0, 1).flatten(1)
        if self.count == 0:
            self.total = torch.zeros(z.shape[1], dtype=torch.float64)
            self.total_of_squares = torch.zeros(z.shape[1], dtype=torch.float64)
        self.count += values.shape[1]
        self.total += values.sum(1)
        self.total_of_squares += values.square().sum(1)

    def summed_over(self, processes: Processes) -> "LatentMoments":
        """Bring together what several processes have seen."""
        parts = [part for part in processes.gather(self) if part.count]
        total = parts[0] if parts else self
        for part in parts[1:]:
            total.count += part.count
            total.total = total.total + part.total
            total.total_of_squares = total.total_of_squares + part.total_of_squares
        return total

    def statistics(self) -> LatentStatistics:
        """Finish."""
        mean = self.total / self.count
        variance = (self.total_of_squares / self.count - mean.square()).clamp(min=0.0)
        return LatentStatistics(mean=tuple(mean.tolist()), std=tuple(variance.sqrt().tolist()))


class CodeCounts:
    """Counts how often each code occurs, over any number of batches."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, tokens: Int64[Tensor, "..."]) -> None:
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts)).cpu()

    def figures(self) -> dict[str, float]:
        """Measure the share of codes that occur at all, and the perplexity: `exp(-sum p log p)` codes, used alike."""
        shares = self.counts.double() / self.counts.sum()
        return {
            "codebook_usage": float((self.counts > 0).double().mean()),
            "codebook_perplexity": float(torch.special.entr(shares).sum().exp()),
        }


def check_image_size(
    image_size_px: int | ImageSize, stride: int, *, quarters: bool = False, patch_size: int = 1
) -> None:
    """Refuse an image size that has no whole latent grid, or whose grid is no whole number of patches."""
    unit, size = stride * patch_size * (_NUM_QUARTERS if quarters else 1), ImageSize.of(image_size_px)
    if wrong := [side for side in size if side < unit or side % unit]:
        below = max(wrong[0] // unit, 1) * unit
        why = f"the stride {stride}"
        if quarters:
            why = f"{unit} (stride {stride} x 4, since latents are scaled by quarters)"
        elif patch_size > 1:
            why = f"{unit} (stride {stride} x patches of {patch_size})"
        raise UserError(
            f"--image-size {size} is not divisible by {why}",
            f"Use {below} or {below + unit}, for example" + ("" if size.is_square else f", for {wrong[0]}"),
        )


@torch.inference_mode()
def evaluate_autoencoder(
    autoencoder: Autoencoder,
    batches: Iterable[Float[Tensor, "_ k _ _"]],
    *,
    processes: Processes,
    precision: Precision = "fp32",
    transforms: dict[str, Transform] | None = None,
    perceptual_distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    num_pictures: int = 6,
    num_angles: int = 0,
    measures: Sequence[Measure] = (),
    on_batch: Callable[[int], None] = lambda num_images: None,
) -> tuple[dict[str, float | int], LatentStatistics, Pictures]:
    """Measure equivariance (C.3), reconstruction (C.2) and latents over images; figures, statistics and pictures.

    All processes call it, each with its own part of the images, in order; all get what all images together give.
    Latents are posterior means. Each error is the mean over images, and `equivariance_error_rotation` and `_scale`
    are the means over their three transformations. Of a discrete autoencoder they are E(x) before quantization, as in
    Table 1; `token_agreement_...` says the same of tokens (the share that agrees: more is better), and
    `codebook_usage` and `codebook_perplexity` are those of all images' tokens together.
    """
    transforms, device = evaluation_transforms() if transforms is None else transforms, processes.device
    autoencoder.eval()
    values: dict[str, list[Tensor]] = {}
    moments = LatentMoments()
    pictures: list[Pictures] = []
    turned: Tensor | None = None
    num_images, num_pictured, coding_sec = 0, 0, 0.0

    def encode(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return autoencoder.encode(x.contiguous(memory_format=torch.channels_last)).mode().float()

    def decode(z: Tensor) -> Tensor:
        with autocast(device, precision):
            return autoencoder.decode(z.contiguous(memory_format=torch.channels_last)).float()

    codes = CodeCounts(autoencoder.codebook_size) if isinstance(autoencoder, DiscreteAutoencoder) else None
    tokenize = (lambda z: autoencoder.quantize(z).tokens) if isinstance(autoencoder, DiscreteAutoencoder) else None
    for x in batches:
        x = x.to(device)
        synchronize(device)
        began_sec = time.perf_counter()
        z = encode(x)
        coded = CodedBatch(x=x, z=z, images=to_uint8(x), reconstructions=to_uint8(decode(z)), decode=decode)
        synchronize(device)
        coding_sec += time.perf_counter() - began_sec
        images, reconstructions = coded.images, coded.reconstructions
        measured = equivariance_figures(encode, x, z, transforms, tokenize=tokenize)
        if tokenize is not None and codes is not None:
            codes.add(tokenize(z))
        measured |= {"psnr_db": psnr_db(images, reconstructions), "ssim": ssim(images, reconstructions)}
        if perceptual_distance is not None:
            measured["lpips"] = perceptual_distance(images / 127.5 - 1.0, reconstructions / 127.5 - 1.0)
        for name, value in measured.items():
            values.setdefault(name, []).append(value.cpu().double())
        moments.add(z)
        for measure in measures:
            measure.add(coded)
        if num_pictured < num_pictures:
            count = min(num_pictures - num_pictured, len(x))
            pictures.append(_take_pictures(encode, decode, x[:count], z[:count], reconstructions[:count], transforms))
            num_pictured += count
        if num_angles and turned is None:
            turned = _turn(decode, x[:1], z[:1], num_angles)
        num_images += len(x)
        on_batch(len(x))

    gathered = processes.gather({name: torch.cat(parts) for name, parts in values.items()})
    everyone = [part for part in gathered if part]
    if not everyone:
        raise UserError("there is no image to evaluate on", "Check --data and --num-images")
    figures: dict[str, float | int] = {
        name: float(torch.cat([part[name] for part in everyone]).mean()) for name in everyone[0]
    }
    statistics = moments.summed_over(processes).statistics()
    all_pictures = [part for parts in processes.gather(pictures) for part in parts]
    for measure in measures:
        measure.gather(processes)
    if codes is not None:
        codes.counts = processes.sum(codes.counts)
    if processes.is_first:  # a Frechet distance takes seconds: one process is enough
        for measure in measures:
            figures |= measure.figures()
        figures |= {} if codes is None else codes.figures()
        figures = _with_means(figures) | latent_figures(statistics)
    rates = processes.gather(num_images / coding_sec if num_images else 0.0)
    figures |= {"num_images": sum(processes.gather(num_images)), "images_per_sec": sum(rates)}
    turned = next((each for each in processes.gather(turned) if each is not None), None)
    joined = replace(_join_pictures(all_pictures, num_pictures), turned=turned)
    return processes.gather(figures)[0], statistics, joined


def _with_means(figures: dict[str, float | int]) -> dict[str, float | int]:
    """Put the means over each kind of transformation first, as Table 1 prints them."""
    means = {}
    for name in ("equivariance_error_rotation", "equivariance_error_scale",
                 "token_agreement_rotation", "token_agreement_scale"):  # fmt: skip
        values = [value for key, value in figures.items() if key.startswith(f"{name}_")]
        if values:
            means[name] = sum(values) / len(values)
    return means | figures


def latent_figures(statistics: LatentStatistics) -> dict[str, float | int]:
    """Name the statistics of latents, overall and by channel, as `metrics.json` does."""
    mean, std = statistics.overall()
    figures: dict[str, float | int] = {"latent_mean": mean, "latent_std": std}
    for channel, (channel_mean, channel_std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        figures |= {f"latent_mean_{channel}": channel_mean, f"latent_std_{channel}": channel_std}
    return figures


def _take_pictures(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    x: Tensor,
    z: Tensor,
    reconstructions: Tensor,
    transforms: dict[str, Transform],
) -> Pictures:
    """Keep x, E(x), D(E(x)), and D(E(tau o x)) beside D(tau o E(x)) for the pictured transforms."""
    pictured = {name: transforms[name] for name in PICTURED if name in transforms}

    def draw(images: Tensor) -> Tensor:
        return shown(to_uint8(images)).cpu()

    return Pictures(
        images=draw(x),
        latents=z.float().cpu(),
        reconstructions=shown(reconstructions).cpu(),
        encoded_transformed=tuple(draw(decode(encode(tau(x)))) for tau in pictured.values()),
        decoded_transformed=tuple(draw(decode(tau(z))) for tau in pictured.values()),
        transforms=tuple(str(tau) for tau in pictured.values()),
        shows=describe_shown(x.shape[1]),
    )


def _turn(decode: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, num_angles: int) -> Tensor:
    """Turn one image and its latent once around: tau o x, and D(tau o E(x)) below it."""
    taus = [turn(360.0 * number / num_angles) for number in range(num_angles)]
    rows = [[tau(x) for tau in taus], [decode(tau(z)) for tau in taus]]
    return torch.stack([shown(to_uint8(torch.cat(row))).cpu() for row in rows])


def _join_pictures(parts: list[Pictures], num_pictures: int) -> Pictures:
    """Put together the first pictures; each process has taken as many of its own images."""

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[:num_pictures]

    def join_each(name: str) -> tuple[Tensor, ...]:
        groups = zip(*(getattr(part, name) for part in parts), strict=True)
        return tuple(torch.cat(group)[:num_pictures] for group in groups)

    return Pictures(
        images=join("images"),
        latents=join("latents"),
        reconstructions=join("reconstructions"),
        encoded_transformed=join_each("encoded_transformed"),
        decoded_transformed=join_each("decoded_transformed"),
        transforms=parts[0].transforms,
        shows=parts[0].shows,
    )
