"""Does p rest on the words that the explanation cites? Comprehensiveness, as ERASER calls it.

    python benchmarks/comprehensiveness.py --run runs/x --data test.jsonl

Reads the explanations that eval.py wrote (in --results, by default runs/x/eval/test) and writes
comprehensiveness.json there. What an explanation cites is dropped from its text: by how much does p
of the decided class fall (DeYoung et al. 2020, section 4)?

Where rows have `evidence`, the phrases that carry weight are known, and one is dropped at a time:

    cited      a phrase that the explanation cites
    uncited    evidence that the explanation does not cite: of the same kind and weight
    absent     a phrase that other rows have as evidence, and that this text says is absent

Without `evidence`, all cited words are dropped together, and for comparison as many other words, at
random, in spans of the same lengths.

A difference does not prove a cause: a text with holes is unlike all texts that the model was
trained on, and words depend on each other. Notation: M content words of a text.
"""

import argparse
import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_rows  # noqa: E402
from metrics import bootstrap, mean_or_none  # noqa: E402
from plumbing.citations import FUNCTION_WORDS  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import refuse, run_main, versions  # noqa: E402
from plumbing.tables import table  # noqa: E402
from run import load_run  # noqa: E402
from text_metrics import (  # noqa: E402
    cited_phrases, evidence_phrases, known_phrases, spelled)

DRAWS = 5  # random controls for each row
PROGRESS = "texts with holes"  # the name of the progress bar


def main(argv=None):
    args = parse(argv)
    started = time.perf_counter()
    results = args.results or args.run / "eval" / args.data.stem
    out = results / "comprehensiveness.json"
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; give --overwrite to replace it")

    # the run, its explanations, and the rows that they are of
    file_rows = read_rows(args.data)
    row_of_id = {row["id"]: row for row in file_rows}
    run = load_run(args.run, args.model, args.dtype, args.device)
    records = read_explanations(results / "predictions.jsonl", run.name)
    if not records or any(record["id"] not in row_of_id for record in records):
        raise ValueError(f"{results}/predictions.jsonl has no explanation of {args.run}, or some "
                         f"for rows that are not in {args.data}")
    rows = [row_of_id[record["id"]] for record in records]

    known = known_phrases(file_rows)
    if known:
        result = measure_phrases(run, rows, records, known, args)
    else:
        result = measure_words(run, rows, records, args)
    names = [name for name in result if name != "intervals"]
    print(table({str(args.run): result}, names))

    arguments = {}
    for name, value in vars(args).items():
        arguments[name] = None if value is None else str(value)
    result["seconds"] = time.perf_counter() - started
    result["arguments"] = arguments
    result["versions"] = versions()
    write_json(out, result)
    print(f"wrote {out}")


# --- which words ----------------------------------------------------------------------------------
def content_words(text):
    """[(start, end, word)] of the words that are not function words."""
    words = []
    for match in re.finditer(r"\w+", text):
        word = match.group().lower()
        if word not in FUNCTION_WORDS:
            words.append((match.start(), match.end(), word))
    return words


def pairs(text):
    """{i: (word i, word i + 1)} of content words with no punctuation between them."""
    found = {}
    for i, (one, two) in enumerate(pairwise(content_words(text))):
        _, end, word = one
        start, _, next_word = two
        if not re.search("[.,;:!?()]", text[end:start]):
            found[i] = (word, next_word)
    return found


def cited_words(text, explanation):
    """(M,) True for the content words of a text that are cited: in a pair that both texts have."""
    said = set(pairs(explanation).values())
    cited = np.zeros(len(content_words(text)), dtype=bool)
    for i, pair in pairs(text).items():
        if pair in said:
            cited[i : i + 2] = True
    return cited


def spans(mask):
    """[(first, end)] of the runs of True in a mask (M,)."""
    padded = np.concatenate([[0], mask, [0]])
    edges = np.flatnonzero(np.diff(padded))
    return list(zip(edges[::2], edges[1::2], strict=True))


def random_words(cited, rng):
    """(M,) True in spans of the same lengths as those of `cited`, at random outside of them.

    None if there is no room.
    """
    lengths = [end - first for first, end in spans(cited)]
    lengths.sort(reverse=True)  # a long span finds no room once short ones lie everywhere

    free = ~cited
    for length in lengths:
        free_words = np.convolve(free, np.ones(length), "valid")  # in the span that begins here
        places = np.flatnonzero(free_words == length)
        if not len(places):
            return None
        place = rng.choice(places)
        free[place : place + length] = False
    return ~free & ~cited


def without(text, mask):
    """The text without the spans of its content words, or the function words inside a span."""
    words = content_words(text)
    for first, end in reversed(spans(mask)):
        start_of_span = words[first][0]
        end_of_span = words[end - 1][1]
        text = text[:start_of_span] + text[end_of_span:]
    return re.sub("  +", " ", text)


# --- which phrases --------------------------------------------------------------------------------
KINDS = ("cited", "uncited", "absent")


def phrases_by_kind(row, explanation, known):
    """{kind: the phrases of that kind that stand in the row's text}, from the known phrases."""
    text = spelled(row["text"])
    mentioned = {phrase for phrase in known if phrase in text}
    cited = cited_phrases(explanation, known)
    own = evidence_phrases(row)
    return {
        "cited": mentioned & cited,
        "uncited": mentioned & own - cited,
        "absent": mentioned - own - cited,
    }


def without_phrase(text, phrase):
    """The text without a `spelled` phrase, wherever it stands."""
    words = r"\s*".join(re.escape(word) for word in phrase.split())
    text = re.sub(rf"\b{words}\b", "", text, flags=re.IGNORECASE)
    return re.sub("  +", " ", text)


# --- measuring ------------------------------------------------------------------------------------
def measure_phrases(run, rows, records, known, args):
    """How far p of the decided class falls without a phrase, by its kind.

    First the mean over the phrases of a kind in a row, then over the rows that have any; and how
    much farther it falls without a cited one, over the rows that have both. With 95 % intervals by
    group; None where no row has such a phrase.
    """
    texts = []
    owners = []  # of each text: (the row's index, the kind of the phrase that it lacks)
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        for kind, phrases in phrases_by_kind(row, record["explanation"], known).items():
            for phrase in sorted(phrases):
                texts.append(without_phrase(row["text"], phrase))
                owners.append((i, kind))
    if not any(kind == "cited" for _, kind in owners):
        raise ValueError(f"nothing to drop: {len(rows)} explanations cite no evidence")

    falls = {kind: [[] for _ in rows] for kind in KINDS}
    found = run.predict(texts, explain=False, batch_size=args.batch, progress=PROGRESS)
    for (i, kind), record in zip(owners, found, strict=True):
        fall = records[i]["probability"] - record["probability"]
        if records[i]["probability"] < 0.5:
            fall = -fall
        falls[kind][i].append(fall)

    # (rows,) of each kind, NaN where a row has no such phrase
    values = {}
    for kind in KINDS:
        values[kind] = np.array([np.mean(some) if some else np.nan for some in falls[kind]])
    for kind in ("uncited", "absent"):
        values[f"cited_minus_{kind}"] = values["cited"] - values[kind]

    result = {}
    intervals = {}
    groups = np.array([row.get("group") for row in rows], dtype=object)
    for name, of_row in values.items():
        there = ~np.isnan(of_row)
        result[name] = mean_or_none(of_row[there])
        result[f"rows_{name}"] = int(there.sum())
        if there.any():
            intervals.update(mean_intervals({name: of_row[there]}, groups[there].tolist(), args))
    return {**result, "intervals": intervals}


def mean_intervals(values, groups, args):
    """{name: interval of the mean} of {name: (rows,)}, from the same resamples of groups."""
    no_labels = np.zeros(len(groups))
    metrics = {name: (mean, of_row) for name, of_row in values.items()}
    intervals, _ = bootstrap(metrics, no_labels, groups, args.draws, args.seed)
    return intervals


def measure_words(run, rows, records, args):
    """The falls of p, as means over the rows with 95 % intervals by group; the rows left out."""
    rng = np.random.default_rng(args.seed)
    groups = []  # of each row that is used
    before = []  # and its p
    texts = []  # and its 1 + DRAWS texts: without what it cites, without other words
    uncited = 0
    for row, record in zip(rows, records, strict=True):
        cited = cited_words(row["text"], record["explanation"])
        masks = [cited]
        for _ in range(DRAWS):
            masks.append(random_words(cited, rng))

        if not cited.any():
            uncited += 1
        elif all(mask is not None for mask in masks):
            groups.append(row.get("group"))
            before.append(record["probability"])
            for mask in masks:
                texts.append(without(row["text"], mask))
    if not texts:
        raise ValueError(f"nothing to drop: {uncited} of {len(rows)} explanations cite nothing")

    # by how much p of the decided class falls, (rows, 1 + DRAWS)
    found = run.predict(texts, explain=False, batch_size=args.batch, progress=PROGRESS)
    after = np.array([record["probability"] for record in found])
    after = after.reshape(-1, 1 + DRAWS)
    before = np.array(before)[:, None]
    fall = np.where(before >= 0.5, before - after, after - before)

    cited_fall = fall[:, 0]
    random_fall = fall[:, 1:].mean(axis=1)
    values = {
        "comprehensiveness": cited_fall,
        "random_fall": random_fall,
        "difference": cited_fall - random_fall,
    }
    result = {name: float(falls.mean()) for name, falls in values.items()}

    result["intervals"] = mean_intervals(values, groups, args)
    result["rows"] = len(groups)
    result["rows_uncited"] = uncited
    result["rows_no_room"] = len(rows) - len(groups) - uncited
    return result


def mean(y, values):
    """A metric for `bootstrap`, which has no need of labels."""
    return float(values.mean())


# --- the command ----------------------------------------------------------------------------------
def read_explanations(path, run_name):
    """The records of a predictions.jsonl that are of this run and have an explanation."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["run"] == run_name and record["explanation"]:
                records.append(record)
    return records


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run folder")
    add("--data", required=True, type=Path, help="the JSON Lines file that was evaluated")
    add("--results", type=Path, help="folder with predictions.jsonl (default: RUN/eval/DATA)")
    add("--overwrite", action="store_true", help="replace comprehensiveness.json")
    add("--model", help="the base model's folder, if it has moved")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the run's")
    add("--device", help="such as cpu or cuda")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--draws", type=int, default=1000, help="resamples for the intervals")
    add("--seed", type=int, default=0, help="of the random words and the resamples")
    args = parser.parse_args(argv)

    problems = []
    for name in ("batch", "draws"):
        value = getattr(args, name)
        if value < 1:
            problems.append(f"--{name} is {value}, expected 1 or more")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_main(main)
