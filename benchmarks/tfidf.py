"""The bag-of-words baseline: TF-IDF and logistic regression, scored as a run is.

    python benchmarks/tfidf.py --data train.jsonl --test test.jsonl [--valid valid.jsonl]

Needs scikit-learn (requirements-dev.txt). Temperature, bias and threshold are fitted on --valid, as
those of a run are. Without it, p is used as it is, with a threshold of .5.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_rows  # noqa: E402
from metrics import calibrated, score_metrics  # noqa: E402
from plumbing.eval_tables import print_tables  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import run_main  # noqa: E402
from run import Fitted, fit  # noqa: E402

NGRAMS = {"TF-IDF, words": (1, 1), "TF-IDF, words and pairs": (1, 2)}


def bag_of_words(train, test, valid=None):
    """({scorer: its metrics}, {scorer: its logits}) on the test rows.

    The logits are {"test": (N,), "valid": (M,), "p": (N,) calibrated} as lists.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    columns = {}
    logits = {}
    for name, ngrams in NGRAMS.items():
        model = make_pipeline(
            TfidfVectorizer(ngram_range=ngrams),
            LogisticRegression(max_iter=1000),
        )
        model.fit(texts(train), labels(train))

        fitted = Fitted()
        valid_z = []
        if valid:
            valid_z = model.decision_function(texts(valid))
            fitted, sentence = fit("head", labels(valid), valid_z, base_rate=0.5)
            print(f"{name}: {sentence}")

        z = model.decision_function(texts(test))
        p = calibrated(z, fitted.temperature, fitted.bias)
        groups = [row.get("group") for row in test]
        metrics = score_metrics(labels(test), p, p >= fitted.threshold, groups=groups)
        is_calibrated = (fitted.temperature, fitted.bias) != (1.0, 0.0)
        columns[name] = {"calibrated": is_calibrated, **metrics}
        logits[name] = {"test": list(z), "valid": list(valid_z), "p": list(p)}
    return columns, logits


def texts(rows):
    return [row["text"] for row in rows]


def labels(rows):
    return [row["label"] for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="training rows")
    parser.add_argument("--valid", help="rows to calibrate on")
    parser.add_argument("--test", required=True, help="rows to score")
    parser.add_argument("--out", help="metrics and logits, as JSON (default: only printed)")
    args = parser.parse_args(argv)

    train = read_rows(args.data)
    test = read_rows(args.test)
    valid = read_rows(args.valid) if args.valid else None
    columns, logits = bag_of_words(train, test, valid)
    print_tables(columns)
    if args.out:
        write_json(args.out, {"metrics": columns, "logits": logits})


if __name__ == "__main__":
    run_main(main)
