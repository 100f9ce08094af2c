"""Colours of charts: apart in grey print, and for eyes without one of the three kinds of cones."""

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest
from skimage.color import deltaE_cie76, rgb2lab

from eqvae.drawing.charts import ACCENT, AUTOENCODER_COLORS, BASE, CSS_VARIABLES, HATCHES, MARKERS

CONES = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is left of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1."""


def as_seen(color: str, cones: str) -> np.ndarray:
    """CIELAB of a colour."""
    values = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    left = np.clip(np.array(CONES[cones]) @ linear, 0.0, 1.0)
    return rgb2lab(np.where(left <= 0.0031308, 12.92 * left, 1.055 * left ** (1 / 2.4) - 0.055))


def page_colors(scheme: str) -> list[str]:
    css = files("eqvae.drawing").joinpath("report.css").read_text()
    light, dark = css.split("prefers-color-scheme: dark", 1)
    found = dict(re.findall(r"(--\w+): (#\w{6});", light if scheme == "light" else dark))
    return [found[CSS_VARIABLES[color]] for color in AUTOENCODER_COLORS]


@pytest.mark.parametrize("cones", CONES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_two_colours_look_alike_to_anybody(scheme: str, cones: str):
    seen = [as_seen(color, cones) for color in page_colors(scheme)]
    assert min(deltaE_cie76(one, other) for one, other in combinations(seen, 2)) > 11.0, "2.3 can just be told apart"


def test_grey_print_tells_colours_apart():
    lightness = {color: as_seen(color, "all")[0] for color in AUTOENCODER_COLORS}
    assert min(abs(one - other) for one, other in combinations(lightness.values(), 2)) > 7.0
    assert abs(lightness[BASE] - lightness[ACCENT]) > 15.0, "what is compared most"


def test_markers_and_hatches_tell_them_apart_without_any_colour():
    assert len(set(MARKERS.values())) == len(set(HATCHES.values())) == len(AUTOENCODER_COLORS)


def test_files_have_the_page_s_light_colours():
    assert page_colors("light") == list(AUTOENCODER_COLORS)
