"""A comparison of training runs in words and tables."""

from eqvae.evidence.comparisons import ArmComparison, FinalDifference, RunComparison
from eqvae.evidence.seed_intervals import Interval
from eqvae.evidence.speed_up import SpeedUp
from eqvae.evidence.training_arms import Arm
from eqvae.report.tables import MISSING, markdown_table, with_minus_sign

MARKS = {"exact": "", "at_least": "≥ ", "at_most": "≤ ", "unknown": ""}


def headline_lines(comparison: RunComparison) -> list[str]:
    """Sum up in sentences: for each arm the speed-up at the base's last value, and the final difference."""
    lines = []
    for item in comparison.comparisons:
        lines.append(_speed_up_line(comparison, item))
        lines.append(_final_line(comparison, item.arm, item.final))
    return lines


def comparison_markdown(comparison: RunComparison) -> str:
    """Write the comparison as a page."""
    measure = comparison.measure
    size = f" of {measure['image_size_px']} px" if "image_size_px" in measure else ""
    how = (
        f"{comparison.label} of {measure['num_samples']:,} samples{size} against `{measure['reference']}`; "
        f"{measure['watch_steps']} sampling steps, averaged weights, no guidance. Lower is better."
    )
    parts = [
        f"# Speed-up against {comparison.arms[0].name}",
        *headline_lines(comparison),
        "![quality against images seen](curves_images.svg)",
        "![quality against training time](curves_time.svg)",
        "![speed-up against quality](speed_up.svg)",
        "## Arms",
        how,
        _arms_table(comparison),
    ]
    for item in comparison.comparisons:
        parts += [f"## {item.arm}, speed-up at each quality", _levels_table(comparison, item)]
    parts += [
        "N(q) is where the mean curve over seeds first reaches a quality q: on its running minimum, interpolated "
        "linearly in log N between validations; the speed-up is N(q) of the base over N(q) of the arm. ≥: the arm was "
        "better at its first validation; ≤: the base was, or the arm has not reached it. Intervals are 95% percentiles "
        "over resampled seeds, in brackets the range of single seeds. In the bold row each resample, and each seed, "
        "has its own base's last value. Bands in the figures: the range of the seeds' values, and the 95% intervals.",
        *(f"- {note}" for note in comparison.notes),
    ]
    return "\n\n".join(parts) + "\n"


def show_speed_up(found: SpeedUp) -> str:
    """Print a speed-up."""
    return MISSING if found.bound == "unknown" else f"{MARKS[found.bound]}{_ratio(found.ratio)}"


def show_interval(interval: Interval | None) -> str:
    """Print an interval of speed-ups."""
    if interval is None or (interval.low is None and interval.high is None):
        return MISSING
    if interval.high is None:
        return f"{_ratio(interval.low or 0.0)} or more"
    high = _ratio(interval.high)
    return f"up to {high}" if interval.low is None else f"{_ratio(interval.low)} to {high}"


def _speed_up_line(comparison: RunComparison, item: ArmComparison) -> str:
    images, time = item.in_images, item.in_time
    level = f"{images.level:.{comparison.digits}f}"
    reaches = f"{item.base} reaches {comparison.label} {level} after {_images(images.base_at)}"
    if images.arm_reaches == "never":
        return (
            f"{reaches}; {item.arm} has not reached it after {_images(images.arm_at)}: not reached, less than "
            f"{_ratio(images.ratio)} times as fast in images, {_ratio(time.ratio)} in training time."
        )
    early = "at its first validation, " if images.arm_reaches == "before_first" else ""
    return (
        f"{reaches}; {item.arm} {early}after {_images(images.arm_at)}: {_in_words(images)} in images"
        f"{_uncertainty(images)}, {show_speed_up(time)} in training time{_uncertainty(time)}."
    )


def _in_words(found: SpeedUp) -> str:
    mark = "at least " if found.bound == "at_least" else ""
    return f"{mark}{_ratio(found.ratio)} times as fast"


def _uncertainty(found: SpeedUp) -> str:
    if found.interval is None:
        return ""
    known = [f"95%: {show_interval(found.interval)}"]
    if found.seed_range is not None:
        known.append(f"seeds: {show_interval(found.seed_range)}")
    return f" ({'; '.join(known)})"


def _final_line(comparison: RunComparison, arm: str, final: FinalDifference | None) -> str:
    if final is None:
        return f"{arm}: never validated after as many images as the base, so no final difference is computed."
    base, value = (f"{number:.{comparison.digits}f}" for number in (final.base, final.arm))
    change = with_minus_sign(f"{final.difference:+.{comparison.digits}f}")
    line = f"After {_images(final.num_images)} {arm} has {value} against the base's {base}: {change}"
    if final.interval is None:
        return f"{line}; one seed in an arm, so there is no interval, and it is not shown."
    ends = (f"{number or 0.0:+.{comparison.digits}f}" for number in (final.interval.low, final.interval.high))
    verdict = "not shown at this scale"
    if final.shown:
        verdict = "better: shown" if final.difference < 0 else "worse: shown"
    return f"{line} (95%: {with_minus_sign(' to '.join(ends))}, {final.method}, {final.num_seeds} seeds); {verdict}."


def _arms_table(comparison: RunComparison) -> str:
    names = ("arm", "seeds", "images", "training time", f"{comparison.label} at the end", "std of seeds", "best")
    return markdown_table(names, [_arm_row(arm, comparison) for arm in comparison.arms])


def _arm_row(arm: Arm, comparison: RunComparison) -> tuple[str, ...]:
    digits, unit = comparison.digits, comparison.time_unit
    curves, mean = arm.by_images(), arm.by_images().mean().values[0]
    spread = f"{curves.values[:, -1].std(ddof=1):.{digits}f}" if len(arm.seeds) > 1 else MISSING
    return (
        arm.name,
        ", ".join(map(str, arm.seeds)),
        f"{arm.num_images[-1]:,}",
        f"{arm.by_time().mean().positions[0, -1] / unit.seconds:.1f} {unit.symbol}",
        f"{mean[-1]:.{digits}f}",
        spread,
        f"{mean.min():.{digits}f}",
    )


def _levels_table(comparison: RunComparison, item: ArmComparison) -> str:
    unit = comparison.time_unit
    names = [comparison.label]
    for what in ("images", unit.symbol):
        names += [f"base, {what}", f"arm, {what}", "speed-up", "95% (seeds)"]
    rows = []
    for images, time in zip(
        (item.in_images, *item.levels_in_images), (item.in_time, *item.levels_in_time), strict=True
    ):
        is_headline = images is item.in_images
        level = f"{images.level:.{comparison.digits}f}"
        rows.append(
            (
                f"**{level}, the base's last**" if is_headline else level,
                *_half_row(images, *(f"{at:,.0f}" for at in (images.base_at, images.arm_at))),
                *_half_row(time, *(f"{at / unit.seconds:.2f}" for at in (time.base_at, time.arm_at))),
            )
        )
    return markdown_table(names, rows)


def _half_row(found: SpeedUp, base_at: str, arm_at: str) -> tuple[str, ...]:
    marks = {"between": "", "before_first": "≤ ", "never": "> "}
    interval = show_interval(found.interval)
    if found.seed_range is not None:
        interval += f" ({show_interval(found.seed_range)})"
    return (
        f"{marks[found.base_reaches]}{base_at}",
        f"{marks[found.arm_reaches]}{arm_at}",
        show_speed_up(found),
        interval,
    )


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _images(count: float | int) -> str:
    return f"{count:,.0f} images"
