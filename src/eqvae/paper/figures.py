"""Figures 1 to 8 of the paper: the runs that each needs, and how it is drawn from them."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eqvae.artifacts.names import CONTACT_SHEETS, SAMPLE_SHEET, contact_sheet_name
from eqvae.drawing import read_folders
from eqvae.drawing.evaluation_charts import distance_charts, distance_figure
from eqvae.drawing.pictures import latent_map_grid, picture_groups, transform_grids
from eqvae.images.sizes import square_px
from eqvae.paper import expected
from eqvae.paper.arms import Arm, distance_key, equivariant, evaluation, sample_set
from eqvae.paper.cells import (
    Column,
    Row,
    TableItem,
    autoencoder_cell,
    by_seed,
    columns,
    gfid_cells,
    kept_keys,
    protocol,
)
from eqvae.paper.pictures import draw_points, draw_sheets, numbered, write_chart, write_grid, write_picture
from eqvae.paper.plan import PlannedAutoencoder, PlannedRun
from eqvae.paper.setting import Family, Setting
from eqvae.runs.compare import CompareConfig, compare

_WATCHES = (1 / 8, 1 / 4)
"""First columns of Figure 4, as shares of the training: 50K and 100K of 400K steps."""

_FIGURE_8_GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class FigureItem:
    """A figure to reproduce."""

    item: str
    """`figure1`."""

    title: str

    scale: str

    runs: tuple[PlannedRun, ...]
    """What must be finished before it is drawn."""

    draw: Callable[[Path], list[Path]]
    """Draws into a folder and names the files."""

    table: TableItem | None = None
    """Its figures, where the paper's can be read off."""

    @property
    def source(self) -> str:
        """Where it stands; what the paper has not, its table says."""
        if not self.item.startswith("figure") and self.table is not None:
            return self.table.source
        return f"Figure {self.item.removeprefix('figure')} of arXiv:2502.09509"


def figure1(setting: Setting) -> FigureItem:
    """Left: principal components of latents. Right: distance against steps, DiT and REPA."""
    evaluations = _evaluations(setting, _continuous(setting, "SD-VAE", "SDXL-VAE"))
    families: tuple[Family, ...] = ("dit", "repa-sit")
    curves = {family: [arm.trained for arm in _base_and_ours(setting, family)] for family in families}

    def draw(folder: Path) -> list[Path]:
        groups = picture_groups(read_folders([run.folder for run in evaluations])[0])
        latents = folder / "latents.png"
        files = [write_grid(latent_map_grid(group), numbered(latents, index)) for index, group in enumerate(groups)]
        for family, (without, with_eq) in curves.items():
            shutil.rmtree(folder / family, ignore_errors=True)  # of fewer seeds, perhaps
            compare(CompareConfig(runs=tuple(run.folder for run in (*without, *with_eq)), out=folder / family))
            files += sorted((folder / family).glob("*.png"))
        return files

    trained = by_seed([runs for pair in curves.values() for runs in pair])
    return FigureItem(
        item="figure1", title="Latents' principal components; distance while training", scale=setting.name,
        runs=(*evaluations, *trained), draw=draw,
    )  # fmt: skip


def figure2(setting: Setting) -> FigureItem:
    """Scaled latents, decoded, before and after."""
    evaluations = _evaluations(setting, _continuous(setting, "SD-VAE"))
    return FigureItem(
        item="figure2", title="x, D(E(τ∘x)) and D(τ∘E(x)) for s = 0.5", scale=setting.name, runs=evaluations,
        draw=lambda folder: _draw_transforms(evaluations, folder, only="s = 0.5"),
    )  # fmt: skip


def figure3(setting: Setting) -> FigureItem:
    """Distance between tau(x) and D(tau(E(x)))."""
    pairs = _continuous(setting, "SD-VAE", "SDXL-VAE")
    drawn = _evaluations(setting, pairs)
    measured = tuple(
        Column(key=key, paper=f"rFID, {shown}", here=f"r{distance_key(setting)}_{key}", digits=1, paper_digits=0)
        for key, shown in (
            ("scale_0.75", "s = 0.75"), ("scale_0.5", "s = 0.5"), ("scale_0.25", "s = 0.25"), ("rotation", "R(θ)"),
        )
    )  # fmt: skip
    labels = {setting.autoencoders[name]: name for name in expected.FIGURE_3 if name in setting.autoencoders}
    rows = []
    for autoencoder in pairs:
        label, is_base = labels[autoencoder.base], autoencoder.name == autoencoder.base
        figures = expected.FIGURE_3[label] if is_base else ()
        rows.append(
            Row(
                label=label if is_base else f"{label} + EQ-VAE",
                here=autoencoder.name,
                expected=dict(zip((column.key for column in measured), figures, strict=False)),
                cells={column.key: autoencoder_cell(setting, autoencoder, column.here) for column in measured},
            )
        )
    title = "Distance between τ(x) and D(τ(E(x)))"
    table = TableItem(
        item="figure3", title=title, source="Figure 3 of arXiv:2502.09509, read off", scale=setting.name,
        columns=measured, rows=tuple(rows),
    )  # fmt: skip

    def draw(folder: Path) -> list[Path]:
        charts = distance_charts(read_folders([run.folder for run in drawn])[0])
        files = [write_chart(distance_figure(chart), folder / "distances", index) for index, chart in enumerate(charts)]
        return [file for pair in files for file in pair]

    return FigureItem(
        item="figure3", title=title, scale=setting.name, runs=(*drawn, *table.runs), table=table, draw=draw
    )


def figure4(setting: Setting) -> FigureItem:
    """Samples of two generators at three steps from the same noise."""
    return _samples_while_training(setting, "figure4", "Samples while training, from the same noise", "dit", first=0)


def figure5(setting: Setting) -> FigureItem:
    """Distance against epochs of fine-tuning."""
    base = setting.autoencoders["SD-VAE"]
    autoencoders = {0: setting.base(base)}
    autoencoders |= {epochs: equivariant(setting, base, epochs=epochs) for epochs in setting.figure5_epochs}
    cells = {
        epochs: gfid_cells(Arm(setting=setting, family="dit", size="b", autoencoder=autoencoder))
        for epochs, autoencoder in autoencoders.items()
    }
    labels = {epochs: "1 epoch" if epochs == 1 else f"{epochs} epochs" for epochs in cells}
    polish_steps = setting.finetuning.training.polish_steps
    polished = f" and {polish_steps} of the decoder alone" if polish_steps else ""
    rows = tuple(
        Row(
            label=labels[epochs],
            here=f"{autoencoders[epochs].name}, {epochs * setting.steps_per_epoch} steps{polished if epochs else ''}",
            expected={"gfid": expected.FIGURE_5[epochs]} if epochs in expected.FIGURE_5 else {},
            cells=own,
            against=labels[0] if epochs else "",
        )
        for epochs, own in cells.items()
    )
    title = "Distance against epochs of fine-tuning with EQ-VAE"
    table = TableItem(
        item="figure5", title=title, source="Figure 5 of arXiv:2502.09509, read off", scale=setting.name,
        columns=columns(setting.reference.features, kept_keys(setting, ("gfid", "gfid_fixed"))), rows=rows,
        notes=(protocol(setting, "dit"),),
    )  # fmt: skip

    def draw(folder: Path) -> list[Path]:
        points = {float(epochs): own["gfid"].values() for epochs, own in cells.items()}
        chart = draw_points(points, expected.FIGURE_5 if setting.is_fid else {}, f"g{distance_key(setting)}")
        return write_chart(chart, folder / "epochs")

    return FigureItem(item="figure5", title=title, scale=setting.name, runs=table.runs, draw=draw, table=table)


def figure6(setting: Setting) -> FigureItem:
    """Figure 2 for more autoencoders and for rotations."""
    pairs = _continuous(setting, *setting.autoencoders)
    evaluations = _evaluations(setting, pairs)

    def draw(folder: Path) -> list[Path]:
        files = []
        for first in range(0, len(pairs), 2):
            files += _draw_transforms(evaluations[first : first + 2], folder / pairs[first].name)
        return files

    return FigureItem(
        item="figure6", title="x, D(E(τ∘x)) and D(τ∘E(x))", scale=setting.name, runs=evaluations, draw=draw
    )  # fmt: skip


def figure7(setting: Setting) -> FigureItem:
    """Further samples while training: REPA's."""
    title = "Further samples while training, from the same noise"
    return _samples_while_training(setting, "figure7", title, "repa-sit", first=5)


def figure8(setting: Setting) -> FigureItem:
    """Further samples, guided with scale 4."""
    arm = replace(_base_and_ours(setting, "dit")[1], max_steps=setting.guided_steps.get("dit+eq"))
    config = replace(setting.guided_sampling["dit"], num_samples=100, guidance_scale=_FIGURE_8_GUIDANCE)
    drawn = sample_set(setting, arm.trained[0], config, suffix=f"-guidance-{_FIGURE_8_GUIDANCE:g}")
    return FigureItem(
        item="figure8", title="Samples with guidance scale 4.0", scale=setting.name, runs=(drawn,),
        draw=lambda folder: [drawn.folder / SAMPLE_SHEET],
    )  # fmt: skip


_ALL = (figure1, figure2, figure3, figure4, figure5, figure6, figure7, figure8)
FIGURES: dict[str, Callable[[Setting], FigureItem]] = {function.__name__: function for function in _ALL}
"""By the names of the command line."""


def watched_steps(setting: Setting, family: Family) -> tuple[int, ...]:
    """Choose the steps of Figure 4: an eighth, a quarter and all of the training, or what was watched near them."""
    config = setting.training_of(family, "xl")
    every = config.sample_every or config.max_steps
    wanted = [round(share * config.max_steps) for share in _WATCHES]
    nearest = [min(max(round(step / every), 1) * every, config.max_steps) for step in wanted]
    if len(set(nearest)) < len(nearest):
        nearest[-1] = min(nearest[-1] + every, config.max_steps)
    return tuple(sorted({*nearest, config.max_steps}))


def _samples_while_training(setting: Setting, item: str, title: str, family: Family, *, first: int) -> FigureItem:
    arms = _base_and_ours(setting, family)
    runs = tuple(arm.trained[0] for arm in arms)
    steps = watched_steps(setting, family)
    names = [f"{arm.recipe}\n{arm.autoencoder.name}" for arm in arms]

    def draw(folder: Path) -> list[Path]:
        sheets = [[run.folder / CONTACT_SHEETS / contact_sheet_name(step) for step in steps] for run in runs]
        page = draw_sheets(
            dict(zip(names, sheets, strict=True)), [f"{step} steps" for step in steps],
            cell_px=square_px(setting.encoding.image_size), first=first, count=5,
        )  # fmt: skip
        return [write_picture(page, folder / "samples.png")]

    return FigureItem(item=item, title=title, scale=setting.name, runs=runs, draw=draw)


def _base_and_ours(setting: Setting, family: Family) -> tuple[Arm, Arm]:
    """The paper's XL generators on what was published and on EQ-VAE's latents."""
    base, ours = setting.base(setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    arm = Arm(setting=setting, family=family, size="xl", autoencoder=base)
    return arm, replace(arm, autoencoder=ours)


def _continuous(setting: Setting, *names: str) -> tuple[PlannedAutoencoder, ...]:
    """Each base that is there, and ours of it; those with a codebook are left out."""
    bases = [setting.base(setting.autoencoders[name]) for name in names if name in setting.autoencoders]
    return tuple(
        arm for base in bases if not base.is_discrete for arm in (base, equivariant(setting, base.name))
    )  # fmt: skip


def _evaluations(setting: Setting, autoencoders: tuple[PlannedAutoencoder, ...]) -> tuple[PlannedRun, ...]:
    return tuple(evaluation(setting, autoencoder) for autoencoder in autoencoders)


def _draw_transforms(evaluations: Sequence[PlannedRun], folder: Path, *, only: str | None = None) -> list[Path]:
    """Draw x, D(E(tau x)), and D(tau E(x)) of each autoencoder (Figures 2 and 6)."""
    written = []
    for index, group in enumerate(picture_groups(read_folders([run.folder for run in evaluations])[0])):
        for grid in transform_grids(group):
            if only is None or grid.title == only:
                name = grid.title.replace("°", " degrees").replace(" = ", " ").replace(" ", "_")
                written.append(write_grid(grid, numbered(folder / f"{name}.png", index)))
    return written
