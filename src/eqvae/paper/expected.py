"""What the paper reports: every figure of Tables 1 to 13 of arXiv:2502.09509, and what is read off its Figures 3 and 5.

FIDs are of ImageNet at 256 px by ADM's protocol, 50,000 samples, without classifier-free guidance unless a table says
so. A row's name is how the tables print it; a dash of the paper is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of the paper."""

    number: int

    title: str

    rows: Mapping[str, Mapping[str, float]]
    """Figures by row and column; a column that a row leaves out is missing."""

    @property
    def source(self) -> str:
        """Where it stands."""
        return f"Table {self.number} of arXiv:2502.09509"


def _table(number: int, title: str, columns: str, rows: tuple[tuple[str | float | int | None, ...], ...]) -> PaperTable:
    """Name the columns of aligned rows."""
    names = columns.split()
    return PaperTable(
        number=number,
        title=title,
        rows={
            str(label): {name: float(value) for name, value in zip(names, values, strict=True) if value is not None}
            for label, *values in rows
        },
    )


# fmt: off
TABLE_1 = _table(1, "Autoencoders with and without EQ-VAE",
                          "rfid  gfid   rotation scale", (
    ("SD-VAE",             0.90, 43.8,  0.93,    0.80),
    ("SD-VAE + EQ-VAE",    0.82, 34.1,  0.49,    0.15),
    ("SDXL-VAE",           0.67, 46.0,  1.25,    0.97),
    ("SDXL-VAE + EQ-VAE",  0.65, 35.9,  0.65,    0.35),
    ("SD3-VAE",            0.20, 58.9,  0.51,    0.16),
    ("SD3-VAE + EQ-VAE",   0.19, 54.0,  0.37,    0.11),
    ("SD-VAE-16",          0.87, 64.1,  0.95,    0.85),
    ("SD-VAE-16 + EQ-VAE", 0.82, 49.7,  0.39,    0.17),
    ("VQ-GAN",             7.94,  6.8,  1.35,    1.22),
    ("VQ-GAN + EQ-VAE",    7.54,  5.9,  0.64,    0.55),
))
"""gFID: DiT-B/2; DiT-B/1 for SD-VAE-16, MaskGIT for VQ-GAN. A later version of the paper prints SD-VAE's errors as 0.89
and 0.69 before, 0.56 and 0.43 after."""

TABLE_2 = _table(2, "Generators with and without EQ-VAE",
                                           "gfid", (
    ("DiT-B/2, 400K",                       43.5),
    ("DiT-B/2 + EQ-VAE, 400K",              34.1),
    ("SiT-B/2, 400K",                       33.0),
    ("SiT-B/2 + EQ-VAE, 400K",              31.2),
    ("DiT-XL/2, 400K",                      19.5),
    ("DiT-XL/2 + EQ-VAE, 400K",             14.5),
    ("SiT-XL/2, 400K",                      17.2),
    ("SiT-XL/2 + EQ-VAE, 400K",             16.1),
    ("DiT-XL/2, 7M",                         9.6),
    ("DiT-XL/2 + EQ-VAE, 1.5M",              8.8),
    ("SiT-XL/2 + REPA, 4M",                  5.9),
    ("SiT-XL/2 + REPA + EQ-VAE, 1M",         5.9),
))

TABLE_4 = _table(4, "With classifier-free guidance",
                                           "fid    sfid  inception_score precision recall", (
    ("LDM, 200 epochs",                      3.60, None, 247.7,          0.87,     0.48),
    ("MaskDiT, 1600 epochs",                 2.28, 5.67, 276.6,          0.80,     0.61),
    ("SD-DiT, 480 epochs",                   3.23, None, None,           None,     None),
    ("SiT-XL/2, 1400 epochs",                2.06, 4.50, 270.3,          0.82,     0.59),
    ("DiT-XL/2, 1400 epochs",                2.27, 4.60, 278.2,          0.83,     0.57),
    ("DiT-XL/2 (SD-VAE), 1400 epochs",       2.47, 5.18, 276.1,          0.82,     0.57),
    ("DiT-XL/2 + EQ-VAE, 300 epochs",        2.37, 4.78, 277.3,          0.82,     0.57),
    ("REPA, 800 epochs",                     1.42, 4.70, 305.7,          0.80,     0.65),
    ("REPA + EQ-VAE, 200 epochs",            1.70, 5.13, 283.0,          0.79,     0.62),
))
"""REPA with a guidance interval; DiT and SiT on SD-VAE-FT-EMA but where the row names SD-VAE."""

TABLE_5 = _table(5, "Which transformation",
                            "gfid  rfid  dimension", (
    ("none (SD-VAE)",        43.5, 0.90, 62.2),
    ("R(θ)",                 41.2, 0.73, 57.9),
    ("S(s, s)",              35.8, 0.78, 41.0),
    ("R(θ) · S(s, s)",       34.1, 0.82, 39.4),
    ("R(θ) · S(sx, sy)",     33.2, 0.92, 38.9),
))
"""DiT-B/2."""

TABLE_6 = _table(6, "Is it only more training?",
                            "gfid  rfid", (
    ("SD-VAE",               43.8, 0.90),
    ("SD-VAE-FT-EMA",        43.5, 0.73),
    ("SD-VAE + 5 epochs",    43.5, 0.81),
    ("EQ-VAE",               34.1, 0.82),
))

TABLE_7 = _table(7, "Explicit against implicit regularization",
                                             "gfid   rfid    rotation scale", (
    ("SD-VAE",                                43.5,   0.90,  0.93,    0.80),
    ("+ explicit",                           141.3, 117.93,  0.32,    0.11),
    ("+ explicit, stop-gradient",            134.7, 109.25,  0.35,    0.13),
    ("+ implicit (EQ-VAE)",                   34.1,   0.82,  0.49,    0.15),
))
"""Equation 4 with weight 0.1."""

TABLE_8 = _table(8, "Strength of the regularization",
              "gfid  rfid", (
    ("0.3",    35.4, 0.78),
    ("0.5",    34.1, 0.82),
    ("0.7",    34.4, 0.88),
))
"""By the probability of the equivariance branch, as these figures and the released code have it; the paper's p_alpha is
that of the plain branch."""

TABLE_9 = _table(9, "DiT-XL/2 and SiT-XL/2 in detail",
                                    "fid   sfid  inception_score precision recall", (
    ("DiT-XL/2, 400K",               19.5,  6.5, 77.5,           0.60,     0.60),
    ("DiT-XL/2 + EQ-VAE, 50K",       73.6, 13.1, 34.5,           0.50,     0.37),
    ("DiT-XL/2 + EQ-VAE, 100K",      39.9,  6.8, 62.2,           0.60,     0.53),
    ("DiT-XL/2 + EQ-VAE, 200K",      22.8,  5.9, 73.6,           0.61,     0.62),
    ("DiT-XL/2 + EQ-VAE, 400K",      14.5,  5.6, 81.5,           0.63,     0.66),
    ("SiT-XL/2, 400K",               17.2,  5.1, 76.5,           0.64,     0.63),
    ("SiT-XL/2 + EQ-VAE, 50K",       76.1, 38.4, 15.2,           0.50,     0.37),
    ("SiT-XL/2 + EQ-VAE, 100K",      41.3, 10.9, 30.9,           0.60,     0.53),
    ("SiT-XL/2 + EQ-VAE, 200K",      24.9,  6.4, 54.6,           0.61,     0.62),
    ("SiT-XL/2 + EQ-VAE, 400K",      16.1,  4.2, 79.7,           0.64,     0.66),
))

TABLE_10 = _table(10, "REPA (SiT-XL/2) in detail",
                                    "fid   sfid  inception_score precision recall", (
    ("REPA, 50K",                    52.3, 31.2,  24.3,          0.45,     0.53),
    ("REPA, 100K",                   19.4,  6.1,  67.4,          0.64,     0.61),
    ("REPA, 200K",                   11.1,  5.1, 100.4,          0.69,     0.64),
    ("REPA, 400K",                    7.9,  5.1, 122.6,          0.70,     0.65),
    ("REPA + EQ-VAE, 50K",           48.7, 26.3,  27.6,          0.44,     0.53),
    ("REPA + EQ-VAE, 100K",          18.7,  5.4,  67.8,          0.65,     0.59),
    ("REPA + EQ-VAE, 200K",          10.7,  5.1, 103.5,          0.70,     0.62),
    ("REPA + EQ-VAE, 400K",           7.5,  5.0, 128.8,          0.71,     0.63),
))

TABLE_11 = _table(11, "MaskGIT in detail",
                                           "fid    inception_score precision recall", (
    ("MaskGIT, 300 epochs",                  6.2,  182.1,          0.80,     0.51),
    ("MaskGIT (PyTorch), 300 epochs",        6.8,  214.0,          0.82,     0.51),
    ("MaskGIT + EQ-VAE, 50 epochs",         11.1,  116.1,          0.73,     0.52),
    ("MaskGIT + EQ-VAE, 100 epochs",         7.6,  167.5,          0.78,     0.53),
    ("MaskGIT + EQ-VAE, 130 epochs",         6.80, 188.1,          None,     None),
    ("MaskGIT + EQ-VAE, 200 epochs",         6.0,  211.8,          0.79,     0.55),
    ("MaskGIT + EQ-VAE, 300 epochs",         5.9,  228.7,          0.80,     0.55),
))

TABLE_3 = PaperTable(
    number=3, title="Masked generative modelling",
    rows={label: {name: row[name] for name in ("fid", "inception_score")} for label, row in TABLE_11.rows.items()},
)

TABLE_12 = _table(12, "Reconstruction",
                          "rfid  psnr   lpips  ssim", (
    ("SD-VAE",             0.90, 25.82, 0.146, 0.71),
    ("SD-VAE + EQ-VAE",    0.82, 25.95, 0.141, 0.72),
    ("SDXL-VAE",           0.67, 27.36, 0.121, 0.76),
    ("SDXL-VAE + EQ-VAE",  0.65, 27.48, 0.118, 0.76),
    ("SD3-VAE",            0.20, 31.27, 0.060, 0.87),
    ("SD3-VAE + EQ-VAE",   0.19, 31.06, 0.061, 0.87),
    ("SD-VAE-16",          0.87, 24.67, 0.161, 0.61),
    ("SD-VAE-16 + EQ-VAE", 0.82, 25.21, 0.152, 0.69),
    ("VQ-GAN",             7.94, 19.41, 0.540, 0.54),
    ("VQ-GAN + EQ-VAE",    7.54, 19.61, 0.510, 0.56),
))
"""ImageNet's validation set, 50,000 images."""


TABLE_13: Mapping[str, tuple[str, str | None, int, int]] = {
    # autoencoder  reg.  data          c    f
    "SD-VAE":     ("KL", "OpenImages", 4,   8),
    "SDXL-VAE":   ("KL", None,         4,   8),
    "SD3-VAE":    ("KL", None,         16,  8),
    "SD-VAE-16":  ("KL", "OpenImages", 16,  16),
    "VQ-GAN":     ("VQ", "ImageNet",   256, 16),
}
"""Specifications of the autoencoders: regularization, data that it was trained on (None where nobody says), channels of
latents, pixels per latent cell."""

FIGURE_3 = {
    #             s = 0.75 0.50 0.25  rotations' mean
    "SD-VAE":   (52.0,  83.0, 107.0,  64.0),
    "SDXL-VAE": (78.0, 117.0, 130.0, 192.0),
}
"""rFID between tau(x) and D(tau(E(x))), read off Figure 3."""

FIGURE_5: Mapping[float, float] = {0: 43.5, 1: 36.7, 5: 34.1}
"""gFID by epochs of fine-tuning with EQ-VAE, read off Figure 5."""
# fmt: on
