"""One card for each autoencoder: the figures, charts and pictures that tell what it is like, at one glance."""

from collections.abc import Sequence
from dataclasses import dataclass

from eqvae.report.charts import autoencoder_colors
from eqvae.report.columns import card_columns, distances
from eqvae.report.distance_chart import DistanceChart, distance_charts
from eqvae.report.figures import EmbeddedGrid, embed, picture_groups, shared_conditions
from eqvae.report.folders import Evaluation
from eqvae.report.grids import Column, Grid, latent_map_grid
from eqvae.report.spectrum_chart import SpectrumChart, spectrum_charts
from eqvae.report.tables import Metric, show_figure


@dataclass(frozen=True, kw_only=True)
class CardFigure:
    """One figure of a card."""

    label: str
    """Without the features, which the card names once."""

    arrow: str

    text: str
    """With the unit."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One autoencoder."""

    name: str

    color: str
    """In all charts."""

    detail: str
    """The latent's shape, features other than Inception's, and what was measured on where that differs."""

    figures: tuple[CardFigure, ...]

    pictures: EmbeddedGrid | None
    """One row: an image, its reconstruction and its latent map; None where the folder has no pictures."""

    distances: tuple[DistanceChart, ...]
    spectra: tuple[SpectrumChart, ...]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All cards, and the charts that set autoencoders side by side."""

    cards: tuple[Card, ...]

    distances: tuple[DistanceChart, ...]
    """Those of two or more autoencoders: the card has a single one's."""

    spectra: tuple[SpectrumChart, ...]

    @property
    def num_columns(self) -> int:
        """Of cards on a wide screen: rows stay full where that is possible."""
        count = len(self.cards)
        return count if count <= 3 else 2 if count == 4 else 3


def overview(evaluations: Sequence[Evaluation]) -> Overview:
    """Make a card for each evaluation that measured more than single images (`eqvae evaluate --all`)."""
    bars, spectra = distance_charts(evaluations), spectrum_charts(evaluations)
    drawn = {item.name for chart in bars for item in chart.bars}
    drawn |= {item.name for chart in spectra for item in chart.lines}
    members = [item for item in evaluations if item.name in drawn]
    colors = autoencoder_colors([item.name for item in evaluations])
    rows = _picture_rows(evaluations)
    says_conditions = not shared_conditions(evaluations)
    cards = tuple(
        Card(
            name=item.name,
            color=colors[item.name],
            detail=_detail(item, says_conditions),
            figures=_figures(item, card_columns(members)),
            pictures=embed(rows[item.name], 1) if item.name in rows else None,
            distances=tuple(chart.only(item.name) for chart in bars if chart.has(item.name)),
            spectra=tuple(chart.only(item.name) for chart in spectra if chart.has(item.name)),
        )
        for item in members
    )
    return Overview(
        cards=cards,
        distances=tuple(chart for chart in bars if len(chart.bars) > 1),
        spectra=tuple(chart for chart in spectra if len(chart.lines) > 1),
    )


def _detail(evaluation: Evaluation, says_conditions: bool) -> str:
    parts = []
    if evaluation.pictures is not None:
        channels, height, width = evaluation.pictures.latents.shape[1:]
        size_px = evaluation.pictures.images.shape[-1]
        parts.append(f"{channels} channels, {height} \N{MULTIPLICATION SIGN} {width} cells for {size_px} px")
    found = (*distances([evaluation], "r"), *distances([evaluation], "i"))
    parts += dict.fromkeys(f"{distance.features} features" for distance in found if not distance.is_fid)
    if says_conditions:
        parts.append(evaluation.describe_conditions())
    return "; ".join(parts)


def _figures(evaluation: Evaluation, columns: Sequence[Metric]) -> tuple[CardFigure, ...]:
    return tuple(
        CardFigure(label=metric.label.partition(" (")[0], arrow=metric.arrow, text=f"{text} {metric.unit}".strip())
        for metric in columns
        if (text := show_figure(evaluation, metric)) is not None
    )


def _picture_rows(evaluations: Sequence[Evaluation]) -> dict[str, Grid]:
    """An image, its reconstruction and its latent map, by the autoencoder's name; maps of equal shape share colours."""
    rows = {}
    for group in picture_groups(evaluations):
        image, *maps = latent_map_grid(group).columns
        for (name, pictures), latent_map in zip(group.items(), maps, strict=True):
            columns = (
                image,
                Column(name="decoded", formula="D(E(x))", pictures=pictures.reconstructions),
                Column(name="latent map", formula=latent_map.formula, pictures=latent_map.pictures),
            )
            rows[name] = Grid(title="", columns=columns)
    return rows
