"""`eqvae evaluate`: an autoencoder and images in, `metrics.json` and pictures out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import METRICS, PICTURES, SPECTRUM
from eqvae.artifacts.weights import WhichWeights
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.loading import choose_weights
from eqvae.autoencoders.padding import check_reflection, padding_mode_of
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.autoencoders.tiling import check_tile, in_tiles
from eqvae.errors import Interrupted, UserError
from eqvae.images import (
    BrokenImage,
    ImageSource,
    Pixels,
    RangeConfig,
    check_broken,
    encoding_batches,
    open_images,
    to_images,
)
from eqvae.images.sizes import one_size
from eqvae.images.sources import announce_channels
from eqvae.metrics.autoencoder import check_image_size, evaluate_autoencoder
from eqvae.metrics.interpolation import Interpolations
from eqvae.metrics.measures import (
    MIN_IMAGES,
    LatentGeometry,
    LatentSpectrum,
    Measure,
    PerceptualDistance,
    ReconstructionDistance,
    TransformedDistance,
)
from eqvae.metrics.per_image import evaluation_transforms
from eqvae.networks.features import features_at_hand, load_features
from eqvae.networks.pretrained import LPIPS_MIN_IMAGE_SIZE_PX, Lpips, lpips_is_cached
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import join_processes, notice_lost_process
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, RunFolder, check_ranges
from eqvae.runtime.signals import stop_on_signals
from eqvae.transforms import Interpolation

_SHOWN = frozenset(
    {"equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "lpips", "latent_std",
     "token_agreement_rotation", "token_agreement_scale", "codebook_usage", "codebook_perplexity",
     "intrinsic_dimension", "spectrum_excess_db"}
)  # fmt: skip
_SHOWN_DISTANCES = ("rfid", "rfd_", "ifid", "ifd_")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an autoencoder's equivariance errors, reconstruction and latents on real images."""

    autoencoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER")]
    """Preset, hub id or path; a fine-tuning run's folder stands for the model it exported."""

    data: str
    """`photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[/CONFIGURATION][:SPLIT]`."""

    out: Path
    """Output folder; written anew when the same autoencoder is measured again on the same data."""

    image_size: int | str = 256
    """Side of the centre crops, in px (ADM's preprocessing), or `192x256` for height x width."""

    tile: int | None = None
    """Encode and decode pictures that are larger than this side, in px, in tiles of it: bounds memory."""

    num_images: int | None = None
    """The first images of the data; None: all."""

    image_column: str | None = None
    """Column of a table, or ending of an archive's members (`mask.png`), that holds the images; None: the usual one."""

    value_range: Annotated[RangeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RangeConfig)

    batch_size: int = 16
    """Images at a time; changes no figure."""

    interpolation: Interpolation = "bicubic"
    """How the scales of the equivariance error resize images and latents."""

    antialias: bool = False
    """Whether they low-pass first."""

    lpips: bool | None = None
    """Measure LPIPS (VGG16); None: where its weights lie in the local cache."""

    features: str | None = None
    """Of the Frechet distances: `inception` (rFID), `efficientnet-lite0` (offline) or a model of timm; None: Inception
    where its weights are at hand, else efficientnet-lite0."""

    weights: WhichWeights | Path | None = None
    """`ema` or `raw`: which weights of a checkpoint that holds both, as in `AUTOENCODER#raw`. Or the file of the
    features' weights; None: the local cache or the network."""

    all: bool = False
    """Also Figure 3, iFID, intrinsic dimension, spectrum and the offline twin of LPIPS: what may predict a generator
    without training one, and what it has to be told apart from."""

    ifid: Interpolations = "paper"
    """Of --all's iFID: `paper` joins each latent with its nearest neighbour, halfway on the straight line; `authors`,
    as their code does, with one of ten by cosine, halfway on the great circle, and calls it `ifid_authors`."""

    seed: int = 0
    """Of the subsamples behind the intrinsic dimension's standard error, and of the authors' draws of neighbours."""

    num_pictures: int = 6
    """How many of the first images to keep for the report."""

    num_angles: int = 0
    """Of a whole turn of the first image, for the report's moving picture; 0: none."""

    precision: Precision = "fp32"
    """Of the autoencoder and the features. `bf16` is faster and moves figures, PSNR by about 0.02 dB: compare those of
    one precision only."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int = 1
    """Processes that read images ahead; 0 reads in this process."""


def command(config: EvaluateConfig) -> str | None:
    """Measure and list the main figures."""
    figures = evaluate(config)
    if figures is None:
        return None
    shown = [name for name in figures if name in _SHOWN or name.startswith(_SHOWN_DISTANCES)]
    lines = [f"{name:36} {figures[name]:.4f}" for name in shown]
    return "\n".join([*lines, f"{'num_images':36} {figures['num_images']:.0f}"])


def evaluate(config: EvaluateConfig, autoencoder: Autoencoder | None = None) -> dict[str, float | int] | None:
    """Measure and write `config.json`, `environment.json`, `metrics.json` and `pictures.safetensors`.

    Started by torchrun or `accelerate launch`, processes share the images; the first one writes.

    Args:
        config: What to measure, and on what.
        autoencoder: What `config.autoencoder` names, where it is loaded already; it is moved to the device.

    Returns:
        The figures of `metrics.json`; None in all processes but the first.

    Raises:
        UserError: If the input is wrong, or the folder holds another evaluation; nothing is written then.
        Interrupted: If a signal stopped it; nothing is written then.
    """
    at_least_1, not_negative = ("num_images", "batch_size", "num_pictures"), ("num_workers", "num_angles", "seed")
    check_ranges(config, ((AT_LEAST_1, at_least_1), (NOT_NEGATIVE, not_negative)))
    if config.weights in ("ema", "raw"):
        which: WhichWeights = "ema" if config.weights == "ema" else "raw"
        config = replace(config, autoencoder=choose_weights(config.autoencoder, which), weights=None)
    device = choose_device(config.device)
    source = open_images(config.data, split="evaluation", image_column=config.image_column)
    folder = RunFolder.claim(config.out, "evaluate")
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)  # last: it may be gigabytes from the hub
    size = one_size(config.image_size)
    config = replace(config, image_size=size.written())
    check_image_size(size, autoencoder.stride, quarters=True)
    check_tile(config.tile, autoencoder.stride)
    check_reflection(padding_mode_of(autoencoder), min(size) // (4 * autoencoder.stride))
    source = source.read_as(Pixels(channels=autoencoder.image_channels, range=config.value_range))
    fingerprint, was_training = autoencoder.fingerprint(), autoencoder.training
    _check_same_evaluation(folder, config, fingerprint)
    batches = _cut(config, source)
    processes = join_processes(device)
    measures = choose_measures(config, processes.device)
    is_seen = min(size) >= LPIPS_MIN_IMAGE_SIZE_PX
    if config.lpips and not is_seen:
        raise UserError(f"--lpips sees nothing of {size}", f"Give --image-size {LPIPS_MIN_IMAGE_SIZE_PX} or more")
    lpips = is_seen and (lpips_is_cached() if config.lpips is None else config.lpips)
    parts, own_broken = batches[processes.own_part(len(batches))], list[BrokenImage]()
    with (
        notice_lost_process("the same command measures anew"),
        stop_on_signals() as stop,
        in_tiles(autoencoder, config.tile),
        processes.progress("evaluate", total=sum(map(len, parts)), unit="image") as progress,
    ):

        def stop_if_asked(index: int) -> None:
            """Stop together, at a batch that every process has; the first one shows that the data can be read."""
            if index == 0:
                source.announce("DATA", processes)
                announce_channels(source.pixels.channels)
            if index < len(batches) // processes.count and processes.any(bool(stop)):
                raise Interrupted(f"{stop.signal_name or 'a signal'}; the same command measures anew")

        figures, _, pictures = evaluate_autoencoder(
            place(autoencoder, processes.device),
            _read(config, source, parts, own_broken, before_batch=stop_if_asked),
            processes=processes,
            precision=config.precision,
            transforms=evaluation_transforms(config.interpolation, config.antialias),
            perceptual_distance=Lpips().to(processes.device) if lpips else None,
            num_pictures=config.num_pictures,
            num_angles=config.num_angles,
            measures=measures,
            on_batch=progress.advance if progress is not None else lambda num_images: None,
        )
    autoencoder.train(was_training)
    broken = [image for images in processes.gather(own_broken) for image in images]
    if broken:
        check_broken(source.name, len(source), len(broken), broken[0])
    with folder.hold(config, processes, seed=None, anew=(METRICS, SPECTRUM), fingerprint=fingerprint):
        if not processes.is_first:
            return None
        pictures.write(config.out / PICTURES)
        journal = Journal(config.out, keep_up_to_step=0)
        journal.write("data", **source.summary())
        for image in broken:
            journal.write("broken_image", **image._asdict())
        for measure in measures:
            if isinstance(measure, LatentSpectrum) and (curves := measure.curves()):
                write_json(config.out / SPECTRUM, curves)
        write_json(config.out / METRICS, figures)
    return figures


def _read(
    config: EvaluateConfig,
    source: ImageSource,
    parts: Sequence[range],
    broken: list[BrokenImage],
    before_batch: Callable[[int], None],
) -> Iterator[Tensor]:
    """Read images in [-1, 1], a part at a time, and note those that can't be read."""
    size = one_size(config.image_size)
    batches = encoding_batches(source, image_size_px=size, parts=parts, num_workers=config.num_workers)
    for index, batch in enumerate(batches):
        before_batch(index)
        broken.extend(batch.broken)
        if batch.indices:
            yield to_images(tuple(batch.crops.numpy()))


def _cut(config: EvaluateConfig, source: ImageSource) -> list[range]:
    """Cut the images into batches, which are the same for any number of processes."""
    num_images = len(source) if config.num_images is None else config.num_images
    if num_images > len(source):
        raise UserError(f"--num-images {num_images} asks for more than the {len(source)} images of '{config.data}'")
    if config.all and num_images < MIN_IMAGES:
        raise UserError(f"--all with {num_images} images has no intrinsic dimension", "Use more images, or no --all")
    return [range(num_images)[start : start + config.batch_size] for start in range(0, num_images, config.batch_size)]


def choose_measures(config: EvaluateConfig, device: torch.device) -> list[Measure]:
    """Set up the measures of sets of images and of the latents' geometry."""
    weights = None if config.weights is None else Path(config.weights)
    features = load_features(config.features or features_at_hand(), weights=weights).to(device)
    reconstruction = ReconstructionDistance(features, config.precision)
    measures: list[Measure] = [reconstruction]
    if config.all:
        transforms = evaluation_transforms(config.interpolation, config.antialias)
        measures += [
            TransformedDistance(reconstruction, transforms),
            LatentGeometry(reconstruction, seed=config.seed, batch_size=config.batch_size, interpolation=config.ifid),
            LatentSpectrum(),
            PerceptualDistance(device),
        ]
    return measures


def _check_same_evaluation(folder: RunFolder, config: EvaluateConfig, fingerprint: str) -> None:
    """Refuse to replace the evaluation of another autoencoder, or one on other data."""
    mend = "Choose another --out, or remove that folder"
    for name, now in (("autoencoder", config.autoencoder), ("data", config.data)):
        if folder.saved is not None and folder.differs(**{name: now}):
            raise UserError(
                f"--out '{config.out}' holds the evaluation of {name} '{folder.saved.get(name)}', not '{now}'", mend
            )
    if folder.differs(fingerprint=fingerprint):
        raise UserError(f"--out '{config.out}' holds an evaluation of '{config.autoencoder}' with other weights", mend)
