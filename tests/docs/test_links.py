"""Every link of the documentation leads somewhere: to a page, a heading of it, or a file that is committed."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])


def anchors(page: Path) -> set[str]:
    """The headings' anchors as mkdocs writes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading.strip().lower()) for heading in plain}


@pytest.fixture(scope="module")
def committed() -> set[Path]:
    """Files that git knows, and those that it would take in."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return {ROOT / name for name in subprocess.run(
        listed, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path, committed: set[Path]):
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`", "", page.read_text())
    broken = []
    for link in LINK.findall(text):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_dir():
            known = any(target in file.parents for file in committed)
        else:
            known = target in committed and target.exists()
        if not known or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_site_asks_nobody_else():
    """No font, script or style from another host: the theme has its own, and its plugin `offline` would load one."""
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in configuration
    assert not re.search(r"(?m)^\s*- offline", configuration)
    for text in (configuration, (ROOT / "docs" / "site.css").read_text()):
        assert not re.search(r"(src|href|url|extra_javascript)\s*[=:(]\s*[\[\"']*https?://", text)
