"""Rows of a JSON Lines file to token batches: reading and checking, validation rows, padding.

    python data.py train.jsonl --question "Is ...?"    # counts, and one row as the model sees it
    python data.py train.jsonl --test test.jsonl --question "Is ...?"  # and what both files share

A row is what a line of the file says: a dict with `text` and `label`, perhaps with `explanation`
and other fields (FIELDS). An example is the same row as tokens (class Example). A batch is several
examples as tensors (class Batch).

Notation: B rows, T tokens of the longest row, A answer tokens of the whole batch.
"""

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoint import DEFAULT_MODEL
from plumbing.field_names import likely_field, name_unknown_fields, unknown_fields
from plumbing.model_checks import check_base
from plumbing.near_texts import count_near_texts
from plumbing.other_forms import label_advice, refuse_other_form
from plumbing.remarks import LineNumber, count_shared, print_remarks, warn_of_default_question
from plumbing.script import Help, printable, run_main
from prompts import Prompts, add_prompt_arguments


# --- examples and batches -------------------------------------------------------------------------
@dataclass
class Example:
    """One row as tokens. A row without an explanation has an empty answer."""

    id: str | int
    prompt: list  # token ids
    answer: list  # token ids of "Yes. Because ..." and the end of turn, or none
    label: int | None  # None where the row has no label
    tokens_cut: int  # how many tokens of the row's text the prompt lost

    def __len__(self):
        return len(self.prompt) + len(self.answer)


def encode_rows(rows, prompts, with_answers=True, limit_answers=True):
    """Rows as Examples.

    with_answers=False leaves all explanations out, as for predictions. limit_answers=False lets
    answers pass that are too long to be trained on, which are only looked at.
    ValueError for an answer longer than max_answer, since answers are never cut, and for a row that
    has an explanation but no label, since the label's word opens the answer.
    """
    examples = []
    for row in tqdm(rows, desc="tokens", unit="row", delay=3, leave=False):
        prompt, tokens_cut = prompts.prompt(row["text"])

        answer = []
        if with_answers and "explanation" in row:
            if row.get("label") is None:
                raise ValueError(f"row {row['id']!r}: it has an explanation, but no label")
            answer = prompts.answer(row["label"], row["explanation"])
        if limit_answers and len(answer) > prompts.max_answer:
            raise ValueError(f"row {row['id']!r}: the answer takes {len(answer)} tokens, "
                             f"--max-answer is {prompts.max_answer}: give a larger one")

        examples.append(Example(row["id"], prompt, answer, row.get("label"), tokens_cut))
    return examples


@dataclass
class Batch:
    """Rows of different lengths as tensors, padded on the right, and where to read them.

    Everything here comes from the lengths of the rows; no id is ever compared with a pad id.
    """

    input_ids: torch.Tensor  # (B, T) int64
    prompt_end: torch.Tensor  # (B,) int64, where the last prompt token is: the score head reads it
    labels: torch.Tensor  # (B,) float32
    answer_rows: torch.Tensor  # (A,) int64, each answer token's row, and
    answer_positions: torch.Tensor  # (A,) int64, the position that predicts it: the one before it
    targets: torch.Tensor  # (A,) int64, the answer tokens themselves

    def to(self, device):
        """The same batch on another device."""
        moved = {}
        for name, tensor in vars(self).items():
            moved[name] = tensor.to(device)
        return Batch(**moved)


def collate(examples, device="cpu"):
    """Examples as one Batch. Exactly the answer tokens are supervised.

    The hidden state at a position predicts the token after it. For a prompt of four tokens and an
    answer of three, the last of them the end of turn, in a batch with a row of nine:

        position           0    1    2    3    4    5    6    7    8
        input_ids          p_1  p_2  p_3  p_4  a_1  a_2  a_3  0    0
        predicts                          a_1  a_2  a_3
                                          |
                                          prompt_end: the score head reads here

    A row without an answer adds no targets, and a pad is never one.
    """
    B = len(examples)
    T = max(len(example) for example in examples)
    input_ids = torch.zeros(B, T, dtype=torch.long)  # pads: any id would do, nothing reads them

    prompt_end = []
    labels = []
    answer_rows = []
    answer_positions = []
    targets = []
    for row, example in enumerate(examples):
        length = len(example)
        last = len(example.prompt) - 1
        input_ids[row, :length] = torch.tensor(example.prompt + example.answer)
        prompt_end.append(last)

        label = example.label
        if label is None:  # a prediction: nothing reads it
            label = 0
        labels.append(label)

        answer_rows += [row] * len(example.answer)
        answer_positions += range(last, length - 1)
        targets += example.answer

    batch = Batch(
        input_ids=input_ids,
        prompt_end=torch.tensor(prompt_end),
        labels=torch.tensor(labels, dtype=torch.float32),
        answer_rows=torch.tensor(answer_rows, dtype=torch.long),
        answer_positions=torch.tensor(answer_positions, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
    )
    return batch.to(device)


# --- rows -----------------------------------------------------------------------------------------
def read_rows(path, labels=True):
    """The rows of a JSON Lines file, as dicts with the known fields only.

    A row without an id gets its line's number as one. Other fields are named once, on the screen.

    labels: True if each row must have a label, and both classes must occur. False, for predictions:
    a label that is not 0 or 1 counts as absent.
    ValueError lists the first ten problems as "file:line: what is wrong" and counts the rest; no
    line is dropped silently. Files in another form are refused with the command that converts them.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None

    while lines and not lines[-1].strip():  # blank lines at the end
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty")
    refuse_other_form(path, lines)

    # each line
    rows = []
    problems = []
    line_of_id = {}
    unknown = Counter()  # (name of a field that is not known, the field that it seems to be): rows
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        try:
            raw = parse_object(line)
            row = parse_row(raw, labels)
            row.setdefault("id", LineNumber(number))
            name = str(row["id"])  # 5 and "5" are the same
            if name in line_of_id:
                problem = f"id {row['id']!r} is in line {line_of_id[name]} already"
                if name in (str(number), str(line_of_id[name])):
                    problem += ": a row without an id has its line's number"
                raise ValueError(problem)
            line_of_id[name] = number
            rows.append(row)
            unknown.update(unknown_fields(raw, FIELDS))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")

    # the file as a whole
    if labels and not problems:
        classes = {row["label"] for row in rows}
        if len(classes) < 2:
            problems.append(f"{path}:1: every label is {classes.pop()}; both classes are needed")

    if problems:
        shown = problems[:10]
        if len(problems) > 10:
            shown.append(f"... and {len(problems) - 10} more")
        advice = label_advice(path, lines) if labels else None
        if advice is not None:
            shown.append(advice)
        raise ValueError("\n".join(shown))
    name_unknown_fields(path, unknown)
    return rows


def parse_row(raw, labels):
    """The object of a line as a row with the known fields only. ValueError says what is wrong.

    labels: True if the row must have a label.
    """
    row = {}
    for name in FIELDS:
        if raw.get(name) is not None:  # null is as good as nothing
            row[name] = raw[name]
    if not labels and not is_label(row.get("label")):  # "unknown", -1: there is none
        row.pop("label", None)

    # what there has to be
    required = ["text", "label"] if labels else ["text"]
    for name in required:
        if name in row:
            continue
        for other in raw:
            if likely_field(other) == name:
                raise ValueError(f"no {name}; is it {other[:60]!r}?")
        raise ValueError(f"no {name}")

    # what it has to be
    for name, value in row.items():
        fits, expected = FIELDS[name]
        if not fits(value):
            raise ValueError(f"{name} is {json.dumps(value)[:60]}, expected {expected}")

    # one form for all rows
    if "label" in row:
        row["label"] = int(row["label"])  # true is 1
    if "group" in row:
        row["group"] = group_name(row["group"])
    for name in ("explanation", "group"):
        if name in row and not row[name].strip():  # blank is as good as nothing
            del row[name]
    return row


def group_name(group):
    """A group as a string: 17, 17.0 and "17" are the same one."""
    if isinstance(group, float) and group.is_integer():
        group = int(group)
    return str(group)


def parse_object(line):
    """The JSON object in a line of bytes, as a dict. ValueError says why there is none."""
    if not line.strip():
        raise ValueError("the line is blank")
    try:
        value = json.loads(
            line.decode(), parse_constant=refuse_constant, object_pairs_hook=refuse_repeated_keys
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def refuse_constant(name):
    """Python's reader takes NaN and Infinity, which JSON does not know."""
    raise ValueError(f"{name} is not JSON")


def refuse_repeated_keys(pairs):
    """An object's pairs as a dict. Python's reader would keep the last of two equal keys."""
    counts = Counter(key for key, _ in pairs)
    for key, count in counts.items():
        if count > 1:
            raise ValueError(f"the key {key[:60]!r} is repeated in an object")
    return dict(pairs)


def is_string(value):
    """True for a string without lone surrogates, which no text encoding has."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_text(value):
    return is_string(value) and value.strip() != ""


def is_label(value):
    """True for 0 and 1, and for true and false, which Python counts as such; not for 1.0."""
    return isinstance(value, int) and value in (0, 1)


def is_id(value):
    is_whole_number = isinstance(value, int) and not isinstance(value, bool)
    return is_whole_number or is_string(value)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_group(value):
    return is_number(value) or is_string(value)


def is_probability(value):
    return is_number(value) and 0 <= value <= 1


def is_list_of_strings(value):
    return isinstance(value, list) and all(map(is_string, value))


def is_anything(value):
    return True


FIELDS = {  # name: (whether a value fits, what is expected)
    "text": (is_text, "text that is not blank"),
    "label": (is_label, "0 or 1"),
    "explanation": (is_string, "a string"),
    "id": (is_id, "a string or a whole number"),
    "group": (is_group, "a string or a number"),
    "probability": (is_probability, "a number from 0 to 1"),
    "evidence": (is_list_of_strings, "a list of strings"),
    # kept, so that explain.py can be run on its own output
    "explanation_source": (is_anything, "anything"),
}


# --- looking at the data --------------------------------------------------------------------------
def show(example, prompts):
    """One row as the model sees it: the prompt, where it ends, and the supervised tokens."""

    def text_of(ids):
        return printable(prompts.tokenizer.decode(ids, skip_special_tokens=False))

    answer = "(none: trains the score head only)"
    if example.answer:
        answer = "|".join(text_of([token_id]) for token_id in example.answer)

    return (
        f"{text_of(example.prompt)}\n"
        f"<- prompt end: the score head reads token {len(example.prompt)}\n"
        f"{answer}\n"
        f"<- {len(example.answer)} supervised tokens"
    )


def print_counts(rows, examples, prompts):
    """Prints what is in a file: classes, explanations, lengths, cuts, groups, repeated texts."""
    positives = sum(row["label"] for row in rows)
    negatives = len(rows) - positives
    share = positives / len(rows)

    prompt_lengths = [len(example.prompt) for example in examples]
    answer_lengths = [len(example.answer) for example in examples if example.answer]
    too_long = sum(length > prompts.max_answer for length in answer_lengths)

    cuts = [example.tokens_cut for example in examples if example.tokens_cut]
    groups = {row["group"] for row in rows if "group" in row}
    ungrouped = sum("group" not in row for row in rows)
    repeated = len(rows) - len({row["text"] for row in rows})

    print_line("question", printable(prompts.question))
    print_line("rows", f"{len(rows)}: {positives} {prompts.word(1)} ({share:.1%}), "
                 f"{negatives} {prompts.word(0)}")
    explained = sum("explanation" in row for row in rows)
    print_line("explanations", f"{explained}; "
                         f"{len(rows) - explained} rows without one")
    print_line("prompts", spread(prompt_lengths))
    if answer_lengths:  # none is encoded where only the score head trains
        print_line("answers", f"{spread(answer_lengths)}; "
                              f"{too_long} over --max-answer {prompts.max_answer}")
    print_line("cut", f"{len(cuts)} texts lose {sum(cuts)} tokens "
                      f"to --max-prompt {prompts.max_prompt}")
    print_line("groups", f"{len(groups)}; {ungrouped} rows without one")
    print_line("duplicates", f"{repeated} rows repeat another's text")


def print_line(name, value):
    """Prints one line of an overview."""
    print(f"{name:14}{value}")


def spread(lengths):
    """Lengths in tokens as a phrase: the shortest, the longest and the median."""
    low, middle, high = np.percentile(lengths or [0], [0, 50, 100])
    return f"{low:.0f} to {high:.0f} tokens, median {middle:.0f}"


def print_leaks(train, test):
    """Prints how many test rows share group, id or text with a training row, or have a near text.

    A model that has seen them in training looks better on the test file than it is.
    """
    print(f"\nof {len(test)} test rows, this many share with a training row:")
    for name, count in count_shared(train, test).items():
        print_line(name, count)
    print_line("near text", count_near_texts(train, test))


# --- the command ----------------------------------------------------------------------------------
def main(argv=None):
    """Checks a file and prints what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("data", help="a JSON Lines file")
    parser.add_argument("--test", help="counts what these rows share with those of data")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="for its tokenizer")
    add_prompt_arguments(parser)
    args = parser.parse_args(argv)

    rows = read_rows(args.data)
    test = read_rows(args.test) if args.test else None
    prompts = Prompts.from_arguments(args)
    check_base(prompts, args.model)
    examples = encode_rows(rows, prompts, limit_answers=False)

    print_counts(rows, examples, prompts)
    if not any("explanation" in row for row in rows):
        print("no row has an explanation, so all train the score head only; explain.py writes some")
    warn_of_default_question(args.question)
    print_remarks(args.data, rows, prompts)
    print(f"\nthe first row, format {prompts.format}:\n")
    print(show(examples[0], prompts))
    if test:
        print_remarks(args.test, test, prompts)
        print_leaks(rows, test)


if __name__ == "__main__":
    run_main(main)
