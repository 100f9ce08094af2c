"""What readers rely on in the JSON files that commands leave: a file of ours with other kinds of values is refused."""

from collections.abc import Mapping
from typing import Any

from eqvae.artifacts.names import CACHE_INDEX, CONFIG, ENVIRONMENT, GENERATOR_CARD, METRICS, MODEL_CARD
from eqvae.artifacts.typed import to_type

_LARGEST_COUNT = 2**31
"""Of steps and images in a batch: their product fits 64 bits."""

_WORDS = (
    "command", "autoencoder", "recipe", "data", "reference", "features", "interpolation", "precision", "samples", "run",
    "latents", "sampler", "validation_data", "normalization",
)  # fmt: skip
_COUNTS = ("batch_size", "max_steps", "image_size", "num_images", "num_samples", "num_steps", "num_watch_samples")

_Scalar = str | int | float | bool | None

_FIELDS: dict[str, dict[str, Any]] = {
    CONFIG: dict.fromkeys(_WORDS, str | None)
    | dict.fromkeys(_COUNTS, int | None)
    | {"generator": dict[str, Any] | None, "seed": int | None}
    | {"autoencoder": str | tuple[str, ...] | None, "image_size": int | str | None},  # where there are several
    ENVIRONMENT: {"command": tuple[str, ...], **dict.fromkeys(("device", "date", "commit", "eqvae"), str | None)},
    METRICS: {"provenance": dict[str, Any]},
    GENERATOR_CARD: {
        **dict.fromkeys(("recipe", "autoencoder", "autoencoder_fingerprint"), str),
        **dict.fromkeys(("image_size_px", "num_steps"), int),
        **dict.fromkeys(("shift", "scale"), tuple[float, ...]),
    },
    MODEL_CARD: {
        "base": str, "data": str, "num_steps": int, "recipe": dict[str, Any] | None, "fingerprint": str,
        "base_fingerprint": str | None, "figures": dict[str, float | None],
    },
    CACHE_INDEX: {"autoencoder": str, "fingerprint": str},
}  # fmt: skip


def check_expected(name: str, content: Mapping[str, Any]) -> None:
    """Hold a file's content to what its name promises; a ValueError says which entry is of another kind."""
    fields = _FIELDS.get(name, {})
    for key, value in content.items():
        kind = fields.get(key, float | None if name == METRICS else Any)
        if name == CONFIG and key == "generator" and content.get("command") == "rank":
            kind = str | None  # the name of one, and not its card
        to_type(kind, value, where=key[:100])
        if name == CONFIG and key in _COUNTS and isinstance(value, int) and not 0 <= value < _LARGEST_COUNT:
            raise ValueError(f"{key} is {value}")
    if name == METRICS and "provenance" in content:
        for part in ("samples", "reference"):
            to_type(dict[str, _Scalar], content["provenance"].get(part, {}), where=f"provenance.{part}")
    if name == CONFIG and isinstance(content.get("generator"), Mapping):
        check_expected(GENERATOR_CARD, content["generator"])
    if name == MODEL_CARD and content.get("recipe"):
        check_expected(CONFIG, content["recipe"])
