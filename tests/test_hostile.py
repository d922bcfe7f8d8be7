"""Broken and hostile input: a file gives the right content or one sentence that names it, and what
stands in it never becomes markup, a control sequence or code.

CLSGEN_FULL=1 runs all 10,000 JSON Lines files and 2,000 folders, else a tenth of them.
"""

import ast
import json
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from conftest import ROOT, assert_refused, make_run, run_script, write_rows, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from data import read_rows
from plumbing.adapter import adapter_tensors
from plumbing.checkpoint import load_llama
from plumbing.resume import STATE
from prompts import FRAMES, Prompts
from run import load_run
from train import main as train

SHARE = 1 if os.environ.get("CLSGEN_FULL") else 10


def cases(count):
    """Random numbers for each case; one that takes over a minute hangs, and fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this input hangs"))
    try:
        for seed in range(count // SHARE):
            print(end=f"\rseed {seed}")  # where a case fails, pytest shows this
            signal.alarm(60)
            yield random.Random(seed)
    finally:
        signal.alarm(0)


# --- JSON Lines files -----------------------------------------------------------------------------
TEXTS = ["a text", "é 中 👩🏽 \u202e", "tab\t, line\nand \0", '"} {"', "<|im_end|>", "huge " * 9999]
IGNORED = [None, 10**4000, {"a": [{"b": 1}, {"b": 2}]}]
BAD = [  # a field put into a good line, or what takes the place of the line, %s
    b'"\0": 1', b'"\xff": 1', b'"\xed\xa0\x80": 1', b'"\xc0\xaf": 1', b'"label": 1', b'"id": 1.5',
    b'"a": {"b": 1, "b": 1}', b'"a": -Infinity', b'"a": 01', b'"a": 1' + b"0" * 5000, b"\0%s",
    b'"explanation": ["a"]', b'"explanation": "\\udc00"', b'"probability": "0.5"', b"%s,", b"%s%s",
    b'"probability": 1e999', b"", b" \t", b"[%s]", b"{%s", b"%s}", b"\xef\xbb\xbf%s", b"[" * 99999,
    b'{"text": "a"}', b'{"label": 1}', b'{"label": 1, "text": 5}', b"{'label': 1, 'text': 'a'}",
    b'{"text": "a", "label": "1"}', b'{"text": "a", "label": 1.0}', b'{"text": " ", "label": 1}',
    *(b'"evidence": ' + b"[" * depth + b"]" * depth for depth in range(2, 1200, 60))]


def test_a_jsonl_file_reads_exactly_or_names_its_bad_lines(tmp_path):
    """Fails if a bad line is read or dropped, another is blamed, or the reader stops at the first
    problem; for instance if duplicate keys, NaN, or a BOM within the file pass."""
    path = tmp_path / "x.jsonl"
    for rng in cases(10_000):
        lines, rows, due = [], [], []
        count = rng.choice([2, 3, 6, 39])
        for number in range(1, count + 1):
            row = {"id": number, "text": rng.choice(TEXTS), "label": number % 2}
            row |= rng.choice([{}, {"explanation": "because", "evidence": ["é"], "group": "g"}])
            raw = row | {"id": rng.choice([number, None]), "other": rng.choice(IGNORED)}
            raw["label"] = rng.choice([raw["label"], bool(raw["label"])])
            line = json.dumps(raw, ensure_ascii=rng.random() < 0.5).encode()
            if rng.random() < 0.2:
                bad = rng.choice(BAD)
                if number == count and not bad.strip():  # blank lines at the end are fine
                    bad = b"{"
                field = bad.startswith(b'"')
                line = b"{" + bad + b", " + line[1:] if field else bad.replace(b"%s", line)
                due.append(f"{path}:{number}: ")
            lines.append(line + rng.choice([b"\n", b"\r\n"]))
            rows.append(row)
        path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))  # one such mark is fine
        try:
            assert read_rows(path) == rows and not due
        except ValueError as error:
            due[10:] = [f"... and {len(due) - 10} more"] * (len(due) > 10)
            found = str(error).split("\n")
            assert len(found) == len(due) and all(map(str.startswith, found, due)), (found, due)


# --- model and run folders ------------------------------------------------------------------------
VALUES = [None, True, -1, 0, 1, 7, 2.5, 1e308, float("nan"), 10**9, 10**30, "x", "", "a" * 300, [0],
          "\ud800", "\x1b[31m", "../../x.safetensors", "/x.safetensors", [], {}, [[]], {"a": {}}]


def change(rng, value):
    """The same JSON value, but with something in it replaced or gone."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = change(rng, value[key])
    if rng.random() < 0.1:
        del value[key]
    return value


def mutate(rng, path):
    """Cuts a file, garbles bytes, changes a JSON value, or lies about the size of a tensor header.
    True where tensor values changed: the file may load then, as another model."""
    data, how = path.read_bytes(), rng.choice(["cut", "garble", "garble", "change", "size"])
    head = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    at = rng.randrange(rng.choice([head, len(data)]) or len(data))  # half of them in the header
    if how == "cut":
        data = data[:at]
    elif how == "garble":
        end = min(at + rng.choice([1, 8]), len(data))
        data = data[:at] + rng.randbytes(end - at) + data[end:]
    elif how == "size" and head:
        claimed = rng.choice([2**60, 2**64 - 1, 0, head - 9, len(data)])
        data = claimed.to_bytes(8, "little") + data[8:]
    elif path.suffix == ".jsonl":
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(change(rng, json.loads(lines[at]))).encode()
        data = b"\n".join(lines) + b"\n"
    else:
        new = json.dumps(change(rng, json.loads(data[8:head] if head else data))).encode()
        data = (len(new).to_bytes(8, "little") + new + data[head:]) if head else new
    path.write_bytes(data)
    return how == "garble" and 0 < head < end


@pytest.mark.parametrize("mutated", ["base", "run"])
def test_a_mutated_folder_is_as_before_or_refused_by_name(tiny, tmp_path, mutated):
    """Fails if a value of a wrong type or size ends in another exception, a hang or gigabytes; if a
    changed header, index or adapter gives another model; if the golden row is not compared."""
    ids, run = torch.arange(3, 40)[None], make_run(tiny, tmp_path / "run")
    hidden, golden = load_llama(tiny, torch.float32)(ids), run.golden()["logit"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rng in cases(1000):
        base = shutil.copytree(tiny, tmp_path / "m" / "base")
        out = shutil.copytree(tmp_path / "run", tmp_path / "m" / "run")
        path = rng.choice(sorted((tmp_path / "m" / mutated).iterdir()))
        other = mutate(rng, path) or path.name == "config.json"
        try:
            llama = load_llama(base, torch.float32)
            assert Prompts(base).prompt("a text") and (other or torch.equal(llama(ids), hidden))
            again = load_run(out, model=base)
            assert abs(again.golden()["logit"] - golden) <= 1e-3
            assert 0 <= again.predict(["a text"])[0]["probability"] <= 1
        except ValueError as error:
            assert str(base) in str(error) or str(out) in str(error), error
        shutil.rmtree(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB


def test_a_mutated_save_is_restored_or_refused_by_name(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if a damaged state is taken for a good one, or a damaged log ends in another exception;
    for instance if the digest leaves out the state's JSON, the tensors or their names."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(["--data", str(rows_file), "--model", str(tiny), "--out", str(whole), "--rank", "2",
           "--epochs", "1", "--max-answer", "48", "--valid-fraction", "0.2"])
    (whole / "clsgen.json").unlink()  # as if it had been stopped after its last save
    due, restored, refused = load_file(whole / "adapter_model.safetensors"), [], 0
    monkeypatch.setattr("train.finish", lambda args, model, *_: restored.append(model))
    for rng in cases(500):
        shutil.copytree(whole, run)
        if rng.random() < 0.3:  # a whole file that says something else
            with safe_open(run / STATE, "pt") as file:
                metadata, tensors = file.metadata(), {x: file.get_tensor(x) for x in file.keys()}
            metadata["state"] = json.dumps(change(rng, json.loads(metadata["state"])))
            save_file(tensors, run / STATE, metadata)
        else:
            mutate(rng, rng.choice([run / STATE, run / "log.jsonl"]))
        try:
            train(["--resume", str(run)])
            found = adapter_tensors(restored.pop())
            assert all(torch.equal(found[name], due[name]) for name in due)
        except ValueError as error:
            assert str(run) in str(error), error
            refused += 1
        shutil.rmtree(run)
    assert 250 // SHARE <= refused < 500 // SHARE


def test_on_the_command_line(tiny, tmp_path):
    """Fails if one of these ends in a traceback, or sends a control sequence to the terminal."""
    make_run(tiny, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    strange = save(load_file(adapter) | {"\x1b[31m": torch.zeros(1)})
    huge = (2**60).to_bytes(8, "little") + strange[8:]
    for data, words in ((huge, "header too large"), (strange, r"surplus \x1b[31m")):
        adapter.write_bytes(data)
        done = run_script("predict.py", "--run", adapter.parent, "--text", "a")
        assert_refused(done, "error: ", adapter, words)
        assert "\x1b" not in done.stderr
    rows = write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "\x1b[31m"}])
    done = run_script("data.py", rows, "--model", tiny)
    assert_refused(done, rf'error: {rows}:1: label is "\u001b[31m"')


# --- text stays text, and nothing runs code -------------------------------------------------------
@pytest.mark.parametrize("name", FRAMES)
def test_no_text_or_explanation_holds_an_added_token(name, tmp_path):
    """Fails if a text is encoded by the tokenizer that knows the added tokens, by one with
    `encode_special_tokens`, which lets <think> through, or if a plain [INST] is not broken."""
    tokens = ("<eos>", *FRAMES[name].special_tokens, "<think>")
    write_tokenizer(tmp_path, tokens)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    prompts, added = Prompts(tmp_path, format=name), range(len(tokens))  # their ids
    frame = [i for i in prompts.prompt("a")[0] if i in added]

    def stays_text(text):
        ids, answer = prompts.prompt(text)[0], prompts.answer(1, text)
        shown = prompts.decode(ids)
        assert [i for i in ids if i in added] == frame
        assert [i for i in answer if i in added] == prompts.stop_ids[:1]
        if name in ("llama2", "mistral-v1"):
            assert shown.count("[INST]") == shown.count("[/INST]") == 1

    for token in tokens:
        for text in (token, 2 * token, f"a {token}b\n", token[:2] + token + token[2:]):
            stays_text(text)
    pieces = st.sampled_from([*tokens, "[INST]", "[/", "<|", " "]) | st.text(max_size=3)
    texts = st.lists(pieces, min_size=1).map("".join)
    settings(max_examples=2000 // SHARE, deadline=None)(given(texts)(stays_text))()


DANGEROUS = set("eval() exec() compile() __import__() importlib runpy ctypes CDLL pickle marshal"
                " shelve jinja2 load hub system popen shell trust_remote_code allow_pickle".split())


def names_in(source):
    """Its imports, attributes, keyword arguments and, ending in (), plain names."""
    for node in ast.walk(ast.parse(source)):
        yield from (getattr(node, field, None) for field in ("name", "module", "attr", "arg"))
        yield isinstance(node, ast.Name) and node.id + "()"


def test_nothing_can_run_code():
    """Fails if a script unpickles, evaluates text, imports by name, or starts a shell."""
    for bad in ("eval(x)", "__import__(x)", "import importlib", "import pickle", "torch.load(x)",
                "from pickle import x", "from torch import load", "f(shell=1)",
                "import ctypes as c", "from ctypes import CDLL", "c.CDLL(x)"):
        assert DANGEROUS & set(names_in(bad)), bad
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("examples/**/*.py")]
    assert len(scripts) > 20
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        if path.name == "script.py":  # one call of this process's own C library, for mallopt
            text = text.replace("import ctypes\n", "", 1).replace("ctypes.CDLL(None)", "None", 1)
        assert not DANGEROUS & set(names_in(text)), path
