"""Rows, prompts and batches: bad input, markup in a text, exactly what is supervised."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import write_tokenizer

from data import DataError, Example, Prompts, collate, encode_rows, main, printable, read_rows
from data import show, split_valid

GOOD = {"text": "a text", "label": 1}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode()
                                for x in lines))
    return path


def test_rows_are_read_with_bom_and_crlf_and_without_unknown_fields(tmp_path):
    """Fails if a BOM or CRLF breaks a line, true is not 1, an id is not the line number, or a blank
    explanation counts as one."""
    lines = [json.dumps({**GOOD, "other": 1}), '{"text": "b", "label": false, "explanation": " "}']
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert read_rows(path) == [{**GOOD, "id": 1}, {"text": "b", "label": 0, "id": 2}]


BAD_LINES = {  # what the error says: the line
    "not JSON": b"{", "not a JSON object": [1], "nested": b"[" * 100000,
    "no text": {"label": 1}, "due is text that is not blank": {"text": " \n", "label": 1},
    "text is": b'{"text": "\\ud800", "label": 1}', "not UTF-8": b'{"text": "\xff", "label": 1}',
    "no label": {"text": "a"}, "label is 2": {**GOOD, "label": 2},
    'label is "1"': {**GOOD, "label": "1"}, "label is 1.0": {**GOOD, "label": 1.0},
    "NaN": b'{"text": "a", "label": 1, "probability": NaN}',
    "probability is 2": {**GOOD, "probability": 2},
    "probability is true": {**GOOD, "probability": True},
    "evidence is": {**GOOD, "evidence": "risk"}, "explanation is 5": {**GOOD, "explanation": 5},
    "group is 3": {**GOOD, "group": 3}, "id is 1.5": {**GOOD, "id": 1.5},
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


def test_files_that_are_wrong_as_a_whole(tmp_path):
    """Fails if an empty file, one class or a missing file is not said so, if only the first problem
    is shown, or a thousand are."""
    for words, lines in {"empty": [], "every label is 1": [GOOD, GOOD]}.items():
        with pytest.raises(DataError, match=words):
            read_rows(write(tmp_path / "x.jsonl", *lines))
    with pytest.raises(DataError, match="nowhere"):
        read_rows(tmp_path / "nowhere")
    unlabelled = write(tmp_path / "x.jsonl", {"text": "a"})
    assert read_rows(unlabelled, labels=False) == [{"text": "a", "id": 1}]
    with pytest.raises(DataError, match="and 4 more") as error:
        read_rows(write(tmp_path / "x.jsonl", *[{"label": 1}] * 14))
    assert str(error.value).count("no text") == 10


def test_validation_takes_whole_groups(rows):
    """Fails if a group stands on both sides, rows get lost, or the seed does not matter."""
    train, valid = split_valid(rows, 0.25, seed=0)
    assert len(train) + len(valid) == len(rows) and 10 <= len(valid) <= 12
    assert not {row["group"] for row in train} & {row["group"] for row in valid}
    again, other = (split_valid(rows, 0.25, seed)[1] for seed in (0, 1))
    assert again == valid != other
    with pytest.raises(DataError, match="one class"):
        split_valid(rows[6:10], 0.001, seed=0)


# --- prompts --------------------------------------------------------------------------------------
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
    """Fails if a tokenizer without chat tokens does not get `plain`, a frame without its tokens is
    accepted, or a token id beyond the embedding or a row beyond the positions gets through."""
    write_tokenizer(tmp_path, added=("<eos>",))
    config = {"eos_token_id": [0, 5], "vocab_size": 400, "max_position_embeddings": 2048}
    for key, value in (("vocab_size", 280), ("max_position_embeddings", 99)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"{key} is {value}"):
            Prompts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
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


def test_the_label_that_an_answer_states(tiny):
    """Fails if a word anywhere, or one that only begins like a label, counts as a statement, or
    "not likely" is read as the label "not"."""
    for answer, due in {
        "Yes. It is.": (1, "It is."), "no: none": (0, "none"), " YES": (1, ""), "": (None, ""),
        "No , but": (0, "but"), "Not sure.": (None, "Not sure."),
        "I say yes.": (None, "I say yes."), "Yesterday it": (None, "Yesterday it"),
        "No doubt. Yes.": (None, "No doubt. Yes."),
    }.items():
        assert Prompts(tiny).parse(answer) == due
    prompts = Prompts(tiny, labels=("likely", "likely, not"))
    assert prompts.parse("Likely, not. Why?") == (1, "Why?")
    assert prompts.parse("likely. x") == (0, "x")


# --- batches --------------------------------------------------------------------------------------
def test_exactly_the_answers_are_supervised(tiny, rows):
    """Fails if the prompt's last token, a pad, or a row without explanation is supervised, if the
    end of turn is not, or if a target is off by one."""
    prompts = Prompts(tiny)
    examples = encode_rows(rows[:5], prompts)
    batch = collate(examples)
    supervised = {}
    answers = (batch.answer_rows, batch.answer_positions, batch.targets)
    for row, position, target in torch.stack(answers, 1).tolist():
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
    batch = collate([Example(1, [5, 6, 7], [], 1, 0), Example(2, [5], [], 0, 0)])
    assert batch.targets.shape == (0,) and batch.prompt_end.tolist() == [2, 0]


def test_check_counts(tiny, rows, rows_file, capsys):
    """Fails if a count of the report is wrong, the shown row lacks its marks, or a row can send
    escape sequences to the terminal."""
    main(["check", str(rows_file), "--model", str(tiny), "--max-prompt", "140"])
    out = capsys.readouterr().out
    positives = sum(row["label"] for row in rows)
    lengths = np.array([len(Prompts(tiny).prompt(row["text"])[0]) for row in rows])
    for due in (
        f"{len(rows)}: {positives} Yes ({positives / len(rows):.1%})", "30; 10 rows without one",
        "20; 0 rows", "0 rows repeat", "prompt end", "supervised tokens",
        f"{(lengths > 140).sum()} texts lose {np.maximum(lengths - 140, 0).sum()}",
    ):
        assert due in out
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\nb\\u202e"
    example = encode_rows([{"id": 1, "text": "x\x1b[0m", "label": 0}], Prompts(tiny))[0]
    assert "\x1b" not in show(example, Prompts(tiny))


def test_leaks(tiny, tmp_path, capsys):
    """Fails if a shared group, id or text is not counted, a line number counts as an id, or a text
    that differs in a word is not near."""
    text = "the patient came with heart failure and left with supportive relatives at home"
    train = write(tmp_path / "a", {**GOOD, "group": "g"}, {"text": text, "label": 0, "id": "x"})
    test = write(tmp_path / "b", {"text": "new", "label": 0, "group": "g"}, GOOD,
                 {"text": text.replace("home", "sea"), "label": 1, "id": "x"})
    main(["check", str(train), "--test", str(test), "--model", str(tiny)])
    counts = re.findall(r"^(?:the|a) .*? +(\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert counts == ["1", "1", "1", "2"]
