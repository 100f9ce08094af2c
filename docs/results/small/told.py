"""The tables of README.md: worked out from the files that lie here.

python docs/results/small/told.py > docs/results/small/told.txt
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).parent
ARMS = {"base": "TAESD", "plain": "plain", "eq": "EQ-VAE"}
FIGURES = ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db", "ssim", "latent_std")


def read(name: str) -> dict:
    """Read a file beside this one."""
    return json.loads((HERE / name).read_text())


def distances(figures: dict) -> str:
    """Write the Frechet distance, and the kernel distance in brackets."""
    return f"{figures['fd_efficientnet_lite0']:.1f} ({figures['kd_efficientnet_lite0']:.3f})"


print(f"autoencoders, on {read('metrics-eq-0.json')['num_images']} photographs: {', '.join(FIGURES)}")
print("  TAESD:", *(f"{read('metrics-eq-0.json')[f'before_{name}']:.3f}" for name in FIGURES))
for run in ("plain-0", "plain-0-polished", "eq-0", "eq-0-polished"):
    print(f"  {run}:", *(f"{read(f'metrics-{run}.json')[name]:.3f}" for name in FIGURES))
for arm in ("plain", "eq"):
    found = read(f"reconstructions-{arm}.json")
    print(f"rFD of {arm}, {found['num_images']} images: {found['rfd_efficientnet_lite0']:.1f}")

print("| | seed | 25,600 images | 51,200 | 76,800 | 102,400 |\n|---|---|---|---|---|---|")
for run, validations in read("validations.json").items():
    arm, seed = run.split("-")
    print("|", " | ".join([ARMS[arm], seed, *map(distances, validations)]), "|")

print("| | seed | 32,000 images | 64,000 | 96,000, SDE | 96,000, Heun |\n|---|---|---|---|---|---|")
scores = read("scores.json")
for run, validations in read("validations-sde.json").items():
    arm, seed = run.split("-")
    by_ode = distances(scores[run]) if run in scores else ""
    print("|", " | ".join([ARMS[arm], seed, *map(distances, validations), by_ode]), "|")

ends = {run: validations[-1] for run, validations in read("validations.json").items()}
ends |= {run: scores[run] for run in ("plain-1", "eq-1")}  # of the first runs, 96,000 images
differences = [
    ends[f"eq-{seed}"]["fd_efficientnet_lite0"] - ends[f"plain-{seed}"]["fd_efficientnet_lite0"] for seed in range(3)
]
interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
print("EQ-VAE - plain, by Heun's ODE, seeds 0 to 2:", *(f"{each:.1f}" for each in differences))
print(f"mean {np.mean(differences):.1f} (95%: {interval.low:.1f} to {interval.high:.1f})")
