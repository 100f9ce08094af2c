"""The page of a model on the hub: what it is, its figures and where they come from, how to load it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from eqvae.artifacts.files import read_json
from eqvae.artifacts.names import (
    AUTOENCODER,
    CONFIG,
    ENVIRONMENT,
    GENERATOR,
    GENERATOR_CARD,
    METRICS,
    MODEL_CARD,
)  # fmt: skip
from eqvae.autoencoders.factors import loading_code, pipeline_advice
from eqvae.autoencoders.presets import PRESETS
from eqvae.drawing.tables import MISSING, markdown_table
from eqvae.errors import readable

_PAPER = (
    "[EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling]"
    "(https://arxiv.org/abs/2502.09509)"
)

_BEFORE = "before_"

_WORD_WITH_SLASH = re.compile(r"[^\s=,'\"()\[\]]*[/\\][^\s=,'\"()\[\]]*")

_WINDOWS = re.compile(r"[A-Za-z]:[/\\]|\\\\|\.{1,2}\\|~\\")
"""How a path of Windows begins."""

_NO_QUALITY = ("num_", "training_", "images_per_sec", "latent_", _BEFORE)
"""How figures of `metrics.json` begin that measure no quality."""


def autoencoder_page(run: Path, name: str, *, license_name: str | None, pictures: Sequence[str]) -> str:
    """Write the page of a fine-tuned autoencoder from what its run recorded."""
    card, metrics = read_json(run / AUTOENCODER / MODEL_CARD), read_json(run / METRICS)
    config = read_json(run / AUTOENCODER / CONFIG)
    pipelines = [f"\n\n{line}." for line in pipeline_advice(config)]
    measured = {key: value for key, value in metrics.items() if not key.startswith(_NO_QUALITY)}
    rows = [[key, _number(metrics.get(_BEFORE + key)), _number(value)] for key, value in measured.items()]
    data = without_local_paths(card["data"])
    sections = {
        "": f"An autoencoder for latent generative models, fine-tuned from `{without_local_paths(card['base'])}` on "
        f"`{data}` ({card['num_steps']} optimizer steps) {_told_method(card['recipe'])}",
        "Use": f"```python\n{loading_code(config, name)}\n```\n\n"
        "Its latents are not those of the base: a generator has to be trained, or adapted, on them. Scaling and shift "
        "factors in `config.json` were measured on them." + "".join(pipelines),
        "Figures": f"Measured by `eqvae` on {metrics.get('num_images', 'some')} images of "
        f"`{without_local_paths(card['recipe'].get('validation_data', ''))}` before and after fine-tuning; "
        "`metrics.json` has all.\n\n" + markdown_table(["", "base", "this model"], rows),
        **_pictures(
            pictures,
            "Rows: images x; the transformed image encoded and decoded, D(E(τ∘x)); the transformed "
            "latent decoded, D(τ∘E(x)). Before and after fine-tuning.",
        ),
        **_provenance(run, license_name),
    }
    base = PRESETS[card["base"]].hub if card["base"] in PRESETS else None
    return _page(name, sections, license_name, measured, task="image reconstruction", data=data, base_model=base)


def _told_method(recipe: Mapping[str, Any]) -> str:
    """Say how latents were shaped: EQ-VAE's claim is its own; cards from before there were others are EQ-VAE's."""
    mixture = recipe.get("mixture", "eq(")
    if mixture.startswith("eq("):
        return f"as in {_PAPER}: scaling and rotating its latents scales and rotates its pictures."
    return f"with `--method '{without_local_paths(mixture)}'` of `eqvae` (which began as {_PAPER})."


def generator_page(run: Path, name: str, *, license_name: str | None, pictures: Sequence[str]) -> str:
    """Write the page of a trained generator from what its run recorded."""
    card, metrics = read_json(run / GENERATOR / GENERATOR_CARD), read_json(run / METRICS)
    measured = {key: value for key, value in metrics.items() if not key.startswith(_NO_QUALITY)}
    decoder, folder = without_local_paths(card["autoencoder"]), name.split("/")[-1]
    sections = {
        "": f"A `{card['recipe']}` of latents of `{decoder}`, trained for {card['num_steps']} steps with `eqvae`, the "
        f"software of {_PAPER}.",
        "Use": f"```sh\nhf download {name} --local-dir {folder}\n"
        f"eqvae sample {folder} --autoencoder {decoder} --num-samples 100 --out samples\n```\n\n"
        "Its weights have the parameter names of the published model; `eqvae convert --to official` writes them as "
        "that model's own code reads them.",
        "Figures": "At the end of training (`metrics.json`).\n\n"
        + markdown_table(["", "this model"], [[key, _number(value)] for key, value in measured.items()]),
        **_pictures(pictures, "Samples at the end of training."),
        **_provenance(run, license_name),
    }
    data = without_local_paths(read_json(run / CONFIG)["latents"])
    return _page(name, sections, license_name, measured, task="image generation", data=data, base_model=None)


def without_local_paths(value: Any) -> Any:
    """Keep names and hub ids, and of local paths only the end: where a file lay is nobody's business."""
    if isinstance(value, Mapping):
        return {_without_places(key): without_local_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(each) for each in value]
    return _without_places(value) if isinstance(value, str) else value


def _without_places(text: str) -> str:
    """Cut a path, or each in a command, a `NAME=PATH` or a mixture of methods; what is left can be written."""
    text = readable(text)
    flag, equals, value = text.partition("=")
    if equals and flag.startswith("--") and _is_local(value):
        return flag + equals + _end(value)  # which may hold spaces
    return _end(text) if _is_local(text) else _WORD_WITH_SLASH.sub(lambda word: _end(word[0]), text)


def _end(path: str) -> str:
    """Keep the last part of a local path."""
    if not _is_local(path):
        return path
    return re.split(r"[/\\]" if _WINDOWS.match(path) else "/", path.rstrip("/\\"))[-1] or path


def _is_local(path: str) -> bool:
    """Whether it can be no hub id: by how it begins, or since its folder is here."""
    begins = path.startswith(("/", "~", "../", "./", "file:")) or _WINDOWS.match(path) is not None
    return begins or ("/" in path and Path(path).parent.is_dir())


def _page(
    name: str,
    sections: Mapping[str, str],
    license_name: str | None,
    measured: Mapping[str, Any],
    *,
    task: str,
    data: str,
    base_model: str | None,
) -> str:
    results = [
        EvalResult(
            task_type=task.replace(" ", "-"), task_name=task.capitalize(), dataset_type=data, dataset_name=data,
            metric_type=key, metric_value=value,
        )
        for key, value in measured.items()
        if isinstance(value, int | float)
    ]  # fmt: skip
    header = ModelCardData(
        license=license_name, library_name="diffusers" if "reconstruction" in task else "eqvae", base_model=base_model,
        tags=["eq-vae", "autoencoder" if "reconstruction" in task else "latent-generator"],
        model_name=name.split("/")[-1], eval_results=results or None,
    )  # fmt: skip
    body = [f"# {name.split('/')[-1]}"]
    for title, text in sections.items():
        body += [f"## {title}", text] if title else [text]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def _pictures(names: Sequence[str], caption: str) -> dict[str, str]:
    return {"Pictures": "\n\n".join([*(f"![{name}]({name})" for name in names), caption])} if names else {}


def _provenance(run: Path, license_name: str | None) -> dict[str, str]:
    """Say how the model came to be, and under which licence it is."""
    environment, config = read_json(run / ENVIRONMENT), read_json(run / CONFIG)
    made = ", ".join(
        f"{what} {environment[key]}"
        for what, key in (("eqvae", "eqvae"), ("commit", "commit"), ("torch", "torch"), ("on", "date"))
        if environment.get(key)
    )
    command = " ".join(without_local_paths(environment.get("command", [])))
    rows = [[f"`{key}`", f"`{without_local_paths(value)}`"] for key, value in config.items() if value is not None]
    return {
        "Recipe": f"`{command}`\n\n{made}; {environment.get('device', 'device unknown')}.\n\n"
        f"<details><summary>All {len(rows)} settings</summary>\n\n{markdown_table(['', ''], rows, num_text_columns=2)}"
        "\n\n</details>",
        "Licence": license_name or "Not stated. Weights made from others are bound by the licence of their base.",
    }


def _number(value: Any) -> str:
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
