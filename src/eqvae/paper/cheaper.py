"""`eqvae reproduce cost`: what buys equivariance at the least time? Each row changes one thing of the recipe.

On a processor it is the time of all its threads, which other work does not lengthen; on a GPU the clock's.

All rows but the recipe itself leave polishing out, so that what trains the decoder is what the row says.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eqvae.images.sizes import square_px
from eqvae.losses.discriminators import MIN_IMAGE_SIZE_PX
from eqvae.paper.arms import Arm, equivariant, varied
from eqvae.paper.cells import (
    Cell,
    Column,
    Row,
    TableItem,
    autoencoder_cell,
    columns,
    evaluation_cells,
    gfid_cells,
    kept_keys,
    protocol,
)
from eqvae.paper.figures import FigureItem
from eqvae.paper.pictures import draw_trades, write_chart
from eqvae.paper.plan import PlannedAutoencoder
from eqvae.paper.setting import Setting

COST = "cost"
"""`cost.md`, `cost.json` and a folder of the curve."""

_WHOLE = "all weights"
"""What the others are set beside."""

_TIME = Column(key="sec", paper="", here="time of fine-tuning, s", digits=0)
_PERCEPTUAL = Column(key="perceptual", paper="", here="perceptual_efficientnet_lite0", digits=3)
_DRAWN = ("rotation", "scale", "psnr", "gfid")


def cost(setting: Setting) -> FigureItem:
    """Errors, reconstruction and a small generator's distance against the time of fine-tuning."""
    named = columns(setting.reference.features, kept_keys(setting, ("rotation", "scale", "psnr", "rfid", "gfid")))
    measured = (_TIME, *(replace(column, paper="") for column in named if column.key != "gfid_fixed"), _PERCEPTUAL)
    rows = tuple(
        Row(
            label=label,
            here=autoencoder.name,
            expected={},
            cells={key: cell for key, cell in _cells(setting, autoencoder).items() if key in _keys(measured)},
            against="" if label == _WHOLE else _WHOLE,
        )
        for label, autoencoder in _variants(setting).items()
    )
    table = TableItem(
        item=COST, title="what equivariance costs", source="none, the question is ours", scale=setting.name,
        columns=measured, rows=rows,
        notes=(
            protocol(setting, "dit"),
            "Time of fine-tuning: the training steps, without validations and without processes that read images; on a "
            "processor that of all its threads, on a GPU the clock's.",
        ),
    )  # fmt: skip

    def draw(folder: Path) -> list[Path]:
        return write_chart(draw_trades(_points(table), _TIME.here), folder / "curve")

    return FigureItem(item=COST, title=table.title, scale=setting.name, runs=table.runs, draw=draw, table=table)


def _variants(setting: Setting) -> dict[str, PlannedAutoencoder]:
    """The base, the recipe, and what may be cheaper."""
    base = setting.autoencoders["SD-VAE"]
    num_steps = setting.epochs * setting.steps_per_epoch

    def changed(mark: str, **changes: Any) -> PlannedAutoencoder:
        return varied(setting, base, mark, **{"polish_steps": 0, **changes})

    side_px = _smaller_side(setting, setting.base(base).stride)
    recipe, recipe_polishes = equivariant(setting, base), bool(setting.finetuning.training.polish_steps)
    found = {
        "none": setting.base(base),
        _WHOLE: changed("unpolished") if recipe_polishes else recipe,
        "encoder alone": changed("encoder", freeze_decoder=True),
        "LoRA of rank 4": changed("lora-4", lora_rank=4),
        "LoRA of rank 16": changed("lora-16", lora_rank=16),
        "half of the steps": changed("half", max_steps=max(num_steps // 2, 1)),
        "a quarter of the steps": changed("quarter", max_steps=max(num_steps // 4, 1)),
        f"crops of {side_px} px": changed(f"{side_px}-px", image_size=side_px),
    }
    return found | ({"all weights, polished": recipe} if recipe_polishes else {})


def _smaller_side(setting: Setting, stride: int) -> int:
    """Half of the side, or three quarters where the discriminator could not see the smallest tau x of that."""
    config = setting.finetuning
    whole_px = square_px(config.image_size)
    for share in (0.5, 0.75):
        side_px = round(whole_px * share)
        if side_px % (4 * stride):
            continue
        smallest_px = config.training.mixture().smallest_side(side_px // stride) * stride
        if config.training.adversarial.adversarial_weight == 0 or smallest_px >= MIN_IMAGE_SIZE_PX:
            return side_px
    return whole_px


def _cells(setting: Setting, autoencoder: PlannedAutoencoder) -> dict[str, Cell]:
    arm = Arm(setting=setting, family="dit", size="b", autoencoder=autoencoder)
    cells = {**evaluation_cells(setting, autoencoder), **gfid_cells(arm)}
    cells[_PERCEPTUAL.key] = autoencoder_cell(setting, autoencoder, _PERCEPTUAL.here)
    tuned = tuple(run for each in autoencoder.all_seeds for run in each.needs)
    if tuned:
        cells[_TIME.key] = Cell(runs=tuned, key="training_device_sec", num_autoencoders=len(tuned))
    return cells


def _keys(measured: tuple[Column, ...]) -> set[str]:
    return {column.key for column in measured}


def _points(table: TableItem) -> Mapping[str, Mapping[str, tuple[float, float]]]:
    """Time and value of each row, by what is measured; nothing is what the base costs."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for column in (column for column in table.columns if column.key in _DRAWN):
        for row in table.rows:
            seconds = row.cells[_TIME.key].values() if _TIME.key in row.cells else [0.0]
            if seconds and (values := row.cells[column.key].values()):
                title = f"{column.here} {column.arrow}"
                points.setdefault(title, {})[row.label] = (float(np.mean(seconds)), float(np.mean(values)))
    return points
