"""Several processes: who has which GPU, and that sharing the work changes no result."""

import json
import shutil
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from conftest import ROOT, make, write_rows
from test_predict import stop_at_the_third

from data import Example
from plumbing.checkpoint import base_fingerprint
from plumbing.ranks import Ranks
from plumbing.resume import read_state, restore
from plumbing.train_arguments import parse
from predict import main as predict
from prompts import Prompts
from train import main, validate


def torchrun(processes, script, *args):
    # the -- ends torchrun's own flags: it would take --run for one of them
    flags = ["--standalone", "--nproc_per_node", processes, "--"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, script, *args]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("device, number, words", [
    ("cuda:0", 0, "--device cuda:0: all processes of torchrun would use this GPU"),
    ("cuda:1", 1, "--device cuda:1: all processes"),
    (None, 2, "more processes than there are GPUs, 2"), ("cuda", 2, "more processes than"),
    ("cuda", 1, None), (None, 0, None), ("cpu", 5, None)])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device, number, words):
    """Fails if several processes crowd one GPU, in silence or with PyTorch's own error."""
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", 8)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.stdout", sys.stdout)  # which all but the first process lose
    if words:
        with pytest.raises(ValueError, match=words):
            Ranks(device)
    else:
        assert Ranks(device).rank == number
        assert chosen == ([] if device == "cpu" else [number])
    monkeypatch.setenv("WORLD_SIZE", "1")
    Ranks(device)


def test_one_process_rewrites_the_log(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if the other processes of a resumed training write into its folder, too."""
    out = tmp_path / "run"
    main(["--data", str(rows_file), "--model", str(tiny), "--out", str(out), "--rank", "2",
          "--valid-fraction", "0.3", "--epochs", "0.3", "--device", "cpu"])
    state, tensors = read_state(out)
    names = [name.removeprefix("weight.") for name in tensors if name.startswith("weight.")]
    trained = {name: torch.nn.Parameter(tensors["weight." + name]) for name in names}
    monkeypatch.setattr("plumbing.resume.write_atomically", None)  # to call it would be an error
    restore(out, trained, torch.optim.AdamW(trained.values()), state["config"], writes=False)
    with pytest.raises(TypeError):
        restore(out, trained, torch.optim.AdamW(trained.values()), state["config"])


def test_ranks_without_torchrun_are_one_sentence(monkeypatch):
    """Fails if a cluster that sets RANK and WORLD_SIZE alone ends in a KeyError."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="start several processes with torchrun"):
        Ranks(None)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nccl_is_told_the_gpu(monkeypatch, device):
    """Fails if NCCL has to guess which GPU a process uses, or gloo is given one; if a process that
    waits for another one's long chunk gives up after NCCL's ten minutes."""
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.distributed.init_process_group",
                        lambda *backend, **others: calls.append((backend, others)))
    monkeypatch.setenv("WORLD_SIZE", "8")
    Ranks(None).connect(torch.device(device))
    assert calls[0][1].pop("timeout") == timedelta(days=1)
    gpu = {"device_id": torch.device("cuda:3")}
    assert calls == [(("nccl",), gpu) if device == "cuda" else (("gloo",), {})]


def measure(folder):
    """What a validation finds, of many examples and of two."""
    model = make(folder)
    prompts = Prompts(folder)
    args = parse(["--data", "rows.jsonl", "--micro-batch", "2"])
    ranks = Ranks("cpu")
    device = torch.device("cpu")
    ranks.connect(device)
    found = []
    for count in (11, 2):  # of three processes, one has nothing to do with two
        examples = [Example(i, [3, 4, 5 + i], prompts.answer(i % 2, "So." * i), i % 2, 0)
                    for i in range(count)]
        measured, z = validate(model, examples, args, prompts, device, ranks)
        found.append({**measured, "z": z.tolist()})
    return ranks, found


def test_processes_share_the_validation_rows_and_see_the_same_numbers(tiny, tmp_path, monkeypatch):
    """Fails if a process does all rows or measures its own alone, if a row's logit comes to another
    row's place, or if a process without rows stops the others."""
    script = tmp_path / "measure.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import json
from pathlib import Path
import train
from test_ranks import measure
seen, collate = [], train.collate
train.collate = lambda examples, device: (seen.extend(examples), collate(examples, device))[1]
ranks, found = measure({str(tiny)!r})
Path({str(tmp_path)!r}, f"{{ranks.rank}}.json").write_text(json.dumps([found, len(seen)]))
ranks.leave()
""")
    done = torchrun(3, script)
    assert done.returncode == 0, done.stderr
    found, seen = zip(*(json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)),
                      strict=True)
    assert found[0] == found[1] == found[2] and seen == (4 + 1, 4 + 1, 3)
    _, due = measure(tiny)
    for ours, theirs in zip(due, found[0], strict=True):
        assert theirs.pop("z") == pytest.approx(ours.pop("z"), abs=1e-5)
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_processes_share_the_rows_of_a_prediction(rows, run, tmp_path, monkeypatch):
    """Fails if records are lost, doubled or out of order, if a stopped job cannot continue with
    other processes, or if more than one of them writes."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "p.jsonl"
    command = ["--run", tmp_path / "run", "--data", data, "--out", out, "--batch", 1]
    command = [*map(str, command), "--temperature", "1"]
    predict(command)
    due = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()

    stop_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        predict(command)  # three chunks of five are left
    done = torchrun(3, "predict.py", *command)
    assert done.returncode == 0 and done.stdout.count("40 predictions") == 1, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in found] == [row["id"] for row in rows]
    for ours, theirs in zip(due, found, strict=True):
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-6)
        assert theirs["explanation"] == ours["explanation"]
    assert [path.name for path in tmp_path.glob("*p.jsonl*")] == ["p.jsonl"]


def test_processes_speak_with_one_voice(rows, run, tiny, tmp_path):
    """Fails if each process gives the same warning, or if one ends in a traceback because another
    one has refused to continue."""
    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "no_such_key": 1}))
    path = tmp_path / "run" / "clsgen.json"
    about = json.loads(path.read_text())
    about["base_fingerprint"] = base_fingerprint(base)
    path.write_text(json.dumps(about))
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "no_such_field": 1} for row in rows])
    out = tmp_path / "p.jsonl"
    part = tmp_path / "p.jsonl.part"
    part.write_text("of another job\n[]\n")

    command = ["--run", tmp_path / "run", "--model", base, "--data", data, "--out", out]
    done = torchrun(2, "predict.py", *command)
    assert done.returncode != 0
    assert done.stderr.count("no_such_key") == 1 and done.stdout.count("no_such_field") == 1
    assert done.stderr.count("was begun with other arguments") == 1
    assert "[rank1]: Traceback" not in done.stderr, done.stderr


def test_a_loss_that_is_not_finite_on_one_process_is_the_error_of_all(tiny, rows_file, tmp_path):
    """Fails if one process stops alone: the others would wait for its gradients, or end in a
    traceback."""
    script = tmp_path / "broken.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from plumbing.script import run_main
factor = float("nan") if os.environ["RANK"] == "1" else 1.0
joint_loss = train.joint_loss
train.joint_loss = lambda z, *others: joint_loss(factor * z, *others)
run_main(train.main)
""")
    done = torchrun(2, script, "--data", rows_file, "--model", tiny, "--out", tmp_path / "new",
                    "--valid-fraction", 0.3, "--rank", 2, "--device", "cpu")
    assert "]: Traceback" not in done.stderr, done.stderr
    # the lines of two processes may run into each other
    assert done.stderr.count("the loss is not finite; rows: ['r") == 2, done.stderr
