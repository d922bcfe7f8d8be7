"""README and docs say what is true: their commands parse, the files that they name exist."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]


def commands():
    """Every `python x.py ...` in a code block, lines that end in a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(TEXT.values()), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [
        shlex.split(part, comments=True)
        for line in text.splitlines()
        for part in re.split(r"&&|;", line)
        if part.strip().startswith("python ")
    ]


SCRIPTS = {command[1] for command in commands() if command[1].endswith(".py")}
SCRIPTS -= {"examples/walkthrough.py", "tests/golden.py"}  # without flags; CI runs the first


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_the_flags_of_the_commands_exist(script):
    """Fails if a flag in README or docs is renamed or gone in the script."""
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in commands():
        if command[1] == script:
            flags = [word for word in command if word.startswith("--")]
            assert all(re.search(rf"{flag}\b", done.stdout) for flag in flags), command


@pytest.mark.parametrize("page", TEXT)
def test_the_files_it_names_exist(page):
    """Fails if a page names a file of the repository, or links to one, that was moved."""
    folder = (ROOT / page).parent
    folders = "examples|benchmarks|tests|plumbing|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*\w)`", TEXT[page]))
    links = set(re.findall(r"\]\(([\w./-]+\w)(?:#[\w-]+)?\)", TEXT[page]))
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [name for name in links if not (folder / name).exists()]


def test_every_page_of_docs_is_linked():
    """Fails if a page can only be found by listing the folder."""
    for page in TEXT:
        assert page == "README.md" or f"]({page})" in README or page == "benchmarks/README.md"


def test_the_commands_of_the_first_screen_are_marked():
    """Fails if CI could not find the two commands that do all set-up."""
    for mark in ("first-command", "test-command"):
        assert re.search(rf"<!-- {mark} -->\n```bash\n[^`]+\n```", README), mark


def test_the_readme_stays_short():
    """Fails if it outgrows what a newcomer reads, or leaves out where its numbers come from."""
    assert 100 <= README.count("\n") <= 160
    assert "dequantised 4-bit copy" in README
