"""Averages of weights: the usual exponential one, and power-function ones whose horizon is chosen after training.

The second kind is Karras et al. 2024, arXiv:2312.02696, Section 3 and Appendix C: two averages are tracked, snapshots
of both are kept, and a least-squares mixture of snapshots gives the average of any horizon at any step in between.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eqvae.artifacts.files import read_tensors, write_tensors
from eqvae.errors import UserError
from eqvae.training.sharding import like, whole

TRACKED_HORIZONS = (0.05, 0.10)
"""sigma_rel of the two tracked averages in arXiv:2312.02696."""

_NUM_UPDATES = "num_updates"


class Ema:
    """An exponential moving average of a module's weights: `average = decay * average + (1 - decay) * weights`.

    Integers are copied. The averages have the names of the module's state dict, and live where the module lived.
    """

    def __init__(
        self, module: nn.Module, *, decay: float, warm_up: bool = False, twin: nn.Module | None = None
    ) -> None:
        """Start from the module's present weights.

        With `warm_up` the first update copies, and the horizon grows with the run, so that it soon lets go of its
        start. A `twin` is a copy of the module whose own weights are the averages.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}, but it lies in [0, 1)")
        self.decay, self.warm_up, self.num_updates = decay, warm_up, 0
        self.averages = _copy(module) if twin is None else twin.state_dict()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        decay = self.decay
        if self.warm_up:
            decay = min(decay, (1.0 + self.num_updates) / (10.0 + self.num_updates)) if self.num_updates else 0.0
        _lerp(self.averages, module, 1.0 - decay)
        self.num_updates += 1

    def weights(self) -> dict[str, Tensor]:
        """The averages as a state dict of the module; not copied."""
        return dict(self.averages)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resume needs."""
        return {**self.averages, _NUM_UPDATES: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.num_updates = int(state[_NUM_UPDATES])
        _restore(self.averages, {name: state[name] for name in self.averages})


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One power-function average at one step, in a file."""

    path: Path

    sigma_rel: float
    """Horizon: standard deviation of the profile's weights over training, relative to the length of training."""

    step: int


class PowerEma:
    """Averages whose weights grow as a power of the step, so that the horizon grows with the length of training.

    `average = beta average + (1 - beta) weights` with `beta = (1 - 1 / step) ^ (gamma + 1)` (Equation 4 of
    arXiv:2312.02696; after the first update the average is the weights), for each horizon.
    """

    def __init__(self, module: nn.Module, *, horizons: Sequence[float] = TRACKED_HORIZONS) -> None:
        self.gammas = {horizon: gamma_of(horizon) for horizon in horizons}
        self.averages = {horizon: _copy(module) for horizon in horizons}
        self.num_updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        self.num_updates += 1
        for horizon, gamma in self.gammas.items():
            beta = (1 - 1 / self.num_updates) ** (gamma + 1)
            _lerp(self.averages[horizon], module, 1.0 - beta)

    def write_snapshots(self, folder: Path, *, is_first: bool = True) -> list[Snapshot]:
        """Let the first process write each average into a file of its own; all of them have to come here."""
        written = []
        for horizon, averages in self.averages.items():
            path = folder / f"{self.num_updates:08d}-{horizon:.3f}.safetensors"
            tensors, said = (
                whole(averages, everywhere=False),
                {"sigma_rel": repr(horizon), "step": str(self.num_updates)},
            )
            if is_first:
                write_tensors(path, tensors, said, digest=True)
            written.append(Snapshot(path=path, sigma_rel=horizon, step=self.num_updates))
        return written

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resume needs, besides the snapshots' files."""
        named = {
            f"{index}.{name}": value for index, one in enumerate(self.averages.values()) for name, value in one.items()
        }
        return {**named, _NUM_UPDATES: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.num_updates = int(state[_NUM_UPDATES])
        for index, averages in enumerate(self.averages.values()):
            _restore(averages, {name: state[f"{index}.{name}"] for name in averages})


def find_snapshots(folder: Path) -> list[Snapshot]:
    """List the snapshots of a run."""
    found = []
    for path in sorted(folder.glob("*-*.safetensors")):
        step, _, horizon = path.stem.partition("-")
        found.append(Snapshot(path=path, sigma_rel=float(horizon), step=int(step)))
    return found


def reconstruct(snapshots: Sequence[Snapshot], *, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """Mix snapshots to the average of another horizon (Algorithm 3 of arXiv:2312.02696)."""
    last = max((snapshot.step for snapshot in snapshots), default=0) if step is None else step
    used = sorted((one for one in snapshots if one.step <= last), key=lambda one: (one.step, one.sigma_rel))
    if not used:
        raise UserError(f"there are no snapshots up to step {last}", "Train with --posthoc-ema")
    weights = mixture_weights([(one.sigma_rel, one.step) for one in used], (sigma_rel, last))
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(
        used, weights, strict=True
    ):  # one at a time: many snapshots of large models fit no memory
        for name, value in read_tensors(snapshot.path)[0].items():
            if value.is_floating_point():
                total[name] = total.get(name, 0.0) + weight * value.double()
            else:
                total[name] = value
            kinds[name] = value.dtype
    return {name: value.to(kinds[name]) for name, value in total.items()}


def mixture_weights(profiles: Sequence[tuple[float, int]], target: tuple[float, int]) -> list[float]:
    """Solve for the mixture of weighting profiles that is nearest to another one in least squares."""
    known = [(gamma_of(horizon), step) for horizon, step in profiles]
    wanted = (gamma_of(target[0]), target[1])
    system, right = np.ones((len(known) + 1, len(known) + 1)), np.ones(len(known) + 1)
    system[:-1, :-1] = [[target[1] * _overlap(a, b) for b in known] for a in known]
    system[-1, -1] = 0.0  # the last row and column are the constraint and its Lagrange multiplier
    right[:-1] = [target[1] * _overlap(a, wanted) for a in known]
    # Snapshots of one run overlap much: lstsq leaves out the directions that rounding alone would decide.
    return np.linalg.lstsq(system, right, rcond=1e-12)[0][:-1].tolist()


def gamma_of(sigma_rel: float) -> float:
    """Find the power whose profile has a given width: `sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`."""
    if not 0.0 < sigma_rel <= 1 / math.sqrt(12):
        raise ValueError(f"sigma_rel is {sigma_rel}, but it lies in (0, 0.288]")
    inverse_square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse_square, 12.0 - inverse_square])
    return max(float(roots.real.max()), 0.0)


def _overlap(a: tuple[float, int], b: tuple[float, int]) -> float:
    """Integrate the product of two profiles `p(s) = (gamma + 1) s^gamma / step^(gamma + 1)`, s from 0 to the step."""
    (gamma, step), (other_gamma, other_step) = sorted((a, b), key=lambda profile: profile[1])
    # The earlier profile ends at `step`; there the later one has its (step / other_step)^other_gamma.
    factor = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return factor * (step / other_step) ** other_gamma / other_step


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _lerp(averages: Mapping[str, Tensor], module: nn.Module, weight: float) -> None:
    """Move the averages towards the module's values; copy integers."""
    own, new = [], []
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and weight < 1.0:
            own.append(averages[name])
            new.append(tensor.detach())
        else:
            averages[name].copy_(tensor)
    if own:
        torch._foreach_lerp_(own, new, weight)


def _restore(averages: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, average in averages.items():
        average.copy_(like(values[name], average))
