"""How much faster a training step of MaskGIT is than in a plain script, and what memory it takes.

    python benchmarks/train_maskgit.py [--batch-size 16] [--num-steps 2] [--repeats 3] [--threads N] [--json FILE]
    python benchmarks/train_maskgit.py --recipe maskgit-b --batch-size 128 --num-steps 20 --no-ablation

The reference is written out below: Besnier & Chen's network and objective (arXiv:2310.14400) in plain eager fp32,
attention by explicit products, logits of every token against the whole table of codes, mask and classes, one `.npy` of
tokens and one of a label for each image behind a DataLoader, cross-entropy of the masked tokens with label smoothing,
AdamW as PyTorch builds it, gradients clipped, averaged weights by a Python loop over parameters (theirs keep none; ours
do). Ours is `train_step` with the defaults of `eqvae train`, fed by `training_batches` from
a cache. Both start from the same weights and hide the same tokens; before anything is timed, their logits, losses and
gradients are held against each other.

Each turn of a variant is a process of its own, so that its peak memory is its own; variants take turns. Both clock and
processor time are kept: other jobs on the machine show in the first, hardly in the second.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train import FilePerImage, PlainAttention

from eqvae.generators.families import find_recipe
from eqvae.generators.maskgit import MaskgitObjective
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.recipes import Recipe
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
from machine import describe_machine, measure_apart, peak_mib

SEED = 0

Variant = Literal["reference", "ours in fp32", "ours"]

TakeStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare training steps of MaskGIT with a plain script, on random tokens of 1000 classes."""

    recipe: str = "maskgit-s"
    """A MaskGIT of `eqvae train`."""

    side: int = 16
    """Tokens in a row and in a column; 256 tokens by default."""

    num_codes: int = 1024
    """Of the codebook."""

    num_classes: int = 1000

    batch_size: int = 16
    """Images per step."""

    num_steps: int = 2
    """Steps of each turn, after one that warms up."""

    repeats: int = 3
    """Turns of each variant."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`; memory is the process's on the first and PyTorch's own on the last."""

    ablation: bool = True
    """Measure ours in fp32 too."""

    json: Path | None = None
    """File to write the figures to."""

    measure: Variant | None = None
    """Measure this one here and print its figures; the command calls itself with it."""

    @property
    def tokens(self) -> LatentSpecification:
        """What is modelled."""
        return LatentSpecification(
            channels=self.num_codes, height=self.side, width=self.side, num_classes=self.num_classes
        )

    @property
    def transformer(self) -> MaskTransformerConfig:
        """What is trained."""
        return self.maskgit.transformer(self.tokens)

    @property
    def maskgit(self) -> Recipe:
        """Size and objective."""
        return find_recipe(self.recipe)


PASSED_ON = ("recipe", "side", "num_codes", "num_classes", "batch_size", "num_steps", "threads", "device")
"""The options that matter to one variant."""


# The reference ------------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, width: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), PlainAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_size), nn.GELU(), nn.Linear(mlp_size, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainMaskgit(nn.Module):
    """The published network without its dropout; every embedding is a possible output."""

    def __init__(self, config: MaskTransformerConfig) -> None:
        super().__init__()
        width, self.config = config.hidden_size, config
        num_tokens = config.grid[0] * config.grid[1] + 1
        num_embeddings = config.codebook_size + 1 + config.latents.num_classes + 1
        self.table = nn.Embedding(num_embeddings, width)
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.bias = nn.Parameter(torch.zeros(num_tokens, num_embeddings))
        self.first = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12), nn.Linear(width, width),
        )  # fmt: skip
        self.blocks = nn.Sequential(
            *(PlainBlock(width, config.num_heads, config.mlp_size) for _ in range(config.depth))
        )
        self.last = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12)
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        codes = self.config.codebook_size
        sequence = torch.cat([tokens.flatten(1), labels[:, None] + codes + 1], dim=1)
        x = self.last(self.blocks(self.first(self.table(sequence) + self.positions)))
        logits = x @ self.table.weight.T + self.bias
        return logits[:, :-1, :codes].unflatten(1, self.config.grid)


def plain_twin(first: MaskTransformer) -> PlainMaskgit:
    """Build the reference's network from the weights of ours: both list them in the same order."""
    plain = PlainMaskgit(first.config)
    ours = [value for name, value in first.named_parameters() if name not in ("bias", "pos_emb")]
    theirs = [value for name, value in plain.named_parameters() if name not in ("bias", "positions")]
    with torch.no_grad():
        for value, source in zip(theirs, ours, strict=True):
            value.copy_(source)
        plain.bias.copy_(first.bias)
        plain.positions.copy_(first.pos_emb)
    return plain


def plain_loss(
    model: PlainMaskgit, objective: MaskgitObjective, tokens: Tensor, labels: Tensor, draws: dict[str, Tensor]
) -> Tensor:
    """Cross-entropy of all masked tokens of the batch."""
    mask = draws["mask"]
    seen = tokens.masked_fill(mask, objective.codebook_size)
    labels = labels.masked_fill(draws["drop"] < objective.label_dropout, objective.num_classes)
    logits = model(seen, labels)
    return F.cross_entropy(logits[mask], tokens[mask], label_smoothing=objective.label_smoothing)


def prepare_reference(first: MaskTransformer, options: Options, folder: Path) -> TakeStep:
    """Write the files and set up the plain loop."""
    device, objective = choose_device(options.device), options.maskgit.objective(options.tokens)
    num_images = max(2 * options.batch_size, 64)
    tokens = torch.randint(options.num_codes, (num_images, options.side, options.side), generator=generator_for(SEED))
    for index, image in enumerate(tokens):
        np.save(folder / f"{index}-latent.npy", image.numpy())
        np.save(folder / f"{index}-label.npy", np.array(index % options.num_classes))
    model = plain_twin(first).to(device)
    averaged = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.96), weight_decay=1e-5)
    loader = DataLoader(FilePerImage(folder, num_images), options.batch_size, shuffle=True, drop_last=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    stream, steps = batches(), iter(range(1_000_000))

    def take_step() -> None:
        tokens, labels = (value.to(device) for value in next(stream))
        draws = objective.draw(len(tokens), options.tokens, generator_for(SEED, next(steps)))
        loss = plain_loss(model, objective, tokens, labels, {name: value.to(device) for name, value in draws.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, value in zip(averaged.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        loss.item()

    return take_step


# Ours ---------------------------------------------------------------------------------------------------------------


def prepare_ours(first: MaskTransformer, options: Options, folder: Path, precision: Precision) -> TakeStep:
    """Set up `train_step` as `eqvae train` calls it."""
    device, objective = choose_device(options.device), options.maskgit.objective(options.tokens)
    cache = write_cache(folder, options, num_images=max(2 * options.batch_size, 1024))
    config = TrainConfig(
        recipe=options.recipe, latents=folder, out=folder, batch_size=options.batch_size, precision=precision
    ).resolved()
    state = build_state(first, objective, config, device)
    stream = training_batches(cache, batch_size=options.batch_size, seed=SEED, num_steps=1_000_000)

    def take_step() -> None:
        read = next(stream)
        draws = objective.draw(options.batch_size, options.tokens, generator_for(SEED, state.step))
        batch = TrainingBatch(
            latents=read.latents.to(device),
            labels=read.labels.to(device),
            draws={name: value.to(device) for name, value in draws.items()},
        )
        train_step(state, batch, config, state.learner)

    return take_step


def write_cache(folder: Path, options: Options, num_images: int) -> LatentCache:
    """Write a cache of random tokens."""
    recipe = CacheRecipe(
        coding=Coding(kind="tokens", dtype="int16" if options.num_codes <= 2**15 else "int32",
                      codebook_size=options.num_codes),
        visited_by_size=((ImageSize.of(16 * options.side), range(num_images)),),
        stride=16, latent_channels=16, autoencoder="none", fingerprint="none",
        encoder_fingerprint="none", data="none", data_fingerprint="none", mirror=True,
        class_names=tuple(map(str, range(options.num_classes))),
        precision="fp32", shard_size=num_images, command="none",
    )  # fmt: skip
    shape, generator = (num_images, options.side, options.side), generator_for(SEED)
    names = ("tokens", "tokens_mirrored")
    kept = {name: torch.randint(options.num_codes, shape, generator=generator) for name in names}
    labels = [index % options.num_classes for index in range(num_images)]
    finish_shard(folder, recipe, 0, kept, source_indices=range(num_images), labels=labels, broken=[])
    collect_index(folder, recipe).write(folder)
    return LatentCache.open(folder)


# Measuring ----------------------------------------------------------------------------------------------------------


def check_the_reference(options: Options) -> None:
    """Hold the two against each other, on two images, with weights that are all alive: they are one function."""
    ours, objective = MaskTransformer(options.transformer), options.maskgit.objective(options.tokens)
    generator = generator_for(SEED, 1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    plain, labels = plain_twin(ours), torch.arange(2) % options.num_classes
    tokens = torch.randint(options.num_codes, (2, options.side, options.side), generator=generator)
    torch.testing.assert_close(plain(tokens, labels), ours(tokens, labels), rtol=1e-3, atol=1e-3)
    draws = objective.draw(2, options.tokens, generator)
    losses = (
        plain_loss(plain, objective, tokens, labels, draws),
        objective.loss(ours, tokens, labels, draws).total.mean(),
    )
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(plain.table.weight.grad, ours.tok_emb.weight.grad, rtol=1e-2, atol=1e-4)


def measure(variant: Variant, options: Options) -> dict[str, Any]:
    """Take the steps of one turn in this process."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    before_mib = peak_mib(device)
    first = MaskTransformer(options.transformer, generator=generator_for(SEED))
    with tempfile.TemporaryDirectory() as folder:
        if variant == "reference":
            take_step = prepare_reference(first, options, Path(folder))
        else:
            take_step = prepare_ours(first, options, Path(folder), "bf16" if variant == "ours" else "fp32")
        steps = []
        for _ in range(options.num_steps + 1):
            synchronize(device)
            began_sec, began_cpu_sec = time.perf_counter(), time.process_time()
            take_step()
            synchronize(device)
            steps.append({"sec": time.perf_counter() - began_sec, "cpu_sec": time.process_time() - began_cpu_sec})
    return {"steps": steps[1:], "peak_mib": peak_mib(device), "before_mib": before_mib}


def summarize(turns: list[dict[str, Any]], options: Options) -> dict[str, Any]:
    """Medians over all steps of all turns."""
    steps = [step for turn in turns for step in turn["steps"]]
    step_sec = statistics.median(step["sec"] for step in steps)
    return {
        "step_sec": step_sec,
        "step_cpu_sec": statistics.median(step["cpu_sec"] for step in steps),
        "images_per_sec": options.batch_size / step_sec,
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "before_mib": max(turn["before_mib"] for turn in turns),
        "turns": turns,
    }


def main(options: Options) -> None:
    """Run the benchmark.

    Args:
        options: As given to the command.
    """
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options)))
        return
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    check_the_reference(options)
    description = describe_machine(
        __file__, options, device=device, packages=("numpy", "safetensors"), leave_out=("json", "measure")
    )
    machine = description["machine"]
    print(
        f"{machine['cpu']}, {machine['num_threads']} threads, {machine['device']}, load {machine['load_average']:.1f}"
    )
    names: tuple[Variant, ...] = ("reference", "ours in fp32", "ours") if options.ablation else ("reference", "ours")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.repeats):
        for name in names:
            turns[name].append(measure_apart(__file__, name, options, PASSED_ON))
            row = summarize(turns[name][-1:], options)
            print(
                f"{turn + 1}/{options.repeats} {name}: {row['step_sec']:.3f} s, {row['step_cpu_sec']:.3f} s of "
                f"processors, {row['peak_mib']:.0f} MiB",
                flush=True,
            )
    variants = {name: summarize(rows, options) for name, rows in turns.items()}
    ours, reference = variants["ours"], variants["reference"]
    flops, peak = 3 * transformer_flops(options.transformer), matrix_peak_flops_per_sec(device, "bf16")
    summary = {
        "times_faster": reference["step_sec"] / ours["step_sec"],
        "times_less_cpu": reference["step_cpu_sec"] / ours["step_cpu_sec"],
        "times_peak_memory": ours["peak_mib"] / reference["peak_mib"],
        "flops_per_image": flops,
        "matrix_peak_flops_per_sec": peak,
        "share_of_peak": ours["images_per_sec"] * flops / peak,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(description | summary | {"variants": variants}, indent=2) + "\n")
    print(f"\n{'':14}{'s/step':>8}{'s of CPU':>10}{'times less':>12}{'peak MiB':>10}")
    for name, row in variants.items():
        times = reference["step_cpu_sec"] / row["step_cpu_sec"]
        print(f"{name:14}{row['step_sec']:8.2f}{row['step_cpu_sec']:10.2f}{times:12.2f}{row['peak_mib']:10.0f}")
    print(
        f"ours: {ours['images_per_sec']:.2f} images/s, {summary['share_of_peak']:.0%} of the matrix peak\n"
        f"ours / reference: {summary['times_faster']:.2f} times faster by the clock, "
        f"{summary['times_less_cpu']:.2f} times by processor time, {summary['times_peak_memory']:.2f} times the memory"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
