"""Tables 1 to 12 of the paper: for each row its expected figures, and the runs that measure them here."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from eqvae.paper import expected
from eqvae.paper.autoencoders import (
    PlannedAutoencoder,
    Transforms,
    equivariant,
    explicit,
    more_training,
    untouched,
)
from eqvae.paper.cells import (
    evaluation_cells,
    gfid_cells,
    protocol,
    score_cells,
    scored_by_seed,
    trained_by_seed,
)
from eqvae.paper.generators import Size, distance_key, recipe_name
from eqvae.paper.setting import Family, Setting
from eqvae.paper.table import Cell, Row, Table, columns

_SEEDS = "Spreads are standard deviations over the generators' seeds; each autoencoder is fine-tuned once."
_WATCH = (
    "Rows before the last are measured while the generator trains; the other figures of a row need a sample set, which "
    "is drawn at the end."
)
_SCALE = (
    "g… normalizes latents by each autoencoder's own mean and deviation; 'base's factor' multiplies them by the one "
    "factor that fits the base, as the paper did: what differs between the two is the effect of latent scale."
)

_SAMPLE_KEYS = ("fid", "sfid", "inception_score", "precision", "recall")


def table1(setting: Setting) -> Table:
    """Autoencoders with and without EQ-VAE."""
    rows = []
    for name, autoencoder in _autoencoders(setting):
        row = _compared(setting, expected.TABLE_1, name, autoencoder, "rfid gfid rotation scale")
        rows.append(replace(row, against=_without(name)))
    return _table(setting, expected.TABLE_1, "rfid gfid gfid_fixed rotation scale", rows, _SEEDS, _SCALE)


def table2(setting: Setting) -> Table:
    """Generators with and without EQ-VAE."""
    base, ours = untouched(setting, setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    # fmt: off
    models: tuple[tuple[str, str, Family, Size, bool], ...] = (
        # without                with                              family      size  long
        ("DiT-B/2, 400K",        "DiT-B/2 + EQ-VAE, 400K",         "dit",      "b",  False),
        ("SiT-B/2, 400K",        "SiT-B/2 + EQ-VAE, 400K",         "sit",      "b",  False),
        ("DiT-XL/2, 400K",       "DiT-XL/2 + EQ-VAE, 400K",        "dit",      "xl", False),
        ("SiT-XL/2, 400K",       "SiT-XL/2 + EQ-VAE, 400K",        "sit",      "xl", False),
        ("DiT-XL/2, 7M",         "DiT-XL/2 + EQ-VAE, 1.5M",        "dit",      "xl", True),
        ("SiT-XL/2 + REPA, 4M",  "SiT-XL/2 + REPA + EQ-VAE, 1M",   "repa-sit", "xl", True),
    )
    # fmt: on
    rows, seen = [], set()
    for without, with_eq, family, size, is_long in models:
        for label, autoencoder in ((without, base), (with_eq, ours)):
            steps = _steps(setting, family, autoencoder) if is_long else None
            runs = trained_by_seed(setting, family, size, autoencoder, max_steps=steps)
            is_new = runs[0].name not in seen  # one tiny generator may stand for several of the paper's
            seen.add(runs[0].name)
            rows.append(
                Row(
                    label=label,
                    here=_describe(setting, family, size, autoencoder) if is_new else "",
                    expected=expected.TABLE_2.rows[label],
                    cells=gfid_cells(setting, family, size, autoencoder, max_steps=steps) if is_new else {},
                    against=without if label == with_eq else "",
                )
            )
    return _table(setting, expected.TABLE_2, "gfid gfid_fixed", rows, _SEEDS, _SCALE)


def table3(setting: Setting) -> Table:
    """MaskGIT over epochs: FID and Inception Score."""
    return _maskgit(setting, expected.TABLE_3, "fid fid_watch inception_score")


def table4(setting: Setting) -> Table:
    """With classifier-free guidance; of other people's models there are expected figures only."""
    published = untouched(setting, setting.generator_base)
    base = untouched(setting, setting.autoencoders["SD-VAE"])
    ours = equivariant(setting, base.name)
    models: dict[str, tuple[Family, PlannedAutoencoder]] = {
        "SiT-XL/2, 1400 epochs": ("sit", published),
        "DiT-XL/2, 1400 epochs": ("dit", published),
        "DiT-XL/2 (SD-VAE), 1400 epochs": ("dit", base),
        "DiT-XL/2 + EQ-VAE, 300 epochs": ("dit", ours),
        "REPA, 800 epochs": ("repa-sit", published),
        "REPA + EQ-VAE, 200 epochs": ("repa-sit", ours),
    }
    if published == base:
        del models["DiT-XL/2, 1400 epochs"]  # the same run as the row that names SD-VAE
    rows = []
    for label, figures in expected.TABLE_4.rows.items():
        if label not in models:
            rows.append(Row(label=label, expected=figures, cells={}))
            continue
        family, autoencoder = models[label]
        trained = trained_by_seed(setting, family, "xl", autoencoder, max_steps=_steps(setting, family, autoencoder))
        scores = scored_by_seed(setting, trained, family, guided=True)
        here = f"{_describe(setting, family, 'xl', autoencoder)}, guided"
        against = _TABLE_4_PAIRS.get(label, "")
        rows.append(Row(label=label, here=here, expected=figures, cells=score_cells(setting, scores), against=against))
    return _table(setting, expected.TABLE_4, " ".join(_SAMPLE_KEYS), rows, _SEEDS)


def table5(setting: Setting) -> Table:
    """Which transformation."""
    base = setting.autoencoders["SD-VAE"]
    kinds: dict[str, Transforms] = {
        "R(θ)": "rotation", "S(s, s)": "scale", "R(θ) · S(s, s)": "paper", "R(θ) · S(sx, sy)": "anisotropic",
    }  # fmt: skip
    arms = {"none (SD-VAE)": untouched(setting, base)}
    arms |= {label: equivariant(setting, base, transforms=kind) for label, kind in kinds.items()}
    return _ablation(setting, expected.TABLE_5, arms, "gfid gfid_fixed rfid dimension")


def table6(setting: Setting) -> Table:
    """Is it only more training?"""
    base, published = setting.autoencoders["SD-VAE"], setting.generator_base
    arms = {
        "SD-VAE": untouched(setting, base),
        "SD-VAE-FT-EMA": untouched(setting, published) if published != base else None,
        "SD-VAE + 5 epochs": more_training(setting, base),
        "EQ-VAE": equivariant(setting, base),
    }
    return _ablation(setting, expected.TABLE_6, arms, "gfid gfid_fixed rfid")


def table7(setting: Setting) -> Table:
    """Explicit against implicit regularization."""
    base = setting.autoencoders["SD-VAE"]
    arms = {
        "SD-VAE": untouched(setting, base),
        "+ explicit": explicit(setting, base, stop_gradient=False),
        "+ explicit, stop-gradient": explicit(setting, base, stop_gradient=True),
        "+ implicit (EQ-VAE)": equivariant(setting, base),
    }
    return _ablation(setting, expected.TABLE_7, arms, "gfid gfid_fixed rfid rotation scale")


def table8(setting: Setting) -> Table:
    """Strength: the probability of the equivariance branch."""
    base = setting.autoencoders["SD-VAE"]
    arms = {f"{strength:g}": equivariant(setting, base, probability=strength) for strength in setting.strengths}
    return _ablation(setting, expected.TABLE_8, arms, "gfid gfid_fixed rfid")


def table9(setting: Setting) -> Table:
    """DiT and SiT in detail, over steps."""
    rows = []
    base, ours = untouched(setting, setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    families: tuple[tuple[str, Family], ...] = (("DiT-XL/2", "dit"), ("SiT-XL/2", "sit"))
    for model, family in families:
        rows.append(_at_step(setting, expected.TABLE_9, f"{model}, 400K", family, base))
        rows += [_at_step(setting, expected.TABLE_9, f"{model} + EQ-VAE, {at}", family, ours) for at in _SHARES]
        rows[-1] = replace(rows[-1], against=f"{model}, 400K")
    return _table(setting, expected.TABLE_9, " ".join(_SAMPLE_KEYS), rows, _SEEDS, _WATCH)


def table10(setting: Setting) -> Table:
    """REPA in detail, over steps."""
    rows = []
    base, ours = untouched(setting, setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    for model, autoencoder in (("REPA", base), ("REPA + EQ-VAE", ours)):
        for at in _SHARES:
            row = _at_step(setting, expected.TABLE_10, f"{model}, {at}", "repa-sit", autoencoder)
            rows.append(replace(row, against=f"REPA, {at}" if autoencoder == ours else ""))
    return _table(setting, expected.TABLE_10, " ".join(_SAMPLE_KEYS), rows, _SEEDS, _WATCH)


def table11(setting: Setting) -> Table:
    """MaskGIT over epochs: Table 3 with precision and recall."""
    return _maskgit(setting, expected.TABLE_11, "fid fid_watch inception_score precision recall")


def table12(setting: Setting) -> Table:
    """Reconstruction; the autoencoders' specifications are Table 13."""
    rows = []
    for name, autoencoder in _autoencoders(setting):
        rows.append(_compared(setting, expected.TABLE_12, name, autoencoder, "rfid psnr lpips ssim"))
    return _table(setting, expected.TABLE_12, "rfid psnr lpips ssim", rows)


TABLES: dict[str, Callable[[Setting], Table]] = {
    f"table{number + 1}": recipe
    for number, recipe in enumerate(
        (table1, table2, table3, table4, table5, table6, table7, table8, table9, table10, table11, table12)
    )
}
"""By the names of the command line."""

_TABLE_4_PAIRS = {
    "DiT-XL/2 + EQ-VAE, 300 epochs": "DiT-XL/2 (SD-VAE), 1400 epochs",
    "REPA + EQ-VAE, 200 epochs": "REPA, 800 epochs",
}

_SHARES = {"50K": 1 / 8, "100K": 1 / 4, "200K": 1 / 2, "400K": 1.0}
"""Rows of Tables 9 and 10, as shares of the training."""


def _autoencoders(setting: Setting) -> Iterable[tuple[str, PlannedAutoencoder | None]]:
    """Rows of Tables 1 and 12: each of the paper's autoencoders, then ours of it, then the user's own."""
    for name in expected.TABLE_13:
        base = setting.autoencoders.get(name)
        yield name, None if base is None else untouched(setting, base)
        yield f"{name} + EQ-VAE", None if base is None else equivariant(setting, base)
    for name in setting.extra:
        yield name, untouched(setting, name)


def _without(label: str) -> str:
    """The row that an autoencoder's row is compared with: that of its base."""
    return label.removesuffix(" + EQ-VAE") if label.endswith(" + EQ-VAE") else ""


def _compared(
    setting: Setting, paper: expected.PaperTable, label: str, autoencoder: PlannedAutoencoder | None, keys: str
) -> Row:
    """One autoencoder's row; without one, the paper's figures alone."""
    figures = paper.rows.get(label, {})
    if autoencoder is None:
        return Row(label=label, expected=figures, cells={})
    cells = evaluation_cells(setting, autoencoder)
    if "gfid" in keys.split():
        family: Family = "maskgit" if autoencoder.base.is_discrete else "dit"
        cells |= gfid_cells(setting, family, "b", autoencoder)
    return Row(label=label, here=autoencoder.name, expected=figures, cells=cells)


def _ablation(
    setting: Setting, paper: expected.PaperTable, arms: Mapping[str, PlannedAutoencoder | None], keys: str
) -> Table:
    """DiT-B on several autoencoders."""
    rows = [_compared(setting, paper, label, autoencoder, keys) for label, autoencoder in arms.items()]
    first = rows[0].label
    rows = [rows[0], *(replace(row, against=first) for row in rows[1:])]
    return _table(setting, paper, keys, rows, _SEEDS, _SCALE)


def _maskgit(setting: Setting, paper: expected.PaperTable, keys: str) -> Table:
    name = setting.autoencoders["VQ-GAN"]
    base, ours = untouched(setting, name), equivariant(setting, name)
    rows = []
    for label, figures in paper.rows.items():
        epochs = int(label.split()[-2])
        if label.startswith("MaskGIT,"):  # the original's own figures
            rows.append(Row(label=label, expected=figures, cells={}))
        else:
            autoencoder = ours if "EQ-VAE" in label else base
            row = _at_step(setting, paper, label, "maskgit", autoencoder, share=epochs / 300)
            is_last = autoencoder == ours and epochs == 300
            rows.append(replace(row, against="MaskGIT (PyTorch), 300 epochs" if is_last else ""))
    return _table(setting, paper, keys, rows, _SEEDS, _WATCH)


def _at_step(
    setting: Setting,
    paper: expected.PaperTable,
    label: str,
    family: Family,
    autoencoder: PlannedAutoencoder,
    *,
    share: float | None = None,
) -> Row:
    """A generator after a share of its training: the watch's distance, and at the end all figures of a sample set."""
    size: Size = "maskgit" if family == "maskgit" else "xl"
    share = _SHARES[label.split()[-1]] if share is None else share
    config = setting.training[family]
    step = round(share * config.max_steps)
    trained = trained_by_seed(setting, family, size, autoencoder)
    cells: dict[str, Cell] = {}
    if share == 1.0:
        cells = score_cells(setting, scored_by_seed(setting, trained, family, guided=False))
    is_whole = math.isclose(share * config.max_steps, step) and step > 0
    if share == 1.0 or (is_whole and step % (config.sample_every or 1) == 0):
        is_guided = setting.sampling[family].guidance_scale != 1.0
        watched = Cell(runs=trained, key=distance_key(setting), step=step)
        cells |= {"fid_watch": watched} if is_guided else {"fid": cells.get("fid", watched)}
    here = f"{_describe(setting, family, size, autoencoder)}, {step} steps"
    return Row(label=label, here=here if cells else "", expected=paper.rows[label], cells=cells)


def _steps(setting: Setting, family: Family, autoencoder: PlannedAutoencoder) -> int | None:
    return setting.guided_steps.get(family if autoencoder.run is None else f"{family}+eq")


def _describe(setting: Setting, family: Family, size: Size, autoencoder: PlannedAutoencoder) -> str:
    return f"{recipe_name(setting, family, size, autoencoder.base.stride)} on {autoencoder.name}"


def _table(setting: Setting, paper: expected.PaperTable, keys: str, rows: Iterable[Row], *notes: str) -> Table:
    kept = [key for key in keys.split() if key != "gfid_fixed" or "fixed" in setting.normalizations]
    return Table(
        item=f"table{paper.number}",
        title=paper.title,
        source=paper.source,
        scale=setting.name,
        columns=columns(setting.reference.features, kept),
        rows=tuple(replace(row, cells={key: cell for key, cell in row.cells.items() if key in kept}) for row in rows),
        notes=(
            protocol(setting, "maskgit" if paper.number in (3, 11) else "dit"),
            *(note for note in notes if note != _SCALE or "fixed" in setting.normalizations),
        ),
    )
