"""`eqvae compare`: how much faster does a generator learn on other latents?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro
from jaxtyping import Int64
from matplotlib.figure import Figure
from numpy import ndarray

from eqvae.artifacts import CONFIG, claim_output_folder, to_plain, write_atomically, write_json
from eqvae.errors import UserError, nearest_name
from eqvae.evidence.comparisons import ArmComparison, FinalDifference, RunComparison
from eqvae.evidence.seed_intervals import NUM_RESAMPLES, mean_difference, resample
from eqvae.evidence.speed_up import common_levels, headline, speed_ups
from eqvae.evidence.training_arms import Arm, read_arms, recipes_own_fields
from eqvae.report.comparison_charts import curves_figure, speed_up_figure
from eqvae.report.comparison_text import comparison_markdown, headline_lines
from eqvae.runtime.journal import write_environment
from eqvae.runtime.run_folder import NOT_NEGATIVE, check_ranges

COMPARISON = "comparison.json"
PNG_DPI = 200

_RANGES = ((("at least 100", lambda value: value >= 100), ("num_resamples",)), (NOT_NEGATIVE, ("seed",)))


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare training runs: quality against images and time, the speed-up to a quality, intervals from seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of `eqvae train --reference ...`, finished or not. Those that differ in their seed alone form an arm;
    the first one's arm is the base."""

    out: Path
    """Output folder; written anew when the same runs are compared again."""

    base: str | None = None
    """Name of the arm to compare with, as `comparison.md` prints it; None: the first run's."""

    num_resamples: int = NUM_RESAMPLES
    """Bootstrap resamples of the seeds; fewer where no more are possible."""

    seed: int = 0
    """Of the resamples."""


def compare_runs(config: CompareConfig) -> RunComparison:
    """Compare and write `comparison.json`, `comparison.md`, and the figures as SVG and PNG."""
    check_ranges(config, _RANGES)
    saved = claim_output_folder(config.out, "compare")
    if saved is not None and saved.get("runs") != to_plain(config.runs):
        raise UserError(f"--out '{config.out}' holds a comparison of other runs", "Choose another folder")
    arms = choose_base(read_arms(config.runs), config.base)
    comparison = compare_arms(arms, seed=config.seed, num_resamples=config.num_resamples)
    figures = {
        "curves_images": curves_figure(comparison, "images"),
        "curves_time": curves_figure(comparison, "time"),
        "speed_up": speed_up_figure(comparison),
    }
    text, record = comparison_markdown(comparison), _to_record(comparison)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / COMPARISON).unlink(missing_ok=True)  # it comes back last: whoever finds it finds all
    write_json(config.out / CONFIG, to_plain(config) | {"command": "compare"})
    write_environment(config.out, device=torch.device("cpu"), seed=config.seed)
    for name, figure in figures.items():
        write_atomically(config.out / f"{name}.svg", partial(_write_svg, figure))
        write_atomically(config.out / f"{name}.png", partial(figure.savefig, format="png", dpi=PNG_DPI))
    write_atomically(config.out / "comparison.md", lambda path: path.write_text(text))
    write_json(config.out / COMPARISON, record)
    return comparison


def choose_base(arms: Sequence[Arm], name: str | None) -> tuple[Arm, ...]:
    """Put the base first."""
    names = [arm.name for arm in arms]
    if name is not None and name not in names:
        raise UserError(f"--base '{name}' is none of the arms", nearest_name(name, names))
    return tuple(sorted(arms, key=lambda arm: name is not None and arm.name != name))


def compare_arms(arms: Sequence[Arm], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> RunComparison:
    """Compare arms with the first one."""
    base, *others = arms
    return RunComparison(
        measure=base.runs[0].measure,
        arms=tuple(arms),
        comparisons=tuple(_compare(base, arm, seed, num_resamples) for arm in others),
        notes=tuple(_notes(arms)),
    )


def _compare(base: Arm, arm: Arm, seed: int, num_resamples: int) -> ArmComparison:
    draws = resample(base.seeds, arm.seeds, seed=seed, num_resamples=num_resamples)
    levels = common_levels(base.by_images(), arm.by_images())
    return ArmComparison(
        base=base.name,
        arm=arm.name,
        in_images=headline(base.by_images(), arm.by_images(), draws),
        in_time=headline(base.by_time(), arm.by_time(), draws),
        levels_in_images=speed_ups(base.by_images(), arm.by_images(), levels, draws),
        levels_in_time=speed_ups(base.by_time(), arm.by_time(), levels, draws),
        final=_final_difference(base, arm),
        num_resamples=len(draws.base) if draws is not None else 0,
    )


def _final_difference(base: Arm, arm: Arm) -> FinalDifference | None:
    shared: Int64[ndarray, " n"] = np.intersect1d(base.num_images, arm.num_images)
    if not len(shared):
        return None
    ours, theirs = (
        item.by_images().values[:, int(np.flatnonzero(item.num_images == shared[-1])[0])] for item in (arm, base)
    )
    found = mean_difference(theirs, ours, paired=base.seeds == arm.seeds)
    return FinalDifference(num_images=int(shared[-1]), **vars(found))


def _notes(arms: Sequence[Arm]) -> list[str]:
    """Say what a reader must know before believing the figures."""
    found = []
    runs = [run for arm in arms for run in arm.runs]
    for name, values in recipes_own_fields([arm.runs[0] for arm in arms]).items():
        listed = "; ".join(f"{arm.name}: {value}" for arm, value in zip(arms, values, strict=True))
        found.append(f"The recipes also differ in {name} ({listed}).")
    for name in runs[0].pace:
        if len({run.pace[name] for run in runs}) > 1:
            listed = ", ".join(dict.fromkeys(str(run.pace[name]) for run in runs))
            found.append(f"Runs differ in their {name} ({listed}): their times say little of the latents.")
    unfinished = [f"'{run.folder.name}' ({run.num_images[-1]:,} images)" for run in runs if not run.is_finished]
    if unfinished:
        found.append(f"Not finished: {', '.join(unfinished)}.")
    for arm in arms:
        longest = max(int(run.num_images[-1]) for run in arm.runs)
        if arm.num_images[-1] < longest:
            found.append(
                f"The mean of {arm.name} ends after {arm.num_images[-1]:,} images, where its shortest run does; "
                f"another has come to {longest:,}."
            )
    counts = {len(arm.runs) for arm in arms}
    if min(counts) == 1:
        found.append("An arm with one seed has no interval: the difference may be the seed's.")
    if len({arm.seeds for arm in arms}) > 1 and max(counts) > 1:
        found.append("The arms' seeds differ, so they count as unpaired; equal ones would give narrower intervals.")
    if 1 < min(counts) <= 5:
        found.append(
            "Percentile intervals of a speed-up from so few seeds are too narrow: in simulations '95%' held the true "
            "one in about 75% of cases with three seeds and 88% with five."
        )
    return found


def _write_svg(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "eqvae"}):  # the same figures make the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


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
        "num_images": arm.num_images.tolist(),
        "mean_training_sec": times.positions[0].tolist(),
        "mean": mean.values[0].tolist(),
        "runs": [
            {
                "folder": str(run.folder),
                "seed": run.seed,
                "is_finished": run.is_finished,
                **run.pace,
                "num_images": run.num_images.tolist(),
                "training_sec": run.training_sec.tolist(),
                "values": run.values.tolist(),
            }
            for run in arm.runs
        ],
    }
