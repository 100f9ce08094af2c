"""Figures 1 to 8 of the paper: the runs that each needs, and how it is drawn from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from eqvae.artifacts import CONTACT_SHEETS, contact_sheet_name
from eqvae.paper import expected
from eqvae.paper.autoencoders import PlannedAutoencoder, equivariant, evaluation, untouched
from eqvae.paper.cells import gfid_cells, protocol, trained_by_seed
from eqvae.paper.drawings import (
    Point,
    SheetRow,
    draw_comparison,
    draw_distances,
    draw_latent_maps,
    draw_points,
    draw_sheets,
    draw_transforms,
)
from eqvae.paper.generators import distance_key, generator, recipe_name, sample_set
from eqvae.paper.planned import PlannedRun
from eqvae.paper.setting import Family, Setting
from eqvae.paper.table import Cell, Column, Row, Table, by_seed, columns
from eqvae.runs.sample import SHEET

_WATCHES = {"50K": 1 / 8, "100K": 1 / 4, "400K": 1.0}
"""Columns of Figure 4, as shares of the training."""

_FIGURE_8_GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """A figure to reproduce."""

    item: str
    """`figure1`."""

    title: str

    scale: str

    runs: tuple[PlannedRun, ...]
    """What must be finished before it is drawn."""

    draw: Callable[[Path], list[Path]]
    """Draws into a folder and names the files."""

    table: Table | None = None
    """Its figures, where the paper's can be read off."""

    @property
    def source(self) -> str:
        """Where it stands."""
        return f"Figure {self.item.removeprefix('figure')} of arXiv:2502.09509"


def figure1(setting: Setting) -> PaperFigure:
    """Left: principal components of latents. Right: distance against steps, DiT and REPA."""
    evaluations = _evaluations(setting, _continuous(setting, "SD-VAE", "SDXL-VAE"))
    base, ours = untouched(setting, setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    families: tuple[Family, ...] = ("dit", "repa-sit")
    curves = {
        family: (trained_by_seed(setting, family, "xl", base), trained_by_seed(setting, family, "xl", ours))
        for family in families
    }

    def draw(folder: Path) -> list[Path]:
        files = draw_latent_maps(evaluations, folder / "latents.png")
        for family, (without, with_eq) in curves.items():
            files += draw_comparison(without, with_eq, folder / family)
        return files

    trained = by_seed([runs for pair in curves.values() for runs in pair])
    return PaperFigure(
        item="figure1", title="Latents' principal components; distance while training", scale=setting.name,
        runs=(*evaluations, *trained), draw=draw,
    )  # fmt: skip


def figure2(setting: Setting) -> PaperFigure:
    """Scaled latents, decoded, before and after."""
    evaluations = _evaluations(setting, _continuous(setting, "SD-VAE"))
    return PaperFigure(
        item="figure2", title="x, D(E(τ∘x)) and D(τ∘E(x)) for s = 0.5", scale=setting.name, runs=evaluations,
        draw=lambda folder: draw_transforms(evaluations, folder, only="s = 0.5"),
    )  # fmt: skip


def figure3(setting: Setting) -> PaperFigure:
    """Distance between tau(x) and D(tau(E(x)))."""
    pairs = _continuous(setting, "SD-VAE", "SDXL-VAE")
    evaluations = _evaluations(setting, pairs)
    distance = f"r{distance_key(setting)}"
    measured = tuple(
        Column(key=key, paper=f"rFID, {shown}", here=f"{distance}_{key}", digits=1, paper_digits=0)
        for key, shown in (
            ("scale_0.75", "s = 0.75"), ("scale_0.5", "s = 0.5"), ("scale_0.25", "s = 0.25"), ("rotation", "R(θ)"),
        )
    )  # fmt: skip
    labels = {setting.autoencoders[name]: name for name in expected.FIGURE_3 if name in setting.autoencoders}
    rows = tuple(
        Row(
            label=labels.get(autoencoder.name, f"{labels.get(autoencoder.base.name, '')} + EQ-VAE"),
            here=autoencoder.name,
            expected=dict(
                zip(
                    (column.key for column in measured),
                    expected.FIGURE_3[labels[autoencoder.name]] if autoencoder.name in labels else (),
                    strict=False,
                )
            ),
            cells={column.key: Cell(runs=(run,), key=column.here) for column in measured},
        )
        for autoencoder, run in zip(pairs, evaluations, strict=True)
    )
    title = "Distance between τ(x) and D(τ(E(x)))"
    table = Table(
        item="figure3", title=title, source="Figure 3 of arXiv:2502.09509, read off", scale=setting.name,
        columns=measured, rows=rows,
    )  # fmt: skip
    return PaperFigure(
        item="figure3", title=title, scale=setting.name, runs=evaluations, table=table,
        draw=lambda folder: draw_distances(evaluations, folder / "distances"),
    )  # fmt: skip


def figure4(setting: Setting) -> PaperFigure:
    """Samples of two generators at three steps from the same noise."""
    return _sheets(setting, "figure4", "Samples while training, from the same noise", first=0, family="dit")


def figure5(setting: Setting) -> PaperFigure:
    """Distance against epochs of fine-tuning."""
    base = setting.autoencoders["SD-VAE"]
    arms = {0: untouched(setting, base)}
    arms |= {epochs: equivariant(setting, base, epochs=epochs) for epochs in setting.figure5_epochs}
    cells = {epochs: gfid_cells(setting, "dit", "b", autoencoder) for epochs, autoencoder in arms.items()}
    rows = tuple(
        Row(
            label=_epochs(epochs),
            here=f"{arms[epochs].name}, {epochs * setting.steps_per_epoch} steps",
            expected={"gfid": expected.FIGURE_5[epochs]} if epochs in expected.FIGURE_5 else {},
            cells=own,
            against=_epochs(0) if epochs else "",
        )
        for epochs, own in cells.items()
    )
    title = "Distance against epochs of fine-tuning with EQ-VAE"
    table = Table(
        item="figure5", title=title, source="Figure 5 of arXiv:2502.09509, read off", scale=setting.name,
        columns=columns(setting.reference.features, ["gfid", *(["gfid_fixed"] if "gfid_fixed" in cells[0] else [])]),
        rows=rows, notes=(protocol(setting, "dit"),),
    )  # fmt: skip

    def draw(folder: Path) -> list[Path]:
        points = [Point(x=float(epochs), values=tuple(own["gfid"].values())) for epochs, own in cells.items()]
        paper = {float(epochs): value for epochs, value in expected.FIGURE_5.items()} if setting.is_fid else None
        return draw_points(
            points, folder / "epochs", x_label="epochs of fine-tuning", y_label=f"g{distance_key(setting)}", paper=paper
        )

    return PaperFigure(item="figure5", title=title, scale=setting.name, runs=table.runs, draw=draw, table=table)


def figure6(setting: Setting) -> PaperFigure:
    """Figure 2 for more autoencoders and for rotations."""
    pairs = _continuous(setting, *setting.autoencoders)
    evaluations = _evaluations(setting, pairs)

    def draw(folder: Path) -> list[Path]:
        files = []
        for first in range(0, len(pairs), 2):
            files += draw_transforms(evaluations[first : first + 2], folder / pairs[first].name)
        return files

    return PaperFigure(
        item="figure6", title="x, D(E(τ∘x)) and D(τ∘E(x))", scale=setting.name, runs=evaluations, draw=draw
    )


def figure7(setting: Setting) -> PaperFigure:
    """Further samples while training: REPA's."""
    return _sheets(
        setting, "figure7", "Further samples while training, from the same noise", first=5, family="repa-sit"
    )


def figure8(setting: Setting) -> PaperFigure:
    """Further samples, guided with scale 4."""
    ours = equivariant(setting, setting.autoencoders["SD-VAE"])
    trained = generator(setting, "dit", "xl", ours, seed=setting.seeds[0], max_steps=setting.guided_steps.get("dit+eq"))
    config = replace(setting.guided_sampling["dit"], num_samples=100, guidance_scale=_FIGURE_8_GUIDANCE)
    drawn = sample_set(setting, trained, config, suffix=f"-guidance-{_FIGURE_8_GUIDANCE:g}")
    return PaperFigure(
        item="figure8", title="Samples with guidance scale 4.0", scale=setting.name, runs=(drawn,),
        draw=lambda folder: [drawn.folder / SHEET],
    )  # fmt: skip


FIGURES: dict[str, Callable[[Setting], PaperFigure]] = {
    f"figure{number + 1}": recipe
    for number, recipe in enumerate((figure1, figure2, figure3, figure4, figure5, figure6, figure7, figure8))
}
"""By the names of the command line."""


def watched_steps(setting: Setting, family: Family) -> tuple[int, ...]:
    """Choose the steps of Figure 4: an eighth, a quarter and all of the training, or what was watched near them."""
    config = setting.training[family]
    every = config.sample_every or config.max_steps
    wanted = [round(share * config.max_steps) for share in _WATCHES.values()]
    nearest = [min(max(round(step / every), 1) * every, config.max_steps) for step in wanted[:-1]]
    if len(set(nearest)) < len(nearest):
        nearest[-1] = min(nearest[-1] + every, config.max_steps)
    return tuple(sorted({*nearest, config.max_steps}))


def _sheets(setting: Setting, item: str, title: str, *, first: int, family: Family) -> PaperFigure:
    base, ours = untouched(setting, setting.generator_base), equivariant(setting, setting.autoencoders["SD-VAE"])
    runs = tuple(generator(setting, family, "xl", arm, seed=setting.seeds[0]) for arm in (base, ours))
    steps = watched_steps(setting, family)

    def draw(folder: Path) -> list[Path]:
        rows = [
            SheetRow(
                name=f"{recipe_name(setting, family, 'xl', arm.base.stride)}\n{arm.name}",
                sheets=tuple(run.folder / CONTACT_SHEETS / contact_sheet_name(step) for step in steps),
            )
            for arm, run in zip((base, ours), runs, strict=True)
        ]
        return draw_sheets(
            rows, [f"{step} steps" for step in steps], folder / "samples.png", cell_px=setting.encoding.image_size,
            first=first, count=5,
        )  # fmt: skip

    return PaperFigure(item=item, title=title, scale=setting.name, runs=runs, draw=draw)


def _continuous(setting: Setting, *names: str) -> tuple[PlannedAutoencoder, ...]:
    """Each base that is there, and ours of it; those with a codebook are left out."""
    bases = [setting.autoencoders[name] for name in names if name in setting.autoencoders]
    kept = [base for base in bases if not setting.base(base).is_discrete]
    return tuple(arm for base in kept for arm in (untouched(setting, base), equivariant(setting, base)))


def _evaluations(setting: Setting, autoencoders: tuple[PlannedAutoencoder, ...]) -> tuple[PlannedRun, ...]:
    return tuple(evaluation(setting, autoencoder) for autoencoder in autoencoders)


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"
