"""The on-disk contracts between stages: what each command writes into its output folder and the next one reads.

    config.json        the complete, resolved configuration, with the command's name
    environment.json   versions, device, commit, seed
    journal.jsonl      one record for each logged step
    metrics.json       final figures: flat keys with unit suffixes
    pictures.safetensors   the images and latents that a report draws
    spectrum.json      radial power of latents and images
    autoencoder/       the exported model: diffusers' own layout, plus eqvae.json

All text is readable, all tensors are safetensors, every write is atomic.
"""

from eqvae.artifacts.files import (
    AUTOENCODER,
    CONFIG,
    ENVIRONMENT,
    JOURNAL,
    METRICS,
    MODEL_CARD,
    PICTURES,
    SPECTRUM,
    check_writable,
    claim_output_folder,
    hold_output_folder,
    read_journal,
    read_json,
    read_tensors,
    replace_folder,
    to_plain,
    write_atomically,
    write_json,
    write_tensors,
)
from eqvae.artifacts.model_card import ModelCard
from eqvae.artifacts.pictures import Pictures, to_uint8

__all__ = [
    "AUTOENCODER",
    "CONFIG",
    "ENVIRONMENT",
    "JOURNAL",
    "METRICS",
    "MODEL_CARD",
    "PICTURES",
    "SPECTRUM",
    "ModelCard",
    "Pictures",
    "check_writable",
    "claim_output_folder",
    "hold_output_folder",
    "read_journal",
    "read_json",
    "read_tensors",
    "replace_folder",
    "to_plain",
    "to_uint8",
    "write_atomically",
    "write_json",
    "write_tensors",
]
