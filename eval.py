"""Evaluation of a run: how good is the probability, and does the explanation agree with it?

    python eval.py --run runs/x --data test.jsonl

prints a table and writes eval.json and predictions.jsonl into runs/x/eval/test. Nothing is fitted
here: calibration and threshold came with the run. Notation: y (N,) labels in {0, 1}, p (N,)
probabilities of class 1. Where a metric is undefined, a ValueError says why.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np

from clsgen import load_run, run_main, versions, write_atomically
from data import read_rows


# --- metrics of the probability -------------------------------------------------------------------
def _check(y, p, need=()):
    """y and p as float64 arrays; `need` names the classes that the metric cannot do without."""
    y, p = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        raise ValueError(f"needs two lists of one length, not empty; got {y.shape} and {p.shape}")
    if not (np.isin(y, (0, 1)).all() and p.min() >= 0 and p.max() <= 1):  # so NaN fails too
        raise ValueError(f"labels must be 0 or 1 and values in [0, 1]; found labels {y.min():g} to "
                         f"{y.max():g}, values {p.min():g} to {p.max():g}")
    for label in need:
        if not (y == label).any():
            raise ValueError(f"no row of class {label}: the metric is undefined")
    return y, p


def _pool(y, p):
    """Ascending unique values of p, with their rows and positives: tied rows are treated alike."""
    values, where, rows = np.unique(p, return_inverse=True, return_counts=True)
    return values, rows, np.bincount(where, weights=y)


def auroc(y, p):
    """Chance that a random positive scores above a random negative, a tie counting half: the
    Mann-Whitney statistic (Hanley and McNeil 1982)."""
    y, p = _check(y, p, need=(0, 1))
    _, rows, positives = _pool(y, p)
    negatives = rows - positives
    wins = positives @ (np.cumsum(negatives) - negatives / 2)
    return float(wins / (positives.sum() * negatives.sum()))


def average_precision(y, p):
    """Mean precision over thresholds, weighted by the recall each adds (no interpolation)."""
    y, p = _check(y, p, need=(1,))
    _, rows, positives = _pool(y, p)
    rows, positives = rows[::-1], positives[::-1]
    return float(np.cumsum(positives) / np.cumsum(rows) @ positives / positives.sum())


def f1_score(y, yhat):
    """2 TP / (2 TP + FP + FN) of the decisions yhat in {0, 1} (van Rijsbergen 1979)."""
    _check(yhat, y)  # decisions are 0 or 1 as labels are
    y, yhat = _check(y, yhat)
    if not (y.any() or yhat.any()):
        raise ValueError("no positive among labels or decisions: F1 is undefined")
    return float(2 * (y @ yhat) / (y.sum() + yhat.sum()))


def best_f1_threshold(y, p):
    """The highest t whose decisions p >= t have the best F1. It lies halfway to the next lower p,
    so that rounding between two batchings of a row (1e-5) does not turn its decision round."""
    y, p = _check(y, p, need=(1,))
    values, rows, positives = (counts[::-1] for counts in _pool(y, p))
    best = int(np.argmax(2 * np.cumsum(positives) / (positives.sum() + np.cumsum(rows))))
    lower = values[best + 1] if best + 1 < len(values) else 0.0
    middle = (lower + values[best]) / 2
    return float(middle if middle > lower else values[best])


def brier(y, p):
    """Mean squared difference of p and y (Brier 1950)."""
    y, p = _check(y, p)
    return float(np.mean((p - y) ** 2))


def log_loss(y, p):
    """Mean -log of the true class's probability, in nats. A certain error costs 36, not infinity:
    p is clipped by the float64 epsilon, as in scikit-learn."""
    y, p = _check(y, p)
    tiny = np.finfo(np.float64).eps
    p = np.clip(p, tiny, 1 - tiny)
    return float(-np.mean(np.where(y == 1, np.log(p), np.log1p(-p))))


def _equal_mass_bins(p, bins):
    """Bin number of each row: equal shares of the ranked rows, ties together by their mid-rank."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    _, where, rows = np.unique(p, return_inverse=True, return_counts=True)
    middle = (np.cumsum(rows) - rows / 2) / len(p)
    return np.floor(middle * bins).astype(np.int64)[where]


def ece(y, p, bins=15):
    """Expected calibration error (Naeini et al. 2015) over equal-mass bins (Nixon et al. 2019):
    |mean p - share of positives|, weighted. Never zero on few rows: read it beside `ece_floor`."""
    y, p = _check(y, p)
    return float(np.abs(np.bincount(_equal_mass_bins(p, bins), weights=p - y)).sum() / len(p))


def ece_floor(p, bins=15, draws=1000, seed=0):
    """Mean and 95th percentile of the ECE of a perfect p: labels are drawn from p itself
    (consistency resampling, Broecker and Smith 2007)."""
    _, p = _check(np.zeros(len(p)), p)
    # a seed of its own kind: simulated rows may have come from default_rng(seed) themselves
    where, rng = _equal_mass_bins(p, bins), np.random.default_rng([seed, len(p)])
    expected = np.bincount(where, weights=p)
    drawn = (where[rng.random(len(p)) < p] for _ in range(draws))
    gaps = [expected - np.bincount(hits, minlength=len(expected)) for hits in drawn]
    values = np.abs(gaps).sum(axis=1) / len(p)
    return float(values.mean()), float(np.quantile(values, 0.95))


def corp(y, p):
    """(miscalibration, discrimination, uncertainty): Brier = first - second + third. The CORP split
    (Dimitriadis, Gneiting and Jordan 2021) compares p with its isotonic regression on y (pool
    adjacent violators), so there are no bins to choose."""
    y, p = _check(y, p)
    _, rows, positives = _pool(y, p)
    blocks = []  # (positives, rows), their means rising
    for block in zip(positives.astype(np.int64).tolist(), rows.tolist(), strict=True):
        # pool while the block before has a mean as high; in integers, so the comparison is exact
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1])
        blocks.append(block)
    hits, size = np.array(blocks, dtype=np.float64).T
    recalibrated = float(np.sum(hits * (1 - hits / size)) / len(y))
    uncertainty = float(y.mean() * (1 - y.mean()))
    return brier(y, p) - recalibrated, uncertainty - recalibrated, uncertainty


def calibration_slope(y, p):
    """(slope, intercept) of a logistic regression of y on logit(p) (Cox 1958); (1, 0) is ideal and
    a slope under 1 overconfident. p is clipped to [1e-7, 1 - 1e-7]. Where one cut of p parts the
    classes, and where p is constant, there is no one finite fit: ValueError."""
    y, p = _check(y, p, need=(0, 1))
    p = np.clip(p, 1e-7, 1 - 1e-7)
    x = np.log(p) - np.log1p(-p)
    zero, one = x[y == 0], x[y == 1]
    if zero.max() <= one.min() or one.max() <= zero.min():
        raise ValueError("one cut of p parts the classes: no finite calibration slope")
    design = np.stack([x, np.ones_like(x)], axis=1)

    weights = np.zeros(2)
    for _ in range(1000):  # Newton; ten steps or so, more near separation
        fitted = (1 + np.tanh(design @ weights / 2)) / 2  # a sigmoid that cannot overflow
        hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design
        step = np.linalg.solve(hessian, design.T @ (y - fitted))
        # a full step overshoots near separation: damped by the largest change of a logit
        weights = weights + step / (1 + np.abs(design @ step).max())
        if np.abs(step).max() <= 1e-10 * (1 + np.abs(weights).max()):
            break
    return float(weights[0]), float(weights[1])


def cohen_kappa(a, b):
    """Agreement of two lists of labels (numbers) beyond chance (Cohen 1960): 1 is perfect."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a) or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"needs two lists of one length, no NaN; got {a.shape} and {b.shape}")
    labels = np.union1d(a, b)[:, None]
    if len(labels) == 1:
        raise ValueError("both lists hold one label only: kappa is undefined")
    chance = (a == labels).mean(axis=1) @ (b == labels).mean(axis=1)
    return float((np.mean(a == b) - chance) / (1 - chance))


def bootstrap(metrics, y, groups, draws, seed):
    """({name: (low, high)}, redrawn): 95 % percentile intervals of metrics {name: (metric, p)} from
    the same resamples of whole groups (Efron 1979; clusters: Field and Welsh 2007). A resample of
    one class is drawn again and counted: rank metrics are undefined on it. Group None: its own."""
    groups = [None] * len(y) if groups is None else groups
    y, _ = _check(y, np.zeros(len(groups)), need=(0, 1))  # as many groups as rows
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    keys = [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
    number, rng = np.unique(keys, return_inverse=True)[1], np.random.default_rng(seed)
    order, sizes = np.argsort(number, kind="stable"), np.bincount(number)
    ends, redrawn, values = np.cumsum(sizes), 0, []
    while len(values) < draws:
        picked = rng.integers(len(sizes), size=len(sizes))
        # the picked groups' ranges of `order`, one after the other, without a loop
        shift = ends[picked] - np.cumsum(sizes[picked])
        rows = order[np.repeat(shift, sizes[picked]) + np.arange(sizes[picked].sum())]
        if y[rows].all() or not y[rows].any():
            redrawn += 1
        else:
            values.append([metric(y[rows], p[rows]) for metric, p in metrics.values()])
    limits = np.percentile(values, (2.5, 97.5), axis=0).T.tolist()
    return dict(zip(metrics, map(tuple, limits), strict=True)), redrawn


def bootstrap_ci(metric, y, p, groups=None, draws=1000, seed=0):
    """(low, high) of metric(y, p) by `bootstrap`; groups None: each row is its own."""
    y, p = _check(y, p, need=(0, 1))
    return bootstrap({"metric": (metric, p)}, y, groups, draws, seed)[0]["metric"]


# --- metrics of the text --------------------------------------------------------------------------
def _mean(values):
    return float(np.mean(values)) if len(values) else None


def _or_none(metric, *arrays):
    """None where a metric is undefined on these rows: n/a in the table, null in eval.json."""
    try:
        return metric(*arrays)
    except ValueError:
        return None


def _ngrams(text, n):
    """Of lower-case words and punctuation marks, so that a text collapsed to ")))" has some."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(texts):
    """(distinct-2, rep-4). Distinct-2: different over all 2-grams of all texts together (Li et al.
    2016; it falls with more text). Rep-4: 1 - different over all 4-grams of one text (Welleck et
    al. 2020), mean over the texts that have any."""
    pairs = [gram for text in texts for gram in _ngrams(text, 2)]
    fours = [grams for text in texts if (grams := _ngrams(text, 4))]
    rep_4 = _mean([1 - len(set(grams)) / len(grams) for grams in fours])
    return len(set(pairs)) / len(pairs) if pairs else None, rep_4


def evidence_scores(rows, texts, file_rows):
    """(recall, precision) of the evidence phrases that a text has, as whole words in any case.
    Recall: share of the row's evidence that is cited. Precision: share of the file's phrases
    cited that are the row's own. Means over the rows that have the field."""

    def spell(text):
        return " ".join(["", *(word for (word,) in _ngrams(text, 1)), ""])

    own = [{spell(text) for text in row.get("evidence") or ()} - {" "} for row in rows + file_rows]
    known, recall, precision = set().union(*own), [], []
    for row, evidence, text in zip(rows, own, texts, strict=False):
        cited = {phrase for phrase in known if phrase in spell(text)}
        if evidence:
            recall.append(len(cited & evidence) / len(evidence))
        if cited and row.get("evidence") is not None:
            precision.append(len(cited & evidence) / len(cited))
    return _mean(recall), _mean(precision)


# --- evaluation -----------------------------------------------------------------------------------
def score_metrics(y, p, decisions=None, groups=None, draws=1000, seed=0):
    """All metrics of one probability; `decisions` are those at the validation threshold. The first
    five have their 95 % bootstrap interval in `intervals`."""
    y, p = _check(y, p, need=(0, 1))
    half = (p >= 0.5).astype(np.float64)
    metrics = {"auroc": (auroc, p), "average_precision": (average_precision, p),
               "f1_half": (f1_score, half), "accuracy": (lambda y, yhat: 1 - brier(y, yhat), half)}
    metrics |= {} if decisions is None else {"f1": (f1_score, np.array(decisions))}
    result = {name: metric(y, values) for name, (metric, values) in metrics.items()}
    result["intervals"], result["redrawn"] = bootstrap(metrics, y, groups, draws, seed)
    result |= {"log_loss": log_loss(y, p), "brier": brier(y, p), "ece": ece(y, p)}
    slope = _or_none(calibration_slope, y, p) or (None, None)
    result |= zip(("miscalibration", "discrimination", "uncertainty"), corp(y, p), strict=True)
    result |= zip(("slope", "intercept"), slope, strict=True)
    result |= zip(("ece_floor", "ece_floor_q95"), ece_floor(p, 15, draws, seed), strict=True)
    return result


def text_metrics(rows, predictions, file_rows):
    """Stated label against p, evidence, signs of collapse, on the rows that were asked for a text;
    None where there is nothing to measure."""
    asked = [i for i, prediction in enumerate(predictions) if prediction["explanation"] is not None]
    texts = [predictions[i]["explanation"] for i in asked]
    p = np.array([predictions[i]["probability"] for i in asked])
    # an answer that states no label is a third class, 2: it agrees with neither
    stated = np.array([predictions[i]["stated_label"] for i in asked], dtype=np.float64)
    stated = np.nan_to_num(stated, nan=2)
    parsable, head = stated < 2, (p >= 0.5).astype(np.int64)
    distinct_2, rep_4 = repetition(texts)
    recall, precision = evidence_scores([rows[i] for i in asked], texts, file_rows)
    return {
        "n_explained": len(asked), "n_parsable": int(parsable.sum()), "parsable": _mean(parsable),
        "auroc_alignment": _or_none(auroc, stated[parsable], p[parsable]),
        "kappa": _or_none(cohen_kappa, head[parsable], stated[parsable]),
        "kappa_all": _or_none(cohen_kappa, head, stated),
        "evidence_recall": recall, "evidence_precision": precision,
        "empty": _mean([not text.strip() for text in texts]),
        "distinct_2": distinct_2, "rep_4": rep_4,
    }


def evaluate(rows, predictions, draws=1000, seed=0, file_rows=None):
    """A run's predictions, measured: one dictionary of numbers or None, ready for JSON. rows from
    `read_rows`, predictions from `predict`, in one order. file_rows: all rows of the file where
    rows are a part; their evidence is the vocabulary of `evidence_scores`."""
    if [row["id"] for row in rows] != [prediction["id"] for prediction in predictions]:
        raise ValueError("rows and predictions must have the same ids in the same order")
    y = np.array([row["label"] for row in rows])
    p = np.array([prediction["probability"] for prediction in predictions])
    groups, known = [row.get("group") for row in rows], [row.get("probability") for row in rows]
    simulated = np.array([i for i, true_p in enumerate(known) if true_p is not None], dtype=int)
    true_p = np.array([known[i] for i in simulated])
    n_groups = len({i if group is None else group for i, group in enumerate(groups)})
    result = {"n": len(rows), "positives": int(y.sum()), "groups": n_groups}
    result |= score_metrics(y, p, [one["label"] for one in predictions], groups, draws, seed)
    result |= {"n_true_p": len(true_p), "true_p_error": _mean(abs(p[simulated] - true_p)),
               "bayes_auroc": _or_none(auroc, y[simulated], true_p)}
    result |= text_metrics(rows, predictions, file_rows or rows)
    few = [f"only {n_groups} groups, under 20: the intervals are too narrow"] * (n_groups < 20)
    cut = sum(one["tokens_cut"] > 0 for one in predictions)
    return result | {"prompts_cut": cut, "warnings": few}


TABLE = {  # the rows of the table under their names in eval.json, and what helps to read them
    "auroc": "chance .5", "average_precision": "chance: base rate", "f1_half": "p >= .5",
    "f1": "at the run's threshold", "accuracy": "p >= .5", "log_loss": "nats", "brier": "",
    "miscalibration": "CORP, best 0", "discrimination": "CORP, best high",
    "uncertainty": "CORP, of data", "slope": "calibration, best 1", "intercept": "best 0",
    "ece": "best: its floor", "ece_floor": "mean", "ece_floor_q95": "95 %",
    "true_p_error": "mean |p - true p|", "bayes_auroc": "of true p: ceiling",
    "redrawn": "one-class draws", "prompts_cut": "rows", "n_explained": "rows",
    "n_parsable": "state a label", "parsable": "share",
    "auroc_alignment": "p against stated", "kappa": "p >= .5, stated",
    "kappa_all": "unparsable disagrees", "evidence_recall": "", "evidence_precision": "",
    "empty": "share of texts", "distinct_2": "best high", "rep_4": "best 0",
}


def table(columns, keys=TABLE):
    """Text, a line for each key, from {heading: what `evaluate` or `score_metrics` gives}. Only the
    first column shows intervals; what a column does not have is n/a."""
    lines = [["", *columns]]
    for key in keys:
        lines.append([f"{key:18} {TABLE.get(key, '')}".rstrip()])
        for result in columns.values():
            value = result.get(key)
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            if len(lines[-1]) == 1 and key in result.get("intervals", ()):
                text += " [{:.3f}, {:.3f}]".format(*result["intervals"][key])
            lines[-1].append("n/a" if value is None else text)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# --- command --------------------------------------------------------------------------------------
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, help="run folder, from train.py")
    add("--data", required=True, type=Path, help="JSON Lines file with labels")
    add("--rows", type=int, help="only the first N rows of a seeded shuffle (default: all)")
    add("--explain", type=int, help="explain only the first N of that shuffle (default: all)")
    add("--out", type=Path, help="folder for the results (default: RUN/eval/DATA)")
    add("--overwrite", action="store_true", help="replace results that are there")
    add("--model", help="folder of the base model (default: the one that the run names)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the base model")
    add("--device", help="such as cpu or cuda")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--draws", type=int, default=1000, help="resamples for intervals and for the ECE floor")
    add("--seed", type=int, default=0, help="of the shuffle and the resamples")
    args = parser.parse_args(argv)
    least = min(1 if args.rows is None else args.rows, args.batch, args.draws)
    if least < 1 or (args.explain or 0) < 0:
        raise ValueError("--rows, --batch and --draws must be at least 1, --explain at least 0")
    args.out = args.out or args.run / "eval" / args.data.stem
    if (args.out / "eval.json").exists() and not args.overwrite:
        raise ValueError(f"{args.out}/eval.json exists; give another --out or --overwrite")
    return args


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    rows = file_rows = read_rows(args.data)
    if args.rows is not None or args.explain is not None:
        order = np.random.default_rng(args.seed).permutation(len(file_rows))
        rows = [file_rows[i] for i in order[: args.rows]]
    y, groups = [row["label"] for row in rows], [row.get("group") for row in rows]
    _check(y, y, need=(0, 1))  # before the model works for minutes
    run = load_run(args.run, model=args.model, dtype=args.dtype, device=args.device)
    args.out.mkdir(parents=True, exist_ok=True)  # not after minutes of work
    count = len(rows) if args.explain is None else args.explain
    predictions = run.predict(rows[:count], True, args.batch, progress=count > 0)
    predictions += run.predict(rows[count:], False, args.batch, progress=count < len(rows))
    seconds = time.perf_counter() - start
    head = evaluate(rows, predictions, args.draws, args.seed, file_rows)
    columns = {"head": head}
    others = {name: [one.get(key) for one in predictions] for name, key in (
        ("raw", "raw_probability"), ("label token", "label_token_probability"))}
    for name, p in (others | {"majority": [run.meta["base_rate"]] * len(rows)}).items():
        if None not in p:
            columns[name] = score_metrics(y, p, None, groups, args.draws, args.seed)
    print(f"\n{args.run} on {args.data}: {head['n']} rows, {head['positives']} positive, "
          f"{head['groups']} groups; [95 % interval, groups resampled {args.draws} times]\n")
    print(table(columns), *(f"warning: {note}" for note in head["warnings"]), sep="\n")
    report = {"metrics": columns, "n": len(rows), "run": predictions[0]["run"], "seconds": seconds,
              "arguments": vars(args), "versions": versions()}
    lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions]
    write_atomically(args.out / "predictions.jsonl", "".join(lines))
    write_atomically(args.out / "eval.json", json.dumps(report, indent=1, default=str) + "\n")
    print(f"wrote {args.out}/eval.json and predictions.jsonl")


if __name__ == "__main__":
    run_main(main)
