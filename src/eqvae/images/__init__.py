"""Images: sources, decoding, crops and batches."""

from eqvae.images.bands import Bands, Picture, Pixels, RangeConfig
from eqvae.images.data import open_images
from eqvae.images.decoding import (
    BrokenImage,
    BrokenImageError,
    adm_crop,
    decode_image,
    ldm_random_crop,
    open_picture,
    to_images,
)
from eqvae.images.loader import ImageBatch, check_broken, encoding_batches, evaluation_batches, training_batches
from eqvae.images.sizes import ImageSize
from eqvae.images.sources import ImageSource

__all__ = [
    "Bands",
    "BrokenImage",
    "BrokenImageError",
    "ImageBatch",
    "ImageSize",
    "ImageSource",
    "Picture",
    "Pixels",
    "RangeConfig",
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
