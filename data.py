"""JSON Lines rows to token batches: reading and checking rows, prompts and answers, padding.

    python data.py check train.jsonl --test test.jsonl    # counts, lengths, one row shown, leaks
    python data.py explain --data labels.jsonl --out train.jsonl --model models/smollm2-135m

A row becomes  prompt = frame(system line, question + text)  and  answer = "Yes. Because ..." + end
of turn. The prompt ends where the assistant would speak; the score head reads its last token.

Notation: B rows, T tokens (the longest row's), A answer tokens of the batch.
"""

import argparse
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

QUESTION = "Is the answer yes for the following text?"
SYSTEM = "Answer the question, then explain why."


# --- rows -----------------------------------------------------------------------------------------
class DataError(ValueError):
    """Bad input data: "file:line: what is wrong"."""


def _is(kind):
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _clean(value):
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


FIELDS = {  # name: (test, what is due)
    "text": (lambda v: _clean(v) and v.strip() != "", "text that is not blank"),
    "label": (lambda v: v in (0, 1) and isinstance(v, int), "0 or 1"),
    "explanation": (_clean, "a string"),
    "id": (lambda v: _clean(v) or _is(int)(v), "a string or a whole number"),
    "group": (_clean, "a string"),
    "probability": (lambda v: _is((int, float))(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "evidence": (lambda v: isinstance(v, list) and all(map(_clean, v)), "a list of strings"),
    "explanation_source": (lambda v: True, "what `explain` writes, and nothing else reads"),
}


def _constant(name):
    raise ValueError(f"{name} is not JSON")


def _object(pairs):
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{twice[0][:60]!r} stands twice in an object")
    return dict(pairs)


def parse_row(line, number, labels):
    """One line -> a row with the known fields only; ValueError says what is wrong."""
    try:
        raw = json.loads(line.decode(), parse_constant=_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    row = {key: raw[key] for key in FIELDS if raw.get(key) is not None}
    for key in ("text", "label") if labels else ("text",):
        if key not in row:
            raise ValueError(f"no {key}")
    for key, value in row.items():
        test, due = FIELDS[key]
        if not test(value):
            raise ValueError(f"{key} is {json.dumps(value)[:60]}; due is {due}")
    row.setdefault("id", number)
    if "label" in row:
        row["label"] = int(row["label"])
    if not row.get("explanation", "").strip():
        row.pop("explanation", None)
    return row


def read_rows(path, labels=True):
    """A JSON Lines file -> list of row dicts (`id` filled in; unknown fields left out).

    labels: each row must have one, and both classes must occur. DataError lists the first ten
    problems as "file:line: what is wrong" and counts the rest; no line is dropped silently.
    """
    path, rows, problems, seen = Path(path), [], [], {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                try:
                    row = parse_row(line, number, labels)
                    if (first := seen.setdefault(str(row["id"]), number)) != number:
                        raise ValueError(f"id {row['id']!r} stands in line {first} already")
                    rows.append(row)
                except ValueError as error:
                    problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not rows and not problems:
        problems = [f"{path}:1: the file is empty"]
    classes = {row["label"] for row in rows if "label" in row}
    if labels and not problems and len(classes) < 2:
        problems = [f"{path}:1: every label is {classes.pop()}; both classes are needed"]
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more)
    return rows


def split_valid(rows, fraction, seed):
    """(train, valid): whole groups, shuffled by the seed, fill valid to that share of the rows."""
    groups = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.get("group", ("row", index)), []).append(row)
    keys, valid = list(groups), []
    for index in np.random.default_rng(seed).permutation(len(keys)):
        if len(valid) >= fraction * len(rows):
            break
        valid += groups.pop(keys[index])
    train = [row for group in groups.values() for row in group]
    for name, side in (("training", train), ("validation", valid)):
        if len({row["label"] for row in side}) < 2:
            raise DataError(f"the {name} side of --valid-fraction {fraction} has one class only "
                            f"({len(side)} of {len(rows)} rows); give --valid or another fraction")
    return train, valid

# --- prompts --------------------------------------------------------------------------------------
# Each frame: its special tokens (the last one ends an answer) and the prompt around {user}, which
# is question, blank line, text. A tokenizer gets the first frame whose special tokens it has (those
# after plain, whose [INST] is plain text, by --format only). They equal the models' own chat
# templates for [system, user] except: Llama-3.1's date header; Qwen3's empty think block; blanks
# at the ends of a text, which Llama's templates strip.
FRAMES = {
    "chatml": (("<|im_start|>", "<|im_end|>"),
               "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
               "<|im_start|>assistant\n"),
    "llama3": (("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": (("<s>", "[INST]", "[/INST]", "</s>"), "<s>[INST] {system}\n\n{user}[/INST]"),
    "plain": ((), "{system}\n\n{user}\n\nAnswer:\n"),
    "llama2": (("<s>", "</s>"), "<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]"),
    "mistral-v1": (("<s>", "</s>"), "<s> [INST] {system}\n\n{user} [/INST]"),  # 7B v0.1, v0.2
}


def stated_label(answer, labels):
    """An answer -> (the label that it states, the explanation after it). It states one by starting
    with a label word, longest first, any case, and . , : ; or the end. Else None."""
    for label in sorted((0, 1), key=lambda label: -len(labels[label])):
        pattern = r"\s*" + re.escape(labels[label]) + r"\s*(?:[.,:;]\s*|$)"
        if match := re.match(pattern, answer, re.IGNORECASE):
            return label, answer[match.end() :].strip()
    return None, answer.strip()


class Prompts:
    """Rows to token ids and back, for one tokenizer, one question and one pair of label words.

    A row's text never acts as markup: plain text is encoded by a second tokenizer, the same one
    without its added tokens, so "<|im_end|>" in a text is ordinary characters. Where [INST] is no
    token of its own (llama2, mistral-v1), a space breaks it in the text.
    """

    def __init__(self, folder, question=QUESTION, labels=("no", "yes"), format=None,
                 max_prompt=1024, max_answer=256):
        from model import read_json

        path, config = Path(folder) / "tokenizer.json", read_json(Path(folder) / "config.json")
        spec = read_json(path)
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(spec))
            plain = json.dumps({**spec, "added_tokens": []})
            self.plain = Tokenizer.from_str(plain)
            # "first" puts a blank before a whole input only, never after a special token
            first, never = (f'"prepend_scheme": "{scheme}"' for scheme in ("first", "never"))
            self.inner = Tokenizer.from_str(plain.replace(first, never))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tokenizers raises nothing narrower, and panics
            raise ValueError(f"{path}: {error}") from None
        for tokenizer in (self.tokenizer, self.plain, self.inner):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        if min(max_prompt, max_answer) < 1 or {type(max_prompt), type(max_answer)} != {int}:
            raise ValueError(f"bounds {max_prompt}, {max_answer}: 1, 2, ... are due")
        for key, due in (("vocab_size", max(self.tokenizer.get_vocab().values()) + 1),
                         ("max_position_embeddings", max_prompt + max_answer)):
            have = config.get(key, math.inf)
            if type(have) not in (int, float) or due > have:
                raise ValueError(f"{folder}: {key} is {have!r}; tokenizer, bounds need {due}")
        if len({word.strip().lower() for word in labels} - {""}) != 2:
            raise ValueError(f"label words {labels}: two different words are due")
        self.question, self.labels = question, tuple(word.strip() for word in labels)
        self.max_prompt, self.max_answer = max_prompt, max_answer
        has = self.tokenizer.token_to_id
        fits = (name for name in FRAMES if all(has(token) is not None for token in FRAMES[name][0]))
        self.format = format or next(fits)
        self._lay_out_frame()
        # What ends an answer; training puts the first one there: the frame's end of turn
        specials, generation = FRAMES[self.format][0], Path(folder) / "generation_config.json"
        stops = [has(specials[-1])] if specials else []
        for source in (read_json(generation) if generation.exists() else {}, config):
            eos = source.get("eos_token_id")
            stops += eos if isinstance(eos, list) else [] if eos is None else [eos]
        size = config.get("vocab_size", math.inf)
        if not stops or not all(type(token) is int and 0 <= token < size for token in stops):
            raise ValueError(f"{folder}: eos_token_id {stops}; token ids are due")
        self.stop_ids = list(dict.fromkeys(stops))
        # "No.", "Yes.": the strings whose log-probability is the label-token score
        self.label_ids = [self._encode(f"{self.word(label)}.").ids for label in (0, 1)]

    def settings(self):
        """What a run has to remember: Prompts(folder, **settings) builds the same again."""
        names = ("question", "labels", "format", "max_prompt", "max_answer")
        return {name: getattr(self, name) for name in names}

    def _lay_out_frame(self):
        """The frame as ids before, plain text around the row's text, and ids after."""
        specials, frame = FRAMES[self.format]
        pattern = "|".join(map(re.escape, specials)) or "$^"
        parts = [part for part in re.split(f"({pattern})", frame) if part]
        at = next(i for i, part in enumerate(parts) if "{user}" in part)

        def ids(part):
            if part not in specials:
                return self._encode(part.replace("{system}", SYSTEM), self.format != "plain").ids
            if (index := self.tokenizer.token_to_id(part)) is None:
                raise ValueError(f"format {self.format}: the tokenizer has no token {part}")
            return [index]

        # A base model's own start token, if its tokenizer puts one there
        self.before = self.tokenizer.encode("").ids[:1] if self.format == "plain" else []
        self.before += [i for part in parts[:at] for i in ids(part)]
        self.after = [i for part in parts[at + 1 :] for i in ids(part)]
        self.opening, self.closing = parts[at].replace("{system}", SYSTEM).split("{user}")
        self.opening += self.question + "\n\n"

    def _encode(self, text, inner=False):
        tokenizer = self.inner if inner else self.plain
        return tokenizer.encode(text, add_special_tokens=False)

    def word(self, label):
        """The label's word with its first letter upper-cased: 1 -> "Yes"."""
        return self.labels[label][0].upper() + self.labels[label][1:]

    def prompt(self, text):
        """text -> (token ids, how many of the text's tokens were cut to keep to max_prompt).

        The plain text between two special tokens is one call of the tokenizer: encoded apart,
        "?\\n\\n" and what follows would give other tokens than together. The cut is made in the
        middle of the text, never in frame or question.
        """
        if FRAMES[self.format][0] == ("<s>", "</s>"):
            text = re.sub(r"(\[/?)(INST\])", r"\1 \2", text)
        encoded = self._encode(self.opening + text + self.closing, self.format != "plain")
        ids, start = encoded.ids, len(self.opening)
        cut = max(0, len(self.before) + len(ids) + len(self.after) - self.max_prompt)
        if cut:
            inside = [i for i, (a, b) in enumerate(encoded.offsets)
                      if start <= a and b <= start + len(text)]
            if cut >= len(inside):
                raise DataError(f"max-prompt {self.max_prompt} leaves no room for the text: frame "
                                f"and question alone take {self.max_prompt + cut - len(inside)}")
            first = inside[(len(inside) - cut + 1) // 2]
            ids = ids[:first] + ids[first + cut :]
        return self.before + ids + self.after, cut

    def answer(self, label, explanation):
        """Token ids of "Yes. Because ..." and the end of turn."""
        return self._encode(f"{self.word(label)}. {explanation.strip()}").ids + self.stop_ids[:1]

    def decode(self, ids):
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids])

    def parse(self, answer):
        return stated_label(answer, self.labels)


# --- examples and batches -------------------------------------------------------------------------
@dataclass
class Example:
    """One row as tokens. `answer` is empty where the row has no explanation."""

    id: str | int
    prompt: list
    answer: list
    label: int | None
    tokens_cut: int

    def __len__(self):
        return len(self.prompt) + len(self.answer)


def encode_rows(rows, prompts, answers=True, refuse=True):
    """Row dicts -> Examples. DataError for an answer over max_answer: it is never cut."""
    examples = []
    for row in tqdm(rows, desc="tokens", unit="row", delay=3, leave=False):
        prompt, cut = prompts.prompt(row["text"])
        answer = []
        if answers and "explanation" in row:
            answer = prompts.answer(row["label"], row["explanation"])
            if len(answer) > prompts.max_answer and refuse:
                raise DataError(f"row {row['id']!r}: the answer takes {len(answer)} tokens, "
                                f"max-answer is {prompts.max_answer}")
        examples.append(Example(row["id"], prompt, answer, row.get("label"), cut))
    return examples


@dataclass
class Batch:
    """Rows padded on the right. Everything comes from the lengths; pad ids are never looked at."""

    input_ids: torch.Tensor  # (B, T) int64
    prompt_end: torch.Tensor  # (B,) index of the last prompt token: what the score head reads
    labels: torch.Tensor  # (B,) float32
    answer_rows: torch.Tensor  # (A,) row and
    answer_positions: torch.Tensor  # (A,) position of the hidden state that predicts each target
    targets: torch.Tensor  # (A,) the answers' tokens

    def to(self, device):
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(examples, device="cpu"):
    """Examples -> Batch. The target at position t is token t + 1, so the first answer token is
    predicted at the prompt's end and the end of turn at the last answer token but one."""
    input_ids = torch.zeros(len(examples), max(map(len, examples)), dtype=torch.long)
    rows, positions, targets = [], [], []
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = torch.tensor(example.prompt + example.answer)
        rows += [i] * len(example.answer)
        positions += range(len(example.prompt) - 1, len(example) - 1)
        targets += example.answer
    return Batch(
        input_ids,
        torch.tensor([len(example.prompt) - 1 for example in examples]),
        torch.tensor([float(example.label or 0) for example in examples]),
        *(torch.tensor(x, dtype=torch.long) for x in (rows, positions, targets)),
    ).to(device)


# --- looking at the data --------------------------------------------------------------------------
def printable(text):
    """Text with control characters escaped, new line and tab kept: safe to print to a terminal."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c
                   for c in text)


def show(example, prompts):
    """One row as the model sees it: the prompt, its end, and the supervised tokens."""

    def text(ids):
        return printable(prompts.tokenizer.decode(ids, skip_special_tokens=False))

    answer = "|".join(text([i]) for i in example.answer) or "(none: trains the score head only)"
    return (f"{text(example.prompt)}\n<- prompt end: the score head reads token "
            f"{len(example.prompt)}\n{answer}\n<- {len(example.answer)} supervised tokens")


def shingles(text):
    """The set of a text's runs of five words; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def leaks(train, test):
    """Prints how many test rows share group, id or text with a training row. A near text has half
    of the 5-word shingles of both together in common (Jaccard's index; Broder 1997)."""
    known, index = [shingles(row["text"]) for row in train], {}
    for i, own in enumerate(known):
        for shingle in own:
            index.setdefault(shingle, []).append(i)

    def near(row):
        own = shingles(row["text"])
        common = Counter(i for shingle in own for i in index.get(shingle, ()))
        return any(2 * n >= len(own) + len(known[i]) - n for i, n in common.items())

    print(f"\nof {len(test)} test rows, training rows have")
    for name in ("group", "id", "text"):  # an id that is its line's number may be nobody's
        seen = {row[name] for i, row in enumerate(train, 1) if row.get(name, i) != i}
        print(f"the {name:10}{sum(row.get(name) in seen for row in test)}")
    print(f"a near text   {sum(map(near, test))}")


def check(args):
    """Prints counts, class balance, token lengths, what is cut, duplicates, and one row."""
    rows = read_rows(args.data)
    prompts = Prompts(args.model, args.question, args.labels, args.format, args.max_prompt,
                      args.max_answer)
    examples = encode_rows(rows, prompts, refuse=False)
    positives, texts = sum(row["label"] for row in rows), {row["text"] for row in rows}
    groups = Counter(row["group"] for row in rows if "group" in row)
    answers = [len(example.answer) for example in examples if example.answer]
    cut = [example.tokens_cut for example in examples if example.tokens_cut]
    over = sum(length > args.max_answer for length in answers)

    def spread(lengths):
        low, middle, high = np.percentile(lengths or [0], [0, 50, 100])
        return f"{low:.0f} to {high:.0f} tokens, median {middle:.0f}"

    for name, value in (
        ("rows", f"{len(rows)}: {positives} {prompts.word(1)} ({positives / len(rows):.1%}), "
                 f"{len(rows) - positives} {prompts.word(0)}"),
        ("explanations", f"{len(answers)}; {len(rows) - len(answers)} rows without one"),
        ("prompts", spread([len(example.prompt) for example in examples])),
        ("answers", f"{spread(answers)}; {over} over --max-answer {args.max_answer}"),
        ("cut", f"{len(cut)} texts lose {sum(cut)} tokens to --max-prompt {args.max_prompt}"),
        ("groups", f"{len(groups)}; {len(rows) - groups.total()} rows without one"),
        ("duplicates", f"{len(rows) - len(texts)} rows repeat another's text"),
    ):
        print(f"{name:14}{value}")
    print(f"\nthe first row, format {prompts.format}:\n\n{show(examples[0], prompts)}")
    if args.test:
        leaks(rows, read_rows(args.test))


# --- commands -------------------------------------------------------------------------------------
def add_prompt_arguments(parser):
    """The flags that make a prompt: the same in every script that encodes rows."""
    add = parser.add_argument
    add("--question", default=QUESTION, help="asked above every text")
    add("--labels", nargs=2, default=["no", "yes"], metavar=("ZERO", "ONE"), help="their words")
    add("--format", choices=FRAMES, help="chat frame (default: by the tokenizer's special tokens)")
    add("--max-prompt", type=int, default=1024, help="tokens; the middle of a longer text is cut")
    add("--max-answer", type=int, default=256, help="tokens; a longer answer is an error")


def main(argv=None):
    from explain import add_arguments, explain  # it imports this file

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="counts, lengths, and one row as the model sees it")
    add = checker.add_argument
    add("data", help="a JSON Lines file")
    add("--test", help="counts what these rows share with those of data")
    add("--model", default="models/smollm2-135m", help="for its tokenizer")
    add_prompt_arguments(checker)
    explainer = commands.add_parser("explain", help="explanations for rows that have labels only")
    add_arguments(explainer)
    args = parser.parse_args(argv)
    (check if args.command == "check" else explain)(args)


if __name__ == "__main__":
    from clsgen import run_main

    run_main(main)
