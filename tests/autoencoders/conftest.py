"""Small models of every family, and the images that they are tried on."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, VQModel
from torch import Tensor

SMALL_KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0


@pytest.fixture
def small_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL_KL).eval()


@pytest.fixture
def attending_kl() -> AutoencoderKL:
    """Shaped like SD-VAE-16: the coarsest resolution attends; 32 groups, as in LDM files."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=6,
    ).eval()


@pytest.fixture
def vqgan() -> VQModel:
    """Shaped like VQ-GAN: the coarsest resolution attends, 32 groups, codes narrower than the encoder's end."""
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=8,
        vq_embed_dim=6,
        num_vq_embeddings=40,
    ).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model


@pytest.fixture
def small_flux2() -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    return AutoencoderKLFlux2(**SMALL_KL, latent_channels=3).eval()


@pytest.fixture
def small_tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


@pytest.fixture
def small_dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(0, 1),
        decoder_layers_per_block=(0, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()


@pytest.fixture
def taef2() -> Path:
    """The real weights of FLUX.2's tiny autoencoder."""
    folder = Path(__file__).parents[3] / "shared" / "models" / "taef2"
    if not folder.is_dir():
        pytest.skip("the shared models are not here")
    return folder
