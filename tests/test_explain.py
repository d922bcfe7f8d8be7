"""explain: a real server on loopback, a tiny teacher, what the checks reject, kill and resume."""

import json
import math
import re
import signal as signals
import subprocess
import sys
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, write_rows

from data import read_rows
from explain import LocalTeacher, failed_checks, main
from plumbing.script import printable

ROW = {"id": 1, "label": 1, "text": "Mary, 64, came with severe heart failure; <b>alert</b>."}
ARGS = Namespace(question="Did Mary die?", labels=["no", "yes"], words=[4, 12], grounded=0.3)
FAILED = {
    "There was no hope; severe heart failure at 64.": [],
    "No, the heart failure was severe.": ["label"],
    "The given label says severe heart failure.": ["told"],
    "Breathing problems are severe dangers everywhere.": ["grounded"],
    "Severe heart failure at age 65.": ["numbers"],
    "Severe heart failure.": ["length"],
    "The severe heart failure of this": ["unfinished"],
    "Severe heart failure severe heart failure severe heart failure severe heart.": ["loop"],
    "Explain which facts in the text lead: severe heart failure.": ["prompt"],
    "Did Mary die? Severe heart failure.": ["prompt"],
    "Severe heart failure </s> was there.": ["markup"],
}


@pytest.mark.parametrize("text", FAILED)
def test_each_check_rejects_what_only_it_rejects(text):
    """Fails if the check is gone (each was taken out once), or another is too strict."""
    assert failed_checks(text, ROW, ARGS) == FAILED[text]


class Teacher(BaseHTTPRequestHandler):
    """A chat-completions server, silent after server.limit requests. Each of server.wrong (status,
    headers, reply) spoils one request; status 0 hangs up, -1 is slow."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.headers["Authorization"], text := body["messages"][1]["content"]))
        said = "**Yes**" if "bad" in text else "no."  # as a reader, and to a row's text alone
        if label := re.search('The answer is "(.*?)"', text):
            result = "bad" if label[1] == "yes" else "good"
            said = f"<think>no: maybe</think>{label[1]}, the result is {result} in this case."
        if label and body["seed"] % 3 == 0 or "case 7:" in text:
            said = "That I cannot say today."
        good = 200, {}, {"choices": [{"message": {"content": said}}]}
        spoilt = server.wrong.pop(0) if server.wrong else good
        threading.Event().wait(600 if len(server.seen) > server.limit else spoilt[0] < 0)
        self.answer(*(good if spoilt[0] < 0 else spoilt))

    def do_GET(self):  # where a redirect leads
        self.server.seen.append((self.headers["Authorization"], ""))
        self.answer(404, {}, {})

    def answer(self, status, headers, reply):
        if status:
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(json.dumps(reply, ensure_ascii=False).encode())

    def log_message(self, *args):
        pass


def part_of(out):
    return out.with_name(out.name + ".part")


@pytest.fixture
def server(rows, tmp_path, monkeypatch):
    """A Teacher; its file of the rows without explanations, but for the last one's; `explain`,
    which has that file explained; and `begin`, which begins that and is stopped at once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.wrong, server.seen, server.limit = [], [], math.inf
    server.handle_error = lambda *args: None  # the client hung up
    lines = [{k: v for k, v in row.items() if k != "explanation"} for row in rows[:-1]] + rows[-1:]
    lines[20]["text"] += " and more" * 1000
    server.file = write_rows(tmp_path / "labels.jsonl", lines)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.flags = ["--data", str(server.file), "--endpoint", server.url, "--teacher", "t",
                    "--retries", "3", "--key-env", "KEY", "--out"]

    def explain(out, *more):
        main([*server.flags, str(out), *more])

    def begin(out):
        with monkeypatch.context() as stopped:
            stopped.setattr("explain.explain_batch", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                explain(out)
        return part_of(out).read_text()

    server.explain = explain
    server.begin = begin
    monkeypatch.setenv("KEY", "sk-secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_server_explains_rows_in_order_and_drops_none(server, tmp_path, rows, capfd):
    """Fails if a row is lost or moved, thoughts or the label's word are kept, an own explanation is
    replaced, a text is not cut, the key is missing or shown, or a count is wrong."""
    out = tmp_path / "out"
    server.explain(out, "--tries", "3")
    assert not part_of(out).exists()
    done = read_rows(out)
    assert [row["id"] for row in done] == [row["id"] for row in rows] and done[-1] == rows[-1]
    kept = [row for row in done[:-1] if "explanation" in row]
    for row in kept:
        result, source = "bad" if row["label"] else "good", row["explanation_source"]
        assert row["explanation"] == f"The result is {result} in this case."
        assert source["checks"] == ["grounded"] * (source["tries"] - 1) + ["passed"]
        assert source["zero_shot"] == row["label"]
    source = done[7]["explanation_source"]
    assert source["checks"] == ["grounded"] * 3 and source["zero_shot"] == 0.5
    assert {key for key, _ in server.seen} == {"Bearer sk-secret"}
    assert 4096 < max(len(text) for _, text in server.seen) < 4196  # four characters a token
    screen = capfd.readouterr()
    assert "sk-secret" not in "".join(screen) + "".join(p.read_text() for p in tmp_path.iterdir())
    ones = [sum(row["label"] for row in side) for side in (kept, rows[:-1])]
    assert f"yes: {ones[0]} of {ones[1]} rows" in screen.out and len(kept) > 35
    assert "text alone: 1.000" in screen.out and "warning" not in screen.out


def test_what_is_temporary_is_tried_again(server, tmp_path, monkeypatch):
    """Fails if a 429, its Retry-After, a 500, a dropped, slow or cut connection or a malformed
    reply ends the run, or changes what is written."""
    waits, out = [], [tmp_path / "a", tmp_path / "b"]
    server.explain(out[0])
    monkeypatch.setattr("time.sleep", waits.append)
    good, number = (200, {}), {"choices": [{"message": {"content": 1}}]}
    server.wrong += [(429, {"Retry-After": "7"}, {}), (500, {}, {}), (0, {}, {}), (-1, {}, {}),
                     (200, {"Content-Length": "2"}, {"a": 1}), (200, {"Content-Length": "9"}, {}),
                     (*good, {}), (*good, [1]), (*good, number)]
    server.explain(out[1], "--retries", "9", "--concurrency", "1", "--timeout", "0.5")
    assert waits == [7, *(2**i for i in range(1, 9))] and out[0].read_text() == out[1].read_text()


@pytest.mark.parametrize("status, tried, words", [
    (404, 1, r"HTTP 404 .*no model t \[key\]"), (302, 1, "HTTP 404"), (500, 4, "HTTP 500"),
    (0, 4, "closed connection"), (200, 4, "no chat completion")])
def test_a_server_that_fails_ends_the_run(server, tmp_path, monkeypatch, status, tried, words):
    """Fails if a 404 is tried again, the rest for ever, the key or a control character is shown,
    the key goes where a redirect leads, rows before are lost, or a whole file is asked again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.explain(tmp_path / "whole", "--concurrency", "1")
    whole = (tmp_path / "whole").read_text()
    lines = whole.splitlines()
    out = tmp_path / "out"
    part = part_of(out)
    about = server.begin(out)
    assert about.count("\n") == 1 and "sk-secret" not in about

    # Stopped within the twenty-first line: one line tells what it is about, each other has one row
    before = about + "".join(f"[{line}]\n" for line in lines[:20])
    part.write_text(before + "[" + lines[20][:30])
    requests = len(server.seen)
    reply = {"error": {"message": "no model t sk-secret \x9b"}}
    server.wrong += [(status, {"Location": server.url}, reply)] * tried
    with pytest.raises(ValueError, match="at row 'r20'.*" + words) as error:
        server.explain(out, "--concurrency", "1")
    assert "sk-secret" not in str(error.value) and printable(str(error.value)) == str(error.value)
    assert sum("case 20:" in text for _, text in server.seen[requests:]) == tried
    assert (None in [key for key, _ in server.seen]) == (status == 302)
    assert part.read_text() == before and not out.exists()

    # The same command continues there, and is refused once all is done
    server.explain(out)
    assert not any("case 19:" in text for _, text in server.seen[requests:])
    assert out.read_text() == whole and not part.exists()
    requests = len(server.seen)
    with pytest.raises(ValueError, match="out exists; give another --out"):
        server.explain(out)
    assert len(server.seen) == requests and out.read_text() == whole


@pytest.mark.parametrize("signal, code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was(server, tmp_path, signal, code):
    """Fails if lines are written late, a stop loses or doubles a row, Ctrl-C waits for replies or
    shows a traceback, or a run with other arguments or other rows goes on."""
    undisturbed = tmp_path / "undisturbed"
    server.explain(undisturbed)
    server.limit = len(server.seen) + 30
    out = tmp_path / "out"
    part = part_of(out)
    end = time.time() + 300
    command = [sys.executable, ROOT / "explain.py", *server.flags, out]
    # a shell's background job ignores Ctrl-C, and so would what it starts
    process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=lambda: signals.signal(
        signals.SIGINT, signals.SIG_DFL))
    while not (part.exists() and part.read_bytes().count(b"\n") > 4):
        assert process.poll() is None and time.time() < end
        time.sleep(0.01)
    process.send_signal(getattr(signals, signal))
    assert process.wait(timeout=120) == code and b"Traceback" not in process.stderr.read()
    server.limit = math.inf
    stopped = part.read_bytes()
    assert 4 < stopped.count(b"\n") < 41 and not out.exists()

    others = write_rows(tmp_path / "others.jsonl", read_rows(server.file)[1:])
    for other in (["--seed", "1"], ["--question", "Is it?"], ["--data", str(others)]):
        with pytest.raises(ValueError, match="out.part was begun with other arguments"):
            server.explain(out, *other)
    assert part.read_bytes() == stopped
    server.explain(out)
    assert out.read_text() == undisturbed.read_text() and not part.exists()


def test_foreign_output_and_impossible_flags_are_refused(server, tmp_path):
    """Fails if explain writes into a file that it did not begin, or a flag shows a key."""
    content = server.file.read_bytes()
    with pytest.raises(ValueError, match="labels.jsonl exists; give another --out"):
        server.explain(server.file)
    assert server.file.read_bytes() == content and not part_of(server.file).exists()
    for flag, value in {"--endpoint": "http://me:sk-x@host/v1", "--key-env": "sk-x", "--tries": "0",
                        "--top-p": "2", "--teacher": "", "--out": "no/where", "--retries": "-1",
                        "--words": "0", "--timeout": "0", "--temperature": "nan"}.items():
        with pytest.raises(ValueError, match=flag) as error:
            server.explain(tmp_path / "x", flag, value, *["9"] * (flag == "--words"))
        assert "sk-x" not in str(error.value)
    assert not server.seen


def test_a_local_teachers_draws_depend_on_seed_row_and_try(tiny, tmp_path, capsys, monkeypatch):
    """Fails if one generator serves a batch, tries or rows of one text repeat a draw, the batch
    changes a text or resuming a line, or special tokens vanish before they are checked."""
    said, texts = [], {}

    def note(text, row, args):
        said.append((row["id"], text))
        return []

    monkeypatch.setattr("explain.failed_checks", note)
    lines = [{"text": "bad " * (i % 2 * 9 + 1), "label": i // 2 % 2} for i in range(20)]
    data = write_rows(tmp_path / "data", lines)
    for batch, seed in ((1, 0), (20, 0), (7, 1), (7, 0)):
        said.clear()
        out = tmp_path / f"{batch}-{seed}"
        arguments = ["--model", str(tiny), "--data", str(data), "--batch", str(batch), "--seed",
                     str(seed), "--max-answer", "8", "--tries", "2", "--dtype", "float32", "--out",
                     str(out)]
        main(arguments)
        texts[batch, seed] = {(row, text) for row, text in said if text}  # some stop at once
    assert texts[1, 0] == texts[7, 0] == texts[20, 0] and not texts[7, 0] & texts[7, 1]
    tries = sum(len(row["explanation_source"]["checks"]) for row in read_rows(out))
    assert len(said) == tries > 25 and "warning" in capsys.readouterr().out
    assert len({text for _, text in texts[7, 0]}) == sum(text != "" for _, text in said) > 20

    # Stopped once before the file takes its place, once in the middle of a batch, and of a line
    whole = out.read_text()
    out.unlink()
    part = part_of(out)
    with monkeypatch.context() as full_disk:
        full_disk.setattr("explain.write_atomically", lambda path, data: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    gathered = part.read_text()
    assert gathered.count("\n") == 1 + 3 and not out.exists()
    part.write_text(gathered[: gathered.index('"id": 11')])
    with pytest.raises(ValueError, match="other arguments"):  # a line would hold other rows
        main([*arguments, "--batch", "5"])
    main(arguments)
    assert out.read_text() == whole and not part.exists()

    monkeypatch.setattr("explain.choose_token", lambda logits, *_: torch.tensor([1]))
    args = Namespace(model=tiny, question="?", labels=["no", "yes"], format=None, max_prompt=99,
                     max_answer=3, dtype="float32", temperature=1, top_p=1)
    assert LocalTeacher(args).write(["a"], [0]) == ["<|im_start|>" * 3]
