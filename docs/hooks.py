"""What mkdocs asks while it builds: the tables of flags, and the list of public names.

A line `<!-- flags of NAME -->` becomes the table of `eqvae NAME --help`, and `<!-- public names -->` the reference of
`eqvae.__all__`, and `<!-- methods -->` the table of `--method`, so none can fall behind the code.
"""

import importlib
import re
import warnings
from argparse import SUPPRESS
from typing import Any

FLAGS = re.compile(r"(?m)^<!-- flags of (\w+) -->$")
NAMES = "<!-- public names -->"
METHODS = "<!-- methods -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated; mkdocs calls this for each page."""
    markdown = FLAGS.sub(lambda found: flags_table(found[1]), markdown)
    if METHODS in markdown:
        markdown = markdown.replace(METHODS, importlib.import_module("eqvae.methods").table())
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
        meaning = " ".join(meaning.split()).replace("|", "\\|")
        default = f"`{default}`" if default and default != "required" else default
        rows.append(f"| {name} | {meaning} {shown} | {default} |".replace("  ", " "))
    return "\n".join(["| flag | what it does | default |", "|---|---|---|", *rows]) if rows else ""


SECTIONS = {
    "eqvae.transforms": "Transformations",
    "eqvae.equivariance": "The objective",
    "eqvae.autoencoders": "Autoencoders",
    "eqvae.metrics": "Measures",
    "eqvae.runs": "Commands",
    "eqvae.errors": "Errors",
}


def public_names() -> str:
    """Write one block of mkdocstrings for each public name, by the part of the package that it is from."""
    import eqvae

    lines = []
    for package, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name in eqvae.__all__:
            home = eqvae._HOME[name]
            if home == package or home.startswith(f"{package}."):
                has_page = name.endswith("Config")  # its fields are the flags, which stand on the command's page
                lines += [f"::: {home}.{name}", "    options:", f"      members: {'false' if has_page else 'null'}", ""]
    return "\n".join(lines)
