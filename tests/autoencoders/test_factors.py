"""What diffusers' own pipelines do with factors is what is said of them; folded models are right in all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from eqvae.autoencoders import LatentStatistics, load_autoencoder
from eqvae.autoencoders.convert import convert_autoencoder
from eqvae.autoencoders.factors import (
    CHANNEL_STATISTICS,
    FACTORS,
    SCALING_ALONE,
    SCALING_AND_SHIFT,
    Fold,
    Normalization,
    configured,
    fold,
    pipeline_advice,
)
from eqvae.autoencoders.families import DCAutoencoder, KLAutoencoder
from eqvae.errors import UserError

STATISTICS = LatentStatistics(mean=(0.5, -2.0, 1.0, 0.3), std=(4.0, 1.0, 2.0, 0.5))
NORMALIZATION = Normalization(STATISTICS.mean, STATISTICS.std)
SIDE_PX = 16


@pytest.fixture
def measured(small_kl: AutoencoderKL) -> KLAutoencoder:
    autoencoder = KLAutoencoder(small_kl, name="measured")
    autoencoder.set_latent_statistics(STATISTICS)
    return autoencoder


# Folding ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("to", FACTORS)
@pytest.mark.parametrize("quant_convs", [True, False])
def test_folding_keeps_pictures_and_normalizes_latents(
    to: Fold, quant_convs: bool, small_kl: AutoencoderKL, images: Tensor
) -> None:
    if not quant_convs:
        config = dict(small_kl.config) | {"use_quant_conv": False, "use_post_quant_conv": False}
        small_kl = AutoencoderKL.from_config(config).eval()
    autoencoder = KLAutoencoder(small_kl, name="small")
    folded = fold(autoencoder, NORMALIZATION, to)
    before, after = autoencoder.encode(images), folded.encode(images)
    normalized = NORMALIZATION.normalize(before.mean)
    torch.testing.assert_close(configured(folded).normalize(after.mean), normalized, rtol=1e-4, atol=1e-5)
    assert before.log_variance is not None and after.log_variance is not None
    std = torch.tensor(STATISTICS.std)[:, None, None] * FACTORS[to].scaling
    torch.testing.assert_close(after.log_variance, before.log_variance - 2 * std.log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.decode(after.mean), autoencoder.decode(before.mean), rtol=1e-4, atol=1e-4)
    model: Any = folded.model
    assert (model.config.scaling_factor, model.config.shift_factor) == tuple(FACTORS[to])
    assert (autoencoder.model.config.scaling_factor, model.config.latents_mean) == (0.18215, None)  # type: ignore[union-attr]


@torch.no_grad()
def test_a_folded_folder_is_one_of_diffusers(measured: KLAutoencoder, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    measured.save(tmp_path / "source")
    (tmp_path / "source" / "eqvae.json").write_text('{"base": "somewhere"}')
    source = str(tmp_path / "source")
    converted = convert_autoencoder(source, tmp_path / "folded", "diffusers", folded="sd3")
    assert 0 < converted.largest_difference < 1e-5
    assert not (converted.path / "eqvae.json").exists()
    assert "eqvae.json is left out: its figures are of other weights" in converted.advice
    assert not any("ignore it" in line for line in converted.advice if "0.0609" not in line)
    theirs = AutoencoderKL.from_pretrained(converted.path)
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (1.5305, 0.0609)
    raw = theirs.encode(images).latent_dist.mode()
    torch.testing.assert_close(theirs.decode(raw).sample, measured.decode(measured.encode(images).mean))


def test_what_has_no_linear_layers_or_no_factors_is_not_folded(small_dc: AutoencoderDC, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no linear layers next to its latent"):
        fold(DCAutoencoder(small_dc, name="dc"), NORMALIZATION)
    with pytest.raises(UserError, match="no linear layers"):
        convert_autoencoder("untrained:tiny-vq", tmp_path / "out", "diffusers", folded="unit")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    autoencoder = KLAutoencoder(AutoencoderKL(**blocks, block_out_channels=(32,)), name="small")
    (tmp_path / "source").mkdir()
    autoencoder.save(tmp_path / "source")
    file = convert_autoencoder(str(tmp_path / "source"), tmp_path / "a.safetensors", "ldm").path
    state = load_autoencoder(str(file)).model
    from eqvae.autoencoders.layouts import diffusers_to_ldm

    bare = {name: tensor.contiguous() for name, tensor in diffusers_to_ldm(state.state_dict(), 1).items()}  # type: ignore[union-attr,operator]
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no scaling factor to fold"):
        convert_autoencoder(str(tmp_path / "bare.safetensors"), tmp_path / "out", "diffusers", folded="unit")


def test_advice_says_by_how_much_pictures_would_be_off(measured: KLAutoencoder, small_kl: AutoencoderKL) -> None:
    (line,) = pipeline_advice(measured.model.config)  # type: ignore[union-attr]
    assert "StableDiffusion3, Flux add it before decoding" in line
    small_kl.register_to_config(latents_mean=[1.0, 0, 0, 0], latents_std=[2.0, 1, 1, 1])
    (line,) = pipeline_advice(small_kl.config)
    assert "up to 0.5 standard deviations: StableDiffusionXL reads them" in line
    small_kl.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.0)
    assert pipeline_advice(small_kl.config) == []


# diffusers' pipelines -----------------------------------------------------------------------------------------------

BLOCKS = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4, "sample_size": 8,
}  # fmt: skip
PROMPT, POOLED, MASK = torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.ones(1, 3)
SIZE = {"height": SIDE_PX, "width": SIDE_PX}
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def stable_diffusion(vae: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionPipeline

    unet = UNet2DConditionModel(**BLOCKS)
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **NO_TEXT,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": PROMPT, "guidance_scale": 1.0, **SIZE}


def stable_diffusion_xl(vae: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import StableDiffusionXLPipeline

    unet = UNet2DConditionModel(
        **BLOCKS, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), text_encoder_2=None,
        tokenizer_2=None, add_watermarker=False, **NO_TEXT,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED, "guidance_scale": 1.0, **SIZE}


def stable_diffusion_3(vae: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None, **NO_TEXT,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED, "guidance_scale": 1.0, **SIZE}


def flux(vae: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = FluxPipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None,
        tokenizer_2=None, **NO_TEXT,
    )  # fmt: skip
    return pipeline, {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED, **SIZE}


def dit(vae: Any) -> tuple[Any, dict[str, Any]]:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, out_channels=8, sample_size=8
    )
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)), {"class_labels": [1], "guidance_scale": 1.0}


def pixart(name: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    def build(vae: Any) -> tuple[Any, dict[str, Any]]:
        import diffusers

        transformer = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, patch_size=2, in_channels=4,
            out_channels=8, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
        )  # fmt: skip
        pipeline = getattr(diffusers, name)(
            vae=vae, transformer=transformer, scheduler=DDIMScheduler(clip_sample=False), **NO_TEXT
        )
        prompts = {"prompt_embeds": PROMPT, "prompt_attention_mask": MASK, "negative_prompt": None}
        return pipeline, prompts | {"guidance_scale": 1.0, "use_resolution_binning": False, **SIZE}

    return build


PIPELINES = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "DiTPipeline": dit,
    "PixArtAlphaPipeline": pixart("PixArtAlphaPipeline"),
    "PixArtSigmaPipeline": pixart("PixArtSigmaPipeline"),
}


def sample(name: str, vae: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a random pipeline draws: the latents of its last step, what it has decoded, and the picture in [0, 1]."""
    torch.manual_seed(0)
    pipeline, arguments = PIPELINES[name](vae)
    pipeline.set_progress_bar_config(disable=True)
    drawn: list[Tensor] = []
    decoded: list[Tensor] = []
    step, decode = pipeline.scheduler.step, vae.decode

    def record_step(*positional: Any, **named: Any) -> Any:
        result = step(*positional, **named)
        drawn.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    def record_decode(z: Tensor, *positional: Any, **named: Any) -> Any:
        decoded.append(z)
        return decode(z, *positional, **named)

    pipeline.scheduler.step, vae.decode = record_step, record_decode
    try:
        images = pipeline(**arguments, num_inference_steps=1, output_type="pt").images
    finally:
        del vae.decode
    z = drawn[-1]
    if name == "FluxPipeline":
        z = pipeline._unpack_latents(z, SIDE_PX, SIDE_PX, pipeline.vae_scale_factor)
    return z, decoded[-1], images


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_read_what_is_said_of_them(name: str, measured: KLAutoencoder) -> None:
    vae: Any = measured.model
    z, decoded, _ = sample(name, vae)
    shift = vae.config.shift_factor if name in SCALING_AND_SHIFT else 0.0
    torch.testing.assert_close(decoded, z / vae.config.scaling_factor + shift)
    vae.register_to_config(latents_mean=list(STATISTICS.mean), latents_std=list(STATISTICS.std), scaling_factor=1.0)
    z, decoded, _ = sample(name, vae)
    if name in CHANNEL_STATISTICS:
        torch.testing.assert_close(NORMALIZATION.normalize(decoded), z, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(decoded, z + shift)


@torch.no_grad()
@pytest.mark.parametrize("name", PIPELINES)
def test_a_folded_model_is_right_in_its_familys_pipeline(name: str, measured: KLAutoencoder) -> None:
    folded = fold(measured, NORMALIZATION, "flux" if name == "FluxPipeline" else "unit")
    z, _, images = sample(name, folded.model)
    raw = z * torch.tensor(STATISTICS.std)[:, None, None] + torch.tensor(STATISTICS.mean)[:, None, None]
    expected = (measured.decode(raw) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sana_reads_what_dc_ae_has(small_dc: AutoencoderDC) -> None:
    """A DC-AE has a scaling factor alone, which is measured without a shift."""
    from diffusers import SanaPipeline, SanaTransformer2DModel

    DCAutoencoder(small_dc, name="dc").set_latent_statistics(STATISTICS)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    )  # fmt: skip

    def build(vae: Any) -> tuple[Any, dict[str, Any]]:
        pipeline = SanaPipeline(
            vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **NO_TEXT
        )
        prompts = {"prompt_embeds": PROMPT, "prompt_attention_mask": MASK, "negative_prompt": None}
        sizes = {"height": 32, "width": 32, "use_resolution_binning": False}
        return pipeline, prompts | {"guidance_scale": 1.0, **sizes}

    PIPELINES["SanaPipeline"] = build
    try:
        z, decoded, _ = sample("SanaPipeline", small_dc)
    finally:
        del PIPELINES["SanaPipeline"]
    torch.testing.assert_close(decoded, z / small_dc.config.scaling_factor)
    assert "SanaPipeline" in SCALING_ALONE


def test_every_pipeline_that_is_spoken_of_is_sampled_with() -> None:
    assert {*SCALING_ALONE, *SCALING_AND_SHIFT, *CHANNEL_STATISTICS} == {*PIPELINES, "SanaPipeline"}
