"""Where an autoencoder's weights are: in a diffusers folder, in which variant, or on the Hugging Face hub."""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from eqvae.artifacts.files import read_json
from eqvae.artifacts.names import AUTOENCODER_WEIGHTS, CONFIG
from eqvae.artifacts.weights import WhichWeights
from eqvae.errors import UserError

_STEM = AUTOENCODER_WEIGHTS.removesuffix(".safetensors")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt)(\.index(\.\w+)?\.json)?|.*\.index\.json")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\b.*")
_VARIANT = re.compile(rf"{_STEM}(?:\.(?P<first>\w+))?\.(safetensors|bin)(\.index(?:\.(?P<last>\w+))?\.json)?")
_PREFERENCE = ("", "ema", "fp32", "fp16", "bf16", "non_ema")
"""Variants of diffusers' weights, the preferred one first: of two half precisions, the finer."""

HALF = ("fp16", "bf16")

_FILE_SUFFIXES = (".ckpt", ".safetensors", ".pth", ".pt", ".bin", ".json")
_OFFLINE_CHOICES = "Offline choices: the preset 'tiny-kl', or the path of a local folder"


def variant_of(name: str) -> str | None:
    """Read diffusers' variant off the name of a weight file: `fp16`, `ema`, empty where it has none."""
    found = _VARIANT.fullmatch(name)
    return None if found is None else found["first"] or found["last"] or ""


def weights_of(variant: str | None) -> WhichWeights | None:
    """Say which weights a variant has; None: it does not tell."""
    return "raw" if variant is not None and "non_ema" in variant else "ema" if variant == "ema" else None


def choose_weight_file(names: Collection[str], which: WhichWeights | None) -> str | None:
    """Choose among a diffusers folder's names: what was asked for, else what diffusers takes; whole before half."""

    def rank(name: str) -> tuple[object, ...]:
        variant = variant_of(name)
        told = weights_of(variant)
        is_other = told is not None and told != (which or "ema")
        is_asked = which is not None and told == which
        known = _PREFERENCE.index(variant) if variant in _PREFERENCE else len(_PREFERENCE)
        return is_other, not is_asked, known, ".bin" in name, ".index" in name, name

    found = [name for name in names if _WEIGHTS.fullmatch(name) and not _SHARD.fullmatch(name)]
    usual = [name for name in found if _VARIANT.fullmatch(name)]
    if not usual and len(found) > 1:
        return None
    return min(usual or found, key=rank, default=None)


def looks_like_hub_id(name: str) -> bool:
    """Say whether a name has the form OWNER/REPOSITORY."""
    return (
        not name.endswith(_FILE_SUFFIXES) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    )


def fetch_folder(repository: str, subfolder: str, which: WhichWeights | None = None) -> Path:
    """Bring config and weights into the hub's local cache; what is there already is not downloaded again."""
    folders = (subfolder,) if subfolder else ("", "vae")
    cached = next((found for folder in folders if (found := _find_cached(repository, folder, which))), None)
    if cached is not None and cached.is_best:
        return cached.folder
    try:
        published = _list_files(repository)
    except UserError:
        if cached is None:
            raise
        return cached.folder  # the network may be gone
    for folder in folders:
        here = [path.name for path in map(PurePosixPath, published) if path.parent == PurePosixPath(folder)]
        weights = choose_weight_file(here, which)
        if CONFIG in here and weights is not None:
            for shard in _shards_of(_download(repository, str(PurePosixPath(folder, weights)))):
                _download(repository, str(PurePosixPath(folder, shard)))
            return _download(repository, str(PurePosixPath(folder, CONFIG))).parent
    raise UserError(f"'{repository}' on the hub holds no autoencoder in diffusers' format", "Give another repository")


class _Cached(NamedTuple):
    """An autoencoder in the local cache."""

    folder: Path

    is_best: bool
    """Whether the repository can't have what is nearer to what was asked for."""


def _find_cached(repository: str, folder: str, which: WhichWeights | None) -> _Cached | None:
    """Look for config and all weights in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, str(PurePosixPath(folder, CONFIG)))
    if not isinstance(config, str):
        return None
    here = Path(config).parent
    names = [path.name for path in here.iterdir() if path.is_file()]
    weights = choose_weight_file(names, which)
    if weights is None or any(shard not in names for shard in _shards_of(here / weights)):
        return None
    variant = variant_of(weights)
    return _Cached(here, is_best=variant not in HALF and (which is None or weights_of(variant) == which))


def _shards_of(weights: Path) -> list[str]:
    if weights.suffix != ".json":
        return []
    named = read_json(weights).get("weight_map")
    shards = named.values() if isinstance(named, dict) else ()
    return sorted({PurePosixPath(shard).name for shard in shards if isinstance(shard, str)})


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
