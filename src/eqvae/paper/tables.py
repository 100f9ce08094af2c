"""Tables 1 to 12 of the paper: for each row its expected figures, and the runs that measure them here."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from eqvae.networks.features import Measure
from eqvae.paper import expected
from eqvae.paper.arms import Arm, Transforms, distance_key, equivariant, explicit, more_training
from eqvae.paper.cells import (
    Row,
    TableItem,
    arm_cell,
    columns,
    evaluation_cells,
    gfid_cells,
    kept_keys,
    protocol,
    score_cells,
)
from eqvae.paper.expected import PaperTable
from eqvae.paper.plan import PlannedAutoencoder
from eqvae.paper.setting import Family, Setting, Size

_WATCH = (
    "Rows before the last are measured while the generator trains; the other figures of a row need a sample set, which "
    "is drawn at the end."
)
_SCALE = (
    "g… normalizes latents by each autoencoder's own mean and deviation; 'base's factor' multiplies them by the one "
    "factor that fits the base, as the paper did: what differs between the two is the effect of latent scale."
)

_MEASURED = "Latents are normalized by each autoencoder's own mean and deviation."

_OURS = " + EQ-VAE"
"""Ends the names of the paper's rows on EQ-VAE's latents."""

_SAMPLE_KEYS = "fid sfid inception_score precision recall"

_WATCHED: dict[str, Measure] = {"fid": "fid", "kid": "kid"}
"""Columns that are measured while a generator trains."""

_SHARES = {"50K": 1 / 8, "100K": 1 / 4, "200K": 1 / 2, "400K": 1.0}
"""Rows of Tables 9 and 10, as shares of the training."""

_TABLE_4_PAIRS = {
    "DiT-XL/2 + EQ-VAE, 300 epochs": "DiT-XL/2 (SD-VAE), 1400 epochs",
    "REPA + EQ-VAE, 200 epochs": "REPA, 800 epochs",
}


def _seeds(setting: Setting) -> str:
    num_tuned = len(setting.autoencoder_seeds)
    if num_tuned == 1:
        return "Spreads are standard deviations over the generators' seeds; each autoencoder is fine-tuned once."
    return (
        f"Spreads are standard deviations over all generators, {len(setting.seeds)} seeds for each of the {num_tuned} "
        "fine-tunings of a recipe; an autoencoder's own figures have one value for each fine-tuning."
    )


def _normalized(setting: Setting) -> tuple[str, ...]:
    """Notes of tables whose latents may be scaled in two ways."""
    return (_seeds(setting), _SCALE) if setting.both_normalizations else (_seeds(setting), _MEASURED)


def table1(setting: Setting) -> TableItem:
    """Autoencoders with and without EQ-VAE."""
    rows = []
    for name, autoencoder in _autoencoders(setting):
        row = _autoencoder_row(setting, expected.TABLE_1, name, autoencoder, with_generator=True)
        rows.append(replace(row, against=name.removesuffix(_OURS) if name.endswith(_OURS) else ""))
    return _table(setting, expected.TABLE_1, "rfid gfid gfid_fixed rotation scale", rows, *_normalized(setting))


def table2(setting: Setting) -> TableItem:
    """Generators with and without EQ-VAE."""
    models: dict[str, tuple[Family, Size]] = {
        "DiT-B/2": ("dit", "b"), "SiT-B/2": ("sit", "b"), "DiT-XL/2": ("dit", "xl"), "SiT-XL/2": ("sit", "xl"),
        "SiT-XL/2 + REPA": ("repa-sit", "xl"),
    }  # fmt: skip
    base, ours = _base_and_ours(setting)
    rows: list[Row] = []
    seen = set()
    for label, figures in expected.TABLE_2.rows.items():
        model, steps = label.split(", ")
        (family, size), is_ours = models[model.removesuffix(_OURS)], model.endswith(_OURS)
        autoencoder = ours if is_ours else base
        is_long = steps != "400K"
        arm = _long_arm(setting, family, autoencoder) if is_long else _arm(setting, family, autoencoder, size)
        row = Row(label=label, expected=figures, cells={}, against=rows[-1].label if is_ours else "")
        if arm.trained[0].name not in seen:  # one tiny generator may stand for several of the paper's
            row = replace(row, here=arm.title, cells=gfid_cells(arm))
        seen.add(arm.trained[0].name)
        rows.append(row)
    return _table(
        setting, expected.TABLE_2, "gfid gfid_fixed", rows, *_normalized(setting), families=("dit", "sit", "repa-sit")
    )


def table3(setting: Setting) -> TableItem:
    """MaskGIT over epochs: FID and Inception Score."""
    return _maskgit(setting, expected.TABLE_3, "fid fid_watch inception_score")


def table4(setting: Setting) -> TableItem:
    """With classifier-free guidance; of other people's models there are expected figures only."""
    published, ours = _base_and_ours(setting)
    base = setting.base(setting.autoencoders["SD-VAE"])
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
        row = Row(label=label, expected=figures, cells={})
        if label in models:
            arm = _long_arm(setting, *models[label])
            cells, against = score_cells(arm, guided=True), _TABLE_4_PAIRS.get(label, "")
            row = replace(row, here=f"{arm.title}, guided", cells=cells, against=against)
        rows.append(row)
    families = tuple(dict.fromkeys(family for family, _ in models.values()))
    return _table(setting, expected.TABLE_4, _SAMPLE_KEYS, rows, _seeds(setting), families=families)


def table5(setting: Setting) -> TableItem:
    """Which transformation."""
    base = setting.autoencoders["SD-VAE"]
    kinds: dict[str, Transforms] = {
        "R(θ)": "rotation", "S(s, s)": "scale", "R(θ) · S(s, s)": "paper", "R(θ) · S(sx, sy)": "anisotropic",
    }  # fmt: skip
    arms = {"none (SD-VAE)": setting.base(base)}
    arms |= {label: equivariant(setting, base, transforms=kind) for label, kind in kinds.items()}
    return _ablation(setting, expected.TABLE_5, arms, "gfid gfid_fixed rfid dimension")


def table6(setting: Setting) -> TableItem:
    """Is it only more training?"""
    base, published = setting.autoencoders["SD-VAE"], setting.generator_base
    arms = {
        "SD-VAE": setting.base(base),
        "SD-VAE-FT-EMA": setting.base(published) if published != base else None,
        "SD-VAE + 5 epochs": more_training(setting, base),
        "EQ-VAE": equivariant(setting, base),
    }
    return _ablation(setting, expected.TABLE_6, arms, "gfid gfid_fixed rfid")


def table7(setting: Setting) -> TableItem:
    """Explicit against implicit regularization."""
    base = setting.autoencoders["SD-VAE"]
    arms = {
        "SD-VAE": setting.base(base),
        "+ explicit": explicit(setting, base, stop_gradient=False),
        "+ explicit, stop-gradient": explicit(setting, base, stop_gradient=True),
        "+ implicit (EQ-VAE)": equivariant(setting, base),
    }
    return _ablation(setting, expected.TABLE_7, arms, "gfid gfid_fixed rfid rotation scale")


def table8(setting: Setting) -> TableItem:
    """Strength: the probability of the equivariance branch."""
    base = setting.autoencoders["SD-VAE"]
    arms = {f"{strength:g}": equivariant(setting, base, probability=strength) for strength in setting.strengths}
    return _ablation(setting, expected.TABLE_8, arms, "gfid gfid_fixed rfid")


def table9(setting: Setting) -> TableItem:
    """DiT and SiT in detail, over steps."""
    return _over_steps(setting, expected.TABLE_9, {"DiT-XL/2": "dit", "SiT-XL/2": "sit"})


def table10(setting: Setting) -> TableItem:
    """REPA in detail, over steps."""
    return _over_steps(setting, expected.TABLE_10, {"REPA": "repa-sit"})


def table11(setting: Setting) -> TableItem:
    """MaskGIT over epochs: Table 3 with precision and recall."""
    return _maskgit(setting, expected.TABLE_11, "fid fid_watch inception_score precision recall")


def table12(setting: Setting) -> TableItem:
    """Reconstruction; the autoencoders' specifications are Table 13."""
    rows = [
        _autoencoder_row(setting, expected.TABLE_12, name, autoencoder) for name, autoencoder in _autoencoders(setting)
    ]
    return _table(setting, expected.TABLE_12, "rfid psnr lpips ssim", rows)


_ALL = (table1, table2, table3, table4, table5, table6, table7, table8, table9, table10, table11, table12)
TABLES: dict[str, Callable[[Setting], TableItem]] = {function.__name__: function for function in _ALL}
"""By the names of the command line."""


def _arm(setting: Setting, family: Family, autoencoder: PlannedAutoencoder, size: Size = "xl") -> Arm:
    return Arm(setting=setting, family=family, size=size, autoencoder=autoencoder)


def _long_arm(setting: Setting, family: Family, autoencoder: PlannedAutoencoder) -> Arm:
    """The generator behind Table 4 and the last rows of Table 2."""
    is_ours = autoencoder.name != autoencoder.base
    steps = setting.guided_steps.get(f"{family}+eq" if is_ours else family)
    return replace(_arm(setting, family, autoencoder), max_steps=steps)


def _base_and_ours(setting: Setting) -> tuple[PlannedAutoencoder, PlannedAutoencoder]:
    """What the published generators were trained on, and EQ-VAE."""
    return setting.base(setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])


def _autoencoders(setting: Setting) -> Iterable[tuple[str, PlannedAutoencoder | None]]:
    """Rows of Tables 1 and 12: each of the paper's autoencoders, then ours of it, then the user's own."""
    for name in expected.TABLE_13:
        base = setting.autoencoders.get(name)
        yield name, None if base is None else setting.base(base)
        yield name + _OURS, None if base is None else equivariant(setting, base)
    for name in setting.extra:
        yield name, setting.base(name)


def _autoencoder_row(
    setting: Setting,
    paper: PaperTable,
    label: str,
    autoencoder: PlannedAutoencoder | None,
    *,
    with_generator: bool = False,
) -> Row:
    """One autoencoder's row, and with DiT-B's or MaskGIT's distance; without one, the paper's figures alone."""
    row = Row(label=label, expected=paper.rows.get(label, {}), cells={})
    if autoencoder is None:
        return row
    cells = evaluation_cells(setting, autoencoder)
    if with_generator:
        cells |= gfid_cells(_arm(setting, "maskgit" if autoencoder.is_discrete else "dit", autoencoder, "b"))
    return replace(row, here=autoencoder.name, cells=cells)


def _ablation(
    setting: Setting, paper: PaperTable, arms: Mapping[str, PlannedAutoencoder | None], keys: str
) -> TableItem:
    """DiT-B on several autoencoders, each compared with the first."""
    first, rows = next(iter(arms)), []
    for label, autoencoder in arms.items():
        row = _autoencoder_row(setting, paper, label, autoencoder, with_generator=True)
        rows.append(replace(row, against="" if label == first else first))
    return _table(setting, paper, keys, rows, *_normalized(setting))


def _over_steps(setting: Setting, paper: PaperTable, families: Mapping[str, Family]) -> TableItem:
    """XL generators on published and on our latents; ours compared with the published of the same steps."""
    base, ours = _base_and_ours(setting)
    rows = []
    for label in paper.rows:
        model, steps = label.split(", ")
        arm = _arm(setting, families[model.removesuffix(_OURS)], ours if model.endswith(_OURS) else base)
        other = label.replace(_OURS, "")
        against = other if other != label and other in paper.rows else ""
        rows.append(replace(_at_step(paper, label, arm, _SHARES[steps]), against=against))
    kinds = tuple(families.values())
    return _table(setting, paper, _SAMPLE_KEYS, rows, _seeds(setting), _WATCH, families=kinds)


def _maskgit(setting: Setting, paper: PaperTable, keys: str) -> TableItem:
    """MaskGIT over epochs; the first row, the original's own figures, is not run."""
    name = setting.autoencoders["VQ-GAN"]
    base, ours = setting.base(name), equivariant(setting, name)
    original, pytorch, *_, last = paper.rows
    rows = [Row(label=original, expected=paper.rows[original], cells={})]
    for label in list(paper.rows)[1:]:
        arm = _arm(setting, "maskgit", base if label == pytorch else ours)
        row = _at_step(paper, label, arm, int(label.split()[-2]) / 300)
        rows.append(replace(row, against=pytorch if label == last else ""))
    return _table(setting, paper, keys, rows, _seeds(setting), _WATCH, families=("maskgit",))


def _at_step(paper: PaperTable, label: str, arm: Arm, share: float) -> Row:
    """A generator after a share of its training: the watch's distance, and at the end all figures of a sample set."""
    setting = arm.setting
    config = setting.training_of(arm.family, arm.size)
    step = round(share * config.max_steps)
    cells = score_cells(arm, guided=False) if share == 1.0 else {}
    is_whole = math.isclose(share * config.max_steps, step) and step > 0
    if share == 1.0 or (is_whole and step % (config.sample_every or 1) == 0):
        is_guided = setting.sampling[arm.family].guidance_scale != 1.0
        for key, measure in _WATCHED.items():
            watched = arm_cell(arm, arm.trained, distance_key(setting, measure), step)
            cells |= {f"{key}_watch": watched} if is_guided else {key: cells.get(key, watched)}
    return Row(
        label=label, here=f"{arm.title}, {step} steps" if cells else "", expected=paper.rows[label], cells=cells
    )  # fmt: skip


def _table(
    setting: Setting,
    paper: PaperTable,
    keys: str,
    rows: Iterable[Row],
    *notes: str,
    families: tuple[Family, ...] = ("dit",),
) -> TableItem:
    kept = kept_keys(setting, keys.split())
    return TableItem(
        item=f"table{paper.number}",
        title=paper.title,
        source=paper.source,
        scale=setting.name,
        columns=columns(setting.reference.features, kept),
        rows=tuple(replace(row, cells={key: cell for key, cell in row.cells.items() if key in kept}) for row in rows),
        notes=(protocol(setting, *families, with_tokens=paper.number == 1), *notes),
    )
