"""Rows, prompts and batches: bad input, markup in a text, exactly what is supervised."""

import json

import numpy as np
import pytest
from conftest import write_tokenizer

from data import (
    SYSTEM,
    DataError,
    Example,
    Prompts,
    collate,
    encode_rows,
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
