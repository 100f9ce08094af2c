"""`eqvae report DIR ... --out FILE.html`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvae.artifacts import check_writable
from eqvae.report import write_figures, write_report
from eqvae.runs.arguments import parse


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page from folders of `eqvae evaluate`, `finetune`, `train`, `sample`, `score`."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Evaluations, fine-tuning runs, training runs of generators, sample sets and scores, of each kind the base first.
    Unfinished runs count with what they have."""

    out: Path
    """The page."""

    figures: Path | None = None
    """Also write each figure as a file of its own (PNG, SVG) into this folder."""


def command(arguments: Sequence[str]) -> None:
    """Write the page and say where."""
    config = parse(ReportConfig, "report", arguments)
    if config.figures is not None:  # before the page is drawn and written
        check_writable(config.figures, "--figures")
    write_report(config.folders, config.out)
    if config.figures is not None:
        write_figures(config.folders, config.figures)
    print(config.out)  # noqa: T201
