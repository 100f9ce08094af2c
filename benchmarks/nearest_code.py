"""Finding the nearest code of each token, against diffusers' `VQModel`.

`cdist` is what diffusers does, for all images at once. The plain broadcasted distance, all differences squared and
added, would need 256 GiB twice for 64 images, so it takes one image at a time, two of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Turn, Variant, Work
from eqvae.autoencoders.quantization import nearest_codes
from eqvae.runtime.device import choose_device
from eqvae.runtime.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class NearestCode(Work):
    """Finding the nearest code of each token, against diffusers' `VQModel`."""

    unit = "image"

    num_images: int = 64
    """Searched at once."""

    num_tokens: int = 256
    """Of an image."""

    num_codes: int = 16384

    width: int = 256
    """Numbers in a code."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        searches = {"cdist": cdist, "ours": nearest_codes}
        return {
            name: Variant(lambda _, search=search: self.prepare(search, self.num_images))
            for name, search in searches.items()
        } | {"broadcasted": Variant(lambda _: self.prepare(self.broadcasted, 2))}

    def draw(self, num_images: int) -> tuple[Tensor, Tensor]:
        """Draw tokens and codes."""
        device = choose_device(self.device)
        codebook = torch.randn(self.num_codes, self.width, generator=generator_for(0))
        vectors = torch.randn(self.num_images * self.num_tokens, self.width, generator=generator_for(1))
        return vectors[: num_images * self.num_tokens].to(device), codebook.to(device)

    @torch.inference_mode()
    def check(self) -> None:
        """Find the same codes, but where rounding decides."""
        vectors, codebook = self.draw(2)
        same = (cdist(vectors, codebook) == nearest_codes(vectors, codebook)).double().mean()
        if same < 0.999:
            raise SystemExit(f"only {same:.2%} of the tokens are those of cdist")

    def prepare(self, search: Callable[[Tensor, Tensor], Tensor], num_images: int) -> Turn:
        """Search with one of them."""
        vectors, codebook = self.draw(num_images)

        @torch.inference_mode()
        def take_turn() -> dict[str, Any]:
            search(vectors, codebook)
            return {"units": num_images}

        return take_turn

    def broadcasted(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Search one image at a time by all differences."""
        images = vectors.split(self.num_tokens)
        return torch.cat([((image[:, None] - codebook) ** 2).sum(2).argmin(1) for image in images])


def cdist(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Search as diffusers does."""
    return torch.cdist(vectors, codebook).argmin(1)
