"""A training step of a DiT or SiT, against the loop of the public training scripts.

The peer is written out from the description of those scripts: eager fp32, attention by explicit products, one `.npy` of
a latent and one of a label for each image behind a DataLoader, AdamW as PyTorch builds it, averaged weights by a loop
over parameters. Ours is `train_step` with the defaults of `eqvae train`, fed from a cache. Both start from the same
weights and have the same objective (ours: it takes no time beside the transformer).
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Turn, Variant, Work
from benchmarks.plain_training import SEED, FilePerImage, PlainAttention, our_training, plain_training, random_cache
from eqvae.generators.families import find_recipe
from eqvae.generators.recipes import PUBLISHED_LATENTS
from eqvae.generators.transformer import Transformer, TransformerConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import Precision, choose_device
from eqvae.runtime.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class GeneratorStep(Work):
    """A training step of a DiT or SiT on latents of 32 x 32 x 4, against the loop of the public training scripts."""

    recipe: str = "dit-s-2"
    """A DiT or SiT of `eqvae train`."""

    batch_size: int = 16
    """Latents per step."""

    compile: bool = False
    """Compile our transformer."""

    gradient_checkpointing: bool = False
    """Let ours compute activations again."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "public loop": Variant(self.plain),
            "ours, fp32": Variant(lambda folder: self.ours(folder, "fp32")),
            "ours": Variant(lambda folder: self.ours(folder, "bf16"), "bf16"),
        }

    def first(self) -> Transformer:
        """Build what is trained."""
        recipe = find_recipe(self.recipe)
        if recipe.family not in ("dit", "sit"):
            raise SystemExit(f"'{recipe}' is no DiT or SiT, which the public loop trains")
        return Transformer(recipe.transformer(PUBLISHED_LATENTS), generator=generator_for(SEED))

    @torch.no_grad()
    def check(self) -> None:
        """Hold the two transformers against each other: they are one function."""
        generator, alive = generator_for(SEED, 1), self.first()
        for parameter in alive.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        plain = PlainTransformer(alive.config)
        plain.load_state_dict(alive.state_dict())
        z = torch.randn(1, *PUBLISHED_LATENTS.shape, generator=generator)
        inputs = z, torch.tensor([321]), torch.tensor([7])
        torch.testing.assert_close(plain(*inputs), alive(*inputs), rtol=1e-3, atol=1e-3)

    def plain(self, folder: Path) -> Turn:
        """Write the files and set up the public loop."""
        device, objective, first = (
            choose_device(self.device),
            find_recipe(self.recipe).objective(PUBLISHED_LATENTS),
            self.first(),
        )
        latents = torch.randn(max(2 * self.batch_size, 64), *PUBLISHED_LATENTS.shape, generator=generator_for(SEED))
        model = PlainTransformer(first.config).to(device)
        model.load_state_dict(first.state_dict())

        def loss_of(latents: Tensor, labels: Tensor, step: int) -> Tensor:
            draws = objective.draw(len(latents), PUBLISHED_LATENTS, generator_for(SEED, step))
            return objective.loss(model, latents, labels, {k: v.to(device) for k, v in draws.items()}).total.mean()

        data = FilePerImage(folder, latents, PUBLISHED_LATENTS.num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        return plain_training(model, loss_of, data, optimizer, batch_size=self.batch_size, device=device)

    def ours(self, folder: Path, precision: Precision) -> Turn:
        """Set up ours."""
        cache = random_cache(folder / "cache", PUBLISHED_LATENTS, 1024)
        config = TrainConfig(
            recipe=self.recipe, latents=cache.folder, out=folder, batch_size=self.batch_size, precision=precision,
            gradient_checkpointing=self.gradient_checkpointing, compile=self.compile,
            device=str(choose_device(self.device)),
        )  # fmt: skip
        objective = find_recipe(self.recipe).objective(PUBLISHED_LATENTS)
        return our_training(deepcopy(self.first()), objective, PUBLISHED_LATENTS, cache, config)


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
