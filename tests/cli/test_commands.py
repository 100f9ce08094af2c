"""The commands from end to end: fine-tune, evaluate, report; plans and help; an interruption of a real process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_journal, read_json
from eqvae.cli import COMMANDS, run

FINETUNE = [
    "finetune", "untrained:tiny-kl", "--data", "photos", "--max-steps", "2", "--image-size", "64", "--batch-size", "2",
    "--adversarial-weight", "0", "--perceptual", "none", "--num-validation-images", "2", "--num-statistics-images", "2",
    "--num-workers", "0", "--log-every", "1", "--precision", "fp32", "--device", "cpu",
]  # fmt: skip
EVALUATE = ["--data", "photos", "--num-images", "2", "--image-size", "64", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "finetuned"
    assert run([*FINETUNE, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def evaluated(finetuned) -> Path:
    """The folder of its evaluation."""
    out = finetuned.with_name("evaluated")
    assert run(["evaluate", str(finetuned), *EVALUATE, "--out", str(out)]) == 0
    return out


# Fine-tune, evaluate, report ----------------------------------------------------------------------------------------


def test_finetune_writes_a_run_and_sums_it_up(finetuned, capsys):
    assert {path.name for path in finetuned.iterdir()} == {
        "config.json", "environment.json", "journal.jsonl", "metrics.json", "checkpoint.safetensors", "autoencoder",
        "validation",
    }  # fmt: skip
    assert run([*FINETUNE, "--out", str(finetuned)]) == 0  # finished: says its figures again
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    assert line.startswith("equivariance error: rotation ")
    assert line.endswith(f"model in '{finetuned}'")


def test_the_exported_folder_is_diffusers_own(finetuned):
    from diffusers import AutoencoderKL

    from eqvae.autoencoders import load_autoencoder

    theirs = AutoencoderKL.from_pretrained(finetuned / "autoencoder").eval()
    ours = load_autoencoder(str(finetuned))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = theirs.decode(theirs.encode(x).latent_dist.mode()).sample
        assert torch.equal(ours.decode(ours.encode(x).mode()), expected)
    card = read_json(finetuned / "autoencoder" / "eqvae.json")
    assert card["fingerprint"] == ours.fingerprint()
    std, mean = (torch.tensor(card[name], dtype=torch.float64) for name in ("latent_std", "latent_mean"))
    pooled = (std.square() + mean.square()).mean() - mean.mean().square()  # of all values, whatever their channel
    assert theirs.config.scaling_factor == pytest.approx(1 / pooled.sqrt().item(), rel=1e-6)
    assert theirs.config.shift_factor == pytest.approx(mean.mean().item(), rel=1e-6, abs=1e-9)


def test_nothing_is_pickled(finetuned, evaluated):
    for folder in (finetuned, evaluated):
        suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert suffixes <= {".json", ".jsonl", ".safetensors", ".png"}


def test_evaluate_writes_figures_and_pictures(finetuned, evaluated, capsys):
    assert {path.name for path in evaluated.iterdir()} == {
        "config.json", "environment.json", "journal.jsonl", "metrics.json", "pictures.safetensors",
    }  # fmt: skip
    metrics = read_json(evaluated / "metrics.json")
    for name in ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "latent_std"):
        assert 0.0 < metrics[name] < 100.0
    assert metrics["num_images"] == 2
    assert run(["evaluate", str(finetuned), *EVALUATE, "--out", str(evaluated)]) == 0  # written anew
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("lpips")] == [
        "equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim",
        "rfd_efficientnet_lite0", "latent_std", "num_images",
    ]  # fmt: skip
    again = read_json(evaluated / "metrics.json")
    assert {key: value for key, value in again.items() if key != "images_per_sec"} == {
        key: value for key, value in metrics.items() if key != "images_per_sec"
    }


def test_the_runs_own_figures_are_those_of_evaluate(finetuned, evaluated):
    run_figures, metrics = read_json(finetuned / "metrics.json"), read_json(evaluated / "metrics.json")
    for name in ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "latent_std"):
        assert run_figures[name] == pytest.approx(metrics[name], rel=1e-4)


def test_the_batch_size_changes_no_figure(finetuned, evaluated, tmp_path):
    out = tmp_path / "one-by-one"
    assert run(["evaluate", str(finetuned), *EVALUATE, "--batch-size", "1", "--out", str(out)]) == 0
    one, many = read_json(out / "metrics.json"), read_json(evaluated / "metrics.json")
    assert one.keys() == many.keys()
    for name, value in many.items():
        if name != "images_per_sec":
            # Another batch size sums in another order, and may so round one pixel of a reconstruction otherwise.
            tolerance = {"psnr_db": 1e-4, "ssim": 1e-4, "rfd_efficientnet_lite0": 1e-3}.get(name, 1e-5)
            assert one[name] == pytest.approx(value, rel=tolerance, abs=1e-7), name


def test_report_writes_one_page(finetuned, evaluated, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["report", str(evaluated), str(finetuned), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    html = page.read_text()
    assert "<html" in html
    assert 'src="http' not in html


def test_a_report_does_not_replace_a_folder(evaluated, tmp_path, capsys):
    assert run(["report", str(evaluated), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line


# Configurations -----------------------------------------------------------------------------------------------------


def test_a_flag_overrides_the_yaml(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "autoencoder: untrained:tiny-kl\ndata: photos\nlearning_rate: 1e-5\nbatch-size: 4\nflip: false\n"
        "image_size: 128\nlr_warmup_steps: null\n"
    )
    assert run(["finetune", "--config", str(path), "--out", "x", "--dry-run", "True", "--batch-size", "2"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["learning_rate"], config["batch_size"], config["flip"]) == (1e-5, 2, False)
    assert config["autoencoder"] == "untrained:tiny-kl"


@pytest.mark.parametrize("order", ["first", "after the file", "last"])
def test_an_autoencoder_overrides_the_yaml(tmp_path, capsys, order):
    path = tmp_path / "run.yaml"
    path.write_text("autoencoder: sd-vae\ndata: photos\nimage_size: 128\n")
    name, file, rest = ["untrained:tiny-kl"], ["--config", str(path)], ["--out", "x", "--dry-run", "True"]
    arguments = {"first": name + file + rest, "after the file": file + name + rest, "last": rest + file + name}[order]
    assert run(["finetune", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["autoencoder"] == "untrained:tiny-kl"


def test_a_runs_own_configuration_can_be_given_again(finetuned, tmp_path, capsys):
    """What `config.json` holds is YAML too, but for what is no field."""
    saved = read_json(finetuned / "config.json")
    no_fields = ("command", "base_fingerprint", "num_data", "num_validation_data")
    fields_alone = {key: value for key, value in saved.items() if key not in (*no_fields, "mixture", "out")}
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(fields_alone))
    assert run(["finetune", "--config", str(path), "--out", saved["out"], "--dry-run", "True"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert {key: value for key, value in config.items() if key != "dry_run"} == {
        key: value for key, value in saved.items() if key not in (*no_fields, "dry_run")
    }


def test_a_dry_run_prints_its_plan_and_creates_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert run([*FINETUNE, "--out", str(out), "--dry-run", "True"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["max_steps"] == 2
    assert plan["config"]["lr_warmup_steps"] == 0  # resolved
    assert plan["latent_size"] == [4, 8, 8]
    assert plan["tflops_total"] == pytest.approx(2 * plan["tflops_per_step"])
    assert 0 < plan["tflops_per_step"] < 1
    assert 0 < plan["memory_gib"] < 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", ["before", "last"])
def test_a_boolean_flag_may_stand_alone(tmp_path, capsys, position):
    flags = ["--dry-run", "--compile", "--tensorboard", "--antialias", "--no-flip"]
    command, *rest = [*FINETUNE, "--out", str(tmp_path / "out")]
    assert run([command, *flags, *rest] if position == "before" else [command, *rest, *flags]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["autoencoder"] == "untrained:tiny-kl"
    assert [config[name] for name in ("compile", "tensorboard", "antialias", "flip")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lpips"], True),
        (["--no-lpips"], False),
        (["--lpips", "None"], None),
        (["--lpips", "false"], False),
        (["--lpips=True"], True),
        ([], None),
    ],
)
def test_a_boolean_that_may_be_none(arguments, expected):
    from eqvae.cli import parse
    from eqvae.runs.evaluate import EvaluateConfig

    config = parse(EvaluateConfig, "evaluate", [*arguments, "sd-vae", "--data", "photos", "--out", "x"])
    assert (config.lpips, config.autoencoder) == (expected, "sd-vae")


def test_a_bare_boolean_overrides_the_yaml(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("autoencoder: untrained:tiny-kl\ndata: photos\nimage_size: 128\nflip: true\n")
    assert run(["finetune", "--dry-run", "--config", str(path), "--no-flip", "--out", "x"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["flip"] is False


# Help ---------------------------------------------------------------------------------------------------------------


def flags_of(command: str) -> set[str]:
    from eqvae.runs.evaluate import EvaluateConfig
    from eqvae.runs.finetune import FinetuneConfig
    from eqvae.runs.report import ReportConfig
    from eqvae.runtime.run_folder import flat_fields

    config = {"finetune": FinetuneConfig, "evaluate": EvaluateConfig, "report": ReportConfig}[command]
    names = {field.name for field in flat_fields(config)} - {"autoencoder", "folders"}
    return {"--" + name.replace("_", "-") for name in names}


@pytest.mark.parametrize("command", ["finetune", "evaluate", "report"])
def test_help_names_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert stop.value.code in (0, None)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"eqvae {command}" in captured.out
    assert [flag for flag in flags_of(command) if flag not in captured.out] == []


def test_the_usage_names_every_command(capsys):
    for argument in ("--help", "-h", "help"):
        assert run([argument]) == 0
        printed = capsys.readouterr().out
        assert all(f"  {command} " in printed for command in COMMANDS)


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("eqvae ")


# A real process -----------------------------------------------------------------------------------------------------

MAIN = [sys.executable, "-c", "from eqvae.cli import main; main()"]


def test_a_folder_that_another_process_writes_into(tmp_path, refused_while_held):
    refused_while_held([*FINETUNE, "--out", str(tmp_path / "run")], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_leaves_a_checkpoint_and_goes_on(tmp_path, number):
    out = tmp_path / "run"
    arguments = [*FINETUNE, "--max-steps", "30", "--validate-every", "1000", "--num-workers", "1", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline_sec = time.monotonic() + 120
        while not any(record["kind"] == "train" for record in read_journal(out)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline_sec
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"eqvae: interrupted, {number.name} at step ")
    assert (out / "checkpoint.safetensors").exists()
    assert not (out / "metrics.json").exists()
    done = max(record.get("step", 0) for record in read_journal(out))
    assert 0 < done < 30

    second = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert second.returncode == 0, second.stderr
    assert read_json(out / "metrics.json")["num_steps"] == 30
    steps = [record["step"] for record in read_journal(out) if record["kind"] == "train"]
    assert steps == list(range(1, 31))
