"""Drawing latents with guidance, against the loop of the public sampling scripts.

The peer takes Euler steps in eager fp32 with attention by explicit products, and computes both branches of
classifier-free guidance at every step. Ours is `euler` and `classifier_free_guidance` as `eqvae sample` calls them, by
default guided at all steps too, so that results agree; `--guidance-high` guides below a time only, as REPA does, where
ours asks for no more than it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.generator import GeneratorStep, PlainTransformer
from benchmarks.harness import Turn, Variant
from benchmarks.plain_training import SEED
from eqvae.generators.families import find_recipe
from eqvae.generators.recipes import PUBLISHED_LATENTS
from eqvae.generators.transformer import Transformer
from eqvae.runtime.device import Precision, autocast, choose_device
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.guidance import classifier_free_guidance
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.ode import euler


@dataclass(frozen=True, kw_only=True)
class Sample(GeneratorStep):
    """Drawing latents with guidance, against the loop of the public sampling scripts."""

    unit = "image"

    recipe: str = "sit-s-2"
    """A SiT of `eqvae train`."""

    batch_size: int = 4
    """Images of a turn."""

    num_steps: int = 4
    """Of Euler; what a step costs does not depend on their number."""

    guidance_scale: float = 1.5

    guidance_high: float = 1.0
    """Guide below this share of the noise's time only; the peer guides at all."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "public loop": Variant(lambda _: self.prepare(self.draw_plainly())),
            "ours, fp32": Variant(lambda _: self.prepare(self.draw_ours("fp32"))),
            "ours": Variant(lambda _: self.prepare(self.draw_ours("bf16")), "bf16"),
        }

    @torch.no_grad()
    def trained(self) -> Transformer:
        """Build a transformer none of whose parts is silent, as they are at its start."""
        transformer, generator = self.first(), generator_for(SEED, 1)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return transformer.eval().to(choose_device(self.device))

    def check(self) -> None:
        """Draw the same latents."""
        if self.guidance_high == 1.0:
            torch.testing.assert_close(self.draw_ours("fp32")(), self.draw_plainly()(), rtol=1e-3, atol=1e-3)

    def prepare(self, draw: Callable[[], Tensor]) -> Turn:
        """Draw the latents of a batch."""

        def take_turn() -> dict[str, Any]:
            return {"units": len(draw())}

        return take_turn

    def noise(self) -> tuple[ImageNoise, Tensor]:
        """Make the noise and the labels of both."""
        device = choose_device(self.device)
        noise = ImageNoise(SEED, range(self.batch_size), PUBLISHED_LATENTS.shape, device=device)
        return noise, torch.arange(self.batch_size, device=device) % PUBLISHED_LATENTS.num_classes

    def draw_plainly(self) -> Callable[[], Tensor]:
        """Write the public loop."""
        trained = self.trained()
        model = PlainTransformer(trained.config).to(choose_device(self.device))
        model.load_state_dict(trained.state_dict())

        @torch.no_grad()
        def draw() -> Tensor:
            noise, labels = self.noise()
            z = noise.next()
            both = torch.cat([labels, torch.full_like(labels, PUBLISHED_LATENTS.num_classes)])
            for t in torch.linspace(0, 1, self.num_steps + 1)[:-1]:
                predicted = model(torch.cat([z, z]), t.expand(len(both)).to(z.device), both)[:, : z.shape[1]]
                conditional, unconditional = predicted.chunk(2)
                z = z + (unconditional + self.guidance_scale * (conditional - unconditional)) / self.num_steps
            return z

        return draw

    def draw_ours(self, precision: Precision) -> Callable[[], Tensor]:
        """Compose guidance and sampler."""
        device, transformer = choose_device(self.device), self.trained()
        interpolant = find_recipe(self.recipe).interpolant

        def predict(*inputs: Tensor) -> Tensor:
            with autocast(device, precision):
                return transformer(*inputs)

        interval = None if self.guidance_high == 1.0 else (1.0 - self.guidance_high, 1.0)
        guided = classifier_free_guidance(
            predict, self.guidance_scale, PUBLISHED_LATENTS.num_classes, interval=interval
        )

        def draw() -> Tensor:
            noise, labels = self.noise()
            return euler(guided, noise, labels, interpolant, num_steps=self.num_steps)

        return draw
