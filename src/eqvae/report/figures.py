"""What the page shows, made ready for the template: conditions, notes, and pictures as data URIs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eqvae.artifacts import Pictures
from eqvae.report.columns import distances
from eqvae.report.contents import Contents
from eqvae.report.folders import Evaluation, Run, messages
from eqvae.report.generator_text import generator_notes
from eqvae.report.generators import Score
from eqvae.report.grids import Column, Grid


@dataclass(frozen=True, kw_only=True)
class EmbeddedPicture:
    """One cell of a grid on the page."""

    name: str
    formula: str
    alt: str
    source: str
    """A data URI."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedGrid:
    """A grid on the page."""

    title: str
    rows: tuple[tuple[EmbeddedPicture, ...], ...]
    num_hidden_rows: int
    width_px: int
    height_px: int


def shared_conditions(evaluations: Sequence[Evaluation]) -> str:
    """Say once what all evaluations were measured on."""
    if not evaluations or any(item.conditions != evaluations[0].conditions for item in evaluations):
        return ""
    return evaluations[0].describe_conditions()


def notes(contents: Contents) -> list[str]:
    """Say what a reader must know before comparing, and what went wrong in the runs."""
    evaluations, runs = contents.evaluations, contents.runs
    found = []
    different = [item for item in evaluations[1:] if item.conditions != evaluations[0].conditions]
    if different:
        conditions = "; ".join(f"{item.name} on {item.describe_conditions()}" for item in (evaluations[0], *different))
        found.append(f"Not comparable, so changes are left out: {conditions}.")
    channels = {item.name: item.num_channels for item in evaluations if item.num_channels}
    if len(set(channels.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in channels.items())
        found.append(
            f"The latents have different numbers of channels ({counts}): their maps have separate projections, "
            "and colours cannot be compared across them."
        )
    features = {item.name: distance.features for item in evaluations for distance in distances([item], "r")}
    if len(set(features.values())) > 1:
        used = ", ".join(f"{name}: {feature}" for name, feature in features.items())
        found.append(
            f"Fréchet distances by different features ({used}) cannot be compared: they stand in columns and charts of "
            "their own."
        )
    if len(picture_groups(evaluations)) > 1:
        found.append("The evaluations show different images, so their pictures stand in separate figures.")
    found += [f"{item.name}: the evaluation has no pictures." for item in evaluations if item.pictures is None]
    found += [f"{run.name}: the run has no journal yet." for run in runs if not run.journal]
    found += generator_notes(contents.trainings, contents.scores)
    journaled: list[Evaluation | Run | Score] = [*evaluations, *runs, *contents.scores]
    journals = [(item.name, item.journal) for item in journaled]
    return found + [f"{name}: {message}" for name, journal in journals for message in messages(journal)]


def picture_groups(evaluations: Sequence[Evaluation]) -> list[dict[str, Pictures]]:
    """Gather the evaluations that show the same images: only those are drawn side by side."""
    groups: list[dict[str, Pictures]] = []
    for item in evaluations:
        if item.pictures is None:
            continue
        for group in groups:
            if torch.equal(next(iter(group.values())).images, item.pictures.images):
                group[item.name] = item.pictures
                break
        else:
            groups.append({item.name: item.pictures})
    return groups


def embed(grid: Grid, max_rows: int) -> EmbeddedGrid:
    """Encode a grid's pictures for the page: WebP, without loss where whole pixels were enlarged."""
    width, height = grid.cell_px
    num_rows = min(grid.num_rows, max_rows)
    return EmbeddedGrid(
        title=_transform_title(grid.title),
        rows=tuple(tuple(_embed_cell(grid, column, row) for column in grid.columns) for row in range(num_rows)),
        num_hidden_rows=grid.num_rows - num_rows,
        width_px=width,
        height_px=height,
    )


def _transform_title(transform: str) -> str:
    """For example `Rotation by 90°`; the name itself where it says enough."""
    if transform.startswith("s = ") and "·" not in transform:
        return f"Scale, {transform}"
    if transform.endswith(("°", " degrees")) and "·" not in transform:
        return f"Rotation by {transform}"
    return transform


def _embed_cell(grid: Grid, column: Column, row: int) -> EmbeddedPicture:
    buffer = io.BytesIO()
    grid.cell(column, row).save(buffer, format="WEBP", quality=90, method=4, lossless=grid.enlargement(column) > 1)
    transform = f", {grid.title}" if grid.title and column.formula != "x" else ""
    return EmbeddedPicture(
        name=column.name,
        formula=column.formula,
        alt=f"Image {row + 1}, {column.name}: {column.formula}{transform}",
        source="data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
    )
