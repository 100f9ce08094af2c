"""`eqvae compare`: how much faster does a generator learn on other latents?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from eqvae.artifacts.files import to_plain, write_atomically, write_json, write_text
from eqvae.artifacts.names import COMPARISON
from eqvae.drawing.charts import write_svg
from eqvae.drawing.comparison import comparison_markdown, headline_lines
from eqvae.drawing.comparison_charts import curves_figure, speed_up_figure
from eqvae.errors import UserError, nearest_name
from eqvae.evidence.arms import Arm, RunComparison, compare_arms, read_arms
from eqvae.evidence.intervals import NUM_RESAMPLES
from eqvae.runtime.processes import ALONE
from eqvae.runtime.run_folder import NOT_NEGATIVE, RunFolder, check_ranges

PNG_DPI = 200

_RANGES = ((("at least 100", lambda value: value >= 100), ("num_resamples",)), (NOT_NEGATIVE, ("seed",)))


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare training runs: quality against images and time, the speed-up to a quality, intervals from seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of `eqvae train --reference ...`, finished or not. Those that differ in their seed alone form an arm, and
    so do those on latents of autoencoders that were fine-tuned alike but for the seed. The first one's is the base."""

    out: Path
    """Output folder; written anew when the same runs are compared again."""

    base: str | None = None
    """Name of the arm to compare with, as `comparison.md` prints it; None: the first run's."""

    num_resamples: int = NUM_RESAMPLES
    """Bootstrap resamples of the seeds of arms that don't have the same ones."""

    seed: int = 0
    """Of the resamples."""


def command(config: CompareConfig) -> str:
    """Compare, and return the headline."""
    return "\n".join(headline_lines(compare(config)))


def compare(config: CompareConfig) -> RunComparison:
    """Compare training runs and write `comparison.json`, `comparison.md`, and the figures as SVG and PNG.

    Args:
        config: The runs, finished or not, and where to write.

    Returns:
        Arms, the base first, and each one's speed-up and final difference against it.

    Raises:
        UserError: If a folder holds no measured training run, the runs make less than two arms or were measured
            differently, or `config.out` belongs to something else.
    """
    check_ranges(config, _RANGES)
    folder = RunFolder.claim(config.out, "compare")
    if folder.differs(runs=to_plain(config.runs)):
        raise UserError(f"--out '{config.out}' holds a comparison of other runs", "Choose another folder")
    arms = _with_base_first(read_arms(config.runs), config.base)
    comparison = compare_arms(arms, seed=config.seed, num_resamples=config.num_resamples)
    figures = {
        "curves_images": curves_figure(comparison, "images"),
        "curves_time": curves_figure(comparison, "time"),
        "speed_up": speed_up_figure(comparison),
    }
    text, record = comparison_markdown(comparison), _to_record(comparison)
    with folder.hold(config, ALONE, seed=config.seed, anew=(COMPARISON,)):
        for name, figure in figures.items():
            write_atomically(config.out / f"{name}.svg", partial(write_svg, figure))
            write_atomically(config.out / f"{name}.png", partial(figure.savefig, format="png", dpi=PNG_DPI))
        write_text(config.out / "comparison.md", text)
        write_json(config.out / COMPARISON, record)
    return comparison


def _with_base_first(arms: Sequence[Arm], name: str | None) -> tuple[Arm, ...]:
    names = [arm.name for arm in arms]
    if name is not None and name not in names:
        raise UserError(f"--base '{name}' is none of the arms", nearest_name(name, names))
    return tuple(sorted(arms, key=lambda arm: name is not None and arm.name != name))


def _to_record(comparison: RunComparison) -> dict[str, Any]:
    """All numbers, as JSON holds them."""
    return {
        **comparison.measure,
        "headline": headline_lines(comparison),
        "base": comparison.arms[0].name,
        "arms": [_arm_record(arm) for arm in comparison.arms],
        "comparisons": [to_plain(item) for item in comparison.comparisons],
        "notes": list(comparison.notes),
    }


def _arm_record(arm: Arm) -> dict[str, Any]:
    mean, times = arm.by_images().mean(), arm.by_time().mean()
    return {
        "name": arm.name,
        "autoencoder": arm.runs[0].autoencoder,
        **{name: arm.runs[0].fields.get(name) for name in ("recipe", "latents_fingerprint", "normalization")},
        "seeds": list(arm.seeds),
        "num_autoencoders": arm.num_autoencoders,
        "num_images": arm.num_images.tolist(),
        "mean_training_sec": times.positions[0].tolist(),
        "mean": mean.values[0].tolist(),
        "runs": [
            {
                "folder": str(run.folder),
                "seed": run.seed,
                "autoencoder_seed": list(run.autoencoder_seed),
                "is_finished": run.is_finished,
                **run.pace,
                "num_images": run.num_images.tolist(),
                "training_sec": run.training_sec.tolist(),
                "values": run.values.tolist(),
            }
            for run in arm.runs
        ],
    }
