"""`eqvae train RECIPE --latents DIR --out DIR`."""

import json
from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.train import describe_plan, train_generator
from eqvae.runs.train_config import TrainConfig


def command(arguments: Sequence[str]) -> None:
    """Train, or print the plan of it."""
    config = parse(TrainConfig, "train", arguments).resolved()
    if config.dry_run:
        print(json.dumps(describe_plan(config), indent=2))  # noqa: T201
        return
    figures = train_generator(config)
    if figures is None:  # the first of several processes speaks for all
        return
    distances = "".join(f", {name} {value:.3f}" for name, value in figures.items() if name.startswith(("fid", "fd_")))
    print(  # noqa: T201
        f"{figures['num_steps']} steps, {figures['training_images_per_sec']:.1f} images/s{distances}; "
        f"generator in '{config.out}'"
    )
