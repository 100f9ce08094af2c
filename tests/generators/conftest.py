"""Small transformers whose weights are all alive: DiT's first weights leave most of the network out."""

from collections.abc import Callable

import pytest
import torch

from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer, TransformerConfig

BuildTransformer = Callable[..., Transformer]


def small_config(**changes) -> TransformerConfig:
    """Three blocks of width 24 on latents of 4 x 6 cells in patches of 2."""
    fields = {
        "latents": LatentSpecification(channels=3, height=4, width=6, num_classes=5),
        "depth": 3, "hidden_size": 24, "num_heads": 3, "patch_size": 2, "out_channels": 6,
    }  # fmt: skip
    return TransformerConfig(**fields | changes)


@pytest.fixture
def build_transformer() -> BuildTransformer:
    """Builds a small transformer with random weights everywhere."""

    def build(**changes) -> Transformer:
        transformer = Transformer(small_config(**changes), generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.2, generator=generator)
        return transformer

    return build
