"""Pictures side by side, for the page and for papers: latent maps (Figure 1 of arXiv:2502.09509), transformed decodings
(Figures 2 and 6), contact sheets of samples (Figure 4).
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from eqvae.artifacts.names import SAMPLE_SHEET, SHEET_GAP_PX, SHEET_SIDE
from eqvae.artifacts.records import Pictures
from eqvae.drawing.folders import Evaluation, SampleSet, Training
from eqvae.drawing.latent_maps import latent_maps
from eqvae.drawing.lettering import fitted, lettering
from eqvae.drawing.tables import grouped
from eqvae.errors import UserError
from eqvae.images import open_picture

FRAME_MS = 100
"""For which an animation shows each frame."""

AnimationFormat = Literal["webp", "gif"]

SIDE_PX = 340
"""About what one of three sheets has on a desk; smaller ones are enlarged by whole factors."""

LEAST_COUNT = 4
"""Pictures in a row that are shown of a sheet with large ones."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a grid."""

    name: str
    """The autoencoder, or "input"."""

    formula: str
    """What is seen, in the paper's letters."""

    pictures: UInt8[Tensor, "n 3 h w"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows are images; every column shows the same images."""

    title: str
    """The transform, as `Pictures.transforms` names it; empty for latent maps."""

    columns: tuple[Column, ...]

    @property
    def num_rows(self) -> int:
        """The images."""
        return len(self.columns[0].pictures)

    @property
    def cell_px(self) -> tuple[int, int]:
        """Width and height that hold the largest picture of any column."""
        shapes = [column.pictures.shape for column in self.columns]
        return max(shape[-1] for shape in shapes), max(shape[-2] for shape in shapes)

    def enlargement(self, column: Column) -> int:
        """The whole factor by which a column's pictures are enlarged: the largest that still fits the cell."""
        width, height = self.cell_px
        return max(min(width // column.pictures.shape[-1], height // column.pictures.shape[-2]), 1)

    def cell(self, column: Column, row: int) -> Image.Image:
        """Draw one picture, enlarged pixel by pixel and centred."""
        picture = Image.fromarray(column.pictures[row].movedim(0, -1).contiguous().numpy())
        picture = _enlarged(picture, self.enlargement(column))
        width, height = self.cell_px
        if picture.size == (width, height):
            return picture
        padded = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        padded.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        return padded


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One contact sheet."""

    label: str
    path: Path

    cell_px: int | None
    """Side of one picture; None where the folder does not say."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedPicture:
    """A picture on the page."""

    name: str
    formula: str = ""
    alt: str
    source: str
    """A data URI."""

    width_px: int
    height_px: int


@dataclass(frozen=True, kw_only=True)
class EmbeddedGrid:
    """A grid on the page."""

    title: str
    rows: tuple[tuple[EmbeddedPicture, ...], ...]
    num_hidden_rows: int


def picture_groups(evaluations: Sequence[Evaluation]) -> list[dict[str, Pictures]]:
    """Gather the evaluations that show the same images: only those are drawn side by side."""
    shown = [(item.name, item.pictures) for item in evaluations if item.pictures is not None]
    return [dict(group) for group in grouped(shown, lambda one, other: torch.equal(one[1].images, other[1].images))]


def transform_grids(pictures: Mapping[str, Pictures]) -> list[Grid]:
    """Lay out transformed decodings: x, D(E(tau o x)) of the base, and D(tau o E(x)) of every autoencoder."""
    first = next(iter(pictures.values()))
    names = dict.fromkeys(transform for item in pictures.values() for transform in item.transforms)
    grids = []
    for transform in names:
        members = {name: item for name, item in pictures.items() if transform in item.transforms}
        base = next(iter(members))
        index = members[base].transforms.index(transform)
        columns = [
            Column(name=first.input_name, formula="x", pictures=first.images),
            Column(name=base, formula="D(E(τ∘x))", pictures=members[base].encoded_transformed[index]),
        ]
        for name, item in members.items():
            decoded = item.decoded_transformed[item.transforms.index(transform)]
            columns.append(Column(name=name, formula="D(τ∘E(x))", pictures=decoded))
        grids.append(Grid(title=transform, columns=tuple(columns)))
    return grids


def turning_grids(pictures: Mapping[str, Pictures]) -> list[Grid]:
    """Lay out each angle of a whole turn: tau o x, and D(tau o E(x)) of every autoencoder that was turned alike."""
    turned = {name: item.turned for name, item in pictures.items() if item.turned is not None}
    if not turned:
        return []
    first = next(iter(turned.values()))
    alike = {name: frames for name, frames in turned.items() if frames.shape == first.shape}

    input_name = next(iter(pictures.values())).input_name
    angles = [slice(angle, angle + 1) for angle in range(first.shape[1])]
    return [
        turned_grid(first[0, here], {name: each[1, here] for name, each in alike.items()}, input_name)
        for here in angles
    ]


def turned_grid(
    target: UInt8[Tensor, "n 3 h w"], decoded: Mapping[str, UInt8[Tensor, "n 3 _ _"]], input_name: str = "input"
) -> Grid:
    """Lay out tau o x beside D(tau o E(x)) of each autoencoder."""
    columns = [Column(name=input_name, formula="τ∘x", pictures=target)]
    columns += [Column(name=name, formula="D(τ∘E(x))", pictures=each) for name, each in decoded.items()]
    return Grid(title="", columns=tuple(columns))


def latent_map_grid(pictures: Mapping[str, Pictures]) -> Grid:
    """Lay out images beside the principal components of their latents; see `latent_maps`."""
    first = next(iter(pictures.values()))
    columns = [Column(name=first.input_name, formula="x", pictures=first.images)]
    maps = latent_maps([item.latents for item in pictures.values()])
    columns += [
        Column(name=name, formula="PCA of E(x)", pictures=drawn) for name, drawn in zip(pictures, maps, strict=True)
    ]
    return Grid(title="", columns=tuple(columns))


def card_grids(evaluations: Sequence[Evaluation]) -> dict[str, Grid]:
    """An image, its reconstruction and its latent map, by the autoencoder's name; maps of equal shape share colours."""
    grids = {}
    for group in picture_groups(evaluations):
        image, *maps = latent_map_grid(group).columns
        for (name, pictures), latent_map in zip(group.items(), maps, strict=True):
            decoded = Column(name="decoded", formula="D(E(x))", pictures=pictures.reconstructions)
            named = Column(name="latent map", formula=latent_map.formula, pictures=latent_map.pictures)
            grids[name] = Grid(title="", columns=(image, decoded, named))
    return grids


def draw_grid(grid: Grid, gap_px: int = 8) -> Image.Image:
    """Draw a grid as one picture on white, the columns' names above: for papers and readmes."""
    width, height = grid.cell_px
    size = max(width // 16, 9)
    font = lettering(size)
    header = 3 * size + gap_px
    sheet = Image.new(
        "RGB", (len(grid.columns) * (width + gap_px) + gap_px, header + grid.num_rows * (height + gap_px)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for position, column in enumerate(grid.columns):
        left = gap_px + position * (width + gap_px)
        centre = left + width // 2
        draw.text((centre, gap_px + size), fitted(column.name, font, width), fill="#6b6b70", font=font, anchor="ms")
        draw.text((centre, gap_px + 2.4 * size), column.formula, fill="#1d1d1f", font=font, anchor="ms")
        for row in range(grid.num_rows):
            cell = grid.cell(column, row)
            sheet.paste(cell, (left, header + row * (height + gap_px)), cell if cell.mode == "RGBA" else None)
    return sheet


def embed(grid: Grid, max_rows: int) -> EmbeddedGrid:
    """Encode a grid's pictures for the page: without loss where whole pixels were enlarged."""
    num_rows = min(grid.num_rows, max_rows)

    def cell(column: Column, row: int) -> EmbeddedPicture:
        transform = f", {grid.title}" if grid.title and column.formula != "x" else ""
        alt = f"Image {row + 1}, {column.name}: {column.formula}{transform}"
        picture, is_exact = grid.cell(column, row), grid.enlargement(column) > 1
        return embed_picture(picture, column.name, column.formula, alt, lossless=is_exact)

    rows = tuple(tuple(cell(column, row) for column in grid.columns) for row in range(num_rows))
    return EmbeddedGrid(title=_transform_title(grid.title), rows=rows, num_hidden_rows=grid.num_rows - num_rows)


def stages(training: Training) -> list[Sheet]:
    """Choose the contact sheets that show how samples became better: the first, the middle, the last."""
    chosen = steps = list(training.sheets)
    if len(steps) > 3:
        middle = (steps[0] + steps[-1]) / 2
        chosen = [steps[0], min(steps[1:-1], key=lambda step: abs(step - middle)), steps[-1]]
    sheets = []
    for step in chosen:
        count = training.num_images(step)
        label = f"Step {step:,}" + (f", {count:,} images" if count is not None else "")
        sheets.append(Sheet(label=label, path=training.sheets[step], cell_px=_image_size_px(training.card)))
    return sheets


def sample_sheet(samples: SampleSet) -> Sheet:
    """Find the contact sheet of a sample set."""
    return Sheet(label=samples.name, path=samples.folder / SAMPLE_SHEET, cell_px=_image_size_px(samples.card))


def read_sheet(sheet: Sheet) -> Image.Image:
    """Read a sheet, or of one with large pictures the first rows and columns."""
    try:
        with open_picture(sheet.path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"'{sheet.path}' is no readable picture ({error})", "Remove it or write it again") from None
    if sheet.cell_px is not None:
        cell_px = sheet.cell_px + SHEET_GAP_PX
        side = max(round(SIDE_PX / sheet.cell_px), LEAST_COUNT) * cell_px + SHEET_GAP_PX
        # To the right of the pictures stand the rows' names, which stay.
        end = min(SHEET_SIDE, (picture.width - SHEET_GAP_PX) // cell_px) * cell_px + SHEET_GAP_PX
        picture = Image.fromarray(np.delete(np.asarray(picture)[:side], np.s_[min(side, end) : end], axis=1))
    return _enlarged(picture, max(round(SIDE_PX / picture.width), 1))


def embed_sheet(sheet: Sheet, alt: str) -> EmbeddedPicture:
    """Encode a sheet for the page, at most for screens of twice the density."""
    picture = read_sheet(sheet)
    picture.thumbnail((2 * SIDE_PX, 2 * SIDE_PX), Image.Resampling.LANCZOS)
    return embed_picture(picture, sheet.label, "", alt)


def draw_stages(sheets: Sequence[Sheet]) -> Image.Image:
    """Lay sheets side by side under their labels, for papers."""
    pictures = [read_sheet(sheet) for sheet in sheets]
    gap, size = max(pictures[0].width // 24, 8), max(pictures[0].width // 22, 13)
    font = lettering(size)
    pairs = list(zip(sheets, pictures, strict=True))
    widths = [max(picture.width, int(font.getlength(sheet.label)) + 1) for sheet, picture in pairs]
    top, height = 2 * gap + size, max(item.height for item in pictures)
    page = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), top + height + gap), "white")
    draw, x = ImageDraw.Draw(page), gap
    for sheet, picture, width in zip(sheets, pictures, widths, strict=True):
        draw.text((x, gap), sheet.label, fill="#55555a", font=font)
        page.paste(picture, (x, top))
        x += width + gap
    return page


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def embed_picture(
    picture: Image.Image, name: str, formula: str, alt: str, *, lossless: bool = False, effort: int = 4
) -> EmbeddedPicture:
    """Encode one picture for a page; an effort of 0 takes half a millisecond and some more bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90 if effort else 0, method=effort, lossless=lossless)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = picture.size
    return EmbeddedPicture(name=name, formula=formula, alt=alt, source=source, width_px=width, height_px=height)


def encode_animation(frames: Sequence[Image.Image], kind: AnimationFormat) -> bytes:
    """Encode pictures of one size as an endless animation."""
    buffer = io.BytesIO()
    own = {"quality": 85, "method": 4} if kind == "webp" else {"optimize": False}
    frames[0].save(
        buffer, format=kind, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, **own
    )  # fmt: skip
    return buffer.getvalue()


def embed_animation(grids: Sequence[Grid], alt: str) -> EmbeddedPicture | None:
    """Encode grids as a moving picture for the page; None where there are none."""
    if not grids:
        return None
    frames = [draw_grid(grid) for grid in grids]
    source = "data:image/webp;base64," + base64.b64encode(encode_animation(frames, "webp")).decode("ascii")
    width, height = frames[0].size
    return EmbeddedPicture(name="", alt=alt, source=source, width_px=width, height_px=height)


def _transform_title(transform: str) -> str:
    """For example `Rotation by 90°`; the name itself where it says enough."""
    if transform.startswith("s = ") and "·" not in transform:
        return f"Scale, {transform}"
    if transform.endswith(("°", " degrees")) and "·" not in transform:
        return f"Rotation by {transform}"
    return transform


def _image_size_px(card: Mapping[str, Any]) -> int | None:
    """Side of a sheet's pictures; None where it is unknown, or they are no squares, and the sheet is shown whole."""
    size, latents = card.get("image_size_px"), (card.get("transformer") or {}).get("latents", {})
    is_square = latents.get("height") == latents.get("width")
    return size if isinstance(size, int) and size > 0 and is_square else None
