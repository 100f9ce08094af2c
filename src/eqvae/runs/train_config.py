"""The configuration of a generator's training. Every field is a flag of `eqvae train`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eqvae.errors import UserError, nearest_name
from eqvae.generators.maskgit import MASKGIT_NAMES, LossTokens, MaskgitRecipe, parse_maskgit_recipe
from eqvae.generators.masking import Schedule
from eqvae.generators.presets import NAMES, Recipe, parse_recipe
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_ranges


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a generator on a latent cache: DiT, SiT, or SiT with REPA; MaskGIT on one of tokens."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """`dit-{ti,s,b,l,xl}-{1,2,4,8}`, `sit-...` or `repa-sit-...`: objective, size and patch size; for tokens
    `maskgit-{ti,s,b,l,h}`."""

    latents: Path
    """The latent cache that `eqvae encode` wrote."""

    out: Path
    """Output folder; the same command run again resumes what lies there."""

    max_steps: int = 400_000
    """Optimizer steps; 400,000 in most of the paper's tables. More than a finished run has taken lengthen it."""

    batch_size: int = 256
    """Latents per optimizer step, over all processes."""

    gradient_accumulation_steps: int = 1
    """Parts into which a process's share of the batch is split to save memory; changes no result."""

    learning_rate: float = 1e-4
    """Of AdamW, constant after its warm-up; DiT's, SiT's and REPA's value."""

    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; None: 2,500 for MaskGIT, else 0, as published."""

    adam_beta1: float = 0.9
    """The published recipes' value."""

    adam_beta2: float | None = None
    """None: 0.96 for MaskGIT, else 0.999, as published."""

    weight_decay: float | None = None
    """Decoupled weight decay; None: 1e-5 for MaskGIT, else 0, as published."""

    max_grad_norm: float | None = None
    """Largest norm of the gradient; 0 does not clip; None: 1 for REPA and MaskGIT, else 0, as published."""

    ema_decay: float = 0.9999
    """Decay of the averaged weights, which are sampled from."""

    posthoc_ema: bool = False
    """Also keep two power-function averages, from which any horizon can be chosen afterwards (arXiv:2312.02696)."""

    label_dropout: float = 0.1
    """Probability of training without the label, for classifier-free guidance."""

    normalization: str = "measured"
    """`measured`: by the cache's mean and standard deviation of each channel; `fixed:0.18215`: times that factor."""

    posterior: Literal["sample", "mean"] = "sample"
    """Train on a fresh sample of each posterior, or on its mean."""

    flip: bool = True
    """Mirror half of the images, where the cache has mirror images."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    """SiT: how data and noise are interpolated."""

    prediction: Literal["velocity", "score", "noise"] = "velocity"
    """SiT: what the network predicts."""

    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """SiT: weight of the score or noise loss over time."""

    schedule: Schedule = "arccos"
    """MaskGIT: how many tokens are masked."""

    label_smoothing: float = 0.1
    """MaskGIT: share of each target that is spread over all codes."""

    loss_tokens: LossTokens = "masked"
    """MaskGIT: whether the masked tokens count, or all."""

    teacher: str = "vit_base_patch14_dinov2.lvd142m"
    """REPA: frozen vision model, `efficientnet-lite0` (offline) or any of timm's."""

    teacher_weights: Path | None = None
    """REPA: file of the teacher's weights; None: the local cache or the network."""

    cache_teacher: bool = False
    """REPA: compute the teacher's tokens of all images once, into a file beside the latents, not at each step."""

    repa_weight: float = 0.5
    """REPA: weight of the alignment."""

    repa_depth: int | None = None
    """REPA: block whose tokens are aligned; None: 8, or half the depth of a smaller transformer."""

    data: str | None = None
    """REPA: the images of the cache, where they are no longer where `eqvae encode` found them."""

    autoencoder: str | None = None
    """The decoder for samples during the run, where it is no longer where `eqvae encode` found it."""

    qk_norm: bool = False
    """Normalize queries and keys of the attention."""

    sample_every: int | None = None
    """Steps between contact sheets and measurements; None: a tenth of max_steps."""

    reference: str | None = None
    """DATA or saved statistics against which samples are measured during the run; None: pictures only."""

    features: str = "efficientnet-lite0"
    """Features of that measure: `inception` (FID), `efficientnet-lite0` (offline) or a model of timm."""

    num_watch_samples: int = 1000
    """Samples for each measurement during the run."""

    watch_steps: int | None = None
    """Sampling steps for them, without guidance; None: 8 for MaskGIT, else 50."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; one is also written when the run is interrupted."""

    log_every: int = 10
    """Steps between records of the journal."""

    seed: int = 0
    """Of first weights, data order, noise, times and label dropout."""

    precision: Precision = "bf16"
    """Autocast precision of the network; weights stay fp32."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    compile: bool = False
    """Compile the transformer with torch.compile."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""

    dry_run: bool = False
    """Print the resolved configuration, sizes, FLOPs and memory, and stop."""

    def resolved(self) -> "TrainConfig":
        """Fill in what follows from other fields and check what can be checked without reading the cache."""
        check_ranges(self, _RANGES)
        recipe = find_recipe(self.recipe)
        if self.label_dropout > 1:
            raise UserError(f"--label-dropout is {self.label_dropout}", "A probability lies in [0, 1]")
        if self.reference is not None and self.num_watch_samples < 2:
            raise UserError(f"--num-watch-samples is {self.num_watch_samples}", "A distance takes at least 2")
        for whose in _FOREIGN[recipe.family]:
            for name in _FLAGS_OF[whose]:
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} is {whose}'s, and '{recipe}' is no {whose}",
                        f"Leave it out, or train a {whose}",
                    )
        published = {
            name: value
            for name, value in (_PUBLISHED | _PUBLISHED_OF.get(recipe.family, {})).items()
            if getattr(self, name) is None
        }
        return replace(
            self,
            recipe=str(recipe),
            sample_every=max(self.max_steps // 10, 1) if self.sample_every is None else self.sample_every,
            **published,
        )


def find_recipe(name: str) -> Recipe | MaskgitRecipe:
    """Read the name of any generator, of latents or of tokens."""
    if name.lower() in MASKGIT_NAMES:
        return parse_maskgit_recipe(name)
    if name.lower() in NAMES:
        return parse_recipe(name)
    raise UserError(f"there is no generator '{name}'", nearest_name(name.lower(), (*NAMES, *MASKGIT_NAMES)))


_FLAGS_OF = {
    "SiT": ("path", "prediction", "loss_weight"),
    "REPA": ("teacher", "teacher_weights", "cache_teacher", "repa_weight", "repa_depth", "data"),
    "DiT or SiT": ("normalization", "posterior", "qk_norm"),
    "MaskGIT": ("schedule", "label_smoothing", "loss_tokens"),
}

_FOREIGN = {
    "dit": ("SiT", "MaskGIT"),
    "sit": ("MaskGIT",),
    "repa-sit": ("MaskGIT",),
    "maskgit": ("SiT", "REPA", "DiT or SiT"),
}
"""Whose flags would change nothing."""

_PUBLISHED: dict[str, Any] = {
    "adam_beta2": 0.999, "weight_decay": 0.0, "max_grad_norm": 0.0, "lr_warmup_steps": 0, "watch_steps": 50,
}  # fmt: skip

_PUBLISHED_OF: dict[str, dict[str, Any]] = {
    "repa-sit": {"max_grad_norm": 1.0},
    "maskgit": {
        "adam_beta2": 0.96, "weight_decay": 1e-5, "max_grad_norm": 1.0, "lr_warmup_steps": 2500, "watch_steps": 8,
    },
}  # fmt: skip

_RANGES = (
    (AT_LEAST_1,
     ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "sample_every",
      "num_watch_samples", "repa_depth")),
    (("in 2 ... 1000", lambda value: 2 <= value <= 1000), ("watch_steps",)),
    (POSITIVE, ("learning_rate",)),
    (NOT_NEGATIVE, ("seed", "lr_warmup_steps", "weight_decay", "max_grad_norm", "label_dropout", "repa_weight")),
    (BELOW_1, ("adam_beta1", "adam_beta2", "ema_decay", "label_smoothing")),
)  # fmt: skip

FREE_TO_CHANGE = frozenset(
    {"out", "max_steps", "device", "log_every", "sample_every", "checkpoint_every", "dry_run", "compile", "reference",
     "features", "num_watch_samples", "watch_steps", "gradient_checkpointing", "gradient_accumulation_steps",
     "data", "autoencoder", "cache_teacher"}
)  # fmt: skip
"""Fields that may differ between a run and its resumption."""
