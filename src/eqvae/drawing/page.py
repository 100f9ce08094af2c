"""One self-contained page about what earlier stages saved: no network, no scripts, all pictures inside."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from eqvae.artifacts.files import check_writable, to_plain, write_text
from eqvae.drawing import comparison
from eqvae.drawing.charts import autoencoder_colors, to_css
from eqvae.drawing.comparison_charts import draw_curves
from eqvae.drawing.evaluation_charts import (
    DistanceChart,
    SpectrumChart,
    charts_of_one,
    distance_charts,
    draw_distances,
    draw_spectra,
    spectrum_charts,
)
from eqvae.drawing.folders import Contents, Evaluation, FineTuning, OutputFolder, read_folders
from eqvae.drawing.panels import draw_panel, run_panels, training_panels
from eqvae.drawing.pictures import (
    EmbeddedGrid,
    card_grids,
    embed,
    embed_animation,
    embed_sheet,
    latent_map_grid,
    picture_groups,
    sample_sheet,
    stages,
    transform_grids,
    turning_grids,
)
from eqvae.drawing.summary import drawing_facts, headline, notes, shared_conditions, training_facts
from eqvae.drawing.tables import (
    FigureTable,
    card_columns,
    data_name,
    distances,
    figure_table,
    latent_statistics,
    main_columns,
    predictor_columns,
    score_tables,
    transform_metrics,
)
from eqvae.errors import UserError

FEATURED_TRANSFORMS = ("s = 0.5", "90°")
"""Shown openly, the first as in the paper's Figure 2; the other transforms fold away."""

MAX_MAPS, MAX_DECODINGS = 6, 4
"""Images shown in each figure: more would make the page heavy without showing more."""


PACKAGE = files("eqvae.drawing")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One autoencoder at one glance."""

    name: str

    color: str
    """In all charts."""

    detail: str
    """The latent's shape, features other than Inception's, and what was measured on where that differs."""

    figures: tuple[tuple[str, str, str], ...]
    """Label without the features, which the card names once; arrow; figure with its unit."""

    pictures: EmbeddedGrid | None
    """One row: an image, its reconstruction and its latent map; None where the folder has no pictures."""

    distances: list[DistanceChart]
    spectra: list[SpectrumChart]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write a page about what earlier stages saved.

    Args:
        folders: Output folders of `eqvae evaluate`, `finetune`, `train`, `sample` and `score`, of each kind the base
            first. The run that made an evaluated autoencoder is found through its path.
        out: The HTML file; replaced atomically.

    Raises:
        UserError: If a folder is missing, unfinished or of another kind, or `out` is a folder or
            can't be written.
    """
    if out.is_dir():
        raise UserError(f"'{out}' is a folder", "Name the HTML file to write")
    check_writable(out.parent, "--out")
    page = render_report(read_folders(folders))
    write_text(out, page)


@functools.cache
def templates() -> jinja2.Environment:
    """The pages' templates, by the names of their files."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.loader = jinja2.FunctionLoader(lambda name: PACKAGE.joinpath(name).read_text(encoding="utf-8"))
    draw = {"draw_panel": draw_panel, "draw_distances": draw_distances, "draw_spectra": draw_spectra}
    environment.globals |= draw | {"draw_curves": draw_curves, "to_css": to_css, "words": comparison}
    environment.globals |= {"data_name": data_name, "autoencoder_colors": autoencoder_colors}
    return environment


def render_report(contents: Contents) -> str:
    """Render the page."""
    evaluations = contents.evaluations
    shared = comparison.shared_curves(contents.trainings)
    bars, spectra = distance_charts(evaluations), spectrum_charts(evaluations)
    return (
        templates()
        .get_template("report.html.jinja")
        .render(
            css=PACKAGE.joinpath("report.css").read_text(encoding="utf-8"),
            headline=headline(contents, shared),
            conditions=shared_conditions(evaluations),
            notes=notes(contents),
            evaluations=evaluations,
            cards=cards(evaluations, bars, spectra),
            distance_charts=[chart for chart in bars if len(chart.entries) > 1],  # the card has a single one's
            spectrum_charts=[chart for chart in spectra if len(chart.entries) > 1],
            table=figure_table(evaluations, main_columns(evaluations)),
            predictor_table=figure_table(evaluations, predictor_columns(evaluations)),
            transform_tables=_transform_tables(evaluations),
            statistics=latent_statistics(evaluations),
            sections=[_picture_section(group) for group in picture_groups(evaluations)],
            runs=[(run, run_panels(run)) for run in contents.runs],
            shared=shared,
            score_tables=score_tables(contents.scores),
            trainings=[
                (
                    item.name,
                    training_facts(item),
                    [embed_sheet(sheet, f"Samples of {item.name}: {sheet.label}") for sheet in stages(item)],
                    training_panels(item),
                )
                for item in contents.trainings
            ],
            sample_sets=[
                (item.name, drawing_facts(item), embed_sheet(sample_sheet(item), f"Samples of {item.name}"))
                for item in contents.sample_sets
            ],
            records=[(f"{item.TITLE} {item.name}", _record(item)) for items in contents for item in items],
        )
    )


def cards(
    evaluations: Sequence[Evaluation], bars: Sequence[DistanceChart], spectra: Sequence[SpectrumChart]
) -> list[Card]:
    """Make a card for each evaluation that measured more than single images (`eqvae evaluate --all`)."""
    drawn = {bar.name for chart in bars for bar in chart.entries}
    drawn |= {line.name for chart in spectra for line in chart.entries}
    members = [item for item in evaluations if item.name in drawn]
    colors = autoencoder_colors([item.name for item in evaluations])
    grids, columns = card_grids(evaluations), card_columns(members)
    return [
        Card(
            name=item.name,
            color=colors[item.name],
            detail=_detail(item, says_conditions=not shared_conditions(evaluations)),
            figures=tuple(
                (metric.label.partition(" (")[0], metric.arrow, f"{text} {metric.unit}".strip())
                for metric in columns
                if (text := metric.show_of(item.metrics)) is not None
            ),
            pictures=embed(grids[item.name], 1) if item.name in grids else None,
            distances=charts_of_one(bars, item.name),
            spectra=charts_of_one(spectra, item.name),
        )
        for item in members
    ]


def _detail(evaluation: Evaluation, *, says_conditions: bool) -> str:
    parts = []
    if evaluation.pictures is not None:
        channels, height, width = evaluation.pictures.latents.shape[1:]
        size_px = evaluation.pictures.images.shape[-1]
        parts.append(f"{channels} channels, {height} \N{MULTIPLICATION SIGN} {width} cells for {size_px} px")
    found = (*distances([evaluation], "r"), *distances([evaluation], "i"))
    parts += dict.fromkeys(f"{distance.features} features" for distance in found if not distance.is_fid)
    return "; ".join([*parts, *([evaluation.describe_conditions()] if says_conditions else [])])


def _transform_tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, FigureTable]]:
    """Equivariance errors and Frechet distances of single transformations, which other figures average."""
    tables = [("Equivariance error", figure_table(evaluations, transform_metrics(evaluations)))]
    for distance in distances(evaluations, "r"):
        metrics = transform_metrics(evaluations, distance.key, distance.digits)
        tables.append((distance.label, figure_table(evaluations, metrics)))
    return [(label, table) for label, table in tables if table.metrics]


def _picture_section(group: dict[str, Any]) -> dict[str, Any]:
    """The figures of evaluations that show the same images: maps, decodings shown at once, others that fold away."""
    grids = transform_grids(group)
    named = [grid for grid in grids if grid.title in FEATURED_TRANSFORMS]
    featured = sorted(named, key=lambda grid: FEATURED_TRANSFORMS.index(grid.title)) or grids[:1]
    return {
        "names": tuple(group),
        "channel_counts": {item.latents.shape[1] for item in group.values()},
        "latent_maps": embed(latent_map_grid(group), MAX_MAPS),
        "turning": embed_animation(turning_grids(group), f"A whole turn, {', '.join(group)}: τ∘x, D(τ∘E(x))"),
        "featured": [embed(grid, MAX_DECODINGS) for grid in featured],
        "others": [embed(grid, MAX_DECODINGS) for grid in grids if grid not in featured],
    }


def _record(item: OutputFolder) -> dict[str, str]:
    """What a folder says about itself, as readable text."""
    found = {"Configuration": item.config, "Environment": item.environment}
    if not isinstance(item, FineTuning):
        found["Figures"] = item.metrics
    return {name: json.dumps(to_plain(content), indent=2, ensure_ascii=False) for name, content in found.items()}
