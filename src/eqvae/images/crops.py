"""The field's two crops, and images as the networks see them.

- Evaluation and latents: ADM's centre crop (openai/guided-diffusion, `center_crop_arr`), as DiT, SiT and REPA use it.
- Training: the random crop of latent diffusion (CompVis/latent-diffusion, `ImageNetSR`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

MIN_CROP_FRACTION = 0.5
"""Smallest side of a training crop, as a fraction of the image's short side; the largest is the short side itself."""


def adm_crop(image: Image.Image, image_size_px: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the short side to `image_size_px` and cut the centre square out.

    Halving with a box filter as long as the image is at least twice too large, then one bicubic resize: the bicubic
    filter then never shrinks by more than two.
    """
    while min(image.size) >= 2 * image_size_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size_px) // 2, (image.height - image_size_px) // 2
    return np.array(image.crop((left, top, left + image_size_px, top + image_size_px)))


def ldm_random_crop(
    image: Image.Image, image_size_px: int, random: np.random.Generator, *, flip: bool
) -> UInt8[np.ndarray, "size size 3"]:
    """Cut a random square out, of a side uniform in 0.5 ... 1 of the short side, and resize it by area."""
    short_side = min(image.size)
    side = max(1, int(short_side * random.uniform(MIN_CROP_FRACTION, 1.0)))
    left = int(random.integers(image.width - side + 1))
    top = int(random.integers(image.height - side + 1))
    mirrored = random.random() < 0.5
    # What OpenCV's INTER_AREA does: the mean over the area when shrinking, bilinear when enlarging.
    resample = Image.Resampling.BOX if side >= image_size_px else Image.Resampling.BILINEAR
    # Cropped before, not with `resize(box=...)`: that filter would see the pixels around the box.
    crop = image.crop((left, top, left + side, top + side)).resize((image_size_px, image_size_px), resample)
    return np.array(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop)


def to_images(arrays: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "n 3 h w"]:
    """Stack 8-bit crops of one size to images in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1.0).contiguous()
