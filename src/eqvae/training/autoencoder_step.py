"""One training step as a function of an explicit state."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Posterior
from eqvae.errors import NotFiniteError
from eqvae.losses.codebook import Codes
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import Batch, Chosen, Encoded, Mixture
from eqvae.metrics.autoencoder import CodeCounts
from eqvae.runtime.device import autocast
from eqvae.runtime.processes import ALONE, Processes
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import TrainState
from eqvae.training.comparison import Comparison, mean_over, send_back, weigh_adaptively


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step measured, averaged over its micro-batches."""

    branch: str
    """Of the first micro-batch."""

    transform: str
    """What was drawn for the first micro-batch, tau say."""

    reconstruction: float
    """L_rec per value of the image: L1 + perceptual, weighing a scaled picture as `resolution_weighting` says."""

    l1: float
    """Mean absolute error between tau o x and D(tau o E(x)), images in [-1, 1]; unweighted."""

    kl: float
    """Nats per image."""

    explicit: float
    """Equation 4 per image; 0 where it is not added."""

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

    terms: dict[str, float] = field(default_factory=dict)
    """Further terms per image, by name; the weight of an adaptive one under `NAME_weight`."""

    def figures(self) -> dict[str, str | float]:
        """What was measured, by name; without what the autoencoder does not have."""
        own = {name: value for name, value in asdict(self).items() if value is not None and name != "terms"}
        return own | self.terms


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
    x: Float[Tensor, "n k h w"],
    config: AutoencoderTraining,
    reconstruction_loss: ReconstructionLoss,
    mixture: Mixture,
    processes: Processes = ALONE,
    began: int = 0,
) -> StepRecord:
    """Take one optimizer step of Equation 7, or what the methods put in its place; the phase began at step `began`.

    One reconstruction serves autoencoder and discriminator. `x` holds this process's rows of each micro-batch. All
    processes draw the same tau: scaled pictures cost less, and with a tau for each the others would wait for the one
    whose pictures are the largest.
    """
    first_step = config.adversarial.discriminator_warmup_steps or 0
    warming_up = state.step < first_step
    rate = 0.0 if warming_up else learning_rate_at(state.step, config, first_step=first_step)
    _choose_trained(state, config, warming_up)
    for optimizer in (state.optimizer, state.discriminator_optimizer):
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
    statistics = state.running_statistics()
    former_statistics = [tensor.clone() for tensor in statistics]
    parts, draws = x.chunk(config.gradient_accumulation_steps), []
    coded: list[Codes] = []
    sums: dict[str, float] = {}
    for index, part in enumerate(parts):
        generator = generator_for(config.seed, state.step, index)
        batch = Batch(
            x=part, stride=state.autoencoder.stride, latent_channels=state.autoencoder.latent_channels,
            generator=generator, processes=processes,
        )  # fmt: skip
        draws.append(mixture.draw(batch, state.parts))
        losses, found = _accumulate(state, batch, mixture, draws[-1], config, reconstruction_loss)
        sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in losses.items()}
        coded += found
    codes = Codes.join(coded)

    if config.freeze_decoder:  # its last layer has a gradient for lambda_gan's sake alone
        state.autoencoder.last_layer.weight.grad = None
    parameters = (
        state.trained(),
        [] if state.discriminator is None else list(state.discriminator.learned.parameters()),
    )
    for each in parameters:
        processes.average_gradients(each)
    norms = [_clip(each, config.optimizer.max_grad_norm) for each in parameters]
    norm = norms[0]
    try:
        _check(state, sums, norms, draws, config)
    except NotFiniteError:
        for tensor, former in zip(statistics, former_statistics, strict=True):
            tensor.copy_(former)
        raise
    if state.discriminator_optimizer is not None:
        _step(state.discriminator_optimizer, learning_rate_at(state.step, config, first_step=began))
    if state.logit_averages is not None:
        state.logit_averages.update(real=sums["real_logit"], fake=-sums["adversarial"])
    if not warming_up:
        _step(state.optimizer, rate)
        _update_averages(state, config, codes)
    state.step += 1
    own = StepRecord.__dataclass_fields__
    return StepRecord(
        branch=draws[0].named.branch,
        transform=draws[0].named.name,
        gradient_norm=norm,
        learning_rate=rate,
        **{name: value for name, value in sums.items() if name in own},
        **_codebook_figures(state, codes),
        terms={name: value for name, value in sums.items() if name not in own},
    )


_COMPUTED_FIRST = ("kl", "quantization", "l1", "reconstruction")
_NAMES = {
    "kl": "KL divergence, of the encoder's posterior", "l1": "reconstruction", "reconstruction": "perceptual distance",
    "adversarial": "adversarial term", "adaptive_weight": "adaptive weight", "discriminator": "discriminator's loss",
    "explicit": "explicit term, Equation 4", "discriminator_gradient": "discriminator's gradient",
}  # fmt: skip
"""What the message calls a term that is not finite where those before it are."""


def _check(
    state: TrainState, sums: dict[str, float], norms: list[float], draws: list[Chosen], config: AutoencoderTraining
) -> None:
    """Refuse a step that does not go well, in the order in which its terms are computed."""
    terms = {name: sums[name] for name in (*_COMPUTED_FIRST, *sums) if name in sums}
    terms |= {"gradient": norms[0], "discriminator_gradient": norms[1]}
    drawn = [
        {"generator_key": [config.seed, state.step, index], "branch": each.named.branch, "transform": each.named.name}
        for index, each in enumerate(draws)
    ]
    state.guard.check(terms, loss="reconstruction", exploding=_COMPUTED_FIRST, names=_NAMES, draws=drawn)


def _choose_trained(state: TrainState, config: AutoencoderTraining, warming_up: bool) -> None:
    """Say which parameters get gradients in this step."""
    autoencoder = state.autoencoder
    for parameter in state.trained():
        parameter.requires_grad_(not warming_up)
    for parameter in autoencoder.encoder_parameters() if config.freeze_encoder else ():
        parameter.requires_grad_(False)
    for parameter in autoencoder.decoder_parameters() if config.freeze_decoder else ():
        parameter.requires_grad_(False)
    if config.freeze_decoder and state.discriminator is not None and not warming_up:
        autoencoder.last_layer.weight.requires_grad_(True)  # where the adaptive weight is measured
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
    averaged = state.averaged
    if restarted is not None and isinstance(averaged, DiscreteAutoencoder):
        # A mean of a dead code and its successor would stand for nothing.
        averaged.codebook.detach()[restarted] = codebook[restarted]


def _codebook_figures(state: TrainState, codes: Codes | None) -> dict[str, float]:
    if codes is None or not isinstance(state.autoencoder, DiscreteAutoencoder):
        return {}
    counts = CodeCounts(state.autoencoder.codebook_size)
    counts.add(codes.tokens)
    return counts.figures()


def _accumulate(
    state: TrainState,
    batch: Batch,
    mixture: Mixture,
    drawn: Chosen,
    config: AutoencoderTraining,
    reconstruction_loss: ReconstructionLoss,
) -> tuple[dict[str, float], list[Codes]]:
    """Add one micro-batch's gradients to those of the autoencoder, unless it is frozen, and of the discriminator."""
    autoencoder, discriminator, processes = state.autoencoder, state.discriminator, batch.processes
    num_values, num_parts = batch.x[0].numel(), config.gradient_accumulation_steps
    factor = 1.0 / (num_values * num_parts)
    x = drawn.named.before(batch.x).contiguous(memory_format=torch.channels_last)
    noise = _noise(autoencoder, x, batch.generator, processes)

    with autocast(x.device, config.precision):
        posterior = autoencoder.encode(x)
        z = posterior.sample(noise)
        # Adaptive weights need L's gradient by z before that of the encoder: the graph is cut open there too.
        leaf = z.detach().requires_grad_() if mixture.is_adaptive and z.requires_grad else z
        comparisons = [
            Comparison.make(
                weight, each, (autoencoder, x, posterior, leaf), num_values=num_values, config=config,
                reconstruction_loss=reconstruction_loss, discriminator=discriminator, averages=state.logit_averages,
            )
            for weight, each in drawn.pair.comparisons()
        ]  # fmt: skip
        figures, added, adaptive = _add_terms(state, mixture, drawn, (x, posterior, z), processes)
    # Through the cut, terms go back by themselves, when the adaptive weights are known.
    is_cut, quantization = leaf is not z, []
    regularization = x.new_zeros(()) if is_cut else added
    num_latent_values = autoencoder.latent_channels * batch.x[0, 0].numel() // autoencoder.stride**2
    for each in comparisons:
        losses = each.quantization(config, num_latent_values=num_latent_values)
        if losses is not None:
            quantization.append(losses[1])
            # VQ-GAN's weights are relative to the reconstruction loss per value, which is a sum here.
            weighted = config.codes.codebook_weight * losses[0] + config.codes.commitment_weight * losses[1]
            regularization = regularization + each.weight * num_values * weighted
    figures |= _figures_of(comparisons, quantization, num_values)
    if any(each.pair.decoded.requires_grad for each in comparisons):
        figures["adaptive_weight"] = send_back(
            comparisons, regularization, config=config, last_layer=autoencoder.last_layer.weight, factor=factor,
            processes=processes,
        )  # fmt: skip
        if is_cut and leaf.grad is not None:
            layer = autoencoder.last_encoder_layer.weight
            weights = weigh_adaptively(adaptive, z, leaf.grad / factor, layer, processes)
            added = sum((weights[name] * value for name, (_, value) in adaptive.items()), added)
            count = 1 + added.requires_grad  # not where no term has a gradient in this step
            ends, gradients = [z, factor * added][:count], [leaf.grad, torch.ones_like(added)][:count]
            torch.autograd.backward(ends, gradients)
            figures |= {f"{name}_weight": weight for name, weight in weights.items()}
    if discriminator is not None:
        discriminator_loss = mean_over(comparisons, [each.discriminator_loss for each in comparisons])
        (discriminator_loss / num_parts).backward(inputs=state.trained_discriminator())
    # One transfer, and so one wait for the device, for all of them.
    values = processes.average(torch.stack([value.detach().float() for value in figures.values()])).tolist()
    codes = [each.codes(processes) for each in comparisons]
    return dict(zip(figures, values, strict=True)), [each for each in codes if each is not None]


def _add_terms(
    state: TrainState, mixture: Mixture, drawn: Chosen, encoded: tuple[Tensor, Posterior, Tensor], processes: Processes
) -> tuple[dict[str, Tensor], Tensor, dict[str, tuple[float, Tensor]]]:
    """Compute all terms: their figures, the sum of those with a fixed weight, and the adaptive ones."""
    x, posterior, z = encoded
    figures = {"kl": posterior.kl().mean(), "explicit": x.new_zeros(())}
    regularization = x.new_zeros(())
    adaptive: dict[str, tuple[float, Tensor]] = {}
    for (key, weight, term), own in zip(mixture.keyed_terms(), drawn.terms, strict=True):
        seen = Encoded(
            autoencoder=state.autoencoder, x=x, posterior=posterior, z=z, drawn=own,
            part=state.parts.get(key), processes=processes,
        )  # fmt: skip
        value = figures["kl"] if term.name == "kl" else term.value(seen).mean()
        figures[term.name] = value
        if term.adaptive:
            adaptive[term.name] = (weight, value)
        else:
            regularization = regularization + weight * value
    return figures, regularization, adaptive


def _figures_of(comparisons: list[Comparison], quantization: list[Tensor], num_values: int) -> dict[str, Tensor]:
    """What the comparisons tell."""
    zero = comparisons[0].seam.image.new_zeros(())
    figures = {
        "reconstruction": [each.reconstruction / num_values for each in comparisons],
        "l1": [(each.pair.target - each.image).abs().mean() for each in comparisons],
        "adversarial": [zero if each.adversarial is None else each.adversarial for each in comparisons],
    }
    figures |= {"quantization": quantization} if quantization else {}
    figures |= {name: [each.judged[name] for each in comparisons] for name in comparisons[0].judged}
    return {name: mean_over(comparisons, values) for name, values in figures.items()} | {"adaptive_weight": zero}


def _noise(
    autoencoder: Autoencoder, x: Float[Tensor, "n k h w"], generator: torch.Generator, processes: Processes
) -> Float[Tensor, "n c h2 w2"]:
    """Draw the posterior's noise for all processes' images, and take the rows of this one's."""
    size = [side // autoencoder.stride for side in x.shape[-2:]]
    noise = torch.randn((len(x) * processes.count, autoencoder.latent_channels, *size), generator=generator)
    return noise[len(x) * processes.rank :][: len(x)].to(x.device)


def _clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Clip the gradient's norm where asked for, and return what it was; 0 where there is no gradient."""
    gradients = [parameter for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(gradients, max_norm if max_norm > 0 else math.inf))


def _step(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
