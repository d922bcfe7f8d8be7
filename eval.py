"""Evaluation of runs: how good is the probability, and is the explanation any good?

    python eval.py --run runs/x --data test.jsonl
    python eval.py --run runs/clsgen --run runs/cls --run runs/lm --model models/x --data test.jsonl

prints tables and writes eval.json and predictions: into runs/x/eval/test for one run, out/test for
several. --model adds the base model, zero-shot. Nothing is fitted on --data: calibration and
threshold came with each run; those of the base model are found on --valid. Notation: N rows, y (N,)
labels in {0, 1}, p (N,) probabilities of class 1, V vocabulary, A answer tokens of a batch. Where a
metric is undefined, a ValueError says why.
"""

import argparse
import hashlib
import json
import re
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clsgen import CLSGen, LoRALinear, Run, load_run, run_main, versions, write_atomically
from clsgen import write_json
from data import Prompts, collate, encode_rows, read_rows
from model import load_llama, read_json


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


def isotonic(y, p):
    """(N,) the best fit to y that never falls as p rises: the share of positives of each row's
    block, by pool adjacent violators (Ayer et al. 1955)."""
    y, p = _check(y, p)
    _, where, rows = np.unique(p, return_inverse=True, return_counts=True)
    positives, blocks = np.bincount(where, weights=y).astype(np.int64), []
    for block in zip(positives.tolist(), rows.tolist(), [1] * len(rows), strict=True):
        # pool while the block before has a mean as high; in integers, so the comparison is exact
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            block = tuple(map(sum, zip(blocks.pop(), block, strict=True)))
        blocks.append(block)
    hits, sizes, values = np.array(blocks).T  # of the block: positives, rows, different p
    return np.repeat(hits / sizes, values)[where]


def corp(y, p):
    """(miscalibration, discrimination, uncertainty): Brier = first - second + third. The CORP split
    (Dimitriadis, Gneiting and Jordan 2021) compares p with its isotonic regression on y, so there
    are no bins to choose."""
    y, p = _check(y, p)
    recalibrated, uncertainty = brier(y, isotonic(y, p)), brier(y, np.full(len(y), y.mean()))
    return brier(y, p) - recalibrated, uncertainty - recalibrated, uncertainty


def sigmoid(z):
    return (1 + np.tanh(np.asarray(z) / 2)) / 2  # cannot overflow


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
        fitted = sigmoid(design @ weights)
        hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design
        step = np.linalg.solve(hessian, design.T @ (y - fitted))
        # a full step overshoots near separation: damped by the largest change of a logit
        weights = weights + step / (1 + np.abs(design @ step).max())
        if np.abs(step).max() <= 1e-10 * (1 + np.abs(weights).max()):
            break
    return float(weights[0]), float(weights[1])


def calibrate(y, z):
    """({"calibration", "threshold"} for a run's meta, calibrated p (N,), a sentence) of raw logits
    z on validation rows: p = sigmoid(z / T + b) by log loss (Platt 1999), then the F1 threshold."""
    try:
        if len(y) < 30:
            raise ValueError(f"{len(y)} validation rows, 30 are due")
        slope, bias = calibration_slope(y, sigmoid(z))
        if slope <= 0:
            raise ValueError(f"the score ranks these rows the wrong way (slope {slope:.3f})")
        temperature = 1 / slope
        sentence = f"calibrated: temperature {temperature:.3f}, bias {bias:.3f}"
    except ValueError as error:
        temperature, bias, sentence = 1.0, 0.0, f"not calibrated: {error}"
    p = sigmoid(np.asarray(z) / temperature + bias)
    fitted = {"calibration": {"temperature": temperature, "bias": bias}}
    return fitted | {"threshold": best_f1_threshold(y, p)}, p, sentence


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


def risk_coverage(correct, confidence):
    """(share of rows kept, accuracy among them, the largest share of accuracy .95) where rows of
    low confidence are left out, at every cut, ties together (El-Yaniv and Wiener 2010)."""
    correct, confidence = _check(correct, confidence)
    _, rows, right = _pool(correct, confidence)
    kept, hits = np.cumsum(rows[::-1]), np.cumsum(right[::-1])
    largest = kept[hits >= 0.95 * kept].max(initial=0)
    return kept / len(correct), hits / kept, float(largest / len(correct))


def group_numbers(groups, n):
    """(n,) a number for each row's group; a group of None, and groups None: each row is its own."""
    groups = [None] * n if groups is None else groups
    if len(groups) != n:
        raise ValueError(f"needs lists of one length; got {n} rows and {len(groups)} groups")
    keys = [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
    return np.unique(keys, return_inverse=True)[1]


def bootstrap(metrics, y, groups, draws, seed):
    """({name: (low, high)}, redrawn): 95 % percentile intervals of metrics {name: (metric, values)}
    from the same resamples of whole groups (Efron 1979; clusters: Field and Welsh 2007). A resample
    on which a metric is undefined, such as AUROC on one class, is drawn again and counted."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    y = np.asarray(y)
    number, rng = group_numbers(groups, len(y)), np.random.default_rng(seed)
    order, sizes = np.argsort(number, kind="stable"), np.bincount(number)
    ends, redrawn, drawn = np.cumsum(sizes), 0, []
    for metric, values in metrics.values():
        metric(y, values)  # a metric undefined on the rows themselves says so, once
    while len(drawn) < draws:
        picked = rng.integers(len(sizes), size=len(sizes))
        # the picked groups' ranges of `order`, one after the other, without a loop
        shift = ends[picked] - np.cumsum(sizes[picked])
        rows = order[np.repeat(shift, sizes[picked]) + np.arange(sizes[picked].sum())]
        try:
            drawn.append([metric(y[rows], values[rows]) for metric, values in metrics.values()])
        except ValueError:
            redrawn += 1
    limits = np.percentile(drawn, (2.5, 97.5), axis=0).T.tolist()
    return dict(zip(metrics, map(tuple, limits), strict=True)), redrawn


def bootstrap_ci(metric, y, p, groups=None, draws=1000, seed=0):
    """(low, high) of metric(y, p) by `bootstrap`; groups None: each row is its own."""
    y, p = _check(y, p)
    return bootstrap({"metric": (metric, p)}, y, groups, draws, seed)[0]["metric"]


def matched_kappa(stated, p, groups=None, seed=0):
    """(cross-fitted, oracle) kappa of the stated labels and p >= t, t the best of 200 quantiles.
    Cross-fitted: each random half of the groups is decided by the other half's t. Oracle: the rows
    choose their own t, which flatters."""
    stated, p = _check(stated, p, need=(0, 1))
    number, decisions = group_numbers(groups, len(p)), np.empty(len(p))

    def best_threshold(rows):
        _check(stated[rows], p[rows], need=(0, 1))
        cuts = np.quantile(p[rows], np.linspace(0, 1, 201))
        return max(cuts, key=lambda t: cohen_kappa(stated[rows], p[rows] >= t))

    half = np.random.default_rng(seed).permutation(number.max() + 1)[number] % 2 == 0
    for rows in (half, ~half):
        decisions[rows] = p[rows] >= best_threshold(~rows)
    oracle = p >= best_threshold(slice(None))
    return cohen_kappa(stated, decisions), cohen_kappa(stated, oracle)


# --- metrics of the text --------------------------------------------------------------------------
WORD = re.compile(r"\w+|[^\w\s]")  # or a punctuation mark, so that collapsed text (")))") has some


def _mean(values):
    return float(np.mean(values)) if len(values) else None


def _or_none(metric, *arrays):
    """None where a metric is undefined on these rows: n/a in the table, null in eval.json."""
    try:
        return metric(*arrays)
    except ValueError:
        return None


def _ngrams(text, n):
    words = WORD.findall(text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(texts):
    """(distinct-2, rep-4). Distinct-2: different over all 2-grams of all texts together (Li et al.
    2016; it falls with more text). Rep-4: 1 - different over all 4-grams of one text (Welleck et
    al. 2020), mean over the texts that have any."""
    pairs = [gram for text in texts for gram in _ngrams(text, 2)]
    fours = [grams for text in texts if (grams := _ngrams(text, 4))]
    rep_4 = _mean([1 - len(set(grams)) / len(grams) for grams in fours])
    return len(set(pairs)) / len(pairs) if pairs else None, rep_4


def flesch(text):
    """Reading ease (Flesch 1948) of English: 206.835 - 1.015 words a sentence - 84.6 syllables a
    word, counted as groups of vowels but for a silent e. None under two sentences and for collapsed
    text (a fourth of the 4-grams are repeats), which may well get a good mark."""
    sentences = [part for part in re.split(r"[.!?]+(?:\s|$)", text) if re.search(r"\w", part)]
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(sentences) < 2 or not words or (repetition([text])[1] or 0) >= 0.25:
        return None
    vowels = (re.findall("[aeiouy]+", re.sub("(?<=[^l])e$", "", word)) for word in words)
    syllables = sum(max(1, len(groups)) for groups in vowels)
    return 206.835 - 1.015 * len(words) / len(sentences) - 84.6 * syllables / len(words)


def evidence_scores(rows, texts, file_rows):
    """(recall, precision, invented) of the evidence phrases that an explanation cites, as whole
    words in any case. Recall: share of the row's evidence that is cited. Of the file's phrases that
    are cited, precision: share that are the row's own; invented: share that its text does not have
    at all. Means over the rows that have the field."""

    def spell(text):
        return " ".join(["", *WORD.findall(text.lower()), ""])

    known = {spell(phrase) for row in file_rows for phrase in row.get("evidence") or ()} - {" "}
    recall, precision, invented = [], [], []
    for row, text in zip(rows, texts, strict=True):
        own = {spell(phrase) for phrase in row.get("evidence") or ()} - {" "}
        cited = {phrase for phrase in known if phrase in spell(text)}
        recall += [len(cited & own) / len(own)] if own else []
        if cited and "evidence" in row:
            precision.append(len(cited & own) / len(cited))
            invented.append(_mean([phrase not in spell(row["text"]) for phrase in cited]))
    return _mean(recall), _mean(precision), _mean(invented)


def per_token(_, sums):
    """Mean over answer tokens, from (N, 2) sums over a row's tokens and their numbers."""
    total, tokens = sums.sum(axis=0)
    if not tokens or np.isnan(total):
        raise ValueError("no reference explanation, or no base model to compare with")
    return float(total / tokens)


def collapse(predictions, sums):
    """Has the language model been lost? From texts that it wrote and `reference_sums`."""
    distinct_2, rep_4 = repetition([prediction["explanation"] for prediction in predictions])
    return {"parsable": _mean([one["stated_label"] is not None for one in predictions]),
            "empty": _mean([not one["explanation"].strip() for one in predictions]),
            "distinct_2": distinct_2, "rep_4": rep_4,
            "reference_nll": _or_none(per_token, None, sums[:, [0, 2]]),
            "base_kl": _or_none(per_token, None, sums[:, [1, 2]])}


# --- what only the model can tell -----------------------------------------------------------------
@torch.inference_mode()
def reference_sums(run, rows, size, progress=False):
    """(N, 3) sums over the tokens of each row's own explanation: -log p(token) and KL(run || base
    model), its LoRA switched off, in nats; and 1. A merged run does not know its base: NaN."""
    examples, sums = encode_rows(rows, run.prompts, refuse=False), np.zeros((len(rows), 3))
    lora = any(isinstance(module, LoRALinear) for module in run.llama.modules())
    order = sorted((i for i, example in enumerate(examples) if example.answer),
                   key=lambda i: -len(examples[i]))
    for start in tqdm(range(0, len(order), size), unit="batch", disable=not progress):
        indices = np.array(order[start : start + size])
        batch = collate([examples[i] for i in indices], run.device)
        logp = run.model(batch)[1].float().log_softmax(-1)  # (A, V)
        nll = -logp.gather(-1, batch.targets[:, None])[:, 0]
        kl = torch.full_like(nll, torch.nan)
        if lora:
            try:
                LoRALinear.off = True
                base = run.model(batch)[1].float().log_softmax(-1)
            finally:
                LoRALinear.off = False
            kl = (logp.exp() * (logp - base)).sum(-1)
        values = torch.stack((nll, kl, torch.ones_like(nll)), dim=1).cpu().numpy()
        np.add.at(sums, indices[batch.answer_rows.cpu()], values)
    return sums


def raw_logits(run, rows, size=16, progress=False):
    """(N,) logits of a run's own score, before calibration."""
    records = run.predict(rows, False, size, progress=progress)
    p = np.array([record["raw_probability"] for record in records])
    return np.log(p) - np.log1p(-p)


# --- evaluation -----------------------------------------------------------------------------------
UNFITTED = {"scorer": "label_token", "calibration": {"temperature": 1.0, "bias": 0.0},
            "threshold": 0.5}


def score_metrics(y, p, decisions=None, groups=None, draws=1000, seed=0, true_p=None, sums=None,
                  first=None):
    """All metrics of one probability; those with a 95 % bootstrap interval have it in `intervals`.
    `decisions` are those at the validation threshold; true_p has NaN where it is not known; sums
    (N, 2) is for `per_token`; first {name: p or sums} is the scorer to be compared with."""
    y, p = _check(y, p, need=(0, 1))
    half = (p >= 0.5).astype(np.float64)
    metrics = {"auroc": (auroc, p), "average_precision": (average_precision, p),
               "f1_half": (f1_score, half), "accuracy": (lambda y, yhat: 1 - brier(y, yhat), half)}
    metrics |= {} if decisions is None else {"f1": (f1_score, np.array(decisions))}
    metrics |= {"log_loss": (log_loss, p)}
    metrics |= {} if sums is None else {"reference_nll": (per_token, sums)}
    for name in [name for name in metrics if name in (first or ())]:
        metric, values = metrics[name]
        both = np.stack((values, first[name]), axis=1)
        metrics[f"{name}_difference"] = (
            lambda y, both, of=metric: of(y, both[:, 0]) - of(y, both[:, 1]), both)
    result = {name: metric(y, values) for name, (metric, values) in metrics.items()}
    result["intervals"], result["redrawn"] = bootstrap(metrics, y, groups, draws, seed)
    share, accuracy, coverage = risk_coverage(y == half, 2 * np.abs(p - 0.5))
    parts = zip(("miscalibration", "discrimination", "uncertainty"), corp(y, p), strict=True)
    slope, intercept = _or_none(calibration_slope, y, p) or (None, None)
    floor, floor_q95 = ece_floor(p, 15, draws, seed)
    true_p = np.full(len(y), np.nan) if true_p is None else true_p
    return result | {
        "brier": brier(y, p), **dict(parts), "slope": slope, "intercept": intercept,
        "ece": ece(y, p), "ece_floor": floor, "ece_floor_q95": floor_q95,
        "accuracy_at_80": float(accuracy[share >= 0.8][0]), "coverage_at_95": coverage,
        "true_p_error": _mean(np.abs(p - true_p)[~np.isnan(true_p)]),
    }


def text_metrics(rows, predictions, sums, file_rows, seed=0):
    """Does the text say what p says, does it cite the evidence, is it still a text? On the rows
    that were asked for one; None where there is nothing to measure."""
    texts = [prediction["explanation"] for prediction in predictions]
    p = np.array([prediction["probability"] for prediction in predictions])
    # an answer that states no label is a third class, 2: it agrees with neither
    stated = np.array([prediction["stated_label"] for prediction in predictions], dtype=np.float64)
    stated = np.nan_to_num(stated, nan=2)
    parsable, head = stated < 2, (p >= 0.5).astype(np.int64)
    correct, agree = head == [row["label"] for row in rows], head == stated
    groups = [rows[i].get("group") for i in np.flatnonzero(parsable)]
    kappas = _or_none(matched_kappa, stated[parsable], p[parsable], groups, seed) or (None, None)
    # abstaining where the text disagrees with p, and among the others by |p - .5|
    risk = _or_none(risk_coverage, correct, (agree + np.abs(p - 0.5)) / 2)
    recall, precision, invented = evidence_scores(rows, texts, file_rows)
    ease = [value for value in map(flesch, texts) if value is not None]
    return {
        "n_explained": len(texts), "n_parsable": int(parsable.sum()),
        "auroc_alignment": _or_none(auroc, stated[parsable], p[parsable]),
        "kappa": _or_none(cohen_kappa, head[parsable], stated[parsable]),
        "kappa_all": _or_none(cohen_kappa, head, stated),
        "kappa_matched": kappas[0], "kappa_oracle": kappas[1],
        "agree_share": _mean(agree), "agree_accuracy": _mean(correct[agree]),
        "agree_coverage_at_95": risk[2] if risk else None,
        **collapse(predictions, sums), "flesch": _mean(ease), "n_flesch": len(ease),
        "evidence_recall": recall, "evidence_precision": precision, "evidence_invented": invented,
    }


TABLES = {  # title: columns, by their names in eval.json
    "the probability; log loss in nats":
        "calibrated auroc average_precision log_loss brier",
    "decisions at p >= .5, f1 at the run's threshold; the 80 % of rows with the largest |p - .5|":
        "accuracy f1_half f1 accuracy_at_80 coverage_at_95",
    "calibration: ECE, and that of a perfect p (mean, 95 %); CORP parts; slope 1 is best":
        "ece ece_floor ece_floor_q95 miscalibration discrimination uncertainty slope intercept "
        "true_p_error",
    "does the text say what p says?":
        "n_explained n_parsable auroc_alignment kappa kappa_all kappa_matched kappa_oracle "
        "agree_share agree_accuracy agree_coverage_at_95",
    "is it still a text? NLL of the reference and KL from the base model, nats a token; evidence":
        "parsable empty distinct_2 rep_4 reference_nll base_kl flesch evidence_recall "
        "evidence_precision evidence_invented",
    "less the first line's, on the same resamples":
        "auroc_difference log_loss_difference reference_nll_difference",
}


def _cell(result, key):
    value, interval = result.get(key), result.get("intervals", {}).get(key)
    if value is None or isinstance(value, bool):
        return {None: "n/a", True: "yes", False: "no"}[value]
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text + (" [{:.3f}, {:.3f}]".format(*interval) if interval else "")


def table(columns, keys):
    """Text, a line for each scorer, from {name: metrics}: a value, its interval, or n/a. The names
    of the metrics are broken at "_"."""
    lines = [["", *parts] for parts in zip_longest(*(key.split("_") for key in keys), fillvalue="")]
    lines += [[name, *(_cell(result, key) for key in keys)] for name, result in columns.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def print_tables(columns):
    """The tables of {scorer: metrics}, each with the scorers that have any of its columns."""
    for title, keys in TABLES.items():
        keys = keys.split()
        if some := {name: one for name, one in columns.items() if any(key in one for key in keys)}:
            print(f"\n{title}\n{table(some, keys)}")


# --- command --------------------------------------------------------------------------------------
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, action="append",
        help="run folder, from train.py; again for each run to compare with the first")
    add("--data", required=True, type=Path, help="JSON Lines file with labels")
    add("--model", help="folder of the base model: scored as well, zero-shot, with the first run's "
        "prompts (default: not, and each run names its base)")
    add("--valid", type=Path, help="validation rows: calibrate the base model's p as a run's is")
    add("--rows", type=int, help="only the first N rows of a seeded shuffle (default: all)")
    add("--explain", type=int, help="texts for the first N of that shuffle only (default: all)")
    add("--out", type=Path, help="results (default: RUN/eval/DATA; of several runs, out/DATA)")
    add("--overwrite", action="store_true", help="replace results that are there, or half there")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the base model")
    add("--device", help="such as cpu or cuda")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--draws", type=int, default=1000, help="resamples for intervals and for the ECE floor")
    add("--seed", type=int, default=0, help="of the shuffle and the resamples")
    args = parser.parse_args(argv)
    least = min(1 if args.rows is None else args.rows, args.batch, args.draws)
    if least < 1 or (args.explain or 0) < 0:
        raise ValueError("--rows, --batch and --draws must be at least 1, --explain at least 0")
    if args.valid and not args.model:
        raise ValueError("--valid is for the base model, of --model; runs are calibrated already")
    if len(set(args.run)) < len(args.run):
        raise ValueError("--run names one folder twice")
    results = args.run[0] / "eval" if len(args.run) == 1 else Path("out")
    args.out = args.out or results / args.data.stem
    if (args.out / "eval.json").exists() and not args.overwrite:
        raise ValueError(f"{args.out}/eval.json exists; give another --out or --overwrite")
    return args


def load_scorer(folder, args):
    """A run; folder None: the base model, zero-shot, with the first run's prompts. It answers by
    its label-token score; `evaluate` calibrates that on --valid."""
    run = load_run(folder or args.run[0], args.model, args.dtype, args.device)
    if folder:
        return run
    base = CLSGen(load_llama(args.model, run.llama.norm.weight.dtype, run.device).pack()).eval()
    prompts = Prompts(args.model, **run.prompts.settings())
    return Run(base, prompts, run.meta | UNFITTED, "zero-shot")


def run_rows(run, rows, count, args):
    """{"predictions", "sums": `reference_sums`, "seconds"} of one scorer, with texts for the first
    `count` rows. Kept until all scorers are done, so that a stopped command can go on."""
    of = json.dumps([run.name, run.meta, rows, count, args.batch, args.dtype, versions()])
    path = args.out / f"scored-{hashlib.sha256(of.encode()).hexdigest()[:16]}.part"
    if path.exists():
        print(f"run {run.name}: its rows were scored before; --overwrite scores them again")
    else:
        start, sums = time.perf_counter(), np.zeros((len(rows), 3))
        predictions = run.predict(rows[:count], True, args.batch, progress=count > 0)
        predictions += run.predict(rows[count:], False, args.batch, progress=count < len(rows))
        sums[:count] = reference_sums(run, rows[:count], args.batch, progress=count > 0)
        write_json(path, {"predictions": predictions, "sums": sums.tolist(),
                          "seconds": time.perf_counter() - start})
    return read_json(path)


def score_run(run, rows, file_rows, score, args):
    """(predictions, {scorer: metrics}): the run's own score, calibrated; the same as it came; and
    beside a head, the label token's as it came."""
    count = len(rows) if args.explain is None else args.explain
    found = run_rows(run, rows, count, args)
    predictions, sums = found["predictions"], np.array(found["sums"])
    p, raw, token, labels = ([one[key] for one in predictions] for key in (
        "probability", "raw_probability", "label_token_probability", "label"))
    head, fitted = run.meta["scorer"] == "head", run.name != "zero-shot" or args.valid
    own = score(p, labels if fitted else None, sums[:, [0, 2]] if sums.any() else None)
    own |= text_metrics(rows[:count], predictions[:count], sums[:count], file_rows, args.seed)
    own |= {"calibrated": run.meta["calibration"] != UNFITTED["calibration"], "run": run.name,
            "prompts_cut": sum(one["tokens_cut"] > 0 for one in predictions),
            "seconds": found["seconds"]}
    scorers = {"head" if head else "label token": own} | ({"raw": score(raw)} if fitted else {})
    return predictions, scorers | ({"label token": score(token)} if head else {})


def evaluate(args, rows, file_rows):
    """{scorer: metrics} of the runs, the base model and the majority; writes the predictions."""
    y, groups = [row["label"] for row in rows], [row.get("group") for row in rows]
    true_p = np.array([row.get("probability", np.nan) for row in rows])
    folders, first = args.run + [None] * bool(args.model), {}
    valid = read_rows(args.valid) if args.valid else []
    for folder in folders[1:]:
        load_scorer(folder, args)  # what does not load says so now, not after hours
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.out.glob("scored-*.part") if args.overwrite else ():
        path.unlink()

    def score(p, decisions=None, sums=None):
        metrics = score_metrics(y, p, decisions, groups, args.draws, args.seed, true_p, sums, first)
        if not first:  # what all others are compared with
            first.update({"auroc": p, "log_loss": p, "reference_nll": sums})
        return {"calibrated": False} | metrics

    columns, lines = {}, []
    for folder in folders:
        run = load_scorer(folder, args)
        if valid and not folder:  # the base model gets what the runs got
            z = raw_logits(run, valid, args.batch, progress=True)
            fitted, _, sentence = calibrate([row["label"] for row in valid], z)
            run.meta |= fitted
            print(f"zero-shot {sentence}")
        predictions, scorers = score_run(run, rows, file_rows, score, args)
        prefix = f"{folder or 'zero-shot'} " if len(folders) > 1 else ""
        columns |= {prefix + name: metrics for name, metrics in scorers.items()}
        lines += [json.dumps(one | {"group": group}, ensure_ascii=False) + "\n"
                  for one, group in zip(predictions, groups, strict=True)]
        write_atomically(args.out / "predictions.jsonl", "".join(lines))
        base_rate, run = run.meta["base_rate"], None  # room for the next one
    return columns | {"majority": score([base_rate] * len(rows))}


def main(argv=None):
    args, start = parse(argv), time.perf_counter()
    rows = file_rows = read_rows(args.data)
    if args.rows is not None or args.explain is not None:
        order = np.random.default_rng(args.seed).permutation(len(file_rows))
        rows = [file_rows[i] for i in order[: args.rows]]
    y, known = [row["label"] for row in rows], [row for row in rows if "probability" in row]
    _check(y, y, need=(0, 1))  # before the model works for minutes
    columns = evaluate(args, rows, file_rows)
    n_groups = len(set(group_numbers([row.get("group") for row in rows], len(rows))))
    true = ([row[key] for row in known] for key in ("label", "probability"))
    report = {"metrics": columns, "n": len(rows), "positives": sum(y), "groups": n_groups,
              "bayes_auroc": _or_none(auroc, *true), "seconds": time.perf_counter() - start,
              "arguments": vars(args), "versions": versions()}
    write_atomically(args.out / "eval.json", json.dumps(report, indent=1, default=str) + "\n")
    for path in args.out.glob("scored-*.part"):
        path.unlink()
    print(f"\n{args.data}: {len(rows)} rows, {sum(y)} positive, {n_groups} groups; [95 % interval, "
          f"groups resampled {args.draws} times]")
    if report["bayes_auroc"]:
        print(f"the true p that the rows give has AUROC {report['bayes_auroc']:.3f}: the ceiling")
    if n_groups < 20:
        print("warning: under 20 groups the intervals are too narrow")
    print_tables(columns)
    print(f"\nwrote {args.out}/eval.json and predictions.jsonl")


if __name__ == "__main__":
    run_main(main)
