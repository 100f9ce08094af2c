"""`eqvae sample RUN --num-samples N --out DIR`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.sample import sample_images
from eqvae.runs.sample_run import SAMPLES, SHEET
from eqvae.sampling.config import SampleConfig


def command(arguments: Sequence[str]) -> None:
    """Draw samples."""
    config = parse(SampleConfig, "sample", arguments)
    figures = sample_images(config)
    if figures is None:  # the first of several processes speaks for all
        return
    print(f"{figures['num_samples']} samples in '{config.out / SAMPLES}', a sheet of them in '{config.out / SHEET}'")  # noqa: T201
