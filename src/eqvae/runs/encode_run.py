"""One process's part of an encoding: whole shards are kept, missing ones made, the index written over all."""

import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eqvae.artifacts.files import check_still_there, read_journal, read_json, write_json
from eqvae.artifacts.names import METRICS
from eqvae.autoencoders.protocol import Autoencoder, LatentStatistics
from eqvae.errors import Interrupted, UserError
from eqvae.images import ImageBatch, ImageSource, check_broken, encoding_batches
from eqvae.images.sources import counted, list_names
from eqvae.latents.cache import LatentCache
from eqvae.latents.writing import Recipe, collect_index, encode_crops, finish_shard, open_whole_shard
from eqvae.metrics.autoencoder import latent_figures
from eqvae.runs.encode import EncodeConfig
from eqvae.runtime.journal import Journal, say
from eqvae.runtime.processes import Processes
from eqvae.runtime.signals import StopRequest

_POLL_SEC = 0.2
_MAX_WORKERS = 16

_MAX_VANISHED = 3
"""So often shards that vanish are made again."""

_Encoded = tuple[ImageBatch, dict[str, Tensor]]
"""A batch and what is kept of it."""


@dataclass(kw_only=True)
class EncodeRun:
    """One process's part of the encoding."""

    config: EncodeConfig
    recipe: Recipe
    source: ImageSource
    processes: Processes
    stop: StopRequest
    autoencoder: Autoencoder
    journal: Journal
    """All processes append to it, a line at a time."""
    missing: list[int] = field(default_factory=list)
    """This process's shards that have to be made."""
    num_kept: int = 0
    """Images visited for the shards that all processes together found whole."""
    num_broken: int = 0
    """Broken images that this process's kept shards name."""
    num_records: int = 0
    """Records in the journal before any process wrote a shard."""
    began_sec: float = 0.0
    """When encoding began, by the monotonic clock."""

    def keep_whole_shards(self) -> int:
        """See which of this process's shards are whole, and remove what is not."""
        num_kept = 0
        named = {self.recipe.path(self.config.out, number).name for number in range(self.recipe.num_shards)}
        for path in self.config.out.glob("shard-*.safetensors") if self.processes.is_first else ():
            if path.name not in named:  # of data that had more images
                path.unlink(missing_ok=True)
        for number in range(self.processes.rank, self.recipe.num_shards, self.processes.count):
            path = self.recipe.path(self.config.out, number)
            existed = path.exists()
            shard = open_whole_shard(path, self.recipe, number) if existed else None
            if shard is not None:
                self.num_broken += len(shard.note["broken"])
                num_kept += len(self.recipe.shards[number].visited)
            else:
                self.missing.append(number)
                path.unlink(missing_ok=True)
                if existed:
                    self.journal.write("broken_shard", file=path.name)
            self._stop_if_asked()
        if num_kept:
            self.journal.write("resume", rank=self.processes.rank, num_images_kept=num_kept)
        return num_kept

    def encode_missing_shards(self) -> None:
        """Make this process's shards; each is written by a thread while the next one is encoded."""
        size, planned = self.config.batch_size, {number: self.recipe.shards[number] for number in self.missing}
        parts = {
            number: [each.visited[i : i + size] for i in range(0, len(each.visited), size)]
            for number, each in planned.items()
        }
        batches = encoding_batches(
            self.source,
            image_size_px=[planned[number].size for number, own in parts.items() for _ in own],
            parts=[part for own in parts.values() for part in own],
            num_broken=self.num_broken,
            num_workers=self._choose_num_workers(),
        )
        total = sum(len(each.visited) for each in planned.values())
        with (
            contextlib.closing(batches),
            ThreadPoolExecutor(1) as writer,
            self.processes.progress("encode", total=total, unit="image") as progress,
        ):
            writing = writer.submit(lambda: None)
            for number, own in parts.items():
                made = []
                for batch in itertools.islice(batches, len(own)):
                    made.append(self._encode(batch))
                    if progress is not None:
                        progress.advance(len(batch.indices) + len(batch.broken))
                    if writing.done():
                        writing.result()  # an error of the thread is told now, not a shard later
                    self._stop_if_asked()
                writing.result()
                writing = writer.submit(self._write, number, made)
            writing.result()

    def finish(self) -> dict[str, float | int]:
        """Wait for the other processes' shards, make again what vanished, then write the index and the figures."""
        for _ in range(_MAX_VANISHED):
            self.missing = self._wait_for_shards()
            if not self.missing:
                break
            for number in self.missing:
                self.journal.write("vanished_shard", file=self.recipe.path(self.config.out, number).name)
            self.encode_missing_shards()
        else:
            raise UserError(
                f"Shards vanish from '{self.config.out}' as often as they are written", "See what removes them"
            )
        encoding_sec = time.monotonic() - self.began_sec
        index = collect_index(self.config.out, self.recipe)
        check_broken(self.config.data, len(self.source), index.num_broken, "see the journal")
        index.write(self.config.out)
        self._name_empty_classes()
        figures: dict[str, float | int] = {
            "num_images": index.num_images,
            "num_broken": index.num_broken,
            "num_shards": len(index.shards),
            "num_bytes": sum(entry.num_bytes for entry in index.shards),
        }
        if index.statistics is not None:
            figures |= latent_figures(LatentStatistics(mean=index.statistics.mean, std=index.statistics.std))
        num_encoded = self.recipe.num_visited - self.num_kept
        if num_encoded:
            figures |= {"encoding_sec": encoding_sec, "images_per_sec": num_encoded / encoding_sec}
        elif (self.config.out / METRICS).is_file():
            former = read_json(self.config.out / METRICS)
            figures |= {name: former[name] for name in ("encoding_sec", "images_per_sec") if name in former}
        write_json(self.config.out / METRICS, figures)
        return figures

    def _name_empty_classes(self) -> None:
        """Say which classes have no image that could be read: a generator would draw them untrained."""
        labels, names = LatentCache.open(self.config.out).labels(), self.recipe.class_names or ()
        seen = set() if labels is None else set(labels.unique().tolist())
        if empty := [name for number, name in enumerate(names) if number not in seen]:
            self.journal.write("empty_classes", class_names=empty)
            verb = "has" if len(empty) == 1 else "have"
            say(f"{counted(len(empty), 'class')} ({list_names(empty)}) {verb} no image that can be read")

    def _wait_for_shards(self) -> list[int]:
        """Wait until all shards were written; returns those that are no longer there.

        Others' are written once the journal says so (where another process failed, torchrun ends us). No collective
        waits so long: of many hours' work some processes' part may take an hour more than others'.
        """
        own = range(self.processes.rank, self.recipe.num_shards, self.processes.count)
        while True:
            self._stop_if_asked()
            check_still_there(self.recipe.path(self.config.out, 0))
            paths = {number: self.recipe.path(self.config.out, number) for number in range(self.recipe.num_shards)}
            missing = [number for number, path in paths.items() if not path.exists()]
            records = read_journal(self.config.out)[self.num_records :] if missing else []
            written = {record.get("file") for record in records if record.get("kind") == "shard"}
            vanished = [number for number in missing if number in own or paths[number].name in written]
            if vanished or not missing:
                return vanished
            time.sleep(_POLL_SEC)

    def _encode(self, batch: ImageBatch) -> _Encoded:
        """Encode images and mirror images; what comes back may still be under way on the device."""
        for broken in batch.broken:
            self.journal.write("broken_image", **broken._asdict())
        device, precision = self.processes.device, self.config.precision
        return batch, encode_crops(self.autoencoder, batch.crops, device, precision, self.config.mirror)

    def _write(self, number: int, made: list[_Encoded]) -> None:
        """Write one shard."""
        # A batch whose images are all broken says nothing, unless no other one does.
        full = [kept for batch, kept in made if batch.indices] or [made[0][1]]
        indices = [index for batch, _ in made for index in batch.indices]
        labelled = self.recipe.class_names is not None
        try:
            path = finish_shard(
                self.config.out,
                self.recipe,
                number,
                {name: torch.cat([kept[name] for kept in full]) for name in full[0]},
                source_indices=indices,
                labels=[self.source.class_of(index) or 0 for index in indices] if labelled else None,
                broken=[broken.name for batch, _ in made for broken in batch.broken],
            )
            self.journal.write("shard", file=path.name, num_images=len(indices))
        except OSError as error:
            raise UserError(
                f"'{self.recipe.path(self.config.out, number)}' can't be written ({error.strerror})",
                "Whole shards are kept: make room and run the same command again",
            ) from None

    def _stop_if_asked(self) -> None:
        if self.stop:
            raise Interrupted(f"{self.stop.signal_name}; the same command goes on from '{self.config.out}'")

    def _choose_num_workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        if self.processes.device.type == "cpu":
            return 1
        return min(_MAX_WORKERS, self.processes.num_cores)
