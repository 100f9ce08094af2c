"""Which runs, and which of their figures, the columns of a table are read from."""

from eqvae.networks.features import metric_key
from eqvae.paper.autoencoders import PlannedAutoencoder, evaluation
from eqvae.paper.generators import Size, distance_key, generator, samples, score
from eqvae.paper.planned import PlannedRun
from eqvae.paper.setting import Family, Normalization, Setting
from eqvae.paper.table import Cell


def evaluation_cells(setting: Setting, autoencoder: PlannedAutoencoder) -> dict[str, Cell]:
    """Say where an autoencoder's own figures are measured."""
    runs = (evaluation(setting, autoencoder),)
    keys = {
        "rfid": f"r{distance_key(setting)}",
        "rotation": "equivariance_error_rotation",
        "scale": "equivariance_error_scale",
        "dimension": "intrinsic_dimension",
        "psnr": "psnr_db",
        "lpips": "lpips",
        "ssim": "ssim",
    }
    return {column: Cell(runs=runs, key=key) for column, key in keys.items()}


def gfid_cells(
    setting: Setting, family: Family, size: Size, autoencoder: PlannedAutoencoder, *, max_steps: int | None = None
) -> dict[str, Cell]:
    """Say where a generator's distance is measured, for each normalization of the latents; tokens have none."""
    cells = {}
    for normalization in setting.normalizations if family != "maskgit" else ("measured",):
        column = "gfid" if normalization == "measured" else f"gfid_{normalization}"
        cells[column] = gfid_cell(setting, family, size, autoencoder, normalization, max_steps=max_steps)
    return cells


def gfid_cell(
    setting: Setting,
    family: Family,
    size: Size,
    autoencoder: PlannedAutoencoder,
    normalization: Normalization = "measured",
    *,
    max_steps: int | None = None,
) -> Cell:
    """Say where a generator's distance is measured."""
    runs = trained_by_seed(setting, family, size, autoencoder, normalization, max_steps=max_steps)
    if setting.sampling[family].guidance_scale != 1.0:
        runs = scored_by_seed(setting, runs, family, guided=False)
    return Cell(runs=runs, key=distance_key(setting))


def score_cells(setting: Setting, scores: tuple[PlannedRun, ...]) -> dict[str, Cell]:
    """Say where the figures of sample sets are measured."""
    features = setting.scoring.features
    keys = {
        "fid": metric_key(features),
        "precision": metric_key(features, "precision"),
        "recall": metric_key(features, "recall"),
    }
    if setting.is_fid:
        keys |= {"sfid": "sfid", "inception_score": "inception_score"}
    return {column: Cell(runs=scores, key=key) for column, key in keys.items()}


def trained_by_seed(
    setting: Setting,
    family: Family,
    size: Size,
    autoencoder: PlannedAutoencoder,
    normalization: Normalization = "measured",
    *,
    max_steps: int | None = None,
) -> tuple[PlannedRun, ...]:
    """Train a generator once for each seed; see `generator`."""
    return tuple(
        generator(setting, family, size, autoencoder, seed=seed, normalization=normalization, max_steps=max_steps)
        for seed in setting.seeds
    )


def scored_by_seed(
    setting: Setting, trained: tuple[PlannedRun, ...], family: Family, *, guided: bool
) -> tuple[PlannedRun, ...]:
    """Draw and score a sample set of each generator; see `samples` and `score`."""
    return tuple(score(setting, samples(setting, run, family, guided=guided)) for run in trained)


def protocol(setting: Setting, family: Family) -> str:
    """Say how distances are measured: they depend on the number of images."""
    training, sampling = setting.training[family], setting.sampling[family]
    watch = f"{training.num_watch_samples} samples of {training.watch_steps} steps while training"
    drawn = f"{sampling.num_samples} of {sampling.num_steps} in sample sets"
    num_images = setting.evaluation.num_images or setting.num_validation_images
    return f"Distances: {watch}, {drawn}; autoencoders on {num_images} images of {setting.evaluation.image_size} px."
