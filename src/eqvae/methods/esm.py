"""Spectrum matching: forever208/SpectrumMatching, arXiv:2603.14645, `utils_DCT.py`."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method
from eqvae.methods.spectra import SMALLEST, band_energies, blur


@method("esm")
class Esm(Term):
    """Matches spectra: `KL(p_x, p_z)` of the normalized log1p energies in 16 radial bands of the DCT.

    x is blurred (unless z has 32 cells a side, as in the source) and brought to z's size, its bands times f^delta;
    the number is multiplied by x's values, over which L sums and the source averages. The source trains without
    KL to N(0, I). Zero where z is the shrunk image and delta = 0.
    """

    default_weight = 0.01  # the source's
    wants_kl = False
    limits: ClassVar = {"delta": (-10.0, 10.0), "bands": (2, 1024)}

    delta: float = 1.0
    """Exponent that flattens the image's spectrum; the source's value."""
    bands: int = 16

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Compare the bands."""
        with torch.autocast(encoded.x.device.type, enabled=False):
            size = encoded.z.shape[-2:]
            x = encoded.x.float() if size[0] == 32 else blur(encoded.x.float())
            small = F.interpolate(x, size, mode="bicubic", align_corners=False)
            f = torch.arange(1, self.bands + 1, device=x.device, dtype=torch.float32)
            p_x = _normalize(band_energies(small, self.bands) * f**self.delta)
            p_z = _normalize(band_energies(encoded.z, self.bands))
            divergence = (p_x * ((p_x + SMALLEST).log() - (p_z + SMALLEST).log())).sum(1)
            return encoded.x[0].numel() * divergence


def _normalize(energies: Float[Tensor, "n bands"]) -> Float[Tensor, "n bands"]:
    logs = energies.log1p()
    return logs / (logs.sum(1, keepdim=True) + SMALLEST)
