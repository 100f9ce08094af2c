"""Weight files: found on the Hugging Face hub or in its local cache, and read without running anything in them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts.files import read_json, read_tensors
from eqvae.artifacts.names import AUTOENCODER_WEIGHTS, CONFIG
from eqvae.errors import UserError

WEIGHT_FILES = (
    AUTOENCODER_WEIGHTS,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
"""The names of a diffusers folder's weights, the preferred one first."""

_FILE_SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt", ".bin", ".json")
_OFFLINE_CHOICES = "Offline choices: the preset 'tiny-kl', or the path of a local folder"

_REFUSED_PATTERN = re.compile(r"((?:GLOBAL|class|function) \S+)")
"""What torch's restricted unpickler names when a pickle asks for more than tensors and containers."""

_WRAPPERS = ("state_dict", "model")
"""Entries under which Lightning's checkpoints and LlamaGen's keep the weights."""


class _Inert:
    """Stands for Lightning's ModelCheckpoint, a key of the callbacks' table in most LDM files; it does nothing."""


_INERT_GLOBALS: list[Any] = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def looks_like_hub_id(name: str) -> bool:
    """Say whether a name has the form OWNER/REPOSITORY."""
    return (
        not name.endswith(_FILE_SUFFIXES) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    )


def fetch_folder(repository: str, subfolder: str) -> Path:
    """Bring config and weights into the hub's local cache; what is there already is not downloaded again."""
    folders = (subfolder,) if subfolder else ("", "vae")
    cached = next((found for folder in folders if (found := _find_cached(repository, folder)) is not None), None)
    if cached is not None:
        return cached
    published = _list_files(repository)
    for folder in folders:
        config = str(PurePosixPath(folder, CONFIG))
        weights = next((path for name in WEIGHT_FILES if (path := str(PurePosixPath(folder, name))) in published), None)
        if config in published and weights is not None:
            for shard in _shards_of(_download(repository, weights)):
                _download(repository, str(PurePosixPath(folder, shard)))
            return _download(repository, config).parent
    raise UserError(f"'{repository}' on the hub holds no autoencoder in diffusers' format", "Give another repository")


def _find_cached(repository: str, folder: str) -> Path | None:
    """Look for config and all weights in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    def find(name: str) -> Path | None:
        path = try_to_load_from_cache(repository, str(PurePosixPath(folder, name)))
        return Path(path) if isinstance(path, str) else None

    config = find(CONFIG)
    weights = next((path for name in WEIGHT_FILES if (path := find(name)) is not None), None)
    if config is None or weights is None or any(find(shard) is None for shard in _shards_of(weights)):
        return None
    return config.parent


def _shards_of(weights: Path) -> list[str]:
    if weights.suffix != ".json":
        return []
    return sorted({PurePosixPath(shard).name for shard in read_json(weights).get("weight_map", {}).values()})


def _list_files(repository: str) -> set[str]:
    """List a repository's files by a single request: downloads would retry for a minute where there is no network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return {file.rfilename for file in HfApi().model_info(repository, timeout=10).siblings or ()}
    except RepositoryNotFoundError:
        raise UserError(f"'{repository}' is no path and not on the Hugging Face hub", "Check the name") from None
    except Exception as error:  # the hub's HTTP library has changed before; whatever it raises, the network failed
        raise UserError(
            f"'{repository}' is no path and not in the local cache, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__})",
            _OFFLINE_CHOICES,
        ) from None


def _download(repository: str, path: str) -> Path:
    """Fetch one file; a file in the cache is not fetched again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, path))
    except GatedRepoError:
        raise UserError(
            f"'{repository}' is open only to users who accepted its licence",
            f"Accept it at huggingface.co/{repository} and set HF_TOKEN",
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"'{path}' of '{repository}' could not be fetched ({error})", _OFFLINE_CHOICES) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weight file; one that is missing, truncated or without weights, or that holds code, is a `UserError`."""
    if path.suffix == ".json":
        state = _read_shards(path)
    elif path.suffix == ".safetensors":
        state, _ = read_tensors(path)
    else:
        state = _read_pickle(path)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"'{index}' names no shards", "Fetch it again")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        state |= read_weights(index.with_name(Path(name).name))  # a shard lies beside its index and nowhere else
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_INERT_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None
    except pickle.UnpicklingError as error:
        if (refused := _REFUSED_PATTERN.search(str(error))) is not None:
            raise UserError(
                f"'{path}' holds code ({refused[1]}) and was refused: nothing in it was run",
                "Use a .safetensors file of the same weights",
            ) from None
        raise _unreadable(path) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise _unreadable(path) from None
    while isinstance(content, Mapping) and (
        name := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    ):
        content = content[name]
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' holds no named weights but {type(content).__name__}", "Give a state dict")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"'{path}' holds no named weights", "Give a state dict")
    return state


def _unreadable(path: Path) -> UserError:
    return UserError(f"'{path}' is truncated or no weight file", "Fetch or write it again")
