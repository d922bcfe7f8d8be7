"""Rows, prompts and batches: bad input, markup in a text, exactly what is supervised."""

import json
import re
import signal as signals
import subprocess
import sys
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from subprocess import PIPE

import numpy as np
import pytest
from conftest import ROOT, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    SYSTEM,
    DataError,
    Example,
    Prompts,
    collate,
    encode_rows,
    faults,
    main,
    printable,
    read_rows,
    show,
    split_valid,
)

GOOD = {"text": "a text", "label": 1}


def write(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def test_rows_are_read_with_bom_and_crlf_and_without_unknown_fields(tmp_path):
    """Fails if a BOM or CRLF breaks a line, true is not 1, an id is not the line number, or a blank
    explanation counts as one."""
    path = tmp_path / "x.jsonl"
    lines = [
        json.dumps({**GOOD, "other": 1}),
        json.dumps({"text": "b", "label": False, "explanation": " "}),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert read_rows(path) == [{**GOOD, "id": 1}, {"text": "b", "label": 0, "id": 2}]


BAD_LINES = {
    "not JSON": b"{",
    "not a JSON object": [1],
    "no text": {"label": 1},
    "no label": {"text": "a"},
    "due is text that is not blank": {"text": " \n", "label": 1},
    "label is 2": {**GOOD, "label": 2},
    'label is "1"': {**GOOD, "label": "1"},
    "label is 1.0": {**GOOD, "label": 1.0},
    "not UTF-8": b'{"text": "\xff", "label": 1}',
    "NaN": b'{"text": "a", "label": 1, "probability": NaN}',
    "probability is 2": {**GOOD, "probability": 2},
    "probability is true": {**GOOD, "probability": True},
    "evidence is": {**GOOD, "evidence": "risk"},
    "group is 3": {**GOOD, "group": 3},
    "id is 1.5": {**GOOD, "id": 1.5},
    "explanation is 5": {**GOOD, "explanation": 5},
    "text is": b'{"text": "\\ud800", "label": 1}',
    "nested": b"[" * 100000,
    "id 'x' stands in line 1 already": {**GOOD, "id": "x"},
}


@pytest.mark.parametrize("words", BAD_LINES)
def test_a_bad_line_is_one_error_that_names_it(tmp_path, words):
    """Fails if the line passes, is dropped, or the error lacks file, line number or reason."""
    first = {"text": "b", "label": 0, "id": "x"}
    path = write(tmp_path / "x.jsonl", first, BAD_LINES[words], {**GOOD, "id": "y"})
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert f"{path}:2: " in str(error.value) and words in str(error.value)


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    """Fails if only the first problem is shown, or a thousand are."""
    path = write(tmp_path / "x.jsonl", *[{"label": 1}] * 14)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value).count("no text") == 10 and "and 4 more" in str(error.value)


def test_files_that_are_wrong_as_a_whole(tmp_path):
    """Fails if an empty file, one class or a missing file is not said so."""
    for words, lines in {"empty": [], "every label is 1": [GOOD, GOOD]}.items():
        with pytest.raises(DataError, match=words):
            read_rows(write(tmp_path / "x.jsonl", *lines))
    with pytest.raises(DataError, match="nowhere"):
        read_rows(tmp_path / "nowhere")
    assert read_rows(write(tmp_path / "x.jsonl", {"text": "a"}), labels=False) == [
        {"text": "a", "id": 1}
    ]


def test_validation_takes_whole_groups(rows):
    """Fails if a group stands on both sides, rows get lost, or the seed does not matter."""
    train, valid = split_valid(rows, 0.25, seed=0)
    assert len(train) + len(valid) == len(rows) and 10 <= len(valid) <= 12
    assert not {row["group"] for row in train} & {row["group"] for row in valid}
    assert (
        valid != split_valid(rows, 0.25, seed=1)[1] and valid == split_valid(rows, 0.25, seed=0)[1]
    )
    with pytest.raises(DataError, match="one class"):
        split_valid(rows[6:10], 0.001, seed=0)


# --- prompts --------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


def test_the_frame_is_the_tokenizers_own_chat_template(tiny):
    """Fails if a newline, a special token or a piece boundary differs from chatml."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny / "tokenizer.json"), chat_template=CHATML
    )
    prompts = Prompts(tiny, question="Will it?")
    for text in ("the day was long", "\n\n two lines\n", "é 中 12"):
        user = {"role": "user", "content": f"Will it?\n\n{text}"}
        messages = [{"role": "system", "content": SYSTEM}, user]
        due = theirs.apply_chat_template(messages, return_dict=False)
        assert prompts.prompt(text) == (due, 0), text


def special_ids(prompts):
    return {i for i, token in prompts.tokenizer.get_added_tokens_decoder().items()}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_text_never_acts_as_markup(tiny, data):
    """Fails if a text is encoded by the tokenizer that knows the added tokens, or one with
    `encode_special_tokens`, which lets <think> through."""
    prompts = Prompts(tiny)
    pieces = st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<think>", "<|endoftext|>", "a", "\n", " "]
    )
    text = "".join(data.draw(st.lists(pieces | st.text(max_size=3), min_size=1, max_size=8)))
    frame = [i for i in prompts.prompt("a")[0] if i in special_ids(prompts)]
    assert [i for i in prompts.prompt(text)[0] if i in special_ids(prompts)] == frame
    answer = prompts.answer(1, text)
    assert [i for i in answer if i in special_ids(prompts)] == [
        prompts.tokenizer.token_to_id("<|im_end|>")
    ]


def test_a_long_text_loses_its_middle_and_nothing_else(tiny):
    """Fails if the cut takes tokens from frame or question, from one end, or miscounts."""
    text = " ".join(f"w{i}" for i in range(60))
    whole, cut = Prompts(tiny, question="Will it die?").prompt(text)
    assert cut == 0
    for bound in (len(whole), len(whole) - 1, len(whole) - 30, len(whole) - 60):
        prompts = Prompts(tiny, question="Will it die?", max_prompt=bound)
        ids, cut = prompts.prompt(text)
        assert len(ids) == bound and cut == len(whole) - bound
        same = next((i for i in range(bound) if ids[i] != whole[i]), bound)
        assert ids[same:] == whole[same + cut :]  # one gap
        shown = prompts.tokenizer.decode(ids, skip_special_tokens=False)
        assert "Will it die?\n\nw0" in shown and shown.rstrip().endswith("<|im_start|>assistant")
    assert "w29" not in shown  # the gap is in the text's middle
    with pytest.raises(DataError, match="no room"):
        Prompts(tiny, max_prompt=20).prompt(text)


def test_the_prompt_does_not_depend_on_the_answer(tiny):
    """Fails if one bound holds for both, so that a long explanation cuts the text: a label leak."""
    prompts, row = Prompts(tiny, max_prompt=150), {"id": 1, "text": "w " * 99, "label": 1}
    short, long = encode_rows([row | {"explanation": e} for e in ("a", "b " * 60)], prompts)
    assert short.prompt == long.prompt and short.tokens_cut == long.tokens_cut > 0
    with pytest.raises(DataError, match="row 1: the answer takes"):
        encode_rows([row | {"explanation": "b " * 200}], Prompts(tiny, max_answer=64))


def test_plain_and_unknown_frames(tmp_path):
    """Fails if a tokenizer without chat tokens does not get `plain`, or a frame without its tokens
    is accepted."""
    write_tokenizer(tmp_path, added=("<eos>",))
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 5]}')
    prompts = Prompts(tmp_path)
    assert prompts.format == "plain" and prompts.stop_ids == [0, 5]
    assert prompts.decode(prompts.prompt("a text")[0]).endswith("a text\n\nAnswer:\n")
    with pytest.raises(ValueError, match="no token <|im_start|>"):
        Prompts(tmp_path, format="chatml")
    with pytest.raises(ValueError, match="two different words"):
        Prompts(tmp_path, labels=("Yes", "yes"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Prompts(tmp_path)


@pytest.mark.parametrize("key, value", [("vocab_size", 280), ("max_position_embeddings", 99)])
def test_a_model_too_small_for_tokenizer_or_bounds_is_refused(tmp_path, key, value):
    """Fails if a token id beyond the embedding, or a row beyond the positions, gets through."""
    write_tokenizer(tmp_path)
    config = {"eos_token_id": 2, "vocab_size": 400, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Prompts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        Prompts(tmp_path)


@pytest.mark.parametrize(
    "answer, due",
    [
        ("Yes. It is.", (1, "It is.")),
        ("no: none", (0, "none")),
        (" YES", (1, "")),
        ("No , but", (0, "but")),
        ("Not sure.", (None, "Not sure.")),
        ("Yesterday it", (None, "Yesterday it")),
        ("", (None, "")),
        ("I say yes.", (None, "I say yes.")),
        ("No doubt. Yes.", (None, "No doubt. Yes.")),
    ],
)
def test_the_label_that_an_answer_states(tiny, answer, due):
    """Fails if a word anywhere, or one that only begins like a label, counts as a statement."""
    assert Prompts(tiny).parse(answer) == due


def test_the_longer_label_word_is_tried_first(tiny):
    """Fails if "not likely" is read as the label "not"."""
    prompts = Prompts(tiny, labels=("likely", "likely, not"))
    assert prompts.parse("Likely, not. Why?") == (1, "Why?") and prompts.parse("likely. x") == (
        0,
        "x",
    )


# --- batches --------------------------------------------------------------------------------------


def test_exactly_the_answers_are_supervised(tiny, rows):
    """Fails if the prompt's last token, a pad, or a row without explanation is supervised, if the
    end of turn is not, or if a target is off by one."""
    prompts = Prompts(tiny)
    examples = encode_rows(rows[:5], prompts)
    batch = collate(examples)
    supervised = {}
    for row, position, target in zip(
        batch.answer_rows.tolist(),
        batch.answer_positions.tolist(),
        batch.targets.tolist(),
        strict=True,
    ):
        assert batch.input_ids[row, position + 1] == target
        supervised.setdefault(row, {})[position + 1] = target
    assert set(supervised) == {1, 2, 3}  # rows 0 and 4 have no explanation
    for i, row in enumerate(rows[:5]):
        end = batch.prompt_end[i].item()
        assert batch.input_ids[i, : end + 1].tolist() == prompts.prompt(row["text"])[0]
        if i in supervised:
            assert list(supervised[i]) == list(range(end + 1, len(examples[i])))
            word = "Yes" if row["label"] else "No"
            text = prompts.tokenizer.decode(list(supervised[i].values()), skip_special_tokens=False)
            assert text == f"{word}. {row['explanation']}<|im_end|>"
        assert batch.labels[i] == row["label"]


def test_an_all_unexplained_batch_has_no_targets():
    """Fails if padding becomes a target when no row has an answer."""
    batch = collate([Example(1, [5, 6, 7], [], 1, 0), Example(2, [5], [], 0, 0)])
    assert batch.targets.shape == (0,) and batch.prompt_end.tolist() == [2, 0]


def test_what_is_printed_has_no_control_characters(tiny):
    """Fails if a row can send escape sequences to the terminal."""
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\nb\\u202e"
    example = encode_rows([{"id": 1, "text": "x\x1b[0m", "label": 0}], Prompts(tiny))[0]
    assert "\x1b" not in show(example, Prompts(tiny))


def test_check_counts(tiny, rows, rows_file, capsys):
    """Fails if a count of the report is wrong or the shown row lacks its marks."""
    main(["check", str(rows_file), "--model", str(tiny), "--max-prompt", "140"])
    out = capsys.readouterr().out
    positives = sum(row["label"] for row in rows)
    assert f"{len(rows)}: {positives} Yes ({positives / len(rows):.1%})" in out
    assert "30; 10 rows without one" in out and "20; 0 rows" in out and "0 rows repeat" in out
    lengths = [len(Prompts(tiny).prompt(row["text"])[0]) for row in rows]
    assert (
        f"{sum(n > 140 for n in lengths)} texts lose {sum(np.maximum(np.array(lengths) - 140, 0))}"
        in out
    )
    assert "prompt end" in out and "supervised tokens" in out


# --- explanations by a teacher --------------------------------------------------------------------
ROW = {"id": 1, "label": 1, "text": "Mary, 64, came with severe heart failure; <b>alert</b>."}
ARGS = Namespace(question="Did Mary die?", labels=["no", "yes"], words=[4, 12], grounded=0.3)
FAULTS = {
    "label": "No, the heart failure was severe.",
    "told": "The given label says severe heart failure.",
    "grounded": "Breathing problems are severe dangers everywhere.",
    "numbers": "Severe heart failure at age 65.",
    "length": "Severe heart failure.",
    "unfinished": "The severe heart failure of this",
    "loop": "Severe heart failure severe heart failure severe heart failure severe heart.",
    "prompt": "Explain which facts in the text lead: severe heart failure.",
    "markup": "Severe heart failure </s> was there.",
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_rejects_what_only_it_rejects(name):
    """Fails if the check is gone (each was taken out once), or another is so strict."""
    assert faults(FAULTS[name], ROW, ARGS) == [name]
    assert faults("There was no hope; severe heart failure at 64.", ROW, ARGS) == []


class Teacher(BaseHTTPRequestHandler):
    """A chat-completions server. Each of server.wrong (status, headers, reply) spoils one request;
    status 0 hangs up, -1 is slow."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = body["messages"][1]["content"], self.server
        server.seen.append((self.headers["Authorization"], body))
        said = "**Yes**" if "bad" in text else "no."  # as a reader, and to a row's text alone
        if label := re.search('The answer is "(.*?)"', text):
            result = "bad" if label[1] == "yes" else "good"
            said = f"<think>no: maybe</think>{label[1]}, the result is {result} in this case."
            if body["seed"] % 3 == 0 or "case 7:" in text:
                said = "That I cannot say today."
        reply = {"choices": [{"message": {"content": said}}]}
        status, headers, reply = server.wrong.pop(0) if server.wrong else (200, {}, reply)
        threading.Event().wait(1 if status < 0 else server.delay)
        if status > 0:
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.wrong, server.seen, server.delay = [], [], 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def labels_file(rows, tmp_path):
    """The rows without explanations, but for the last one, which has its own."""
    lines = [{k: v for k, v in row.items() if k != "explanation"} for row in rows[:-1]] + rows[-1:]
    return write(tmp_path / "labels.jsonl", *lines)


def flags(server, data, out, *more):
    return ["explain", "--data", str(data), "--out", str(out), "--endpoint", server.url,
            "--teacher", "t", "--retries", "3", *more]


def test_a_server_explains_rows_in_order_and_drops_none(server, labels_file, tmp_path, monkeypatch,
                                                        rows, capfd):
    """Fails if a row is lost or moved, thoughts or the label's word are kept, an own explanation is
    replaced, the key is missing or stands in a file or on the screen, or a count is wrong."""
    monkeypatch.setenv("KEY", "sk-secret")
    out = tmp_path / "train.jsonl"
    main(flags(server, labels_file, out, "--key-env", "KEY", "--tries", "2", "--concurrency", "3"))
    done = read_rows(out)
    assert [row["id"] for row in done] == [row["id"] for row in rows] and done[-1] == rows[-1]
    kept = [row for row in done[:-1] if "explanation" in row]
    assert 25 < len(kept) < 39 and "explanation" not in done[7]
    for row in kept:
        result = "bad" if row["label"] else "good"
        assert row["explanation"] == f"The result is {result} in this case."
        checks, zero_shot = (row["explanation_source"][key] for key in ("checks", "zero_shot"))
        assert checks in (["passed"], ["grounded", "passed"]) and zero_shot == row["label"]
    assert done[7]["explanation_source"]["checks"] == ["grounded", "grounded"]
    assert {key for key, _ in server.seen} == {"Bearer sk-secret"}
    screen = capfd.readouterr()
    assert "sk-secret" not in "".join(screen) + "".join(p.read_text() for p in tmp_path.iterdir())
    positive = [row for row in kept if row["label"]]
    assert f"yes: {len(positive)} of {sum(r['label'] for r in rows[:-1])} rows" in screen.out
    assert "AUROC from the text alone: 1.000" in screen.out


def test_what_may_pass_is_tried_again(server, labels_file, tmp_path, monkeypatch):
    """Fails if a 429, its Retry-After, a 500, a dropped or slow connection or a malformed reply
    ends the run, or changes what is written."""
    waits, out = [], [tmp_path / "a", tmp_path / "b"]
    main(flags(server, labels_file, out[0]))
    monkeypatch.setattr("time.sleep", waits.append)
    chat = {"choices": [{"message": {"content": [1]}}]}
    server.wrong += [(429, {"Retry-After": "7"}, {}), (500, {}, {}), (0, {}, {}), (-1, {}, {}),
                     (200, {}, {}), (200, {}, [1]), (200, {}, chat)]
    main(flags(server, labels_file, out[1], "--retries", "7", "--concurrency", "1",
               "--timeout", "0.5"))
    assert waits == [7, 2, 4, 8, 16, 32, 64] and out[0].read_text() == out[1].read_text()


@pytest.mark.parametrize("status, words", [(404, "HTTP 404 .*no model t .key."), (500, "HTTP 500"),
                                           (0, "closed connection"), (200, "no chat completion")])
def test_a_server_that_fails_ends_in_a_sentence(server, labels_file, tmp_path, monkeypatch, status,
                                                words):
    """Fails if a 404 is tried again, the rest for ever, the key or a control character is shown, or
    the rows before are lost."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("KEY", "sk-secret")
    out, reply = tmp_path / "out", {"error": {"message": "no model t sk-secret \x9b"}}
    arguments = flags(server, labels_file, out, "--key-env", "KEY", "--concurrency", "1")
    main(arguments)
    whole, requests = out.read_text(), len(server.seen)
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:20]) + lines[20][:30])
    server.wrong += [(status, {}, reply)] * 4
    with pytest.raises(ValueError, match=words) as error:
        main(arguments)
    assert "sk-secret" not in str(error.value) and printable(str(error.value)) == str(error.value)
    asked = ["case 20:" in str(body["messages"]) for _, body in server.seen[requests:]]
    assert sum(asked) == (1 if status == 404 else 4)
    assert out.read_text() == "".join(lines[:20])
    server.wrong.clear()
    main(arguments)
    assert out.read_text() == whole
    requests = len(server.seen)
    main(arguments)
    assert len(server.seen) == requests and out.read_text() == whole


@pytest.mark.parametrize("signal, code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_where_it_was(server, labels_file, tmp_path, signal, code):
    """Fails if lines are written at the end only, a stop loses or doubles a row, Ctrl-C waits for
    replies or shows a traceback, or a run with other arguments or other rows goes on."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    main(flags(server, labels_file, undisturbed))
    arguments, server.delay = flags(server, labels_file, out), 0.02
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *arguments], stderr=PIPE)
    while not (out.exists() and out.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.01)
    server.delay = 30
    process.send_signal(getattr(signals, signal))
    assert process.wait(timeout=4) == code and b"Traceback" not in process.stderr.read()
    server.delay, lines = 0, out.read_text().count("\n")
    assert 3 < lines < 40
    for other in (["--seed", "1"], ["--question", "Is it?"]):
        with pytest.raises(ValueError, match="other arguments"):
            main([*arguments, *other])
    main(arguments)
    assert out.read_text() == undisturbed.read_text()


def test_foreign_output_and_impossible_flags_are_refused(server, labels_file, tmp_path):
    """Fails if explain writes into a file that it did not begin, or a flag shows a key."""
    content = labels_file.read_bytes()
    with pytest.raises(ValueError, match=f"{labels_file}:1: written with other arguments"):
        main(flags(server, labels_file, labels_file))
    assert labels_file.read_bytes() == content  # without a last new line: not even cut
    for words, more in {
        "--endpoint": ["--endpoint", "http://me:sk-secret@host/v1"],
        "--key-env": ["--key-env", "sk-secret"], "--tries": ["--tries", "0"],
        "--top-p": ["--top-p", "2"], "no such folder": ["--out", "a/b"],
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            main(flags(server, labels_file, tmp_path / "x", *more))
        assert "sk-secret" not in str(error.value)
    assert not server.seen


def test_a_local_teachers_draws_depend_on_seed_row_and_try_only(tiny, labels_file, tmp_path, capsys,
                                                                 monkeypatch):
    """Fails if one generator serves a batch, tries repeat a draw, resuming or the batch changes a
    line, or the reader passes the wrong side of .5."""
    monkeypatch.setattr("data.faults", lambda text, row, args: [])
    texts = {}
    for batch, seed in ((1, 0), (40, 0), (7, 1), (7, 0)):
        arguments = ["explain", "--model", str(tiny), "--data", str(labels_file), "--batch",
                     str(batch), "--seed", str(seed), "--max-answer", "8", "--tries", "2", "--dtype",
                     "float32", "--out", str(out := tmp_path / f"{batch}-{seed}")]
        main(arguments)
        texts[batch, seed] = re.findall(r'"(?:id|explanation)": ".*?"', out.read_text())
    assert texts[1, 0] == texts[7, 0] == texts[40, 0] != texts[7, 1]
    assert len(set(texts[7, 0])) > 55 and "warning" in capsys.readouterr().out
    whole = out.read_text()
    out.write_text(whole[: whole.index("r17")])  # in the middle of a batch, and of a line
    main(arguments)
    assert out.read_text() == whole


def test_leaks(tiny, tmp_path, capsys):
    """Fails if a shared group, id or text is not counted, a line number counts as an id, or a text
    that differs in a word is not near."""
    text = "the patient came with heart failure and left with supportive relatives at home"
    train = write(tmp_path / "a", {**GOOD, "group": "g"}, {"text": text, "label": 0, "id": "x"})
    test = write(tmp_path / "b", {"text": "new", "label": 0, "group": "g"}, GOOD,
                 {"text": text.replace("home", "sea"), "label": 1, "id": "x"})
    main(["check", str(train), "--test", str(test), "--model", str(tiny)])
    out = capsys.readouterr().out
    assert re.findall(r"^(?:the|a) .*? +(\d+)$", out, re.MULTILINE) == ["1", "1", "1", "2"]
