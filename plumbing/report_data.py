"""What report.js shows, as data: the counts at each threshold, and every prediction.

Notation: N rows, y (N,) labels, p (N,) probabilities of class 1.
"""

import numpy as np

from plumbing.citations import citations, common_words
from plumbing.markup import json_text

LARGEST = 18_000_000  # bytes of predictions and texts in a page
THRESHOLDS = np.arange(1001) / 1000  # of the slider


def data_for_page(evaluation):
    """(the data, a sentence on what is left out of it, empty if nothing is)."""
    rows, left_out = rows_for_page(evaluation)
    data = {
        "file": evaluation.results["data"],
        "runs": [run_for_page(run) for run in evaluation.runs],
        "rows": rows,
    }
    return data, left_out


def run_for_page(run):
    """What the script needs to know of a run: who it is, and its counts at each threshold."""
    y = run.column("true_label")
    p = run.column("probability")
    threshold = run.threshold()
    calibration = None
    if run.about["fitted"] is not None:
        calibration = run.about["fitted"]["calibration"]
    return {
        "name": run.name,
        "fingerprint": run.about["fingerprint"],
        "base": run.about["base"],
        "base_fingerprint": run.about["base_fingerprint"],
        "calibration": calibration,
        "words": run.words(),
        "threshold": threshold,
        "own": counts_at(y, p, np.array([threshold])),
        "counts": counts_at(y, p, THRESHOLDS),
        "positives": int(y.sum()),
        "negatives": int((1 - y).sum()),
    }


def counts_at(y, p, thresholds):
    """How many rows of each class have p >= t, for each threshold t: two lists of whole numbers."""
    counts = {}
    for name, label in (("true_positives", 1), ("false_positives", 0)):
        values = np.sort(p[y == label])
        below = np.searchsorted(values, thresholds, side="left")
        counts[name] = (len(values) - below).tolist()
    return counts


def rows_for_page(evaluation):
    """(the rows with the predictions of all runs, in file order; a sentence on what is left out).

    A page holds at most LARGEST bytes of them. If there are more, the rows with the largest errors
    keep their texts, and if that is not enough, the others are left out.
    """
    common = common_words([row["text"] for row in evaluation.rows.values()])
    place = {name: i for i, name in enumerate(evaluation.rows)}
    rows = []
    for i, records in enumerate(zip(*(run.records for run in evaluation.runs), strict=True)):
        rows.append(row_for_page(i, records, evaluation.rows, place, common))
    rows.sort(key=lambda row: -row["error"])

    # first the numbers
    kept = []
    size = 0
    for row in rows:
        bare = without_texts(row)
        size += length_of(bare)
        if size > LARGEST:
            break
        kept.append(bare)

    # ... and then the texts, as far as there is room
    with_texts = 0
    for i, bare in enumerate(kept):
        size += length_of(rows[i]) - length_of(bare)
        if size > LARGEST:
            break
        kept[i] = rows[i]
        with_texts += 1

    sentence = ""
    if with_texts < len(rows):
        sentence = (f"The page would be too large with everything: of {len(rows)} rows, "
                    f"{len(kept) - with_texts} have no texts here and {len(rows) - len(kept)} are "
                    f"left out, those with the smallest errors. All are in predictions.jsonl.")
    return sorted(kept, key=lambda row: row["place"]), sentence


def without_texts(row):
    bare = [{**one, "explanation": None, "in_text": [], "in_explanation": []}
            for one in row["predictions"]]
    return {**row, "text": None, "predictions": bare}


def length_of(row):
    """The bytes that a row takes in a page."""
    return len(json_text(row).encode())


def row_for_page(i, records, rows, place, common):
    """One row: its text and, of each run, the prediction, with the places of cited words."""
    name = str(records[0]["id"])
    text = rows.get(name, {}).get("text")
    label = records[0]["true_label"]

    predictions = []
    for record in records:
        in_text, in_explanation = [], []
        if text is not None and record["explanation"] is not None:
            in_text, in_explanation = citations(text, record["explanation"], common)
        predictions.append({
            "p": record["probability"],
            "raw": record["raw_probability"],
            "decision": record["label"],
            "stated": record["stated_label"],
            "cut": record["tokens_cut"],
            "explanation": record["explanation"],
            "in_text": in_text,
            "in_explanation": in_explanation,
        })
    errors = [abs(label - one["p"]) for one in predictions]
    return {"id": name, "place": place.get(name, i), "label": label, "text": text,
            "error": round(max(errors), 6), "predictions": predictions}
