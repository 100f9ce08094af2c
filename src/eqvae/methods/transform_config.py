"""Which tau are drawn, and how often: flags of `eqvae finetune`, and parameters of `eq` and `explicit`."""

from dataclasses import dataclass, replace
from typing import Any

from eqvae.errors import UserError, nearest_name
from eqvae.transforms import PRESETS, Interpolation, TransformSampler


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Which transformations are drawn, and how often."""

    transforms: str | None = None
    """Preset for tau: `paper`, `released-code`, `plain`, `rotation`, `scale` or `anisotropic` (Table 5); None:
    `paper`. This and the next five are parameters of `eq` and `explicit`."""

    equivariance_probability: float | None = None
    """Probability of the equivariance branch, else tau is the identity; None: the preset's (0.5)."""

    rotation_probability: float | None = None
    """Probability that the equivariance branch rotates, else it only scales; None: the preset's (1)."""

    min_scale: float | None = None
    """Smallest scale; None: the preset's (0.25)."""

    interpolation: Interpolation | None = None
    """How scales resize images and latents; None: the preset's (bicubic in the paper)."""

    antialias: bool | None = None
    """Whether scales low-pass first; None: the preset's (no)."""

    def sampler(self) -> TransformSampler:
        """Build the sampler of tau."""
        name = self.transforms or "paper"
        if name not in PRESETS:
            raise UserError(f"--transforms '{name}' is no preset", nearest_name(name, PRESETS))
        changes = {name: getattr(self, name) for name in _DRAWN if getattr(self, name) is not None}
        try:
            return replace(PRESETS[name], **changes)
        except ValueError as error:
            raise UserError(str(error)) from None

    def resolved(self) -> "TransformConfig":
        """Fill in the preset's values."""
        sampler = self.sampler()
        return replace(self, transforms=self.transforms or "paper", **{name: getattr(sampler, name) for name in _DRAWN})

    def given(self) -> dict[str, Any]:
        """What was not left to the preset."""
        values = {name: getattr(self, name) for name in ("transforms", *_DRAWN)}
        return {name: value for name, value in values.items() if value is not None}


_DRAWN = ("equivariance_probability", "rotation_probability", "min_scale", "interpolation", "antialias")
