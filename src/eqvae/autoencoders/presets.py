"""Named autoencoders: where their weights are, and what they look like."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eqvae.autoencoders.layouts import block_types

PACKAGED = Path(__file__).with_name("weights")
"""Weights that are installed with the package: one diffusers folder for each of `PACKAGED_NAMES`."""

PACKAGED_NAMES = ("tiny-kl", "tiny-vq")
"""The demo's, and the bases of `eqvae reproduce --scale tiny`."""

UNTRAINED = "untrained:"
"""`untrained:NAME` asks for a preset's architecture with random weights."""


class Architecture(NamedTuple):
    """What builds a model without weights: the class, as `_class_name` in a `config.json`, and its config."""

    class_name: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """One named autoencoder."""

    hub: str | None
    """Id on the Hugging Face hub; None where no weights in diffusers' format are published."""

    subfolder: str
    """Folder inside the hub's repository; empty for its root."""

    architecture: Architecture
    """What `untrained:NAME` builds."""

    stride: int
    """Pixels per latent cell."""

    packaged: Path | None
    """Folder of weights that come with the package; None for the others."""


def _convolutional(channels: tuple[int, ...], attention_levels: tuple[int, ...]) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        **block_types([level in attention_levels for level in range(len(channels))]),
        "layers_per_block": 2,
        "sample_size": 256,
    }


def _kl(
    channels: tuple[int, ...],
    latent_channels: int,
    scaling_factor: float,
    shift_factor: float | None = None,
    *,
    attention_levels: tuple[int, ...] = (),
    **others: int | bool,
) -> Architecture:
    """Describe an `AutoencoderKL`; `attention_levels` are the resolutions, finest first, whose blocks attend."""
    own = {"latent_channels": latent_channels, "scaling_factor": scaling_factor, "shift_factor": shift_factor}
    return Architecture("AutoencoderKL", _convolutional(channels, attention_levels) | own | others)


def _dc(latent_channels: int, num_deep: int) -> Architecture:
    """Describe a DC-AE of arXiv:2410.10733 (ImageNet models): `num_deep` transformer levels of 2 blocks."""
    block_types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * num_deep
    channels = (128, 256, 512, 512, 1024, 1024, 2048, 2048)[: 3 + num_deep]
    return Architecture(
        class_name="AutoencoderDC",
        config={
            "latent_channels": latent_channels,
            "encoder_block_types": block_types,
            "decoder_block_types": block_types,
            "encoder_block_out_channels": channels,
            "decoder_block_out_channels": channels,
            "encoder_layers_per_block": (0, 4, 8) + (2,) * num_deep,
            "decoder_layers_per_block": (0, 5, 10) + (2,) * num_deep,
            "encoder_qkv_multiscales": ((),) * (3 + num_deep),
            "decoder_qkv_multiscales": ((),) * (3 + num_deep),
            "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * num_deep,
            "decoder_act_fns": ("relu",) * 3 + ("silu",) * num_deep,
        },
    )


def _vq(
    channels: tuple[int, ...], num_codes: int, width: int, *, attention: bool = True, **others: int
) -> Architecture:
    """Describe a `VQModel` with codes of `width` numbers; as in VQ-GAN, the coarsest resolution attends."""
    own = {"latent_channels": width, "vq_embed_dim": width, "num_vq_embeddings": num_codes, "scaling_factor": 1.0}
    own |= {"mid_block_add_attention": attention}
    attention_levels = (len(channels) - 1,) if attention else ()
    return Architecture("VQModel", _convolutional(channels, attention_levels) | own | others)


_F8 = (128, 256, 512, 512)
_NO_QUANT: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}

_SD = _kl(_F8, 4, 0.18215)
_SD16 = _kl((128, 128, 256, 256, 512), 16, 1.0, attention_levels=(4,))
_SDXL = _kl(_F8, 4, 0.13025)
_SD3 = _kl(_F8, 16, 1.5305, 0.0609, **_NO_QUANT)
_FLUX = _kl(_F8, 16, 0.3611, 0.1159, **_NO_QUANT)
_FLUX2 = Architecture(class_name="AutoencoderKLFlux2", config={"latent_channels": 32})
# 2.09 million parameters, most of them in the coarse levels: the two finest take most of the time.
_TINY_KL = _kl((16, 32, 64, 112), 4, 1.0, 0.0, layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False)
# For pictures of 32 px: 16 x 16 cells, so that a generator with patches of 2 cells has 64 tokens.
_TINY_KL_F2 = _kl((32, 64), 4, 1.0, 0.0, layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False)
_VQGAN = (128, 128, 256, 256, 512)
# As tiny-kl: 32 x 32 tokens for a picture of 256 px.
_TINY_VQ = _vq((16, 32, 64, 112), 1024, 16, attention=False, layers_per_block=1, norm_num_groups=8)
# For pictures of 32 px: 8 x 8 tokens, as many as a small MaskGIT learns on a CPU.
_TINY_VQ_F4 = _vq((32, 64, 96), 1024, 16, attention=False, layers_per_block=1, norm_num_groups=8)
_TAESD = Architecture(class_name="AutoencoderTiny", config={"latent_channels": 4})
_TAESD16 = Architecture(class_name="AutoencoderTiny", config={"latent_channels": 16})
_TAEF2 = Architecture(class_name="PooledAutoencoderTiny", config={"latent_channels": 32})

_SD3_MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"

# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
    # name             hub id                                         folder  architecture                stride
    ("tiny-kl",         None,                                          "",    _TINY_KL,                   8),
    ("tiny-kl-f2",      None,                                          "",    _TINY_KL_F2,                2),
    ("tiny-vq",         None,                                          "",    _TINY_VQ,                   8),
    ("tiny-vq-f4",      None,                                          "",    _TINY_VQ_F4,                4),
    ("sd-vae",          "CompVis/stable-diffusion-v1-4",               "vae", _SD,                        8),
    ("sd-vae-16",       None,                                          "",    _SD16,                      16),
    ("sd-vae-ft-ema",   "stabilityai/sd-vae-ft-ema",                   "",    _SD,                        8),
    ("sd-vae-ft-mse",   "stabilityai/sd-vae-ft-mse",                   "",    _SD,                        8),
    ("sdxl-vae",        "stabilityai/sdxl-vae",                        "",    _SDXL,                      8),
    ("sd3-vae",         _SD3_MEDIUM,                                   "vae", _SD3,                       8),
    ("flux-vae",        "black-forest-labs/FLUX.1-schnell",            "vae", _FLUX,                      8),
    ("flux2-vae",       "black-forest-labs/FLUX.2-klein-4B",           "vae", _FLUX2,                     8),
    ("eq-vae",          "zelaki/eq-vae",                               "",    _SD,                        8),
    ("eq-vae-ema",      "zelaki/eq-vae-ema",                           "",    _SD,                        8),
    ("taesd",           "madebyollin/taesd",                           "",    _TAESD,                     8),
    ("taesdxl",         "madebyollin/taesdxl",                         "",    _TAESD,                     8),
    ("taesd3",          "madebyollin/taesd3",                          "",    _TAESD16,                   8),
    ("taef1",           "madebyollin/taef1",                           "",    _TAESD16,                   8),
    ("taef2",           None,                                          "",    _TAEF2,                     8),
    ("vqgan-f16-1024",  None,                                          "",    _vq(_VQGAN, 1024, 256),     16),
    ("vqgan-f16-16384", None,                                          "",    _vq(_VQGAN, 16384, 256),    16),
    ("dc-ae-f32c32",    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",   "",    _dc(32, 3),                 32),
    ("dc-ae-f64c128",   "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",  "",    _dc(128, 4),                64),
    ("dc-ae-f128c512",  "mit-han-lab/dc-ae-f128c512-in-1.0-diffusers", "",    _dc(512, 5),                128),
)
# fmt: on

PRESETS: dict[str, Preset] = {
    name: Preset(*(*values, PACKAGED / name if name in PACKAGED_NAMES else None)) for name, *values in _ROWS
}
"""All presets by name."""
