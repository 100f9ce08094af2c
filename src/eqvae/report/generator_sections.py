"""The page's sections about generators: training runs, sample sets and scores, made ready for the template."""

from collections.abc import Sequence
from dataclasses import dataclass

from eqvae.evidence.shared_curves import SharedCurves
from eqvae.report.contents import Contents
from eqvae.report.generator_panels import training_panels
from eqvae.report.generator_text import drawing_facts, training_facts
from eqvae.report.generators import Training
from eqvae.report.panels import PanelGroup
from eqvae.report.score_tables import ScoreTable, score_tables
from eqvae.report.sheets import EmbeddedSheet, embed_sheet, sample_sheet, stages


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One training run."""

    name: str
    facts: dict[str, str]
    curves: PanelGroup

    sheets: tuple[EmbeddedSheet, ...]
    """Stages of training; none before the first."""


@dataclass(frozen=True, kw_only=True)
class SampleSection:
    """One sample set."""

    name: str
    facts: dict[str, str]
    sheet: EmbeddedSheet


@dataclass(frozen=True, kw_only=True)
class GeneratorSections:
    """All of them."""

    shared: tuple[SharedCurves, ...]
    tables: tuple[ScoreTable, ...]
    trainings: tuple[TrainingSection, ...]
    samples: tuple[SampleSection, ...]


def generator_sections(contents: Contents, shared: Sequence[SharedCurves]) -> GeneratorSections:
    """Gather what the page shows of generators."""
    samples = [
        SampleSection(
            name=item.name,
            facts=drawing_facts(item),
            sheet=embed_sheet(sample_sheet(item), f"Samples of {item.name}"),
        )
        for item in contents.sample_sets
    ]
    return GeneratorSections(
        shared=tuple(shared),
        tables=tuple(score_tables(contents.scores)),
        trainings=tuple(_training_section(item) for item in contents.trainings),
        samples=tuple(samples),
    )


def _training_section(training: Training) -> TrainingSection:
    sheets = [embed_sheet(sheet, f"Samples of {training.name}: {sheet.label}") for sheet in stages(training)]
    return TrainingSection(
        name=training.name,
        facts=training_facts(training),
        curves=PanelGroup(title="Curves", panels=training_panels(training)),
        sheets=tuple(sheets),
    )
