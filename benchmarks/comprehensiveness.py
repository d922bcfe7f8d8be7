"""Does p rest on the words that the explanation cites? Comprehensiveness, as ERASER calls it.

    python benchmarks/comprehensiveness.py --run runs/x --data test.jsonl

reads the explanations that eval.py wrote (into --results, by default runs/x/eval/test) and writes
comprehensiveness.json there. The words that an explanation cites are dropped from its text: by how
much does p of the decided class fall (DeYoung et al. 2020, section 4)? And by how much without as
many other words at random, in spans of the same lengths? The difference is no proof of a cause: a
text with holes is unlike any that the model was trained on, and words hang together.
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
from metrics import bootstrap  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import run_main, versions  # noqa: E402
from plumbing.tables import table  # noqa: E402
from run import load_run  # noqa: E402

DRAWS = 5  # random controls for each row
FUNCTION_WORDS = set(
    "a an and any are as at be been but by can did do does for from had has have he her his if in "
    "into is it its may might no nor not of on or she so than that the their then there these they "
    "this those to was were which who will with would".split())


def content_words(text):
    """[(start, end, word)] of the words that are not function words."""
    return [(*match.span(), match.group().lower()) for match in re.finditer(r"\w+", text)
            if match.group().lower() not in FUNCTION_WORDS]


def pairs(text):
    """{i: (word i, word i + 1)} of content words with no punctuation between them."""
    return {i: (one[2], two[2]) for i, (one, two) in enumerate(pairwise(content_words(text)))
            if not re.search("[.,;:!?()]", text[one[1] : two[0]])}


def cited_words(text, explanation):
    """(M,) which of the text's M content words are cited: pairs that both have."""
    cited, said = np.zeros(len(content_words(text)), dtype=bool), set(pairs(explanation).values())
    for i, pair in pairs(text).items():
        cited[i : i + 2] |= pair in said
    return cited


def spans(mask):
    """[(first, end)] of the runs in a mask."""
    edges = np.flatnonzero(np.diff(np.r_[0, mask, 0]))
    return list(zip(edges[::2], edges[1::2], strict=True))


def random_words(cited, rng):
    """(M,) spans of the same lengths as the cited ones, at random elsewhere; None: no room."""
    free = ~cited
    for length in sorted((end - first for first, end in spans(cited)), reverse=True):
        places = np.flatnonzero(np.convolve(free, np.ones(length), "valid") == length)
        if not len(places):
            return None
        place = rng.choice(places)
        free[place : place + length] = False
    return ~free & ~cited


def without(text, mask):
    """The text less the spans of its content words, with the function words inside a span."""
    words = content_words(text)
    for first, end in reversed(spans(mask)):
        text = text[: words[first][0]] + text[words[end - 1][1] :]
    return re.sub("  +", " ", text)


def measure(run, rows, records, args):
    """Falls of p, mean over the rows, with 95 % intervals by group, and the rows left out."""
    rng, used, texts, uncited = np.random.default_rng(args.seed), [], [], 0
    for row, record in zip(rows, records, strict=True):
        cited = cited_words(row["text"], record["explanation"])
        masks = [cited] + [random_words(cited, rng) for _ in range(DRAWS)]
        uncited += not cited.any()
        if cited.any() and all(mask is not None for mask in masks):
            used.append((row.get("group"), record["probability"]))
            texts += [without(row["text"], mask) for mask in masks]
    if not used:
        raise ValueError(f"nothing to drop: {uncited} of {len(rows)} explanations cite nothing")
    found = run.predict(texts, explain=False, batch_size=args.batch, progress=True)
    groups, before = zip(*used, strict=True)
    left = np.array([record["probability"] for record in found]).reshape(-1, 1 + DRAWS)
    before = np.array(before)[:, None]
    fall = np.where(before >= 0.5, before - left, left - before)  # of p of the decided class
    cited, others = fall[:, 0], fall[:, 1:].mean(axis=1)
    metrics = {name: (lambda _, values: float(values.mean()), values) for name, values in (
        ("comprehensiveness", cited), ("random_fall", others), ("difference", cited - others))}
    intervals, _ = bootstrap(metrics, before, groups, args.draws, args.seed)
    result = {name: metric(None, values) for name, (metric, values) in metrics.items()}
    return result | {"intervals": intervals, "rows": len(used), "rows_uncited": uncited,
                     "rows_no_room": len(rows) - len(used) - uncited}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run folder")
    add("--data", required=True, type=Path, help="the JSON Lines file that was evaluated")
    add("--results", type=Path, help="folder with predictions.jsonl (default: RUN/eval/DATA)")
    add("--overwrite", action="store_true", help="replace comprehensiveness.json")
    add("--model", help="the base model's folder, if it has moved")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the base model")
    add("--device", help="such as cpu or cuda")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--draws", type=int, default=1000, help="resamples for the intervals")
    add("--seed", type=int, default=0, help="of the random words and the resamples")
    args, start = parser.parse_args(argv), time.perf_counter()
    if min(args.batch, args.draws) < 1:
        raise ValueError("--batch and --draws must be at least 1")
    results = args.results or args.run / "eval" / args.data.stem
    out = results / "comprehensiveness.json"
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; give --overwrite to replace it")
    rows = {row["id"]: row for row in read_rows(args.data)}
    with open(results / "predictions.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    run = load_run(args.run, args.model, args.dtype, args.device)
    records = [one for one in records if one["run"] == run.name and one["explanation"]]
    if not records or not all(record["id"] in rows for record in records):
        raise ValueError(f"{results}/predictions.jsonl has no explanation of {args.run}, or some "
                         f"for rows that are not in {args.data}")
    result = measure(run, [rows[record["id"]] for record in records], records, args)
    print(table({str(args.run): result}, [key for key in result if key != "intervals"]))
    arguments = {key: None if value is None else str(value) for key, value in vars(args).items()}
    write_json(out, result | {"seconds": time.perf_counter() - start, "arguments": arguments,
                              "versions": versions()})
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
