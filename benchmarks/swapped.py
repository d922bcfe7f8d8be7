"""Does a run say the opposite if the two statements of a row change places?

    python predict.py --run runs/x --data test.jsonl --out pairs.jsonl
    python predict.py --run runs/x --data test_swapped.jsonl --out swapped.jsonl
    python benchmarks/swapped.py pairs.jsonl swapped.jsonl --out result.json

For rows whose label turns round when their two parts are swapped, as in ComVE ("which statement is
against common sense?"). The swapped row of id "x" has the id "x-swapped". If the order means
nothing to a run, p + p' is 1, p >= .5 decides the other way, and the text states the other label.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import mean_or_none  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import run_main  # noqa: E402

SUFFIX = "-swapped"


def main(argv=None):
    args = parse(argv)
    result = compare(read_records(args.pairs), read_records(args.swapped))
    for name, value in result.items():
        print(f"{name:15} {'n/a' if value is None else round(value, 3)}")
    if args.out is not None:
        write_json(args.out, {**result, "pairs_file": str(args.pairs),
                              "swapped_file": str(args.swapped)})


def compare(pairs, swapped):
    """What {id: record} of pairs and of swapped pairs say, as a dict of means.

    sum_error: the mean of |p + p' - 1|. decision_flips: the share of decisions, p >= .5, that
    change, as all should. text_flips: the share of stated labels that change, among the pairs whose
    two texts both state one. ValueError if the ids do not belong together, or if the records are of
    two runs.
    """
    unmatched = {row_id + SUFFIX for row_id in pairs} ^ set(swapped)
    if unmatched or not pairs:
        raise ValueError(f'expected, for each id "x", the id "x{SUFFIX}" in the second file; '
                         f"{len(unmatched)} have no partner, such as {sorted(unmatched)[:3]}")
    runs = {record["run"] for record in [*pairs.values(), *swapped.values()]}
    if len(runs) > 1:
        raise ValueError(f"the predictions are of {len(runs)} runs, expected one")

    sum_errors = []
    decision_flips = []
    text_flips = []
    for row_id, one in pairs.items():
        other = swapped[row_id + SUFFIX]
        p = one["probability"]
        p_swapped = other["probability"]
        sum_errors.append(abs(p + p_swapped - 1))
        decision_flips.append((p >= 0.5) != (p_swapped >= 0.5))
        stated = (one["stated_label"], other["stated_label"])
        if None not in stated:
            text_flips.append(stated[0] != stated[1])
    return {
        "pairs": len(pairs),
        "sum_error": mean_or_none(sum_errors),
        "decision_flips": mean_or_none(decision_flips),
        "pairs_stated": len(text_flips),
        "text_flips": mean_or_none(text_flips),
    }


def read_records(path):
    """The records of a file of predict.py, {id: record}; ids as strings."""
    records = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            records[str(record["id"])] = record
    return records


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("pairs", type=Path, help="predictions of the pairs, from predict.py")
    add("swapped", type=Path, help="predictions of the same pairs in the other order")
    add("--out", type=Path, help="JSON file for the result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
