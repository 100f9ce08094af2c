"""Weights from the Hugging Face hub, or from its local cache where there is no network."""

import re
from pathlib import Path, PurePosixPath

from eqvae.artifacts import CONFIG, read_json
from eqvae.errors import UserError

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
"""The names of a diffusers folder's weights, the preferred one first."""

_FILE_SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt", ".bin", ".json")
_OFFLINE_CHOICES = "Offline choices: the preset 'tiny-kl', or the path of a local folder"


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
