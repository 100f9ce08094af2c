"""Alignment with a foundation model: VA-VAE, arXiv:2501.01423; hustvl/LightningDiT, `vavae`, `contperceptual.py`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.records import to_uint8
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method
from eqvae.networks.pretrained import EFFICIENTNET_LITE0
from eqvae.networks.teachers import Projection, check_teacher, load_teacher


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

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse a teacher that there is not."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        flags = {"flag": "--method vf: teacher", "weights_flag": "--method vf: teacher_weights"}
        check_teacher(self.teacher, self.teacher_weights, **flags)

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> nn.Module:
        """Load the teacher; its grid has a cell for at least 16 px, and its tokens are interpolated to z's."""
        side = max(image_size_px // max(autoencoder.stride, 16), 1)
        return Projection(load_teacher(self.teacher, grid=(side, side), weights=self.teacher_weights), autoencoder)

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
