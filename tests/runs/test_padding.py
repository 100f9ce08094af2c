"""`finetune --padding-mode reflect`: the base is measured as it was, and what is trained and exported reflects."""

from dataclasses import replace

import pytest
import torch

from eqvae import load_autoencoder
from eqvae.autoencoders.padding import padding_mode_of
from eqvae.errors import UserError
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runtime.run_folder import from_flat


def test_a_run_reflects_from_its_first_step_on(photographs, tmp_path):
    settings = {
        "autoencoder": "untrained:tiny-kl", "data": str(photographs), "validation_data": str(photographs),
        "image_size": 64, "batch_size": 2, "max_steps": 2, "adversarial_weight": 0.0, "perceptual": "none",
        "precision": "fp32", "num_validation_images": 2, "num_statistics_images": 2, "num_workers": 0, "device": "cpu",
        "ema_decay": 0.9, "equivariance_probability": 0.0, "lr_warmup_steps": 0, "lr_scheduler": "constant",
    }  # fmt: skip
    plain: FinetuneConfig = from_flat(FinetuneConfig, out=tmp_path / "plain", **settings)
    reflecting = replace(plain, out=tmp_path / "reflecting", padding_mode="reflect")
    with pytest.raises(UserError, match="latents of 1 cell can't be padded by reflection"):
        finetune(replace(reflecting, image_size=32))
    figures = [finetune(config) for config in (plain, reflecting)]
    assert figures[0] is not None and figures[1] is not None
    assert figures[0]["before_psnr_db"] == figures[1]["before_psnr_db"]  # of the base, with its zeros
    assert figures[0]["psnr_db"] != figures[1]["psnr_db"]
    modes = [padding_mode_of(load_autoencoder(str(config.out))) for config in (plain, reflecting)]
    assert modes == ["zeros", "reflect"]
    assert finetune(reflecting) == figures[1]  # an earlier run has no such key, which means its autoencoder's own
    with pytest.raises(UserError, match="holds a run with --padding-mode reflect, not None"):
        finetune(replace(reflecting, padding_mode=None))
    longer = replace(reflecting, training=replace(reflecting.training, max_steps=3))
    finetune(longer)  # goes on with the padding that the checkpoint was trained with
    whole = finetune(replace(longer, out=tmp_path / "whole"))
    assert whole is not None
    states = [load_autoencoder(str(out)).state_dict() for out in (longer.out, tmp_path / "whole")]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
