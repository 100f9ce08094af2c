"""From a name to an autoencoder: presets, hub ids, folders and files, loaded strictly, without running code."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from eqvae.artifacts.building import bounded_building
from eqvae.artifacts.files import expanded, load_strictly, read_json
from eqvae.artifacts.names import AUTOENCODER, CONFIG
from eqvae.artifacts.weights import (
    NamedTensors,
    WeightSet,
    WhichWeights,
    choose_set,
    describe_choice,
    find_sets,
    plain_names,
    read_named,
)
from eqvae.autoencoders.layouts import (
    LDM_ANCHORS,
    find_pair,
    is_ldm,
    ldm_to_diffusers,
    pair_to_diffusers,
    read_ldm,
    rename_legacy_attention,
)
from eqvae.autoencoders.notes import factors_of, read_note, read_pair_note
from eqvae.autoencoders.presets import PACKAGED, PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.autoencoders.weight_files import (
    HALF,
    choose_weight_file,
    fetch_folder,
    looks_like_hub_id,
    variant_of,
    weights_of,
)
from eqvae.errors import UserError, nearest_name
from eqvae.runtime.journal import say_once

if TYPE_CHECKING:
    from eqvae.autoencoders.families import DiffusersAutoencoder

_KINDS = (
    "a diffusers folder, an eqvae run, a folder with 'vae', a TAESD pair, or an LDM or VQ-GAN .ckpt/.safetensors file"
)


class _Source(NamedTuple):
    """What was asked for."""

    name: str
    """As the user wrote it."""

    which: WhichWeights | None


def load_autoencoder(name: str | Path) -> Autoencoder:
    """Load an autoencoder in fp32, in evaluation mode, on the CPU.

    Args:
        name: A preset, `untrained:PRESET` (random weights, seed 0), a hub id, or a path: a diffusers folder or the
            weight file in it, an eqvae run's folder, a folder with a `vae` subfolder, a folder (or the encoder file) of
            a TAESD pair, or a file of LDM, taming-transformers' VQ-GAN, MAR, VA-VAE, REPA-E or LlamaGen's tokenizer,
            a training checkpoint too. Where it holds averaged and raw weights, the averaged ones are taken, and one
            line says so: `NAME#raw` takes the others. A preset comes before a path of the same name: write `./NAME`
            for the path.

    Returns:
        The autoencoder.

    Raises:
        UserError: If there is no such autoencoder, or its files are truncated, hold code or numbers that are not
            finite, or do not fit exactly.
    """
    stem, which = split_weights(str(name))
    source, name = _Source(str(name), which), stem
    if name.startswith(UNTRAINED):
        return build_autoencoder(name.removeprefix(UNTRAINED), seed=0)
    path = expanded(name)
    if name in PRESETS:
        if path.exists():
            say_once(f"'{name}' is the preset of this name; write './{name}' for what lies here")
        return _load_preset(name, source)
    if path.exists():
        return _load_path(path, source)
    if looks_like_hub_id(name):
        return _load_diffusers(fetch_folder(name, "", source.which), source)
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
    return build_architecture(architecture.class_name, architecture.config, name=UNTRAINED + name, seed=seed)


def build_architecture(class_name: str, config: Mapping[str, Any], *, name: str, seed: int) -> "DiffusersAutoencoder":
    """Build what a config describes with random weights; the global random state is left as it was."""
    family = _family(class_name, name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        autoencoder = family.build(class_name, config, name=name)
    autoencoder.eval()
    return autoencoder


def _family(class_name: str, source: str) -> "type[DiffusersAutoencoder]":
    """Look up a family; they are imported here because diffusers takes seconds to import."""
    from eqvae.autoencoders.families import find_family

    return find_family(class_name, source)


def split_weights(name: str) -> tuple[str, WhichWeights | None]:
    """Take `#ema` or `#raw` off a name, where no file has such a name."""
    stem, _, which = name.rpartition("#")
    if not stem or which not in ("ema", "raw") or expanded(name).exists():
        return name, None
    return stem, "ema" if which == "ema" else "raw"


def choose_weights(name: str, which: WhichWeights | None) -> str:
    """Name an autoencoder together with which of its weights are meant, as `load_autoencoder` takes it."""
    return name if which is None else f"{split_weights(name)[0]}#{which}"


def _load_preset(name: str, source: _Source) -> Autoencoder:
    preset = PRESETS[name]
    if preset.packaged is not None:
        return _load_diffusers(preset.packaged, source)
    if preset.hub is not None:
        return _load_diffusers(fetch_folder(preset.hub, preset.subfolder, source.which), source)
    raise UserError(
        f"The weights of '{name}' are not published in a form that can be fetched",
        f"Give the path of their folder or file, or '{UNTRAINED}{name}' for random weights",
    )


def _load_path(path: Path, source: _Source) -> Autoencoder:
    if path.name == CONFIG:
        path = path.parent
    if path.is_dir():
        for folder in (path / AUTOENCODER, path / "vae", path):
            if (folder / CONFIG).is_file():
                return _load_diffusers(folder, source)
    if (pair := find_pair(path)) is not None:
        encoder, decoder = (named.take(plain_names(named)) for named in map(read_named, pair))
        published = pair_to_diffusers(encoder, decoder)
        names = (*(f"encoder.{name}" for name in encoder), *(f"decoder.{name}" for name in decoder))
        config = published.config | factors_of(read_pair_note(pair[0]))
        return _fill(_build(published.class_name, config, source), published.state, path, names)
    if path.is_dir():
        raise UserError(f"'{path}' holds no autoencoder", f"Give {_KINDS}")
    named = read_named(path)
    sets = [each for each in find_sets(named, LDM_ANCHORS) if is_ldm(each.names)]
    if not sets and _describes_autoencoder(path.with_name(CONFIG)):
        return _load_diffusers(path.parent, source, path.name)
    if not sets:
        in_diffusers = any("encoder.down_blocks." in name for name in named.getters)
        what = f"has diffusers' names, and no {CONFIG} lies beside it" if in_diffusers else "holds no autoencoder"
        mend = "Put it there" if in_diffusers else f"Give {_KINDS}"
        raise UserError(f"'{path}' {what}" + ("" if in_diffusers else " under CompVis' names"), mend)
    taken = _take(named, sets, source)
    published = read_ldm(taken.state)
    num_levels = len(published.config["block_out_channels"])
    note = factors_of(read_note(path)) if path.suffix != ".json" else {}
    autoencoder = _build(published.class_name, published.config | note, source)
    expected = autoencoder.model.state_dict()
    state = ldm_to_diffusers(published.state, expected, num_levels)
    return _fill(autoencoder, state, path, taken.state, taken.line)


def _describes_autoencoder(config: Path) -> bool:
    return config.is_file() and "_class_name" in read_json(config)


class _Taken(NamedTuple):
    """One of a file's sets of weights, and what to say of it once it is loaded."""

    state: dict[str, Tensor]

    line: str | None = None


def _take(named: NamedTensors, sets: Sequence[WeightSet], source: _Source) -> _Taken:
    chosen, other = choose_set(named, sets, source.which)
    line = describe_choice(named, chosen, other) if source.which is None else None
    return _Taken(named.take(chosen.names), line)


def _load_diffusers(folder: Path, source: _Source, file: str | None = None) -> Autoencoder:
    config = read_json(folder / CONFIG)
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise _no_autoencoder(folder, config)
    _family(class_name, str(folder / CONFIG))  # an unknown class is told before gigabytes are read
    if folder.parent != PACKAGED:
        _check_config(folder / CONFIG, class_name, json.dumps(config))
    autoencoder = _build(class_name, config, source)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    file = file or choose_weight_file(names, source.which)
    if file is None:
        raise UserError(f"'{folder}' has a {CONFIG} but no weights", "Fetch or write it again, or name the file")
    source = _check_variant(folder, file, names, source)
    named = read_named(folder / file)
    expected = list(autoencoder.model.state_dict())
    sets = find_sets(named, (expected[0], expected[-1]))
    taken = _take(named, sets, source) if sets else _Taken(named.take(plain_names(named, expected)))
    return _fill(autoencoder, rename_legacy_attention(taken.state), folder / file, taken.state, taken.line)


def _check_variant(folder: Path, file: str, names: Sequence[str], source: _Source) -> _Source:
    """Hold a file's variant to what was asked for, and say what else was there."""
    variant = variant_of(file)
    told = weights_of(variant)
    if source.which is not None and told not in (None, source.which):
        raise UserError(f"'{folder}' holds no {source.which} weights, but '{file}'", "Leave out --weights")
    for other in sorted({weights_of(variant_of(name)) or "" for name in names} - {told, ""}):
        if source.which is None:
            say_once(f"'{folder}' holds other weights, too, '{source.name}#{other}'; '{file}' is taken")
    if variant in HALF:
        say_once(f"'{folder}' holds no whole precision: '{file}' is taken")
    return source if told is None else source._replace(which=None)


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


def _build(class_name: str, config: Mapping[str, Any], source: _Source) -> "DiffusersAutoencoder":
    """Build a model without weights."""
    try:
        with torch.device("meta"), bounded_building():
            return _family(class_name, source.name).build(class_name, config, name=source.name)
    except Exception as error:  # whatever a wrong config breaks in diffusers' constructors, the input is at fault
        raise _no_description(class_name, source.name, error) from error


@functools.cache
def _check_config(path: Path, class_name: str, text: str) -> None:
    """Try a config on PyTorch's meta device, where nothing is computed: some values fail in the first run alone."""
    autoencoder = _build(class_name, json.loads(text), _Source(str(path), None))
    try:
        with torch.device("meta"):
            autoencoder.check_shapes()
    except Exception as error:
        raise _no_description(class_name, str(path), error) from error


def _no_description(class_name: str, where: str, error: Exception) -> UserError:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"The config of '{where}' does not describe an {class_name} ({what})", "Mend it")


def _fill(
    autoencoder: "DiffusersAutoencoder",
    state: Mapping[str, Tensor],
    file: Path,
    names: Iterable[str],
    line: str | None = None,
) -> Autoencoder:
    """Give a model exactly these weights, which had these names in the file, and say what is to be said of them."""
    load_strictly(autoencoder.model, state, source=str(file))
    autoencoder.names_in_file = tuple(names)
    if line is not None:
        say_once(line)
    return autoencoder.eval()
