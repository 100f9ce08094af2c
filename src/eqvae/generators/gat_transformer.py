"""GAT's two networks: from a style and a class to latents in one pass, and from latents at four levels to one logit.

Hyun et al., arXiv:2509.24935 ("Scalable GANs with Transformers"). The generator's tokens begin as positions alone;
style and class, mixed by two layers, scale and gate every block. Four output layers, at each quarter of the depth, add
up: the last sum is the sample, the others are what the discriminator sees besides. The discriminator reads the four
levels as channels, and its class token answers by a product with the class's embedding.

Parameters have the names of the authors' code. Three things differ. A patch embedding whose output is multiplied by
zero is left out. The mean style of a class is computed from the weights, not kept over training, so that it depends on
no order of batches. And guidance normalizes each embedding, as training does: theirs normalizes over the classes.
Unconditional latents are a single class.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eqvae.errors import UserError
from eqvae.generators.gat_layers import (
    ClassTable,
    ModulatedBlock,
    ModulatedOutput,
    Norm,
    ScaledBlock,
    at_least_fp32,
    initialize,
    rotation_of,
    slow_layers,
    unit,
)
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import PatchEmbedder, position_embedding
from eqvae.runtime.seeds import generator_for

NUM_LEVELS: Final = 4
"""Outputs of the generator, from coarse to the sample."""

STYLE_SIZE: Final = 64
"""Numbers of an image's noise."""

_NUM_CENTER_STYLES = 1024


@dataclass(frozen=True)
class GatSize:
    """A size of both networks."""

    depth: int
    hidden_size: int
    num_heads: int
    class_size: int
    """Width of the discriminator's class embedding."""
    num_parameters: int
    """Of the generator, with patch size 2 and `PUBLISHED_LATENTS`."""
    num_discriminator_parameters: int
    """Under the same conditions, without the alignment with a teacher."""


# fmt: off
GAT_SIZES = {
    #             depth  width  heads  classes  generator     discriminator
    "ti": GatSize(4,     192,   3,     192,     2_706_368,    2_146_176),
    "s":  GatSize(12,    384,   6,     2048,    29_354_816,   32_654_464),
    "b":  GatSize(12,    768,   12,    2048,    116_741_696,  97_331_968),
    "l":  GatSize(24,    1024,  16,    2048,    408_731_168,  315_166_688),
    "xl": GatSize(28,    1152,  16,    2048,    602_231_552,  459_547_456),
}
# fmt: on
"""`s` to `xl` are the authors'; `ti` is ours, for CPUs."""


@dataclass(frozen=True, kw_only=True)
class GatNetworkConfig:
    """All that determines the parameters' names and shapes of both networks."""

    latents: LatentSpecification

    depth: int
    """Blocks; a multiple of the four levels."""

    hidden_size: int
    """Width of a token."""

    num_heads: int

    patch_size: int
    """Cells on the side of a token's patch."""

    class_size: int
    """Width of the discriminator's class embedding."""

    def __post_init__(self) -> None:
        if self.latents.height % self.patch_size or self.latents.width % self.patch_size:
            raise UserError(
                f"latents of {self.latents.height} x {self.latents.width} cells are no whole number of patches of "
                f"{self.patch_size}",
                "Choose a smaller patch size",
            )
        if self.depth % NUM_LEVELS or self.hidden_size % (4 * self.num_heads):
            raise UserError(
                f"depth {self.depth} and hidden_size {self.hidden_size} must be divisible by {NUM_LEVELS} and by "
                f"{4 * self.num_heads}",
                "Choose others",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latents.height // self.patch_size, self.latents.width // self.patch_size

    @property
    def num_classes(self) -> int:
        """Of the networks: no classes are one."""
        return max(self.latents.num_classes, 1)

    def build(self, *, generator: torch.Generator | None = None) -> "GatGenerator":
        """Build the generator with first weights."""
        return GatGenerator(self, generator=generator)

    def build_discriminator(self, *, generator: torch.Generator | None = None) -> "GatDiscriminator":
        """Build the discriminator with first weights."""
        return GatDiscriminator(self, generator=generator)

    def example(self) -> tuple[Tensor, ...]:
        """Make the generator's arguments for one image, as for counting operations."""
        return torch.zeros(1, STYLE_SIZE), torch.zeros(1, dtype=torch.int64)

    def discriminator_example(self) -> tuple[Tensor, ...]:
        """Make the discriminator's arguments for one image."""
        return torch.zeros(NUM_LEVELS, 1, *self.latents.shape), torch.zeros(1, dtype=torch.int64)


class GatGenerator(nn.Module):
    """Noise and labels to latents, at four levels; the last is the sample.

    With `gradient_checkpointing` blocks are computed again in the backward pass, which saves their activations.
    """

    def __init__(self, config: GatNetworkConfig, *, generator: torch.Generator | None = None) -> None:
        """Build it with first weights."""
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width, num_values = config.hidden_size, config.patch_size**2 * config.latents.channels
        self.y_embedder = ClassTable(config.num_classes, STYLE_SIZE)
        self.latent_embedder = slow_layers(2 * STYLE_SIZE, width)
        # A parameter, though frozen, as in the authors' code, which counts it.
        self.pos_embed = nn.Parameter(position_embedding(*config.grid, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(ModulatedBlock(width, config.num_heads) for _ in range(config.depth))
        self.final_layers = nn.ModuleList(ModulatedOutput(width, num_values) for _ in range(NUM_LEVELS))
        initialize(self, generator)

    def forward(
        self,
        noise: Float[Tensor, "n style"],
        labels: Int64[Tensor, " n"],
        truncation: float = 0.0,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "levels n c h w"]:
        style = self.styles(noise, labels, truncation, guidance_scale)
        rotation = rotation_of(*self.config.grid, self.config.hidden_size // self.config.num_heads, style.device)
        tokens, latents, levels = self.pos_embed.expand(len(noise), -1, -1), torch.zeros(()), []
        every = self.config.depth // NUM_LEVELS
        for number, block in enumerate(self.blocks, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, style, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, style, rotation)
            if number % every == 0:
                output = self._unpatchify(at_least_fp32(self.final_layers[number // every - 1](tokens, style)))
                latents = output + latents.to(output)
                levels.append(latents)
        return torch.stack(levels)

    def styles(
        self,
        noise: Float[Tensor, "n style"],
        labels: Int64[Tensor, " n"],
        truncation: float = 0.0,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "n width"]:
        """Mix noise and classes to what modulates the blocks.

        With `truncation` a style moves by that share towards the mean of its class. With a guidance scale s the mean m
        of the same noise's styles over all classes gives `m + s (style - m)`.
        """
        style = self._mix(noise, labels)
        if truncation != 0.0:
            centers = {label: self.center(label) for label in set(labels.tolist())}
            style = style.lerp(torch.stack([centers[label] for label in labels.tolist()]).to(style), truncation)
        if guidance_scale != 1.0:
            classes = torch.arange(self.config.num_classes, device=noise.device)
            mean = torch.stack([self._mix(noise, each.expand(len(noise))) for each in classes]).mean(0)
            style = mean + guidance_scale * (style - mean)
        return style

    @torch.no_grad()
    def center(self, label: int) -> Float[Tensor, " width"]:
        """Average a class's styles over noise that is always the same."""
        noise = torch.randn(_NUM_CENTER_STYLES, STYLE_SIZE, generator=generator_for(0)).to(self.pos_embed.device)
        return self._mix(noise, torch.full((len(noise),), label, device=noise.device)).float().mean(0)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _mix(self, noise: Float[Tensor, "n style"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "n width"]:
        return self.latent_embedder(torch.cat([unit(self.y_embedder(labels)), unit(noise)], dim=1))

    def _unpatchify(self, tokens: Float[Tensor, "n tokens values"]) -> Float[Tensor, "n c h w"]:
        """Lay patches of (row, column, channel) side by side."""
        (rows, columns), side = self.config.grid, self.config.patch_size
        patches = tokens.reshape(len(tokens), rows, columns, side, side, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * side, columns * side)


class GatDiscriminator(nn.Module):
    """Latents at four levels and labels to a logit, large for true ones."""

    def __init__(self, config: GatNetworkConfig, *, generator: torch.Generator | None = None) -> None:
        """Build it with first weights."""
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width, class_size = config.hidden_size, config.class_size
        self.x_embedder = PatchEmbedder(NUM_LEVELS * config.latents.channels, width, config.patch_size)
        self.y_embedder = ClassTable(config.num_classes, class_size)
        self.y_embedder.latent_embedder = slow_layers(class_size, class_size)
        self.pos_embed = nn.Parameter(position_embedding(*config.grid, width)[None], requires_grad=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(ScaledBlock(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = nn.Sequential(Norm(width, eps=1e-6), nn.Linear(width, class_size))
        initialize(self, generator)
        with torch.no_grad():
            nn.init.normal_(self.cls_token, std=0.02, generator=generator)

    def forward(self, levels: Float[Tensor, "levels n c h w"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        tokens = self.x_embedder(levels.transpose(0, 1).flatten(1, 2)) + self.pos_embed
        rotation = rotation_of(*self.config.grid, self.config.hidden_size // self.config.num_heads, tokens.device)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens), tokens], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, rotation)
        classes = self.y_embedder.latent_embedder(self.y_embedder(labels))
        return (at_least_fp32(self.final_layer(tokens[:, 0])) * at_least_fp32(classes)).sum(1)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
