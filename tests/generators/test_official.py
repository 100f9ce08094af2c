"""Weight files: published layouts load strictly, everything else is refused in one line."""

import argparse
import pickle
from dataclasses import replace

import pytest
import torch

from eqvae.artifacts.files import write_tensors
from eqvae.errors import UserError
from eqvae.generators.checkpoints import load_transformer
from eqvae.generators.families import find_recipe
from eqvae.generators.official import read_official
from eqvae.generators.protocol import LatentSpecification


def _forward(transformer):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 4, 6, generator=generator)
    return transformer(z, torch.tensor([1.0, 900.0]), torch.tensor([0, 5]))


def test_ours_come_back(build_transformer, tmp_path):
    transformer = build_transformer(teacher_channels=7, projector_width=16)
    write_tensors(tmp_path / "ema.safetensors", transformer.state_dict())
    state = read_official(tmp_path / "ema.safetensors")["ema"]
    loaded = load_transformer(transformer.config, state, source="ema.safetensors")
    assert torch.equal(_forward(loaded), _forward(transformer))
    assert not loaded.training
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("which", ["ema", "model"])
def test_training_checkpoints_hold_two_sets_of_weights(build_transformer, tmp_path, which):
    states = {"ema": build_transformer().state_dict(), "model": build_transformer(qk_norm=True).state_dict()}
    states["model"] = {f"module._orig_mod.{name}": value for name, value in states["model"].items()}
    others = {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(model="DiT-XL/2"), "steps": 7}
    torch.save(states | others, tmp_path / "0000007.pt")
    state = read_official(tmp_path / "0000007.pt")[which]
    assert set(state) == set(build_transformer(qk_norm=which == "model").state_dict())


def test_a_plain_state_dict_in_half_precision(build_transformer, tmp_path):
    state = {name: value.half() for name, value in build_transformer().state_dict().items()}
    torch.save(state, tmp_path / "DiT.pt")
    read = read_official(tmp_path / "DiT.pt")["ema"]
    assert all(value.dtype == torch.float32 for value in read.values())
    assert all(torch.equal(read[name], state[name].float()) for name in state)


def test_a_file_with_one_set_of_weights_is_sampled_from_it(build_transformer, tmp_path):
    torch.save({"model": build_transformer().state_dict(), "opt": {}}, tmp_path / "raw.pt")
    assert read_official(tmp_path / "raw.pt").keys() == {"ema"}


def test_a_config_fits_itself_to_weights():
    latents = LatentSpecification(channels=3, height=4, width=4, num_classes=5)
    recipe = find_recipe("dit-ti-2")
    for changes in ({}, {"out_channels": 3}, {"qk_norm": True}, {"teacher_channels": 7, "projector_width": 16}):
        config = replace(recipe.transformer(latents), **changes)
        weights = config.build().state_dict()
        assert recipe.fit(weights, codebook_size=None) == config
        load_transformer(config, weights, source="here")
    unconditional = recipe.transformer(replace(latents, num_classes=0))
    assert recipe.fit(unconditional.build().state_dict(), codebook_size=None) == unconditional
    tokens, maskgit = replace(latents, channels=11), find_recipe("maskgit-ti")
    assert maskgit.fit(maskgit.transformer(tokens).build().state_dict(), codebook_size=11).latents == tokens


def test_repas_early_checkpoints_count_blocks_again(build_transformer, tmp_path):
    transformer = build_transformer()
    early = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in transformer.state_dict().items()}
    torch.save(early, tmp_path / "early.pt")
    joined = read_official(tmp_path / "early.pt")["ema"]
    assert torch.equal(_forward(load_transformer(transformer.config, joined, source="early.pt")), _forward(transformer))


def test_weights_that_do_not_fit_are_named(build_transformer):
    transformer = build_transformer()
    state = transformer.state_dict()
    del state["blocks.0.mlp.fc1.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 5, 24)
    with pytest.raises(UserError) as caught:
        load_transformer(transformer.config, state, source="wrong.pt")
    message = str(caught.value)
    for part in (
        "'wrong.pt'",
        "1 missing (blocks.0.mlp.fc1.bias)",
        "1 unexpected (extra.weight)",
        "(1, 5, 24) instead of",
    ):
        assert part in message
    assert "\n" not in message


class _Code:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_a_file_that_holds_code_is_refused(tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"ema": _Code()}, protocol=2))
    torch.save({"ema": _Code()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match="refused|no weight file"):
            read_official(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.pt", None, "does not exist"),
        ("missing.safetensors", None, "does not exist"),
        ("torn.pt", b"PK\x03\x04 torn", "truncated|no weight file"),
        ("torn.safetensors", b"torn", "truncated"),
        ("empty.pt", b"", "truncated|no weight file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_official(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_without_weights_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="numbers.pt' holds no named weights"):
        read_official(tmp_path / "numbers.pt")
