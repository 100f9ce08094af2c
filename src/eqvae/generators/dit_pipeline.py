"""A DiT as a folder of diffusers' `DiTPipeline`: transformer, scheduler and autoencoder, and the way back.

diffusers keeps the embeddings of time and label once in each block, computes positions itself, and takes label 1000
for "no class" whatever the classes are. It spaces the 128 frequencies of times by 1/127 where DiT's code has 1/128: in
both directions weights are DiT's, and `with_published_times` lets diffusers' network compute what they were trained
for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts.files import read_json, replace_folder, write_json, write_tensors
from eqvae.artifacts.names import AUTOENCODER_WEIGHTS, CONFIG, PIPELINE_INDEX
from eqvae.artifacts.weights import plain_names, read_named
from eqvae.autoencoders.factors import Normalization, fold
from eqvae.autoencoders.padding import padding_mode_of, set_padding_mode
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.autoencoders.weight_files import choose_weight_file
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator
from eqvae.generators.recipes import SIZES
from eqvae.generators.transformer import TransformerConfig, position_embedding
from eqvae.runtime.journal import installed_version

_PIPELINE, _TRANSFORMER = "DiTPipeline", "DiTTransformer2DModel"
_SCHEDULER_CONFIG = "scheduler_config.json"
_NULL_LABEL = 1000
"""What the pipeline's code gives to the unconditional half."""

_SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon",
}  # fmt: skip
"""The diffusion that DiT was trained for."""

_NETWORK = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero", "dropout": 0.0,
    "norm_elementwise_affine": False,
}  # fmt: skip
"""Fields of the transformer's config that DiT has no choice of."""

_SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV, _HEADS = "attn.qkv", tuple(f"attn1.to_{part}" for part in "qkv")
_TABLE = "y_embedder.embedding_table.weight"
_POSITION_ERROR, _MAX_ROWS = 1e-5, 1024


@dataclass(frozen=True, kw_only=True)
class PipelineTransformer:
    """What a pipeline's folder holds of a generator."""

    weights: dict[str, Tensor]
    """Under DiT's names."""

    recipe: str

    class_names: tuple[str, ...] | None

    names: tuple[str, ...]
    """That the weights have there."""


def is_pipeline(path: Path) -> bool:
    """Tell a pipeline's folder."""
    return (path / PIPELINE_INDEX).is_file()


def write_pipeline(generator: Generator, autoencoder: Autoencoder, destination: Path, *, source: str) -> list[str]:
    """Write a pipeline's folder; the autoencoder takes in a normalization of latents that is no single factor.

    Gives the names of the transformer's weights there.
    """
    card, config = generator.card, generator.card.transformer
    if card.family != "dit" or not isinstance(config, TransformerConfig):
        raise UserError(f"'{source}' is a {card.recipe}, and {_PIPELINE} runs a DiT's diffusion", "Use --to official")
    state = generator.transformer.state_dict()
    _check_expressible(config, state, source)
    normalization = Normalization(card.shift, card.scale)
    if normalization.is_scalar:
        factor: dict[str, Any] = {"scaling_factor": 1 / card.scale[0], "shift_factor": 0.0}
        factor |= dict.fromkeys(("latents_mean", "latents_std"))
        model: Any = autoencoder.model
        model.register_to_config(**{name: value for name, value in factor.items() if name in model.config})
    else:
        autoencoder = fold(autoencoder, normalization)
    decoder = type(autoencoder.model)
    own = decoder.__module__ if decoder.__module__.startswith("eqvae.") else "diffusers"
    version = installed_version("diffusers")
    num_classes = config.latents.num_classes
    names = card.class_names or [str(label) for label in range(num_classes)]
    weights = _to_diffusers(state, config)

    def fill(folder: Path) -> None:
        for part in ("transformer", "scheduler", "vae"):
            (folder / part).mkdir()
        said = {"_class_name": _TRANSFORMER, "_diffusers_version": version} | _transformer_config(config)
        write_json(folder / "transformer" / CONFIG, said)
        write_tensors(folder / "transformer" / AUTOENCODER_WEIGHTS, weights, {"format": "pt"})
        scheduler = _SCHEDULER | {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
        said = {"_class_name": "DDIMScheduler", "_diffusers_version": version} | scheduler
        write_json(folder / "scheduler" / _SCHEDULER_CONFIG, said)
        autoencoder.save(folder / "vae")
        index = {
            "_class_name": _PIPELINE,
            "_diffusers_version": version,
            "id2label": {str(label): name for label, name in enumerate(names)},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", _TRANSFORMER],
            "vae": [own, decoder.__name__],
        }
        write_json(folder / PIPELINE_INDEX, index)

    replace_folder(destination, fill)
    return list(weights)


def read_pipeline(folder: Path) -> PipelineTransformer:
    """Read the transformer of a pipeline's folder."""
    index = read_json(folder / PIPELINE_INDEX)
    if index.get("_class_name") != _PIPELINE:
        raise UserError(f"'{folder}' holds a {index.get('_class_name')}", f"Give a {_PIPELINE}")
    config = read_json(folder / "transformer" / CONFIG)
    _check_fields(folder / "transformer" / CONFIG, config, _NETWORK)
    scheduler = folder / "scheduler" / _SCHEDULER_CONFIG
    _check_fields(scheduler, read_json(scheduler), _SCHEDULER)
    try:
        depth, num_heads = config["num_layers"], config["num_attention_heads"]
        width, side, patch_size = num_heads * config["attention_head_dim"], config["sample_size"], config["patch_size"]
        rows = side // patch_size
        if not (isinstance(rows, int) and 0 < rows <= _MAX_ROWS):
            raise ValueError(f"sample_size is {side}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"'{folder / 'transformer' / CONFIG}' describes no DiT ({error})", "Fetch it again") from None
    asked = (depth, width, num_heads)
    fits = [name for name, each in SIZES.items() if (each.depth, each.hidden_size, each.num_heads) == asked]
    if not fits:
        raise UserError(f"'{folder}' is of {depth} blocks of width {width}, which no recipe has", "Give another DiT")
    names = [path.name for path in (folder / "transformer").iterdir() if path.is_file()]
    file = choose_weight_file(names, None)
    if file is None:
        raise UserError(f"'{folder / 'transformer'}' holds no weights", "Fetch or write it again")
    named = read_named(folder / "transformer" / file)
    weights = _from_diffusers(named.take(plain_names(named, ("transformer_blocks.",))), depth, str(folder))
    weights["pos_embed"] = position_embedding(rows, rows, width)[None]
    labels = _read_labels(index)
    num_classes = _trim_labels(weights, len(labels))
    known = len(labels) == num_classes and labels != tuple(map(str, range(num_classes)))
    return PipelineTransformer(
        weights=weights,
        recipe=f"dit-{fits[0]}-{patch_size}",
        class_names=labels if known and labels else None,
        names=tuple(named.getters),
    )


def with_published_times(transformer: Any) -> None:
    """Space the frequencies of times in diffusers' network as DiT's code does."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


@dataclass(frozen=True, kw_only=True)
class PipelineCheck:
    """Largest differences of a pipeline's outputs from those of the generator and decoder that it was written from."""

    predictions: float

    without_published_times: float

    images: float


@torch.no_grad()
def check_pipeline(folder: Path, generator: Generator, autoencoder: Autoencoder) -> PipelineCheck:
    """Hold a written pipeline, as diffusers loads it, against what it was written from."""
    from diffusers import DiTTransformer2DModel  # takes seconds to import

    transformer: Any = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    decoder: Any = type(autoencoder.model).from_pretrained(folder / "vae")  # type: ignore[union-attr]
    set_padding_mode(decoder, padding_mode_of(autoencoder))
    config = generator.card.transformer.latents
    z = torch.randn(2, *config.shape, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([999, 500]), torch.tensor([0, max(config.num_classes - 1, 0)])
    ours = generator.transformer(z, t, labels)

    def theirs() -> Tensor:
        return transformer(z, timestep=t, class_labels=labels).sample

    without = float((theirs() - ours).abs().max())
    with_published_times(transformer)
    raw = generator.card.denormalize(z[:1])
    images = decoder.decode(z[:1] / decoder.config.scaling_factor).sample - autoencoder.decode(raw)
    return PipelineCheck(
        predictions=float((theirs() - ours).abs().max()),
        without_published_times=without,
        images=float(images.abs().max()),
    )


def _transformer_config(config: TransformerConfig) -> dict[str, Any]:
    return _NETWORK | {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.latents.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.latents.height,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": _NULL_LABEL,
        "norm_eps": 1e-6,
    }


def _check_expressible(config: TransformerConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a network that diffusers' has no setting for."""
    positions = position_embedding(*config.grid, config.hidden_size)
    obstacles = (
        (config.qk_norm, "it normalizes queries and keys"),
        (config.mlp_ratio != 4, f"its hidden layers are {config.mlp_ratio} times as wide, not 4"),
        (config.latents.height != config.latents.width, "its latents are not square"),
        (config.latents.num_classes > _NULL_LABEL, f"it has more than {_NULL_LABEL} classes"),
        (float((state["pos_embed"][0] - positions).abs().max()) > _POSITION_ERROR, "its positions are not DiT's"),
    )
    for is_there, what in obstacles:
        if is_there:
            raise UserError(f"'{source}' can't be a {_PIPELINE}: {what}", "Use --to official")


def _check_fields(path: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse settings under which the weights would be another model's."""
    for field, value in expected.items():
        if field in config and config[field] != value:
            raise UserError(f"'{path}' has {field} {config[field]}, and DiT's is {value}", "Give a DiT's pipeline")


def _to_diffusers(state: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Rename a DiT's weights, and repeat in each block what diffusers has there."""
    shared = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in _SHARED}
    shared[_TABLE] = _pad_labels(state.get(_TABLE), config)
    written = {f"{_OUTER[stem]}.{kind}": state[f"{stem}.{kind}"] for stem in _OUTER for kind in ("weight", "bias")}
    for index in range(config.depth):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        for name, tensor in shared.items():
            stem, _, kind = name.rpartition(".")
            # Each is a tensor of its own: safetensors refuses two names for one storage.
            written[f"{theirs}.norm1.emb.{_SHARED[stem]}.{kind}"] = tensor.clone()
        for kind in ("weight", "bias"):
            written |= {f"{theirs}.{_IN_BLOCK[stem]}.{kind}": state[f"{ours}.{stem}.{kind}"] for stem in _IN_BLOCK}
            parts = state[f"{ours}.{_QKV}.{kind}"].chunk(3)
            written |= {f"{theirs}.{head}.{kind}": part.clone() for head, part in zip(_HEADS, parts, strict=True)}
    return written


def _from_diffusers(state: Mapping[str, Tensor], depth: int, source: str) -> dict[str, Tensor]:
    """Give the weights of diffusers' network DiT's names; what blocks repeat must be the same in all."""
    outer = {f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in _OUTER.items() for kind in ("weight", "bias")}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)$", name)
        if block is None:
            found[outer.get(name, name)] = tensor
            continue
        index, stem, kind = block.groups()
        if stem.startswith("norm1.emb."):
            ours = next((o for o, theirs in _SHARED.items() if stem == f"norm1.emb.{theirs}"), stem)
            if not torch.equal(found.setdefault(f"{ours}.{kind}", tensor), tensor):
                raise UserError(f"'{source}' has another {ours} in block {index} than before", "Give a DiT's pipeline")
        elif stem not in _HEADS:
            ours = next((o for o, theirs in _IN_BLOCK.items() if stem == theirs), stem)
            found[f"blocks.{index}.{ours}.{kind}"] = tensor
    for index in range(depth):
        for kind in ("weight", "bias"):
            parts = [state.get(f"transformer_blocks.{index}.{head}.{kind}") for head in _HEADS]
            there = [part for part in parts if part is not None and part.ndim > 0]
            if len(there) == len(_HEADS) and len({part.shape for part in there}) == 1:  # else it is told as missing
                found[f"blocks.{index}.{_QKV}.{kind}"] = torch.cat(there)
    return found


def _pad_labels(table: Tensor | None, config: TransformerConfig) -> Tensor:
    """Let "no class" be row 1000, and every row that is no class: the pipeline knows no other number for it."""
    if table is None:
        return torch.zeros(_NULL_LABEL + 1, config.hidden_size)
    num_classes = config.latents.num_classes
    null = table[num_classes] if config.null_label else torch.zeros_like(table[0])
    return torch.cat([table[:num_classes], null.expand(_NULL_LABEL + 1 - num_classes, -1)])


def _trim_labels(weights: dict[str, Tensor], num_named: int) -> int:
    """Take off the rows that `_pad_labels` added; says how many classes there are."""
    table = weights.get(_TABLE)
    if table is None or table.ndim != 2:  # strict loading tells
        return 0
    num_classes = len(table) - 1
    if num_named < num_classes == _NULL_LABEL and bool((table[num_named:] == table[-1]).all()):
        num_classes = num_named
        weights[_TABLE] = table[: num_classes + 1].clone()
    if num_classes == 0 and not weights[_TABLE].any():
        del weights[_TABLE]
    return num_classes


def _read_labels(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the names of classes in the order of their numbers."""
    names = index.get("id2label")
    if not isinstance(names, dict) or not all(key.isdecimal() for key in names):
        return ()
    ordered = sorted(names.items(), key=lambda item: int(item[0]))
    return tuple(str(name) for _, name in ordered)
