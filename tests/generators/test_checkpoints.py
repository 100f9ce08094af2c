"""The generator's folder: written whole, read back strictly, under the published names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqvae.artifacts.names import GENERATOR, GENERATOR_CARD
from eqvae.errors import UserError
from eqvae.generators.checkpoints import GeneratorCard, read_generator, write_generator
from eqvae.generators.families import find_recipe
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit_transformer import MASKGIT_SIZES, MaskTransformer
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer

ONLY_NAMES = {
    "pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight", "blocks.2.adaLN_modulation.1.bias", "blocks.1.mlp.fc2.weight",
    "final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight",
}  # fmt: skip


def card_of(transformer: Transformer, **changes) -> GeneratorCard:
    fields = {
        "family": "sit", "recipe": "sit-ti-2", "transformer": transformer.config,
        "interpolant": Interpolant(path="gvp"), "shift": (0.1, -0.2, 0.3), "scale": (2.0, 0.5, 1.0),
        "autoencoder": "averaging", "autoencoder_fingerprint": "0123", "image_size_px": 32,
        "class_names": ("a", "b", "c", "d", "e"), "num_steps": 7, "eqvae_version": "0",
    }  # fmt: skip
    return GeneratorCard(**fields | changes)


@pytest.fixture
def written(build_transformer, tmp_path: Path) -> tuple[Path, Transformer, GeneratorCard]:
    transformer = build_transformer()
    card = card_of(transformer)
    doubled = {name: 2 * value for name, value in transformer.state_dict().items()}
    write_generator(tmp_path / "run", card, {"ema": transformer.state_dict(), "model": doubled})
    return tmp_path / "run", transformer, card


def test_round_trip(written):
    run, transformer, card = written
    ema, model = read_generator(run), read_generator(run, "model")
    assert ema.card == card
    assert not ema.transformer.training
    for name, value in transformer.state_dict().items():
        assert torch.equal(ema.transformer.state_dict()[name], value)
        assert torch.equal(model.transformer.state_dict()[name], 2 * value)
    z, t, labels = torch.randn(2, 3, 4, 6), torch.rand(2), torch.tensor([0, 5])
    with torch.no_grad():
        torch.testing.assert_close(ema.transformer(z, t, labels), transformer.eval()(z, t, labels))


def test_published_names_and_readable_text(written):
    run, transformer, _ = written
    assert load_file(run / GENERATOR / "ema.safetensors").keys() == transformer.state_dict().keys()
    assert transformer.state_dict().keys() >= ONLY_NAMES
    plain = json.loads((run / GENERATOR / GENERATOR_CARD).read_text())
    assert (plain["recipe"], plain["interpolant"]["path"], plain["num_steps"]) == ("sit-ti-2", "gvp", 7)


def test_diffusion_without_classes(build_transformer, tmp_path: Path):
    transformer = build_transformer()
    card = card_of(transformer, interpolant=None, class_names=None)
    write_generator(tmp_path, card, {"ema": transformer.state_dict()})
    assert read_generator(tmp_path).card == card


def test_a_generator_of_tokens(tmp_path: Path):
    tokens = LatentSpecification(channels=24, height=4, width=6, num_classes=5)
    transformer = MaskTransformer(find_recipe("maskgit-ti").transformer(tokens))
    card = card_of(
        transformer, family="maskgit", recipe="maskgit-ti", interpolant=None, shift=(), scale=(), schedule="cosine"
    )
    write_generator(tmp_path, card, {"ema": transformer.state_dict()})
    found = read_generator(tmp_path)
    assert (found.card, found.card.models_tokens) == (card, True)
    assert isinstance(found.transformer, MaskTransformer)
    assert found.transformer.config.depth == MASKGIT_SIZES["ti"].depth
    for name, parameter in transformer.named_parameters():
        assert torch.equal(found.transformer.get_parameter(name), parameter)
        assert found.transformer.get_parameter(name).requires_grad


def test_a_card_from_before_tokens_and_families(written):
    run, _, card = written
    plain = json.loads((run / GENERATOR / GENERATOR_CARD).read_text())
    assert plain["family"] == "sit"
    del plain["schedule"], plain["family"]
    (run / GENERATOR / GENERATOR_CARD).write_text(json.dumps(plain))
    assert read_generator(run).card == card
    assert not card.models_tokens


def test_writing_again_replaces(written):
    run, transformer, card = written
    (run / f".{GENERATOR}.part").mkdir()  # of a killed writer
    (run / f".{GENERATOR}.part" / "rubbish").write_text("")
    write_generator(run, replace(card, num_steps=9), {"ema": transformer.state_dict()})
    assert read_generator(run).card.num_steps == 9
    assert sorted(path.name for path in (run / GENERATOR).iterdir()) == ["ema.safetensors", GENERATOR_CARD]
    assert [path.name for path in run.iterdir()] == [GENERATOR]


def test_denormalizing_is_per_channel(written):
    z = torch.ones(1, 3, 2, 2)
    assert written[2].denormalize(z)[0, :, 0, 0].tolist() == pytest.approx([2.1, 0.3, 1.3])


def test_strictness(written):
    run, _, _ = written
    path = run / GENERATOR / "ema.safetensors"
    weights = load_file(path)
    weights["blocks.9.attn.qkv.weight"] = weights.pop("blocks.0.attn.qkv.weight")
    save_file(weights, path)
    with pytest.raises(UserError, match=r"1 missing \(blocks.0.attn.qkv.weight\); 1 unexpected"):
        read_generator(run)


def test_nothing_to_read(written, tmp_path: Path):
    with pytest.raises(UserError, match="Check the path"):
        read_generator(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="wait for its first samples"):
        read_generator(tmp_path / "empty")
    (written[0] / GENERATOR / GENERATOR_CARD).write_text('{"recipe": "sit-ti-2"}')
    with pytest.raises(UserError, match="describes no generator"):
        read_generator(written[0])
