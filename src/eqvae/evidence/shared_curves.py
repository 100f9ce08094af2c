"""Training runs that were measured alike, in one chart: distance against images seen, and what it says."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from eqvae.errors import UserError
from eqvae.evidence.comparisons import RunComparison
from eqvae.evidence.training_arms import Arm, read_arms
from eqvae.report.charts import STYLE, autoencoder_colors, to_page_svg
from eqvae.report.comparison_charts import curves_figure
from eqvae.report.comparison_text import headline_lines
from eqvae.report.generators import Training, data_name
from eqvae.report.training_curves import TrainingCurve, read_curve
from eqvae.runs.compare import compare_arms

PAGE_SIZE_INCHES = (3.9, 2.75)


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """A line of the chart."""

    name: str
    color: str


@dataclass(frozen=True, kw_only=True)
class SharedCurves:
    """Two or more runs of one measure."""

    comparison: RunComparison
    """Without speed-ups where the runs do not make two arms."""

    @property
    def legend(self) -> tuple[LegendEntry, ...]:
        """The lines: one for each arm."""
        colors = autoencoder_colors([arm.name for arm in self.comparison.arms])
        return tuple(LegendEntry(name=name, color=color) for name, color in colors.items())

    @property
    def measure(self) -> str:
        """For example `FD (efficientnet-lite0) of 1,000 samples against cifar-test.safetensors`."""
        known = self.comparison.measure
        return f"{self.comparison.label} of {known['num_samples']:,} samples against {data_name(known['reference'])}"

    @property
    def has_seeds(self) -> bool:
        """Whether a line is the mean of several."""
        return any(len(arm.runs) > 1 for arm in self.comparison.arms)

    @property
    def findings(self) -> list[str]:
        """Sentences: where there is a base to compare with, the speed-up; else where each line ends."""
        if self.comparison.comparisons:
            return [*headline_lines(self.comparison), *self.comparison.notes]
        return [f"{arm.name}: {self._end(arm)}." for arm in self.comparison.arms]

    @property
    def summary(self) -> str:
        """Where each line ends, for those who cannot see the chart."""
        return "; ".join(f"{arm.name} {self._end(arm)}" for arm in self.comparison.arms)

    def _end(self, arm: Arm) -> str:
        last = float(arm.by_images().mean().values[0, -1])
        return f"{last:.{self.comparison.digits}f} after {arm.num_images[-1]:,} images"


def shared_curves(trainings: Sequence[Training]) -> list[SharedCurves]:
    """Gather the runs that may share a chart: same reference, features, number of samples and sampling steps."""
    curves = [(training, curve) for training in trainings if (curve := _curve(training)) is not None]
    groups: list[list[tuple[Training, TrainingCurve]]] = []
    for training, curve in curves:
        for group in groups:
            if _agree(group[0][1], curve):
                group.append((training, curve))
                break
        else:
            groups.append([(training, curve)])
    return [SharedCurves(comparison=_compare(group)) for group in groups if len(group) > 1]


def draw_shared_curves(shared: SharedCurves, id_prefix: str) -> str:
    """Draw the chart for the page, whose legend is the page's."""
    chart = curves_figure(shared.comparison, "images")
    with matplotlib.rc_context(STYLE):
        for legend in list(chart.legends):
            legend.remove()
        chart.set_size_inches(*PAGE_SIZE_INCHES)
        chart.patch.set_visible(False)
        return to_page_svg(chart, id_prefix)


def shared_figure(shared: SharedCurves) -> Figure:
    """Draw the chart for a paper, with a legend."""
    return curves_figure(shared.comparison, "images")


def _curve(training: Training) -> TrainingCurve | None:
    try:
        return read_curve(training.folder)
    except UserError:  # never measured, or by several measures: its own panels show what there is
        return None


def _agree(one: TrainingCurve, other: TrainingCurve) -> bool:
    return all(other.measure.get(name, value) == value for name, value in one.measure.items())


def _compare(group: Sequence[tuple[Training, TrainingCurve]]) -> RunComparison:
    try:
        return compare_arms(read_arms([training.folder for training, _ in group]))
    except UserError:  # one arm alone, or seeds given twice
        arms = tuple(Arm(name=training.name, runs=(curve,)) for training, curve in group)
        return RunComparison(measure=group[0][1].measure, arms=arms, comparisons=(), notes=())
