"""How much faster one fine-tuning step of an SD-VAE is than the step that the released EQ-VAE code takes.

    python benchmarks/finetune_step.py [--image-size 256] [--batch-size 1] [--num-steps 4] [--threads N] [--json FILE]

The reference is written out below, from the description of LDM's trainer under Lightning 1.4.2: each step encodes and
decodes twice, once for the autoencoder and once for the discriminator, each time with its own tau, in fp32. Ours is
`train_step`. Both start from the same weights (untrained: speed does not depend on them), see the
same images, and draw the autoencoder's tau from the same seeds. Steps alternate between the plain and the equivariance
branch; a variant's figure is the mean of the two branches' medians, the expected time of a step where the equivariance
probability is 0.5. Each variant runs in a process of its own, so that its peak memory is its own.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from eqvae.autoencoders.loading import build_autoencoder
from eqvae.autoencoders.protocol import Autoencoder, Posterior
from eqvae.losses.discriminators import build_discriminator
from eqvae.losses.reconstruction import Perceptual, ReconstructionLoss
from eqvae.methods import Mixture
from eqvae.methods.eq import Eq
from eqvae.methods.kl import Kl
from eqvae.runtime.device import Precision, choose_device, place, synchronize
from eqvae.runtime.run_folder import from_flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step
from eqvae.transforms import TransformSampler
from machine import describe_machine, measure_apart, peak_mib

SEED = 9
"""With it the first scaled steps keep 0.47 of the image's area on average, near the 0.44 of the distribution."""

BRANCHES = {
    "plain": replace(TransformSampler(), equivariance_probability=0.0),
    "equivariance": replace(TransformSampler(), equivariance_probability=1.0),
}
"""Both branches of Equation 7, each drawn for certain; steps alternate between them in this order."""

MIXTURES = {
    sampler: Mixture(
        pairs=((1.0, Eq(equivariance_probability=sampler.equivariance_probability)),), terms=((1e-6, Kl()),)
    )
    for sampler in BRANCHES.values()
}
"""What `train_step` draws them from."""

Branch = Literal["plain", "equivariance"]
TakeStep = Callable[[Tensor, TransformSampler], str]
"""Takes one step on a batch with a tau from the sampler, and returns tau's name."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table."""

    ours: bool
    """Whether `train_step` runs, or the reference."""

    precision: Precision = "fp32"

    num_reconstructions: Literal[1, 2] = 1
    """Of the reference: how often a step encodes and decodes."""

    ema: bool = False
    """Whether averaged weights are kept too, as by default; the reference has none."""


# fmt: off
VARIANTS = {
    "reference":                             Variant(ours=False, num_reconstructions=2),
    "reference with one reconstruction":     Variant(ours=False, num_reconstructions=1),
    "ours in fp32 (channels last, fused)":   Variant(ours=True, ema=True),
    "ours without averaged weights":         Variant(ours=True, precision="bf16"),
    "ours":                                  Variant(ours=True, precision="bf16", ema=True),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare one fine-tuning step with the released code's way of taking it, at SD-VAE's size."""

    image_size: int = 256
    """Side of the images, in px."""

    batch_size: int = 1
    """Images per step."""

    num_steps: int = 4
    """Steps to measure for each variant, alternately plain and equivariant; at least 2."""

    num_warmup_steps: int = 2
    """Steps before those; the second still finds memory that was never touched."""

    repeats: int = 1
    """Times that the variants are run one after the other."""

    ablation: bool = True
    """Run the rows between the reference and ours too, which tell where the speed comes from."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps`."""

    perceptual: Perceptual = "efficientnet-lite0"
    """The perceptual network of both sides; `none` leaves it out."""

    json: Path | None = None
    """File to write the figures to."""

    measure: str | None = None
    """Measure this one variant here and print its figures; the command calls itself with it."""


PASSED_ON = ("image_size", "batch_size", "num_steps", "num_warmup_steps", "threads", "device", "perceptual")
"""The options that matter to one variant."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One measured step."""

    branch: Branch
    transform: str
    """The autoencoder's tau."""

    sec: float

    cpu_sec: float
    """Of all threads together: less than threads times `sec` where other programs took the cores."""


# The reference ------------------------------------------------------------------------------------------------------


class Reference:
    """A training step as LDM's trainer takes it, in fp32 and in PyTorch's default layout."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        reconstruction_loss: ReconstructionLoss,
        num_reconstructions: int,
    ) -> None:
        """Prepare the first step."""
        self.autoencoder = autoencoder.to(device).train()
        self.discriminator = build_discriminator(SEED).to(device).train()
        self.reconstruction_loss = reconstruction_loss.to(device)
        self.num_reconstructions = num_reconstructions
        adam = {"lr": 1e-4, "betas": (0.5, 0.9)}
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.num_steps = 0

    def take_step(self, x: Tensor, sampler: TransformSampler) -> str:
        """Take a step of the autoencoder, then one of the discriminator; return the former's tau."""
        # Lightning lets only the parameters of the optimizer whose turn it is require gradients.
        self.autoencoder.requires_grad_(True)
        self.discriminator.requires_grad_(False)
        self.optimizer.zero_grad()
        target, decoded, posterior, transform = self.reconstruct(x, sampler, turn=0)
        reconstruction = self.reconstruction_loss(target, decoded).mean()
        adversarial = -self.discriminator(decoded).mean()
        weight = self.adaptive_weight(reconstruction, adversarial)
        (reconstruction + weight * adversarial + 1e-6 * posterior.kl().mean()).backward()
        self.optimizer.step()

        self.autoencoder.requires_grad_(False)
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad()
        if self.num_reconstructions == 2:
            target, decoded, _, _ = self.reconstruct(x, sampler, turn=1)
            self.reconstruction_loss(
                target, decoded
            )  # for nothing: the loss computes it before it asks whose turn it is
        real, fake = self.discriminator(target), self.discriminator(decoded.detach())
        (0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())).backward()
        self.discriminator_optimizer.step()
        self.num_steps += 1
        return transform

    def reconstruct(self, x: Tensor, sampler: TransformSampler, turn: int) -> tuple[Tensor, Tensor, Posterior, str]:
        """Draw tau; return tau o x, D(tau o E(x)), the posterior and tau's name."""
        latent_size = (x.shape[-2] // self.autoencoder.stride, x.shape[-1] // self.autoencoder.stride)
        generator = generator_for(SEED, self.num_steps, turn)
        tau = sampler.draw(latent_size, generator).tau
        posterior = self.autoencoder.encode(x)
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator).to(x.device))
        return tau(x), self.autoencoder.decode(tau(z)), posterior, str(tau)

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Compare the two losses' gradients at the decoder's last layer, each by a backward pass of its own."""
        last_layer = self.autoencoder.last_layer.weight
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (other,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        return 0.5 * (wanted.norm() / (other.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def prepare_ours(
    variant: Variant, options: Options, device: torch.device, reconstruction_loss: ReconstructionLoss
) -> TakeStep:
    """Prepare `train_step` as `eqvae finetune` calls it, the discriminator past its warm-up."""
    config = from_flat(
        AutoencoderTraining,
        batch_size=options.batch_size,
        lr_warmup_steps=0,
        discriminator_warmup_steps=0,
        perceptual=options.perceptual,
        precision=variant.precision,
        ema_decay=0.999 if variant.ema else 0.0,
        seed=SEED,
    ).resolved()
    state = build_state(build_autoencoder("sd-vae", seed=SEED), config, device)
    reconstruction_loss = place(reconstruction_loss, device)

    def take_step(x: Tensor, sampler: TransformSampler) -> str:
        return train_step(state, x, config, reconstruction_loss, MIXTURES[sampler]).transform

    return take_step


# Measuring ----------------------------------------------------------------------------------------------------------


def measure(name: str, options: Options) -> dict[str, Any]:
    """Measure one variant in this process.

    Args:
        name: A key of `VARIANTS`.
        options: As given to the command.

    Returns:
        `steps`, `peak_mib` and `imported_mib`, the memory before there was any model.
    """
    variant = VARIANTS[name]
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    imported_mib = peak_mib(device)
    reconstruction_loss: nn.Module = ReconstructionLoss(options.perceptual, 1.0)
    if variant.ours:
        take_step = prepare_ours(variant, options, device, reconstruction_loss)
    else:
        autoencoder = build_autoencoder("sd-vae", seed=SEED)
        take_step = Reference(autoencoder, device, reconstruction_loss, variant.num_reconstructions).take_step

    steps = []
    for index in range(options.num_warmup_steps + options.num_steps):
        branch: Branch = "equivariance" if index % 2 else "plain"
        shape = (options.batch_size, 3, options.image_size, options.image_size)
        x = (2.0 * torch.rand(shape, generator=generator_for(SEED, index)) - 1.0).to(device)
        began_sec, began_cpu_sec = time.perf_counter(), time.process_time()
        transform = take_step(x, BRANCHES[branch])
        synchronize(device)
        sec, cpu_sec = time.perf_counter() - began_sec, time.process_time() - began_cpu_sec
        steps.append(Step(branch=branch, transform=transform, sec=sec, cpu_sec=cpu_sec))
    measured = [asdict(step) for step in steps[options.num_warmup_steps :]]
    return {"steps": measured, "peak_mib": peak_mib(device), "imported_mib": imported_mib}


# Reporting ----------------------------------------------------------------------------------------------------------


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Bring the runs of one variant together.

    Args:
        runs: From `measure`, one for each repeat.

    Returns:
        Medians for each branch, their mean `step_sec`, the largest peak, and all steps.
    """
    steps = [step for run in runs for step in run["steps"]]
    medians = {
        branch: statistics.median(step["sec"] for step in steps if step["branch"] == branch) for branch in BRANCHES
    }
    return {
        "step_sec": statistics.mean(medians.values()),
        "plain_sec": medians["plain"],
        "equivariance_sec": medians["equivariance"],
        "peak_mib": max(run["peak_mib"] for run in runs),
        "imported_mib": max(run["imported_mib"] for run in runs),
        "steps": steps,
    }


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """Print a row for each variant.

    Args:
        figures: From `summarize`, by variant.
    """
    reference = figures["reference"]
    print(f"\n{'':38}{'s / step':>9}{'plain':>9}{'EQ':>9}{'times':>8}{'peak MiB':>11}{'times':>8}")
    for name, row in figures.items():
        faster, memory = reference["step_sec"] / row["step_sec"], row["peak_mib"] / reference["peak_mib"]
        print(
            f"{name:38}{row['step_sec']:9.3f}{row['plain_sec']:9.3f}{row['equivariance_sec']:9.3f}{faster:8.2f}"
            f"{row['peak_mib']:11.0f}{memory:8.2f}"
        )


def main(options: Options) -> None:
    """Run the benchmark.

    Args:
        options: As given to the command.

    Raises:
        SystemExit: If a variant fails.
    """
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options)))
        return
    if options.num_steps < 2:
        raise SystemExit("--num-steps must be at least 2: one for each branch")
    description = describe_machine(
        __file__,
        options,
        device=choose_device(options.device),
        packages=("diffusers", "timm"),
        leave_out=("json", "measure"),
    )
    machine = description["machine"]
    print(
        f"{machine['cpu']}, {machine['num_threads']} threads, {machine['device']}, load {machine['load_average']:.1f}"
    )
    names = list(VARIANTS) if options.ablation else ["reference", "ours"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        for name in names:
            runs[name].append(measure_apart(__file__, name, options, PASSED_ON))
            steps = ", ".join(f"{step['transform']} {step['sec']:.2f} s" for step in runs[name][-1]["steps"])
            print(f"{repeat + 1}/{options.repeats} {name}: {steps}", flush=True)
    figures = {name: summarize(runs[name]) for name in names}
    print_table(figures)
    faster = figures["reference"]["step_sec"] / figures["ours"]["step_sec"]
    memory = figures["ours"]["peak_mib"] / figures["reference"]["peak_mib"]
    if options.json is not None:
        summary = {"times_faster": faster, "times_peak_memory": memory}
        options.json.write_text(json.dumps(description | summary | {"variants": figures}, indent=2) + "\n")
    print(f"\nours / reference: {faster:.2f} times faster, peak memory {memory:.2f} times")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
