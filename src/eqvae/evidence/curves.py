"""The curves of a fine-tuning run, as charts of one quantity each.

Accent: the fine-tuned autoencoder and the equivariance branch. Grey: the base autoencoder and the plain branch.
"""

from matplotlib.figure import Figure

from eqvae.report.charts import ACCENT
from eqvae.report.folders import Run
from eqvae.report.panels import Panel, PanelGroup, Quantity, draw_panels, read_series, training_panel
from eqvae.report.tables import METRICS

TRAINING = {
    "Losses": (
        Quantity(key="reconstruction", title="Reconstruction", y_label="L1 + perceptual"),
        Quantity(key="l1", title="L1 of pixels", y_label="mean absolute error"),
        Quantity(key="perceptual", title="Perceptual", y_label="loss"),
        Quantity(key="kl", title="KL to N(0, I)", y_label="nats per image"),
        Quantity(key="explicit", title="Explicit equivariance", y_label="loss per image"),
    ),
    "Codebook": (
        Quantity(key="quantization", title="Quantization", y_label="squared distance to codes"),
        Quantity(key="codebook_usage", title="Codes used by a batch", y_label="share"),
        Quantity(key="codebook_perplexity", title="Perplexity of a batch", y_label="codes"),
    ),
    "Discriminator": (
        Quantity(key="adversarial", title="Adversarial loss", y_label="minus mean logit"),
        Quantity(key="discriminator", title="Discriminator loss", y_label="hinge loss"),
        Quantity(key="adaptive_weight", title="Adaptive weight", y_label="weight"),
    ),
    "Optimization": (
        Quantity(key="learning_rate", title="Learning rate", y_label="learning rate", is_noisy=False),
        Quantity(key="gradient_norm", title="Gradient norm", y_label="norm before clipping"),
    ),
}
"""Panels for what a training step logs; those that a run has not logged, or that are always 0, are left out."""


def run_panels(run: Run) -> list[PanelGroup]:
    """Choose what to draw of a run."""
    groups = [PanelGroup(title="Validation", panels=_validation_panels(run))]
    records = run.records("train")
    for title, quantities in TRAINING.items():
        panels = [training_panel(records, quantity) for quantity in quantities]
        groups.append(PanelGroup(title=title, panels=[panel for panel in panels if panel is not None]))
    return [group for group in groups if group.panels]


def draw_run(run: Run) -> Figure:
    """Draw all panels of a run as one figure, for papers."""
    return draw_panels([panel for group in run_panels(run) for panel in group.panels])


def _validation_panels(run: Run) -> list[Panel]:
    panels = []
    for metric in METRICS:
        series = read_series(run.records("validation"), metric.key, "", ACCENT)
        if series is None:
            continue
        first, last = float(series.values[0]), float(series.values[-1])
        starts_at_base = series.steps[0] == 0
        panels.append(
            Panel(
                title=f"{metric.label} {metric.arrow}".strip(),
                summary=f"{metric.show(first)} → {metric.show(last)} {metric.unit}".strip(),
                y_label=metric.unit or ("relative squared error" if "error" in metric.key else metric.label),
                series=(series,),
                base=first if starts_at_base else None,
            )
        )
    return panels
