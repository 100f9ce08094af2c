"""A comparison of training runs in words and tables, and the runs on a page that may share a chart."""

from collections.abc import Sequence

from eqvae.drawing.comparison_charts import quality_label, show_ratio, show_speed_up, time_unit
from eqvae.drawing.folders import Training
from eqvae.drawing.tables import MISSING, data_name, digits_for, grouped, markdown_table, with_minus_sign
from eqvae.errors import UserError
from eqvae.evidence.arms import (
    Arm,
    ArmComparison,
    FinalDifference,
    RunComparison,
    compare_arms,
    gather_arms,
    measured_alike,
)
from eqvae.evidence.curves import TrainingCurve, read_curve
from eqvae.evidence.intervals import Interval
from eqvae.evidence.speed_up import SpeedUp

EXPLANATION = (
    "N(q) is where the mean curve over seeds first reaches a quality q: on its running minimum, interpolated "
    "linearly in log N between validations; the speed-up is N(q) of the base over N(q) of the arm. ≥: the arm was "
    "better at its first validation; ≤: the base was, or the arm has not reached it. Intervals are 95%, by Student's t "
    "of the logarithms of paired seeds' own speed-ups, in brackets these seeds' range. In the bold row each seed has "
    "its own base's last value. Bands in the figures: the range of the seeds' values, and the 95% intervals."
)

TWINS = (
    "Where an arm has several autoencoders, fine-tuned alike but for the seed, intervals are those of a nested "
    "analysis of variance of autoencoders and seeds."
)

CAVEAT = (
    "An arm with one seed has no interval: the difference may be the seed's. Arms whose seeds differ count as "
    "unpaired; the intervals of their speed-ups are percentiles over resampled seeds and too narrow: in simulations "
    "'95%' held the true one in about 75% of cases with three seeds and 88% with five."
)


def headline_lines(comparison: RunComparison) -> list[str]:
    """Sum up in sentences: for each arm the speed-up at the base's last value, and the final difference."""
    return [
        line
        for item in comparison.comparisons
        for line in (_speed_up_line(comparison, item), _final_line(comparison, item.arm, item.final))
    ]


def comparison_markdown(comparison: RunComparison) -> str:
    """Write the comparison as a page."""
    measure = comparison.measure
    size = f" of {measure['image_size_px']} px" if "image_size_px" in measure else ""
    parts = [
        f"# Speed-up against {comparison.arms[0].name}",
        *headline_lines(comparison),
        "![quality against images seen](curves_images.svg)",
        "![quality against training time](curves_time.svg)",
        "![speed-up against quality](speed_up.svg)",
        "## Arms",
        f"{quality_label(comparison)} of {measure['num_samples']:,} samples{size} against `{measure['reference']}`; "
        f"{_passes(comparison)}, averaged weights, no guidance. Lower is better.",
        _arms_table(comparison),
    ]
    for item in comparison.comparisons:
        parts += [f"## {item.arm}, speed-up at each quality", _levels_table(comparison, item)]
    twins = [TWINS] if any(arm.num_autoencoders > 1 for arm in comparison.arms) else []
    return "\n\n".join([*parts, EXPLANATION, *twins, CAVEAT, *(f"- {note}" for note in comparison.notes)]) + "\n"


def _passes(comparison: RunComparison) -> str:
    """Say in how many steps samples were drawn."""
    in_one_pass = [arm.name for arm in comparison.arms if "watch_steps" not in arm.runs[0].measure]
    steps = comparison.measure.get("watch_steps")
    if steps is None:
        return "one pass"
    sampler = comparison.measure.get("watch_sampler")
    drawn = f"{steps} sampling steps" + (f" of {sampler}" if sampler else "")
    return drawn + (f" ({', '.join(in_one_pass)}: one pass)" if in_one_pass else "")


def shared_curves(trainings: Sequence[Training]) -> list[RunComparison]:
    """Compare runs of one measure: two or more of the same reference, features, number of samples, sampling steps."""
    curves = [(training.name, curve) for training in trainings if (curve := _curve(training)) is not None]
    groups = grouped(curves, lambda one, other: measured_alike(one[1], other[1]))
    return [_compare(group) for group in groups if len(group) > 1]


def measure_label(comparison: RunComparison) -> str:
    """Say for example `FD (efficientnet-lite0) of 1,000 samples against cifar-test.safetensors`."""
    known = comparison.measure
    return f"{quality_label(comparison)} of {known['num_samples']:,} samples against {data_name(known['reference'])}"


def findings(comparison: RunComparison) -> list[str]:
    """Say what a chart of several runs shows: against a base the speed-up, else where each line ends."""
    if comparison.comparisons:
        return [*headline_lines(comparison), *comparison.notes]
    return [
        f"{arm.name}: {last_value(comparison, arm)} after {arm.num_images[-1]:,} images." for arm in comparison.arms
    ]


def last_value(comparison: RunComparison, arm: Arm) -> str:
    """Print the end of an arm's mean curve."""
    return f"{float(arm.by_images().mean().values[0, -1]):.{_digits(comparison)}f}"


def show_interval(interval: Interval | None) -> str:
    """Print an interval of speed-ups."""
    if interval is None or (interval.low is None and interval.high is None):
        return MISSING
    if interval.high is None:
        return f"{show_ratio(interval.low or 0.0)} or more"
    high = show_ratio(interval.high)
    return f"up to {high}" if interval.low is None else f"{show_ratio(interval.low)} to {high}"


def _curve(training: Training) -> TrainingCurve | None:
    try:
        return read_curve(training.folder)
    except UserError:  # never measured, or by several measures: its own panels show what there is
        return None


def _compare(group: Sequence[tuple[str, TrainingCurve]]) -> RunComparison:
    try:
        return compare_arms(gather_arms([curve for _, curve in group]))
    except UserError:  # one arm alone, or seeds given twice
        arms = tuple(Arm(name=name, runs=(curve,)) for name, curve in group)
        return RunComparison(measure=group[0][1].measure, arms=arms)


def _digits(comparison: RunComparison) -> int:
    return digits_for([run.values.max() for arm in comparison.arms for run in arm.runs])


def _speed_up_line(comparison: RunComparison, item: ArmComparison) -> str:
    images, time = item.in_images, item.in_time
    label = f"{quality_label(comparison)} {images.level:.{_digits(comparison)}f}"
    reaches = f"{item.base} reaches {label} after {images.base_at:,.0f} images"
    after = f"after {images.arm_at:,.0f} images"
    if images.arm_reaches == "never":
        return (
            f"{reaches}; {item.arm} has not reached it {after}: not reached, less than {show_ratio(images.ratio)} "
            f"times as fast in images, {show_ratio(time.ratio)} in training time."
        )
    early = "at its first validation, " if images.arm_reaches == "before_first" else ""
    mark = "at least " if images.bound == "at_least" else ""
    return (
        f"{reaches}; {item.arm} {early}{after}: {mark}{show_ratio(images.ratio)} times as fast in images"
        f"{_uncertainty(images)}, {show_speed_up(time)} in training time{_uncertainty(time)}."
    )


def _uncertainty(found: SpeedUp) -> str:
    if found.interval is None:
        return ""
    seeds = f"; seeds: {show_interval(found.seed_range)}" if found.seed_range is not None else ""
    return f" (95%: {show_interval(found.interval)}{seeds})"


def _final_line(comparison: RunComparison, arm: str, final: FinalDifference | None) -> str:
    if final is None:
        return f"{arm}: never validated after as many images as the base, so no final difference is computed."
    digits = _digits(comparison)
    line = (
        f"After {final.num_images:,} images {arm} has {final.arm:.{digits}f} against the base's "
        f"{final.base:.{digits}f}: " + with_minus_sign(f"{final.difference:+.{digits}f}")
    )
    if final.interval is None:
        return f"{line}; one seed in an arm, so there is no interval, and it is not shown."
    ends = (f"{number or 0.0:+.{digits}f}" for number in (final.interval.low, final.interval.high))
    verdict = "not shown at this scale"
    if final.shown:
        verdict = "better: shown" if final.difference < 0 else "worse: shown"
    return f"{line} (95%: {with_minus_sign(' to '.join(ends))}, {final.method}, {_count(final)}); {verdict}."


def _count(final: FinalDifference) -> str:
    seeds = f"{final.num_seeds} seeds"
    return seeds if final.num_autoencoders == 1 else f"{final.num_autoencoders} autoencoders, {seeds} each"


def _arms_table(comparison: RunComparison) -> str:
    label, digits, unit = quality_label(comparison), _digits(comparison), time_unit(comparison)
    rows = []
    for arm in comparison.arms:
        curves, mean = arm.by_images(), arm.by_images().mean().values[0]
        rows.append(
            (
                arm.name,
                _show_seeds(arm),
                f"{arm.num_images[-1]:,}",
                f"{arm.by_time().mean().positions[0, -1] / unit.seconds:.1f} {unit.symbol}",
                f"{mean[-1]:.{digits}f}",
                f"{curves.values[:, -1].std(ddof=1):.{digits}f}" if len(arm.seeds) > 1 else MISSING,
                f"{mean.min():.{digits}f}",
            )
        )
    return markdown_table(
        ("arm", "seeds", "images", "training time", f"{label} at the end", "std of seeds", "best"), rows
    )


def _show_seeds(arm: Arm) -> str:
    """List the generators' seeds, and say how many autoencoders they were trained on."""
    seeds = ", ".join(map(str, dict.fromkeys(arm.seeds)))
    return seeds if arm.num_autoencoders == 1 else f"{seeds} on {arm.num_autoencoders} autoencoders"


def _levels_table(comparison: RunComparison, item: ArmComparison) -> str:
    unit, digits = time_unit(comparison), _digits(comparison)
    names = [quality_label(comparison)]
    for what in ("images", unit.symbol):
        names += [f"base, {what}", f"arm, {what}", "speed-up", "95% (seeds)"]
    rows = [[f"**{item.in_images.level:.{digits}f}, the base's last**"]]
    rows += [[f"{found.level:.{digits}f}"] for found in item.levels_in_images]
    images, times = (item.in_images, *item.levels_in_images), (item.in_time, *item.levels_in_time)
    for row, in_images, in_time in zip(rows, images, times, strict=True):
        row += _half_row(in_images, f"{in_images.base_at:,.0f}", f"{in_images.arm_at:,.0f}")
        row += _half_row(in_time, *(f"{at / unit.seconds:.2f}" for at in (in_time.base_at, in_time.arm_at)))
    return markdown_table(names, rows)


def _half_row(found: SpeedUp, base_at: str, arm_at: str) -> tuple[str, ...]:
    marks = {"between": "", "before_first": "≤ ", "never": "> "}
    seeds = f" ({show_interval(found.seed_range)})" if found.seed_range is not None else ""
    return (
        f"{marks[found.base_reaches]}{base_at}",
        f"{marks[found.arm_reaches]}{arm_at}",
        show_speed_up(found),
        show_interval(found.interval) + seeds,
    )
