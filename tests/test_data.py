"""Rows and batches: bad input, validation rows, exactly what is supervised, what is printed."""

import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_rows

from data import Example, collate, encode_rows, main, read_rows, show
from plumbing.near_texts import count_near_texts
from plumbing.remarks import remarks
from plumbing.script import printable
from plumbing.split import split_valid, split_valid_formerly
from prompts import Prompts

GOOD = {"text": "a text", "label": 1}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode()
                                for x in lines))
    return path


def test_rows_are_read_with_bom_and_crlf_and_without_unknown_fields(tmp_path):
    """Fails if a BOM, CRLF or a blank line at the end breaks a file, true is not 1, an id is not
    the line number, or a blank explanation or group counts as one."""
    lines = [json.dumps({**GOOD, "other": 1}),
             '{"text": "b", "label": false, "explanation": " ", "group": " "}', "", " \t", ""]
    path = write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_rows(path) == [{**GOOD, "id": 1}, {"text": "b", "label": 0, "id": 2}]


def test_a_group_may_be_a_number(tmp_path):
    """Fails if a number is refused, or 17 and "17" are two groups."""
    groups = [17, "17", 17.0, 1.5]
    path = write(tmp_path / "x.jsonl", *[
        {"text": "a", "label": i % 2, "group": group} for i, group in enumerate(groups)])
    assert [row["group"] for row in read_rows(path)] == ["17", "17", "17", "1.5"]


@pytest.mark.parametrize("label", [-1, "", "unknown", 1.0, None, [1]])
def test_a_prediction_needs_no_usable_label(tmp_path, label):
    """Fails if a file for predictions is refused for a label that nobody reads, or keeps it."""
    path = write(tmp_path / "x.jsonl", GOOD, {"text": "b", "label": label})
    assert read_rows(path, labels=False) == [{**GOOD, "id": 1}, {"text": "b", "id": 2}]


@pytest.mark.parametrize("fields, words", [
    ({"rationale": "a"}, ["'rationale' (2 rows; is explanation meant?)"]),
    ({"Explanaton": "a"}, ["'Explanaton' (2 rows; is explanation meant?)"]),
    ({"group_id": 5}, ["'group_id' (2 rows; is group meant?)"]),
    ({"group": 5, "patient_id": 5}, ["'patient_id' (2 rows)"]),
    ({"age\x1b": 5, "\ud800": 1}, [r"'age\x1b' (2 rows)", r"'\ud800' (2 rows)"]),
    ({f"column {i}": i for i in range(14)}, [", 4 more"]),
    ({"evidence": [], "other": None}, ["'other' (2 rows)"])])
def test_fields_that_nothing_reads_are_named_once(tmp_path, capsys, fields, words):
    """Fails if a misspelt field is lost without a word, or one is blamed that is fine."""
    path = write(tmp_path / "x.jsonl", {**GOOD, **fields}, {"text": "b", "label": 0, **fields})
    read_rows(path)
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {path}: ") and out.count("\n") == 1
    assert all(word in out for word in words)
    assert len(re.findall(r"\(2 rows", out)) == min(len(fields.keys() - {"group", "evidence"}), 10)


@pytest.mark.parametrize("row, words", [
    ({"sentence": "a", "label": 1}, "no text; is it 'sentence'?"),
    ({"text": "a", "Labels": 1}, "no label; is it 'Labels'?")])
def test_a_field_that_must_be_there_is_found_under_another_name(tmp_path, row, words):
    """Fails if "no text" leaves the user to look for a column of another name."""
    with pytest.raises(ValueError, match=re.escape(words)):
        read_rows(write(tmp_path / "x.jsonl", row))


# --- other forms ----------------------------------------------------------------------------------
ROWS = [{"text": 'a "text", with\nlines', "label": 1, "explanation": "é; it's"},
        {"text": "b", "label": 0}]
TABLE = 'text,label,explanation\r\n"a ""text"", with\nlines",1,é; it\'s\r\nb,0,\r\n'


def as_lines(*labels):
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)]
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize("name, content, words", [
    ("x.csv", TABLE, "a table"), ("x.txt", "\ufeff" + TABLE, "a table"),
    ("x.tsv", TABLE.replace(",", "\t").replace("\t with", ", with"), "a table"),
    ("x.csv", TABLE.replace(";", ",").replace(",", ";").replace("é;", "é,").replace("; w", ", w")
     .replace("é, it's", '"é; it\'s"'), "a table"),
    ("x.json", json.dumps(ROWS, indent=1), "a JSON array"), ("x.json", json.dumps(ROWS), "array"),
    ("x y.jsonl.gz", as_lines(1, 0), "a gzip file"),
    ("x.jsonl", as_lines("yes", "no"), 'are "no" and "yes"'),
    ("x.jsonl", as_lines(" O'Hara", "Ada\n") + "\n\n", '"ada" and "o\'hara"'),
    ("x.jsonl", as_lines("1", "0"), 'are "0" and "1"'),
    ("x.jsonl", as_lines(1, -1), 'are "-1" and "1"'),
    ("x.jsonl", as_lines(2, 1), 'are "1" and "2"'),
    ("x.jsonl", as_lines(1.0, 0.0), 'are "0.0" and "1.0"')])
def test_another_form_is_refused_with_the_command_that_converts_it(tmp_path, name, content, words):
    """Fails if a form is not recognised, or its command does not make the same rows when pasted."""
    path = tmp_path / name
    path.write_bytes(content.encode() if ".gz" not in name else gzip.compress(content.encode()))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_rows(path)
    command = str(error.value).split("\n")[-1]
    assert command.startswith("python -c ")
    command = command.replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (converted,) = tmp_path.glob("*.converted.jsonl")
    assert read_rows(converted) == [{**row, "id": i} for i, row in enumerate(ROWS, 1)]


def test_no_command_is_advised_where_it_would_not_help(tmp_path):
    """Fails if two of three words are made 0 and 1, or a stray label is taken for a class."""
    for labels in (["yes", "no", "maybe"], [0, 1, "1"], [0, 1, 2], [True, False, "no"]):
        rows = [{"text": "a", "label": label} for label in labels]
        with pytest.raises(ValueError, match="label is") as error:
            read_rows(write(tmp_path / "x.jsonl", *rows))
        assert "python -c" not in str(error.value)


BAD_LINES = {  # what the error says: the line
    "the line is blank": b" \t", "not JSON": b"{", "not a JSON object": [1],
    "nested": b"[" * 100000,
    "no text": {"label": 1}, "expected text that is not blank": {"text": " \n", "label": 1},
    "text is": b'{"text": "\\ud800", "label": 1}', "not UTF-8": b'{"text": "\xff", "label": 1}',
    "no label": {"text": "a"}, "label is 2": {**GOOD, "label": 2},
    'label is "1"': {**GOOD, "label": "1"}, "label is 1.0": {**GOOD, "label": 1.0},
    "NaN": b'{"text": "a", "label": 1, "probability": NaN}',
    "probability is 2": {**GOOD, "probability": 2},
    "probability is true": {**GOOD, "probability": True},
    "evidence is": {**GOOD, "evidence": "risk"}, "explanation is 5": {**GOOD, "explanation": 5},
    "group is true": {**GOOD, "group": True}, "id is 1.5": {**GOOD, "id": 1.5},
    "id 'x' is in line 1 already": {**GOOD, "id": "x"},
}


@pytest.mark.parametrize("words", BAD_LINES)
def test_a_bad_line_is_one_error_that_names_it(tmp_path, words):
    """Fails if the line passes, is dropped, or the error lacks file, line number or reason."""
    first = {"text": "b", "label": 0, "id": "x"}
    path = write(tmp_path / "x.jsonl", first, BAD_LINES[words], {**GOOD, "id": "y"})
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert f"{path}:2: " in str(error.value) and words in str(error.value)


def test_files_that_are_wrong_as_a_whole(tmp_path):
    """Fails if an empty file, one class or a missing file is not said so, if only the first problem
    is shown, or a thousand are."""
    for words, lines in {"empty": [], "every label is 1": [GOOD, GOOD]}.items():
        with pytest.raises(ValueError, match=words):
            read_rows(write(tmp_path / "x.jsonl", *lines))
    with pytest.raises(ValueError, match="nowhere"):
        read_rows(tmp_path / "nowhere")
    unlabelled = write(tmp_path / "x.jsonl", {"text": "a"})
    assert read_rows(unlabelled, labels=False) == [{"text": "a", "id": 1}]
    with pytest.raises(ValueError, match="and 4 more") as error:
        read_rows(write(tmp_path / "x.jsonl", *[{"label": 1}] * 14))
    assert str(error.value).count("no text") == 10


# --- validation rows ------------------------------------------------------------------------------
def test_validation_takes_whole_groups(rows):
    """Fails if a group stands on both sides, rows get lost, or the seed does not matter."""
    train, valid = split_valid(rows, 0.25, seed=0)
    assert len(train) + len(valid) == len(rows) and 10 <= len(valid) <= 12
    assert not {row["group"] for row in train} & {row["group"] for row in valid}
    again, other = (split_valid(rows, 0.25, seed)[1] for seed in (0, 1))
    assert again == valid != other


def grouped(*sizes, positive=lambda i: i % 5 < 2):
    """Rows in groups of these sizes; a group of one row has no name."""
    rows = []
    for number, size in enumerate(sizes):
        for _ in range(size):
            row = {"id": len(rows), "text": "a", "label": int(positive(len(rows)))}
            if size > 1:
                row["group"] = f"g{number}"
            rows.append(row)
    return rows


@pytest.mark.parametrize("fraction, rows, count, positives", [
    (0.1, grouped(180, 20), 20, 8),  # the small group, and never the large one
    (0.9, grouped(180, 20), 180, 72),
    (0.1, grouped(*[1] * 1000), 100, 40),  # rows alone: exactly, with the share of each class
    (0.1, grouped(*[1] * 20), 2, 1),  # two rows at the least
    (0.1, grouped(*[1] * 5), 2, 1),
    (0.1, grouped(*[1] * 1000, positive=lambda i: i % 400 == 7), 101, 1),  # three positives
    (0.1, grouped(500, *[10] * 50), 100, 40),  # the first group alone is too large
    (0.1, grouped(*[20] * 10, positive=lambda i: i < 80), 40, 20),  # each group of one class
    (0.1, grouped(*[22] * 5, *[18] * 5, positive=lambda i: i >= 110), 40, 18),
    (0.1, grouped(*[41] * 5), 41, 17)])  # twice the fraction, at the most
def test_the_split_comes_nearest_to_the_fraction_of_each_class(fraction, rows, count, positives):
    """Fails if groups are taken without a look at their rows, or their classes."""
    for seed in range(5):
        train, valid = split_valid(rows, fraction, seed)
        assert len(valid) == count and sum(row["label"] for row in valid) == positives
        for side in (train, valid):
            assert {row["label"] for row in side} == {0, 1}


@pytest.mark.parametrize("fraction, sizes", [
    (0.2, [(143, 139), (26, 1), (0, 21), (177, 21)]),  # the group that is taken first is too large
    (0.3, [(33, 8), (34, 25), (251, 0), (28, 6)]),  # what comes nearest has all rows of class 1
])
def test_a_split_that_can_be_is_found(fraction, sizes):
    """Fails if a group is taken that leaves no way out, though one without it is left."""
    rows = []
    for number, counts in enumerate(sizes):
        for label, count in enumerate(counts):
            rows += [{"id": 1, "label": label, "group": f"g{number}"}] * count
    for seed in range(5):
        _, valid = split_valid(rows, fraction, seed)
        assert fraction / 2 <= len(valid) / len(rows) <= 2 * fraction


@pytest.mark.parametrize("rows, words", [
    (grouped(50, 50, 50, 50), r"takes 10 to 40 rows .* the largest is group 'g0' \(50 rows\)"),
    (grouped(195, 5), r"takes 10 to 40 rows .* the largest is group 'g0' \(195 rows\)"),
    (grouped(*[1] * 9, positive=lambda i: i == 7), "one class .* of label 1 are in row 7;"),
    (grouped(10, 90, positive=lambda i: i < 10), r"label 0 are in group 'g1' \(90 rows\)")])
def test_no_choice_of_groups_is_refused_by_name(rows, words):
    """Fails if validation may be most of the file, or a refusal does not say which group it is."""
    with pytest.raises(ValueError, match=words + ".* give --valid, or another --valid-fraction"):
        split_valid(rows, 0.1, seed=0)


def test_a_hundred_thousand_rows_are_split():
    """Fails if the work grows with the square of the rows: it would run for hours."""
    train, valid = split_valid(grouped(*[1] * 100_000), 0.1, seed=0)
    assert len(valid) == 10_000 and sum(row["label"] for row in valid) == 4000


def test_the_former_split_is_what_it_was(tmp_path):
    """Fails if a training that was stopped before would continue on other rows; these ids are from
    the code of then. A blank group was a group."""
    path = write(tmp_path / "x.jsonl", *[
        {"text": f"t{i}", "label": i % 2, "group": ["a", "", None][i % 3] if i < 15 else "b"}
        for i in range(30)])
    for seed, ids in {0: [3, 9, 6, 15, 12, 1, 4, 7, 10, 13],
                      4: [2, 5, 8, 11, 14, 3, 1, 4, 7, 10, 13]}.items():
        _, valid = split_valid_formerly(path, read_rows(path), 0.3, seed)
        assert [row["id"] for row in valid] == ids


# --- batches --------------------------------------------------------------------------------------
def test_exactly_the_answers_are_supervised(tiny, rows):
    """Fails if the prompt's last token, a pad, or a row without explanation is supervised, if the
    end of turn is not, if a target is off by one, or if an explanation without a label passes."""
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
    with pytest.raises(ValueError, match="row 7: it has an explanation, but no label"):
        encode_rows([{"id": 7, "text": "a", "explanation": "b"}], prompts)
    batch = collate([Example(1, [5, 6, 7], [], 1, 0), Example(2, [5], [], 0, 0)])
    assert batch.targets.shape == (0,) and batch.prompt_end.tolist() == [2, 0]


def test_the_command_counts(tiny, rows, rows_file, capsys):
    """Fails if a count of the report is wrong, the shown row lacks its marks, or a row can send
    escape sequences to the terminal."""
    main([str(rows_file), "--model", str(tiny), "--max-prompt", "140"])
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
    assert "explain.py writes some" not in out


def test_a_file_of_labels_alone_is_pointed_to_explain(tiny, rows, tmp_path, capsys):
    """Fails if a user with labels alone is not told how to get explanations."""
    plain = [{"text": row["text"], "label": row["label"]} for row in rows]
    main([str(write_rows(tmp_path / "x.jsonl", plain)), "--model", str(tiny)])
    out = capsys.readouterr().out
    assert "explain.py writes some" in out and "explanations  0; 40 rows without one" in out
    assert "answers" not in out


def test_leaks(tiny, tmp_path, capsys):
    """Fails if a shared group, id or text is not counted, a line number counts as an id, an id that
    is its line's number does not, or a text that differs in a word is not near."""
    text = "the patient came with heart failure and left with supportive relatives at home"
    train = write(tmp_path / "a", {**GOOD, "group": "g"}, {"text": text, "label": 0, "id": "x"})
    test = write(tmp_path / "b", {"text": "new", "label": 0, "group": "g"}, GOOD,
                 {"text": text.replace("home", "sea"), "label": 1, "id": "x"})

    def shared_with(train, test):
        main([str(train), "--test", str(test), "--model", str(tiny)])
        out = capsys.readouterr().out
        assert f"of {len(read_rows(test))} test rows, this many share with a training row:" in out
        counts = re.findall(r"^(group|id|text|near text) +(\d+)$", out, re.MULTILINE)
        return {name: int(count) for name, count in counts}

    assert shared_with(train, test) == {"group": 1, "id": 1, "text": 1, "near text": 2}

    # Ids count as the files give them: 1 and 3 are shared. The training row of line 2 is not called
    # 2, and the test row of line 4 is not called 4
    train = write(tmp_path / "a", {**GOOD, "id": 1}, {"text": "b", "label": 0},
                  {**GOOD, "id": "3"}, {**GOOD, "id": 4})
    test = write(tmp_path / "b", {"text": "c", "label": 0, "id": 3}, {"text": "d", "label": 1,
                 "id": 2}, {"text": "e", "label": 1, "id": 1}, {"text": "f", "label": 1})
    assert shared_with(train, test) == {"group": 0, "id": 2, "text": 0, "near text": 0}


# --- what is odd ----------------------------------------------------------------------------------
NO = "The result is good."
YES = "It is bad."


@pytest.mark.parametrize("explanations, words", [  # of the labels 1, 0, 1, 0; texts a, b, c, d
    ([YES, None, YES, None], "none of the 2 No rows has an explanation, but 2 of the 2 Yes rows"),
    ([None, NO, None, None], "none of the 2 Yes rows has an explanation, but 1 of the 2 No rows"),
    (["No. " + YES, NO, "no", "Yes: x"], "the other label in 3 rows (2 Yes, 1 No; the first: 'a', "
     "'c', 'd'), as 'No. It is bad.'"),
    (["Yes. " + YES, NO, YES, NO], "its own label word in 1 rows (1 Yes, 0 No; the first: 'a'); "
     "training puts the word before it once more: 'Yes. Yes. It is bad.'"),
    ([YES, NO, "No evidence of good.", "Yesterday it was good."], None),
    ([None, None, None, None], None)])
def test_odd_explanations_are_counted_by_class(tiny, explanations, words):
    """Fails if one class is explained, or a text contradicts its label, without a word."""
    rows = []
    for name, label, explanation in zip("abcd", (1, 0, 1, 0), explanations, strict=True):
        row = {"id": name, "text": name, "label": label}
        rows.append(row | ({"explanation": explanation} if explanation else {}))
    found = remarks(rows, Prompts(tiny))
    assert len(found) == (words is not None) and (not words or words in found[0])


def test_a_text_with_both_labels_is_odd(tiny, rows):
    """Fails if equal rows with opposite labels pass without a word, or equal labels do not."""
    again = [{**rows[0], "id": "x"}, {**rows[1], "id": "y", "label": 1 - rows[1]["label"]}]
    (found,) = remarks(rows + again, Prompts(tiny))
    assert "the same text has both labels in 2 rows (1 Yes, 1 No; the first: 'r1', 'y')" in found


def test_the_default_question_is_said_to_be_one(tiny, rows_file, capsys):
    """Fails if a forgotten --question goes unnoticed, or a given one is complained of."""
    for flags, expected in (([], True), (["--question", "Is it bad?"], False)):
        main([str(rows_file), "--model", str(tiny), *flags])
        out = capsys.readouterr().out
        assert ("warning: the question is the default one" in out) == expected
        assert ("question      Is it bad?" in out) != expected


# --- near-duplicates ------------------------------------------------------------------------------
def texts_of(alphabet, join, rng):
    """30 random texts of 60 units."""
    return [join.join(rng.choice(alphabet, 60)) for _ in range(30)]


ALPHABETS = {
    "english": ([f"word{i}" for i in range(500)], " "),
    "chinese": ([chr(0x4E00 + i) for i in range(500)], ""),
    "japanese": ([chr(0x3041 + i) for i in range(80)], ""),
    "thai": ([chr(0x0E01 + i) for i in range(46)], ""),
}


@pytest.mark.parametrize("language", ALPHABETS)
@pytest.mark.parametrize("header", [0, 200])
def test_near_copies_are_found_in_any_script(language, header):
    """Fails if a text without blanks is one long word, or a header that all rows share makes them
    all near; and a copy with one unit replaced must be found."""
    alphabet, join = ALPHABETS[language]
    rng = np.random.default_rng(0)
    train = texts_of(alphabet, join, rng)
    copies = [text[:100] + "x" + text[101:] if join else text[:30] + "x" + text[31:]
              for text in train[:20]]
    test = copies + texts_of(alphabet, join, rng)
    shared = join.join(rng.choice(alphabet, header)) + join
    counted = count_near_texts([{"text": shared + text} for text in train],
                               [{"text": shared + text} for text in test])
    assert counted == 20


def test_near_texts_of_a_few_rows():
    """Fails if what two rows of a small file share does not count, or texts that only consist of
    common parts are not compared."""
    same = [{"text": "one two three four five six"}] * 3
    assert count_near_texts(same, same[:1]) == 1
    assert count_near_texts(same * 10, same[:2]) == 2
    assert count_near_texts(same * 10, [{"text": "another text"}]) == 0
