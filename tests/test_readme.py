"""The README says what is true: its commands parse, its files exist, the ceilings hold."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lines that each may have: what a person can read in one sitting, and no room to grow
CEILINGS = {"model.py": 453, "clsgen.py": 535, "data.py": 465, "explain.py": 305, "train.py": 471,
            "eval.py": 656}


def commands():
    """Every `python x.py ...` in a code block, lines that end in a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [
        shlex.split(part, comments=True)
        for line in text.splitlines()
        for part in re.split(r"&&|;", line)
        if part.strip().startswith("python ")
    ]


@pytest.mark.parametrize("script", sorted({c[1] for c in commands() if c[1].endswith(".py")}))
def test_the_flags_of_the_commands_exist(script):
    """Fails if a flag in the README is renamed or gone in the script."""

    def ask(*command):
        done = subprocess.run(
            [sys.executable, ROOT / script, *command, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in commands():
        if command[1] == script:
            known = ask(*([command[2]] if script == "data.py" else []))
            flags = [word for word in command if word.startswith("--")]
            assert all(re.search(rf"{flag}\b", known) for flag in flags), command


def test_the_files_it_names_exist():
    """Fails if the README names a file of the repository that was moved."""
    names = set(re.findall(r"`((?:examples|benchmarks|tests)/[\w./-]*\w)`", README))
    assert names and not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", CEILINGS)
def test_the_scripts_stay_short(name):
    """Fails if a script outgrows what a person reads in one sitting, or hides it in width."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= CEILINGS[name], f"{len(lines)} lines"
    assert max(map(len, lines)) <= 100


def test_the_commands_of_the_first_screen_are_marked():
    """Fails if CI could not find the two commands that do all set-up."""
    for mark in ("first-command", "test-command"):
        assert re.search(rf"<!-- {mark} -->\n```bash\n[^\n]+\n```", README), mark
