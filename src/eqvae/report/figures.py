"""What the page shows, made ready for the template: sentences, notes, and pictures as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from eqvae.artifacts import Pictures
from eqvae.report.columns import distances
from eqvae.report.folders import Evaluation, Run, messages
from eqvae.report.grids import Column, Grid
from eqvae.report.tables import METRICS, Metric, figure, finite

HEADLINE_KEYS = ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One large figure under the headline."""

    label: str
    figure: str
    detail: str
    improves: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing one reads."""

    title: str
    sentence: str
    tiles: tuple[Tile, ...] = ()


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


def headline(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> Headline:
    """Sum the report up: the change from the first to the last evaluation, else over a run's validations.

    Args:
        evaluations: In the order of the report.
        runs: In the order of the report.

    Returns:
        Title, sentence and large figures.
    """
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        title = f"{first.name} → {last.name}"
        if first.conditions != last.conditions:
            return Headline(title=title, sentence="Evaluated under different conditions: no change is computed.")
        return _change_headline(title, first.metrics, last.metrics)
    if evaluations:
        tiles = tuple(
            Tile(label=metric.label, figure=f"{metric.show(value)} {metric.unit}".strip(), detail=_direction(metric))
            for metric in _headline_metrics()
            if (value := figure(evaluations[0], metric.key)) is not None
        )
        words = ", ".join(f"{_in_sentence(tile.label)} {tile.figure}" for tile in tiles) or "No headline figures"
        return Headline(title=evaluations[0].name, sentence=words[0].upper() + words[1:] + ".", tiles=tiles)
    validations = runs[0].records("validation")
    if len(validations) < 2:
        return Headline(title=runs[0].name, sentence="The run has not been validated twice yet.")
    return _change_headline(runs[0].name, validations[0], validations[-1])


def shared_conditions(evaluations: Sequence[Evaluation]) -> str:
    """Say once what all evaluations were measured on.

    Args:
        evaluations: In the order of the report.

    Returns:
        For example `100 images of photos, 256 px`; empty where they differ or there is none.
    """
    if not evaluations or any(item.conditions != evaluations[0].conditions for item in evaluations):
        return ""
    return evaluations[0].describe_conditions()


def notes(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> list[str]:
    """Say what a reader must know before comparing, and what went wrong in the runs.

    Args:
        evaluations: In the order of the report.
        runs: In the order of the report.

    Returns:
        Sentences, possibly none.
    """
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
    journals = [(item.name, item.journal) for item in evaluations] + [(run.name, run.journal) for run in runs]
    return found + [f"{name}: {message}" for name, journal in journals for message in messages(journal)]


def picture_groups(evaluations: Sequence[Evaluation]) -> list[dict[str, Pictures]]:
    """Gather the evaluations that show the same images: only those are drawn side by side.

    Args:
        evaluations: In the order of the report.

    Returns:
        Pictures by the autoencoder's name, one mapping for each set of images.
    """
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
    """Encode a grid's pictures for the page: WebP, without loss where whole pixels were enlarged.

    Args:
        grid: The grid.
        max_rows: Rows to show: many would make the page heavy.

    Returns:
        Its cells as data URIs.
    """
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


def _change_headline(title: str, before: Mapping[str, object], after: Mapping[str, object]) -> Headline:
    phrases, tiles, previous_verb = [], [], ""
    for metric in _headline_metrics():
        first, last = finite(before.get(metric.key)), finite(after.get(metric.key))
        if first is None or last is None:
            continue
        change = metric.show_change(first, last)
        verb, amount = _verb_and_amount(metric, change)
        phrases.append(
            " ".join(filter(None, (_in_sentence(metric.label), "" if verb == previous_verb else verb, amount)))
        )
        previous_verb = verb
        detail = f"{metric.show(first)} → {metric.show(last)} {metric.unit}".strip()
        tiles.append(Tile(label=metric.label, figure=change, detail=detail, improves=metric.improves(first, last)))
    sentence = ", ".join(phrases) or "No figure was measured at both ends"
    return Headline(title=title, sentence=sentence[0].upper() + sentence[1:] + ".", tiles=tuple(tiles))


def _verb_and_amount(metric: Metric, change: str) -> tuple[str, str]:
    """For example ("fell", "by 47%") or ("changed", "by −0.30 dB"); ("stayed", "the same") where nothing shows."""
    if not any(digit in change for digit in "123456789"):
        return "stayed", "the same"
    if metric.better == "lower":
        return ("rose" if change.startswith("+") else "fell"), f"by {change[1:]}"
    return "changed", f"by {change}"


def _headline_metrics() -> list[Metric]:
    return [metric for metric in METRICS if metric.key in HEADLINE_KEYS]


def _in_sentence(label: str) -> str:
    return label if label.isupper() else label[0].lower() + label[1:]


def _direction(metric: Metric) -> str:
    return f"{metric.better} is better"
