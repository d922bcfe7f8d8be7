"""eval.py and what reads its results, against scikit-learn, hand-worked values and a tiny model.
Every test names the mutation that it would catch."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_rows
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

import eval as ev  # tests reach private names too
import train
from clsgen import TARGETS, CLSGen, LoRALinear, Run, add_lora, base_fingerprint, load_run
from data import Prompts, read_rows
from model import Llama, LlamaConfig, load_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
import comprehensiveness as comp  # noqa: E402
import figures  # noqa: E402
import random_llama  # noqa: E402
import real  # noqa: E402

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
    pairs = [(ev.auroc, sk.roc_auc_score), (ev.average_precision, sk.average_precision_score),
             (ev.brier, sk.brier_score_loss), (ev.log_loss, sk.log_loss)]
    for case, (y, p) in enumerate(random_cases(2001)):
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours(y, p), theirs(y, p), rtol=1e-9, atol=1e-12)
        if case % 4 == 0:  # slow in scikit-learn
            yhat = (p >= 0.5).astype(int)
            assert ev.f1_score(y, yhat) == pytest.approx(sk.f1_score(y, yhat))
            for b in (yhat, np.arange(case, case + len(y)) % 3):  # a third answer, too
                kappa = sk.cohen_kappa_score(y, b)
                assert ev.cohen_kappa(y, b) == pytest.approx(kappa, abs=1e-12)


def test_best_f1_threshold_beats_every_cut():
    """Fails if a cut is left out, if p > t decides instead of p >= t, or if halfway is rounded down
    to the next lower p."""
    for y, p in random_cases(500, seed=1):
        best = max(ev.f1_score(y, p >= t) for t in np.unique(p))
        assert ev.f1_score(y, p >= ev.best_f1_threshold(y, p)) == pytest.approx(best, abs=1e-12)
    assert ev.best_f1_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7]) == pytest.approx(0.4)


@pytest.mark.parametrize("y, p, bins, value", [
    # equal mass parts (.1, .2) from (.3, .9): |.15 - 0| / 2 + |.6 - 1| / 2
    ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.9], 2, 0.275),
    # three of four rows tie: they are one bin, |.25 - 1/3| * 3/4 + |.9 - 1| / 4, in any order
    ([0, 0, 1, 1], [0.25, 0.25, 0.25, 0.9], 4, (1 / 4 + 0.1) / 4),
    ([1, 1, 0, 0], [0.25, 0.9, 0.25, 0.25], 4, (1 / 4 + 0.1) / 4),
    # the tie belongs where its middle is: (1 + 3 / 2) of 4 rows, the second bin of two
    ([1, 0, 0, 0], [0.1, 0.2, 0.2, 0.2], 2, (0.9 + 3 * 0.2) / 4),
])  # fmt: skip
def test_ece_by_hand(y, p, bins, value):
    """Fails if bins are of equal width or weight, if ties are parted or go where the first of them
    would, if a tie's end makes a 16th bin, or if bins differ by over a row."""
    assert ev.ece(y, p, bins) == pytest.approx(value)
    counts = np.bincount(ev._equal_mass_bins(np.random.default_rng(0).random(1000), 15))
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
    """Fails if ties in p are not pooled first, if falling means are kept apart, if pooling stops
    after one step back, if the fit has another order than the rows, or if a sign is turned."""
    for y, p in random_cases(600, seed=2):
        # scikit-learn merges p that are nearly equal: give it ranks instead
        ranks = np.unique(p, return_inverse=True)[1]
        recalibrated = IsotonicRegression().fit(ranks, y).predict(ranks)
        np.testing.assert_allclose(ev.isotonic(y, p), recalibrated, atol=1e-12)
        score, base = np.mean((recalibrated - y) ** 2), np.mean((y.mean() - y) ** 2)
        np.testing.assert_allclose(
            ev.corp(y, p), [ev.brier(y, p) - score, base - score, base], atol=1e-12)


def test_calibration_slope():
    """Fails if slope and intercept are swapped, if p enters instead of its logit, or if the step is
    not damped (the last rows). scikit-learn without penalty is the reference."""
    rng, cases = np.random.default_rng(4), []
    for case in range(150):
        x = rng.normal(0, (0.3, 1, 6)[case % 3], 80)
        y = (rng.random(80) < train.sigmoid(0.5 * x + 0.4)).astype(int)
        if case % 5 == 0:  # all but one row parted by a cut
            y = (x > np.median(x)).astype(int)
            y[np.argsort(x)[38:40]] = 1, 0
        cases.append((case % 5 > 0, x, y))
    overshoots = np.repeat([-0.1, 0.01, 0.1, 10.0], [2, 1, 50, 1])
    for compare, x, y in [*cases, (False, overshoots, np.array([1, 1, 0, 1] + [0] * 50))]:
        p = np.clip(train.sigmoid(x), 1e-7, 1 - 1e-7)
        x, (slope, intercept) = np.log(p) - np.log1p(-p), ev.calibration_slope(y, train.sigmoid(x))
        error = train.sigmoid(slope * x + intercept) - y
        assert abs(error.sum()) < 1e-6 and abs(error @ x) < 1e-6  # the likelihood's maximum
        if compare:
            model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y)
            found = (model.coef_.item(), model.intercept_.item())
            assert (slope, intercept) == pytest.approx(found, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("y, p, reason", [
    ([], [], "not empty"), ([0, 1], [0.5], "one length"), ([0, 1], [0.5, np.nan], "nan"),
    ([0, np.nan], [0.5, 0.5], "nan"), ([0, 1], [0.5, 1.1], r"\[0, 1\]"),
    ([0, 1], [-0.1, 1], r"\[0, 1\]"), ([0, 2], [0.5, 0.5], "0 or 1"),
    ([[0, 1]], [[0.5, 0.5]], "lists"),
])  # fmt: skip
def test_bad_input_is_refused(y, p, reason):
    """Fails if one of the checks goes."""
    for metric in (ev.auroc, ev.average_precision, ev.best_f1_threshold, ev.brier, ev.log_loss,
                   ev.ece, ev.isotonic, ev.corp, ev.calibration_slope, ev.risk_coverage,
                   ev.matched_kappa, lambda y, p: ev.bootstrap_ci(ev.brier, y, p)):
        with pytest.raises(ValueError, match=reason):
            metric(np.array(y), np.array(p))


def test_undefined_only_where_it_is():
    """Fails if a metric of one class returns NaN or 0, if one that is defined refuses it, or if
    the slope's check of overlap goes one way only or lets a shared end point pass."""
    for label, undefined in ((0, (ev.average_precision, ev.best_f1_threshold)), (1, ())):
        for metric in (*undefined, ev.auroc, ev.calibration_slope, ev.matched_kappa,
                       lambda y, p: ev.bootstrap_ci(ev.auroc, y, p)):
            with pytest.raises(ValueError, match=f"no row of class {1 - label}"):
                metric([label] * 3, np.array([0.1, 0.2, 0.3]))
    assert ev.average_precision([1, 1], [0.2, 0.3]) == 1
    assert ev.f1_score([0, 0], [0, 1]) == 0 and ev.brier([0], [0.5]) == 0.25
    assert ev.corp([0, 0], [0.5, 0.5]) == (0.25, 0, 0)
    for metric, arrays, reason in ((ev.f1_score, ([0, 0], [0, 0]), "undefined"),
                                   (ev.cohen_kappa, ([1, 1], [1, 1]), "undefined"),
                                   (ev.f1_score, ([0, 1], [0.2, 0.7]), "0 or 1"),
                                   *((ev.calibration_slope, pair, "parts the classes") for pair in (
                                       ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]),
                                       ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]),
                                       ([0, 1, 1], [0.2, 0.2, 0.6]), ([0, 1], [0.3, 0.3])))):
        with pytest.raises(ValueError, match=reason):
            metric(*arrays)


def test_risk_and_coverage_by_hand():
    """Fails if the least sure rows come first, if a tie is parted, or if the largest share is the
    first one that reaches .95."""
    correct, sure = [1, 1, 0, 1, 0], [0.9, 0.5, 0.5, 0.3, 0.1]
    share, accuracy, largest = ev.risk_coverage(correct, sure)
    assert share.tolist() == [0.2, 0.6, 0.8, 1] and largest == 0.2
    assert accuracy == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5])
    late = [1, 0] + [1] * 18  # falls to .5, and 19 of 20 is .95 exactly
    assert ev.risk_coverage(late, np.arange(20, 0, -1) / 20)[2] == 1
    assert ev.risk_coverage([0, 0], [0.1, 0.2])[2] == 0


def test_matched_kappa():
    """Fails if a half is decided by its own threshold, if a group is parted, or if the oracle is
    not the best cut there is."""
    rng = np.random.default_rng(0)
    for y, p in random_cases(60, seed=5):
        cuts = [ev.cohen_kappa(y, p >= t) for t in np.unique(p)]
        kappas = ev._or_none(ev.matched_kappa, y, p)
        assert kappas is None or kappas[1] == pytest.approx(max(cuts), abs=1e-12)
    p, stated = rng.random((60, 20)), rng.integers(0, 2, (60, 20))  # nothing to match
    fitted, oracle = np.mean(list(map(ev.matched_kappa, stated, p)), axis=0)
    assert oracle > 0.15 and fitted < 0.1
    # two groups, one threshold each: every row is decided by the other group's
    stated, p = [0, 0, 1, 1], [0.1, 0.5, 0.3, 0.9]
    assert ev.matched_kappa(stated, p, ["a", "b", "a", "b"])[0] == 0


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

    ev.bootstrap_ci(metric, rng.integers(0, 2, 62), np.arange(62) / 62, groups, 200, 0)
    assert len(seen) == 201 and len(set(seen)) > 5  # once on the rows themselves


def test_bootstrap_interval():
    """Fails if the limits are not the 2.5th and 97.5th percentile (compared with the normal one for
    a mean), if the seed or clusters make no difference, or if one-class resamples do not count."""
    rng = np.random.default_rng(0)
    p, y = rng.random(400), rng.integers(0, 2, 400)

    def interval(y, p, groups, draws=1000):
        return ev.bootstrap_ci(lambda y, p: p.mean(), y, p, groups, draws, 1)

    half = 1.96 * p.std() / np.sqrt(400)
    limits = pytest.approx((p.mean() - half, p.mean() + half), abs=0.004)
    assert limits == interval(y, p, None, 2000) == interval(y, p, None, 2000)
    # four copies of each row in one group: the interval of 100 rows, twice as wide
    p, y, groups = np.repeat(p[:100], 4), np.repeat(y[:100], 4), np.repeat(np.arange(100), 4)
    wide, narrow = np.ptp(interval(y, p, groups)), np.ptp(interval(y, p, None))
    assert wide == pytest.approx(2 * narrow, rel=0.15)
    with pytest.raises(ValueError, match="one length"):
        ev.bootstrap_ci(ev.brier, y, p, groups[1:])
    # (9/10)^10 = 35 % of the resamples miss the positive: about 1000 * .35 / .65 redrawn
    last = np.arange(10) == 9
    limits, redrawn = ev.bootstrap({"auroc": (ev.auroc, np.arange(10) / 9)}, last, None, 1000, 0)
    assert 430 < redrawn < 650 and limits["auroc"] == (1.0, 1.0)


def test_differences_are_paired():
    """Fails if the two scorers get resamples of their own, or if the sign is turned."""
    y, p = list(random_cases(9, seed=3))[6]
    sums = np.stack((p * 7, np.ones(len(p))), axis=1)
    first = {"auroc": p, "log_loss": p, "reference_nll": sums}  # as `main` has it
    same = ev.score_metrics(y, p, draws=50, sums=sums, first=first)
    worse = ev.score_metrics(y, 1 - p, draws=50, sums=sums + [1, 0], first=first)
    for name in first:
        assert same[f"{name}_difference"] == 0
        assert same["intervals"][f"{name}_difference"] == (0, 0)
    assert worse["auroc_difference"] == pytest.approx(1 - 2 * ev.auroc(y, p))
    assert worse["log_loss_difference"] == ev.log_loss(y, 1 - p) - ev.log_loss(y, p)
    assert worse["intervals"]["reference_nll_difference"] == pytest.approx((1, 1))
    assert "auroc_difference" not in ev.score_metrics(y, p, draws=5)


def test_repetition_by_hand():
    """Fails if distinct-2 is a mean over texts, if rep-4 pools them, or if case parts words."""
    # bigrams: a b, b a, a b | A B -> 2 different of 4; no text has a 4-gram twice
    assert ev.repetition(["a b a b", "A B"]) == (0.5, 0.0)
    # 4-grams of "x x x x x x": three, one different; of "a b c d": one; mean of 2/3 and 0
    assert ev.repetition(["x x x x x x", "a b c d", "a"])[1] == pytest.approx(1 / 3)
    assert ev.repetition([")))))"])[1] == 0.5
    assert ev.repetition([]) == ev.repetition(["", "word"]) == (None, None)


def test_flesch_by_hand():
    """Fails if a silent e counts, if a decimal point ends a sentence, or if one sentence or
    collapsed text gets a mark."""
    # 6 words in 2 sentences; syllables the-1 home-1 was-1 / a-1 lit-tle-2 one-1
    mark = pytest.approx(206.835 - 1.015 * 3 - 84.6 * 7 / 6)
    assert ev.flesch("The home was 3.5. A little one!") == mark
    for text in ("The risk is high.", "", "... !? 3. 4.", "It is bad. " * 9):
        assert ev.flesch(text) is None


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
    assert ev.evidence_scores(rows, texts, file_rows) == (0.25, 0.25, 0.75)
    assert ev.evidence_scores([{"text": ""}], ["text"], [{}]) == (None, None, None)


def test_metrics_of_a_score_and_its_texts():
    """Fails if a value is taken from another column (decisions at .5 for those at the threshold),
    if unparsable texts leave kappa_all or agree, if a row without true p counts, or if JSON cannot
    hold the result."""
    rng, groups = np.random.default_rng(0), [f"g{i // 2}" for i in range(60)]
    true_p = rng.random(60)
    y, p = (rng.random(60) < true_p).astype(int), np.clip(true_p + rng.normal(0, 0.1, 60), 0, 1)
    true_p[:2] = np.nan
    result = ev.score_metrics(y, p, p >= 0.3, groups, 50, 0, true_p)
    due = [metric(y, p >= t) for metric, t in (
        (sk.f1_score, 0.5), (sk.f1_score, 0.3), (sk.accuracy_score, 0.5))]
    assert [result["f1_half"], result["f1"], result["accuracy"]] == pytest.approx(due)
    assert result["true_p_error"] == pytest.approx(np.abs(p - true_p)[2:].mean())
    assert result["intervals"]["auroc"] == ev.bootstrap_ci(ev.auroc, y, p, groups, 50, 0)
    head, sure = (p >= 0.5).astype(int), np.argsort(-np.abs(p - 0.5))
    assert result["accuracy_at_80"] == (head == y)[sure][:48].mean()

    stated = [None if i % 10 == 0 else int(i % 6 != 5) for i in range(60)]
    rows = [{"text": "t", "label": label, "evidence": ["chest pain"]} for label in y.tolist()]
    predictions = [{"probability": p, "stated_label": said, "explanation": "Chest pain."}
                   for p, said in zip(p, stated, strict=True)]
    sums = np.tile([6.0, 3.0, 4.0], (60, 1)) * (np.arange(60) % 2)[:, None]
    texts = ev.text_metrics(rows, predictions, sums, rows)
    third = np.array([2 if said is None else said for said in stated])
    parsable = third < 2
    assert (texts["n_explained"], texts["n_parsable"], texts["parsable"]) == (60, 54, 0.9)
    assert texts["auroc_alignment"] == sk.roc_auc_score(third[parsable], p[parsable])
    kappas = [sk.cohen_kappa_score(third[some], head[some]) for some in (parsable, slice(None))]
    assert [texts["kappa"], texts["kappa_all"]] == pytest.approx(kappas)
    assert texts["agree_share"] == (third == head).mean()
    assert texts["agree_accuracy"] == (head == y)[third == head].mean()
    assert (texts["reference_nll"], texts["base_kl"]) == (1.5, 0.75)
    assert (texts["evidence_recall"], texts["evidence_invented"], texts["empty"]) == (1, 1, 0)
    json.dumps(result | texts, allow_nan=False)


def test_nothing_to_measure_is_none():
    """Fails if an absent value becomes 0 or NaN instead of None (n/a in the table)."""
    texts = ev.text_metrics([], [], np.zeros((0, 3)), [{"text": "t", "label": 0}])
    assert {value for key, value in texts.items() if key[:2] != "n_"} == {None}
    one = ev.score_metrics([0, 1] * 6, np.full(12, 0.5), draws=5)
    assert one["true_p_error"] is one["slope"] is None
    shown = ev.table({"x": one | texts, "y": {"auroc": 0.25, "calibrated": True}},
                     ["auroc", "calibrated", "base_kl"]).split("\n")
    assert [line.split() for line in shown] == [
        ["auroc", "calibrated", "base"], ["kl"], ["x", "0.500", "[0.500,", "0.500]", "n/a", "n/a"],
        ["y", "0.250", "yes", "n/a"]]


def test_calibration_finds_temperature_bias_and_threshold():
    """Fails if temperature multiplies, if the bias is added before the division, or if the
    threshold is one of uncalibrated probabilities."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20000)
    y = rng.random(20000) < 1 / (1 + np.exp(-logit))
    fitted, p, sentence = ev.calibrate(y, 3 * (logit - 0.5))
    found = fitted["calibration"]
    assert sentence.startswith("calibrated") and found["bias"] == pytest.approx(0.5, abs=0.05)
    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert p == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.02)
    assert fitted["threshold"] == ev.best_f1_threshold(y, p)
    few, p, sentence = ev.calibrate(y[:20], logit[:20])
    assert few["calibration"] == {"temperature": 1, "bias": 0} and "30 are due" in sentence
    assert p == pytest.approx(1 / (1 + np.exp(-logit[:20])))
    assert "wrong way" in ev.calibrate(y, -logit)[2] and "parts" in ev.calibrate(y, y * 2.0 - 1)[2]


@pytest.fixture(scope="module")
def runs(tiny, rows_file, tmp_path_factory):
    """A folder with two runs of random LoRA and head; in `out` the results of comparing them."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, scorer) in enumerate((("joint", "head"), ("lm", "label_token"))):
        torch.manual_seed(seed)
        model = CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8.0)).eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        prompts = Prompts(tiny, "Is it bad?", max_answer=12)
        meta = {"base": str(tiny), "base_fingerprint": base_fingerprint(tiny), "scorer": scorer,
                "lora": {"rank": 4, "alpha": 8, "targets": TARGETS}, "prompts": prompts.settings(),
                "threshold": 0.6, "base_rate": 0.4,
                "calibration": {"temperature": 2.0, "bias": 0.5}}
        (folder / name).mkdir()
        Run(model, prompts, meta).save(folder / name)
    ev.main(f"--run {folder}/joint --run {folder}/lm --model {tiny} --data {rows_file} --batch 7 "
            f"--draws 20 --out {folder}/out".split())
    return folder


def read(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "eval.json").read_text()), list(map(json.loads, lines))


def test_reference_sums(runs, rows, tiny):
    """Fails if prompt or pad tokens count, if rows are mixed up, if the KL is turned round, or if
    LoRA stays off."""
    run, base = load_run(runs / "joint"), load_llama(tiny, torch.float32)
    for row, found in zip(rows, ev.reference_sums(run, rows, 7), strict=True):
        if "explanation" not in row:
            assert not found.any()
            continue
        prompt = run.prompts.prompt(row["text"])[0]
        answer = run.prompts.answer(row["label"], row["explanation"])
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            ours, theirs = (llama.logits(llama(ids))[0, len(prompt) - 1 : -1].log_softmax(-1)
                            for llama in (run.llama, base))
        nll = F.nll_loss(ours, torch.tensor(answer), reduction="sum").item()
        kl = F.kl_div(theirs, ours, log_target=True, reduction="sum").item()
        assert found == pytest.approx([nll, kl, len(answer)], rel=1e-4) and kl > 1
    run.model, run.llama = CLSGen(base), base  # without LoRA, as after `merge`
    assert ev.collapse([], ev.reference_sums(run, rows, 7))["base_kl"] is None


def test_one_command_compares(runs, rows, monkeypatch):
    """Fails if a scorer is missing or misnamed, if the base model answers with LoRA, with another
    score or with a threshold, or if the differences are not against the first run's own score."""
    report, predictions = read(runs / "out")
    metrics, names = report["metrics"], [f"{runs}/joint head", f"{runs}/joint raw"]
    names += [f"{runs}/joint label token", f"{runs}/lm label token", f"{runs}/lm raw"]
    assert list(metrics) == [*names, "zero-shot label token", "majority"]
    assert [one["calibrated"] for one in metrics.values()] == [1, 0, 0, 1, 0, 0, 0]
    for key, due in (("f1", [1, 0, 0, 1, 0, 0, 0]), ("rep_4", [1, 0, 0, 1, 0, 1, 0])):
        assert [key in one for one in metrics.values()] == due
    assert [one["run"] for one in predictions[::40]] == [
        load_run(runs / "joint").name, load_run(runs / "lm").name, "zero-shot"]
    assert [one["group"] for one in predictions] == [row["group"] for row in rows] * 3
    own, *others = metrics.values()
    due = [one["auroc"] - own["auroc"] for one in others]
    assert [one["auroc_difference"] for one in others] == due and "auroc_difference" not in own
    run, zero = load_run(runs / "joint"), predictions[80:]
    monkeypatch.setattr(LoRALinear, "off", True)
    due = [one["label_token_probability"] for one in run.predict(rows, explain=False)]
    assert [one["probability"] for one in zero] == pytest.approx(due, abs=1e-5)


@pytest.mark.parametrize("more, scored", [("", 2), ("--overwrite", 3), ("--rows 40", 3)])
def test_a_stopped_evaluation_goes_on(runs, rows_file, tiny, tmp_path, monkeypatch, more, scored):
    """Fails if a run that was scored before the stop is scored again, if what was kept is taken for
    other rows or against --overwrite, if it gives other numbers, or if a file of others goes."""
    call = (f"--run {runs}/joint --run {runs}/lm --model {tiny} --data {rows_file} "
            f"--batch 7 --draws 20 --out {tmp_path} ")
    predict, seen = Run.predict, []

    def watched(run, *rest, **options):
        seen.append(run.name)
        if stop and len(set(seen)) == 2:
            raise KeyboardInterrupt
        return predict(run, *rest, **options)

    monkeypatch.setattr(Run, "predict", watched)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        ev.main(call.split())
    assert len(list(tmp_path.glob("*.part"))) == 1
    stop, seen[:], other = False, [], tmp_path / "p.jsonl.part"
    other.touch()  # of clsgen.py, in the same folder
    ev.main((call + more).split())
    assert len(set(seen)) == scored and list(tmp_path.glob("*.part")) == [other]
    if not more:
        (found, texts), (due, due_texts) = read(tmp_path), read(runs / "out")
        for one in [*found["metrics"].values(), *due["metrics"].values()]:
            one.pop("seconds", None)
        assert found["metrics"] == due["metrics"] and texts == due_texts


def test_the_base_model_is_calibrated_as_a_run_is(runs, rows, rows_file, tiny, tmp_path):
    """Fails if --valid changes the runs, or leaves the base model's p or threshold as they were."""
    other = [{**row, "label": row["label"] ^ (i % 3 == 0)} for i, row in enumerate(rows)]
    valid = write_rows(tmp_path / "valid.jsonl", other)
    ev.main(f"--run {runs}/joint --run {runs}/lm --model {tiny} --data {rows_file} --batch 7 "
            f"--draws 20 --out {runs}/valid --valid {valid} --explain 0".split())
    (report, found), (_, before) = read(runs / "valid"), read(runs / "out")
    found, before = ([{one["id"]: one for one in lines[i : i + 40]} for i in (0, 40, 80)]
                     for lines in (found, before))
    for mine, was in zip(found, before, strict=True):
        raw, p, raw_was, p_was = (np.array([side[row["id"]][key] for row in rows]) for side in (
            mine, was) for key in ("raw_probability", "probability"))
        assert raw == pytest.approx(raw_was, abs=1e-5)
        assert (p == pytest.approx(p_was, abs=1e-5)) == (mine is not found[-1])
    fitted, due, _ = ev.calibrate([row["label"] for row in other], np.log(raw / (1 - raw)))
    assert fitted["calibration"]["temperature"] != 1 and p == pytest.approx(due, abs=1e-4)
    assert found[-1]["r0"]["threshold"] == pytest.approx(fitted["threshold"], abs=1e-4)
    own = report["metrics"]["zero-shot label token"]
    assert own["calibrated"] and "f1" in own and "zero-shot raw" in report["metrics"]


def test_rows_explain_and_the_results_folder(runs, rows_file, capsys):
    """Fails if --rows takes the head of the file, if --explain explains others than the first of
    the shuffle, if results are replaced without --overwrite, or if a bad flag gets through."""
    call = f"--run {runs / 'lm'} --data {rows_file} --draws 20 ".split()
    ev.main([*call, "--rows", "30", "--explain", "10"])
    report, predictions = read(runs / "lm" / "eval" / "rows")
    assert list(report["metrics"]) == ["label token", "raw", "majority"] and report["n"] == 30
    order = np.random.default_rng(0).permutation(40)[:30]
    assert [one["id"] for one in predictions] == [f"r{i}" for i in order]
    assert [one["explanation"] is not None for one in predictions] == [True] * 10 + [False] * 20
    assert f"{report['metrics']['raw']['auroc']:.3f} [" in capsys.readouterr().out
    for more, reason in (("--valid x", "--model"), ("", "--overwrite"), ("--rows 0", "least"),
                         ("--explain -1", "least"), ("--batch 0", "least"), ("--draws 0", "least"),
                         (" ".join(call[:2]), "twice"), ("--overwrite --run nowhere", "nowhere")):
        with pytest.raises(ValueError, match=reason):
            ev.main([*call, *more.split()])


def test_the_collapse_meter_only_watches(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if the meter moves a weight, or is not in the log."""
    for name in "ab":
        train.main(f"--data {rows_file} --model {tiny} --out {tmp_path / name} --epochs 1 --rank 4 "
                   "--dtype float32 --valid-fraction 0.3".split())
        monkeypatch.setattr(train, "watch_text", lambda *args: {})
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    valid = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])["valid"]
    assert one == other and valid["base_kl"] > 0 and valid["parsable"] is not None


def test_comprehensiveness():
    """Fails if one shared word is a citation, if a control takes a cited word or another length,
    if the fall is not of the decided class, or if rows that cite nothing count."""
    text = "There is a history of heart failure, and the patient has no family support at home."
    cited = comp.cited_words(text, "Heart failure. A patient without family support.")
    assert cited.tolist() == [0, 1, 1, 0, 1, 1, 0]  # history heart failure patient family ...
    assert comp.without(text, cited) == "There is a history of , and the patient has no at home."
    assert comp.random_words(cited, np.random.default_rng(0)) is None  # no room for two
    for seed in range(20):
        cited = np.arange(20) % 15 < 2
        drawn = comp.random_words(cited, np.random.default_rng(seed))
        assert not (drawn & cited).any() and drawn.sum() == 4

    class Fake:  # as a run, and as arguments
        seed, batch, draws = 0, 4, 20

        def predict(self, texts, **_):
            return [{"probability": 0.1 + 0.8 * ("heart failure" in text)} for text in texts]

    rows = [{"text": "heart failure" + " calm quiet ward evening" * 3}] * 27
    records = [{"probability": 0.9, "explanation": "Heart failure."},
               {"probability": 0.2, "explanation": "Heart failure."},
               {"probability": 0.1, "explanation": "Calm."}] * 9
    found = comp.measure(Fake(), rows, records, Fake)
    # p .9 falls by .8, at random by 0; p .2, decided as 0, by .1 - .2, at random by .9 - .2
    falls = found["comprehensiveness"], found["random_fall"], found["difference"]
    assert falls == pytest.approx((0.35, 0.35, 0), abs=1e-12)
    assert (found["rows"], found["rows_uncited"], found["rows_no_room"]) == (18, 9, 0)


def test_figures(runs, tmp_path, monkeypatch):
    """Fails if a figure is missing, if one is replaced unasked, or if a missing matplotlib ends in
    a traceback."""
    call = [str(runs / "out" / "eval.json"), "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install matplotlib"):
        patch.setitem(sys.modules, "matplotlib", None)
        figures.main(call)
    pytest.importorskip("matplotlib")
    figures.main(call)
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes()[:4] == b"\x89PNG"} == {
        "reliability.png", "roc.png", "risk_coverage.png"}
    with pytest.raises(ValueError, match="--overwrite"):
        figures.main(call)


def test_real_results(tiny, rows, tmp_path, monkeypatch, capsys):
    """Fails if a scorer is missing, if test or validation rows are trained on, if work that is done
    is done again, if a stopped training starts anew, if another LM weight's results replace the
    default's, or if a sweep reports other numbers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(real.DATA, "tiny", {
        "question": "Is it bad?", "held": 0.3, "rows": 20,
        "flags": "--epochs 2 --valid-every 1 --max-answer 12 --rank 2"})
    for name, part in (("train", rows), ("valid", rows[::-1])):
        write_rows(tmp_path / f"{name}.jsonl", [
            row | {"id": f"{name} {row['id']}", "explanation": "Bad."} for row in part])
    work = tmp_path / "work"
    call = f"tiny --folder {tmp_path} --model {tiny} --work {work} --out {tmp_path}".split()
    real.main(call)
    shown, report = capsys.readouterr().out, json.loads((tmp_path / "real_tiny.json").read_text())
    due = [f"{work}/tiny-1 head", f"{work}/tiny-cls head", f"{work}/tiny-lm label token",
           "zero-shot label token", "majority", *real.NGRAMS]
    assert set(due) <= report["metrics"].keys() and report["n"] == 40
    assert report["metrics"]["zero-shot label token"]["f1"] and "| CLSGen | " in shown
    parts = [{row["id"] for row in read_rows(work / f"tiny-{part}.jsonl")}
             for part in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [20, 12, 40] and len(set.union(*parts)) == 72

    stopped, weights = work / "tiny-cls.cost.json", work / "tiny-cls" / "adapter_model.safetensors"
    stopped.write_text(json.dumps({"seconds": 1000.0, "peak_memory_gb": 0.0, "status": 1}))
    before, took = weights.read_bytes(), report["costs"]
    real.main(call)
    again = json.loads((tmp_path / "real_tiny.json").read_text())["costs"]
    assert again["cls"]["seconds"] > 1000 and "--resume" in capsys.readouterr().out
    assert again == took | {"cls": again["cls"]}  # the others were not run again
    assert weights.read_bytes() == before

    real.main([*call, "--weight", "3"])
    assert f"{work}/tiny-3 head" in json.loads(
        (tmp_path / "real_tiny_weight3.json").read_text())["metrics"]
    assert json.loads((tmp_path / "real_tiny.json").read_text())["costs"] == again

    real.main([*call, "--sweep", "1"])  # only reads: all is there
    swept = json.loads((tmp_path / "real_tiny_sweep.json").read_text())
    lines = (work / "tiny-1" / "log.jsonl").read_text().splitlines()
    assert swept["validation"]["1"] == json.loads(lines[-1])["valid"]
    assert swept["validation"]["lm"]["lm"] > 0 and swept["validation"]["lm"]["auroc"] is None
    assert "| LM-only |  |  | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        real.main([*call, "--sweep", "-1"])


def test_random_llama(tiny, tmp_path, monkeypatch):
    """Fails if a shape is not the published one, if a tensor is left empty, if the folder does not
    load as any other, or if one that is there is written over."""
    for name, count in (("1b", 1_235_814_400), ("8b", 8_030_261_248)):
        with torch.device("meta"):
            llama = Llama(LlamaConfig.from_dict(random_llama.COMMON | random_llama.SHAPES[name]))
        assert sum(parameter.numel() for parameter in llama.parameters()) == count
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 2}
    monkeypatch.setitem(random_llama.SHAPES, "1b", random_llama.SHAPES["1b"] | small)
    call = ["1b", "--out", str(tmp_path / "new"), "--tokenizer", str(tiny)]
    random_llama.main(call)
    for name, parameter in load_llama(tmp_path / "new", torch.float32).named_parameters():
        due = (1.0, 0.0) if "norm" in name else (0.0, 0.02)  # mean, deviation
        assert (parameter.mean().item(), parameter.std().item()) == pytest.approx(due, abs=2e-3)
    assert Prompts(tmp_path / "new", "Is it bad?").prompt("It is.")
    for wrong, reason in ((call, "exists"), ([*call[:-1], str(tmp_path)], "tokenizer.json")):
        with pytest.raises((ValueError, OSError), match=reason):
            random_llama.main(wrong)
