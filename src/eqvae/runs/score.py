"""`eqvae score`: samples and a reference in, `metrics.json` out. FID, sFID, KID, Inception Score, precision, recall."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from eqvae.artifacts.files import check_writable, expanded, to_plain, write_json
from eqvae.artifacts.names import CONFIG, METRICS
from eqvae.errors import Interrupted, UserError
from eqvae.images import BrokenImage, Pixels, RangeConfig
from eqvae.images.image_sets import ImageSet, open_reference, open_samples
from eqvae.images.sources import announce_channels
from eqvae.metrics.comparison import check_comparable, check_enough, score_features
from eqvae.metrics.statistics import (
    STATISTICS_SUFFIX,
    FeatureStatistics,
    Provenance,
    compute_statistics,
    find_adm_moments,
    holds_statistics,
    read_statistics,
    with_adm_moments,
)
from eqvae.networks.features import FeatureExtractor, load_features
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import Journal, write_environment
from eqvae.runtime.processes import Processes, join_processes, notice_lost_process
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, RunFolder, check_ranges, flat
from eqvae.runtime.signals import StopRequest, stop_on_signals

_RANGES = (
    (AT_LEAST_1,
     ("batch_size", "num_neighbours", "split_size", "kid_subsets", "num_images", "num_reference")),
    (("at least 2", lambda value: value >= 2), ("kid_subset_size",)),
    (NOT_NEGATIVE, ("num_workers", "seed")),
)  # fmt: skip

_ANEW = "the same command measures anew"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score samples against a reference: FID, sFID, KID, Inception Score, precision and recall."""

    samples: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES")]
    """An .npz in ADM's layout, an output folder of `eqvae sample`, or a folder of images, all of one size; they are
    never cropped or resized."""

    reference: str
    """An .npz in ADM's layout (images, or `mu`, `sigma`, `mu_s`, `sigma_s`, or both), statistics that
    --save-reference wrote, or any DATA, which is cropped to the samples' size as ADM does."""

    out: Path
    """Output folder; written anew when the same samples are scored again against the same reference."""

    features: str = "inception"
    """`inception`, `efficientnet-lite0` (works offline), or any model of timm; figures are named after them."""

    weights: Path | None = None
    """A file with the features' weights; None: the local cache or the network."""

    num_images: int | None = None
    """The first of the samples; None: all. FID falls as this grows: compare figures of equal numbers only."""

    num_reference: int | None = None
    """So many of the reference's images, at equal distances; None: all."""

    image_column: str | None = None
    """Of a reference that is a table or an archive: the column or ending that holds the images; None: the usual one."""

    value_range: Annotated[RangeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RangeConfig)

    num_neighbours: int = 3
    """Of precision and recall."""

    adm_half: bool = False
    """Also precision and recall by float16 distances, as ADM's evaluator and most published tables have them: up to
    0.01 higher; `precision_adm_half` and `recall_adm_half`."""

    split_size: int = 5000
    """Images in each split of the Inception Score, which grows with it."""

    kid_subsets: int = 100
    """Random subsets that KID is averaged over."""

    kid_subset_size: int = 1000
    """Images in each of them, or as many as there are."""

    seed: int = 0
    """Of KID's subsets."""

    save_reference: Path | None = None
    """Also write the reference's statistics here (.safetensors), for --reference of other scores."""

    batch_size: int = 64
    """Images at a time; changes no figure by more than rounding."""

    precision: Precision = "fp32"
    """Of the features' convolutions. `bf16` is twice as fast on processors that have it, and moved a Frechet distance
    by 5% (benchmarks/score.py): compare figures of one precision only."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int = 1
    """Processes that decode images ahead; 0 decodes in this process."""


def command(config: ScoreConfig) -> str | None:
    """Score and list the figures."""
    figures = score(config)
    if figures is None:
        return None
    lines = [
        f"{name:32} {value:.0f}" if isinstance(value, int) else f"{name:32} {value:.6g}"
        for name, value in figures.items()
        if isinstance(value, int | float)
    ]
    if left_out := figures["provenance"]["left_out"]:
        lines.append(f"left out: {', '.join(left_out)}; '{config.reference}' holds moments that don't give them")
    return "\n".join(lines)


def score(config: ScoreConfig) -> dict[str, Any] | None:
    """Compare samples with a reference; several processes share the images.

    Args:
        config: What to compare with what, and by which features.

    Returns:
        The figures of `metrics.json`, with their provenance; None in all processes but the first.

    Raises:
        UserError: If the input is wrong, or the folder holds another score; nothing is written then.
        Interrupted: If a signal stopped it; nothing is written then.
    """
    _check_config(config)
    with notice_lost_process(_ANEW), stop_on_signals() as stop:
        return _score(config, stop)


def _score(config: ScoreConfig, stop: StopRequest) -> dict[str, Any] | None:
    device = choose_device(config.device)
    processes = join_processes(device)
    samples = open_samples(config.samples)
    sample_indices = _choose(samples, config.num_images, "--num-images", spread=False)
    reference = _open(config, samples)
    reference_indices: Sequence[int] = range(0)
    if isinstance(reference, ImageSet):
        reference_indices = _choose(reference, config.num_reference, "--num-reference", spread=True)
        check_enough(reference.name, len(reference_indices), config.num_neighbours)
    check_enough(samples.name, len(sample_indices), config.num_neighbours)
    extractor = place(load_features(config.features, weights=config.weights), processes.device)
    samples.announce("SAMPLES", processes)
    if isinstance(reference, ImageSet):
        reference.announce("REFERENCE", processes)
    announce_channels(samples.num_channels)
    broken: list[BrokenImage] = []
    if isinstance(reference, FeatureStatistics):
        check_comparable(samples=_expected(config, samples, extractor), reference=reference.provenance)
        known = reference
    else:
        known = read_reference(reference, reference_indices, config, extractor, processes, stop)
        broken = reference.broken
    statistics = _read(samples, sample_indices, "samples", config, extractor, processes, stop, keep_logits=True)
    if not processes.is_first:
        return None
    figures = score_features(
        samples=statistics,
        reference=known,
        num_neighbours=config.num_neighbours,
        split_size=config.split_size,
        kid_subsets=config.kid_subsets,
        kid_subset_size=config.kid_subset_size,
        seed=config.seed,
        device=processes.device,
        adm_half=config.adm_half,
    )
    if config.save_reference is not None:
        known.save(config.save_reference)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / METRICS).unlink(missing_ok=True)  # it comes back last: whoever finds it finds a whole score
    write_json(config.out / CONFIG, flat(config) | {"command": "score"})
    write_environment(config.out, device=processes.device, seed=config.seed, num_processes=processes.count)
    journal = Journal(config.out, keep_up_to_step=0)
    journal.write("samples", **samples.summary())
    if isinstance(reference, ImageSet):
        journal.write("reference", **reference.summary())
    for image in broken:
        journal.write("broken_image", **image._asdict())
    write_json(config.out / METRICS, figures)
    return figures


def _check_config(config: ScoreConfig) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    check_ranges(config, _RANGES)
    folder = RunFolder.claim(config.out, "score")
    for name in ("samples", "reference", "features"):
        now = to_plain(getattr(config, name))
        if folder.saved is not None and folder.differs(**{name: now}):
            raise UserError(
                f"--out '{config.out}' holds a score of {name} '{folder.saved.get(name)}', not '{now}'",
                "Choose another --out, or remove that folder",
            )
    path = config.save_reference
    if path is not None:
        if path.suffix != STATISTICS_SUFFIX:
            raise UserError(f"--save-reference '{path}' must end in {STATISTICS_SUFFIX}", "Rename it")
        if path.exists() and not holds_statistics(path):
            raise UserError(f"--save-reference '{path}' exists and holds something else", "Choose another file")
        check_writable(path.parent, "--save-reference")


def _open(config: ScoreConfig, samples: ImageSet) -> ImageSet | FeatureStatistics:
    """Open the reference: its images, or statistics where a file holds no images."""
    path = expanded(config.reference)
    known = read_statistics(path)
    if known is None:
        return open_reference(
            config.reference, image_size_px=samples.image_size, image_column=config.image_column,
            pixels=Pixels(channels=samples.num_channels, range=config.value_range),
        )  # fmt: skip
    if config.num_reference is not None:
        raise UserError(
            f"--num-reference {config.num_reference} has no place: '{path}' holds statistics of all its images",
            "Leave it out",
        )
    check_comparable(samples=_expected(config, samples, None), reference=known.provenance)
    return known


def _expected(config: ScoreConfig, samples: ImageSet, extractor: FeatureExtractor | None) -> Provenance:
    """Say where the samples' statistics will come from, as far as it is known before they are read."""
    return Provenance(
        data=samples.name,
        fingerprint="",
        features=config.features,
        weights_fingerprint=None if extractor is None else extractor.weights_fingerprint,
        image_size_px=samples.image_size.written(),
        num_channels=samples.num_channels,
        precision=config.precision,
    )


def _choose(images: ImageSet, wanted: int | None, flag: str, *, spread: bool) -> Sequence[int]:
    """Choose the first images, or as many at equal distances: a folder tree begins with one class."""
    if wanted is None:
        return range(len(images))
    if wanted > len(images):
        raise UserError(f"{flag} {wanted} asks for more than the {len(images)} images of '{images.name}'")
    return [index * len(images) // wanted for index in range(wanted)] if spread else range(wanted)


def read_reference(
    images: ImageSet,
    indices: Sequence[int],
    config: Any,
    extractor: FeatureExtractor,
    processes: Processes,
    stop: StopRequest | None = None,
) -> FeatureStatistics:
    """Extract the features of a reference; where an ADM batch holds moments of more images, these count."""
    batch = find_adm_moments(config.reference, config.features, config.precision)
    statistics = _read(images, indices, "reference", config, extractor, processes, stop)
    return statistics if batch is None else with_adm_moments(statistics, batch)


def _read(
    images: ImageSet,
    indices: Sequence[int],
    title: str,
    config: Any,
    extractor: FeatureExtractor,
    processes: Processes,
    stop: StopRequest | None,
    *,
    keep_logits: bool = False,
) -> FeatureStatistics:
    """Extract the features of one set as a configuration says, and show how far it has come."""
    num_own = -(-len(indices) // processes.count)
    with processes.progress(title, total=num_own, unit="image") as progress:

        def on_batch(num_images: int) -> None:
            if progress is not None:
                progress.advance(num_images)
            if stop:
                raise Interrupted(f"{stop.signal_name}; {_ANEW}")

        return compute_statistics(
            extractor,
            images,
            indices=indices,
            device=processes.device,
            processes=processes,
            precision=config.precision,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            keep_logits=keep_logits,
            on_batch=on_batch,
        )
