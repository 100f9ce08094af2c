"""What a fine-tuning run refuses before anything is written: sizes, another origin, memory, data that can't be read."""

from typing import Any

from eqvae.autoencoders.padding import check_reflection, padding_mode_of
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images import ImageSource, evaluation_batches, training_batches
from eqvae.images.sizes import Buckets, largest
from eqvae.losses.discriminators import Discriminator
from eqvae.metrics.autoencoder import check_image_size
from eqvae.networks.pretrained import LPIPS_MIN_IMAGE_SIZE_PX
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.memory import finetuning_memory, is_beyond_doubt
from eqvae.runtime.memory import FINETUNE_FLAGS
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import RunFolder


def check_sizes(
    config: FinetuneConfig, autoencoder: Autoencoder, discriminator: Discriminator | None, num_processes: int
) -> int:
    """Refuse images that have no whole latent grid, or that become smaller than what looks at them can see.

    Returns the smallest side in px.
    """
    training, stride = config.training, autoencoder.stride
    check_image_size(config.validation_size, stride, quarters=True)
    sizes = sum(config.sizes(stride), ())
    for size in sizes:
        check_image_size(size, stride)
    for size in sorted(set(sizes)):
        training.check_autoencoder(autoencoder, image_size=size, num_processes=num_processes)
    shortest_px = min(map(min, sizes))
    smallest_px = training.mixture().smallest_side(shortest_px // stride) * stride
    smallest_cells = min(smallest_px, min(config.validation_size) // 4) // stride  # validation scales by quarters
    check_reflection(config.padding_mode or padding_mode_of(autoencoder), smallest_cells)
    needs = {} if discriminator is None else {"the discriminator": discriminator.min_image_size_px}
    needs |= {"LPIPS": LPIPS_MIN_IMAGE_SIZE_PX} if training.reconstruction.perceptual == "lpips" else {}
    for network, side_px in needs.items():
        if smallest_px < side_px:
            raise UserError(
                f"images of {shortest_px} px can be scaled down to {smallest_px} px, too small for {network}",
                f"Use a larger --image-size or --min-scale, so that {side_px} px are left",
            )
    return shortest_px


RECORDED = ("discriminator_fingerprint", "mixture")
"""What of `check_origin`'s findings stands in the model's card too."""


def check_origin(
    folder: RunFolder,
    config: FinetuneConfig,
    base_fingerprint: str,
    discriminator: Discriminator | None,
    sources: tuple[ImageSource, ImageSource],
) -> dict[str, Any]:
    """Refuse to go on with a run that began from something else; returns what it begins from, for `config.json`."""
    training, (source, validation_source) = config.training, sources
    files = training.mixture().files()
    methods: dict[str, Any] = {"method_files": files} if files else {}
    if folder.differs(**methods):
        raise UserError(
            f"'{config.out}' holds a run whose methods were another in {', '.join(map(repr, files))}",
            "Put the file back to resume it, or choose another --out",
        )
    if folder.differs(base_fingerprint=base_fingerprint):
        raise UserError(
            f"'{config.out}' holds a run that began from other weights than '{config.autoencoder}' has now",
            "Give the same autoencoder to resume it, or another --out",
        )
    counts = {"num_data": len(source), "num_validation_data": len(validation_source)}
    if folder.contradicts(**counts):
        raise UserError(
            f"'{config.out}' holds a run on more or fewer images than '{config.data}' or '{config.validation_data}' "
            "has now, and their order depends on their number",
            "Put back what was there to resume it, or choose another --out",
        )
    loaded: dict[str, str] = {}
    if discriminator is not None and training.adversarial.discriminator is not None:
        loaded = {"discriminator_fingerprint": discriminator.fingerprint()}
    if folder.differs(**loaded):
        raise UserError(
            f"'{config.out}' holds a run that began from another discriminator than "
            f"'{training.adversarial.discriminator}' has now",
            "Give the same one to resume it, or another --out",
        )
    return methods | loaded | counts | {"base_fingerprint": base_fingerprint, "mixture": str(training.mixture())}


def check_memory(
    config: FinetuneConfig, autoencoder: Autoencoder, discriminator: Discriminator | None, processes: Processes
) -> None:
    """Refuse a run that does not fit, before anything is written."""
    num_kept = config.training.batch_size // (processes.count * config.training.gradient_accumulation_steps)
    num_pixels = num_kept * largest(sum(config.sizes(autoencoder.stride), ())).num_pixels
    if not is_beyond_doubt(autoencoder.num_parameters(), num_pixels, processes.device):
        memory = finetuning_memory(config, autoencoder, discriminator, processes)
        memory.check_fits(processes.device, FINETUNE_FLAGS, num_processes=processes.count)


def read_once(config: FinetuneConfig, source: ImageSource, buckets: Buckets, validation_source: ImageSource) -> None:
    """Read a batch of each source, so that data which can't be used are told before anything is written."""
    size, count = config.validation_size, config.training.batch_size
    next(training_batches(source, image_size_px=buckets, batch_size=count, seed=0, num_steps=1, num_workers=0))
    next(evaluation_batches(validation_source, image_size_px=size, batch_size=1, num_images=None, num_workers=0))
