"""Contact sheets of samples: stages of training side by side from the same noise (Figure 4 of arXiv:2502.09509)."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from eqvae.errors import UserError
from eqvae.images import open_picture
from eqvae.report.generators import SampleSet, Training

GAP_PX = 2
"""Between a sheet's pictures, and around them."""

SIDE_PX = 340
"""About what one of three sheets has on a desk; smaller ones are enlarged by whole factors."""

MAX_SIDE_PX = 2 * SIDE_PX
"""On the page, for screens of twice the density."""

LEAST_COUNT = 4
"""Pictures in a row that are shown of large ones."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One contact sheet."""

    label: str

    path: Path

    cell_px: int | None
    """Side of one picture; None where the folder does not say."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedSheet:
    """A sheet on the page."""

    label: str
    alt: str

    source: str
    """A data URI."""

    width_px: int
    height_px: int


def stages(training: Training) -> list[Sheet]:
    """Choose the contact sheets that show how samples became better."""
    steps = list(training.sheets)
    chosen = steps
    if len(steps) > 3:
        middle = (steps[0] + steps[-1]) / 2
        chosen = [steps[0], min(steps[1:-1], key=lambda step: abs(step - middle)), steps[-1]]
    return [
        Sheet(label=_stage_label(training, step), path=training.sheets[step], cell_px=_size(training.card))
        for step in chosen
    ]


def sample_sheet(samples: SampleSet) -> Sheet:
    """Find the contact sheet of a sample set."""
    return Sheet(label=samples.name, path=samples.sheet, cell_px=_size(samples.card))


def read_sheet(sheet: Sheet) -> Image.Image:
    """Read a sheet, or of one with large pictures the first rows and columns."""
    try:
        with open_picture(sheet.path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"'{sheet.path}' is no readable picture ({error})", "Remove it or write it again") from None
    if sheet.cell_px is not None:
        count = max(round(SIDE_PX / sheet.cell_px), LEAST_COUNT)
        side = count * (sheet.cell_px + GAP_PX) + GAP_PX
        picture = picture.crop((0, 0, min(side, picture.width), min(side, picture.height)))
    factor = max(round(SIDE_PX / picture.width), 1)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def embed_sheet(sheet: Sheet, what: str) -> EmbeddedSheet:
    """Encode a sheet for the page."""
    picture = read_sheet(sheet)
    picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90, method=4)
    return EmbeddedSheet(
        label=sheet.label,
        alt=what,
        source="data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        width_px=picture.width,
        height_px=picture.height,
    )


def draw_stages(sheets: Sequence[Sheet]) -> Image.Image:
    """Lay sheets side by side under their labels, for papers."""
    pictures = [read_sheet(sheet) for sheet in sheets]
    gap = max(pictures[0].width // 24, 8)
    size = max(pictures[0].width // 22, 13)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    widths = [
        max(picture.width, int(font.getlength(sheet.label)) + 1)
        for sheet, picture in zip(sheets, pictures, strict=True)
    ]
    top = 2 * gap + size
    page = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), top + max(item.height for item in pictures) + gap), "white"
    )
    draw, x = ImageDraw.Draw(page), gap
    for sheet, picture, width in zip(sheets, pictures, widths, strict=True):
        draw.text((x, gap), sheet.label, fill="#55555a", font=font)
        page.paste(picture, (x, top))
        x += width + gap
    return page


def _stage_label(training: Training, step: int) -> str:
    count = training.num_images(step)
    return f"Step {step:,}" + (f", {count:,} images" if count is not None else "")


def _size(card: dict[str, object]) -> int | None:
    size = card.get("image_size_px")
    return size if isinstance(size, int) and size > 0 else None
