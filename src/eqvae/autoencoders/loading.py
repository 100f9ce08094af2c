"""From a name to an autoencoder: presets, hub ids, folders and files, loaded strictly, without running code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eqvae.artifacts.files import load_strictly, read_json
from eqvae.artifacts.names import AUTOENCODER, CONFIG
from eqvae.autoencoders.layouts import (
    Published,
    find_pair,
    ldm_to_diffusers,
    pair_to_diffusers,
    read_ldm,
    rename_legacy_attention,
)
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.autoencoders.weight_files import WEIGHT_FILES, fetch_folder, looks_like_hub_id, read_weights
from eqvae.errors import UserError, nearest_name

if TYPE_CHECKING:
    from eqvae.autoencoders.families import DiffusersAutoencoder

_KINDS = (
    "a diffusers folder, an eqvae run, a folder with 'vae', a TAESD pair, or an LDM or VQ-GAN .ckpt/.safetensors file"
)


def load_autoencoder(name: str) -> Autoencoder:
    """Load an autoencoder in fp32, in evaluation mode, on the CPU.

    Args:
        name: A preset, `untrained:PRESET` (random weights, seed 0), a hub id, or a path: a diffusers folder, an eqvae
            run's folder, a folder with a `vae` subfolder, a folder (or the encoder file) of a TAESD pair, or a `.ckpt`
            or `.safetensors` file of LDM, taming-transformers' VQ-GAN or LlamaGen's tokenizer. A preset comes before a
            path of the same name: write `./NAME` for the path.

    Returns:
        The autoencoder.

    Raises:
        UserError: If there is no such autoencoder, or its files are truncated, hold code, or do not fit exactly.
    """
    if name.startswith(UNTRAINED):
        return build_autoencoder(name.removeprefix(UNTRAINED), seed=0)
    if name in PRESETS:
        return _load_preset(name)
    path = Path(name).expanduser()
    if path.exists():
        return _load_path(path, name)
    if looks_like_hub_id(name):
        return _load_diffusers(fetch_folder(name, ""), name)
    if "/" not in name and not path.suffix:
        raise UserError(f"'{name}' is neither a preset nor a path", nearest_name(name, PRESETS))
    raise UserError(f"'{name}' does not exist", "Check the path")


def build_autoencoder(name: str, *, seed: int) -> Autoencoder:
    """Build a preset's architecture with random weights; the global random state is left as it was.

    Args:
        name: A preset.
        seed: Of the weights: the same seed gives the same weights.

    Returns:
        The untrained autoencoder, in evaluation mode, on the CPU.

    Raises:
        UserError: If there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset '{name}' to build untrained", nearest_name(name, PRESETS))
    architecture = PRESETS[name].architecture
    family = _family(architecture.class_name, name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return family.build(architecture.class_name, architecture.config, name=UNTRAINED + name).eval()


def _family(class_name: str, source: str) -> "type[DiffusersAutoencoder]":
    """Look up a family; they are imported here because diffusers takes seconds to import."""
    from eqvae.autoencoders.families import find_family

    return find_family(class_name, source)


def _load_preset(name: str) -> Autoencoder:
    preset = PRESETS[name]
    if preset.packaged is not None:
        return _load_diffusers(preset.packaged, name)
    if preset.hub is not None:
        return _load_diffusers(fetch_folder(preset.hub, preset.subfolder), name)
    raise UserError(
        f"The weights of '{name}' are not published in a form that can be fetched",
        f"Give the path of their folder or file, or '{UNTRAINED}{name}' for random weights",
    )


def _load_path(path: Path, name: str) -> Autoencoder:
    if path.is_dir():
        for folder in (path / AUTOENCODER, path / "vae", path):
            if (folder / CONFIG).is_file():
                return _load_diffusers(folder, name)
    if (pair := find_pair(path)) is not None:
        return _fill(pair_to_diffusers(*map(read_weights, pair)), name)
    if path.is_dir():
        raise UserError(f"'{path}' holds no autoencoder", f"Give {_KINDS}")
    published = read_ldm(read_weights(path))
    if published is None:
        raise UserError(f"'{path}' holds no autoencoder under CompVis' names", f"Give {_KINDS}")
    num_levels = len(published.config["block_out_channels"])
    return _fill(published, name, rename=lambda state, model: ldm_to_diffusers(state, model, num_levels))


def _load_diffusers(folder: Path, name: str) -> Autoencoder:
    config = read_json(folder / CONFIG)
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise _no_autoencoder(folder, config)
    _family(class_name, str(folder / CONFIG))  # an unknown class is told before gigabytes are read
    weights = next((file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise UserError(f"'{folder}' has a {CONFIG} but no weights ({WEIGHT_FILES[0]})", "Fetch or write it again")
    state = rename_legacy_attention(read_weights(folder / weights))
    return _fill(Published(class_name=class_name, config=config, state=state), name)


def _no_autoencoder(folder: Path, config: Mapping[str, Any]) -> UserError:
    """Say what a folder's `config.json` describes instead of an autoencoder."""
    if config.get("command") == "finetune":
        return UserError(
            f"The fine-tuning run in '{folder}' has not finished and holds no autoencoder yet",
            "The same 'eqvae finetune' command goes on with it",
        )
    if "command" in config:
        return UserError(
            f"'{folder}' was written by 'eqvae {config['command']}' and holds no autoencoder", f"Give {_KINDS}"
        )
    return UserError(f"'{folder / CONFIG}' names no autoencoder ('_class_name')", f"Give {_KINDS}")


def _fill(published: Published, name: str, *, rename: Callable[..., dict[str, Tensor]] | None = None) -> Autoencoder:
    """Build a model without weights, then give it exactly these, renamed to what it expects."""
    class_name, state = published.class_name, published.state
    family = _family(class_name, name)
    with torch.device("meta"):
        try:
            autoencoder = family.build(class_name, published.config, name=name)
        except Exception as error:  # whatever a wrong config breaks in diffusers' constructors, the input is at fault
            raise UserError(f"The config of '{name}' does not describe an {class_name} ({error})", "Mend it") from error
    model = autoencoder.model
    load_strictly(model, rename(state, model.state_dict()) if rename else state, source=name)
    return autoencoder.eval()
