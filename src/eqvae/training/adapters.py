"""LoRA (Hu et al. 2021, arXiv:2106.09685): convolutions and linear layers learn `W + B A` alone.

Scaled by 1, whatever the rank. Norms, biases, codes, transposed and grouped convolutions stay as they are. An
autoencoder's last convolution, which has three outputs, is trained whole: lambda_gan is measured there. So are a
transformer's first and last layer, and REPA's projector.
"""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eqvae.autoencoders.padding import padding_mode_of, set_padding_mode
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.alignment import ENDS
from eqvae.generators.transformer import Transformer

_MARK = "lora_"
"""Parts of adapters' names begin so; no autoencoder has such parts of its own."""

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""What peft adds to the names of an adapted layer's weights, and its adapters' own."""

_CODING = ("encode", "decode", "decode_quantized")
"""What `--compile` puts into an autoencoder, bound to its weights."""


def add_adapters(autoencoder: Autoencoder, rank: int, *, seed: int) -> None:
    """Put adapters of a rank into an autoencoder, in place; before the first step they add nothing."""
    last = autoencoder.last_layer
    adapted = [name for name, module in autoencoder.named_modules() if _takes_adapters(module) and module is not last]
    if not adapted:
        raise UserError(f"'{autoencoder.name}' has no convolution or linear layer to adapt", "Leave out --lora-rank")
    mode = padding_mode_of(autoencoder)
    _inject(autoencoder, adapted, rank, seed=seed)
    if mode != "zeros":  # as peft's own convolutions pad
        set_padding_mode(autoencoder, mode)


def add_block_adapters(transformer: Transformer, rank: int, *, seed: int) -> None:
    """Put adapters of a rank into a transformer's blocks, in place; its ends are trained whole."""
    blocks = transformer.blocks.named_modules(prefix="blocks")
    _inject(transformer, [name for name, module in blocks if isinstance(module, nn.Linear)], rank, seed=seed)
    for name, parameter in transformer.named_parameters():
        if name.startswith((*ENDS, "projectors.")):
            parameter.requires_grad_(True)


def merged_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add adapters' products to the weights that they adapt, under the names without adapters."""
    found = {name.replace(_BASE, "."): value for name, value in weights.items() if not _is_adapters(name)}
    for name in weights:
        if name.endswith(_DOWN):
            layer = name.removesuffix(_DOWN)
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + weights[layer + _UP] @ weights[name]
    return found


def check_peft() -> None:
    """Refuse adapters where the package that makes them is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs peft", "Run: pip install 'eqvae[lora]'")


def _inject(network: nn.Module, names: Sequence[str], rank: int, *, seed: int) -> None:
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=list(names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network)


def _takes_adapters(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def has_adapters(autoencoder: Autoencoder) -> bool:
    """Whether adapters are trained in place of weights."""
    return bool(_layers(autoencoder))


def trained_parameters(autoencoder: Autoencoder) -> list[nn.Parameter]:
    """What is trained: adapters and the last layer where there are adapters, else everything."""
    if not has_adapters(autoencoder):
        return list(autoencoder.parameters())
    adapters = [parameter for name, parameter in autoencoder.named_parameters() if _is_adapters(name)]
    return [*adapters, *autoencoder.last_layer.parameters()]


def _is_adapters(name: str) -> bool:
    return any(part.startswith(_MARK) for part in name.split("."))


def merged(autoencoder: Autoencoder) -> Autoencoder:
    """Copy an autoencoder with its adapters' products added to the weights that they adapt: the base's own layers."""
    found = copy.deepcopy(autoencoder)
    for name in (*_CODING, "peft_config"):
        found.__dict__.pop(name, None)
    for name, layer in _layers(found).items():
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(found.get_submodule(parent), own, layer.get_base_layer())
    return found.requires_grad_(False)


def _layers(autoencoder: Autoencoder) -> dict[str, Any]:
    """Adapted layers by name."""
    named = autoencoder.named_modules()
    return {name: module for name, module in named if hasattr(module, "lora_A") and hasattr(module, "get_base_layer")}
