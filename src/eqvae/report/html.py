"""One self-contained page about evaluations and fine-tuning runs: no network, no scripts, all pictures inside."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from eqvae.artifacts import check_writable, to_plain, write_atomically
from eqvae.report.cards import overview
from eqvae.report.charts import to_css
from eqvae.report.columns import distances, main_columns, predictor_columns
from eqvae.report.curves import draw_panel, run_panels
from eqvae.report.distance_chart import draw_distances
from eqvae.report.figures import EmbeddedGrid, embed, headline, notes, picture_groups, shared_conditions
from eqvae.report.folders import Evaluation, Run, read_folders
from eqvae.report.grids import latent_map_grid, transform_grids
from eqvae.report.spectrum_chart import draw_spectra
from eqvae.report.tables import Table, comparison_table, latent_statistics, transform_metrics
from eqvae.runtime.errors import UserError

FEATURED_TRANSFORMS = ("s = 0.5", "90°")
"""Shown openly, the first as in the paper's Figure 2; the other transforms fold away."""

MAX_MAPS, MAX_DECODINGS = 6, 4
"""Images shown in each figure: more would make the page heavy without showing more."""


@dataclass(frozen=True, kw_only=True)
class PictureSection:
    """The figures of evaluations that show the same images."""

    names: tuple[str, ...]
    """The autoencoders."""

    channel_counts: tuple[int, ...]

    latent_maps: EmbeddedGrid

    featured: tuple[EmbeddedGrid, ...]
    """Transformed decodings that are shown at once."""

    others: tuple[EmbeddedGrid, ...]
    """Transformed decodings that fold away."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a folder says about itself, as readable text."""

    title: str
    files: dict[str, str]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write a page about what earlier stages saved.

    Args:
        folders: Folders of `eqvae evaluate` and `eqvae finetune`, the base autoencoder's evaluation first. The run
            that made an evaluated autoencoder is found through its path.
        out: The HTML file; replaced atomically.

    Raises:
        UserError: If a folder is missing, unfinished or of another kind, or `out` is a folder or
            can't be written.
    """
    if out.is_dir():
        raise UserError(f"'{out}' is a folder", "Name the HTML file to write")
    check_writable(out.parent, "--out")
    page = render_report(*read_folders(folders))

    def write(temporary: Path) -> None:
        temporary.write_text(page, encoding="utf-8")

    write_atomically(out, write)


def render_report(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> str:
    """Render the page.

    Args:
        evaluations: In the order of the page; the first is what the others are compared with.
        runs: In the order of the page.

    Returns:
        HTML.
    """
    package = files("eqvae.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.loader = jinja2.FunctionLoader(lambda name: package.joinpath(name).read_text(encoding="utf-8"))
    template = environment.get_template("report.html.jinja")
    predictors = predictor_columns(evaluations)
    return template.render(
        css=package.joinpath("report.css").read_text(encoding="utf-8"),
        headline=headline(evaluations, runs),
        conditions=shared_conditions(evaluations),
        notes=notes(evaluations, runs),
        evaluations=evaluations,
        overview=overview(evaluations),
        table=comparison_table(evaluations, main_columns(evaluations)),
        predictor_table=comparison_table(evaluations, predictors) if predictors else None,
        transform_table=comparison_table(evaluations, transform_metrics(evaluations)),
        distance_tables=_distance_tables(evaluations),
        statistics=latent_statistics(evaluations),
        sections=_picture_sections(evaluations),
        runs=[(run, run_panels(run)) for run in runs],
        draw_panel=draw_panel,
        draw_distances=draw_distances,
        draw_spectra=draw_spectra,
        to_css=to_css,
        records=[_evaluation_record(item) for item in evaluations] + [_run_record(run) for run in runs],
    )


def _distance_tables(evaluations: Sequence[Evaluation]) -> list[tuple[str, Table]]:
    """Frechet distances of single transformations, which Figure 3 rounds and averages: label and table."""
    tables = []
    for distance in distances(evaluations, "r"):
        metrics = transform_metrics(evaluations, distance.key, distance.digits)
        if metrics:
            tables.append((distance.label, comparison_table(evaluations, metrics)))
    return tables


def _picture_sections(evaluations: Sequence[Evaluation]) -> list[PictureSection]:
    sections = []
    for group in picture_groups(evaluations):
        grids = transform_grids(group)
        named = [grid for grid in grids if grid.title in FEATURED_TRANSFORMS]
        featured = sorted(named, key=lambda grid: FEATURED_TRANSFORMS.index(grid.title)) or grids[:1]
        sections.append(
            PictureSection(
                names=tuple(group),
                channel_counts=tuple(sorted({item.latents.shape[1] for item in group.values()})),
                latent_maps=embed(latent_map_grid(group), MAX_MAPS),
                featured=tuple(embed(grid, MAX_DECODINGS) for grid in featured),
                others=tuple(embed(grid, MAX_DECODINGS) for grid in grids if grid not in featured),
            )
        )
    return sections


def _evaluation_record(evaluation: Evaluation) -> Record:
    return Record(
        title=f"Evaluation of {evaluation.name}",
        files={
            "Configuration": _readable(evaluation.config),
            "Environment": _readable(evaluation.environment),
            "Figures": _readable(evaluation.metrics),
        },
    )


def _run_record(run: Run) -> Record:
    return Record(
        title=f"Fine-tuning run: {run.name}",
        files={"Configuration": _readable(run.config), "Environment": _readable(run.environment)},
    )


def _readable(content: dict[str, Any]) -> str:
    return json.dumps(to_plain(content), indent=2, ensure_ascii=False)
