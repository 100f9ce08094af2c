"""Equal reconstruction: the decoder alone goes on, chunk by chunk, until PSNR meets the base's, or up to a limit.

Latents stay as they are, and with them what a generator has learnt: only its pictures are drawn anew.
"""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eqvae.artifacts.files import read_json, replace_folder, write_json
from eqvae.artifacts.names import AUTOENCODER, CONFIG, METRICS
from eqvae.methods.transform_config import TransformConfig
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runtime.device import choose_device
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import RunFolder, change_flat, flat_fields, flat_value

_DECODER = "decoder"
"""Folder of the fine-tuning run that goes on."""


@dataclass(frozen=True, kw_only=True)
class EqualizeConfig(FinetuneConfig):
    """Train a fine-tuned autoencoder's decoder by Equation 1 until its PSNR is that of what it was fine-tuned from.

    `autoencoder` is the folder of the run that fine-tuned it, which has measured both on its validation images;
    `max_steps` is the limit.
    """

    chunk_steps: int
    """PSNR is looked at after so many steps, and as many again."""

    @classmethod
    def after(cls, template: FinetuneConfig, *, chunk_steps: int, max_chunks: int) -> "EqualizeConfig":
        """As a recipe of fine-tuning has it, but for what trains the encoder."""
        unset: dict[str, Any] = {field.name: None for field in flat_fields(TransformConfig)}
        decoding = change_flat(
            template, **unset, method="plain", objective="implicit", freeze_encoder=True, freeze_decoder=False,
            lora_rank=0, polish_steps=0, max_steps=chunk_steps * max_chunks, lr_scheduler="constant", watch="",
            kl_weight=None, explicit_weight=None, codebook="gradient", restart_dead_codes=0,
        )  # fmt: skip
        return cls(**{field.name: getattr(decoding, field.name) for field in fields(decoding)}, chunk_steps=chunk_steps)

    def decoding(self, num_steps: int) -> FinetuneConfig:
        """The run of so many steps."""
        own = {field.name: getattr(self, field.name) for field in fields(FinetuneConfig)}
        return change_flat(FinetuneConfig(**own), out=self.out / _DECODER, max_steps=num_steps)


def equalize(config: EqualizeConfig) -> dict[str, Any]:
    """Go on until PSNR is the base's; the shortfall, if any, stands in `metrics.json`, the result in `autoencoder`."""
    folder = RunFolder.claim(config.out, "equalize")
    processes = join_processes(choose_device(config.device))
    tuned = Path(config.autoencoder)
    before = read_json(tuned / METRICS)
    target, psnr = float(before["before_psnr_db"]), float(before["psnr_db"])
    limit: int = flat_value(config, "max_steps")
    num_steps, result = 0, tuned
    with folder.hold(config, processes, seed=flat_value(config, "seed")):
        while psnr < target and num_steps < limit:
            result = config.out / _DECODER
            # An earlier session may have been stopped in a later chunk, or after it.
            begun = int(read_json(result / CONFIG)["max_steps"]) if (result / CONFIG).is_file() else 0
            num_steps = max(begun if num_steps == 0 else num_steps + config.chunk_steps, config.chunk_steps)
            processes.wait()
            figures = processes.gather(finetune(config.decoding(num_steps)))[0]
            assert figures is not None  # the first process has them
            psnr = float(figures["psnr_db"])
        figures = {
            "psnr_db": psnr,
            "target_psnr_db": target,
            "shortfall_db": max(target - psnr, 0.0),
            "num_steps": num_steps,
        }
        if processes.is_first:
            replace_folder(
                config.out / AUTOENCODER, lambda part: shutil.copytree(result / AUTOENCODER, part, dirs_exist_ok=True)
            )
            write_json(config.out / METRICS, figures)
        processes.wait()
    return figures
