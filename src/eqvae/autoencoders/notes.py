"""What a layout without a config has no place for, where its own code does not look and ours does.

.safetensors       an entry of the header
.ckpt, .pt         a text beside the weights' container
a pair of TAESD's  a file beside the two
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from eqvae.artifacts.files import fingerprint, read_json
from eqvae.artifacts.names import CONVERSION
from eqvae.artifacts.parsing import parse_json
from eqvae.artifacts.pickles import read_pickled_text
from eqvae.artifacts.weights import is_safetensors, plain_names, read_named
from eqvae.errors import UserError

PAIR = "encoder_fingerprint"
"""Entry of a pair's note."""

NOTE = "eqvae"
"""In a header the only entry where no other is asked for: safetensors writes several in no fixed order."""

_BESIDE_ARCHITECTURE = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast", "padding_mode"
)  # fmt: skip
"""Fields of a diffusers config that names and shapes don't show."""


def factors_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a config, or from a note, what names and shapes of weights don't show."""
    return {field: config[field] for field in _BESIDE_ARCHITECTURE if field in config}


def read_note(path: Path) -> dict[str, Any]:
    """Read what was left with a file, or with a pair's first file; empty where there is nothing."""
    try:
        if is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(NOTE)
        else:
            text = read_pickled_text(path, NOTE)
        note = parse_json(text or "{}")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"The header of '{path}' is damaged ({error})", "Fetch or write it again") from None
    return note if isinstance(note, dict) else {}


def read_pair_note(encoder: Path) -> dict[str, Any]:
    """Read what was left beside a pair, whatever it is called now; empty where there is nothing, or of another pair."""
    path = encoder.with_name(CONVERSION)
    note = read_json(path) if path.is_file() else {}
    named = read_named(encoder) if note else None
    is_its = named is not None and note.get(PAIR) == pair_identity(named.take(plain_names(named)))
    return note if is_its else {}


def pair_identity(encoder: Mapping[str, Tensor]) -> str:
    """Tell pairs in one folder apart, as `conversion.json` does."""
    return fingerprint(sorted(encoder.items()))
