"""What a scale of reproduction is: all in which the paper's and its tiny twin differ, as one record.

Each stage has a complete configuration as a template: `autoencoder`, `data`, `latents` and `out` are filled in by the
recipes, everything else is what the stage runs with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.networks.features import INCEPTION
from eqvae.paper.reference import ReferenceConfig
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig

Family = Literal["dit", "sit", "repa-sit", "maskgit"]
Normalization = Literal["measured", "fixed"]

GIVEN_LATER = "?"
"""Data that have no default: the command line must name them before anything runs."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """An autoencoder that is taken as it is."""

    name: str
    """In names of runs and rows of tables."""

    location: str
    """What `load_autoencoder` takes."""

    stride: int
    """Pixels per latent cell."""

    is_discrete: bool
    """Whether it has a codebook."""

    architecture: str | Autoencoder = field(compare=False)
    """A preset's name, or the autoencoder itself: for estimates of cost."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A scale of reproduction."""

    name: Literal["paper", "tiny"]

    root: Path = Path("ROOT")
    """The folder below which all runs lie."""

    num_images: int
    """Of the generators' data, where `encoding` does not cut it; for estimates of cost."""

    num_validation_images: int
    """On which autoencoders are evaluated, where `evaluation` does not cut them; for estimates of cost."""

    num_reference_images: int
    """Of the samples' reference; for estimates of cost."""

    num_classes: int

    autoencoders: Mapping[str, str]
    """The base for each of the paper's autoencoders; those that are missing have expected figures only. `SD-VAE` and
    `VQ-GAN` must be there: ablations start from the first, MaskGIT from both."""

    generator_base: str
    """On whose latents the published DiT, SiT and REPA were trained: the baseline of Tables 2, 4, 9 and 10."""

    bases: Mapping[str, Base] = field(default_factory=lambda: MappingProxyType({}))
    """What is known of bases that are no presets, or whose weights the user named."""

    extra: tuple[str, ...] = ()
    """Further bases: rows of their own in Tables 1 and 12."""

    finetuning: FinetuneConfig

    discrete_finetuning: FinetuneConfig

    epochs: int
    """Of fine-tuning."""

    steps_per_epoch: int
    """The paper's epoch of fine-tuning is 10,000 steps."""

    figure5_epochs: tuple[int, ...]
    """Of Figure 5; each is a run of its own, since learning rates may fall and averages have a horizon."""

    strengths: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Probabilities of the equivariance branch in Table 8."""

    evaluation: EvaluateConfig

    encoding: EncodeConfig

    reference: ReferenceConfig

    training: Mapping[Family, TrainConfig]

    sizes: Mapping[Literal["b", "xl", "maskgit"], str]
    """Of generators: what stands for the paper's B and XL, and for its MaskGIT."""

    tokens_per_side: int
    """Of DiT and SiT: the patch size follows from it and the autoencoder's stride. 16 in the paper: patches of 2 for
    stride 8, of 1 for stride 16."""

    guided_steps: Mapping[str, int]
    """Training steps behind Table 4 and the last rows of Table 2, by family, with `+eq` for ours; those that are
    missing train as long as the others."""

    sampling: Mapping[Family, SampleConfig]
    """Where the paper does not guide, and for MaskGIT."""

    guided_sampling: Mapping[Family, SampleConfig]
    """Of Table 4."""

    scoring: ScoreConfig

    fixed_factors: Mapping[str, float]
    """The published scaling factor of a base's latents, for the second normalization; of others it is measured."""

    normalizations: tuple[Normalization, ...] = ("measured", "fixed")
    """Of each comparison: by each autoencoder's own statistics, and by the base's one factor, as the paper did."""

    seeds: tuple[int, ...]
    """Of the generators."""

    @property
    def is_fid(self) -> bool:
        """Whether distances are FIDs, which may be set beside the paper's."""
        return self.reference.features == INCEPTION

    def base(self, name: str) -> Base:
        """Look a base up."""
        if name in self.bases:
            return self.bases[name]
        return describe_base(name, name)

    def with_data(
        self,
        *,
        data: str | None = None,
        reference_data: str | None = None,
        finetune_data: str | None = None,
        validation_data: str | None = None,
    ) -> "Setting":
        """Change where images come from."""
        if finetune_data is None and self.finetuning.data == self.encoding.data:
            finetune_data = data
        if validation_data is None and self.evaluation.data == self.reference.reference:
            validation_data = reference_data
        setting = self
        if data is not None:
            setting = replace(setting, encoding=replace(setting.encoding, data=data))
        if reference_data is not None:
            setting = replace(setting, reference=replace(setting.reference, reference=reference_data))
        if finetune_data is not None:
            setting = setting._with_finetuning(data=finetune_data)
        if validation_data is not None:
            evaluation = replace(setting.evaluation, data=validation_data)
            setting = replace(setting, evaluation=evaluation)._with_finetuning(validation_data=validation_data)
        return setting

    def with_device(self, device: str) -> "Setting":
        """Let every stage compute on a device."""
        return replace(
            self,
            finetuning=replace(self.finetuning, device=device),
            discrete_finetuning=replace(self.discrete_finetuning, device=device),
            evaluation=replace(self.evaluation, device=device),
            encoding=replace(self.encoding, device=device),
            reference=replace(self.reference, device=device),
            training={family: replace(config, device=device) for family, config in self.training.items()},
            sampling={family: replace(config, device=device) for family, config in self.sampling.items()},
            guided_sampling={family: replace(config, device=device) for family, config in self.guided_sampling.items()},
            scoring=replace(self.scoring, device=device),
        )

    def _with_finetuning(self, **changes: str) -> "Setting":
        return replace(
            self,
            finetuning=replace(self.finetuning, **changes),  # type: ignore[arg-type]
            discrete_finetuning=replace(self.discrete_finetuning, **changes),  # type: ignore[arg-type]
        )


def describe_base(name: str, location: str) -> Base:
    """Look at an autoencoder; the weights of presets are left alone."""
    known = location.removeprefix(UNTRAINED)
    if known in PRESETS:
        is_discrete, stride = PRESETS[known].architecture.class_name == "VQModel", PRESETS[known].stride
        return Base(name=name, location=location, stride=stride, is_discrete=is_discrete, architecture=known)
    autoencoder = load_autoencoder(location)
    is_discrete = isinstance(autoencoder, DiscreteAutoencoder)
    return Base(
        name=name, location=location, stride=autoencoder.stride, is_discrete=is_discrete, architecture=autoencoder
    )
