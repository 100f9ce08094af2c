"""The generators that the paper trains on an autoencoder's latents, and how they are measured."""

from dataclasses import replace
from typing import Literal

from eqvae.networks.features import metric_key
from eqvae.paper.autoencoders import PlannedAutoencoder, latents, untouched
from eqvae.paper.planned import PlannedRun
from eqvae.paper.reference import STATISTICS
from eqvae.paper.setting import Family, Normalization, Setting
from eqvae.runs.sample import SampleConfig
from eqvae.runtime.run_folder import change_flat

Size = Literal["b", "xl", "maskgit"]


def recipe_name(setting: Setting, family: Family, size: Size, stride: int) -> str:
    """Name the generator that stands for one of the paper's."""
    if family == "maskgit":
        return f"maskgit-{setting.sizes['maskgit']}"
    patch_size = max(setting.encoding.image_size // stride // setting.tokens_per_side, 1)
    return f"{family}-{setting.sizes[size]}-{patch_size}"


def reference(setting: Setting) -> PlannedRun:
    """Compute the statistics that samples are measured against."""
    name = "reference"
    return PlannedRun(name=name, config=replace(setting.reference, out=setting.root / name))


def generator(
    setting: Setting,
    family: Family,
    size: Size,
    autoencoder: PlannedAutoencoder,
    *,
    seed: int = 0,
    normalization: Normalization = "measured",
    max_steps: int | None = None,
) -> PlannedRun:
    """Train a generator."""
    template = setting.training[family]
    steps = template.max_steps if max_steps is None else max_steps
    recipe = recipe_name(setting, family, size, autoencoder.base.stride)
    parts = ["generators", recipe, autoencoder.name]
    parts += ["fixed"] if normalization == "fixed" else []
    parts += [f"{steps}-steps"] if steps != template.max_steps else []
    name = "/".join([*parts, f"seed-{seed}"])
    cache, statistics = latents(setting, autoencoder), reference(setting)
    config = replace(
        template,
        recipe=recipe,
        latents=cache.folder,
        out=setting.root / name,
        max_steps=steps,
        reference=str(statistics.folder / STATISTICS),
        seed=seed,
    )
    needs: tuple[PlannedRun, ...] = (cache, statistics)
    scaled_as = None
    if normalization == "fixed":
        factor = setting.fixed_factors.get(autoencoder.base.name)
        if factor is not None:
            config = change_flat(config, normalization=f"fixed:{factor:g}")
        else:
            scaled_as = latents(setting, untouched(setting, autoencoder.base.name))
            needs = (cache, statistics) if scaled_as == cache else (cache, statistics, scaled_as)
    return PlannedRun(
        name=name,
        config=config,
        needs=needs,
        scaled_as=scaled_as,
        architecture=autoencoder.base.architecture,
    )


def samples(setting: Setting, trained: PlannedRun, family: Family, *, guided: bool) -> PlannedRun:
    """Draw a sample set."""
    config = (setting.guided_sampling if guided else setting.sampling)[family]
    is_other = guided and config != setting.sampling[family]
    return sample_set(setting, trained, replace(config, seed=_seed(trained)), suffix="-guided" if is_other else "")


def sample_set(setting: Setting, trained: PlannedRun, config: SampleConfig, *, suffix: str) -> PlannedRun:
    """Draw a sample set in a way of its own."""
    name = "samples/" + trained.name.removeprefix("generators/") + suffix
    config = replace(config, run=str(trained.folder), out=setting.root / name)
    return PlannedRun(name=name, config=config, needs=(trained,), architecture=trained.architecture)


def score(setting: Setting, drawn: PlannedRun) -> PlannedRun:
    """Score a sample set by ADM's protocol, or its twin with other features."""
    name, statistics = "scores/" + drawn.name.removeprefix("samples/"), reference(setting)
    config = replace(
        setting.scoring,
        samples=drawn.folder,
        reference=str(statistics.folder / STATISTICS),
        out=setting.root / name,
    )
    return PlannedRun(name=name, config=config, needs=(drawn, statistics))


def distance_key(setting: Setting) -> str:
    """Name the Frechet distance as `metrics.json` and the journal do: `fid`, or `fd_...` for other features."""
    return metric_key(setting.reference.features)


def _seed(trained: PlannedRun) -> int:
    return int(getattr(trained.config, "seed", 0))
