"""Writes the folders that the pages call `pictures` and `other-pictures`: crops of the built-in photographs.

python docs/pictures.py
"""

from pathlib import Path

from eqvae.images import open_images
from eqvae.images.sources import Split

CLASSES = {"places": (2, 5), "things": (1, 3, 4)}
"""Photographs of `photos` behind the class folders of `pictures`: a galaxy field, a temple; a cup, a motorcycle."""


def write_pictures(folder: Path, *, num_pictures: int = 96, side_px: int = 96) -> None:
    """Write `pictures` with its two class folders and `other-pictures`, of photographs that are not in the first."""
    for number, (name, photographs) in enumerate(CLASSES.items()):
        _write_crops(folder / "pictures" / name, "train", photographs, (num_pictures + 1 - number) // 2, side_px)
    _write_crops(folder / "other-pictures", "evaluation", (0, 1, 2), max(num_pictures // 4, 2), side_px)


def _write_crops(folder: Path, split: Split, photographs: tuple[int, ...], num_pictures: int, side_px: int) -> None:
    """Cut squares at places that are alike in every call, half the photograph's shorter side wide."""
    source = open_images("photos", split=split)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_pictures):
        image = source.read(photographs[index % len(photographs)])
        side, place = min(image.size) // 2, index * 7 % 25
        left, top = (image.width - side) * (place % 5) // 4, (image.height - side) * (place // 5) // 4
        image.crop((left, top, left + side, top + side)).resize((side_px, side_px)).save(folder / f"{index:03}.png")


if __name__ == "__main__":
    write_pictures(Path())
