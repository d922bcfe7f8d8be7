"""What every script does: its help, its output on any terminal, and what it says of an error."""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, run_script, write_rows

import data
import eval as evaluation
import explain
import export
import predict
import train
from plumbing.script import Help, exit_code, pick_device
from run import load_run


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


# --- dtype and device -----------------------------------------------------------------------------
def pretend_cuda(monkeypatch, bfloat16):
    """Two GPUs, of which the first, "cuda", has instructions for bfloat16 or emulates it, as
    PyTorch tells of one. The second is of the other kind."""
    current = [0]

    @contextmanager
    def device(chosen):
        current.append(chosen.index or 0)
        yield
        current.pop()

    def is_supported(including_emulation=True):
        has_instructions = bfloat16 if current[-1] == 0 else not bfloat16
        return including_emulation or has_instructions

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", lambda *size, device: None)
    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", is_supported)


@pytest.mark.parametrize("bfloat16, trains, dtype", [
    (True, True, torch.bfloat16), (True, False, torch.bfloat16),
    (False, True, torch.float32), (False, False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_does_not_get_it(monkeypatch, bfloat16, trains, dtype):
    """Fails if emulation counts as support, if float16 is trained in, whose gradients vanish, or
    if another GPU is asked than the one that is used."""
    pretend_cuda(monkeypatch, not bfloat16)
    assert pick_device("auto", "cuda:1", trains)[0] == dtype
    pretend_cuda(monkeypatch, bfloat16)
    assert pick_device("auto", None, trains) == (dtype, torch.device("cuda"))
    assert pick_device("bfloat16", "cuda", trains)[0] == torch.bfloat16, "who asks for it gets it"


def test_float32_products_are_float32(monkeypatch):
    """Fails if a setting of the machine makes them TF32, of ten bits: a run's golden row would not
    be that of another machine."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    pick_device("auto", "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


def test_too_little_memory_of_a_gpu_is_one_sentence(capsys):
    """Fails if a user who can help it gets a traceback."""
    def fill_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    assert exit_code(fill_memory, "") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. Less memory is")
    assert error.count("\n") == 1 and "--micro-batch" in error


@pytest.mark.parametrize("able", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_that_only_emulates_bfloat16_does_not_get_it(run, tmp_path, monkeypatch, able):
    """Fails if a CPU without the instructions takes it, for "auto" or because a run was trained in
    it; or if one that has them does not."""
    dtype = torch.bfloat16 if able else torch.float32
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {able: True})
    assert pick_device("auto", "cpu") == (dtype, torch.device("cpu"))

    path = tmp_path / "run" / "clsgen.json"
    about = json.loads(path.read_text())
    about["golden"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(about))
    again = load_run(tmp_path / "run", device="cpu", pack=False)
    assert again.llama.norm.weight.dtype == dtype
    assert load_run(tmp_path / "run", dtype="float16").llama.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("environment, code", [({}, -15), ({"TORCHELASTIC_RUN_ID": "1"}, 0)])
def test_a_second_signal_of_torchrun_lets_the_work_finish(environment, code):
    """Fails if a signal that comes twice by way of torchrun ends a process that is saving, or if
    the second one of a user does not end it."""
    program = """
import os, signal
from plumbing.script import stop_signals
with stop_signals() as caught:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(caught) == 1
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE,
                          env={**os.environ, **environment}, text=True)
    assert done.returncode == code, done.stderr
