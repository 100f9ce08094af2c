"""What a scale of reproduction consists of: autoencoders, and a complete configuration of each stage as a template.

Autoencoder, data, latents and `out` are filled in by a plan, everything else is what the stage runs with. The numbers
stand in `settings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eqvae.networks.features import INCEPTION
from eqvae.paper.plan import PlannedAutoencoder, ReferenceConfig, describe_base
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import change_flat, flat

Family = Literal["dit", "sit", "repa-sit", "maskgit"]
Size = Literal["b", "xl"]

ScaleName = Literal["small", "paper", "tiny"]

GIVEN_LATER = "?"
"""Data that have no default: the command line must name them before anything runs."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A scale of reproduction."""

    name: ScaleName

    root: Path = Path("ROOT")
    """The folder below which all runs lie."""

    num_images: int
    """Of the generators' data, where `encoding` does not cut it; this and the next three are for estimates of cost."""

    num_validation_images: int
    """On which autoencoders are evaluated, where `evaluation` does not cut them."""

    num_reference_images: int
    """Of the samples' reference."""

    num_classes: int

    autoencoders: Mapping[str, str]
    """The base for each of the paper's autoencoders; those that are missing have expected figures only. `SD-VAE` and
    `VQ-GAN` must be there: ablations start from the first, MaskGIT from both."""

    generator_base: str
    """On whose latents the published DiT, SiT and REPA were trained: the baseline of Tables 2, 4, 9 and 10."""

    bases: Mapping[str, PlannedAutoencoder] = field(default_factory=dict)
    """What is known of bases that are no presets, or whose weights the user named."""

    extra: tuple[str, ...] = ()
    """Further bases: rows of their own in Tables 1 and 12."""

    finetuning: FinetuneConfig

    discrete_finetuning: FinetuneConfig

    autoencoder_seeds: tuple[int, ...] = (0,)
    """Of fine-tuning: each recipe is carried out once for each."""

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

    long_training: Mapping[Family, TrainConfig] = field(default_factory=dict)
    """Of the paper's XL generators, where learning curves are asked for, as far as it is another one."""

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

    both_normalizations: bool = True
    """Whether tables have generators on latents times the base's factor too, as the paper did."""

    kernel_distances: bool = False
    """Whether tables have the kernel distance beside the Frechet distance: it is unbiased with few images."""

    fixed_factors: Mapping[str, float]
    """The published scaling factor of a base's latents, for the second normalization; of others it is measured."""

    seeds: tuple[int, ...]
    """Of the generators."""

    @property
    def is_fid(self) -> bool:
        """Whether distances are FIDs, which may be set beside the paper's."""
        return self.reference.features == INCEPTION

    def training_of(self, family: Family, size: Size) -> TrainConfig:
        """Choose the template of a generator's training."""
        return self.long_training.get(family, self.training[family]) if size == "xl" else self.training[family]

    def with_curves_of(self, num_images: int) -> "Setting":
        """Cut learning curves, or lengthen them; the tables' other generators stay as they are."""
        long = self.long_training
        cut = {family: replace(config, max_steps=num_images // config.batch_size) for family, config in long.items()}
        return replace(self, long_training=cut)

    def base(self, name: str) -> PlannedAutoencoder:
        """Take a base as it is."""
        return self.bases[name] if name in self.bases else describe_base(name, name)

    def is_fine_tuning(self, name: str) -> bool:
        """Whether a name is that of a plan's fine-tuning: its base's, and what is done with it."""
        base, plus, _ = name.partition("+")
        return bool(plus) and base in {*self.autoencoders.values(), self.generator_base}

    def with_data(
        self, *, data: str | None, reference_data: str | None, finetune_data: str | None, validation_data: str | None
    ) -> "Setting":
        """Change where images come from; None leaves it, but where one data served two purposes it goes on to."""
        if finetune_data is None and self.finetuning.data == self.encoding.data:
            finetune_data = data
        if validation_data is None and self.evaluation.data == self.reference.reference:
            validation_data = reference_data
        tuned = {"data": finetune_data, "validation_data": validation_data}
        return replace(
            self,
            finetuning=_with_given(self.finetuning, **tuned),
            discrete_finetuning=_with_given(self.discrete_finetuning, **tuned),
            evaluation=_with_given(self.evaluation, data=validation_data),
            encoding=_with_given(self.encoding, data=data),
            reference=_with_given(self.reference, reference=reference_data),
        )

    def with_all(self, name: str, value: object) -> "Setting":
        """Change a field of every configuration that has it: the device, the size of images."""

        def change(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {key: change(each) for key, each in part.items()}
            return change_flat(part, **{name: value}) if is_dataclass(part) and name in flat(part) else part

        return replace(self, **{each.name: change(getattr(self, each.name)) for each in fields(self)})


def _with_given(config: Any, **changes: str | None) -> Any:
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
