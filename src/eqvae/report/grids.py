"""Pictures side by side, in named columns: transformed decodings (Figures 2 and 6 of arXiv:2502.09509), latent maps."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqvae.artifacts import Pictures
from eqvae.report.latent_maps import latent_maps


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
        factor = self.enlargement(column)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        width, height = self.cell_px
        if picture.size == (width, height):
            return picture
        padded = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        padded.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
        return padded


def transform_grids(pictures: Mapping[str, Pictures]) -> list[Grid]:
    """Lay out transformed decodings: x, D(E(tau o x)) of the base, and D(tau o E(x)) of every autoencoder."""
    images = _common_images(pictures)
    names = dict.fromkeys(transform for item in pictures.values() for transform in item.transforms)
    grids = []
    for transform in names:
        members = {name: item for name, item in pictures.items() if transform in item.transforms}
        base = next(iter(members))
        index = members[base].transforms.index(transform)
        columns = [
            Column(name="input", formula="x", pictures=images),
            Column(name=base, formula="D(E(τ∘x))", pictures=members[base].encoded_transformed[index]),
        ]
        for name, item in members.items():
            decoded = item.decoded_transformed[item.transforms.index(transform)]
            columns.append(Column(name=name, formula="D(τ∘E(x))", pictures=decoded))
        grids.append(Grid(title=transform, columns=tuple(columns)))
    return grids


def latent_map_grid(pictures: Mapping[str, Pictures]) -> Grid:
    """Lay out images beside the principal components of their latents; see `latent_maps`."""
    columns = [Column(name="input", formula="x", pictures=_common_images(pictures))]
    maps = latent_maps([item.latents for item in pictures.values()])
    columns += [
        Column(name=name, formula="PCA of E(x)", pictures=drawn) for name, drawn in zip(pictures, maps, strict=True)
    ]
    return Grid(title="", columns=tuple(columns))


def draw_grid(grid: Grid, gap_px: int = 8) -> Image.Image:
    """Draw a grid as one picture on white, the columns' names above: for papers and readmes."""
    width, height = grid.cell_px
    size = max(width // 16, 9)
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # it has the Greek letters
    font = ImageFont.truetype(str(font_file), size)
    header = 3 * size + gap_px
    sheet = Image.new(
        "RGB",
        (len(grid.columns) * (width + gap_px) + gap_px, header + grid.num_rows * (height + gap_px)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for position, column in enumerate(grid.columns):
        left = gap_px + position * (width + gap_px)
        centre = left + width // 2
        draw.text((centre, gap_px + size), column.name, fill="#6b6b70", font=font, anchor="ms")
        draw.text((centre, gap_px + 2.4 * size), column.formula, fill="#1d1d1f", font=font, anchor="ms")
        for row in range(grid.num_rows):
            cell = grid.cell(column, row)
            sheet.paste(cell, (left, header + row * (height + gap_px)), cell if cell.mode == "RGBA" else None)
    return sheet


def to_png(image: Image.Image) -> bytes:
    """Encode without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _common_images(pictures: Mapping[str, Pictures]) -> UInt8[Tensor, "n 3 h w"]:
    images = [item.images for item in pictures.values()]
    if not all(torch.equal(images[0], other) for other in images[1:]):
        raise ValueError("The autoencoders' pictures show different images")
    return images[0]
