"""Names on pictures."""

from pathlib import Path

import matplotlib
from PIL import ImageFont


def lettering(size_px: int) -> ImageFont.FreeTypeFont:
    """Load the font of pictures, which has the Greek letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size_px)


def fitted(name: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Leave out the middle of a name that is wider than its column."""
    shown = name
    for kept in range(len(name) - 1, 1, -1):
        if font.getlength(shown) <= width_px:
            break
        shown = f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"
    return shown
