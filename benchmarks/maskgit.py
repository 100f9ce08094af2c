"""A training step of MaskGIT, against Besnier & Chen's network and objective in a plain loop.

The peer (arXiv:2310.14400) is eager fp32, attention by explicit products, logits of every token against the whole table
of codes, mask and classes, one `.npy` of tokens and one of a label for each image behind a DataLoader, cross-entropy of
the masked tokens with label smoothing, AdamW as PyTorch builds it, gradients clipped, averaged weights by a loop over
parameters (theirs keep none; ours do). Ours is `train_step` with the defaults of `eqvae train`, fed from a cache. Both
start from the same weights and hide the same tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Turn, Variant, Work
from benchmarks.plain_training import SEED, FilePerImage, PlainAttention, our_training, plain_training, random_cache
from eqvae.generators.families import find_recipe
from eqvae.generators.maskgit import MaskgitObjective
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import Precision, choose_device
from eqvae.runtime.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class MaskgitStep(Work):
    """A training step of MaskGIT on random tokens, against Besnier & Chen's in a plain loop."""

    recipe: str = "maskgit-s"
    """A MaskGIT of `eqvae train`."""

    side: int = 16
    """Tokens in a row and in a column; 256 tokens by default."""

    num_codes: int = 1024
    """Of the codebook."""

    num_classes: int = 1000

    batch_size: int = 16
    """Images per step."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "plain loop": Variant(self.plain),
            "ours, fp32": Variant(lambda folder: self.ours(folder, "fp32")),
            "ours": Variant(lambda folder: self.ours(folder, "bf16"), "bf16"),
        }

    @property
    def tokens(self) -> LatentSpecification:
        """What is modelled."""
        return LatentSpecification(
            channels=self.num_codes, height=self.side, width=self.side, num_classes=self.num_classes
        )

    @property
    def objective(self) -> MaskgitObjective:
        """The loss of both."""
        return find_recipe(self.recipe).objective(self.tokens)

    def first(self) -> MaskTransformer:
        """Build what is trained."""
        return MaskTransformer(find_recipe(self.recipe).transformer(self.tokens), generator=generator_for(SEED))

    def check(self) -> None:
        """Hold the two against each other, on two images, with weights that are all alive: they are one function."""
        ours, generator = self.first(), generator_for(SEED, 1)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        plain, labels = plain_twin(ours), torch.arange(2) % self.num_classes
        tokens = torch.randint(self.num_codes, (2, self.side, self.side), generator=generator)
        torch.testing.assert_close(plain(tokens, labels), ours(tokens, labels), rtol=1e-3, atol=1e-3)
        draws = self.objective.draw(2, self.tokens, generator)
        theirs = plain_loss(plain, self.objective, tokens, labels, draws)
        loss = self.objective.loss(ours, tokens, labels, draws).total.mean()
        torch.testing.assert_close(theirs, loss, rtol=1e-4, atol=1e-4)
        theirs.backward()
        loss.backward()
        torch.testing.assert_close(plain.table.weight.grad, ours.tok_emb.weight.grad, rtol=1e-2, atol=1e-4)

    def plain(self, folder: Path) -> Turn:
        """Write the files and set up the plain loop."""
        device, objective, model = choose_device(self.device), self.objective, plain_twin(self.first())
        model.to(device)
        shape = (max(2 * self.batch_size, 64), self.side, self.side)
        tokens = torch.randint(self.num_codes, shape, generator=generator_for(SEED))

        def loss_of(tokens: Tensor, labels: Tensor, step: int) -> Tensor:
            draws = objective.draw(len(tokens), self.tokens, generator_for(SEED, step))
            return plain_loss(model, objective, tokens, labels, {k: v.to(device) for k, v in draws.items()})

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.96), weight_decay=1e-5)
        data = FilePerImage(folder, tokens, self.num_classes)
        return plain_training(model, loss_of, data, optimizer, batch_size=self.batch_size, device=device, clip=1.0)

    def ours(self, folder: Path, precision: Precision) -> Turn:
        """Set up ours."""
        cache = random_cache(folder / "cache", self.tokens, 1024, self.num_codes)
        config = TrainConfig(
            recipe=self.recipe, latents=cache.folder, out=folder, batch_size=self.batch_size, precision=precision,
            device=str(choose_device(self.device)),
        )  # fmt: skip
        return our_training(self.first(), self.objective, self.tokens, cache, config)


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
    """Build the peer's network from the weights of ours: both list them in the same order."""
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
