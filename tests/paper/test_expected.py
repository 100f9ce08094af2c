"""The paper's figures, as they stand in the collection of them that was checked against the paper."""

import re
from pathlib import Path

import pytest

from eqvae.autoencoders.presets import PRESETS
from eqvae.paper import expected
from eqvae.paper.settings import PAPER


@pytest.fixture
def facts(shared: Path) -> str:
    return (shared / "paper" / "facts.md").read_text()


def lines_of(facts: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    section = facts[facts.index(heading) :].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def numbers(row: list[str]) -> list[float]:
    return [float(number) for cell in row[1:] for number in re.findall(r"\d+\.\d+", cell)]


@pytest.mark.parametrize(
    ("heading", "table"), [("## Table 1 ", expected.TABLE_1), ("## Tables 12 and 13", expected.TABLE_12)]
)
def test_pairs_of_autoencoders(facts: str, heading: str, table: expected.PaperTable):
    rows = lines_of(facts, heading)
    assert [row[0] for row in rows] == list(expected.TABLE_13)
    for row in rows:
        before, after = (list(table.rows[label].values()) for label in (row[0], f"{row[0]} + EQ-VAE"))
        assert numbers(row) == [value for pair in zip(before, after, strict=True) for value in pair]


def test_generators(facts: str):
    ours = [value for figures in expected.TABLE_2.rows.values() for value in figures.values()]
    rows = [[row[0], *row[2:]] for row in lines_of(facts, "## Table 2 ")]
    assert [value for row in rows for value in numbers(row)] == ours


@pytest.mark.parametrize(
    ("heading", "table", "skip"),
    [("## Table 3 / 11", expected.TABLE_11, 1), ("## Table 4", expected.TABLE_4, 1),
     ("## Table 5", expected.TABLE_5, 0), ("## Table 7", expected.TABLE_7, 0)],
)  # fmt: skip
def test_rows(facts: str, heading: str, table: expected.PaperTable, skip: int):
    rows = lines_of(facts, heading)
    found = [numbers([row[0], *row[1 + skip :]]) for row in rows]
    assert found == [list(figures.values()) for figures in table.rows.values()]


def test_table_3_is_part_of_table_11():
    for label, figures in expected.TABLE_3.rows.items():
        assert figures.items() <= expected.TABLE_11.rows[label].items()


def test_sentences(facts: str):
    for table, heading in ((expected.TABLE_6, "## Table 6"), (expected.TABLE_8, "## Table 8")):
        section = facts[facts.index(heading) :].split("\n## ")[0]
        for figures in table.rows.values():
            assert str(figures["gfid"]) in section
            assert f"{figures['rfid']:.2f}" in section
    figure_5 = facts[facts.index("5. gFID against epochs") :].splitlines()[0]
    assert all(f"{value} ({epochs})" in figure_5 for epochs, value in expected.FIGURE_5.items())
    assert "SD-VAE 52 / 83 / 107 and 64; SDXL-VAE 78 / 117 / 130 and 192" in facts
    assert expected.FIGURE_3 == {"SD-VAE": (52, 83, 107, 64), "SDXL-VAE": (78, 117, 130, 192)}


def test_over_steps(facts: str):
    rows = lines_of(facts, "## Table 9 (DiT/SiT-XL/2) and 10")
    kinds = [
        (expected.TABLE_9, "DiT-XL/2 + EQ-VAE"), (expected.TABLE_9, "SiT-XL/2 + EQ-VAE"),
        (expected.TABLE_10, "REPA"), (expected.TABLE_10, "REPA + EQ-VAE"),
    ]  # fmt: skip
    for row in rows:
        for (table, label), cell in zip(kinds, row[1:], strict=True):
            found = [float(value) for value in cell.split("/")]
            assert found == list(table.rows[f"{label}, {row[0]}"].values())


def test_specifications_are_those_of_the_presets():
    for name, (_, _, latent_channels, stride) in expected.TABLE_13.items():
        preset = PRESETS[PAPER.autoencoders[name]]
        assert (preset.architecture.config["latent_channels"], preset.stride) == (latent_channels, stride)


def test_sources():
    for number in range(1, 13):
        assert getattr(expected, f"TABLE_{number}").source == f"Table {number} of arXiv:2502.09509"
