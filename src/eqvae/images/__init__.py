"""Images: sources, decoding, crops and batches."""

from eqvae.images.crops import adm_crop, ldm_random_crop, to_images
from eqvae.images.decoding import BrokenImageError, decode_image, open_picture
from eqvae.images.loader import (
    CropBatch,
    ImageBatch,
    check_broken,
    encoding_batches,
    evaluation_batches,
    training_batches,
)
from eqvae.images.sources import ImageSource, open_images

__all__ = [
    "BrokenImageError",
    "CropBatch",
    "ImageBatch",
    "ImageSource",
    "adm_crop",
    "check_broken",
    "decode_image",
    "encoding_batches",
    "evaluation_batches",
    "ldm_random_crop",
    "open_images",
    "open_picture",
    "to_images",
    "training_batches",
]
