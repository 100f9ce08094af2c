"""Grids of pictures (Figures 2 and 6)."""

from dataclasses import replace

import numpy as np
import torch

from eqvae.artifacts.records import Pictures
from eqvae.drawing.lettering import fitted, lettering
from eqvae.drawing.pictures import draw_grid, latent_map_grid, transform_grids, turning_grids


def test_columns_are_the_papers(pictures):
    grids = transform_grids({"base": pictures(0), "finetuned": pictures(1)})
    assert [grid.title for grid in grids] == ["90°", "s = 0.5"]
    assert [(column.name, column.formula) for column in grids[1].columns] == [
        ("input", "x"),
        ("base", "D(E(τ∘x))"),
        ("base", "D(τ∘E(x))"),
        ("finetuned", "D(τ∘E(x))"),
    ]
    assert torch.equal(grids[1].columns[3].pictures, pictures(1).decoded_transformed[1])


def test_scaled_pictures_are_enlarged_pixel_by_pixel_to_the_cell(pictures):
    grid = transform_grids({"base": pictures()})[1]
    column = grid.columns[2]
    cell = np.asarray(grid.cell(column, 0))
    expected = column.pictures[0].repeat_interleave(2, 1).repeat_interleave(2, 2).movedim(0, -1).numpy()
    assert grid.enlargement(column) == 2
    np.testing.assert_array_equal(cell, expected)


def test_a_long_name_keeps_its_ends_within_its_column(pictures):
    grids = transform_grids({"a/very/long/path/to/some/fine-tuned/autoencoder-of-mine": pictures(0)})
    column = grids[0].columns[1]
    font = lettering(9)
    shown = fitted(column.name, font, 100)
    assert font.getlength(shown) <= 100
    assert shown.startswith("a/") and shown.endswith("mine") and "…" in shown
    assert fitted("base", font, 100) == "base"


def test_pictures_that_do_not_fill_the_cell_are_centred_on_transparency(pictures):
    grid = latent_map_grid({"base": replace(pictures(), latents=torch.randn(2, 4, 12, 12))})
    cell = np.asarray(grid.cell(grid.columns[1], 0))
    opaque = np.argwhere(cell[..., 3] == 255)
    assert cell.shape == (32, 32, 4)
    assert opaque.min(0).tolist() == [4, 4]
    assert opaque.max(0).tolist() == [27, 27]


def test_latent_maps_stand_beside_the_images(pictures):
    grid = latent_map_grid({"base": pictures(0), "wide": pictures(1, channels=16)})
    assert [column.name for column in grid.columns] == ["input", "base", "wide"]
    assert grid.num_rows == 2


def test_drawing_has_one_cell_for_each_picture(pictures):
    grid = transform_grids({"base": pictures(0), "finetuned": pictures(1)})[0]
    sheet = draw_grid(grid, gap_px=8)
    assert sheet.width == 4 * 32 + 5 * 8
    assert sheet.height > 2 * 32 + 2 * 8
    corner = np.asarray(sheet)[-8 - 32, 8]
    np.testing.assert_array_equal(corner, grid.columns[0].pictures[1, :, 0, 0].numpy())


def test_a_transform_that_only_one_autoencoder_has_gets_its_own_base(pictures):
    other = replace(pictures(1), transforms=("90°", "s = 0.25"))
    grids = {grid.title: grid for grid in transform_grids({"base": pictures(0), "finetuned": other})}
    assert [column.name for column in grids["s = 0.25"].columns] == ["input", "finetuned", "finetuned"]


def turned(pictures: Pictures, num_angles: int = 3) -> Pictures:
    generator = torch.Generator().manual_seed(num_angles)
    frames = torch.randint(256, (2, num_angles, *pictures.images.shape[1:]), dtype=torch.uint8, generator=generator)
    return replace(pictures, turned=frames)


def test_a_turn_has_a_grid_for_each_angle(pictures, tmp_path):
    turned(pictures(0)).write(tmp_path / "pictures.safetensors")
    base, tuned = Pictures.read(tmp_path / "pictures.safetensors"), turned(pictures(1))
    others = {"another": turned(pictures(1), 4), "still": pictures(1)}
    grids = turning_grids({"base": base, "finetuned": tuned} | others)
    assert len(grids) == 3
    assert [column.name for column in grids[2].columns] == ["input", "base", "finetuned"]
    assert torch.equal(grids[2].columns[2].pictures[0], tuned.turned[1, 2])
    assert turning_grids({"still": pictures(0)}) == []
