"""What goes to the hub: loads again from there, says where its figures come from, and nothing of this machine."""

import os
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled

from eqvae.artifacts.files import read_json, write_json
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.factors import loading_code
from eqvae.drawing.model_page import without_local_paths
from eqvae.errors import UserError
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.push import PushConfig, push
from eqvae.runtime.run_folder import from_flat


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned autoencoder."""
    out = tmp_path_factory.mktemp("push") / "run"
    finetune(
        from_flat(
            FinetuneConfig, autoencoder="untrained:tiny-kl", data="photos", out=out, max_steps=1, image_size=64,
            batch_size=1, adversarial_weight=0.0, perceptual="none", num_workers=0, num_validation_images=1,
            num_statistics_images=1, device="cpu",
        )
    )  # fmt: skip
    return out


def test_a_folder_is_what_diffusers_loads_with_its_card(run: Path, tmp_path: Path):
    where = push(PushConfig(run=run, name=f"{tmp_path}/mine", license="mit"))
    assert Path(where) == tmp_path / "mine"
    assert AutoencoderKL.from_pretrained(where) is not None
    own, theirs = load_autoencoder(str(run)), load_autoencoder(where)
    assert theirs.fingerprint() == own.fingerprint()
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    metrics = read_json(run / "metrics.json")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert found["psnr_db"] == pytest.approx(metrics["psnr_db"])
    assert f"{metrics['before_psnr_db']:.4g}" in card.text and f"{metrics['psnr_db']:.4g}" in card.text
    for name in ("step_000000.png", "step_000001.png"):
        assert f"({name})" in card.text and (tmp_path / "mine" / name).is_file()
    for file in (tmp_path / "mine").iterdir():
        if file.suffix in (".md", ".json"):
            assert str(run.parent) not in file.read_text()
    bytes_that_are_no_text = read_json(run / "autoencoder" / "eqvae.json") | {"data": os.fsdecode(b"caf\xe9")}
    write_json(run / "autoencoder" / "eqvae.json", bytes_that_are_no_text)
    push(PushConfig(run=run, name=where))  # again
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert "`caf\\xe9`" in card.text and card.data.eval_results[0].dataset_name == "caf\\xe9"
    (tmp_path / "mine" / ".git").mkdir()
    with pytest.raises(UserError, match=r"also holds \.git"):
        push(PushConfig(run=run, name=where))
    assert (tmp_path / "mine" / ".git").is_dir() and not list(tmp_path.glob(".*.part"))
    (tmp_path / "mine" / ".git").rmdir()
    (tmp_path / "link").symlink_to(where)
    push(PushConfig(run=run, name=f"{tmp_path}/link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "mine" / "README.md").is_file()


def test_the_hub_gets_the_same_folder(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert push(PushConfig(run=run, name="somebody/mine", dry_run=True)) == str(run / "hub")
    expected = {file.name: file.read_bytes() for file in (run / "hub").iterdir()}
    assert 'from_pretrained("somebody/mine")' in expected["README.md"].decode()
    header = expected["README.md"].decode().split("---")[1]
    assert "license" not in yaml.safe_load(header) and b"Not stated" in expected["README.md"]
    uploaded = {}

    class Created(str):
        repo_id = "somebody/mine"

    def upload(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()}, repo_id=repo_id)

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **options: Created("https://hub/somebody/mine"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push(PushConfig(run=run, name="somebody/mine")) == "https://hub/somebody/mine"
    assert uploaded == expected | {"repo_id": "somebody/mine"}


def test_wrong_input_writes_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(says: str, **changes: object) -> None:
        with pytest.raises(UserError, match=says):
            push(PushConfig(**{"run": run, "name": f"{tmp_path}/new"} | changes))
        assert not (tmp_path / "new").exists()

    def offline(*args: object, **options: object) -> None:
        raise OfflineModeIsEnabled("no network")

    def no_answer(*args: object, **options: object) -> None:
        raise type("ConnectError", (Exception,), {"__module__": "httpx"})("no answer")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    monkeypatch.chdir(tmp_path)
    fails("holds no trained", run=tmp_path)
    fails("does not exist", run=tmp_path / "new")
    fails("no repository's name", name="a/b/c")
    fails("can't be reached .*--dry-run", name="somebody/mine")
    monkeypatch.setattr(HfApi, "create_repo", no_answer)
    fails(r"can't be reached \(ConnectError\).*--dry-run", name="somebody/mine")
    fails("where you are, or above it", name="./.")
    fails("where you are, or above it", name="../")
    fails("no repository's name", name=".")
    (tmp_path / "taken").mkdir()
    fails("Write './taken'", name="taken")
    (tmp_path / "taken" / "letter.txt").touch()
    fails("holds no pushed model", name="./taken")


def test_where_files_lay_is_nobodys_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "latents").mkdir(parents=True)
    said = {
        "/home/me/secret/pictures": "pictures",
        "--data=/home/me/secret/pictures": "--data=pictures",
        "--data=/home/my self/pictures": "--data=pictures",
        "taesd=~/models/taesd": "taesd=taesd",
        "runs/latents": "latents",
        "eq + /home/me/m.py:Mine(p=0.5)": "eq + m.py:Mine(p=0.5)",
        "stabilityai/sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
        "hf:frgfm/imagewoof/320px:train": "hf:frgfm/imagewoof/320px:train",
        "https://hub/somebody/mine": "https://hub/somebody/mine",
        "C:\\Users\\my self\\pictures": "pictures",
        "--data=d:/my self/pictures": "--data=pictures",
        "eq + C:\\Users\\me\\m.py:Mine(p=0.5)": "eq + m.py:Mine(p=0.5)",
        "taesd=..\\models\\taesd": "taesd=taesd",
        "\\\\server\\me\\pictures": "pictures",
        "\\\\server\\me": "me",
        "file:///home/my self/pictures": "pictures",
        "file:///C:/Users/me/pictures/": "pictures",
        "caf\\xe9": "caf\\xe9",
    }
    assert without_local_paths(list(said)) == list(said.values())
    assert without_local_paths({"/home/me/m.py": "digest", "steps": 3}) == {"m.py": "digest", "steps": 3}


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({"_class_name": "AutoencoderKL"}, ["from diffusers import AutoencoderKL"]),
        ({"_class_name": "PooledAutoencoderTiny"}, ["from eqvae.autoencoders.tiny import PooledAutoencoderTiny"]),
        ({"_class_name": "AutoencoderKL", "padding_mode": "reflect"}, ["from eqvae import set_padding_mode"]),
    ],
)
def test_a_card_says_how_its_model_is_loaded(config, lines):
    code = loading_code(config, "me/mine")
    assert set(lines) <= set(code.splitlines())
    assert ("set_padding_mode(autoencoder" in code) == ("padding_mode" in config)
    compile(code, "card", "exec")
    for line in code.splitlines():
        if line.startswith("from "):
            exec(line)
