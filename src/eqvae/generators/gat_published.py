"""GAT's generator as its authors' code keeps it: with the parameters that act on nothing, tables, and mean styles."""

from collections.abc import Mapping

import torch
from torch import Tensor

from eqvae.generators.gat_layers import rotation_of
from eqvae.generators.gat_transformer import GatNetworkConfig

_MEAN_STYLES = "w_avg"
_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
_IDLE = "x_embedder."


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what follows from the rest, or acts on nothing."""
    foreign = (_MEAN_STYLES, _IDLE, "feat_rope.")
    return {name: value for name, value in weights.items() if not name.startswith(foreign)}


def to_published(config: GatNetworkConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what the authors' code wants to find."""
    generator, width, side = config.build(), config.hidden_size, config.patch_size
    generator.load_state_dict(dict(weights))
    tables = rotation_of(*config.grid, width // config.num_heads, torch.device("cpu"))
    return dict(weights) | {
        f"{_IDLE}proj.weight": torch.zeros(width, config.latents.channels, side, side),
        f"{_IDLE}proj.bias": torch.zeros(width),
        **dict(zip(_TABLES, tables.unbind(0), strict=True)),
        _MEAN_STYLES: torch.stack([generator.center(label) for label in range(config.num_classes)]),
    }
