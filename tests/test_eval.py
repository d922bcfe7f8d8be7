"""eval.py against scikit-learn, hand-worked values and fabricated predictions (no model is run).

Every test names the mutation of eval.py that it would catch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as ev  # noqa: E402  (tests reach private names too)

EXTREMES = np.array([0.0, 1.0, 5e-324, 1e-300, 1e-16, 1 - 1e-16, 0.5, np.nextafter(0.5, 1)])


def random_cases(count, seed=0):
    """(y, p) with both classes: continuous, tied or extreme p, base rates .02 to .98."""
    rng = np.random.default_rng(seed)
    for case in range(count):
        n = int(rng.integers(2, 60))
        p = (rng.random(n), rng.integers(0, 5, n) / 4, rng.choice(EXTREMES, n))[case % 3]
        y = (rng.random(n) < rng.uniform(0.02, 0.98)).astype(int)
        y[rng.choice(n, 2, replace=False)] = 0, 1
        yield y, p


def test_equal_to_scikit_learn():
    """Fails if a tie counts 0 or 1 instead of half in AUROC, if AP interpolates, if F1 counts a
    false decision twice, if log loss clips elsewhere, or if kappa leaves the chance term out."""
    for case, (y, p) in enumerate(random_cases(2001)):
        yhat = (p >= 0.5).astype(int)
        ours = [ev.auroc(y, p), ev.average_precision(y, p), ev.brier(y, p), ev.log_loss(y, p)]
        theirs = [
            sk.roc_auc_score(y, p),
            sk.average_precision_score(y, p),
            sk.brier_score_loss(y, p),
            sk.log_loss(y, p),
        ]
        if case % 4 == 0:  # slow in scikit-learn
            ours += [ev.f1_score(y, yhat), ev.cohen_kappa(y, yhat)]
            theirs += [sk.f1_score(y, yhat), sk.cohen_kappa_score(y, yhat)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_kappa_of_three_answers():
    """Fails if only 0 and 1 enter the chance term, or if an unshared label counts as agreement."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
        np.testing.assert_allclose(ev.cohen_kappa(a, b), sk.cohen_kappa_score(a, b), atol=1e-12)
    assert ev.cohen_kappa([0, 1, 0, 1], [2, 2, 2, 2]) == 0


def test_best_f1_threshold_beats_every_cut():
    """Fails if a cut is left out, if p > t decides instead of p >= t, or if halfway is rounded down
    to the next lower p."""
    for y, p in random_cases(500, seed=1):
        best = max(ev.f1_score(y, p >= t) for t in np.unique(p))
        assert ev.f1_score(y, p >= ev.best_f1_threshold(y, p)) == pytest.approx(best, abs=1e-12)
    assert ev.best_f1_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7]) == pytest.approx(0.4)


def test_ece_by_hand():
    """Fails if bins are of equal width, if tied rows are parted or go where the
    first of them would, or if bins weigh the same."""
    # equal mass parts (.1, .2) from (.3, .9): |.15 - 0| / 2 + |.6 - 1| / 2
    assert ev.ece([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.9], bins=2) == pytest.approx(0.275)
    # three of four rows tie: they are one bin, |.25 - 1/3| * 3/4 + |.9 - 1| / 4
    p = [0.25, 0.25, 0.25, 0.9]
    assert ev.ece([0, 0, 1, 1], p, bins=4) == pytest.approx((1 / 4 + 0.1) / 4)
    # the tie belongs where its middle is: (1 + 3 / 2) of 4 rows, the second bin of two
    tied = ev.ece([1, 0, 0, 0], [0.1, 0.2, 0.2, 0.2], bins=2)
    assert tied == pytest.approx((0.9 + 3 * 0.2) / 4)
    order = [2, 3, 0, 1]  # the rows' order must not matter either
    again = ev.ece(np.array([0, 0, 1, 1])[order], np.array(p)[order], bins=4)
    assert again == pytest.approx((1 / 4 + 0.1) / 4)


def test_ece_bins_hold_equal_shares():
    """Fails if the rank is taken at a tie's end (a 16th bin), or if bins differ by over a row."""
    p = np.random.default_rng(0).random(1000)
    counts = np.bincount(ev._equal_mass_bins(p, 15))
    assert len(counts) == 15 and set(counts) <= {66, 67}


def test_ece_floor():
    """Fails if the mean is returned as the quantile, if labels come from .5 instead of p, or if the
    floor draws the same numbers as a file simulated with the same seed."""
    rng = np.random.default_rng(1)
    p = rng.random(500)
    mean, q95 = ev.ece_floor(p, 15, 400, seed=3)
    values = [ev.ece((rng.random(500) < p).astype(int), p) for _ in range(400)]
    assert mean == pytest.approx(np.mean(values), abs=0.002)
    assert q95 == pytest.approx(np.quantile(values, 0.95), abs=0.004)
    assert ev.ece_floor(p, 15, 400, seed=3) == (mean, q95)
    same = np.random.default_rng(0).random(2000)
    assert ev.ece_floor(same, 15, 1, seed=0)[0] < 0.06  # else .5: each draw under its own p


def test_corp_against_isotonic_regression():
    """Fails if ties in p are not pooled first, if falling means are kept apart, or if a part's
    sign is turned."""
    for y, p in random_cases(600, seed=2):
        miscalibration, discrimination, uncertainty = ev.corp(y, p)
        # scikit-learn merges p that are nearly equal: give it ranks instead
        ranks = np.unique(p, return_inverse=True)[1]
        recalibrated = IsotonicRegression().fit(ranks, y).predict(ranks)
        score, base = np.mean((recalibrated - y) ** 2), np.mean((y.mean() - y) ** 2)
        expected = [ev.brier(y, p) - score, base - score, base]
        np.testing.assert_allclose(
            [miscalibration, discrimination, uncertainty], expected, atol=1e-12
        )
        assert miscalibration - discrimination + uncertainty == pytest.approx(ev.brier(y, p))


def test_corp_by_hand():
    """Fails if pooling stops after one step back: the last row pulls in both before it."""
    # means 0 | 1 1 0 pooled to 2/3: squared errors 0 + 1/9 + 1/9 + 4/9, over 4 rows = 1/6
    parts = ev.corp([0, 1, 1, 0], [0.1, 0.2, 0.3, 0.4])
    brier = (0.01 + 0.64 + 0.49 + 0.16) / 4
    assert parts == pytest.approx((brier - 1 / 6, 0.25 - 1 / 6, 0.25))


def test_calibration_slope():
    """Fails if slope and intercept are swapped, or if p enters instead of its logit.
    scikit-learn without penalty is the reference."""
    rng, compared = np.random.default_rng(4), 0
    for case in range(150):
        x = rng.normal(0, (0.3, 1, 6)[case % 3], 80)
        p = 1 / (1 + np.exp(-x))
        y = (rng.random(80) < 1 / (1 + np.exp(-(0.5 * x + 0.4)))).astype(int)
        if case % 5 == 0:  # all but one row parted by a cut
            y = (x > np.median(x)).astype(int)
            y[np.argsort(x)[38]] = 1
            y[np.argsort(x)[39]] = 0
        slope, intercept = ev.calibration_slope(y, p)
        x = np.log(np.clip(p, 1e-7, 1 - 1e-7)) - np.log1p(-np.clip(p, 1e-7, 1 - 1e-7))
        error = 1 / (1 + np.exp(-(slope * x + intercept))) - y
        assert abs(error.sum()) < 1e-6 and abs(error @ x) < 1e-6  # the likelihood's maximum
        if case % 5:
            model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y)
            found = (model.coef_.item(), model.intercept_.item())
            assert (slope, intercept) == pytest.approx(found, rel=1e-3, abs=1e-3)
            compared += 1
    assert compared > 100


def test_calibration_slope_where_newton_overshoots():
    """Fails if the step is not damped: full steps run off to a singular matrix on these rows."""
    x = np.repeat([-0.1, 0.01, 0.1, 10.0], [2, 1, 50, 1])
    y = np.array([1, 1, 0, 1] + [0] * 50)
    slope, intercept = ev.calibration_slope(y, 1 / (1 + np.exp(-x)))
    error = 1 / (1 + np.exp(-(slope * x + intercept))) - y
    assert abs(error.sum()) < 1e-6 and abs(error @ x) < 1e-6


@pytest.mark.parametrize("y, p", [
    ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]),
    ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]),
    ([0, 1, 1], [0.2, 0.2, 0.6]),
    ([0, 1, 1], [0.3, 0.3, 0.3]),
])  # fmt: skip
def test_calibration_slope_of_separable_rows(y, p):
    """Fails if the check of overlap goes one way only, or if it lets a shared end point pass."""
    with pytest.raises(ValueError, match="parts the classes"):
        ev.calibration_slope(y, p)


@pytest.mark.parametrize("y, p, reason", [
    ([], [], "not empty"),
    ([0, 1], [0.5], "one length"),
    ([0, 1], [0.5, np.nan], "nan"),
    ([0, np.nan], [0.5, 0.5], "nan"),
    ([0, 1], [0.5, 1.1], r"\[0, 1\]"),
    ([0, 1], [-0.1, 1], r"\[0, 1\]"),
    ([0, 2], [0.5, 0.5], "0 or 1"),
    ([[0, 1]], [[0.5, 0.5]], "lists"),
])  # fmt: skip
def test_bad_input_is_refused(y, p, reason):
    """Fails if one of the checks goes."""
    for metric in (
        ev.auroc,
        ev.average_precision,
        ev.best_f1_threshold,
        ev.brier,
        ev.log_loss,
        ev.ece,
        ev.corp,
        ev.calibration_slope,
    ):
        with pytest.raises(ValueError, match=reason):
            metric(np.array(y), np.array(p))


def test_one_class_only_where_undefined():
    """Fails if a metric of one class returns NaN or 0, or if one that is defined refuses it."""
    for label, undefined in (
        (0, (ev.auroc, ev.average_precision, ev.best_f1_threshold)),
        (1, (ev.auroc,)),
    ):
        for metric in (*undefined, ev.calibration_slope):
            with pytest.raises(ValueError, match=f"no row of class {1 - label}"):
                metric([label] * 3, [0.1, 0.2, 0.3])
        with pytest.raises(ValueError, match="no row of class"):
            ev.bootstrap_ci(ev.brier, [label] * 3, [0.1, 0.2, 0.3])
    assert ev.average_precision([1, 1], [0.2, 0.3]) == 1
    assert ev.f1_score([0, 0], [0, 1]) == 0 and ev.brier([0], [0.5]) == 0.25
    assert ev.corp([0, 0], [0.5, 0.5]) == (0.25, 0, 0)
    with pytest.raises(ValueError, match="undefined"):
        ev.f1_score([0, 0], [0, 0])
    with pytest.raises(ValueError, match="undefined"):
        ev.cohen_kappa([1, 1], [1, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        ev.f1_score([0, 1], [0.2, 0.7])


def test_bootstrap_draws_whole_groups():
    """Fails if rows are drawn instead of groups, if a group is cut, or if its range is shifted."""
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 8, 60)] + [None, None]
    y, marks = rng.integers(0, 2, 62), np.arange(62) / 62
    y[:2] = 0, 1
    members = {
        key: {i for i, g in enumerate(groups) if (g or i) == key}
        for key in (g or i for i, g in enumerate(groups))
    }
    seen = []

    def metric(y, p):
        rows = np.rint(p * 62).astype(int)
        counts = np.bincount(rows, minlength=62)
        for rows_of_group in members.values():  # each group as a whole, as often for every row
            assert len({counts[i] for i in rows_of_group}) == 1
        drawn = sum(counts[min(rows_of_group)] for rows_of_group in members.values())
        assert drawn == len(members)
        seen.append(len(rows))
        return 0.0

    ev.bootstrap_ci(metric, y, marks, groups, 200, 0)
    assert len(seen) == 200 and len(set(seen)) > 5


def test_bootstrap_interval():
    """Fails if the limits are not the 2.5th and 97.5th percentile, if the seed is not used, or if
    clusters make no difference. The reference is the normal approximation for a mean."""
    rng = np.random.default_rng(0)
    p, y = rng.random(400), rng.integers(0, 2, 400)
    low, high = ev.bootstrap_ci(lambda y, p: p.mean(), y, p, None, 2000, 1)
    half = 1.96 * p.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((p.mean() - half, p.mean() + half), abs=0.004)
    assert (low, high) == ev.bootstrap_ci(lambda y, p: p.mean(), y, p, None, 2000, 1)
    # four copies of each row in one group: the interval of 100 rows, twice as wide
    p, y, groups = np.repeat(p[:100], 4), np.repeat(y[:100], 4), np.repeat(np.arange(100), 4)
    wide = np.ptp(ev.bootstrap_ci(lambda y, p: p.mean(), y, p, groups, 1000, 1))
    narrow = np.ptp(ev.bootstrap_ci(lambda y, p: p.mean(), y, p, None, 1000, 1))
    assert wide == pytest.approx(2 * narrow, rel=0.15)
    with pytest.raises(ValueError, match="one length"):
        ev.bootstrap_ci(ev.brier, y, p, groups[1:])


def test_one_class_resamples_are_drawn_again():
    """Fails if a resample of one class reaches the metric, or is not counted."""
    y, p = np.array([0] * 9 + [1]), np.linspace(0, 1, 10)
    limits, redrawn = ev.bootstrap({"auroc": (ev.auroc, p)}, y, None, 1000, 0)
    # (9/10)^10 = 35 % of the resamples miss the positive: about 1000 * .35 / .65 redrawn
    assert 430 < redrawn < 650 and limits["auroc"] == (1.0, 1.0)


def test_repetition_by_hand():
    """Fails if distinct-2 is a mean over texts, if rep-4 pools the texts, if case or punctuation
    does not count as it should."""
    # bigrams: a b, b a, a b | A B -> 2 different of 4; no text has a 4-gram twice
    assert ev.repetition(["a b a b", "A B"]) == (0.5, 0.0)
    # 4-grams of "x x x x x x": three, one different; of "a b c d": one; mean of 2/3 and 0
    assert ev.repetition(["x x x x x x", "a b c d", "a"])[1] == pytest.approx(1 / 3)
    assert ev.repetition([")))))"])[1] == 0.5
    assert ev.repetition([]) == ev.repetition(["", "word"]) == (None, None)


def test_evidence_by_hand():
    """Fails if case counts, if "age" is found in "dosage", if precision looks only at the row's own
    evidence, or if a row without the field counts."""
    rows = [
        {"evidence": ["Heart failure", "family support"]},
        {"evidence": ["age", " "]},
        {"evidence": []},
        {},
    ]
    texts = ["HEART failure, and sepsis.", "The dosage.", "Sepsis", "heart failure"]
    file_rows = [*rows, {"evidence": ["sepsis"]}]
    # recall: 1 of 2, 0 of 1; precision: 1 of 2, (none cited), 0 of 1
    assert ev.evidence_scores(rows, texts, file_rows) == (0.25, 0.25)
    assert ev.evidence_scores([{}], ["text"], [{}]) == (None, None)


def fabricate(n=60, seed=0, **changes):
    """Rows as `read_rows` gives them, and predictions as `predict` does."""
    rng = np.random.default_rng(seed)
    rows, predictions = [], []
    for i in range(n):
        true_p = float(rng.random())
        p = float(np.clip(true_p + rng.normal(0, 0.1), 0.001, 0.999))
        stated = (1, 0, None)[0 if i % 6 == 5 else 1] if i % 10 else None
        rows.append(
            {
                "id": f"r{i}",
                "text": "t",
                "label": int(rng.random() < true_p),
                "group": f"g{i // 2}",
                "probability": true_p,
                "evidence": ["chest pain"],
            }
        )
        predictions.append(
            {
                "id": f"r{i}",
                "probability": p,
                "raw_probability": p**2,
                "label": int(p >= 0.3),
                "label_token_probability": 1 - p,
                "threshold": 0.3,
                "explanation": f"Chest pain {i}.",
                "stated_label": stated,
                "agree": stated == int(p >= 0.3),
                "tokens_cut": 2 * (i == 3),
                "run": "abc",
                "true_label": rows[-1]["label"],
                **changes,
            }
        )
    return rows, predictions


def test_evaluate():
    """Fails if a value is taken from another column (raw for calibrated, decisions at .5 for those
    at the threshold), if unparsable texts leave kappa_all, or if JSON cannot hold the result."""
    rows, predictions = fabricate()
    for prediction in predictions[:2]:
        prediction["explanation"] = None  # not asked for
    result = ev.evaluate(rows, predictions, draws=50)
    y = [row["label"] for row in rows]
    p = np.array([prediction["probability"] for prediction in predictions])
    true_p = np.array([row["probability"] for row in rows])
    assert result["auroc"] == pytest.approx(sk.roc_auc_score(y, p))
    assert result["f1_half"] == pytest.approx(sk.f1_score(y, p >= 0.5))
    assert result["f1"] == pytest.approx(sk.f1_score(y, p >= 0.3)) != result["f1_half"]
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= 0.5))
    assert result["true_p_error"] == pytest.approx(np.abs(p - true_p).mean())
    assert result["bayes_auroc"] == pytest.approx(sk.roc_auc_score(y, true_p))
    assert (result["n"], result["groups"], result["prompts_cut"]) == (60, 30, 1)
    interval = ev.bootstrap_ci(ev.auroc, y, p, [row["group"] for row in rows], 50, 0)
    assert result["intervals"]["auroc"] == interval

    stated = [prediction["stated_label"] for prediction in predictions]
    asked = list(range(2, 60))
    parsable = [i for i in asked if stated[i] is not None]
    said, head = [stated[i] for i in parsable], (p >= 0.5).astype(int)
    assert (result["n_explained"], result["n_parsable"]) == (58, len(parsable))
    assert result["auroc_alignment"] == pytest.approx(sk.roc_auc_score(said, p[parsable]))
    assert result["kappa"] == pytest.approx(sk.cohen_kappa_score(said, head[parsable]))
    third = [2 if stated[i] is None else stated[i] for i in asked]
    assert result["kappa_all"] == pytest.approx(sk.cohen_kappa_score(third, head[asked]))
    assert result["evidence_recall"] == result["evidence_precision"] == 1
    assert result["warnings"] == [] and set(ev.TABLE) <= set(result)
    assert json.loads(json.dumps(result, allow_nan=False))["auroc"] == result["auroc"]


def test_evaluate_without_texts_groups_or_true_p():
    """Fails if label-only rows crash, if an absent value becomes 0 or NaN instead of None, or if
    few groups give no warning."""
    rows, predictions = fabricate(12, explanation=None, stated_label=None, agree=None)
    rows = [{key: row[key] for key in ("id", "text", "label")} for row in rows]
    result = ev.evaluate(rows, predictions, draws=20)
    for key in (
        "true_p_error",
        "bayes_auroc",
        "parsable",
        "auroc_alignment",
        "kappa",
        "kappa_all",
        "evidence_recall",
        "evidence_precision",
        "empty",
        "distinct_2",
        "rep_4",
    ):
        assert result[key] is None, key
    assert result["groups"] == 12 and "12 groups" in result["warnings"][0]
    with pytest.raises(ValueError, match="same ids"):
        ev.evaluate(rows, predictions[::-1])
    with pytest.raises(ValueError, match="draws"):
        ev.evaluate(rows, predictions, draws=0)


def test_table():
    """Fails if a column is shifted, if None is printed, or if the table is wider than 100."""
    rows, predictions = fabricate()
    head = ev.evaluate(rows, predictions, draws=20)
    y = [row["label"] for row in rows]
    majority = ev.score_metrics(y, [0.4] * 60, draws=20)
    columns = {"head": head, "raw": majority, "label token": majority, "majority": majority}
    lines = ev.table(columns).split("\n")
    assert max(map(len, lines)) <= 100 and len(lines) == 1 + len(ev.TABLE)
    assert lines[0].split() == ["head", "raw", "label", "token", "majority"]
    row = next(line for line in lines if line.startswith("auroc "))
    low, high = head["intervals"]["auroc"]
    assert f"{head['auroc']:.3f} [{low:.3f}, {high:.3f}]" in row and row.endswith("0.500")
    assert next(line for line in lines if line.startswith("slope")).endswith("n/a")
    assert "None" not in "".join(lines)
    assert ev.table({"x": {"auroc": 0.5}}, ["auroc"]).endswith("0.500")


class FakeRun:
    meta = {"base_rate": 0.4}

    def __init__(self, predictions):
        self.predictions, self.calls = {one["id"]: one for one in predictions}, []

    def predict(self, rows, explain=True, batch_size=16, progress=False):
        self.calls.append((len(rows), explain, batch_size))
        found = [self.predictions[row["id"]] for row in rows]
        return found if explain else [one | {"explanation": None} for one in found]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(call with arguments, the fake run, its folder) on fabricated rows in a file."""
    rows, predictions = fabricate()
    run, data = FakeRun(predictions), tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(ev, "load_run", lambda *args, **kwargs: run)
    fixed = ["--run", str(tmp_path / "run"), "--data", str(data), "--draws", "20"]
    return lambda *more: ev.main([*fixed, *more]), run, tmp_path / "run" / "eval" / "test"


def test_command_writes_what_it_prints(command, capsys):
    """Fails if a column or a file is missing, if the JSON is not the table, if only the head's
    interval is clustered, or if results are replaced without --overwrite."""
    call, run, out = command
    call("--batch", "5")
    assert run.calls == [(60, True, 5), (0, False, 5)]
    report = json.loads((out / "eval.json").read_text())
    assert list(report["metrics"]) == ["head", "raw", "label token", "majority"]
    assert (report["run"], report["n"], report["arguments"]["batch"]) == ("abc", 60, 5)
    assert report["metrics"]["majority"]["auroc"] == 0.5
    raw, head = report["metrics"]["raw"], report["metrics"]["head"]  # raw ranks as the head does
    assert raw["intervals"]["auroc"] == head["intervals"]["auroc"] and raw["brier"] != head["brier"]
    assert {"python", "torch", "numpy"} <= set(report["versions"]) and report["seconds"] > 0
    assert f"{report['metrics']['head']['auroc']:.3f} [" in capsys.readouterr().out
    lines = (out / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"r{i}" for i in range(60)]
    with pytest.raises(ValueError, match="--overwrite"):
        call()
    call("--overwrite")


def test_rows_and_explain(command):
    """Fails if --rows takes the head of the file, if --explain explains others than the first of
    the shuffle, or if the seed is not used."""
    call, run, out = command
    call("--rows", "40", "--explain", "10")
    assert run.calls == [(10, True, 16), (30, False, 16)]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [one["explanation"] is not None for one in lines] == [True] * 10 + [False] * 30
    ids = [one["id"] for one in lines]
    assert ids == [f"r{i}" for i in np.random.default_rng(0).permutation(60)[:40]]
    call("--rows", "40", "--explain", "10", "--overwrite", "--seed", "1")
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [one["id"] for one in lines] != ids
    for bad in (["--rows", "0"], ["--explain", "-1"], ["--batch", "0"], ["--draws", "0"]):
        with pytest.raises(ValueError, match="at least"):
            call("--overwrite", *bad)
