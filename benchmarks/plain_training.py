"""What public training scripts of generators have in common, written plainly; and ours beside it."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Turn
from eqvae.generators.protocol import LatentSpecification, Objective
from eqvae.images import ImageSize
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import LatentCache
from eqvae.latents.writing import Coding, Recipe, collect_index, finish_shard
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.seeds import generator_for
from eqvae.training.generator_step import TrainingBatch, build_state, train_step

SEED = 0


class PlainAttention(nn.Module):
    """Softmax of queries times keys, times values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, num_tokens, width = x.shape
        heads = self.qkv(x).reshape(n, num_tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.einsum("nhqd,nhkd->nhqk", query * (width // self.num_heads) ** -0.5, key).softmax(dim=-1)
        return self.proj(torch.einsum("nhqk,nhkd->nqhd", weights, value).reshape(n, num_tokens, width))


class FilePerImage(Dataset):
    """A latent and a label in files of their own."""

    def __init__(self, folder: Path, latents: Tensor, num_classes: int) -> None:
        self.folder, self.num_images = folder, len(latents)
        folder.mkdir(exist_ok=True)
        for index, latent in enumerate(latents):
            np.save(folder / f"{index}-latent.npy", latent.numpy())
            np.save(folder / f"{index}-label.npy", np.array(index % num_classes))

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        latent, label = np.load(self.folder / f"{index}-latent.npy"), np.load(self.folder / f"{index}-label.npy")
        return torch.from_numpy(latent), torch.from_numpy(label)


def plain_training(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor, int], Tensor],
    data: FilePerImage,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    device: torch.device,
    clip: float | None = None,
) -> Turn:
    """Train in eager fp32, with averaged weights by a loop over parameters.

    Args:
        model: Trained.
        loss_of: Of latents, labels and the step's number, as one number.
        data: Read by a DataLoader in this process.
        optimizer: Of the model.
        batch_size: Images of a step.
        device: Where.
        clip: Largest norm of the gradient.

    Returns:
        Takes a step.
    """
    averaged = deepcopy(model).requires_grad_(False)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    stream, steps = batches(), iter(range(1_000_000))

    def take_step() -> dict[str, Any]:
        latents, labels = (value.to(device) for value in next(stream))
        loss = loss_of(latents, labels, next(steps))
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for average, value in zip(averaged.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        loss.item()
        return {"units": 1}

    return take_step


def our_training(
    model: nn.Module, objective: Objective, specification: LatentSpecification, cache: LatentCache, config: TrainConfig
) -> Turn:
    """Set up `train_step` as `eqvae train` calls it.

    Args:
        model: Trained.
        objective: Its loss.
        specification: Of the latents.
        cache: Which is read.
        config: Of the training.

    Returns:
        Takes a step.
    """
    device, config = torch.device(config.device), config.resolved()
    state = build_state(model, objective, config, device)
    state.transformer.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        state.transformer.compile()
    stream = training_batches(cache, batch_size=config.batch_size, seed=SEED, num_steps=1_000_000)

    def take_step() -> dict[str, Any]:
        read = next(stream)
        draws = objective.draw(config.batch_size, specification, generator_for(SEED, state.step))
        batch = TrainingBatch(
            latents=read.latents.to(device),
            labels=read.labels.to(device),
            draws={name: value.to(device) for name, value in draws.items()},
        )
        train_step(state, batch, config, state.learner)
        return {"units": 1}

    return take_step


def random_cache(
    folder: Path, specification: LatentSpecification, num_images: int, num_codes: int | None = None
) -> LatentCache:
    """Write a cache of random moments, or of random tokens of so many codes.

    Args:
        folder: Made.
        specification: Shape and classes.
        num_images: In shards of at most 1,024.
        num_codes: Of the codebook; None: moments.

    Returns:
        The cache.
    """
    coding = Coding(kind="moments", dtype="float16")
    if num_codes is not None:
        coding = Coding(kind="tokens", dtype="int16" if num_codes <= 2**15 else "int32", codebook_size=num_codes)
    stride = 8 if num_codes is None else 16
    recipe = Recipe(
        coding=coding, visited_by_size=((ImageSize.of(stride * specification.height), range(num_images)),),
        stride=stride, latent_channels=specification.channels if num_codes is None else 16,
        autoencoder="none", fingerprint="none", encoder_fingerprint="none", data="none", data_fingerprint="none",
        class_names=tuple(map(str, range(specification.num_classes))), mirror=True, precision="fp32",
        shard_size=1024, command="none",
    )  # fmt: skip
    folder.mkdir()
    generator = generator_for(SEED)
    for number in range(recipe.num_shards):
        visited = list(recipe.shards[number].visited)
        if num_codes is None:
            shape = (len(visited), *specification.shape)
            kept = {
                name: torch.rand(shape, generator=generator)
                for name in ("mean", "std", "mean_mirrored", "std_mirrored")
            }
        else:
            shape = (len(visited), specification.height, specification.width)
            kept = {
                name: torch.randint(num_codes, shape, generator=generator) for name in ("tokens", "tokens_mirrored")
            }
        labels = [index % specification.num_classes for index in visited]
        finish_shard(folder, recipe, number, kept, source_indices=visited, labels=labels, broken=[])
    collect_index(folder, recipe).write(folder)
    return LatentCache.open(folder)
