"""What every script does: its help, its output on any terminal, and what it says of an error."""

import argparse
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_script, write_rows

import data
import eval as evaluation
import explain
import export
import predict
import train
from plumbing.script import Help

@pytest.mark.parametrize("script", [train, data, evaluation, explain, predict, export])
def test_help_says_a_default_once_or_not_at_all(script, capsys, monkeypatch):
    """Fails if a flag without a default shows None or False, if one shows it twice, or if a line
    does not fit the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    assert not re.search(r"None|False|\['", shown)
    for line in re.split(r"(?= --\w)", shown):
        assert line.count("default:") <= 1, line


@pytest.mark.parametrize("flag, words", [
    ({"default": 0, "type": int}, "x (default: 0)"), ({"default": 0.0}, "x (default: 0.0)"),
    ({"default": ["no", "yes"]}, "x (default: no yes)"), ({"default": "5 %"}, "x (default: 5 %)"),
    ({}, "x"), ({"action": "store_true"}, "x")])
def test_help_shows_the_defaults_that_there_are(flag, words):
    """Fails if a default of zero counts as none, or a list is shown as Python writes it."""
    parser = argparse.ArgumentParser(formatter_class=Help)
    parser.add_argument("--flag", help="x", **flag)
    assert parser.format_help().rstrip().endswith(" " + words)


def test_text_that_the_terminal_cannot_show_is_shown_as_escapes(tiny, tmp_path):
    """Fails if a script dies of a character that its terminal lacks."""
    rows = [{"text": f"\u75c5\u4eba {label} \u2264", "label": label} for label in (0, 1)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for encoding in ("ascii", "cp1252"):
        done = run_script("data.py", path, "--model", tiny, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and r"\u75c5\u4eba" in done.stdout, done


@pytest.mark.parametrize("arguments, code", [
    (["data.py", "--help"], 141), (["data.py", "rows"], 141), (["data.py", "nowhere"], 2)])
def test_a_reader_that_has_gone_is_no_error(rows_file, tiny, arguments, code):
    """Fails if `| head` ends in a traceback, during the output or when Python ends; or if it hides
    an error."""
    arguments = [str(rows_file) if word == "rows" else word for word in arguments]
    if arguments[0] == "data.py":
        arguments += ["--model", str(tiny)]
    reading, writing = os.pipe()
    os.close(reading)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # so that short output is written at the end
    done = subprocess.run([sys.executable, *arguments], stdout=writing, stderr=subprocess.PIPE,
                          text=True, cwd=ROOT, env=buffered)
    os.close(writing)
    assert done.returncode == code
    assert done.stderr.startswith("error: ") if code == 2 else done.stderr == ""
