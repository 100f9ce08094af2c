"""How images are drawn: every field is a flag of `eqvae sample`."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eqvae.errors import UserError, printable
from eqvae.generators.diffusion import StepSpacing
from eqvae.generators.maskgit import Schedule
from eqvae.images.sources import list_names
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check_ranges
from eqvae.sampling.sde import DiffusionForm, LastStep
from eqvae.sampling.tokens import GuidanceSchedule

Sampler = Literal["ddpm", "ddim", "euler", "heun", "dopri5", "sde", "confidence", "halton", "one-pass"]

_CLASSES_MEND = "Use balanced, random, or a list such as 3,7,9"


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler, what it is guided by, and the classes and noise of its images."""

    num_steps: int | None = None
    """Sampling steps; None: 250, or for MaskGIT 8 with `confidence` and 32 with `halton`, as published; GAT
    takes 1, `dopri5` as many as its tolerances ask for."""

    seed: int = 0
    """With an image's index, of its noise."""

    classes: str = "balanced"
    """`balanced`, `random`, or a list of names or numbers such as `cat,dog` or `3,7,9`."""

    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 for none."""

    guidance_low: float = 0.0
    """Guide only from this share of noise on: 0 is data, 1 is noise (arXiv:2404.07724)."""

    guidance_high: float = 1.0
    """Guide only up to this share of noise; 0.7 in REPA."""

    guidance_channels: int | None = None
    """Guide only the first channels: 3 in the published DiT and SiT code; None: all."""

    guidance_schedule: GuidanceSchedule | None = None
    """MaskGIT: how the scale grows over the steps; None: `linear` with `confidence`, `constant` with `halton`."""

    weak_run: Path | None = None
    """Autoguidance: guide away from this smaller or less trained generator instead (arXiv:2406.02507)."""

    sampler: Sampler | None = None
    """`ddpm` or `ddim` for DiT; `euler`, `heun`, `dopri5` or `sde` for SiT; `confidence` or `halton` for MaskGIT;
    `one-pass` for GAT. None: `ddpm`, `sde`, `confidence` and `one-pass`, as published."""

    ddim_eta: float = 0.0
    """DDIM: 0 is deterministic, 1 as noisy as DDPM."""

    step_spacing: StepSpacing = "even"
    """DiT: which of the 1000 steps are taken: `even`, from the first to the last, as published; `ddim`, at whole
    strides from the first on, as `ddimN` of its code."""

    timestep_shift: float = 1.0
    """euler, heun: time t from noise (0) to data (1) becomes `s t / (1 + (s - 1) t)`: LightningDiT's 0.3 takes more and
    smaller steps near noise; 1 leaves them equal."""

    diffusion_form: DiffusionForm = "sigma"
    """SDE: its diffusion over time."""

    diffusion_norm: float = 1.0
    """SDE: factor of its diffusion."""

    last_step: LastStep = "mean"
    """SDE: how its last step is taken."""

    last_step_size: float = 0.04
    """SDE: time before data at which its last step begins."""

    rtol: float = 1e-3
    """dopri5: relative error of a step."""

    atol: float = 1e-6
    """dopri5: absolute error of a step."""

    schedule: Schedule | None = None
    """MaskGIT: how many tokens the steps fill; None: the schedule of training."""

    temperature: float = 1.0
    """MaskGIT: logits are divided by this."""

    top_k: int | None = None
    """MaskGIT: draw from the likeliest codes only; None: from all."""

    choice_temperature: float = 4.5
    """MaskGIT: noise in the choice of the tokens to fill at the first step, with `confidence`; 0 for none."""

    truncation: float = 0.0
    """GAT: share of the way by which styles move towards their class's mean; 0.3 in its code, 0 for none."""

    precision: Precision = "bf16"
    """Of the transformer; samplers and decoder compute in fp32."""

    def check(self) -> None:
        """Check what can be checked without the generator."""
        check_ranges(
            self,
            (
                (AT_LEAST_1, ("num_steps", "guidance_channels", "top_k")),
                (POSITIVE, ("rtol", "atol", "temperature", "timestep_shift")),
                (NOT_NEGATIVE, ("seed", "guidance_scale", "ddim_eta", "diffusion_norm", "choice_temperature")),
            ),
        )
        if not 0.0 <= self.truncation <= 1.0:
            raise UserError(f"--truncation is {self.truncation}", "A share lies in [0, 1]")
        if not 0.0 <= self.guidance_low <= self.guidance_high <= 1.0:
            raise UserError(
                f"--guidance-low {self.guidance_low} and --guidance-high {self.guidance_high} are no interval",
                "Give 0 <= low <= high <= 1",
            )
        if not self.classes.strip(" ,"):
            raise UserError(f"--classes '{self.classes}' is not known", _CLASSES_MEND)

    def listed_classes(self, names: tuple[str, ...] | None = None) -> list[int]:
        """Read a list of names, or of numbers counted from 0 where the names are no numbers themselves."""
        number_of = {name: number for number, name in reversed(list(enumerate(names or ())))}
        takes_numbers = not any(name.removeprefix("-").isdecimal() for name in number_of)
        parts, listed = self.classes.split(","), list[int]()
        while parts:
            # A name may hold commas: the longest that is known counts.
            lengths = range(len(parts), 0, -1)
            length = next((count for count in lengths if ",".join(parts[:count]).strip() in number_of), 0)
            word = ",".join(parts[: max(length, 1)]).strip()
            if length:
                listed.append(number_of[word])
            elif takes_numbers and word.removeprefix("-").isdecimal():
                listed.append(int(word))
            else:
                raise self._unknown_class(word, names)
            parts = parts[max(length, 1) :]
        return listed

    def _unknown_class(self, word: str, names: tuple[str, ...] | None) -> UserError:
        if not names:
            return UserError(f"--classes '{self.classes}' is not known", _CLASSES_MEND)
        near = difflib.get_close_matches(word, names, n=1)
        known = f"Did you mean '{near[0]}'?" if near else f"Use balanced, random, or names such as {list_names(names)}"
        return UserError(f"Class {printable(word)} is not one of the generator's", known)
