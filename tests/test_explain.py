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
from explain import argues_from_the_text, failed_checks, main, stems, task, words
from plumbing.chat import is_this_machine
from plumbing.giving_up import FIRST_ROWS
from plumbing.script import printable
from plumbing.teachers import LocalTeacher, what_it_says
from prompts import stated_label

ROW = {"id": 1, "label": 1, "text": "Mary, 64, came with severe heart failure; <b>alert</b>."}
ARGS = Namespace(question="Did Mary die?", labels=["no", "yes"], words=[4, 12], grounded=0.3)
FAILED = {
    "There was no hope; severe heart failure at 64.": [],
    "": ["empty", "grounded", "length", "unfinished"],
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


# --- what speaks of an answer that was given, and what does not -----------------------------------
TOLD = """
The given label says that the heart failure is severe.
The answer is yes because I was told so.
As the label states, the patient died.
Based on the answer provided, she was too ill to go home.
The correct answer follows from her age.
I was asked to explain why he died.
The provided answer is supported by the low blood pressure.
I was given the label yes.
The label is yes since he had a fever.
The label "yes" is right, since he had a fever.
This answer is supported by the low blood pressure.
The answer "no" follows from the normal scan.
The normal scan supports the answer.
These facts lead to this answer.
The fever points to the label.
I have been told that he died.
You told me that he died.
You asked why he died: he had sepsis.
The known answer fits the low blood pressure.
As an AI, I see a severe illness.
The expected label is explained by the fever.
Since the label says yes, the fever was bad.
The answer of yes is due to the fever.
According to my instructions, the fever matters.
The assigned label agrees with the fever.
The answer that was given fits the text.
Her age is consistent with the answer.
The answer lies in the scan.
"""
ORDINARY = """
The discharge instructions were given to his wife.
The label warns of damage to the liver.
She was told to return if the fever came back.
He was asked to stop smoking.
The instructions were to rest and to drink.
The drug's label warns of bleeding.
The nurse gave him instructions about the wound.
He could not answer the questions about the date.
The correct dose was given in time.
The given dose was too high for her.
The known allergy to penicillin was ignored.
The labels on the boxes were swapped.
The man is waiting for the answer by phone.
The label on the bottle was torn.
This label was found on the vial, so the drug is known.
The label no longer warns of bleeding.
The prompt arrival of the ambulance saved him.
He followed the instructions of his doctor.
The label states that the drug must not be taken with alcohol.
The study gives no answer about children.
She answered all questions correctly.
The band left its label in May.
The company gave a short answer to the complaint.
Off-label use of the drug was stopped.
Take the tablets as instructed by the pharmacist.
The food label lists nuts, and he is allergic to them.
"""


@pytest.mark.parametrize("text", TOLD.strip().splitlines())
def test_what_speaks_of_a_given_answer(text):
    """Fails if such a text is trained on, though the row's text has no such words."""
    assert not argues_from_the_text(text, ROW, ARGS)
    assert argues_from_the_text(text, {**ROW, "text": f'It says: "{text}"'}, ARGS)


@pytest.mark.parametrize("text", ORDINARY.strip().splitlines())
def test_what_only_has_the_words_of_it(text):
    """Fails if an ordinary sentence counts as one about an answer that was given."""
    assert argues_from_the_text(text, ROW, ARGS)


@pytest.mark.parametrize("text, explanation", [
    ("患者张某，64岁，因严重心力衰竭入院，血压很低，第二天早上转入重症监护室。",
     "患者因严重心力衰竭入院，血压很低，第二天转入了重症监护室。"),
    ("患者は重い心不全で入院し、血圧が低かった。", "重い心不全で入院し、血圧が低かった！"),
    ("환자는 심한 심부전으로 입원했고 혈압이 낮았습니다.",
     "심한 심부전으로 입원했고 혈압이 매우 낮았습니다."),
    ("मरीज़ को गंभीर दिल की बीमारी थी और रक्तचाप कम था।", "मरीज़ को गंभीर दिल की बीमारी थी।"),
    ("كان المريض مصابا بفشل القلب الشديد", "كان المريض مصابا بفشل القلب الشديد؟")])
def test_explanations_in_other_languages(text, explanation):
    """Fails if words or full stops are those of languages with blanks and Latin letters alone."""
    args = Namespace(question="?", labels=["no", "yes"], words=[5, 80], grounded=0.5)
    assert failed_checks(explanation, {**ROW, "text": text}, args) == []
    assert "unfinished" in failed_checks(explanation[:-1], {**ROW, "text": text}, args)
    assert "grounded" in failed_checks(explanation, {**ROW, "text": "An English text."}, args)
    assert "loop" in failed_checks(explanation * 3, {**ROW, "text": text}, args)


def test_a_text_without_blanks_or_punctuation_can_loop():
    """Fails if such a text counts as one word, which cannot repeat itself."""
    assert "loop" in failed_checks("心力衰竭" * 8 + "。", ROW, ARGS)


def test_words_and_stems():
    """Fails if English words are cut otherwise than at blanks, or accents are taken for blanks."""
    assert words("It's 64, (so) to say — no\n") == ["It's", "64,", "(so)", "to", "say", "—", "no"]
    assert words("HbA1c 9.5，血糖高。") == ["HbA1c", "9.5", "血", "糖", "高"]
    assert stems("Reports reported 64_days; the") == {"repor", "days"}
    assert stems("déjà cafe\u0301s") == {"déjà", "cafe\u0301"}
    assert stems("血糖高 high") == {"血糖", "糖高", "high"}


@pytest.mark.parametrize("answer, said", [
    ("<think>no: maybe</think>Yes.", "Yes."), ("no: maybe</think>\n\nYes.", "Yes."),
    ("<thinking>a</thinking> **Yes.**", "Yes."), ("<Thought>a</Thought>Yes.", "Yes."),
    ("[THINK]a[/THINK]Yes.", "Yes."), ("◁think▷a◁/think▷Yes.", "Yes."),
    ("<|START_THINKING|>a<|END_THINKING|>Yes.", "Yes."),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
     "Yes."), ("I think [so].", "I think [so]."),
    *((f"{begin}It goes on", "") for begin in (
        "<think>", "[THINK]", "<reasoning>", "<|channel|>analysis<|message|>"))])
def test_thinking_is_no_part_of_what_is_said(answer, said):
    """Fails if a piece of a thought is taken for the answer, in whatever marks it stands."""
    assert what_it_says(answer, cut_off=False) == said
    assert what_it_says(answer, cut_off=True) == (said or None)


def test_braces_are_ordinary_characters():
    """Fails if a text or a label's word is taken for a template."""
    asked = task({"text": "{0} {x}", "label": 1}, ["{no}", "{yes}"])
    assert asked.startswith("{0} {x}\n\n") and 'The answer is "{yes}".' in asked
    assert stated_label("{Yes}. {It} is.", ["{no}", "{yes}"]) == (1, "{It} is.")


# --- a server -------------------------------------------------------------------------------------
class Teacher(BaseHTTPRequestHandler):
    """A chat-completions server, silent after server.limit requests. Each of server.wrong (status,
    headers, reply) spoils one request; status 0 hangs up, -1 is slow. server.fault(body) gives such
    a reply or None to each request, server.say(text) the form in which a text is said."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.headers["Authorization"], text := body["messages"][1]["content"]))
        said = "**Yes**" if "bad" in text else "no."  # as a reader, and to a row's text alone
        if label := re.search('The answer is "(.*?)"', text):
            result = "bad" if label[1] == "yes" else "good"
            said = f"<think>no: maybe</think>{label[1]}, the result is {result} in this case."
        if label and body.get("seed", 1) % 3 == 0 or "case 7:" in text:
            said = "That I cannot say today."
        good = 200, {}, {"choices": [{"message": {"content": server.say(said)}}]}
        spoilt = server.wrong.pop(0) if server.wrong else server.fault(body) or good
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
    server.fault, server.say = lambda body: None, lambda said: said
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
    assert "text alone: 1.000" in screen.out
    assert re.findall("warning: .*", screen.out) == [
        "warning: the question is the default one, 'Is the answer yes for the following text?'; "
        "--question sets yours"]


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


@pytest.mark.parametrize("say", [
    lambda said: said if " " in said else f'"{said.strip("*.").capitalize()}"',
    lambda said: said if " " in said else said.strip("*.").upper() + "!",
    lambda said: f"[THINK]no: so it is.[/THINK]{said}",
    lambda said: [{"type": "thinking", "thinking": []}, *({"type": "text", "text": half}
                                                          for half in (said[:2], said[2:]))]])
def test_in_whatever_form_a_server_answers(server, tmp_path, say):
    """Fails if the form of an answer decides about an explanation."""
    server.explain(tmp_path / "a")
    server.say = say
    server.explain(tmp_path / "b")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_a_teacher_without_a_single_success_is_stopped(server, tmp_path, capsys):
    """Fails if a bound that thinking uses up is reported as another check, or a whole file is asked
    for nothing, rows are lost by the stop, or the job cannot go on after it."""
    out = tmp_path / "out"
    part = part_of(out)
    server.explain(tmp_path / "whole", "--tries", "2")
    cut_off = 200, {}, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}

    def fault(body):
        case = re.search(r"case (\d+):", body["messages"][1]["content"])
        return cut_off if case and int(case[1]) < FIRST_ROWS + 3 else None

    server.fault = fault
    for _ in range(2):  # the second time, it had been stopped after seven rows
        with pytest.raises(ValueError, match=r"none of the first 20 rows got an explanation "
                           r"\(cut off: 40\); --max-answer 256 .*larger .*out.part") as error:
            server.explain(out, "--tries", "2")
        lines = part.read_text().splitlines(keepends=True)
        assert len(lines) == 1 + FIRST_ROWS and "refusal" not in str(error.value)
        part.write_text("".join(lines[: 1 + 7]))
    part.write_text("".join(lines))

    server.explain(out, "--tries", "2")  # it goes on, and is not stopped a second time
    done, whole = read_rows(out), read_rows(tmp_path / "whole")
    assert done[FIRST_ROWS + 3 :] == whole[FIRST_ROWS + 3 :]
    for row in done[: FIRST_ROWS + 3]:
        assert row["explanation_source"]["checks"] == ["cut off"] * 2
    assert "warning: --max-answer 256" in capsys.readouterr().out


def test_one_refused_row_does_not_end_the_file(server, tmp_path, capsys):
    """Fails if it does, if many refused rows do not, or if what a server refuses for a while is
    refused for good when the job continues."""
    def refuses(*cases):
        def fault(body):
            if any(f"case {case}:" in body["messages"][1]["content"] for case in cases):
                return 400, {}, {"error": {"code": "content_filter"}}
        return fault

    whole = tmp_path / "whole"
    server.fault = refuses(9, 19, 38)
    server.explain(whole)
    for row in read_rows(whole):
        refused = row.get("explanation_source", {}).get("checks") == ["refused"]
        assert refused == (row["id"] in ("r9", "r19", "r38"))
        assert not (refused and "explanation" in row)
        assert not refused or "content_filter" in row["explanation_source"]["refusal"]
    screen = capsys.readouterr().out
    assert "refused: 1" in screen and "the last refusal was at row 'r38'" in screen
    rows = read_rows(whole)
    unexplained = sum("explanation" not in row for row in rows)
    assert f"{whole}: {len(rows)} rows, of which {unexplained} are without an explanation" in screen

    out = tmp_path / "out"
    server.fault = refuses(9, *range(19, 40))
    for concurrency in ("1", "4"):  # the second time, it continues
        with pytest.raises(ValueError, match="refused 5 rows in a row; .*'r23'.*content_filter"):
            server.explain(out, "--concurrency", concurrency)
        assert len(part_of(out).read_text().splitlines()) == 1 + 19
    server.fault = refuses(9, 19, 38)
    server.explain(out)
    assert out.read_text() == whole.read_text()


@pytest.mark.parametrize("field, status, message, instead", [
    ("seed", 422, "extra field not permitted: seed", None),
    ("temperature", 400, "'temperature' does not support 0.7 with this model.", None),
    ("max_tokens", 400, "Unsupported: max_tokens. Use max_completion_tokens.",
     "max_completion_tokens")])
def test_a_field_that_a_server_does_not_take(
        server, tmp_path, capsys, field, status, message, instead):
    """Fails if it ends the job, is sent again and again, or is left out without a word."""
    bodies = []

    def fault(body):
        bodies.append(body)
        if field in body:
            return status, {}, {"error": {"message": message}}

    server.fault = fault
    server.explain(tmp_path / "out", "--concurrency", "4")
    with_it = [body for body in bodies if field in body]
    assert 1 <= len(with_it) <= 4 < len(bodies)  # one a thread
    for body in bodies:
        assert field in body or instead is None or body[instead] == 256
        assert len(body) == 6 - (field not in body and instead is None)
    assert "refused" not in (tmp_path / "out").read_text()
    said = f"does not take {field}: " + (f"sent as {instead}" if instead else "left out")
    assert capsys.readouterr().out.count(said) == 1


def test_a_value_that_a_server_does_not_take_is_not_left_out(server, tmp_path):
    """Fails if a job goes on with another value than its own."""
    reply = 400, {}, {"error": "temperature must be at most 0.5"}
    server.fault = lambda body: reply if body.get("temperature", 0) > 0.5 else None
    with pytest.raises(ValueError, match="refused 5 rows in a row; .*temperature must be"):
        server.explain(tmp_path / "out")


def test_an_address_without_v1_and_a_page_that_is_no_reply(server, tmp_path, monkeypatch):
    """Fails if the sentence does not say what came, or what is usually wrong then."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    out = tmp_path / "out"
    server.fault = lambda body: (404, {}, "page not found")
    with pytest.raises(ValueError, match="page not found.*; /v1 is usually part of the address"):
        server.explain(out, "--endpoint", server.url.removesuffix("/v1"))
    part_of(out).unlink()
    for reply in ("<html>Sign in \x9b", {"choices": None, "error": {"message": "Sign in"}}):
        server.fault = lambda body, reply=reply: (200, {}, reply)
        with pytest.raises(ValueError, match="chat completion in the reply: .*Sign in") as error:
            server.explain(out)
        assert printable(str(error.value)) == str(error.value)


def test_no_proxy_stands_before_this_machine(server, tmp_path, monkeypatch):
    """Fails if a local server is looked for behind the proxy of the environment."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.explain(tmp_path / "out", "--retries", "0")
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.9.9.9:8", "[::1]:80", "0.0.0.0"):
        assert is_this_machine(f"http://{host}/v1")
    for host in ("10.0.0.1", "localhost.example.com", "example.com:80", "[2001:db8::1]"):
        assert not is_this_machine(f"http://{host}/v1")


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
    """Fails if explain writes into a file that it did not begin, if a flag shows a key, or if a
    server is asked with settings that no prompt can be made with."""
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
    for flags, reason in ((["--labels", " ", "yes"], "expected two different words"),
                          (["--labels", "a\nb", "yes"], "no line break"),
                          (["--question", " "], "--question is blank"),
                          (["--max-prompt", "0"], "max-prompt is 0"),
                          (["--max-answer", "-5"], "max-answer is -5"),
                          (["--words", "80", "5"], "--words is 80 5")):
        with pytest.raises(ValueError, match=reason):
            server.explain(tmp_path / "x", *flags)
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

    monkeypatch.setattr("plumbing.teachers.choose_token", lambda logits, *_: torch.tensor([1]))
    args = Namespace(model=tiny, question="?", labels=["no", "yes"], format=None, max_prompt=99,
                     max_answer=3, dtype="float32", temperature=1, top_p=1)
    assert LocalTeacher(args).write(["a"], [0]) == ["<|im_start|>" * 3]
    # only <think>
    monkeypatch.setattr("plumbing.teachers.choose_token", lambda logits, *_: torch.tensor([3]))
    assert LocalTeacher(args).write(["a"], [0]) == [None]
