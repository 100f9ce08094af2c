"""`eqvae report`: one page from the folders that the other commands wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvae.artifacts.files import check_writable
from eqvae.drawing import write_figures, write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page from folders of `eqvae evaluate`, `finetune`, `train`, `sample`, `score`."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Evaluations, fine-tuning runs, training runs of generators, sample sets and scores, of each kind the base first.
    Unfinished runs count with what they have."""

    out: Path
    """The page."""

    figures: Path | None = None
    """Also write each figure as files of its own into this folder: charts as SVG and PDF with their data as CSV,
    pictures as PNG."""


def command(config: ReportConfig) -> str:
    """Write the page and return where it is."""
    report(config)
    return str(config.out)


def report(config: ReportConfig) -> None:
    """Write one page about finished or running work, and its figures; no model runs.

    Args:
        config: The folders to draw, and where to write.

    Raises:
        UserError: If a folder is missing, unfinished or of another kind, or a target can't be written.
    """
    if config.figures is not None:  # before the page is drawn and written
        check_writable(config.figures, "--figures")
    write_report(config.folders, config.out)
    if config.figures is not None:
        write_figures(config.folders, config.figures)
