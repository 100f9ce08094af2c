"""One self-contained page about what earlier stages saved: no network, no scripts, all pictures inside."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from eqvae.artifacts import check_writable, to_plain, write_atomically
from eqvae.errors import UserError
from eqvae.evidence.curves import run_panels
from eqvae.evidence.shared_curves import draw_shared_curves, shared_curves
from eqvae.report.cards import overview
from eqvae.report.charts import to_css
from eqvae.report.columns import distances, main_columns, predictor_columns
from eqvae.report.contents import Contents, read_folders
from eqvae.report.distance_chart import draw_distances
from eqvae.report.figures import EmbeddedGrid, embed, notes, picture_groups, shared_conditions
from eqvae.report.folders import Evaluation, Run
from eqvae.report.generator_sections import generator_sections
from eqvae.report.generators import SampleSet, Score, Training
from eqvae.report.grids import latent_map_grid, transform_grids
from eqvae.report.headline import headline
from eqvae.report.panels import draw_panel
from eqvae.report.spectrum_chart import draw_spectra
from eqvae.report.tables import Table, comparison_table, latent_statistics, transform_metrics

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

    def write(temporary: Path) -> None:
        temporary.write_text(page, encoding="utf-8")

    write_atomically(out, write)


def render_report(contents: Contents) -> str:
    """Render the page."""
    evaluations, runs = contents.evaluations, contents.runs
    shared = shared_curves(contents.trainings)
    package = files("eqvae.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.loader = jinja2.FunctionLoader(lambda name: package.joinpath(name).read_text(encoding="utf-8"))
    template = environment.get_template("report.html.jinja")
    predictors = predictor_columns(evaluations)
    return template.render(
        css=package.joinpath("report.css").read_text(encoding="utf-8"),
        headline=headline(contents, shared),
        conditions=shared_conditions(evaluations),
        notes=notes(contents),
        evaluations=evaluations,
        overview=overview(evaluations),
        table=comparison_table(evaluations, main_columns(evaluations)),
        predictor_table=comparison_table(evaluations, predictors) if predictors else None,
        transform_table=comparison_table(evaluations, transform_metrics(evaluations)),
        distance_tables=_distance_tables(evaluations),
        statistics=latent_statistics(evaluations),
        sections=_picture_sections(evaluations),
        runs=[(run, run_panels(run)) for run in runs],
        generators=generator_sections(contents, shared),
        draw_shared_curves=draw_shared_curves,
        draw_panel=draw_panel,
        draw_distances=draw_distances,
        draw_spectra=draw_spectra,
        to_css=to_css,
        records=_records(contents),
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


def _records(contents: Contents) -> list[Record]:
    found = [_record(f"Evaluation of {item.name}", item) for item in contents.evaluations]
    found += [_record(f"Fine-tuning run: {item.name}", item) for item in contents.runs]
    found += [_record(f"Training run: {item.name}", item) for item in contents.trainings]
    found += [_record(f"Samples: {item.name}", item) for item in contents.sample_sets]
    return found + [_record(f"Score of {item.name}", item) for item in contents.scores]


def _record(title: str, item: Evaluation | Run | Training | SampleSet | Score) -> Record:
    found = {"Configuration": item.config, "Environment": item.environment}
    if not isinstance(item, Run):
        found["Figures"] = item.metrics
    return Record(title=title, files={name: _readable(content) for name, content in found.items()})


def _readable(content: dict[str, Any]) -> str:
    return json.dumps(to_plain(content), indent=2, ensure_ascii=False)
