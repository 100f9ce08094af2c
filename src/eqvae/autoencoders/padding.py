"""How convolutions pad a picture: with zeros, as published autoencoders were trained, or with its reflection.

Zeros tell a network where the border is, and a scaled or rotated latent has its border elsewhere than the latents that
the decoder knows. A reflection goes on as the picture does. Weights and their names are the same either way.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqvae.errors import UserError, nearest_name

PaddingMode = Literal["zeros", "reflect"]

_LEAST_CELLS = 2
"""On each side of a latent: a reflection leaves out the border itself."""


def set_padding_mode(model: nn.Module, mode: str) -> None:
    """Let all convolutions of a model pad so, in place; a diffusers model keeps it in its `config.json`.

    Transposed convolutions pad with zeros only and stay as they are.

    Args:
        model: An autoencoder of ours, of diffusers, or any other module.
        mode: `zeros` or `reflect`. A reflection needs two cells or more on each side of a latent.

    Raises:
        UserError: If there is no such mode.
    """
    if mode not in get_args(PaddingMode):
        raise UserError(f"There is no padding mode '{mode}'", nearest_name(str(mode), get_args(PaddingMode)))
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "reflect" if mode == "reflect" else "zeros"
        elif _pads_by_itself(module):
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _reflect_below_and_right]:
                del hooks[key]
            if mode == "reflect":
                module.register_forward_pre_hook(_reflect_below_and_right)
        if hasattr(module, "register_to_config") and (mode != "zeros" or "padding_mode" in module.config):
            module.register_to_config(padding_mode=mode)


def padding_mode_of(model: nn.Module) -> PaddingMode:
    """Say how a model's convolutions pad."""
    padded = (module for module in model.modules() if isinstance(module, nn.Conv2d) and module.padding != (0, 0))
    return "reflect" if any(module.padding_mode == "reflect" for module in padded) else "zeros"


def check_reflection(mode: PaddingMode, smallest_cells: int) -> None:
    """Refuse latents that are too small for their reflection."""
    if mode == "reflect" and smallest_cells < _LEAST_CELLS:
        raise UserError(
            f"latents of {smallest_cells} cell can't be padded by reflection, and scaled ones become as small",
            f"Use a larger --image-size: {_LEAST_CELLS} cells must be left",
        )


def padding_identity(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What belongs to a digest of weights besides them: another padding makes other latents."""
    mode = padding_mode_of(model)
    return [] if mode == "zeros" else [("padding_mode", torch.tensor(list(mode.encode())))]


def _pads_by_itself(module: Any) -> bool:
    """Whether it is diffusers' halving that pads a row below and a column to the right before its convolution."""
    return type(module).__name__ == "Downsample2D" and module.use_conv and module.padding == 0


def _reflect_below_and_right(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pad before the module does: its own zeros then lie beyond what its stride of 2 sees of an even side."""
    del module
    return (F.pad(inputs[0], (0, 1, 0, 1), mode="reflect"), *inputs[1:])
