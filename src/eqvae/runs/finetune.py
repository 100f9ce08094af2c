"""From a configuration and a base to a run: everything that can be wrong is found before anything is written."""

from pathlib import Path
from typing import Any

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images import ImageSource, evaluation_batches, open_images, training_batches
from eqvae.losses.adversarial import MIN_IMAGE_SIZE_PX
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.autoencoder import check_image_size
from eqvae.networks.pretrained import LPIPS_MIN_IMAGE_SIZE_PX
from eqvae.runs.finetune_config import FREE_TO_CHANGE, FinetuneConfig
from eqvae.runs.finetune_run import CHECKPOINT, Run
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import RunFolder
from eqvae.runtime.signals import stop_on_signals
from eqvae.training.autoencoder_state import TrainState, build_state
from eqvae.training.checkpoint import read_checkpoint


def finetune(config: FinetuneConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Fine-tune, or go on where an earlier call with the same configuration stopped."""
    config = config.resolved()
    config.check_autoencoder(autoencoder)
    device = choose_device(config.device)
    _check_sizes(config, autoencoder.stride)
    source, validation_source = open_images(config.data), open_images(config.validation_data, split="evaluation")
    reconstruction_loss = place(ReconstructionLoss(config.perceptual, config.perceptual_weight), device)
    base_fingerprint = autoencoder.fingerprint()
    folder = RunFolder.claim(config.out, "finetune")
    folder.check_same(config, FREE_TO_CHANGE)
    if folder.differs(base_fingerprint=base_fingerprint):
        raise UserError(
            f"'{config.out}' holds a run that began from other weights than '{config.autoencoder}' has now",
            "Give the same autoencoder to resume it, or another --out",
        )
    if folder.figures is not None:
        return folder.figures

    state = build_state(autoencoder, config, device)
    numbers = _resume(state, config.out / CHECKPOINT)
    _read_once(config, source, validation_source)
    processes = join_processes(device)
    with (
        folder.hold(config, processes, seed=config.seed, base_fingerprint=base_fingerprint),
        stop_on_signals() as stop,
    ):
        run = Run(
            config=config,
            device=device,
            state=state,
            reconstruction_loss=reconstruction_loss,
            source=source,
            validation_source=validation_source,
            journal=Journal(config.out, keep_up_to_step=state.step),
            sampler=config.sampler(),
            stop=stop,
            **numbers,
        )
        if state.step == 0:
            run.before = run.validate()
        run.train()
        return run.finish(base_fingerprint)


def _check_sizes(config: FinetuneConfig, stride: int) -> None:
    """Refuse images that have no whole latent grid, or that become smaller than the losses' networks can see."""
    check_image_size(config.image_size, stride, quarters=True)
    smallest_px = config.sampler().smallest_side(config.image_size // stride) * stride
    needs = {"the discriminator": MIN_IMAGE_SIZE_PX} if config.adversarial_weight > 0 else {}
    needs |= {"LPIPS": LPIPS_MIN_IMAGE_SIZE_PX} if config.perceptual == "lpips" else {}
    for network, side_px in needs.items():
        if smallest_px < side_px:
            raise UserError(
                f"images of {config.image_size} px can be scaled down to {smallest_px} px, too small for {network}",
                f"Use a larger --image-size or --min-scale, so that {side_px} px are left",
            )


def _resume(state: TrainState, path: Path) -> dict[str, Any]:
    """Load the checkpoint where there is one, and return its numbers beside the step."""
    if not path.exists():
        return {}
    tensors, numbers = read_checkpoint(path)
    state.load(tensors, numbers.pop("step"))
    return numbers


def _read_once(config: FinetuneConfig, source: ImageSource, validation_source: ImageSource) -> None:
    """Read a batch of each source, so that data which can't be used are told before anything is written."""
    size_px, count = config.image_size, config.batch_size
    next(training_batches(source, image_size_px=size_px, batch_size=count, seed=0, num_steps=1, num_workers=0))
    next(evaluation_batches(validation_source, image_size_px=size_px, batch_size=1, num_images=None, num_workers=0))
