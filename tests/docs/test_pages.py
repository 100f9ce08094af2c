"""What the documentation says is true: its commands and snippets run, print what stands there, and leave those files.

`docs/outputs.py` writes the outputs and reads the pages; here everything runs on six pictures, with flags that make it
short, and outputs are compared by the kinds of their lines, not by their figures.
"""

import fnmatch
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"documentation_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # where dataclasses look up their types
    specification.loader.exec_module(module)
    return module


outputs = load(DOCS / "outputs.py")
PAGES = outputs.pages()

QUICK = {
    "demo": "--max-steps 2",
    "finetune": "--max-steps 2 --batch-size 2 --perceptual none --num-validation-images 2 --num-statistics-images 2 "
    "--validate-every 1 --num-workers 0",
    "evaluate": "--num-workers 0",
    "encode": "--num-workers 0",
    "train": "--max-steps 2 --sample-every 1 --batch-size 2 --num-watch-samples 4 --watch-steps 2",
    "adapt": "--max-steps 2 --align-steps 1 --sample-every 1 --batch-size 2 --num-watch-samples 4 --watch-steps 2",
    "sample": "--num-samples 4 --num-steps 2",
    "score": "--num-workers 0",
}
"""Flags that make a command short; what is given twice counts as it was given last."""


def quick(words: list[str]) -> list[str]:
    """Append a command's flags."""
    command, *arguments = words
    flags = QUICK.get(command, "")
    if any("gat" in argument for argument in arguments):  # it draws in one pass
        flags = re.sub(r"--(watch|num)-steps 2", "", flags)
    return words if "--dry-run" in arguments else [*words, *flags.split()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory):
    """Somebody who reads the pages in one folder, with six pictures and without a network."""
    folder = tmp_path_factory.mktemp("reader")
    load(DOCS / "pictures.py").write_pictures(folder, num_pictures=6, side_px=72)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("eqvae.runs.train.matrix_peak_flops_per_sec", lambda device, precision: 1e12)
        reader = outputs.Reader(folder, change=quick, tests=True)
        yield reader
    print(f"\nthe pages' snippets: {reader.num_run} run, {reader.num_parsed} only parsed")  # noqa: T201


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_is_what_happens(reader, page: str):
    if page in reader.read:
        pytest.skip("another page went on from this one")
    for block, said in reader.work_through(page):
        if block.output is not None:
            assert outputs.shape(said) == outputs.shape(block.output), block.code


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("commands/")])
def test_a_folder_holds_what_its_table_lists(reader, page: str):
    found = re.search(r"(?m)^\| in `([^`]+)` \| what \|\n\|---\|---\|\n((?:\|.*\n)+)", (DOCS / page).read_text())
    if found is None:
        pytest.skip("the page has no such table")
    if page not in reader.read:
        reader.work_through(page)
    named = re.findall(r"`([^`]+)`", "\n".join(row.split("|")[1] for row in found[2].splitlines()))
    there = {path.name for path in (reader.folder / found[1]).iterdir() if not path.name.startswith(".")}
    assert [name for name in named if not fnmatch.filter(there, name)] == []
    assert [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in named)] == []


def test_every_command_has_a_page():
    from eqvae.cli import COMMANDS

    assert {page for page in PAGES if page.startswith("commands/")} == {f"commands/{name}.md" for name in COMMANDS}


def test_outputs_are_told_apart_by_their_kinds_of_lines():
    printed = "step 6: PSNR 24.74 dB\nstep 12: PSNR 24.93 dB\npsnr_db      24.9\n"
    assert outputs.shape("step 1: PSNR 2 dB\npsnr_db 3\n") == outputs.shape(printed)
    assert outputs.shape("step 1: SSIM 2\n") != outputs.shape(printed)
    assert outputs.squeeze("a: 1/9 steps, x\na: 9/9 steps, y\nb: 3/3 steps, z\nend\n") == (
        "a: 9/9 steps, y\nb: 3/3 steps, z\nend\n"
    )


def test_a_page_s_blocks_are_found_with_their_exceptions():
    first, second, third = outputs.blocks("scale.md")[:3]
    assert [block.left_out for block in (first, second, third)] == ["run", "run", "run"]
    assert first.commands()[0][:3] == ["torchrun", "--nproc-per-node", "8"]
    assert len(first.commands()) == 5
