"""What `eqvae explore` shows: for each autoencoder a row of pictures of one image under one transformation.

In the order of the paper's formula, as HTML for the page, and as a still or an animation to keep.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from eqvae.artifacts.channels import shown
from eqvae.artifacts.records import to_uint8
from eqvae.drawing.evaluation_charts import SpectrumChart
from eqvae.drawing.page import PACKAGE, templates
from eqvae.drawing.pictures import Column, EmbeddedPicture, Grid, draw_grid, embed_picture

WORST_ERROR = 0.5
"""Mean absolute difference of the channels, of 2, that has the error map's brightest colour."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One picture of a row."""

    formula: str
    picture: UInt8[Tensor, "1 3 h w"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one autoencoder makes of the image."""

    name: str
    seen: tuple[Seen, ...]

    figures: tuple[str, ...] = ()
    """For example `PSNR 24.1 dB`."""

    @property
    def grid(self) -> Grid:
        """The pictures as a grid of one row."""
        columns = [Column(name=self.name, formula=seen.formula, pictures=seen.picture) for seen in self.seen]
        return Grid(title="", columns=tuple(columns))

    @property
    def pictures(self) -> list[EmbeddedPicture]:
        """The pictures as the page holds them."""
        grid = self.grid
        return [
            embed_picture(grid.cell(column, 0), self.name, column.formula, f"{self.name}: {column.formula}",
                          lossless=True, effort=0)
            for column in grid.columns
        ]  # fmt: skip


def framed(x: Float[Tensor, "1 k h w"], side_px: int) -> UInt8[Tensor, "1 3 side_px side_px"]:
    """Centre an image, whatever tau has left of its size, on white."""
    return _on_white(shown(to_uint8(x)), side_px)


def framed_map(picture: UInt8[Tensor, "1 3 h w"], stride: int, side_px: int) -> UInt8[Tensor, "1 3 side_px side_px"]:
    """Show each latent cell as large as the pixels that it stands for."""
    enlarged = picture.repeat_interleave(stride, -1).repeat_interleave(stride, -2)
    return _on_white(enlarged, side_px)


def error_map(
    decoded: Float[Tensor, "1 k h w"], target: Float[Tensor, "1 k h w"], side_px: int
) -> UInt8[Tensor, "1 3 side_px side_px"]:
    """Draw the mean absolute difference of each pixel, dark where there is none."""
    error = (decoded.clamp(-1.0, 1.0) - target.clamp(-1.0, 1.0)).abs().mean(1)[0]
    painted = matplotlib.colormaps["magma"]((error / WORST_ERROR).clamp(max=1.0).cpu().numpy(), bytes=True)
    return _on_white(torch.from_numpy(painted)[..., :3].movedim(-1, 0)[None], side_px)


def rows_html(title: str, rows: Sequence[Row]) -> str:
    """Write rows for the page."""
    return templates().get_template("exploration.html.jinja").render(title=title, rows=rows)


def spectra_html(chart: SpectrumChart | None) -> str:
    """Write the spectra for the page."""
    return templates().get_template("spectra.html.jinja").render(chart=chart)


def wrong_html(line: str) -> str:
    """Say on the page what is wrong."""
    return f'<p class="wrong">{escape(line)}</p>'


def dark_colors() -> str:
    """What the report's page calls its colours on a dark ground."""
    found = re.search(
        r"dark\) \{\s*:root \{(.*?)\}", PACKAGE.joinpath("report.css").read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    return found[1]


def draw_rows(rows: Sequence[Row]) -> Image.Image:
    """Draw rows below each other as one picture on white."""
    drawn = [draw_grid(row.grid) for row in rows]
    page = Image.new("RGB", (max(item.width for item in drawn), sum(item.height for item in drawn)), "white")
    top = 0
    for item in drawn:
        page.paste(item, (0, top))
        top += item.height
    return page


def encode_still(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def kept_html(content: bytes, kind: str, name: str) -> str:
    """Show a still or an animation with a link that saves it."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    size = f"{len(content) / 1000:,.0f} kB"
    return (
        f'<p><a href="{source}" download="{name}.{kind}">Save {name}.{kind} ({size})</a></p>'
        f'<img src="{source}" alt="{name}">'
    )


def _on_white(picture: UInt8[Tensor, "1 3 h w"], side_px: int) -> UInt8[Tensor, "1 3 side_px side_px"]:
    height, width = picture.shape[-2:]
    top, left = (side_px - height) // 2, (side_px - width) // 2
    page = torch.full((1, 3, side_px, side_px), 255, dtype=torch.uint8)
    page[..., top : top + height, left : left + width] = picture.cpu()
    return page
