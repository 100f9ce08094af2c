"""Names of the files and folders that commands write and others read. Nobody types them again."""

# Every command's output folder.
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
JOURNAL = "journal.jsonl"
METRICS = "metrics.json"

# Training of an autoencoder or a generator.
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_BEFORE = "checkpoint.before.safetensors"
"""The one before, taken where the latest is damaged."""
MILESTONES = "milestones"
"""Folder of the checkpoints that `--keep-every` keeps, see `milestone_name`."""
DIVERGED = "diverged.json"
"""What a step was made of that did not go well."""
SNAPSHOTS = "snapshots"
"""Folder of the power-function averages from which `eqvae sample --ema-sigma-rel` rebuilds weights."""
VALIDATION = "validation"
"""Folder of a fine-tuning run's pictures."""
CONTACT_SHEETS = "samples"
"""Folder of a training run's samples, see `contact_sheet_name`."""
TENSORBOARD = "tensorboard"

# An exported autoencoder: diffusers' own layout, plus a card.
AUTOENCODER = "autoencoder"
MODEL_CARD = "eqvae.json"
AUTOENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors"
CONVERSION = "conversion.json"
"""Beside a pair of TAESD's files: what they have no place for."""
DISCRIMINATOR = "discriminator"
"""Folder in it of the discriminator that was trained beside."""
DISCRIMINATOR_WEIGHTS = "model.safetensors"

# An exported generator: its card, and one file for each kind of weights.
GENERATOR = "generator"
GENERATOR_CARD = "generator.json"

# A pipeline's folder, diffusers' own layout.
PIPELINE_INDEX = "model_index.json"

# A latent cache: an index beside its shards, see `shard_name`.
CACHE_INDEX = "index.json"

# What measuring leaves.
PICTURES = "pictures.safetensors"
SPECTRUM = "spectrum.json"
STATISTICS = "statistics.safetensors"
COMPARISON = "comparison.json"
RANKING = "ranking"
"""Stem of `eqvae rank`'s record and of its page."""

# Samples.
SAMPLE_SET = "samples.npz"
SAMPLE_SHEET = "samples.png"
SHEET_SIDE = 10
"""Columns of a contact sheet, and rows of classes."""
SHEET_GAP_PX = 2
"""Between a contact sheet's pictures, and around them."""
SAMPLE_PARTS = "parts"
"""Folder of what is drawn before the set is whole; it goes when it is."""


def shard_name(number: int) -> str:
    """Name one shard of a latent cache."""
    return f"shard-{number:05d}.safetensors"


def contact_sheet_name(step: int) -> str:
    """Name the contact sheet of one step of a generator's training."""
    return f"step_{step:07d}.png"


def milestone_name(step: int) -> str:
    """Name the checkpoint that is kept of one step."""
    return f"step_{step:07d}.safetensors"


def weights_name(kind: str) -> str:
    """Name the file of a generator's weights: `ema` or `raw`."""
    return f"{kind}.safetensors"
