"""Runs the commands and snippets of the pages, in order, and writes what they print under them.

    python docs/outputs.py docs/commands/encode.md docs/tutorial.md     # all pages without a name; some minutes

A fenced `sh` or `python` block is run; a `text` block right below it holds what it printed. A comment above a block
makes an exception: `<!-- not run: WHY -->`, or `<!-- not tested: WHY -->` for what runs here but only parses in
tests/docs. A page whose first lines say `needs: [commands/encode.md]` goes on in the folder where that page ended.
"""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent
FENCE = re.compile(
    r"(?:^<!-- not (?P<not>run|tested): (?P<why>[^\n]+) -->\n)?^```(?P<language>sh|python)\n(?P<code>.*?)^```\n"
    r"(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A command or snippet of a page."""

    page: str
    language: str
    code: str
    output: str | None
    """What the page says it prints."""
    left_out: str | None
    """`run` or `tested`, where it is not."""
    span: tuple[int, int]
    """Where the output stands in the page's text."""

    def commands(self) -> list[list[str]]:
        """Split a shell block into words, a list for each command."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> list[str]:
    """List the pages in the order of the navigation, without those of results, which have their own commands."""
    text = (DOCS.parent / "mkdocs.yml").read_text()
    names = re.findall(r"(?m)^\s+- .*?:? ?([\w/.-]+\.md)$", text[text.index("\nnav:") :])
    return [name for name in names if not name.startswith("results/") and name != "log.md"]


def blocks(page: str) -> list[Block]:
    """Read a page's blocks."""
    text = (DOCS / page).read_text()
    return [
        Block(
            page=page,
            language=found["language"],
            code=found["code"],
            output=found["output"],
            left_out=found["not"],
            span=found.span("output"),
        )
        for found in FENCE.finditer(text)
    ]


def needs(page: str) -> list[str]:
    """Read which pages a page goes on from."""
    found = re.match(r"---\n(.*?)\n---\n", (DOCS / page).read_text(), re.DOTALL)
    return list(yaml.safe_load(found[1]).get("needs", [])) if found else []


def shape(output: str) -> set[str]:
    """Say which kinds of lines an output has, whatever their figures and however often they come."""
    lines = [re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?|\b(inf|nan)\b", "#", line) for line in output.splitlines()]
    return {re.sub(r"# [kMGT]?B\b", "# bytes", " ".join(line.split())) for line in lines if line.strip()}


def squeeze(said: str) -> str:
    """Keep the last of a bar's lines where several follow one another, as a terminal would."""
    lines = said.splitlines()
    bars = [found[1] if (found := re.match(r"(\w+): \d+/\d+ \w+s, ", line)) else None for line in lines]
    kept = [line for line, bar, after in zip(lines, bars, [*bars[1:], None], strict=True) if not bar or bar != after]
    return "".join(f"{line}\n" for line in kept)


@dataclass
class Reader:
    """Somebody who types what the pages say, one page after another, in one folder."""

    folder: Path
    change: Callable[[list[str]], list[str]] = list
    """What becomes of a command's words before it is run."""
    tests: bool = False
    read: set[str] = field(default_factory=set)
    """Pages that are done."""
    num_run: int = 0
    num_parsed: int = 0

    def work_through(self, page: str) -> list[tuple[Block, str]]:
        """Run a page's blocks, those that it needs first, and return what each has printed."""
        for other in needs(page):
            if other not in self.read:
                self.work_through(other)
        self.read.add(page)
        names: dict[str, Any] = {"__name__": "snippet"}
        printed = []
        for block in blocks(page):
            if block.left_out == "run" or (self.tests and block.left_out == "tested"):
                self.parse(block)
                self.num_parsed += 1
                continue
            with contextlib.chdir(self.folder), _captured() as said:
                if block.language == "python":
                    exec(compile(block.code, f"{page}", "exec"), names)
                else:
                    self.run(block, said)
            self.num_run += 1
            printed.append((block, said.getvalue().replace(f"{self.folder}{os.sep}", "")))
        return printed

    def run(self, block: Block, said: io.StringIO) -> None:
        """Run a block's commands; a block whose output is an error's line must fail."""
        from eqvae.cli import run

        expected = 2 if (block.output or "").startswith("eqvae: ") else 0
        for words in block.commands():
            if words[0] != "eqvae":
                raise ValueError(f"{block.page}: '{words[0]}' is not run; write a comment above it")
            code = run(self.change(words[1:]))
            if code != expected:
                raise RuntimeError(f"{block.page}: {shlex.join(words)} ended with {code}\n{said.getvalue()}")

    def parse(self, block: Block) -> None:
        """Check that a block could be run: Python compiles, `eqvae`'s flags are known, also behind torchrun."""
        from eqvae.cli import COMMANDS, parse

        if block.language == "python":
            compile(block.code, block.page, "exec")
            return
        for words in block.commands():
            if "eqvae" not in words or words[0] == "git":
                continue
            command, *arguments = words[words.index("eqvae") + 1 :]
            if command not in COMMANDS:
                raise ValueError(f"{block.page}: eqvae has no command '{command}'")
            parse(config_type(command), command, arguments)


def config_type(command: str) -> Any:
    """Find a command's configuration."""
    import importlib

    return getattr(importlib.import_module(f"eqvae.runs.{command}"), f"{command.title()}Config")


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Collect what is printed on both streams, in order."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def write_outputs(page: str, printed: Sequence[tuple[Block, str]]) -> None:
    """Put what was printed into the page."""
    path = DOCS / page
    text = path.read_text()
    for block, said in reversed(printed):
        if block.output is not None:
            begin, end = block.span
            text = text[:begin] + squeeze(said) + text[end:]
    path.write_text(text)


def main(names: Sequence[str]) -> None:
    """Run the pages and rewrite their outputs."""
    from pictures import write_pictures

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [str(Path(name).resolve().relative_to(DOCS)) for name in names] or pages()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        reader = Reader(Path(folder))
        for page in chosen:
            if page in reader.read:  # as another's need
                continue
            write_outputs(page, reader.work_through(page))
            sys.stderr.write(f"{page}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
