"""The bag-of-words baseline: TF-IDF and logistic regression, scored as a run is.

    python benchmarks/tfidf.py --data train.jsonl --test test.jsonl [--valid valid.jsonl]

Needs scikit-learn (requirements-dev.txt). Temperature, bias and threshold are fitted on --valid, as
those of a run are; without it p is used as it is, with the threshold .5.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clsgen import run_main  # noqa: E402
from data import read_rows  # noqa: E402
from eval import best_f1_threshold, score_metrics, table  # noqa: E402
from train import calibrate, sigmoid  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="training rows")
    parser.add_argument("--valid", help="rows to calibrate on")
    parser.add_argument("--test", required=True, help="rows to score")
    args = parser.parse_args()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = read_rows(args.data), read_rows(args.test)
    columns = {}
    for name, ngrams in (("words", (1, 1)), ("words and pairs", (1, 2))):
        vectorizer = TfidfVectorizer(ngram_range=ngrams)
        model = LogisticRegression(max_iter=1000).fit(
            vectorizer.fit_transform([row["text"] for row in train]),
            [row["label"] for row in train],
        )

        def logit(rows, model=model, vectorizer=vectorizer):
            return model.decision_function(vectorizer.transform([row["text"] for row in rows]))

        temperature, bias, threshold = 1.0, 0.0, 0.5
        if args.valid:
            valid = read_rows(args.valid)
            y = np.array([row["label"] for row in valid])
            temperature, bias, sentence = calibrate(y, logit(valid))
            print(sentence or f"{name}: temperature {temperature:.3f}, bias {bias:.3f}")
            threshold = best_f1_threshold(y, sigmoid(logit(valid) / temperature + bias))
        y, p = [row["label"] for row in test], sigmoid(logit(test) / temperature + bias)
        groups = [row.get("group") for row in test]
        columns[name] = score_metrics(y, p, p >= threshold, groups)
    print(table(columns, list(columns["words"])[:5] + ["log_loss", "brier", "ece", "ece_floor"]))


if __name__ == "__main__":
    run_main(main)
