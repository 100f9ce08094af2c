"""`eqvae rank`: which autoencoder's latents a generator learns best, and which measures would have told without one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvae.errors import UserError
from eqvae.paper.arms import Arm, distance_key, evaluation
from eqvae.paper.cells import by_seed, gfid_cell
from eqvae.paper.execution import carry_out
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.paper.results import RANKING, Contestant, write_ranking
from eqvae.paper.setting import Family, ScaleName, Setting
from eqvae.paper.settings import SETTINGS
from eqvae.runs.reproduce import PlanConfig, make_setting, split_name


@dataclass(frozen=True, kw_only=True)
class RankConfig(PlanConfig):
    """Rank autoencoders by how well one small generator learns their latents: same budget, seeds and normalization."""

    autoencoders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]AUTOENCODER ...")]
    """Two or more presets, hub ids or paths, all continuous or all discrete."""

    out: Path
    """Root of the runs, resumed when called again; `ranking.md` and `ranking.json` are written there."""

    scale: ScaleName = "small"
    """`small`: a 4M generator on photographs of 128 px, 64,000 images. `paper`: DiT-B, 400,000 steps, ImageNet. `tiny`:
    as `small` on CIFAR-10 at 64 px, 19,200 images."""

    generator: Literal["dit", "sit"] = "dit"
    """What is trained on continuous latents; on tokens it is a MaskGIT."""

    image_size: int | None = None
    """Side of all images, in px; None: 128 for `small`, 64 for `tiny`, 256 for `paper`."""

    max_steps: int | None = None
    """Of each generator; None: the scale's."""


def command(config: RankConfig) -> str | None:
    """Rank, or go on with it, and show the ranking."""
    path = rank(config)
    return None if path is None else path.read_text().rstrip("\n")


def rank(config: RankConfig, settings: Mapping[ScaleName, Setting] = SETTINGS) -> Path | None:
    """Do what is left of the runs, and write the ranking; returns its page, in all processes but the first None."""
    setting, contestants = make_contestants(config, settings)
    # Evaluations first, then each contestant's first seed, and so on: something can be compared early.
    trained = by_seed([each.distance.runs for each in contestants])
    plan = Plan.of((*(each.evaluation for each in contestants), *trained))

    def write(finished: PlannedRun | None = None) -> None:
        write_ranking(contestants, config.out, metric=distance_key(setting), scale=setting.name)

    if not carry_out(plan, config, "rank", write):
        return None
    write()
    return config.out / f"{RANKING}.md"


def make_contestants(
    config: RankConfig, settings: Mapping[ScaleName, Setting] = SETTINGS
) -> tuple[Setting, tuple[Contestant, ...]]:
    """Plan what each autoencoder has to go through."""
    names = [split_name(given)[0] for given in config.autoencoders]
    if len(names) < 2:
        raise UserError("a ranking needs two autoencoders or more", "Name them: eqvae rank AUTOENCODER AUTOENCODER ...")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two autoencoders are called '{name}'", "Give names: NAME=AUTOENCODER")
    setting = make_setting(config, config.autoencoders, settings)
    if config.image_size is not None:
        setting = setting.with_all("image_size", config.image_size)
    bases = [setting.base(name) for name in names]
    if len({base.is_discrete for base in bases}) > 1:
        listed = ", ".join(base.name for base in bases if base.is_discrete)
        raise UserError(f"some autoencoders are discrete ({listed}), others not", "Rank each kind by itself")
    family: Family = "maskgit" if bases[0].is_discrete else config.generator
    return setting, tuple(
        Contestant(
            name=base.name,
            distance=gfid_cell(
                Arm(setting=setting, family=family, size="b", autoencoder=base, max_steps=config.max_steps)
            ),
            evaluation=evaluation(setting, base),
        )
        for base in bases
    )
