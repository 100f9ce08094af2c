"""Weights in files as training codes leave them: containers, prefixes, averages, and what is refused."""

import argparse
import pathlib
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eqvae.artifacts.files import load_strictly, read_json
from eqvae.artifacts.parsing import parse_json
from eqvae.artifacts.weights import choose_set, describe_choice, find_sets, plain_names, read_named
from eqvae.errors import UserError

ANCHORS = ("encoder.weight", "decoder.weight")


def state(value: float = 0.0) -> dict[str, Tensor]:
    names = ("encoder.weight", "encoder.norm.bias", "decoder.weight")
    return {name: torch.full((2,), value + index) for index, name in enumerate(names)}


def prefixed(prefix: str, value: float = 0.0) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state(value).items()}


def found(path: Path, which: Any = None) -> tuple[dict[str, Tensor], str | None]:
    """The weights that are taken, and what is said of them."""
    named = read_named(path)
    chosen, other = choose_set(named, find_sets(named, ANCHORS), which)
    return named.take(chosen.names), describe_choice(named, chosen, other)


def is_state(weights: dict[str, Tensor], value: float = 0.0) -> bool:
    return weights.keys() == state().keys() and all(torch.equal(weights[name], t) for name, t in state(value).items())


class _TrainConfig:
    """A class of somebody's training script."""

    def __init__(self) -> None:
        self.lr = 1e-4


CONTAINERS: dict[str, Any] = {
    "bare": state(),
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "compiled parts": {name.replace("encoder.", "encoder._orig_mod."): t for name, t in state().items()},
    "lightning": {"state_dict": state(), "epoch": 3, "hyper_parameters": {"lr": 1e-4}, "callbacks": {}},
    "lightning module": {"state_dict": prefixed("vae.")},
    "first stage": {"state_dict": prefixed("first_stage_model.") | {"model.diffusion_model.x": torch.zeros(1)}},
    "args": {"model": state(), "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("a")), "steps": 3},
    "numpy": {"model": state(), "best": np.float64(1.5), "history": np.arange(3), "rng": np.random.default_rng(0)},
    "path": {"model": state(), "out": pathlib.PosixPath("/tmp/x")},
    "own class": {"model": state(), "config": _TrainConfig()},
    "defaultdict": {"model": OrderedDict(state()), "log": defaultdict(list, loss=[1.0])},
    "nested": {"nets": {"vae": {"state_dict": state()}}},
    "apart": {"encoder": {"weight": state()["encoder.weight"], "norm": {"bias": state()["encoder.norm.bias"]}},
              "decoder": {"weight": state()["decoder.weight"]}},
    "optimizer": {"model": state(), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}]}},
    "the same twice": (lambda own: {"model": own, "state_dict": own})(state()),
    "discriminator": {"vae": state(), "discriminator": state(5.0), "opt": {}},
}  # fmt: skip


@pytest.mark.parametrize("content", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_and_prefixes_are_no_obstacle(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    weights, line = found(tmp_path / "a.ckpt")
    assert is_state(weights)
    assert line is None or line.startswith(f"'{tmp_path / 'a.ckpt'}': 3 weights of ")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert is_state(found(tmp_path / "old.ckpt")[0])


def test_the_kind_of_file_is_what_its_bytes_say(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.ckpt")
    assert is_state(found(tmp_path / "a.ckpt")[0])


def test_averaged_weights_beside_raw_ones_are_taken_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": state(), "ema": state(5.0), "opt": {"state": {}}, "args": None}, path)
    weights, line = found(path)
    assert is_state(weights, 5.0)
    how = "--weights raw, or #raw behind its name, takes them"
    assert line == f"'{path}': 3 averaged weights of 'ema'; not those of 'model' ({how})"
    assert is_state(found(path, "raw")[0])
    for name in ("ema_model", "model_ema", "params_ema", "ema_state_dict", "state_dict_ema", "swa"):
        torch.save({"model": state(), name: state(5.0)}, path)
        assert is_state(found(path)[0], 5.0), name
    torch.save({"model": state()}, path)
    with pytest.raises(UserError, match="holds no averaged weights, but those of 'model'"):
        found(path, "ema")


def test_ldms_averages_get_their_names_back(tmp_path: Path) -> None:
    averaged = {"model_ema." + name.replace(".", ""): t for name, t in state(5.0).items() if "norm" not in name}
    others = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    loss = {"loss.discriminator.weight": torch.ones(1), "loss.logvar": torch.ones(1)}
    torch.save({"state_dict": state() | averaged | others | loss}, tmp_path / "a.ckpt")
    weights, line = found(tmp_path / "a.ckpt")
    assert torch.equal(weights["encoder.weight"], state(5.0)["encoder.weight"])
    assert torch.equal(weights["encoder.norm.bias"], state()["encoder.norm.bias"])  # frozen, so not averaged
    assert line is not None and "averaged weights of 'state_dict.model_ema'" in line and "left out: loss (2)" in line
    assert is_state(found(tmp_path / "a.ckpt", "raw")[0])


def test_averages_of_something_else_are_no_averages_of_this(tmp_path: Path) -> None:
    diffusion = {"model.x": torch.zeros(1), "model_ema.modelx": torch.ones(1)}
    torch.save({"state_dict": prefixed("first_stage_model.") | diffusion}, tmp_path / "a.ckpt")
    weights, line = found(tmp_path / "a.ckpt")
    assert is_state(weights) and line is not None and "--weights" not in line


def test_training_state_is_left_out_and_said(tmp_path: Path) -> None:
    extra = {"foundation_model.blocks.0.weight": torch.ones(1), "linear_proj.weight": torch.ones(1)}
    torch.save({"state_dict": state() | extra}, tmp_path / "vavae.pt")
    weights, line = found(tmp_path / "vavae.pt")
    assert is_state(weights)
    assert line is not None and line.endswith("left out: foundation_model (1), linear_proj (1)")
    torch.save(state() | {"scale.weight": torch.ones(1)}, tmp_path / "other.pt")
    assert "scale.weight" in found(tmp_path / "other.pt")[0]  # for the model to refuse: it may change what is decoded


def test_one_of_several_sets_is_never_chosen_silently(tmp_path: Path) -> None:
    torch.save({"first": state(), "second": state(1.0)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="2 sets of weights: 'first', 'second'"):
        found(tmp_path / "a.pt")
    torch.save({"ema_0.999": state(), "ema_0.9999": state(1.0), "model": state()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="2 sets of weights"):
        found(tmp_path / "a.pt")
    torch.save(prefixed("module.") | state(1.0), tmp_path / "a.pt")
    with pytest.raises(UserError, match="twice"):
        found(tmp_path / "a.pt")


def test_names_without_an_anchor_lose_what_all_begin_with(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.0.weight": torch.ones(2), "module.2.bias": torch.ones(1)}}, tmp_path / "a.pth")
    assert set(plain_names(read_named(tmp_path / "a.pth"))) == {"0.weight", "2.bias"}


# Hostile files -------------------------------------------------------------------------------------------------------


def refusal(content: Any, path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        found(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_containers_that_hold_themselves(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": {}}
    content["model"]["model"] = content["state_dict"] = content
    assert "no named weights" in refusal(content, tmp_path / "a.pt")
    content["vae"] = state()
    torch.save(content, tmp_path / "a.pt")
    assert is_state(found(tmp_path / "a.pt")[0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12), torch.zeros(2, dtype=torch.half).expand(10**6, 10**6, 2),
        torch.zeros(2, 2).to_sparse(), torch.empty(2, device="meta"), torch.zeros(2, dtype=torch.complex64),
    ],
)  # fmt: skip
def test_tensors_that_are_no_arrays_of_numbers(tensor: Tensor, tmp_path: Path) -> None:
    assert "encoder.norm.bias" in refusal(state() | {"encoder.norm.bias": tensor}, tmp_path / "a.pt")


def test_packed_archives_are_refused(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for info in source.infolist():
            packed.writestr(info.filename, source.read(info))
    with pytest.raises(UserError, match="packed or damaged"):
        read_named(tmp_path / "b.pt")


@pytest.mark.parametrize("step", [b"\x85", b"\x85q\x000h\x00"], ids=["at once", "through the memo"])
def test_tuples_in_tuples_would_crash_the_interpreter(step: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x02})" + step * 300_000 + b"K\x01s.")
    with pytest.raises(UserError, match="truncated or no weight file"):
        read_named(tmp_path / "a.pt")


def test_newer_pickles_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}, protocol=5))
    with pytest.raises(UserError, match="truncated or no weight file"):
        read_named(tmp_path / "a.pt")


def test_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    import json
    import struct

    header = json.dumps({"weight": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    named = read_named(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a.safetensors.*weight"):
        load_strictly(
            torch.nn.Linear(1, 2, bias=False).eval(),
            {name: t.reshape(2, 1) for name, t in named.take(plain_names(named)).items()},
            source=str(named.path),
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_named(value: float) -> None:
    model = torch.nn.Linear(2, 2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["bias"][1] = value
    with pytest.raises(UserError, match=r"'a/b.ckpt' has diverged or is damaged: 'bias' holds a number that is not"):
        load_strictly(model, weights, source="a/b.ckpt")


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', f'{{"a": {"9" * 5000}}}', "[" * 5000, '"a"', "", "\xff"]
)
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert parse_json('{"a": [1.5, 2]}') == {"a": [1.5, 2]}
