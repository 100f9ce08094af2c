"""The programs in `examples/` run as their first lines say."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def pictures(photographs: Path, tmp_path: Path) -> Path:
    """The six photographs in a class folder, as torchvision wants them."""
    (tmp_path / "pictures").mkdir()
    return photographs.rename(tmp_path / "pictures" / "any").parent


def run_example(name: str, *arguments: object) -> str:
    """Run one in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pytorch(pictures: Path, tmp_path: Path):
    # Eight images make a batch: the six are given twice.
    (tmp_path / "pictures" / "other").symlink_to(pictures / "any")
    assert run_example("pytorch.py", pictures, tmp_path / "own.pt", 2).startswith("step 2: l1 ")
    assert "encoder.0.weight" in torch.load(tmp_path / "own.pt", weights_only=True)


@pytest.mark.slow
def test_diffusers(pictures: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    from eqvae import load_autoencoder

    load_autoencoder("untrained:tiny-kl").save(tmp_path / "base")
    said = run_example("diffusers_autoencoder.py", tmp_path / "base", pictures, tmp_path / "eq", 2)
    assert said.startswith("step 2: l1 ")
    vae = AutoencoderKL.from_pretrained(tmp_path / "eq")
    assert f"scaling factor {vae.config.scaling_factor:.3f}" in said


@pytest.mark.slow
def test_lightning(pictures: Path, tmp_path: Path):
    pytest.importorskip("lightning")
    assert "step 2: l1 " in run_example("lightning_autoencoder.py", pictures, tmp_path / "own.ckpt", 2)
    assert "encoder.0.weight" in torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_transformers(pictures: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    from eqvae import load_autoencoder

    load_autoencoder("untrained:tiny-kl").save(tmp_path / "base")
    assert "step 2: loss " in run_example("transformers_trainer.py", tmp_path / "base", pictures, tmp_path / "eq", 2)
    base, tuned = (AutoencoderKL.from_pretrained(tmp_path / name).state_dict() for name in ("base", "eq"))
    assert base.keys() == tuned.keys()
    assert not base["encoder.conv_in.weight"].equal(tuned["encoder.conv_in.weight"])


SWAPPED = [1, 0, 3, 2]


def unet() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    """A tiny UNet as SD 1.5's, and how it is called with latents."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, lambda model, z: model(z, 3, torch.ones(len(z), 5, 16)).sample


def sd3() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    """A tiny transformer as SD3's."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip

    def call(model: Any, z: Tensor) -> Tensor:
        return model(z, torch.ones(len(z), 5, 16), torch.ones(len(z), 16), torch.full((len(z),), 3)).sample

    return model, call


def flux() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    """A tiny transformer as Flux's, with its pipeline's packing of 2 x 2 cells."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def call(model: Any, z: Tensor) -> Tensor:
        packed = FluxPipeline._pack_latents(z, *z.shape)
        said = model(
            packed, torch.ones(len(z), 5, 32), torch.ones(len(z), 32), torch.full((len(z),), 0.3),
            img_ids=torch.zeros(packed.shape[1], 3), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
        return FluxPipeline._unpack_latents(said, 64, 64, 8)

    return model, call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "prediction"), [(unet, "epsilon"), (unet, "v_prediction"), (sd3, "flow"), (flux, "flow")]
)
def test_a_model_of_diffusers_under_a_vae_of_swapped_channels(
    pictures: Path, tmp_path: Path, build: Callable[[], Any], prediction: str
):
    from diffusers import AutoencoderKL, AutoModel

    from eqvae import load_autoencoder

    specification = importlib.util.spec_from_file_location("adapt_diffusers", EXAMPLES / "adapt_diffusers.py")
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)

    load_autoencoder("untrained:tiny-kl").save(tmp_path / "old")
    vae = AutoencoderKL.from_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in vae.quant_conv.parameters():
            parameter.copy_(parameter[[*SWAPPED, 4, 5, 6, 7]])
    vae.save_pretrained(tmp_path / "new")
    torch.manual_seed(0)
    model, call = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)  # what ends in zeros would say nothing
    model.save_pretrained(tmp_path / "model")

    places = (tmp_path / name for name in ("model", "old", "new", "out"))
    at, old, new, out = map(str, places)
    example.main(at, prediction, old, new, str(pictures), out, 64)
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before, after = call(model.eval(), z), call(AutoModel.from_pretrained(out).eval(), z[:, SWAPPED])
    torch.testing.assert_close(after, before[:, SWAPPED], rtol=1e-2, atol=1e-2 * before.std().item())


def test_the_examples_take_nothing_but_the_transforms():
    for path in set(EXAMPLES.glob("*.py")) - {EXAMPLES / "adapt_diffusers.py"}:  # which is about more
        imported = {line for line in path.read_text().splitlines() if line.startswith(("from eqvae", "import eqvae"))}
        assert imported == {"from eqvae.transforms import TransformSampler"}, path


@pytest.mark.slow
def test_processes_share_gradients(pictures: Path, tmp_path: Path):
    from eqvae import load_autoencoder

    load_autoencoder("untrained:tiny-kl").save(tmp_path / "base")
    (tmp_path / "two.py").write_text(f"""
import importlib.util
import torch

specification = importlib.util.spec_from_file_location("example", {str(EXAMPLES / "diffusers_autoencoder.py")!r})
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)
made = []
begin = example.Loss.__init__
example.Loss.__init__ = lambda self, vae: (begin(self, vae), made.append(vae))[0]
example.main({str(tmp_path / "base")!r}, {str(pictures)!r}, {str(tmp_path / "eq")!r}, 2)
own = torch.cat([each.detach().flatten() for each in made[0].parameters()])
parts = [torch.zeros_like(own) for _ in range(2)]
torch.distributed.all_gather(parts, own)
assert torch.equal(*parts), float((parts[0] - parts[1]).abs().max())
""")
    (pictures / "other").symlink_to(pictures / "any")  # two processes take eight pictures a step
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "two.py")], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
