"""What mkdocs asks while it builds: the tables of flags, and the list of public names.

A line `<!-- flags of NAME -->` becomes the table of `eqvae NAME --help`, and `<!-- public names -->` the reference of
`eqvae.__all__`, and `<!-- methods -->` the table of `--method`, so none can fall behind the code. `<!-- memory -->` and
`<!-- long runs -->` become the tables of what those benchmarks wrote.
"""

import importlib
import json
import re
import warnings
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

FLAGS = re.compile(r"(?m)^<!-- flags of (\w+) -->$")
NAMES = "<!-- public names -->"
METHODS = "<!-- methods -->"
MEMORY = "<!-- memory -->"
LONG_RUNS = "<!-- long runs -->"
BENCHMARKS = Path(__file__).resolve().parent / "results" / "benchmarks"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated; mkdocs calls this for each page."""
    markdown = FLAGS.sub(lambda found: flags_table(found[1]), markdown)
    if METHODS in markdown:
        markdown = markdown.replace(METHODS, importlib.import_module("eqvae.methods").table())
    for mark, table in ((MEMORY, memory_table), (LONG_RUNS, long_runs_table)):
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    markdown = markdown.replace("```text\neqvae: ", "``` { .text .wraps }\neqvae: ")  # refusals are long lines
    return markdown.replace(NAMES, public_names()) if NAMES in markdown else markdown


def flags_table(command: str) -> str:
    """Write a row for each flag of a command: its name and values, its default, what it does."""
    import tyro

    module = importlib.import_module(f"eqvae.runs.{command}")
    config_type = getattr(module, f"{command.title()}Config")
    with warnings.catch_warnings(action="ignore"):  # deprecated, and the only way to the parsed help
        parser = tyro.extras.get_parser(config_type, config=(tyro.conf.FlagConversionOff,))
    rows = []
    for action in parser._get_positional_actions() + parser._get_optional_actions():
        if action.dest == "help" or action.help == SUPPRESS:
            continue
        text = re.sub(r"\x1b\[[0-9;]*m", "", action.help or "")
        meaning, _, note = text.partition("(default: ") if "(default: " in text else text.partition("(required)")
        default = note.rstrip(") \n").removesuffix(")") or ("" if "(default: " in text else "required")
        values = action.metavar or ""
        values = values if isinstance(values, str) else " ".join(values)
        name = f"`{action.option_strings[-1]}`" if action.option_strings else f"`{values}`"
        shown = f"`{values}`" if action.option_strings and "," in values else ""
        meaning = re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or "\\|", " ".join(meaning.split()))
        default = f"`{default}`" if default and default != "required" else default
        rows.append(f"| {name} | {meaning} {shown} | {default} |".replace("  ", " "))
    return "\n".join(["| flag | what it does | default |", "|---|---|---|", *rows]) if rows else ""


def memory_table() -> str:
    """Write a row for each case of the benchmark of memory: what was predicted, and what the system saw."""
    rows = [
        f"| {row['case']} | {row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['ratio']:.2f} |"
        for row in json.loads((BENCHMARKS / "memory.json").read_text())["rows"]
    ]
    return "\n".join(["| run | predicted, GiB | measured, GiB | ratio |", "|---|---|---|---|", *rows])


def long_runs_table() -> str:
    """Write a row for each case of the benchmark of long runs: step 1,000 against step 10,000."""
    rows = []
    for row in json.loads((BENCHMARKS / "long_run.json").read_text())["rows"]:
        early, late = row["at_1000"], row["at_10000"]
        rows.append(
            f"| {row['case']} | {row['throughput_ratio']:.3f} | {early['resident_mib']:,.0f} | "
            f"{late['resident_mib']:,.0f} | {row['num_checkpoints']} files, {late['weights_mib']:.1f} MiB | "
            f"{row['num_steps_recorded']:,} + {row['num_other_records']} |"
        )
    head = "| run | throughput, times | MiB at step 1,000 | at 10,000 | checkpoints, weights | records of the journal |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


SECTIONS = {
    "eqvae.transforms": "Transformations",
    "eqvae.equivariance": "The objective",
    "eqvae.autoencoders": "Autoencoders",
    "eqvae.methods": "Methods of one's own",
    "eqvae.metrics": "Measures",
    "eqvae.runs": "Commands",
    "eqvae.training": "Groups of a fine-tuning's settings",
    "eqvae.losses": "Groups of its losses' settings",
    "eqvae.generators": "Groups of a generator's settings",
    "eqvae.images": "Groups of what pixels mean",
    "eqvae.errors": "Errors",
}


def public_names() -> str:
    """Write one block of mkdocstrings for each public name, by the part of the package that it is from."""
    import eqvae

    homes = {name: eqvae._HOME[name] for name in eqvae.__all__}
    lost = [name for name, home in homes.items() if not f"{home}.".startswith(tuple(f"{each}." for each in SECTIONS))]
    if lost:
        raise ValueError(f"no section of docs/api.md has {', '.join(lost)}")
    lines = []
    for package, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name, home in homes.items():
            if home == package or home.startswith(f"{package}."):
                has_page = name.endswith("Config")  # its fields are the flags, which stand on the command's page
                lines += [f"::: {home}.{name}", "    options:", f"      members: {'false' if has_page else 'null'}", ""]
    return "\n".join(lines)
