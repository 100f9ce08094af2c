"""How much faster a training step of a DiT is than in a plain script, and whether the cache's reader keeps up.

    python benchmarks/train_generator.py [--batch-size 16] [--num-steps 3] [--repeats 3] [--threads N] [--json FILE]
    python benchmarks/train_generator.py --recipe dit-xl-2 --batch-size 128 --num-steps 20 --compile --no-reference

The reference is written out below, from the description of the public training scripts: eager fp32, attention by
explicit products, one `.npy` of a latent and one of a label for each image behind a DataLoader, AdamW as PyTorch builds
it, averaged weights by a Python loop over parameters. Ours is `train_step` with the defaults of
`eqvae train`, fed by `training_batches` from a cache. Both start from the same weights, have the same objective (ours:
it takes no time beside the transformer), and take turns in one process. Each turn's wall-clock and processor time are
kept: other jobs on the machine show in the first, hardly in the second. On an accelerator, rate, share of the measured
matrix peak and peak memory are those of ours.
"""

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eqvae.generators.families import find_recipe
from eqvae.generators.protocol import Objective
from eqvae.generators.recipes import PUBLISHED_LATENTS, Recipe
from eqvae.generators.transformer import Transformer, TransformerConfig
from eqvae.images import ImageSize
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import LatentCache
from eqvae.latents.writing import Coding, collect_index, finish_shard
from eqvae.latents.writing import Recipe as CacheRecipe
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import transformer_flops
from eqvae.runtime.device import Precision, choose_device, matrix_peak_flops_per_sec, synchronize
from eqvae.runtime.seeds import generator_for
from eqvae.training.generator_step import TrainingBatch, build_state, train_step
from machine import describe_machine

SEED = 0
READER_BATCH, NUM_READER_BATCHES = 256, 40

TakeStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare training steps with a plain script, on latents of 32 x 32 x 4 and 1000 classes."""

    recipe: str = "dit-s-2"
    """A DiT of `eqvae train`."""

    batch_size: int = 16
    """Latents per step."""

    num_steps: int = 3
    """Steps of each turn."""

    repeats: int = 3
    """Times that the variants take turns, after one step for warming up."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""

    reference: bool = True
    """Measure the plain script too."""

    ablation: bool = True
    """Measure ours in fp32 too."""

    compile: bool = False
    """Compile our transformer."""

    gradient_checkpointing: bool = False
    """Let ours compute activations again."""

    num_cached: int = 2048
    """Images of the cache."""

    json: Path | None = None
    """File to write the figures to."""


# The reference ------------------------------------------------------------------------------------------------------


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


class PlainBlock(nn.Module):
    """adaLN-Zero around attention and feed-forward."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(width, num_heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(self.norm1(x) * (1 + scale[:, None]) + shift[:, None])
        hidden = self.mlp["fc1"](self.norm2(x) * (1 + mlp_scale[:, None]) + mlp_shift[:, None])
        return x + mlp_gate[:, None] * self.mlp["fc2"](nn.functional.gelu(hidden, approximate="tanh"))


class PlainTransformer(nn.Module):
    """A DiT under the published names, so that it takes our first weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, side, self.config = config.hidden_size, config.patch_size, config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.latents.channels, width, side, side)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        table = nn.Embedding(config.latents.num_classes + 1, width)
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid[0] * config.grid[1], width), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, side**2 * config.out_channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=z.device) / 128)
        angles = t[:, None].float() * frequencies
        condition = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        condition = condition + self.y_embedder["embedding_table"](labels)
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=1)
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        side, (rows, columns) = self.config.patch_size, self.config.grid
        x = self.final_layer["linear"](x).reshape(len(z), rows, columns, side, side, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(z), -1, rows * side, columns * side)


class FilePerImage(Dataset):
    """A latent and a label in files of their own."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.num_images = folder, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        latent, label = np.load(self.folder / f"{index}-latent.npy"), np.load(self.folder / f"{index}-label.npy")
        return torch.from_numpy(latent), torch.from_numpy(label)


def prepare_reference(first: Transformer, objective: Objective, options: Options, folder: Path) -> TakeStep:
    """Write the files and set up the plain loop."""
    device = choose_device(options.device)
    folder.mkdir()
    generator = generator_for(SEED)
    num_images = max(2 * options.batch_size, 64)
    for index in range(num_images):
        np.save(folder / f"{index}-latent.npy", torch.randn(PUBLISHED_LATENTS.shape, generator=generator).numpy())
        np.save(folder / f"{index}-label.npy", np.array(index % PUBLISHED_LATENTS.num_classes))
    model = PlainTransformer(first.config).to(device)
    model.load_state_dict(first.state_dict())
    averaged = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    loader = DataLoader(FilePerImage(folder, num_images), options.batch_size, shuffle=True, drop_last=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    stream = batches()

    def take_step() -> None:
        latents, labels = (value.to(device) for value in next(stream))
        draws = objective.draw(len(latents), PUBLISHED_LATENTS, generator)
        loss = objective.loss(model, latents, labels, {name: value.to(device) for name, value in draws.items()})
        mean = loss.total.mean()
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        with torch.no_grad():
            for average, value in zip(averaged.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        mean.item()

    return take_step


# Ours ---------------------------------------------------------------------------------------------------------------


def prepare_ours(
    first: Transformer, objective: Objective, options: Options, cache: LatentCache, precision: Precision
) -> TakeStep:
    """Set up `train_step` as `eqvae train` calls it."""
    device = choose_device(options.device)
    config = TrainConfig(
        recipe=options.recipe, latents=cache.folder, out=cache.folder, batch_size=options.batch_size,
        precision=precision, gradient_checkpointing=options.gradient_checkpointing, compile=options.compile,
    ).resolved()  # fmt: skip
    state = build_state(deepcopy(first), objective, config, device)
    state.transformer.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        state.transformer.compile()
    stream = training_batches(cache, batch_size=options.batch_size, seed=SEED, num_steps=1_000_000)

    def take_step() -> None:
        read = next(stream)
        draws = objective.draw(options.batch_size, PUBLISHED_LATENTS, generator_for(SEED, state.step))
        batch = TrainingBatch(
            latents=read.latents.to(device),
            labels=read.labels.to(device),
            draws={name: value.to(device) for name, value in draws.items()},
        )
        train_step(state, batch, config, state.learner)

    return take_step


def write_cache(folder: Path, num_images: int) -> LatentCache:
    """Write a cache of random moments."""
    recipe = CacheRecipe(
        visited_by_size=((ImageSize.of(256), range(num_images)),),
        coding=Coding(kind="moments", dtype="float16"), stride=8, latent_channels=4,
        autoencoder="none", fingerprint="none", encoder_fingerprint="none", data="none", data_fingerprint="none",
        class_names=tuple(map(str, range(PUBLISHED_LATENTS.num_classes))), mirror=True, precision="bf16",
        shard_size=1024, command="none",
    )  # fmt: skip
    folder.mkdir()
    for number in range(recipe.num_shards):
        visited = list(recipe.shards[number].visited)
        names = ("mean", "std", "mean_mirrored", "std_mirrored")
        kept = {name: torch.rand(len(visited), *PUBLISHED_LATENTS.shape) for name in names}
        labels = [index % PUBLISHED_LATENTS.num_classes for index in visited]
        finish_shard(folder, recipe, number, kept, source_indices=visited, labels=labels, broken=[])
    collect_index(folder, recipe).write(folder)
    return LatentCache.open(folder)


# Measuring ----------------------------------------------------------------------------------------------------------


def compare(options: Options, recipe: Recipe, cache: LatentCache, folder: Path) -> dict[str, Any]:
    """Let the variants take turns.

    Args:
        options: As given to the command.
        recipe: What is trained.
        cache: What ours reads.
        folder: Where the reference's files are written.

    Returns:
        Medians and all turns of each variant.
    """
    device = choose_device(options.device)
    objective = recipe.objective(PUBLISHED_LATENTS)
    first = Transformer(recipe.transformer(PUBLISHED_LATENTS), generator=generator_for(SEED))
    check_the_reference(first)
    variants = {"ours": prepare_ours(first, objective, options, cache, "bf16")}
    if options.ablation:
        variants["ours in fp32"] = prepare_ours(first, objective, options, cache, "fp32")
    if options.reference:
        variants = {"reference": prepare_reference(first, objective, options, folder / "files"), **variants}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for turn in range(options.repeats + 1):  # the first one warms up and is not counted
        num_steps = 1 if turn == 0 else options.num_steps
        for name, take_step in variants.items():
            gc.collect()
            synchronize(device)
            began_sec, began_cpu_sec = time.perf_counter(), time.process_time()
            for _ in range(num_steps):
                take_step()
            synchronize(device)
            sec, cpu_sec = (
                (time.perf_counter() - began_sec) / num_steps,
                (time.process_time() - began_cpu_sec) / num_steps,
            )
            if turn > 0:
                turns[name].append({"step_sec": sec, "step_cpu_sec": cpu_sec})
                print(f"{turn}/{options.repeats} {name}: {sec:.3f} s, {cpu_sec:.3f} s of processors", flush=True)
    return {
        name: {
            "step_sec": statistics.median(one["step_sec"] for one in rows),
            "step_cpu_sec": statistics.median(one["step_cpu_sec"] for one in rows),
            "images_per_sec": options.batch_size / statistics.median(one["step_sec"] for one in rows),
            "turns": rows,
        }
        for name, rows in turns.items()
    }


@torch.no_grad()
def check_the_reference(first: Transformer) -> None:
    """Hold the two transformers against each other: they are one function."""
    generator = generator_for(SEED, 1)
    alive = deepcopy(first)
    for parameter in alive.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    plain = PlainTransformer(first.config)
    plain.load_state_dict(alive.state_dict())
    z, t, labels = torch.randn(1, *PUBLISHED_LATENTS.shape, generator=generator), torch.tensor([321]), torch.tensor([7])
    torch.testing.assert_close(plain(z, t, labels), alive(z, t, labels), rtol=1e-3, atol=1e-3)


def measure_reader(cache: LatentCache) -> float:
    """Read batches with one thread ahead, as training does; latents per second."""
    batches = training_batches(cache, batch_size=READER_BATCH, seed=SEED, num_steps=NUM_READER_BATCHES + 5)
    for _ in range(5):
        next(batches)
    began_sec = time.perf_counter()
    num_read = sum(len(batch.latents) for batch in batches)
    return num_read / (time.perf_counter() - began_sec)


def main(options: Options) -> None:
    """Run the benchmark.

    Args:
        options: As given to the command.

    Raises:
        SystemExit: If the recipe is no DiT.
    """
    torch.set_num_threads(options.threads)
    device, recipe = choose_device(options.device), find_recipe(options.recipe)
    if recipe.family != "dit":
        raise SystemExit(f"'{recipe}' is no DiT, which the reference is")
    description = describe_machine(__file__, options, device=device, packages=("numpy", "safetensors"))
    print(f"{description['machine']['device']}, load {description['machine']['load_average']:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache", options.num_cached)
        variants = compare(options, recipe, cache, Path(folder))
        reader_rate = measure_reader(cache)
    ours = variants["ours"]
    flops = 3 * transformer_flops(recipe.transformer(PUBLISHED_LATENTS))
    peak = matrix_peak_flops_per_sec(device, "bf16")
    content = description | {
        "variants": variants,
        "reader_latents_per_sec": reader_rate,
        "reader_times_training": reader_rate / ours["images_per_sec"],
        "flops_per_image": flops,
        "matrix_peak_flops_per_sec": peak,
        "share_of_peak": ours["images_per_sec"] * flops / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    if options.reference:
        content["times_faster"] = variants["reference"]["step_sec"] / ours["step_sec"]
        content["times_less_cpu"] = variants["reference"]["step_cpu_sec"] / ours["step_cpu_sec"]
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nours: {ours['images_per_sec']:.2f} images/s, {content['share_of_peak']:.0%} of the matrix peak")
    print(f"reader: {reader_rate:.0f} latents/s, {content['reader_times_training']:.0f} times the training's rate")
    if options.reference:
        print(f"ours / reference: {content['times_faster']:.2f} times faster by the clock, "
              f"{content['times_less_cpu']:.2f} times by processor time")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
