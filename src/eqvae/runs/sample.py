"""`eqvae sample`: draws a sample set in parts that survive an interruption, and puts them into one .npz."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from eqvae.artifacts.channels import describe_shown
from eqvae.artifacts.files import fingerprint, read_tensors, to_plain, write_json, write_tensors
from eqvae.artifacts.names import METRICS, SAMPLE_PARTS, SAMPLE_SET, SAMPLE_SHEET, SNAPSHOTS
from eqvae.artifacts.sample_sets import check_header, pick_images, read_blocks, stream_sample_set
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import Interrupted, UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard, Weights, build_generator, read_generator
from eqvae.images.sizes import one_size
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import Journal, say
from eqvae.runtime.memory import SAMPLE_FLAGS, Memory, told_when_full
from eqvae.runtime.processes import Processes, join_processes, wait_for_file
from eqvae.runtime.run_folder import AT_LEAST_1, RunFolder, check_ranges, flat
from eqvae.runtime.signals import StopRequest, stop_on_signals
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices
from eqvae.training.ema import find_snapshots, reconstruct

IMAGES_PER_PART = 256
"""An interruption loses at most so many images of each process."""

FREE_TO_CHANGE = frozenset({"out", "num_samples", "batch_size", "device", "autoencoder", "dry_run"})
"""Fields that may differ between a sampling run and its continuation."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerConfig):
    """Draw images from a trained generator into an .npz that ADM's evaluator and `eqvae score` read."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of `eqvae train`."""

    out: Path
    """Output folder; the same command run again goes on with what lies there."""

    num_samples: int = 50_000
    """Images; 50,000 in ADM's protocol. More than a finished set holds lengthen it."""

    image_size: int | str | None = None
    """`256`, or `192x256` for height x width: of DiT and SiT, whose latents may have any shape; None: the one that the
    generator was trained on most."""

    batch_size: int = 64
    """Images at a time; changes no image."""

    weights: Weights = "ema"
    """Averaged weights, or those in training."""

    sigma_rel: float | None = None
    """Averaged weights of this horizon instead, after `eqvae train --posthoc-ema` (arXiv:2312.02696)."""

    autoencoder: str | None = None
    """The decoder, where it was trained further since or has moved; its encoder must be the one of the latents."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    dry_run: bool = False
    """Print the configuration and memory, and stop."""

    def check(self) -> None:
        """Check what can be checked without the generator."""
        check_ranges(self, ((AT_LEAST_1, ("num_samples", "batch_size")),))
        if self.weights != "ema" and self.sigma_rel is not None and self.weak_run is None:
            raise UserError(
                f"--weights {self.weights} changes nothing beside --sigma-rel, which are averages",
                "Leave one of the two out",
            )
        super().check()


def command(config: SampleConfig) -> str | None:
    """Draw samples and say where they are, or with --dry-run what that takes."""
    if config.dry_run:
        config.check()
        drawer = _prepare(config, join_processes(choose_device(config.device)))
        return json.dumps({"config": flat(config), **_memory(drawer, config).figures()}, indent=2)
    figures = sample(config)
    if figures is None:
        return None
    images, sheet = config.out / SAMPLE_SET, config.out / SAMPLE_SHEET
    return f"{figures['num_samples']} samples in '{images}', a sheet of them in '{sheet}'"


def sample(config: SampleConfig) -> dict[str, Any] | None:
    """Draw a sample set, or what is missing of it; several processes share the images.

    Args:
        config: From which generator, how many, and how.

    Returns:
        The figures of `metrics.json`; None in all processes but the first.

    Raises:
        UserError: If the input is wrong, or the folder holds other samples.
        Interrupted: If a signal stopped it; the same call goes on.
    """
    config.check()
    processes = join_processes(choose_device(config.device))
    drawer = _prepare(config, processes)
    with told_when_full(SAMPLE_FLAGS):
        figures = draw_samples(drawer, config, processes)
    return figures if processes.is_first else None


def _prepare(config: SampleConfig, processes: Processes) -> Drawer:
    """Load the generator and its decoder."""
    run = Path(config.run)
    generator = read_generator(run, config.weights)
    if config.sigma_rel is not None:
        generator = _with_horizon(generator, run, config.sigma_rel)
    weak = read_generator(config.weak_run, config.weights) if config.weak_run is not None else None
    size, known = None if config.image_size is None else one_size(config.image_size), generator.card.image_sizes()
    if size is not None and size not in known and processes.is_first:
        say(f"'{config.run}' was trained on {', '.join(map(str, known))} px: pictures of {size} px are new to it")
    return Drawer(
        generator=_on(generator, processes.device),
        autoencoder=place(_load_decoder(generator.card, config.autoencoder, config.run), processes.device),
        config=config,
        device=processes.device,
        weak=_on(weak, processes.device) if weak is not None else None,
        image_size=size,
    )


def _memory(drawer: Drawer, config: SampleConfig) -> Memory:
    from eqvae.runs.memory import sampling_memory  # its file takes training's steps too

    return sampling_memory(drawer, min(config.batch_size, config.num_samples))


def _check_memory(drawer: Drawer, config: SampleConfig, processes: Processes) -> None:
    """Refuse what does not fit, before anything is written."""
    from eqvae.runs.memory import is_beyond_doubt

    num_images = min(config.batch_size, config.num_samples)
    num_parameters = drawer.generator.transformer.num_parameters() + drawer.autoencoder.num_parameters()
    num_pixels = num_images * drawer.size.num_pixels
    if not is_beyond_doubt(num_parameters, num_pixels / 8, processes.device):
        _memory(drawer, config).check_fits(processes.device, SAMPLE_FLAGS, num_processes=processes.count)


def draw_samples(drawer: Drawer, config: SampleConfig, processes: Processes) -> dict[str, Any]:
    """Draw a sample set, or go on where an earlier call stopped or, with fewer samples, ended."""
    card, is_own = drawer.generator.card, drawer.size == drawer.generator.card.image_sizes()[0]
    config = replace(config, num_steps=drawer.num_steps, image_size=None if is_own else drawer.size.written())
    folder = RunFolder.claim(config.out, "sample")
    folder.check_same(config, FREE_TO_CHANGE)
    if folder.saved is not None and (saved := _saved_card(folder.saved)) != card:  # or an older card
        before = saved.num_steps if saved is not None else "unknown"
        raise UserError(
            f"'{config.out}' holds samples of '{config.run}' at step {before}, not {card.num_steps}",
            "Choose another --out, or remove that folder",
        )
    decoder_fingerprint = drawer.autoencoder.fingerprint()
    if folder.contradicts(decoder_fingerprint=decoder_fingerprint):
        raise UserError(
            f"'{config.out}' holds samples of another decoder than '{drawer.autoencoder.name}' has now",
            "Choose another --out, or remove that folder",
        )
    drawn_by = {"weights_fingerprint": _fingerprint(drawer.generator)}
    drawn_by |= {} if drawer.weak is None else {"weak_weights_fingerprint": _fingerprint(drawer.weak)}
    if folder.contradicts(**drawn_by):
        raise UserError(
            f"'{config.out}' holds samples of other weights than '{config.run}' or its --weak-run has now",
            "Choose another --out, or remove that folder",
        )
    num_there = _count_there(config)
    if folder.figures is not None and num_there == config.num_samples:
        return folder.figures
    _check_memory(drawer, config, processes)
    # Figures of a set that is made longer are not figures of this one.
    identity = {"generator": to_plain(card), "decoder_fingerprint": decoder_fingerprint, **drawn_by}
    with folder.hold(config, processes, seed=config.seed, anew=(METRICS,), **identity), stop_on_signals() as stop:
        parts = _parts(num_there, config.num_samples)
        own = parts[processes.rank :: processes.count]
        missing = [indices for indices in own if not _is_whole(config.out, indices)]
        processes.wait()  # what lies there from here on is whole
        rate = _draw_parts(drawer, config, missing, sum(map(len, own)), processes, stop)
        for indices in parts:
            wait_for_file(_part(config.out, indices), lambda: _stop_if_asked(stop, config))
        figures = {"num_samples": config.num_samples, "images_per_sec": float(sum(processes.gather(rate)))}
        if processes.is_first:
            if parts:
                _join_parts(drawer, config, num_there, parts, stop)
            _draw_sheet(drawer, config)
            shutil.rmtree(config.out / SAMPLE_PARTS, ignore_errors=True)
            write_json(config.out / METRICS, figures)
        processes.wait()
        return figures


def _fingerprint(generator: Generator) -> str:
    return fingerprint(sorted(generator.transformer.state_dict().items()))


def _count_there(config: SampleConfig) -> int:
    """Count the images of an earlier set, which stay."""
    path = config.out / SAMPLE_SET
    num_there = check_header(path)[0] if path.exists() else 0
    if num_there > config.num_samples:
        raise UserError(
            f"'{config.out}' holds {num_there} samples, more than --num-samples {config.num_samples}",
            "Give as many or more, or another --out",
        )
    return num_there


def _parts(num_there: int, num_samples: int) -> list[range]:
    """Split what is to be drawn into parts that end at the same images however many there are."""
    size = IMAGES_PER_PART
    firsts = range(num_there // size * size, num_samples, size)
    parts = [range(max(first, num_there), min(first + size, num_samples)) for first in firsts]
    return [part for part in parts if part]


def _saved_card(saved: Mapping[str, Any]) -> GeneratorCard | None:
    try:
        return GeneratorCard.from_plain(saved["generator"])
    except (KeyError, TypeError, ValueError, ArithmeticError, UserError):
        return None


def _draw_parts(
    drawer: Drawer,
    config: SampleConfig,
    missing: Sequence[range],
    num_own: int,
    processes: Processes,
    stop: StopRequest,
) -> float:
    """Draw this process's parts that are missing of so many images of its own; returns images per second."""
    num_missing, began_sec = sum(map(len, missing)), time.perf_counter()
    with processes.progress("sample", total=num_own, start=num_own - num_missing, unit="image") as progress:
        for indices in missing:
            images = []
            for start in range(0, len(indices), config.batch_size):
                images.append(drawer.images(indices[start : start + config.batch_size]).permute(0, 2, 3, 1).cpu())
                _stop_if_asked(stop, config)
            write_tensors(_part(config.out, indices), {"images": torch.cat(images)}, digest=True)
            if progress is not None:
                progress.advance(len(indices))
    return num_missing / (time.perf_counter() - began_sec)


def _is_whole(out: Path, indices: range) -> bool:
    """Whether a part that an earlier session drew can be kept; it is removed if not."""
    path = _part(out, indices)
    if not path.exists():
        return False
    try:
        is_whole = len(read_tensors(path)[0]["images"]) == len(indices)  # else it is of another number of samples
    except (UserError, KeyError):
        is_whole = False
        say(f"'{path}' is damaged: its samples are drawn again")
        Journal(out).write("damaged_part", file=path.name)
    if not is_whole:
        path.unlink()
    return is_whole


def _join_parts(
    drawer: Drawer, config: SampleConfig, num_there: int, parts: Sequence[range], stop: StopRequest
) -> None:
    """Write the .npz: what was there, and after it all parts."""

    def blocks() -> Iterator[np.ndarray]:
        if num_there:
            yield from read_blocks(config.out / SAMPLE_SET)
        for indices in parts:
            _stop_if_asked(stop, config)
            yield read_tensors(_part(config.out, indices))[0]["images"].numpy()

    labels = drawer.labels(range(config.num_samples)).numpy() if drawer.num_classes > 0 else None
    shape = (config.num_samples, *drawer.size, drawer.autoencoder.image_channels)
    stream_sample_set(config.out / SAMPLE_SET, blocks(), shape, labels)


def _draw_sheet(drawer: Drawer, config: SampleConfig) -> None:
    shown = sheet_indices(config.num_samples, drawer.num_classes if config.classes == "balanced" else 0)
    images = torch.from_numpy(pick_images(config.out / SAMPLE_SET, shown)).permute(0, 3, 1, 2)
    if shows := describe_shown(images.shape[1]):
        say(f"'{config.out / SAMPLE_SHEET}' shows {shows} as red, green and blue")
    contact_sheet(images, config.out / SAMPLE_SHEET, row_names=drawer.row_names(shown))


def _stop_if_asked(stop: StopRequest, config: SampleConfig) -> None:
    if stop:
        raise Interrupted(f"{stop.signal_name}; the same command goes on from '{config.out}'")


def _part(out: Path, indices: range) -> Path:
    return out / SAMPLE_PARTS / f"{indices.start:08d}.safetensors"


def _load_decoder(card: GeneratorCard, name: str | None, run: str) -> Autoencoder:
    """Load an autoencoder whose encoder made the generator's latents, and no other."""
    name = name or card.autoencoder
    autoencoder = load_autoencoder(name)
    own = autoencoder.check_decodes(
        "The generator models latents of",
        made_by=card.autoencoder,
        fingerprint=card.autoencoder_fingerprint,
        encoder_fingerprint=card.encoder_fingerprint,
    )
    if own != card.autoencoder_fingerprint:
        say(f"decoder: '{name}', trained further than that of '{card.autoencoder}', whose latents '{run}' models")
    return autoencoder


def _with_horizon(generator: Generator, run: Path, sigma_rel: float) -> Generator:
    """Mix the snapshots of power-function averages to the horizon that is asked for."""
    try:
        weights = reconstruct(find_snapshots(run / SNAPSHOTS), sigma_rel=sigma_rel, step=generator.card.num_steps)
    except ValueError as error:
        raise UserError(f"--sigma-rel: {error}", "0.05 and 0.1 are usual") from None
    return build_generator(generator.card, weights, source=str(run / SNAPSHOTS))


def _on(generator: Generator, device: torch.device) -> Generator:
    return replace(generator, transformer=generator.transformer.to(device))
