"""Make `dadapy_expected.json`: TwoNN figures of DADApy, which cannot be installed beside this package.

Run once, in an environment of its own:

    python -m venv dadapy-venv && dadapy-venv/bin/pip install dadapy==0.3.4
    dadapy-venv/bin/python tests/metrics/dadapy_expected.py

The tests import `DATA_SETS` from here and make the same points again from NumPy's seeds (the last bits of a matrix
product may differ from machine to machine).
"""

import contextlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

FRACTIONS = (0.5, 0.9, 1.0)
"""`mu_fraction`; DADApy turns 1 into maximum likelihood."""

SMALLEST_DECIMATED = 200
"""Points from which a tenth still gives an estimate."""


def gaussian(num_points: int, dimension: int, seed: int) -> np.ndarray:
    """A normal cloud."""
    return np.random.default_rng(seed).normal(size=(num_points, dimension))


def sphere(num_points: int, dimension: int, seed: int) -> np.ndarray:
    """A sphere's surface of `dimension` dimensions in one more."""
    points = gaussian(num_points, dimension + 1, seed)
    return points / np.sqrt(np.square(points).sum(axis=1, keepdims=True))


def cube_in_50(num_points: int, dimension: int, seed: int) -> np.ndarray:
    """A uniform cube, embedded linearly in 50 dimensions, far from the origin."""
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(num_points, dimension)) @ rng.normal(size=(dimension, 50)) + 100.0


def roll(num_points: int, seed: int) -> np.ndarray:
    """A sheet rolled up in three dimensions, as a Swiss roll."""
    rng = np.random.default_rng(seed)
    angle, height = rng.uniform(4.7, 14.1, size=num_points), rng.uniform(0.0, 20.0, size=num_points)
    return np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], axis=1)


def latents(num_points: int, seed: int) -> np.ndarray:
    """As latents are: 1,024 numbers, float32, a few large directions among many small ones."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(num_points, 20)) @ rng.normal(size=(20, 1024))
    return (signal + 0.1 * rng.normal(size=(num_points, 1024))).astype(np.float32)


def with_duplicates(points: np.ndarray, num_duplicates: int) -> np.ndarray:
    """Repeat the first points, twice, at the end."""
    return np.concatenate([points, points[:num_duplicates], points[:num_duplicates]])


DATA_SETS: dict[str, Callable[[], np.ndarray]] = {
    "gaussian_3": lambda: gaussian(1000, 3, seed=1),
    "gaussian_20": lambda: gaussian(1000, 20, seed=2),
    "sphere_5": lambda: sphere(1000, 5, seed=3),
    "cube_10_in_50": lambda: cube_in_50(1000, 10, seed=4),
    "roll": lambda: roll(1000, seed=5),
    "latents": lambda: latents(1500, seed=6),
    "gaussian_3_with_duplicates": lambda: with_duplicates(gaussian(500, 3, seed=7), 40),
    "few": lambda: gaussian(12, 2, seed=8),
}


def main() -> None:
    """Compute and write the figures."""
    from dadapy import Data

    figures = {}
    for name, make in DATA_SETS.items():
        points = make()
        data = Data(coordinates=points, maxk=3, n_jobs=1)
        with contextlib.redirect_stdout(None):  # it prints what it drops and which algorithm it takes
            data.remove_identical_points()
            estimates = {fraction: data.compute_id_2NN(mu_fraction=fraction) for fraction in FRACTIONS}
        figures[name] = {
            "num_points": int(data.N),
            "num_duplicates": len(points) - int(data.N),
            "dimension": {str(fraction): float(estimate[0]) for fraction, estimate in estimates.items()},
            "neighbour_distance": float(estimates[0.9][2]),
        }
        if data.N >= SMALLEST_DECIMATED:
            dimension, standard_error, _ = data.compute_id_2NN(data_fraction=0.1)
            figures[name]["decimated_by_10"] = {"dimension": float(dimension), "standard_error": float(standard_error)}
    record = {
        "made_by": "tests/metrics/dadapy_expected.py",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dadapy", "numpy", "scipy", "scikit-learn", "jax")},
        "call": "Data(coordinates, maxk=3); remove_identical_points(); compute_id_2NN(mu_fraction=...)",
        "data_sets": figures,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
