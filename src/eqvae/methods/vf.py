"""Alignment with a foundation model: VA-VAE, arXiv:2501.01423; hustvl/LightningDiT, `vavae`, `contperceptual.py`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.records import to_uint8
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method
from eqvae.networks.pretrained import EFFICIENTNET_LITE0, check_timm_name
from eqvae.networks.teachers import load_teacher


class Projection(nn.Module):
    """A frozen teacher, and the learned 1 x 1 convolution from latents to its channels; neither is exported."""

    def __init__(self, name: str, weights: Path | None, side: int, num_channels: int) -> None:
        super().__init__()
        self.teacher = load_teacher(name, grid=(side, side), weights=weights).requires_grad_(False)
        self.convolution = nn.Conv2d(num_channels, self.teacher.channels, 1, bias=False)


@method("vf")
class Vf(Term):
    """`mean relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - 0.25) + mean relu(0.5 - cos(z'_i, f_i))`: a teacher's angles.

    z' is a learned 1 x 1 convolution of z, f the teacher's tokens on z's grid. Zero where z' = f.
    """

    default_weight = 0.1  # the source's

    adaptive: bool = True
    teacher: str = EFFICIENTNET_LITE0
    """Or any model of timm, `vit_base_patch14_dinov2.lvd142m` (the source's) say, from its cache or the network."""
    teacher_weights: Path | None = None
    distance_margin: float = 0.25
    cosine_margin: float = 0.5

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> nn.Module:
        """Load the teacher; its grid has a cell for at least 16 px, and its tokens are interpolated to z's."""
        if self.teacher != EFFICIENTNET_LITE0:
            check_timm_name(self.teacher, "--method vf: teacher", (EFFICIENTNET_LITE0,))
        side = max(image_size_px // max(autoencoder.stride, 16), 1)
        return Projection(self.teacher, self.teacher_weights, side, autoencoder.latent_channels)

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Compare angles between cells, and each cell with its token."""
        assert isinstance(encoded.part, Projection)
        teacher, size = encoded.part.teacher, encoded.z.shape[-2:]
        with torch.autocast(encoded.x.device.type, enabled=False):
            f = teacher(to_uint8(encoded.x)).transpose(1, 2).unflatten(2, teacher.grid)
            f = F.normalize(F.interpolate(f, size, mode="bilinear", align_corners=False).flatten(2), dim=1)
            z = F.normalize(encoded.part.convolution(encoded.z.float()).flatten(2), dim=1)
            apart = (z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs()
            aligned = F.relu(1.0 - self.cosine_margin - (z * f).sum(1)).mean(1)
            return F.relu(apart - self.distance_margin).mean((1, 2)) + aligned
