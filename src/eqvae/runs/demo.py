"""`eqvae demo`: the packaged autoencoder fine-tuned on built-in photographs, measured before and after, reported."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqvae.autoencoders import load_autoencoder
from eqvae.drawing import write_report
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.finetune_run import describe_errors
from eqvae.runtime.device import choose_device
from eqvae.runtime.journal import say
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import RunFolder, from_flat


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole story on built-in photographs: measure `tiny-kl`, fine-tune it with EQ-VAE, measure again, report."""

    out: Path = Path("runs/demo")
    """Output folder; the page is `report.html` in it."""

    max_steps: int = 220
    """Optimizer steps with EQ-VAE; with the default all of it takes some two minutes on two CPU cores."""

    polish_steps: int = 60
    """Steps of the decoder alone after them, which move no latent."""

    seed: int = 0
    """Of the fine-tuning."""


MEASURED_AT_PX = 160
"""Larger pictures of these photographs are smoother at the scale of a pixel, and hide what is wrong with latents."""

NUM_ANGLES = 16
"""Of the report's moving picture; quarter turns are among them."""

NEXT = """what to type next:
  eqvae explore tiny-kl {run}   # sliders for scale and angle; needs the extra eqvae[explore]
  eqvae finetune tiny-kl --data path/to/images --out runs/eq   # the same on your own pictures"""


def command(config: DemoConfig) -> str | None:
    """Run the demo, and say what came of it, where the page is and how to go on."""
    figures = demo(config)
    if figures is None:
        return None
    following = NEXT.format(run=config.out / "tiny-kl-eq")
    return f"{describe_errors(figures)}\n{config.out / 'report.html'}\n{following}"


def demo(config: DemoConfig) -> dict[str, float | int] | None:
    """Measure, fine-tune, measure again and draw the page; called again, it resumes.

    Args:
        config: Where, and for how long.

    Returns:
        The figures of the fine-tuned autoencoder, as `eqvae evaluate` gives them; None in all processes but the first.

    Raises:
        Interrupted: If a signal stopped it.
    """
    training = from_flat(
        FinetuneConfig,
        autoencoder="tiny-kl",
        data="photos",
        out=config.out / "tiny-kl-eq",
        max_steps=config.max_steps,
        polish_steps=config.polish_steps,
        image_size=128,
        batch_size=4,
        learning_rate=3e-4,
        adam_beta1=0.9,
        adam_beta2=0.99,
        ema_decay=0.97,
        resolution_weighting="equal",
        equivariance_probability=0.7,
        perceptual_weight=0.1,
        adversarial_weight=0.0,
        validate_every=100,
        seed=config.seed,
    ).resolved()
    measuring: dict[str, Any] = {"data": "photos", "image_size": MEASURED_AT_PX, "num_angles": NUM_ANGLES}
    before, after = config.out / "before", config.out / "after"
    say("1/4  measuring the packaged autoencoder 'tiny-kl' on held-out photographs")
    evaluate(EvaluateConfig(autoencoder="tiny-kl", out=before, **measuring))
    say(f"2/4  fine-tuning it with EQ-VAE for {config.max_steps} steps on other photographs, then its decoder alone")
    finetune(training)
    say("3/4  measuring it again")
    _forget_other_weights(after, training)
    figures = evaluate(EvaluateConfig(autoencoder=str(training.out), out=after, **measuring))
    if figures is None:
        return None
    say("4/4  drawing the report")
    write_report([before, after, training.out], config.out / "report.html")
    return figures


def _forget_other_weights(after: Path, training: FinetuneConfig) -> None:
    """Remove the evaluation of the model as it was before the fine-tuning went on; the demo wrote it."""
    processes = join_processes(choose_device(training.device))
    if processes.is_first and after.exists():
        now = load_autoencoder(str(training.out)).fingerprint()
        if RunFolder.claim(after, "evaluate").differs(fingerprint=now):
            shutil.rmtree(after)
    processes.wait()
