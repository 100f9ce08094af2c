"""The configuration of a generator's training. Every field is a flag of `eqvae train`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, arg

from eqvae.errors import UserError
from eqvae.generators.diffusion import DitConfig
from eqvae.generators.families import PARTS, Recipe, find_recipe
from eqvae.generators.interpolant import SitConfig
from eqvae.generators.maskgit import MaskgitConfig
from eqvae.generators.repa import RepaConfig
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_ranges


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a generator on a latent cache: DiT, SiT, or SiT with REPA; MaskGIT on one of tokens."""

    recipe: Annotated[str, Positional, arg(metavar="RECIPE")]
    """`dit-{ti,s,b,l,xl}-{1,2,4,8}`, `sit-...` or `repa-sit-...`: objective, size and patch size; for tokens
    `maskgit-{ti,s,b,l,h}`."""

    latents: Path
    """The latent cache that `eqvae encode` wrote."""

    init: Path | None = None
    """Begin from this RUN's averaged weights, of `eqvae train` or `eqvae convert`, with a new optimizer."""

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

    flip: bool = True
    """Mirror half of the images, where the cache has mirror images."""

    # What some families have and others don't. The command line takes all of these flags, since it knows them before it
    # has read the recipe; `resolved` keeps what is the recipe's, refuses what would change nothing, and leaves None.

    dit: Annotated[DitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=DitConfig)
    """DiT, and SiT and REPA, which are the same network."""

    sit: Annotated[SitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=SitConfig)
    """SiT, and REPA on it."""

    repa: Annotated[RepaConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=RepaConfig)
    """REPA."""

    maskgit: Annotated[MaskgitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=MaskgitConfig)
    """MaskGIT."""

    autoencoder: str | None = None
    """The decoder for samples during the run, where it is no longer where `eqvae encode` found it."""

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
        recipe = self.find_recipe()
        if self.label_dropout > 1:
            raise UserError(f"--label-dropout is {self.label_dropout}", "A probability lies in [0, 1]")
        if self.reference is not None and self.num_watch_samples < 2:
            raise UserError(f"--num-watch-samples is {self.num_watch_samples}", "A distance takes at least 2")
        follows: dict[str, Any] = {part: getattr(recipe, part, None) for part in PARTS.values()}
        for name, value in recipe.published._asdict().items():
            follows[name] = value if getattr(self, name) is None else getattr(self, name)
        if self.sample_every is None:
            follows["sample_every"] = max(self.max_steps // 10, 1)
        return replace(self, recipe=str(recipe), **follows)

    def find_recipe(self) -> Recipe:
        """Read the recipe's name, with what was chosen of its family."""
        return find_recipe(self.recipe, self.dit, self.sit, self.repa, self.maskgit)


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
