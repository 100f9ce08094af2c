"""Scaling and shift factors: which pipelines read which, and how weights take them in.

A generator models normalized latents, `(z - shift) / scale`. What its pipeline does to them before it decodes is
written into the pipeline, and not all that a config says is read there. A model whose weights have taken its factors in
is right in all of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError

if TYPE_CHECKING:
    from eqvae.autoencoders.families import DiffusersAutoencoder

Fold = Literal["unit", "sd", "sdxl", "sd3", "flux"]
"""Whose latents the folded model's are to look like."""


class Factors(NamedTuple):
    """`normalized = (z - shift) * scaling`."""

    scaling: float

    shift: float


FACTORS: dict[Fold, Factors] = {
    "unit": Factors(1.0, 0.0),
    "sd": Factors(0.18215, 0.0),
    "sdxl": Factors(0.13025, 0.0),
    "sd3": Factors(1.5305, 0.0609),
    "flux": Factors(0.3611, 0.1159),
}
"""Those that published diffusion models were trained with; ComfyUI has them in its code for each."""

SCALING_ALONE = (
    "StableDiffusionPipeline", "DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"
)  # fmt: skip
"""Pipelines of diffusers 0.42 that decode `z / scaling_factor`."""

SCALING_AND_SHIFT = ("StableDiffusion3Pipeline", "FluxPipeline")
"""Those that decode `z / scaling_factor + shift_factor`."""

CHANNEL_STATISTICS = ("StableDiffusionXLPipeline",)
"""Those that decode `z * latents_std / scaling_factor + latents_mean` where both are there; no shift factor."""


class Normalization(NamedTuple):
    """Shift and scale of each channel: `normalized = (z - shift) / scale`."""

    shift: tuple[float, ...]

    scale: tuple[float, ...]

    @property
    def is_scalar(self) -> bool:
        """Whether one scaling factor says all."""
        return not any(self.shift) and len({*self.scale}) <= 1

    def normalize(self, z: Tensor) -> Tensor:
        """Turn raw latents into what a generator sees."""
        return (z - z.new_tensor(self.shift)[:, None, None]) / z.new_tensor(self.scale)[:, None, None]


def configured(autoencoder: Autoencoder) -> Normalization:
    """Read what an autoencoder's config says of its latents."""
    model: Any = autoencoder.model
    channels, config = autoencoder.latent_channels, model.config
    factor = config.get("scaling_factor") or 1.0
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
    scale = [std / factor for std in config.get("latents_std") or [1.0] * channels]
    return Normalization(tuple(shift), tuple(scale))


def fold(autoencoder: Autoencoder, normalization: Normalization, to: Fold = "unit") -> "DiffusersAutoencoder":
    """Move a normalization into the layers next to the latent, which are linear there: the pictures stay the same.

    Latents of the new model are `normalized / scaling + shift` with the factors of `to`, and its config says so.
    """
    from eqvae.autoencoders.families import Flux2Autoencoder, KLAutoencoder  # diffusers takes seconds to import

    if not isinstance(autoencoder, KLAutoencoder) or isinstance(autoencoder, Flux2Autoencoder):
        raise UserError(
            f"'{autoencoder.name}' has no linear layers next to its latent, and can't take its factors in",
            "An AutoencoderKL can",
        )
    model: Any = autoencoder.model
    factors = FACTORS[to]
    scale = torch.tensor(normalization.scale, dtype=torch.float64) * factors.scaling
    shift = torch.tensor(normalization.shift, dtype=torch.float64) - factors.shift * scale
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    channels = autoencoder.latent_channels
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        state.setdefault(f"{name}.weight", torch.eye(width)[:, :, None, None])
        state.setdefault(f"{name}.bias", torch.zeros(width))
    ones, zeros = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    # The posterior's second half is the logarithm of the variance, which the scale alone changes.
    gain, offset = torch.cat([1 / scale, ones]), torch.cat([-shift / scale, -2 * scale.log()])
    _compose(state, "quant_conv", inner=(torch.cat([ones, ones]), torch.cat([zeros, zeros])), outer=(gain, offset))
    _compose(state, "post_quant_conv", inner=(scale, shift), outer=(ones, zeros))
    # diffusers takes the fields that are listed there for its own defaults, whatever they say.
    config = {field: value for field, value in model.config.items() if field != "_use_default_values"} | {
        "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": factors.scaling,
        "shift_factor": factors.shift, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    with torch.device("meta"):
        folded = KLAutoencoder.build(type(model).__name__, config, name=autoencoder.name)
    folded.model.load_state_dict(state, strict=True, assign=True)
    folded.eval()
    return folded


def _compose(
    state: dict[str, Tensor], name: str, *, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]
) -> None:
    """Put `gain * x + offset` before and behind a 1x1 convolution into its weights."""
    weight, bias = (state[f"{name}.{part}"].double() for part in ("weight", "bias"))
    matrix = weight.flatten(1)
    bias = outer[0] * (bias + matrix @ inner[1]) + outer[1]
    matrix = outer[0][:, None] * matrix * inner[0]
    state[f"{name}.weight"], state[f"{name}.bias"] = matrix[:, :, None, None].float(), bias.float()


def pipeline_advice(config: Any) -> list[str]:
    """Say which pipelines would put this model's pictures off, and by how much."""
    shift, mean, std = (config.get(name) for name in ("shift_factor", "latents_mean", "latents_std"))
    mend = "eqvae convert --fold unit writes a model that is right in all"
    if mean is not None and std is not None:
        off = _size([m / s for m, s in zip(mean, std, strict=True)])
        return [
            f"latents_mean and latents_std, up to {off} standard deviations: {_these(CHANNEL_STATISTICS)} reads them, "
            f"{_these(SCALING_ALONE + SCALING_AND_SHIFT)} don't; {mend}"
        ]
    if not shift:
        return []
    return [
        f"shift_factor {shift:g}, {_size([shift * (config.get('scaling_factor') or 1.0)])} standard deviations: "
        f"{_these(SCALING_AND_SHIFT)} add it before decoding, {_these(SCALING_ALONE + CHANNEL_STATISTICS)} ignore it; "
        f"{mend}"
    ]


def comfyui_advice() -> str:
    """Say what ComfyUI makes of latents: nothing of it stands in an autoencoder's file."""
    known = ", ".join(f"{name} {each.scaling:g}" for name, each in FACTORS.items() if name != "unit")
    return (
        f"ComfyUI scales latents by its diffusion model's factors ({known}), never by the file's: a model whose own "
        "are others needs --fold with that name"
    )


def _size(values: Sequence[float]) -> str:
    return f"{max(map(math.fabs, values)):.2g}"


def _these(names: Sequence[str]) -> str:
    return ", ".join(name.removesuffix("Pipeline") for name in names)


def loading_code(config: Mapping[str, Any], location: str) -> str:
    """Write the lines of Python that load a model from a hub id or a folder."""
    name = config["_class_name"]
    module = "eqvae.autoencoders.tiny" if name == "PooledAutoencoderTiny" else "diffusers"
    lines = [f"from {module} import {name}"]
    if config.get("padding_mode") == "reflect":
        lines.append("from eqvae import set_padding_mode")
    lines += ["", f'autoencoder = {name}.from_pretrained("{location}")']
    if config.get("padding_mode") == "reflect":
        lines.append('set_padding_mode(autoencoder, "reflect")  # its own config can\'t say that')
    return "\n".join(lines)
