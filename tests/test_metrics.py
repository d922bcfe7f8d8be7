"""metrics.py and the tables that show it, against scikit-learn and hand-worked values.

Every test names the mutation that it would catch.
"""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

import metrics as mt
import text_metrics as tm
from plumbing.tables import table

sys.path.insert(0, str(ROOT / "examples/discharge"))
from generate import FRAMES  # noqa: E402

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
    false decision twice, if log loss clips elsewhere, or if kappa leaves the chance term out, or
    takes only 0 and 1 into it."""
    pairs = [(mt.auroc, sk.roc_auc_score), (mt.average_precision, sk.average_precision_score),
             (mt.brier, sk.brier_score_loss), (mt.log_loss, sk.log_loss)]
    for case, (y, p) in enumerate(random_cases(2001)):
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours(y, p), theirs(y, p), rtol=1e-9, atol=1e-12)
        if case % 4 == 0:  # slow in scikit-learn
            yhat = (p >= 0.5).astype(int)
            assert mt.f1_score(y, yhat) == pytest.approx(sk.f1_score(y, yhat))
            for b in (yhat, np.arange(case, case + len(y)) % 3):  # a third answer, too
                kappa = sk.cohen_kappa_score(y, b)
                assert mt.cohen_kappa(y, b) == pytest.approx(kappa, abs=1e-12)


def test_best_f1_threshold_beats_every_cut():
    """Fails if a cut is left out, if p > t decides instead of p >= t, or if halfway is rounded down
    to the next lower p."""
    for y, p in random_cases(500, seed=1):
        best = max(mt.f1_score(y, p >= t) for t in np.unique(p))
        assert mt.f1_score(y, p >= mt.best_f1_threshold(y, p)) == pytest.approx(best, abs=1e-12)
    assert mt.best_f1_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7]) == pytest.approx(0.4)


@pytest.mark.parametrize("y, p, bins, value", [
    # equal mass parts (.1, .2) from (.3, .9): |.15 - 0| / 2 + |.6 - 1| / 2
    ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.9], 2, 0.275),
    # three of four rows tie: they are one bin, |.25 - 1/3| * 3/4 + |.9 - 1| / 4, in any order
    ([0, 0, 1, 1], [0.25, 0.25, 0.25, 0.9], 4, (1 / 4 + 0.1) / 4),
    ([1, 1, 0, 0], [0.25, 0.9, 0.25, 0.25], 4, (1 / 4 + 0.1) / 4),
    # the tie belongs where its middle is: (1 + 3 / 2) of 4 rows, the second bin of two
    ([1, 0, 0, 0], [0.1, 0.2, 0.2, 0.2], 2, (0.9 + 3 * 0.2) / 4),
])
def test_ece_by_hand(y, p, bins, value):
    """Fails if bins are of equal width or weight, if ties are parted or go where the first of them
    would, if a tie's end makes a 16th bin, or if bins differ by over a row."""
    assert mt.ece(y, p, bins) == pytest.approx(value)
    counts = np.bincount(mt.equal_mass_bins(np.random.default_rng(0).random(1000), 15))
    assert len(counts) == 15 and set(counts) <= {66, 67}


def test_ece_floor():
    """Fails if the mean is returned as the quantile, if labels come from .5 instead of p, or if the
    floor draws the same numbers as a file simulated with the same seed."""
    rng = np.random.default_rng(1)
    p = rng.random(500)
    mean, q95 = mt.ece_floor(p, 15, 400, seed=3)
    values = [mt.ece((rng.random(500) < p).astype(int), p) for _ in range(400)]
    assert mean == pytest.approx(np.mean(values), abs=0.002)
    assert q95 == pytest.approx(np.quantile(values, 0.95), abs=0.004)
    assert mt.ece_floor(p, 15, 400, seed=3) == (mean, q95)
    same = np.random.default_rng(0).random(2000)
    assert mt.ece_floor(same, 15, 1, seed=0)[0] < 0.06  # else .5: each draw under its own p


def test_curves_are_those_of_the_metrics():
    """Fails if a curve leaves out an end, if the ROC's axes are exchanged, if the risk is the
    accuracy, or if the band does not lie around the isotonic fit."""
    rng = np.random.default_rng(3)
    p = rng.random(400).round(3)
    y = (rng.random(400) < p).astype(int)
    found = mt.curves(y, p, draws=100)
    assert all(len(numbers) <= 100 for curve in found.values() for numbers in curve.values())

    false_share, true_share = found["roc"].values()
    assert (false_share[0], true_share[0], false_share[-1], true_share[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true_share, false_share) == pytest.approx(mt.auroc(y, p), abs=0.01)

    coverage, risk = found["risk"].values()
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(1 - mt.accuracy(y, p >= 0.5), abs=1e-5)

    values, observed, low, high = (np.array(part) for part in found["reliability"].values())
    fit = dict(zip(p, mt.isotonic(y, p), strict=True))
    assert observed == pytest.approx([fit[value] for value in values], abs=1e-5)
    assert np.mean((low <= observed) & (observed <= high)) > 0.95
    assert 0.02 < np.mean(high - low) < 0.4

    assert sum(found["histogram"]["class_1"]) == y.sum()
    assert sum(found["histogram"]["class_0"]) == (1 - y).sum()
    ones = mt.curves([0, 1], [1.0, 1.0], draws=3)  # one value of p, in the last bin
    assert ones["roc"] == {"false_positives": [0, 1], "true_positives": [0, 1]}
    assert ones["histogram"]["class_1"][-1] == 1


def test_corp_against_isotonic_regression():
    """Fails if ties in p are not pooled first, if falling means are kept apart, if pooling stops
    after one step back, if the fit has another order than the rows, or if a sign is turned."""
    for y, p in random_cases(600, seed=2):
        # scikit-learn merges p that are nearly equal: give it ranks instead
        ranks = np.unique(p, return_inverse=True)[1]
        recalibrated = IsotonicRegression().fit(ranks, y).predict(ranks)
        np.testing.assert_allclose(mt.isotonic(y, p), recalibrated, atol=1e-12)
        score, base = np.mean((recalibrated - y) ** 2), np.mean((y.mean() - y) ** 2)
        np.testing.assert_allclose(
            mt.corp(y, p), [mt.brier(y, p) - score, base - score, base], atol=1e-12)


def test_calibration_slope():
    """Fails if slope and intercept are swapped, if p enters instead of its logit, or if the step is
    not damped (the last rows). scikit-learn without penalty is the reference."""
    rng, cases = np.random.default_rng(4), []
    for case in range(150):
        x = rng.normal(0, (0.3, 1, 6)[case % 3], 80)
        y = (rng.random(80) < mt.sigmoid(0.5 * x + 0.4)).astype(int)
        if case % 5 == 0:  # all but one row parted by a cut
            y = (x > np.median(x)).astype(int)
            y[np.argsort(x)[38:40]] = 1, 0
        cases.append((case % 5 > 0, x, y))
    overshoots = np.repeat([-0.1, 0.01, 0.1, 10.0], [2, 1, 50, 1])
    for compare, x, y in [*cases, (False, overshoots, np.array([1, 1, 0, 1] + [0] * 50))]:
        p = np.clip(mt.sigmoid(x), 1e-7, 1 - 1e-7)
        x, (slope, intercept) = np.log(p) - np.log1p(-p), mt.calibration_slope(y, mt.sigmoid(x))
        error = mt.sigmoid(slope * x + intercept) - y
        assert abs(error.sum()) < 1e-6 and abs(error @ x) < 1e-6  # the likelihood's maximum
        if compare:
            model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y)
            found = (model.coef_.item(), model.intercept_.item())
            assert (slope, intercept) == pytest.approx(found, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("y, p, reason", [
    ([], [], "not empty"), ([0, 1], [0.5], "one length"), ([], [0.5], "one length"),
    ([0, 1], [0.5, np.nan], "nan"), ([0, np.nan], [0.5, 0.5], "nan"),
    ([0, 1], [0.5, 1.1], r"\[0, 1\]"), ([0, 1], [-0.1, 1], r"\[0, 1\]"),
    ([0, 2], [0.5, 0.5], "0 or 1"), ([[0, 1]], [[0.5, 0.5]], "lists"),
])
def test_bad_input_is_refused(y, p, reason):
    """Fails if one of the checks goes."""
    for metric in (mt.auroc, mt.average_precision, mt.best_f1_threshold, mt.brier, mt.log_loss,
                   mt.ece, mt.isotonic, mt.corp, mt.calibration_slope, mt.risk_coverage,
                   mt.matched_kappa, lambda y, p: mt.bootstrap_ci(mt.brier, y, p)):
        with pytest.raises(ValueError, match=reason):
            metric(np.array(y), np.array(p))


def test_undefined_only_where_it_is():
    """Fails if a metric of one class returns NaN or 0, if one that is defined refuses it, or if
    the slope's check of overlap goes one way only or lets a shared end point pass."""
    for label, undefined in ((0, (mt.average_precision, mt.best_f1_threshold)), (1, ())):
        for metric in (*undefined, mt.auroc, mt.calibration_slope, mt.matched_kappa,
                       lambda y, p: mt.bootstrap_ci(mt.auroc, y, p)):
            with pytest.raises(ValueError, match=f"no row of class {1 - label}"):
                metric([label] * 3, np.array([0.1, 0.2, 0.3]))
    assert mt.average_precision([1, 1], [0.2, 0.3]) == 1
    assert mt.f1_score([0, 0], [0, 1]) == 0 and mt.brier([0], [0.5]) == 0.25
    assert mt.corp([0, 0], [0.5, 0.5]) == (0.25, 0, 0)
    for metric, arrays, reason in (
        (mt.f1_score, ([0, 0], [0, 0]), "undefined"),
        (mt.cohen_kappa, ([1, 1], [1, 1]), "undefined"),
        (mt.f1_score, ([0, 1], [0.2, 0.7]), "0 or 1"),
        (mt.accuracy, ([0, 1], [0.2, 0.7]), "0 or 1"),
        (mt.calibration_slope, ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]), "separates the classes"),
        (mt.calibration_slope, ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]), "separates the classes"),
        (mt.calibration_slope, ([0, 1, 1], [0.2, 0.2, 0.6]), "separates the classes"),
        (mt.calibration_slope, ([0, 1], [0.3, 0.3]), "separates the classes"),
    ):
        with pytest.raises(ValueError, match=reason):
            metric(*arrays)


def test_a_fit_without_a_spread_has_no_interval(monkeypatch):
    """Fails if a p that hardly differs, whose matrix is singular on some rows, is an error."""
    def singular(matrix):
        raise np.linalg.LinAlgError("Singular matrix")

    fit = ([0, 1, 0, 1], [0.3, 0.4, 0.6, 0.7], None)
    assert mt.none_if_undefined(mt.calibration_intervals, *fit) is not None
    monkeypatch.setattr("numpy.linalg.inv", singular)
    assert mt.none_if_undefined(mt.calibration_intervals, *fit) is None


def test_what_is_wrong_is_not_taken_for_undefined():
    """Fails if wrong input becomes n/a in a table, if it is drawn again without an end, or if what
    is undefined is an error."""
    assert mt.none_if_undefined(mt.auroc, [], []) is None
    assert mt.none_if_undefined(mt.auroc, [1, 1], [0.1, 0.2]) is None
    assert mt.none_if_undefined(mt.cohen_kappa, [], []) is None
    assert mt.none_if_undefined(mt.calibration_slope, [0, 1] * 2, [0.7, 0.7 + 2e-16] * 2) is None
    for wrong in (([0, 1], [0.5]), ([0, 1], [0.5, 1.5]), ([0, 2], [0.5, 0.5])):
        with pytest.raises(ValueError):
            mt.none_if_undefined(mt.auroc, *wrong)

    def wrong_on_resamples(y, p):
        if (np.diff(p) > 0).all():
            return 0.0
        return mt.brier(y, p[1:])

    with pytest.raises(ValueError, match="one length"):
        mt.bootstrap_ci(wrong_on_resamples, [0, 1] * 5, np.arange(10) / 10, None, 5)


def test_risk_and_coverage_by_hand():
    """Fails if the least sure rows come first, if a tie is parted, or if the largest share is the
    first one that reaches .95."""
    correct, sure = [1, 1, 0, 1, 0], [0.9, 0.5, 0.5, 0.3, 0.1]
    share, accuracy, largest = mt.risk_coverage(correct, sure)
    assert share.tolist() == [0.2, 0.6, 0.8, 1] and largest == 0.2
    assert accuracy == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5])
    late = [1, 0] + [1] * 18  # falls to .5, and 19 of 20 is .95 exactly
    assert mt.risk_coverage(late, np.arange(20, 0, -1) / 20)[2] == 1
    assert mt.risk_coverage([0, 0], [0.1, 0.2])[2] == 0


def test_matched_kappa():
    """Fails if a half is decided by its own threshold, if a group is parted, if the best cut is
    missed, or if a single split decides."""
    rng = np.random.default_rng(0)
    for y, p in random_cases(60, seed=5):
        cuts = [mt.cohen_kappa(y, p >= t) for t in np.unique(p)]
        found = mt.cohen_kappa(y, p >= mt.best_kappa_threshold(y, p))
        assert found == pytest.approx(max(cuts), abs=1e-12)
    p, stated = rng.random((30, 20)), rng.integers(0, 2, (30, 20))  # nothing to match
    assert np.mean([mt.matched_kappa(*pair) for pair in zip(stated, p, strict=True)]) < 0.1
    # two groups, one threshold each: every row is decided by the other group's
    p = np.arange(40) / 40
    stated, groups = np.arange(40) // 10 % 2, ["a"] * 20 + ["b"] * 20
    assert mt.matched_kappa(stated, p, groups) == 0 and mt.matched_kappa(stated, p) > 0.2
    p = rng.random(74)
    stated = (p + rng.normal(0, 0.4, 74) > 0.4).astype(int)
    single, mean = ([mt.matched_kappa(stated, p, seed=seed, splits=splits) for seed in range(20)]
                    for splits in (1, 100))
    assert np.ptp(single) > 0.15 and np.ptp(mean) < 0.05
    with pytest.raises(ValueError, match="one half of the groups lacks"):
        mt.matched_kappa([0, 1, 1, 1], [0.1, 0.2, 0.3, 0.4])


def test_bootstrap_draws_whole_groups():
    """Fails if rows are drawn instead of groups, if a group is cut, or if its range is shifted."""
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in rng.integers(0, 8, 60)] + [None, None]
    keys = [group or i for i, group in enumerate(groups)]
    members, seen = [[i for i in range(62) if keys[i] == key] for key in set(keys)], []

    def metric(y, p):
        counts = np.bincount(np.rint(p * 62).astype(int), minlength=62)
        assert all(len(set(counts[rows])) == 1 for rows in members)  # as often for every row
        assert sum(counts[rows[0]] for rows in members) == len(members)
        seen.append(len(p))
        return 0.0

    mt.bootstrap_ci(metric, rng.integers(0, 2, 62), np.arange(62) / 62, groups, 200, 0)
    assert len(seen) == 201 and len(set(seen)) > 5  # once on the rows themselves


def test_bootstrap_interval():
    """Fails if the limits of a mean are not its normal ones, if the seed or clusters make no
    difference, if one-class resamples do not count, or if one group has an interval."""
    rng = np.random.default_rng(0)
    p, y = rng.random(400), rng.integers(0, 2, 400)

    def interval(y, p, groups, draws=1000):
        return mt.bootstrap_ci(lambda y, p: p.mean(), y, p, groups, draws, 1)

    half = 1.96 * p.std() / np.sqrt(400)
    limits = pytest.approx((p.mean() - half, p.mean() + half), abs=0.004)
    assert limits == interval(y, p, None, 2000) == interval(y, p, None, 2000)
    # four copies of each row in one group: the interval of 100 rows, twice as wide
    p, y, groups = np.repeat(p[:100], 4), np.repeat(y[:100], 4), np.repeat(np.arange(100), 4)
    wide, narrow = np.ptp(interval(y, p, groups)), np.ptp(interval(y, p, None))
    assert wide == pytest.approx(2 * narrow, rel=0.15)
    with pytest.raises(ValueError, match="one length"):
        mt.bootstrap_ci(mt.brier, y, p, groups[1:])
    # (9/10)^10 = 35 % of the resamples miss the positive: about 1000 * .35 / .65 redrawn
    last = np.arange(10) == 9
    limits, redrawn = mt.bootstrap({"auroc": (mt.auroc, np.arange(10) / 9)}, last, None, 1000, 0)
    assert 430 < redrawn < 650 and limits["auroc"] == (0.025, 1.0)
    assert mt.bootstrap_ci(mt.auroc, y, p, [1] * len(y), 5) is None


@pytest.mark.parametrize("metric, value, error, pairs, low, high", [
    # on the logit scale: .9 is 2.197, and the error .02 / (.9 * .1); t of 100 is 1.984
    (mt.auroc, 0.9, 0.02, 100, 1 / (1 + np.exp(-2.1972 + 0.4409)),
     1 / (1 + np.exp(-2.1972 - 0.4409))),
    (mt.log_loss, 0.5, 0.1, 100, 0.5 / np.exp(0.3968), 0.5 * np.exp(0.3968)),
    (max, 0.5, 0.1, 10, 0.5 - 0.2228, 0.5 + 0.2228),  # no known scale; t of 10 is 2.228
    (mt.auroc, 0.5, 0.0, 10, 0.5, 0.5),
    # a perfect ranking: .6915^10 = .025
    (mt.auroc, 1.0, 0.0, 10, 0.6915, 1.0),
    (mt.f1_score, 0.0, 0.0, 10, 0.0, 0.3085),
])
def test_an_interval_by_hand(metric, value, error, pairs, low, high):
    """Fails if a scale is another, if the error is not carried to it, if t is the normal quantile,
    or if no error among resamples passes for certainty."""
    assert mt.interval(metric, value, error, pairs) == pytest.approx((low, high), abs=2e-4)


def test_what_rows_say_about_a_ranking():
    """Fails if rows of one group count more than once, if a group is used for two pairs, or if a
    term of t is missing, which counts where pairs are few."""
    for y, number, pairs in (([1, 0, 0, 0], range(4), 1), ([1, 1, 1, 0], [0, 0, 1, 2], 1),
                             ([1, 0] * 3, [0, 0, 1, 1, 2, 2], 1), ([0] * 4, range(4), 3)):
        assert mt.independent_pairs(np.array(y), np.array(number)) == pairs
    for degrees, tolerance in ((1, 0.12), (2, 0.008), (3, 0.002), (10, 1e-5), (1000, 1e-5)):
        assert mt.student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=tolerance)


def test_intervals_cover():
    """Fails with percentiles of the resamples, or with normal limits on the scale of AUROC itself:
    both cover .83 here."""
    rng, covered = np.random.default_rng(0), []
    while len(covered) < 200:
        y = (rng.random(30) < 0.3).astype(float)
        if 0 < y.sum() < 30:
            p = mt.sigmoid(rng.normal(size=30) + y * np.sqrt(2) * stats.norm.ppf(0.9))
            low, high = mt.bootstrap_ci(mt.auroc, y, p, draws=60)
            covered.append(low <= 0.9 <= high)
    assert 0.93 < np.mean(covered) < 1


def test_intervals_of_slope_and_intercept():
    """Fails if slope and intercept are swapped, or if copies of a row count as rows of their own.
    The reference is the spread among resamples."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, 200)
    p, y = mt.sigmoid(1.5 * x), (rng.random(200) < mt.sigmoid(x)).astype(float)
    drawn = [rng.integers(200, size=200) for _ in range(400)]
    spread = np.std([mt.calibration_slope(y[rows], p[rows]) for rows in drawn], axis=0)
    once = mt.calibration_intervals(y, p)
    assert np.ptp(once, axis=1) / 2 / 1.98 == pytest.approx(spread, rel=0.15)
    assert np.mean(once, axis=1) == pytest.approx(mt.calibration_slope(y, p))
    copies = mt.calibration_intervals(np.tile(y, 4), np.tile(p, 4), list(range(200)) * 4)
    assert np.ravel(copies) == pytest.approx(np.ravel(once), rel=0.01)
    with pytest.raises(ValueError, match="one group"):
        mt.calibration_intervals(y, p, ["x"] * 200)


def test_differences_are_paired():
    """Fails if the two scorers get resamples of their own, if the sign is turned, or if what only
    one of them has is compared."""
    y, p = list(random_cases(9, seed=3))[6]
    sums = np.stack((p * 7, np.ones(len(p))), axis=1)
    first = {"auroc": p, "log_loss": p, "reference_nll": sums}  # as `main` has it
    same = mt.score_metrics(y, p, draws=50, sums=sums, first=first)
    worse = mt.score_metrics(y, 1 - p, draws=50, sums=sums + [1, 0], first=first)
    for name in first:
        assert same[f"{name}_difference"] == 0
        assert same["intervals"][f"{name}_difference"] == (0, 0)
    assert worse["auroc_difference"] == pytest.approx(1 - 2 * mt.auroc(y, p))
    assert worse["log_loss_difference"] == mt.log_loss(y, 1 - p) - mt.log_loss(y, p)
    assert worse["intervals"]["reference_nll_difference"] == pytest.approx((1, 1))
    assert "auroc_difference" not in mt.score_metrics(y, p, draws=5)
    # two perfect rankings: each may be less than perfect on other rows
    label = np.arange(20) % 2
    perfect = mt.score_metrics(label, label * 0.5, draws=5, first={"auroc": label * 0.4})
    perfect = perfect["intervals"]
    assert perfect["auroc"] == (pytest.approx(0.6915, abs=1e-4), 1)
    assert perfect["auroc_difference"] == pytest.approx((-0.3085, 0.3085), abs=1e-4)
    # a first scorer without reference explanations, whose --max-answer was too short for them
    lacks = mt.score_metrics(y, p, draws=5, sums=sums, first={"auroc": p, "reference_nll": None})
    assert "auroc_difference" in lacks and "reference_nll_difference" not in lacks


def test_the_reference_loss_is_known_as_well_as_its_rows():
    """Fails if rows without a text count for the interval of the texts' loss: one text would have
    an interval without width, and a few texts one that is too narrow; or if labels count."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    p = mt.sigmoid(rng.normal(size=200) + y)
    losses = rng.normal(40, 10, 200)
    groups = [f"g{i // 2}" for i in range(200)]

    def intervals(texts, y=y):
        sums = np.stack((losses, np.full(200, 20)), axis=1)
        sums[texts:] = 0
        shifted = sums + sums[:, 1:] * [1, 0]
        found = mt.score_metrics(y, p, groups=groups, draws=300, sums=sums,
                                 first={"auroc": p, "reference_nll": shifted})
        assert found["reference_nll_difference"] == pytest.approx(-1)
        return found["intervals"]

    for texts in (1, 2):  # of one group
        found = intervals(texts)
        assert found["reference_nll"] is found["reference_nll_difference"] is None
        assert found["auroc"] is not None
    means = losses[:12].reshape(6, 2).mean(1) / 20  # of six groups
    half = stats.t.ppf(0.975, 5) * means.std() / np.sqrt(6)
    low, high = intervals(12)["reference_nll"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert intervals(12)["reference_nll_difference"] == pytest.approx((-1, -1))
    rare = np.arange(200) < 3  # three positive rows do not make the texts three
    assert intervals(200, rare)["reference_nll"] == intervals(200)["reference_nll"]


def test_repetition_by_hand():
    """Fails if distinct-2 is a mean over texts, if rep-4 pools them, or if case parts words."""
    # bigrams: a b, b a, a b | A B -> 2 different of 4; no text has a 4-gram twice
    assert tm.repetition(["a b a b", "A B"]) == (0.5, 0.0)
    # 4-grams of "x x x x x x": three, one different; of "a b c d": one; mean of 2/3 and 0
    assert tm.repetition(["x x x x x x", "a b c d", "a"])[1] == pytest.approx(1 / 3)
    assert tm.repetition([")))))"])[1] == 0.5
    assert tm.repetition([]) == tm.repetition(["", "word"]) == (None, None)


def test_flesch_by_hand():
    """Fails if a silent e counts, if a decimal point ends a sentence, or if one sentence or
    collapsed text gets a mark."""
    # 6 words in 2 sentences; syllables the-1 home-1 was-1 / a-1 lit-tle-2 one-1
    mark = pytest.approx(206.835 - 1.015 * 3 - 84.6 * 7 / 6)
    assert tm.flesch("The home was 3.5. A little one!") == mark
    for text in ("The risk is high.", "", "... !? 3. 4.", "It is bad. " * 9):
        assert tm.flesch(text) is None


def test_evidence_by_hand():
    """Fails if case counts, if "age" is found in "dosage", if precision looks only at the row's own
    evidence, if a phrase that stands in the text counts as invented, or if a row without the field
    counts."""
    rows = [{"evidence": ["Heart failure", "family support"], "text": "Heart failure?"},
            {"evidence": ["age", " "], "text": "age"}, {"evidence": [], "text": "asepsis"},
            {"text": "nothing"}]
    texts = ["HEART failure, and sepsis.", "The dosage.", "Sepsis", "heart failure"]
    file_rows = [*rows, {"evidence": ["sepsis"]}]
    # recall: 1 of 2, 0 of 1; precision: 1 of 2, (none cited), 0 of 1; invented: 1 of 2, 1 of 1
    assert tm.evidence_scores(rows, texts, file_rows) == (0.25, 0.25, 0.75)
    assert tm.evidence_scores([{"text": ""}], ["text"], [{}]) == (None, None, None)


@pytest.mark.parametrize("asserting, negating", FRAMES)
def test_a_phrase_that_is_cited_as_absent(asserting, negating):
    """Fails if one of the notes' ways to say that something is absent is missed, or if an asserted
    phrase passes for absent because of its neighbours."""
    known = {tm.spelled(phrase) for phrase in ("heart failure", "sepsis", "acute heart failure")}
    for before, after in (("", ""), ("No sepsis. ", ""), ("", " Sepsis was ruled out.")):
        text = before + asserting.format("heart failure") + after
        assert tm.cited_phrases(text, known) == {" heart failure "}
        text = before + negating.format("acute heart failure") + after
        assert tm.cited_phrases(text, known) == set()


@pytest.mark.parametrize("text, cited", [
    ("Without sepsis.", ""), ("Denies falls and sepsis.", ""), ("NO falls or sepsis", ""),
    ("No falls, but sepsis.", "sepsis"), ("Falls and no sepsis.", "falls"),
    ("Falls as present, sepsis as absent.", "falls"), ("Sepsis: none. Falls!", "falls"),
    ("No sepsis at first. Then sepsis.", "sepsis"), ("No change; sepsis.", "sepsis"),
    ("Sepsis was not present.", ""), ("Sepsis does not get worse.", "sepsis"),
    ("Notable sepsis.", "sepsis"), ("Sepsis. The rest was ruled out.", "sepsis"),
])
def test_absence_in_other_words(text, cited):
    """Fails if absence reaches into another clause or sentence, if it is looked for on one side
    only, if a phrase must be asserted everywhere, or if "not" is found in "notable"."""
    found = tm.cited_phrases(text, {" sepsis ", " falls "})
    assert " ".join(found).strip() == cited


def test_the_notes_cite_what_they_assert():
    """Fails if a reference explanation of the notes passes for one that cites less."""
    rows = [json.loads(line) for line in open(ROOT / "examples/discharge/valid.jsonl")]
    texts = [row["explanation"] for row in rows]
    assert tm.evidence_scores(rows, texts, rows) == (1, 1, 0)
    # ... and a text that retells the note cites just these
    texts = [row["text"] for row in rows]
    assert tm.evidence_scores(rows, texts, rows) == (1, 1, 0)


def test_rereading_by_hand():
    """Fails if the second decision is ranked, if a sign is turned, or if a row keeps its own
    explanation in the control."""
    first = [{"label": label} for label in (1, 1, 0, 0)]
    second = [{"probability": p, "label": int(p >= 0.6)} for p in (0.9, 0.1, 0.5, 0.2)]
    found = mt.rereading(first, second)
    assert (found["n_reread"], found["reread_auroc"], found["reread_flips"]) == (4, 0.5, 0.25)
    labels = np.arange(200) % 2
    records = [{"label": label, "probability": 0.1 + 0.8 * label} for label in labels.tolist()]
    found = mt.rereading(records, records)
    assert (found["reread_auroc"], found["reread_flips"]) == (1, 0)
    assert found["shuffled_auroc"] == pytest.approx(0.5, abs=0.1)
    assert found["shuffled_flips"] == pytest.approx(0.5, abs=0.1)
    two = mt.rereading(records[:2], records[:2])
    assert (two["shuffled_auroc"], two["shuffled_flips"]) == (0, 1)  # each gets the other's


def test_metrics_of_a_score_and_its_texts():
    """Fails if a value is taken from another column (decisions at .5 for those at the threshold),
    if a metric has no interval or another one, if unparsable texts leave kappa_all or agree, if a
    row without true p counts, or if JSON cannot hold the result."""
    rng, groups = np.random.default_rng(0), [f"g{i // 2}" for i in range(60)]
    true_p = rng.random(60)
    y, p = (rng.random(60) < true_p).astype(int), np.clip(true_p + rng.normal(0, 0.1, 60), 0, 1)
    true_p[:2] = np.nan
    result = mt.score_metrics(y, p, p >= 0.3, groups=groups, draws=50, true_p=true_p)
    due = [metric(y, p >= t) for metric, t in (
        (sk.f1_score, 0.5), (sk.f1_score, 0.3), (sk.accuracy_score, 0.5))]
    assert [result["f1_half"], result["f1"], result["accuracy"]] == pytest.approx(due)
    assert result["true_p_error"] == pytest.approx(np.abs(p - true_p)[2:].mean())
    for name in ("auroc", "average_precision", "log_loss", "brier"):
        metric = getattr(mt, name)
        assert result[name] == metric(y, p)
        assert result["intervals"][name] == mt.bootstrap_ci(metric, y, p, groups, 50, 0)
    head, sure = (p >= 0.5).astype(int), np.argsort(-np.abs(p - 0.5))
    assert result["accuracy_at_80"] == (head == y)[sure][:48].mean()

    stated = [None if i % 10 == 0 else int(i % 6 != 5) for i in range(60)]
    rows = [{"text": "t", "label": label, "evidence": ["chest pain"]} for label in y.tolist()]
    predictions = [{"probability": p, "stated_label": said, "explanation": "Chest pain.",
                    "label": int(p >= 0.5)} for p, said in zip(p, stated, strict=True)]
    sums = np.tile([6.0, 3.0, 4.0], (60, 1)) * (np.arange(60) % 2)[:, None]
    rereadings = [{"probability": p, "label": int(p >= 0.5)} for p in p]
    rereadings[0] = None
    texts = tm.text_metrics(rows, predictions, rereadings, sums, rows)
    third = np.array([2 if said is None else said for said in stated])
    parsable = third < 2
    assert (texts["n_explained"], texts["n_parsable"], texts["parsable"]) == (60, 54, 0.9)
    assert texts["auroc_alignment"] == sk.roc_auc_score(third[parsable], p[parsable])
    assert (texts["n_reread"], texts["reread_auroc"], texts["reread_flips"]) == (59, 1, 0)
    assert texts["kappa_all"] == pytest.approx(sk.cohen_kappa_score(third, head))
    assert texts["kappa_matched"] == mt.matched_kappa(third[parsable], p[parsable])
    assert texts["agree_share"] == (third == head).mean()
    assert texts["agree_accuracy"] == (head == y)[third == head].mean()
    assert (texts["reference_nll"], texts["base_kl"]) == (1.5, 0.75)
    assert (texts["evidence_recall"], texts["evidence_invented"], texts["empty"]) == (1, 1, 0)
    json.dumps(result | texts, allow_nan=False)


def test_nothing_to_measure_is_none():
    """Fails if an absent value becomes 0 or NaN instead of None (n/a in the table)."""
    texts = tm.text_metrics([], [], [], np.zeros((0, 3)), [{"text": "t", "label": 0}])
    assert {value for key, value in texts.items() if key[:2] != "n_"} == {None}
    one = mt.score_metrics([0, 1] * 6, np.full(12, 0.5), draws=5)
    assert one["true_p_error"] is one["slope"] is None
    shown = table({"x": one | texts, "y": {"auroc": 0.25, "calibrated": True}},
                  ["auroc", "calibrated", "base_kl"], {"auroc": "AUROC"}).split("\n")
    assert [line.split() for line in shown] == [
        ["AUROC", "calibrated", "base"], ["kl"], ["x", "0.500", "[0.500,", "0.500]", "n/a", "n/a"],
        ["y", "0.250", "yes", "n/a"]]


def test_calibration_finds_temperature_and_bias():
    """Fails if temperature multiplies, if the bias is added before the division, or if a fit is
    made of a score that ranks the wrong way."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20000)
    y = rng.random(20000) < 1 / (1 + np.exp(-logit))
    z = 3 * (logit - 0.5)
    temperature, bias, sentence = mt.calibrate(y, z)
    assert sentence.startswith("calibrated") and bias == pytest.approx(0.5, abs=0.05)
    assert temperature == pytest.approx(3, rel=0.05)
    p = mt.sigmoid(z / temperature + bias)
    assert p == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.02)
    temperature, bias, sentence = mt.calibrate(y, -logit)
    assert (temperature, bias) == (1.0, 0.0) and "wrong way (slope -1.000)" in sentence
    with pytest.raises(ValueError, match="class 0"):
        mt.calibrate(np.ones(20), logit[:20])


def test_few_rows_change_the_probability_little():
    """Fails without the priors: ten rows of each class, whose scores a cut separates, have no
    finite fit, and one outlier would turn the score around."""
    z = np.linspace(-2, 2, 20)
    y = z > 0
    temperature, bias, _ = mt.calibrate(y, z)
    assert 0.4 < temperature < 1 and abs(bias) < 1e-6
    temperature, bias, _ = mt.calibrate(np.repeat([0, 1], 10), np.tile(z[:10], 2))
    assert temperature > 1

    # the highest posterior, found by a search
    def minus_log_posterior(slope, bias):
        loss = len(y) * mt.log_loss(y, mt.sigmoid(slope * z + bias))
        return loss + ((slope - 1) ** 2 + bias**2) / (2 * mt.CALIBRATION_PRIOR**2)

    y = np.arange(20) >= 14
    temperature, bias, _ = mt.calibrate(y, z)
    best = minus_log_posterior(1 / temperature, bias)
    for change in (-0.01, 0.01):
        assert minus_log_posterior(1 / temperature + change, bias) > best
        assert minus_log_posterior(1 / temperature, bias + change) > best


@pytest.mark.parametrize("positives, rows, groups, words", [
    (10, 40, None, []), (30, 40, None, []), (9, 40, None, ["class 1 has 9 of"]),
    (31, 40, None, ["class 0 has 9 of"]), (20, 40, [i // 3 for i in range(40)], ["20 groups"]),
    (2, 18, None, ["class 1 has 2 of", "20 groups"])])
def test_intervals_of_few_rows_are_not_relied_on(positives, rows, groups, words):
    """Fails if rows are counted and not those of the rarer class, or groups are not counted."""
    warnings = mt.interval_warnings(np.arange(rows) < positives, groups)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))
