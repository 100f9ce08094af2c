"""A DiT in diffusers' `DiTPipeline`: the same samples for the same noise, there and back bit for bit."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqvae.artifacts.names import AUTOENCODER_WEIGHTS as WEIGHTS
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.padding import set_padding_mode
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard, read_generator, write_generator
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.dit_pipeline import with_published_times
from eqvae.generators.families import find_recipe
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.protocol import LatentSpecification
from eqvae.runs.convert import ConvertConfig, convert
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.diffusion import ddim
from eqvae.sampling.guidance import classifier_free_guidance
from eqvae.sampling.noise import NOISE_STREAM, ImageNoise

AUTOENCODER = "untrained:tiny-kl"
SHIFT, SCALE = (0.5, -0.2, 0.1, 0.0), (2.0, 1.0, 0.5, 1.5)
NUM_STEPS, GUIDANCE_SCALE = 5, 1.5
LATENTS = LatentSpecification(channels=4, height=8, width=8, num_classes=3)
NAMES = ("cat", "dog, hound", "bird")


def write_run(folder: Path, recipe: str = "dit-ti-4", latents: LatentSpecification = LATENTS, **changes: Any) -> Path:
    """Write a generator of random weights, but for its positions; `changes` are the card's."""
    config = find_recipe(recipe).transformer(latents)
    generator, transformer = torch.Generator().manual_seed(0), config.build()  # type: ignore[call-arg]
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    autoencoder = load_autoencoder(AUTOENCODER)
    names = NAMES if latents.num_classes == len(NAMES) else None
    card = GeneratorCard(
        family=recipe.rpartition("-")[0].rpartition("-")[0], recipe=recipe, transformer=config, interpolant=None,
        shift=SHIFT, scale=SCALE, autoencoder=AUTOENCODER, autoencoder_fingerprint=autoencoder.fingerprint(),
        encoder_fingerprint=autoencoder.encoder_fingerprint(), image_size_px=latents.height * 8, class_names=names,
        num_steps=1, eqvae_version="0",
    )  # fmt: skip
    write_generator(folder, replace(card, **changes), {"ema": transformer.state_dict()})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def export(run: Path, name: str = "pipeline") -> Path:
    return convert(ConvertConfig(source=str(run), destination=run.with_name(name), to="dit-pipeline")).path


def draw_theirs(folder: Path, labels: Sequence[int], *, published_times: bool = True) -> Tensor:
    """Sample by diffusers' pipeline, from each image's own noise."""
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if published_times:
        with_published_times(pipeline.transformer)
    noises = [generator_for(0, index, NOISE_STREAM) for index in range(len(labels))]
    return pipeline(
        class_labels=list(labels), guidance_scale=GUIDANCE_SCALE, generator=noises, num_inference_steps=NUM_STEPS,
        output_type="pt",
    ).images  # fmt: skip


def draw_ours(generator: Generator, autoencoder: Autoencoder, labels: Sequence[int]) -> Tensor:
    card = generator.card
    predict = classifier_free_guidance(generator.transformer, GUIDANCE_SCALE, card.transformer.latents.num_classes)
    noise = ImageNoise(0, range(len(labels)), card.transformer.latents.shape)
    z = ddim(predict, noise, torch.tensor(labels), GaussianDiffusion(), num_steps=NUM_STEPS, spacing="ddim")
    with torch.no_grad():
        return (autoencoder.decode(card.denormalize(z)) / 2 + 0.5).clamp(0, 1)


def test_samples_are_the_same_for_the_same_noise(run: Path) -> None:
    pipeline = export(run)
    ours = draw_ours(read_generator(run), load_autoencoder(AUTOENCODER), [0, 2])
    torch.testing.assert_close(draw_theirs(pipeline, [0, 2]), ours, rtol=0, atol=1e-4)
    # diffusers' own spacing of frequencies is not DiT's, which the command says.
    assert not torch.allclose(draw_theirs(pipeline, [0, 2], published_times=False), ours, rtol=0, atol=1e-3)


def test_there_and_back_is_bitwise(run: Path) -> None:
    converted = convert(ConvertConfig(source=str(run), destination=run.with_name("pipeline"), to="dit-pipeline"))
    assert converted.largest_difference < 1e-4
    assert converted.keys.startswith("120 tensors, ") and "scaling_factor is 1" in "".join(converted.advice)
    back = convert(ConvertConfig(source=str(converted.path), destination=run.with_name("back")))
    assert back.largest_difference < 1e-5
    before, after = read_generator(run), read_generator(back.path)
    states = [each.transformer.state_dict() for each in (before, after)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name != "pos_embed")
    torch.testing.assert_close(states[0]["pos_embed"], states[1]["pos_embed"], rtol=0, atol=0)
    assert (after.card.recipe, after.card.class_names, after.card.image_size_px) == ("dit-ti-4", NAMES, 64)
    assert (after.card.shift, after.card.scale) == ((0.0,) * 4, (1.0,) * 4)  # in the autoencoder's weights now
    decoder = load_autoencoder(after.card.autoencoder)
    ours = draw_ours(before, load_autoencoder(AUTOENCODER), [1])
    torch.testing.assert_close(draw_ours(after, decoder, [1]), ours, rtol=0, atol=1e-4)
    again = export(back.path, "again")
    assert json.loads((again / "model_index.json").read_text())["id2label"] == dict(zip("012", NAMES, strict=True))


def test_a_single_factor_stays_out_of_the_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shift=(0.0,) * 4, scale=(1 / 0.18215,) * 4, class_names=None)
    pipeline = export(run)
    decoder = load_autoencoder(str(pipeline / "vae"))
    assert decoder.fingerprint() == load_autoencoder(AUTOENCODER).fingerprint()
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"]) == (pytest.approx(0.18215), 0.0)
    back = read_generator(convert(ConvertConfig(source=str(pipeline), destination=tmp_path / "back")).path)
    assert back.card.class_names is None and back.card.scale == pytest.approx((1 / 0.18215,) * 4)


def test_without_classes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", latents=replace(LATENTS, num_classes=0))
    back = convert(ConvertConfig(source=str(export(run)), destination=tmp_path / "back"))
    assert back.largest_difference < 1e-5
    assert read_generator(back.path).card.transformer == read_generator(run).card.transformer


@pytest.mark.slow
def test_samples_are_the_same_at_dit_s_2(tmp_path: Path) -> None:
    """Latents of 32 x 32 cells and 1000 classes, as of ImageNet at 256 px."""
    latents = replace(LATENTS, height=32, width=32, num_classes=1000)
    run = write_run(tmp_path / "run", "dit-s-2", latents)
    pipeline = export(run)
    ours = draw_ours(read_generator(run), load_autoencoder(AUTOENCODER), [999])
    torch.testing.assert_close(draw_theirs(pipeline, [999]), ours, rtol=0, atol=1e-4)
    back = read_generator(convert(ConvertConfig(source=str(pipeline), destination=tmp_path / "back")).path)
    before = read_generator(run).transformer.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in back.transformer.state_dict().items())
    for folder in ("run", "pipeline", "back"):
        shutil.rmtree(tmp_path / folder)


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        convert(ConvertConfig(**fields))
    assert not fields["destination"].exists()
    return str(caught.value)


def test_what_a_pipeline_can_not_run_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generator = read_generator(run)
    sit = replace(generator.card, family="sit", recipe="sit-ti-4", interpolant=Interpolant())
    write_generator(tmp_path / "sit", sit, {"ema": generator.transformer.state_dict()})
    line = refused(source=str(tmp_path / "sit"), destination=out, to="dit-pipeline")
    assert "a sit-ti-4, and DiTPipeline runs a DiT's diffusion" in line
    state = generator.transformer.state_dict()
    write_generator(tmp_path / "moved", generator.card, {"ema": state | {"pos_embed": state["pos_embed"] + 1}})
    line = refused(source=str(tmp_path / "moved"), destination=out, to="dit-pipeline")
    assert "its positions are not DiT's" in line
    line = refused(source=str(run), destination=out, to="dit-pipeline", autoencoder="tiny-kl")
    assert "has other weights" in line
    for flag in ({"fold": "unit"}, {"recipe": "dit-ti-4"}, {"weights": "raw"}, {"normalization": "fixed:1"}):
        assert "not for --to dit-pipeline" in refused(source=str(run), destination=out, to="dit-pipeline", **flag)


def test_what_is_no_dits_pipeline_is_refused(run: Path, tmp_path: Path) -> None:
    pipeline, out = export(run), tmp_path / "out"
    assert "--recipe dit-s-2 is not what" in refused(source=str(pipeline), destination=out, recipe="dit-s-2")

    def change(file: str, **fields: Any) -> str:
        path = pipeline / file
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | fields))
        line = refused(source=str(pipeline), destination=out)
        path.write_text(before)
        return line

    assert "holds a FluxPipeline" in change("model_index.json", _class_name="FluxPipeline")
    assert "prediction_type v_prediction" in change("scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert "norm_type layer_norm" in change("transformer/config.json", norm_type="layer_norm")
    assert "7 blocks" in change("transformer/config.json", num_layers=7)
    assert "[6] blocks" in change("transformer/config.json", num_layers=[6])
    for fields in ({"patch_size": 0}, {"sample_size": 10**9}, {"sample_size": "a"}):
        assert "describes no DiT" in change("transformer/config.json", **fields)
    state = load_file(pipeline / "transformer" / WEIGHTS)
    scalar = torch.tensor(1.0)
    for name, tensor in (("attn1.to_k.weight", scalar), ("norm1.emb.class_embedder.embedding_table.weight", scalar)):
        broken = {key: tensor if key.endswith(name) else value for key, value in state.items()}
        save_file({key: value.clone() for key, value in broken.items()}, pipeline / "transformer" / WEIGHTS)
        refused(source=str(pipeline), destination=out)
    save_file(
        state | {"transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.bias": torch.ones(192)},
        pipeline / "transformer" / WEIGHTS,
    )
    assert "another t_embedder.mlp.0 in block 3" in refused(source=str(pipeline), destination=out)


def test_a_decoder_that_pads_by_reflection_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "reflecting"
    folder.mkdir()
    autoencoder: Any = load_autoencoder(AUTOENCODER)
    set_padding_mode(autoencoder.model, "reflect")
    autoencoder.save(folder)
    autoencoder = load_autoencoder(str(folder))
    made_by = {"autoencoder": str(folder), "autoencoder_fingerprint": autoencoder.fingerprint()}
    run = write_run(tmp_path / "run", encoder_fingerprint=autoencoder.encoder_fingerprint(), **made_by)
    converted = convert(ConvertConfig(source=str(run), destination=tmp_path / "pipeline", to="dit-pipeline"))
    assert converted.largest_difference < 1e-4
    assert "its vae pads by reflection: eqvae.set_padding_mode(pipeline.vae, 'reflect')" in converted.advice
    copy = convert(ConvertConfig(source=str(folder), destination=tmp_path / "copy", to="diffusers"))
    assert any("pad by reflection" in line for line in copy.advice)
