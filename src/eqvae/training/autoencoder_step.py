"""One training step as a function of an explicit state."""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Quantized
from eqvae.equivariance import decode_transformed, explicit_loss
from eqvae.errors import NotFiniteError
from eqvae.losses.adversarial import Seam, hinge_loss
from eqvae.losses.codebook import Codes
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.autoencoder import CodeCounts
from eqvae.runtime.device import autocast
from eqvae.runtime.processes import ALONE, Processes
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import TrainState
from eqvae.transforms import IDENTITY, Draw, TransformSampler


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step measured, averaged over its micro-batches."""

    branch: str
    """Of the first micro-batch."""

    transform: str
    """tau of the first micro-batch."""

    reconstruction: float
    """L_rec per value of the image: L1 + perceptual, weighing a scaled picture as `resolution_weighting` says."""

    l1: float
    """Mean absolute error between tau o x and D(tau o E(x)), images in [-1, 1]; unweighted."""

    kl: float
    """Nats per image."""

    explicit: float
    """Equation 4 per image; 0 where the objective is implicit."""

    adversarial: float
    """L_gan: minus the mean logit of reconstructions."""

    discriminator: float
    """Hinge loss: 1 is chance, 0 certainty."""

    adaptive_weight: float
    """lambda_gan; 0 during the discriminator's warm-up."""

    gradient_norm: float
    """Before clipping, of the loss per input value."""

    learning_rate: float
    """Of the autoencoder; 0 during the discriminator's warm-up."""

    quantization: float | None = None
    """Squared distance of tau o E(x) to its codes per value, weighed as `reconstruction`: codebook and commitment loss
    alike. This and what follows is None for a continuous autoencoder."""

    codebook_usage: float | None = None
    """Share of all codes that the batch used; at most tokens / codes."""

    codebook_perplexity: float | None = None
    """How many codes, used alike, would be as hard to guess as the batch's tokens."""

    def figures(self) -> dict[str, str | float]:
        """What was measured, by name; without what the autoencoder does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def learning_rate_at(step: int, config: AutoencoderTraining, *, first_step: int) -> float:
    """Linear warm-up, then constant or half a cosine to zero."""
    warmup = config.optimizer.lr_warmup_steps or 0
    done = step - first_step
    rate = config.optimizer.learning_rate * min(1.0, (done + 1) / (warmup + 1))
    if config.optimizer.lr_scheduler == "cosine":
        progress = max(done - warmup, 0) / max(config.max_steps - first_step - warmup, 1)
        rate *= 0.5 * (1.0 + math.cos(math.pi * progress))
    return rate


def train_step(
    state: TrainState,
    x: Float[Tensor, "n 3 h w"],
    config: AutoencoderTraining,
    reconstruction_loss: ReconstructionLoss,
    sampler: TransformSampler,
    processes: Processes = ALONE,
) -> StepRecord:
    """Take one optimizer step of Equation 7; one reconstruction serves autoencoder and discriminator.

    `x` holds this process's rows of each micro-batch. All processes draw the same tau: scaled pictures cost less,
    and with a tau for each the others would wait for the one whose pictures are the largest.
    """
    first_step = config.adversarial.discriminator_warmup_steps or 0
    warming_up = state.step < first_step
    rate = 0.0 if warming_up else learning_rate_at(state.step, config, first_step=first_step)
    _choose_trained(state, config, warming_up)
    for optimizer in (state.optimizer, state.discriminator_optimizer):
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
    latent_size = (x.shape[-2] // state.autoencoder.stride, x.shape[-1] // state.autoencoder.stride)
    statistics = _running_statistics(state)
    former_statistics = [tensor.clone() for tensor in statistics]
    parts, draws, coded = x.chunk(config.gradient_accumulation_steps), [], []
    sums: dict[str, float] = {}
    for index, part in enumerate(parts):
        generator = generator_for(config.seed, state.step, index)
        draws.append(sampler.draw(latent_size, generator))
        losses, codes = _accumulate(state, part, draws[-1], generator, config, reconstruction_loss, processes)
        sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in losses.items()}
        coded += [codes] if codes is not None else []
    codes = Codes.join(coded)

    for module in (state.autoencoder, state.discriminator):
        processes.average_gradients(module.parameters() if module is not None else ())
    norm = _clip(state.autoencoder, config.optimizer.max_grad_norm)
    norms = (
        [norm] if state.discriminator is None else [norm, _clip(state.discriminator, config.optimizer.max_grad_norm)]
    )
    if not all(math.isfinite(value) for value in (*sums.values(), *norms)):
        for tensor, former in zip(statistics, former_statistics, strict=True):
            tensor.copy_(former)
        raise NotFiniteError(", ".join(f"{name} {value:.4g}" for name, value in {**sums, "gradient": norm}.items()))
    if state.discriminator_optimizer is not None:
        _step(state.discriminator_optimizer, learning_rate_at(state.step, config, first_step=0))
    if not warming_up:
        _step(state.optimizer, rate)
        _update_averages(state, config, codes)
    state.step += 1
    return StepRecord(
        branch=draws[0].branch,
        transform=str(draws[0].tau),
        gradient_norm=norm,
        learning_rate=rate,
        **sums,
        **_codebook_figures(state, codes),
    )


def _choose_trained(state: TrainState, config: AutoencoderTraining, warming_up: bool) -> None:
    """Say which parameters get gradients in this step."""
    autoencoder = state.autoencoder
    autoencoder.requires_grad_(not warming_up)
    for parameter in autoencoder.encoder_parameters() if config.freeze_encoder else ():
        parameter.requires_grad_(False)
    if isinstance(autoencoder, DiscreteAutoencoder) and (config.freeze_encoder or config.codes.codebook == "ema"):
        autoencoder.codebook.requires_grad_(False)


def _update_averages(state: TrainState, config: AutoencoderTraining, codes: Codes | None) -> None:
    """After an optimizer step: codes that are averages, codes that start again, the average of all weights."""
    restarted = None
    if state.codebook is not None and codes is not None and isinstance(state.autoencoder, DiscreteAutoencoder):
        codebook = state.autoencoder.codebook.detach()
        if config.codes.codebook == "ema":
            state.codebook.average(codebook, codes, decay=config.codes.codebook_decay)
        if after := config.codes.restart_dead_codes:
            generator = generator_for(config.seed, state.step, 0, 2)  # longer than any micro-batch's key
            restarted = state.codebook.restart(codebook, codes, after=after, generator=generator)
    if state.average is None:
        return
    state.average.update(state.autoencoder)
    exported = state.exported()
    if restarted is not None and isinstance(exported, DiscreteAutoencoder):
        # A mean of a dead code and its successor would stand for nothing.
        exported.codebook.detach()[restarted] = codebook[restarted]


def _codebook_figures(state: TrainState, codes: Codes | None) -> dict[str, float]:
    if codes is None or not isinstance(state.autoencoder, DiscreteAutoencoder):
        return {}
    counts = CodeCounts(state.autoencoder.codebook_size)
    counts.add(codes.tokens)
    return counts.figures()


def _running_statistics(state: TrainState) -> list[Tensor]:
    """The buffers of batch normalizations: a forward pass changes them, so a step that fails has to put them back."""
    modules = [state.autoencoder] if state.discriminator is None else [state.autoencoder, state.discriminator]
    return [buffer for module in modules for buffer in module.buffers()]


def _accumulate(
    state: TrainState,
    x: Float[Tensor, "n 3 h w"],
    draw: Draw,
    generator: torch.Generator,
    config: AutoencoderTraining,
    reconstruction_loss: ReconstructionLoss,
    processes: Processes,
) -> tuple[dict[str, float], Codes | None]:
    """Add one micro-batch's gradients to those of the autoencoder, unless it is frozen, and of the discriminator."""
    autoencoder, discriminator = state.autoencoder, state.discriminator
    num_values, num_parts = x[0].numel(), config.gradient_accumulation_steps
    num_latent_values = autoencoder.latent_channels * num_values // (3 * autoencoder.stride**2)
    x = draw.before(x).contiguous(memory_format=torch.channels_last)
    noise = _noise(autoencoder, x, generator, processes)
    implicit = config.objective == "implicit"
    explicit = discriminator_loss = x.new_zeros(())

    with autocast(x.device, config.precision):
        pair = decode_transformed(autoencoder, x, draw.tau if implicit else IDENTITY, noise)
        seam = Seam.cut(pair.decoded)
        logits = discriminator(seam.image) if discriminator is not None else None
        per_image = reconstruction_loss(pair.target, seam.image)
        if config.reconstruction.resolution_weighting == "equal":
            per_image = per_image * (num_values / pair.target[0].numel())
        adversarial = -logits.float().flatten(1).mean(1) if logits is not None else seam.image.new_zeros(len(x))
        reconstruction, adversarial, kl = per_image.mean(), adversarial.mean(), pair.posterior.kl().mean()
        if not implicit and draw.branch == "equivariance":
            stop_gradient = config.objective == "explicit-stop-gradient"
            z = pair.posterior.mode()
            explicit = explicit_loss(autoencoder, x, z, draw.tau, stop_gradient=stop_gradient).mean()
        if discriminator is not None and logits is not None:
            discriminator_loss = hinge_loss(discriminator(pair.target), logits)

    figures = {
        "reconstruction": reconstruction / num_values,
        "l1": (pair.target - seam.image).abs().mean(),
        "kl": kl,
        "explicit": explicit,
        "adversarial": adversarial,
        "discriminator": discriminator_loss,
        "adaptive_weight": x.new_zeros(()),
    }
    regularization, codes = config.kl_weight * kl + config.explicit_weight * explicit, None
    if pair.quantized is not None:
        codebook_loss, commitment_loss = _losses_per_value(pair.quantized, config, num_latent_values)
        figures["quantization"] = commitment_loss
        # VQ-GAN's weights are relative to the reconstruction loss per value, which is a sum here.
        weighted = config.codes.codebook_weight * codebook_loss + config.codes.commitment_weight * commitment_loss
        regularization = regularization + num_values * weighted
        codes = Codes.of(pair.latents, pair.quantized, processes)
    if pair.decoded.requires_grad:
        figures["adaptive_weight"] = seam.backward(
            autoencoder.last_layer.weight,
            reconstruction=reconstruction,
            adversarial=adversarial if logits is not None else None,
            adversarial_weight=config.adversarial.adversarial_weight,
            regularization=regularization,
            factor=1.0 / (num_values * num_parts),
            average=processes.average,
        )
    if discriminator is not None:
        (discriminator_loss / num_parts).backward(inputs=list(discriminator.parameters()))
    # One transfer, and so one wait for the device, for all of them.
    values = processes.average(torch.stack([value.detach().float() for value in figures.values()])).tolist()
    return dict(zip(figures, values, strict=True)), codes


def _noise(
    autoencoder: Autoencoder, x: Float[Tensor, "n 3 h w"], generator: torch.Generator, processes: Processes
) -> Float[Tensor, "n c h2 w2"]:
    """Draw the posterior's noise for all processes' images, and take the rows of this one's."""
    size = [side // autoencoder.stride for side in x.shape[-2:]]
    noise = torch.randn((len(x) * processes.count, autoencoder.latent_channels, *size), generator=generator)
    return noise[len(x) * processes.rank :][: len(x)].to(x.device)


def _losses_per_value(
    quantized: Quantized, config: AutoencoderTraining, num_latent_values: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Codebook and commitment loss; a latent scaled by s weighs s^2 where its picture does."""
    if config.reconstruction.resolution_weighting == "equal":
        num_latent_values = quantized.z_q[0].numel()
    return quantized.codebook_loss.mean() / num_latent_values, quantized.commitment_loss.mean() / num_latent_values


def _clip(module: torch.nn.Module, max_norm: float) -> float:
    """Clip the gradient's norm where asked for, and return what it was; 0 where there is no gradient."""
    gradients = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(gradients, max_norm if max_norm > 0 else math.inf))


def _step(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
