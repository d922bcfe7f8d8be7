"""How good is a probability, and does a text say what the probability says?

In reading order: checks; ranking (AUROC); decisions at a threshold (F1); errors of p (log loss);
calibration (ECE, CORP, slope); agreement (kappa, rereading); confidence intervals; curves for
pictures; and at the end `score_metrics`, which collects all metrics of a probability in one dict.
Metrics of the text itself are in text_metrics.py.
Each function gives its definition and its source. Only numpy is needed.

A new metric is one function, and one line in a table of `score_metrics`.

Notation: N rows; y (N,) labels in {0, 1}; p (N,) probabilities of class 1, in [0, 1]; yhat (N,)
decisions in {0, 1}; z (N,) logits. All arrays may be lists. Log loss and KL are in nats.
A ValueError says what is wrong with the input, and the kind Undefined why a metric is undefined.
"""

from itertools import islice

import numpy as np


# --- checks ---------------------------------------------------------------------------------------
class Undefined(ValueError):
    """The input is right, but the metric has no value on it, such as AUROC on a single class."""


def checked(y, p, need=()):
    """Returns y and p as float64 arrays, or says in a ValueError what is wrong with them.

    need: the classes without which the metric is undefined.
    """
    y = np.asarray(y, dtype=np.float64)
    p = np.asarray(p, dtype=np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(f"expected two lists of one length; found {y.shape} and {p.shape}")
    if not len(y):
        raise Undefined("expected two lists that are not empty; found no row")

    # NaN is not a label, and both comparisons with it are false
    labels_fit = np.isin(y, (0, 1)).all()
    values_fit = p.min() >= 0 and p.max() <= 1
    if not (labels_fit and values_fit):
        raise ValueError(
            "expected labels of 0 or 1 and values in [0, 1]; "
            f"found labels {y.min():g} to {y.max():g}, values {p.min():g} to {p.max():g}"
        )

    for label in need:
        if not (y == label).any():
            raise Undefined(f"no row of class {label}: the metric is undefined")
    return y, p


def none_if_undefined(metric, *arrays):
    """metric(*arrays), or None where the metric is undefined: n/a in a table, null in JSON."""
    try:
        return metric(*arrays)
    except Undefined:
        return None


def mean_or_none(values):
    """The mean as a float; None of an empty list, where there is nothing to measure."""
    if not len(values):
        return None
    return float(np.mean(values))


FEWEST_ROWS = 10  # of each class: with fewer, nothing is fitted, and no interval is relied on
FEWEST_GROUPS = 20  # with fewer, intervals are too narrow


def rarer_class(y):
    """(label, rows): the class that has fewer rows, and how many it has."""
    rows = np.bincount(np.asarray(y, dtype=np.int64), minlength=2)
    label = int(rows.argmin())
    return label, int(rows[label])


def interval_warnings(y, groups=None):
    """Sentences that say why the intervals of these rows are not to be relied on; mostly none.

    groups: as in `group_numbers`.
    """
    warnings = []
    label, rows = rarer_class(y)
    if rows < FEWEST_ROWS:
        warnings.append(f"class {label} has {rows} of the {len(y)} rows: with fewer than "
                        f"{FEWEST_ROWS} of a class, the intervals are not to be relied on")
    if len(set(group_numbers(groups, len(y)))) < FEWEST_GROUPS:
        warnings.append(f"under {FEWEST_GROUPS} groups the intervals are too narrow")
    return warnings


# --- ranking --------------------------------------------------------------------------------------
def counts_by_value(y, p):
    """Counts the rows and the positive rows at each value of p: tied rows have no order.

    Returns three arrays (U,): the U different values of p, ascending; the number of rows that have
    each value; and how many of these are positive.
    """
    values, value_of_row, rows = np.unique(p, return_inverse=True, return_counts=True)
    positives = np.bincount(value_of_row, weights=y)
    return values, rows, positives


def auroc(y, p):
    """The chance that a random positive row scores above a random negative one.

        AUROC = P(p+ > p-) + P(p+ = p-) / 2

    1 is a perfect ranking and .5 a random one; only the order of p matters. This is the
    Mann-Whitney statistic (Hanley and McNeil 1982). Undefined if a class is missing.
    """
    y, p = checked(y, p, need=(0, 1))
    _, rows, positives = counts_by_value(y, p)
    negatives = rows - positives

    # A positive beats the negatives below it, and half of those tied with it
    beaten = np.cumsum(negatives) - negatives / 2
    wins = positives @ beaten
    return float(wins / (positives.sum() * negatives.sum()))


def average_precision(y, p):
    """The mean precision over all thresholds, each weighted by the recall that it adds.

        AP = sum over thresholds t of precision(t) (recall(t) - recall(before t))

    There is no interpolation between thresholds. A random ranking has an AP of about the share of
    positives. Undefined if there is no positive.
    """
    y, p = checked(y, p, need=(1,))
    _, rows, positives = counts_by_value(y, p)

    # From the highest value down, as a falling threshold adds rows
    rows = rows[::-1]
    positives = positives[::-1]
    precision = np.cumsum(positives) / np.cumsum(rows)
    return float(precision @ positives / positives.sum())


# --- decisions ------------------------------------------------------------------------------------
def accuracy(y, yhat):
    """The share of decisions that are right."""
    checked(yhat, y)  # decisions must be 0 or 1, as labels must
    y, yhat = checked(y, yhat)
    return float(np.mean(y == yhat))


def f1_score(y, yhat):
    """The harmonic mean of precision and recall of the decisions (van Rijsbergen 1979).

        F1 = 2 TP / (2 TP + FP + FN)

    Undefined if there is no positive among labels and decisions.
    """
    checked(yhat, y)  # decisions must be 0 or 1, as labels must
    y, yhat = checked(y, yhat)
    if not (y.any() or yhat.any()):
        raise Undefined("no positive among labels or decisions: F1 is undefined")

    true_positives = y @ yhat
    return float(2 * true_positives / (y.sum() + yhat.sum()))


def counts_by_threshold(y, p):
    """Counts what p >= t decides for each t of the different values of p, from the highest down.

    Returns three arrays (U,): the values, and for each the true positives and the rows decided as 1
    if this value and all above it are decided as 1.
    """
    values, rows, positives = counts_by_value(y, p)
    return values[::-1], np.cumsum(positives[::-1]), np.cumsum(rows[::-1])


def halfway_down(values, best):
    """A threshold that decides values[:best + 1] as 1 and the others as 0; values are descending.

    It lies halfway between the lowest value that is decided as 1 and the next lower one (0 where
    there is none), so that a decision does not change if p is rounded differently in another batch
    (by about 1e-5).
    """
    next_lower = 0.0
    if best + 1 < len(values):
        next_lower = values[best + 1]
    halfway = (next_lower + values[best]) / 2
    if halfway > next_lower:
        return float(halfway)
    return float(values[best])  # the two are neighbours in float64


def best_f1_threshold(y, p):
    """A threshold t whose decisions, 1 where p >= t, have the best F1.

    Of several best cuts it is the highest one; where t lies in the cut, see `halfway_down`.
    Undefined if there is no positive.
    """
    y, p = checked(y, p, need=(1,))
    values, true_positives, decided = counts_by_threshold(y, p)
    f1 = 2 * true_positives / (y.sum() + decided)
    return halfway_down(values, int(np.argmax(f1)))


def risk_coverage(correct, confidence):
    """How accuracy rises if the rows of lowest confidence are left undecided.

    correct (N,) is 1 where the decision is right; confidence (N,) is in [0, 1]. Returns
    (coverage, accuracy, largest). coverage and accuracy (U,) have an entry for each different value
    of the confidence, from the highest down: the share of rows with at least this confidence, and
    the accuracy among them. largest is the largest share with an accuracy of .95 or more, 0 if
    there is none. The curve is that of selective classification (El-Yaniv and Wiener 2010).
    """
    correct, confidence = checked(correct, confidence)
    _, rows, right = counts_by_value(correct, confidence)

    # From the highest confidence down
    decided = np.cumsum(rows[::-1])
    hits = np.cumsum(right[::-1])
    largest = decided[hits >= 0.95 * decided].max(initial=0)
    return decided / len(correct), hits / decided, float(largest / len(correct))


# --- errors of a probability ----------------------------------------------------------------------
def brier(y, p):
    """The mean squared error (p - y)^2 (Brier 1950): 0 is perfect, .25 is p = .5 everywhere."""
    y, p = checked(y, p)
    return float(np.mean((p - y) ** 2))


def log_loss(y, p):
    """The mean of -log(probability of the true class), in nats: what the score head is trained on.

    p = .5 everywhere has .693. A row with p = 1 and label 0 costs 36, not infinity: p is clipped by
    the float64 epsilon, as in scikit-learn.
    """
    y, p = checked(y, p)
    tiny = np.finfo(np.float64).eps
    p = np.clip(p, tiny, 1 - tiny)
    log_likelihood = np.where(y == 1, np.log(p), np.log1p(-p))
    return float(-np.mean(log_likelihood))


# --- calibration ----------------------------------------------------------------------------------
def equal_mass_bins(p, bins):
    """(N,) the bin of each row, where each bin gets an equal share of the rows, ranked by p.

    Tied rows stay together, in the bin that holds the middle of their ranks.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    _, value_of_row, rows = np.unique(p, return_inverse=True, return_counts=True)
    middle = (np.cumsum(rows) - rows / 2) / len(p)  # of each value's ranks, in (0, 1)
    bin_of_value = np.floor(middle * bins).astype(np.int64)
    return bin_of_value[value_of_row]


def ece(y, p, bins=15):
    """The expected calibration error: how far p is from the share of positives, on average.

        ECE = sum over bins of (rows in the bin / N) |mean p - share of positives|

    From Naeini et al. (2015), with bins of equal mass (Nixon et al. 2019). On a finite number of
    rows, the ECE of a perfect p is not 0: read it next to `ece_floor`.
    """
    y, p = checked(y, p)
    bin_of_row = equal_mass_bins(p, bins)
    gaps = np.bincount(bin_of_row, weights=p - y)  # of each bin, times its rows
    return float(np.abs(gaps).sum() / len(p))


def ece_floor(p, bins=15, draws=1000, seed=0):
    """(mean, 95th percentile) of the ECE that a perfectly calibrated p has on as many rows.

    Labels are drawn from p itself, `draws` times (consistency resampling, Broecker and Smith 2007).
    Each row is drawn by itself: groups are ignored. Where the labels of a group are more alike than
    their p says, the ECE of a perfect p is above the 95th percentile in more than 5 % of files, as
    in 19 % of simulated ones with groups of eight strongly related labels.
    """
    no_labels = np.zeros(len(p))
    _, p = checked(no_labels, p)
    bin_of_row = equal_mass_bins(p, bins)
    expected = np.bincount(bin_of_row, weights=p)  # positives in each bin

    # Not default_rng(seed): rows that were simulated with that would meet the same draws again
    rng = np.random.default_rng([seed, len(p)])
    gaps = np.zeros((draws, len(expected)))
    for draw in range(draws):
        is_positive = rng.random(len(p)) < p
        drawn = np.bincount(bin_of_row[is_positive], minlength=len(expected))
        gaps[draw] = expected - drawn

    values = np.abs(gaps).sum(axis=1) / len(p)
    return float(values.mean()), float(np.quantile(values, 0.95))


def isotonic(y, p):
    """(N,) the fit to y of least squared error that never falls as p rises.

    Pool adjacent violators (Ayer et al. 1955): neighbouring values of p are pooled into blocks
    until the share of positives rises from block to block. That share is the fit.
    """
    y, p = checked(y, p)
    _, value_of_row, rows = np.unique(p, return_inverse=True, return_counts=True)
    positives = np.bincount(value_of_row, weights=y).astype(np.int64)

    blocks = []  # (positives, rows, values of p), from the lowest p up
    for block_positives, block_rows in zip(positives.tolist(), rows.tolist(), strict=True):
        block_values = 1
        while blocks:
            before_positives, before_rows, before_values = blocks[-1]
            # Stop if the share before is lower; in whole numbers, the comparison is exact
            if before_positives * block_rows < block_positives * before_rows:
                break
            block_positives += before_positives
            block_rows += before_rows
            block_values += before_values
            blocks.pop()
        blocks.append((block_positives, block_rows, block_values))

    block_positives, block_rows, block_values = np.array(blocks).T
    fit_of_value = np.repeat(block_positives / block_rows, block_values)
    return fit_of_value[value_of_row]


def corp(y, p):
    """(miscalibration, discrimination, uncertainty), the three parts of the Brier score.

        Brier(p) = miscalibration - discrimination + uncertainty
        miscalibration = Brier(p) - Brier(isotonic p)
        discrimination = Brier(share of positives) - Brier(isotonic p)
        uncertainty    = Brier(share of positives)

    The CORP decomposition (Dimitriadis, Gneiting and Jordan 2021) needs no choice of bins.
    """
    y, p = checked(y, p)
    share = np.full(len(y), y.mean())
    uncertainty = brier(y, share)
    recalibrated = brier(y, isotonic(y, p))
    return brier(y, p) - recalibrated, uncertainty - recalibrated, uncertainty


def sigmoid(z):
    """1 / (1 + exp(-z)), written with tanh, which cannot overflow."""
    return (1 + np.tanh(np.asarray(z) / 2)) / 2


def calibrated(z, temperature, bias):
    """The probabilities of logits z (N,) with the temperature and bias of `calibrate`."""
    return sigmoid(np.asarray(z) / temperature + bias)


def clipped_logit(p, tiny=1e-7):
    """log(p / (1 - p)) of probabilities that are first clipped to [tiny, 1 - tiny]."""
    p = np.clip(p, tiny, 1 - tiny)
    return np.log(p) - np.log1p(-p)


def calibration_slope(y, p):
    """(slope, intercept) of a logistic regression of y on logit(p) (Cox 1958).

        P(y = 1) = sigmoid(slope logit(p) + intercept)

    (1, 0) is ideal; a slope below 1 means that p is overconfident. Undefined if a class is
    missing, or if one cut of p separates the classes or p is constant: then there is no finite fit,
    or more than one.
    """
    y, p = checked(y, p, need=(0, 1))
    x = clipped_logit(p)
    negative = x[y == 0]
    positive = x[y == 1]
    if negative.max() <= positive.min() or positive.max() <= negative.min():
        raise Undefined("one cut of p separates the classes: no finite calibration slope")

    try:
        return fit_logistic(x, y)
    except np.linalg.LinAlgError:  # p differs in its last digits only
        raise Undefined("p is almost constant: no calibration slope") from None


def fit_logistic(x, y, prior=None):
    """(slope, intercept) of the highest likelihood of P(y = 1) = sigmoid(slope x + intercept).

    prior: the standard deviation of Gaussian priors around slope 1 and intercept 0, whose log is
    added; None for no priors. Without them the fit is only finite if no cut of x separates the
    classes.
    """
    design = np.stack([x, np.ones_like(x)], axis=1)  # (N, 2)
    center = np.array([1.0, 0.0])
    precision = 0.0 if prior is None else prior**-2.0

    # Newton's method takes about ten steps, and more if the classes are almost separate
    weights = np.zeros(2)  # slope and intercept
    for _ in range(1000):
        fitted = sigmoid(design @ weights)
        variance = fitted * (1 - fitted)
        gradient = design.T @ (y - fitted) - precision * (weights - center)
        hessian = (design * variance[:, None]).T @ design + precision * np.eye(2)
        step = np.linalg.solve(hessian, gradient)

        # A full step overshoots if the classes are almost separate: the more it would change a
        # logit, the shorter it becomes
        largest_change = np.abs(design @ step).max()
        weights = weights + step / (1 + largest_change)
        if np.abs(step).max() <= 1e-10 * (1 + np.abs(weights).max()):
            break
    return float(weights[0]), float(weights[1])


def calibration_intervals(y, p, groups=None):
    """95 % intervals of slope and intercept, ((low, high), (low, high)), by group.

    From the sandwich estimate of their covariance (Huber 1967; by group, Liang and Zeger 1986),
    where u_g is the sum over a group's rows of (y - fitted) (logit(p), 1):

        H^-1 (sum over groups of u_g u_g^T) H^-1

    Undefined as `calibration_slope` is, and if all rows are of one group.
    """
    slope, intercept = calibration_slope(y, p)
    y, p = checked(y, p)
    x = clipped_logit(p)
    design = np.stack([x, np.ones_like(x)], axis=1)  # (N, 2)
    fitted = sigmoid(slope * x + intercept)
    variance = fitted * (1 - fitted)
    hessian = (design * variance[:, None]).T @ design

    number = group_numbers(groups, len(y))
    n_groups = number.max() + 1
    if n_groups < 2:
        raise Undefined("all rows are of one group: their spread is unknown")
    scores = np.zeros((n_groups, 2))
    np.add.at(scores, number, design * (y - fitted)[:, None])

    try:
        inverse = np.linalg.inv(hessian)
    except np.linalg.LinAlgError:
        raise Undefined("p hardly differs between rows: the spread of the fit is unknown") from None
    covariance = inverse @ scores.T @ scores @ inverse * n_groups / (n_groups - 1)
    reach = student_t(independent_pairs(y, number)) * np.sqrt(np.diag(covariance))
    low = (slope, intercept) - reach
    high = (slope, intercept) + reach
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


CALIBRATION_PRIOR = 0.3


def calibrate(y, z):
    """(temperature, bias, sentence) of p = sigmoid(z / temperature + bias), fitted by log loss.

    z (N,) are raw logits of validation rows, and y (N,) their labels (Platt 1999). The fit is drawn
    towards "no change" by Gaussian priors on 1 / temperature, around 1, and on the bias, around 0:
    without them it is worse than no calibration on fewer than a hundred rows or so, and on several
    hundred the priors hardly matter (docs/metrics.md has the measurements).

    The sentence tells the user the result, or that the score ranks these rows the wrong way: then
    temperature and bias are (1, 0). Undefined if a class is missing.
    """
    z = np.asarray(z, dtype=np.float64)
    y, _ = checked(y, sigmoid(z), need=(0, 1))
    slope, bias = fit_logistic(z, y, CALIBRATION_PRIOR)
    if slope < 1e-6:  # also what rounding leaves of 0, whose temperature would be huge
        return 1.0, 0.0, ("not calibrated: the score ranks these rows the wrong way "
                          f"(slope {slope:.3f})")
    temperature = 1 / slope
    return temperature, bias, f"calibrated: temperature {temperature:.3f}, bias {bias:.3f}"


# --- agreement ------------------------------------------------------------------------------------
def cohen_kappa(a, b):
    """How far two lists of labels agree beyond chance (Cohen 1960): 1 is perfect, 0 is chance.

        kappa = (agreement - chance) / (1 - chance),  chance = sum over labels of P(a) P(b)

    a, b (N,) are numbers, and may hold more than two labels. Undefined if they hold only one.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)
    has_nan = np.isnan(a).any() or np.isnan(b).any()
    if a.ndim != 1 or a.shape != b.shape or has_nan:
        raise ValueError(f"expected two lists of one length, no NaN; found {a.shape} and {b.shape}")
    if not len(a):
        raise Undefined("expected two lists that are not empty; found no row")

    labels = np.union1d(a, b)[:, None]  # (labels, 1)
    if len(labels) == 1:
        raise Undefined("both lists hold the same single label: kappa is undefined")

    share_in_a = (a == labels).mean(axis=1)
    share_in_b = (b == labels).mean(axis=1)
    chance = share_in_a @ share_in_b
    agreement = np.mean(a == b)
    return float((agreement - chance) / (1 - chance))


def best_kappa_threshold(stated, p):
    """A threshold t where p >= t agrees best with the stated labels, by kappa.

    Of several best cuts it is the highest one; where t lies in the cut, see `halfway_down`.
    Undefined if one of the labels is never stated.
    """
    stated, p = checked(stated, p, need=(0, 1))
    values, true_positives, decided = counts_by_threshold(stated, p)
    n = len(p)
    positives = stated.sum()

    true_negatives = n - decided - positives + true_positives
    agreement = (true_positives + true_negatives) / n
    chance = (positives * decided + (n - positives) * (n - decided)) / n**2
    kappa = (agreement - chance) / (1 - chance)
    return halfway_down(values, int(np.argmax(kappa)))


def matched_kappa(stated, p, groups=None, seed=0, splits=100):
    """The kappa of the stated labels and p >= t, with a t that is matched on other rows.

    Kappa at t = .5 mostly measures whether text and p are calibrated alike; this does not. In each
    of the random splits of the groups into halves, a half is decided with the t that is best on the
    other half. The result is the mean over splits: a single one says little on few rows. Splits in
    which a half lacks one of the labels do not count.

    stated and p are (N,); groups as in `group_numbers`. Undefined if no split counts.
    """
    stated, p = checked(stated, p, need=(0, 1))
    number = group_numbers(groups, len(p))
    rng = np.random.default_rng(seed)

    kappas = []
    for _ in range(splits):
        shuffled = rng.permutation(number.max() + 1)
        in_half = shuffled[number] % 2 == 0
        cross_fitted = np.empty(len(p))
        try:
            for decided in (in_half, ~in_half):
                threshold = best_kappa_threshold(stated[~decided], p[~decided])
                cross_fitted[decided] = p[decided] >= threshold
        except Undefined:  # the half has one label only
            continue
        kappas.append(cohen_kappa(stated, cross_fitted))

    if not kappas:
        raise Undefined("in every split, one half of the groups lacks texts of one label")
    return float(np.mean(kappas))


def rereading(first, second, seed=0):
    """Does an explanation, read on its own, lead to the decision that it explains? A dict.

    first: the records of N texts. second: those of their explanations without the label word, each
    read as if it were a text. The AUROC of the second p ranks the first decisions; flips is the
    share of decisions that change. Next to both, for comparison, the same with the explanation of
    another row, at random.
    """
    decided = np.array([record["label"] for record in first])
    decided_again = np.array([record["label"] for record in second])
    p_again = np.array([record["probability"] for record in second])

    # Every row gets the explanation of the row before it in a random order
    order = np.random.default_rng(seed).permutation(len(decided))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return {
        "n_reread": len(decided),
        "reread_auroc": none_if_undefined(auroc, decided, p_again),
        "shuffled_auroc": none_if_undefined(auroc, decided, p_again[other]),
        "reread_flips": mean_or_none(decided_again != decided),
        "shuffled_flips": mean_or_none(decided_again[other] != decided),
    }


# --- confidence intervals -------------------------------------------------------------------------
def group_numbers(groups, n):
    """(n,) a number for the group of each row; a row without a group (None) is its own group.

    groups: a list of n strings, numbers or None. None instead of a list: no row has a group.
    """
    if groups is None:
        groups = [None] * n
    if len(groups) != n:
        raise ValueError(f"expected lists of one length; found {n} rows and {len(groups)} groups")

    keys = []
    for i, group in enumerate(groups):
        if group is None:
            keys.append(f"row {i}")
        else:
            keys.append(f"group {group}")
    return np.unique(keys, return_inverse=True)[1]


def resamples(number, seed):
    """Yields resamples of whole groups without an end, each as the rows that are in it.

    As many groups as there are are drawn, with replacement. number (N,): the group of each row,
    from `group_numbers`.
    """
    # The rows of group g are by_group[end[g] - size[g] : end[g]]
    by_group = np.argsort(number, kind="stable")
    size = np.bincount(number)
    end = np.cumsum(size)

    rng = np.random.default_rng(seed)
    while True:
        picked = rng.integers(len(size), size=len(size))

        # All rows of the picked groups: their ranges of `by_group` one after the other
        picked_size = size[picked]
        shift = end[picked] - np.cumsum(picked_size)
        places = np.repeat(shift, picked_size) + np.arange(picked_size.sum())
        yield by_group[places]


def bootstrap(metrics, y, groups, draws, seed):
    """95 % intervals of several metrics, all from the same resamples of whole groups.

    metrics is {name: (metric, values)} with metric(y, values) -> float and values (N, ...). Returns
    ({name: (low, high)}, redrawn); None instead of the limits if all rows are of one group. A
    resample on which a metric is undefined, such as AUROC on one class, is drawn again; redrawn
    counts these. From Efron (1979); for clusters, Field and Welsh (2007). Undefined if a metric is
    undefined on the rows themselves.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1")
    y = np.asarray(y)
    number = group_numbers(groups, len(y))
    measures = [(metric, np.asarray(values)) for metric, values in metrics.values()]
    on_rows = []  # raises if a metric is undefined: the loop below would never end
    for metric, values in measures:
        on_rows.append(metric(y, values))

    results = []  # (metrics,) of each resample
    redrawn = 0
    for rows in resamples(number, seed):
        try:
            results.append([metric(y[rows], values[rows]) for metric, values in measures])
        except Undefined:
            redrawn += 1
        if len(results) == draws:
            break

    pairs = independent_pairs(y, number)
    errors = np.std(results, axis=0)
    intervals = {}
    for name, (metric, _), value, error in zip(metrics, measures, on_rows, errors, strict=True):
        intervals[name] = interval(metric, value, error, pairs)
    return intervals, redrawn


def interval(metric, value, error, pairs):
    """(low, high), the 95 % interval of a metric's value with a standard error; None if unknown.

    They are `limits` with a reach of t standard errors, where t is the quantile of Student's
    distribution with `pairs` degrees of freedom, from `independent_pairs`. On small files, and near
    a bound, this covers the true value far more often than percentiles of the resamples do
    (benchmarks/coverage.py).

    A share of exactly 0 or 1 has no error among resamples, but the rows are not the world: if a
    true AUROC is a, then this many independent pairs are all in order with a chance of a^pairs. The
    limit is the a for which this chance is .025. For the other shares it is a stand-in.
    """
    if pairs < 1:
        return None

    # Without an error among resamples
    lowest = 0.025 ** (1 / pairs)
    if metric in SHARES and value == 1:
        return lowest, 1.0
    if metric in SHARES and value == 0:
        return 0.0, 1 - lowest

    return limits(metric, value, student_t(pairs) * float(error))


def limits(metric, value, reach):
    """(low, high): how far `reach` leads from a metric's value, on a scale that has no bounds.

        scale(limit) = scale(value) -+ scale'(value) reach

    The scale is the logit for SHARES, such as AUROC, the log for LOSSES, and the value itself for
    all others, such as differences. So the limits stay within the bounds of the metric, and reach
    farther on the side that has room.
    """
    if reach == 0:  # as of p = .5 everywhere; a value on a bound has no scale
        return value, value

    # scale', the slope of the scale at value, carries the reach over
    if metric in SHARES:
        center = np.log(value) - np.log1p(-value)
        reach = reach / (value * (1 - value))
        return float(sigmoid(center - reach)), float(sigmoid(center + reach))
    if metric in LOSSES:
        factor = float(np.exp(reach / value))
        return value / factor, value * factor
    return value - reach, value + reach


def independent_pairs(y, number):
    """How many pairs of a positive and a negative row there are, if no group is used twice.

    A ranking of 500 rows with five positives is known about as well as five such pairs tell. Where
    y has one class only, it is the number of groups minus 1. number (N,): the group of each row.
    """
    groups = len(set(number))
    positive = len(set(number[y == 1]))
    negative = len(set(number[y == 0]))
    if not positive or not negative:
        return groups - 1
    return min(positive, negative, groups // 2)


def student_t(degrees):
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5), 1.96 at infinity.

    It is .1 % too low for 3 degrees of freedom, .7 % for 2, and 11 % for 1.
    """
    return (1.95996 + 2.37227 / degrees + 2.82250 / degrees**2 + 2.55585 / degrees**3
            + 1.58953 / degrees**4)


def bootstrap_ci(metric, y, p, groups=None, draws=1000, seed=0):
    """(low, high), the 95 % interval of one metric(y, p), by `bootstrap`."""
    y, p = checked(y, p)
    intervals, _ = bootstrap({"metric": (metric, p)}, y, groups, draws, seed)
    return intervals["metric"]


def difference(metric, values, others):
    """An entry for `bootstrap`: metric(y, values) - metric(y, others), on the same resamples.

    values and others have the same shape, (N, ...). They are stacked to pairs (N, 2, ...), so that
    a resample draws both values of a row together.
    """

    def of_pairs(y, pairs):
        return metric(y, pairs[:, 0]) - metric(y, pairs[:, 1])

    return of_pairs, np.stack((values, others), axis=1)


# --- curves, for pictures -------------------------------------------------------------------------
BINS = np.linspace(0, 1, 21)  # of the histograms of p


def thinned(n, most=100):
    """The indices of at most `most` of n points, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))


def reliability_curve(y, p, groups=None, draws=200, seed=0):
    """(values, observed, low, high): the isotonic fit of y at different values of p, and a band.

    low and high hold the middle 95 % of the fits to resamples of whole groups. The curve is that of
    CORP (Dimitriadis, Gneiting and Jordan 2021). All are (U,), with U at most 100.
    """
    y, p = checked(y, p)
    values = np.unique(p)
    values = values[thinned(len(values))]

    def curve(y, p):  # at the chosen values
        seen, first = np.unique(p, return_index=True)
        return np.interp(values, seen, isotonic(y, p)[first])

    number = group_numbers(groups, len(y))
    resampled = [curve(y[rows], p[rows]) for rows in islice(resamples(number, seed), draws)]
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    return values, curve(y, p), low, high


def roc_curve(y, p):
    """(false, true): the shares of class 0 and of class 1 with p >= t, for falling thresholds t.

    Both are (U,), from 0 to 1, and U is at most 100. Undefined if a class is missing.
    """
    y, p = checked(y, p, need=(0, 1))
    _, true_positives, decided = counts_by_threshold(y, p)
    false_positives = decided - true_positives
    keep = thinned(len(decided), 99)
    false_share = np.concatenate([[0], false_positives[keep] / np.sum(y == 0)])
    true_share = np.concatenate([[0], true_positives[keep] / np.sum(y == 1)])
    return false_share, true_share


def curves(y, p, groups=None, draws=200, seed=0):
    """What the pictures of one probability need, as a dict of lists that goes into a JSON file.

    Undefined if a class is missing.
    """
    y, p = checked(y, p, need=(0, 1))
    values, observed, low, high = reliability_curve(y, p, groups, draws, seed)
    false_positives, true_positives = roc_curve(y, p)
    coverage, accuracy_decided, _ = risk_coverage(y == (p >= 0.5), 2 * np.abs(p - 0.5))
    keep = thinned(len(coverage))
    found = {
        "reliability": {"p": values, "observed": observed, "low": low, "high": high},
        "roc": {"false_positives": false_positives, "true_positives": true_positives},
        "risk": {"coverage": coverage[keep], "risk": 1 - accuracy_decided[keep]},
        "histogram": {"class_0": np.histogram(p[y == 0], BINS)[0],
                      "class_1": np.histogram(p[y == 1], BINS)[0]},
    }
    for curve in found.values():
        for name, numbers in curve.items():
            curve[name] = numbers.round(5).tolist()
    return found


# --- everything together --------------------------------------------------------------------------
def per_token(y, sums):
    """The mean over all tokens, from the sums over each row's tokens. y is not used.

    sums (N, 2): for each row, the sum over its answer tokens, and their number. y is there because
    `bootstrap` calls every metric with labels and values. Undefined if there is no token, or if a
    sum is NaN.
    """
    total, tokens = sums.sum(axis=0)
    if not tokens or np.isnan(total):
        raise Undefined("no reference explanation, or no base model to compare with")
    return float(total / tokens)


def text_intervals(metrics, has_text, groups, draws, seed):
    """{name: (low, high)} of `bootstrap`, from the rows that have a reference text alone.

    The other rows say nothing about a loss of texts, and neither do the labels: all rows count as
    of one class. has_text (N,): which rows have one. metrics, groups, draws, seed: as there.
    """
    rows = np.flatnonzero(has_text)
    of_rows = {}
    for name, (metric, values) in metrics.items():
        of_rows[name] = (metric, np.asarray(values)[rows])
    if groups is not None:
        groups = [groups[row] for row in rows]

    no_classes = np.zeros(len(rows))
    intervals, _ = bootstrap(of_rows, no_classes, groups, draws, seed)
    return intervals


# The metrics with an interval that have bounds, for `interval`
SHARES = (auroc, average_precision, f1_score, accuracy)  # from 0 to 1
LOSSES = (log_loss, brier, per_token)  # from 0 on


def score_metrics(y, p, decisions=None, *, groups=None, draws=1000, seed=0, true_p=None, sums=None,
                  first=None):
    """All metrics of one probability, as a dict; the 95 % intervals are in its `intervals`.

    decisions (N,): those at the threshold of the validation rows. true_p (N,): the probability that
    the row was simulated with, NaN where it is not known. sums (N, 2): for `per_token`.
    first {name of a metric: p or sums of another scorer}: differences from that scorer are added.
    groups, draws, seed: see `bootstrap`. Undefined if a class is missing.
    """
    y, p = checked(y, p, need=(0, 1))
    at_half = (p >= 0.5).astype(np.float64)

    # With an interval: a function of labels and values, and the values. A NEW METRIC goes here, in
    # one line, and into SHARES or LOSSES if it has such bounds; eval.py prints it in a table of
    # other metrics if TABLES does not name it
    resampled = {
        "auroc": (auroc, p),
        "average_precision": (average_precision, p),
        "f1_half": (f1_score, at_half),
        "accuracy": (accuracy, at_half),
        "log_loss": (log_loss, p),
        "brier": (brier, p),
    }
    if decisions is not None:  # at the threshold of the validation rows
        resampled["f1"] = (f1_score, np.array(decisions))

    # The same for the reference texts; there are none if this is not the run's own score
    resampled_texts = {}
    if sums is not None:
        resampled_texts["reference_nll"] = (per_token, sums)

    # ... and how far each is from the first scorer's, on the same resamples
    if first is not None:
        for table in (resampled, resampled_texts):
            for name, others in first.items():
                if name in table and others is not None:
                    metric, values = table[name]
                    table[name + "_difference"] = difference(metric, values, others)

    result = {}
    for name, (metric, values) in (resampled | resampled_texts).items():
        result[name] = metric(y, values)
    intervals, result["redrawn"] = bootstrap(resampled, y, groups, draws, seed)
    if resampled_texts:
        has_text = np.asarray(sums)[:, 1] > 0
        intervals.update(text_intervals(resampled_texts, has_text, groups, draws, seed))
    result["intervals"] = intervals

    # Two perfect rankings are equal on all resamples, but each may be less than perfect elsewhere
    both_perfect = result["auroc"] in (0, 1) and result.get("auroc_difference") == 0
    if both_perfect and intervals["auroc"] is not None:
        low, high = intervals["auroc"]
        intervals["auroc_difference"] = (low - high, high - low)

    # Without an interval
    miscalibration, discrimination, uncertainty = corp(y, p)
    floor, floor_q95 = ece_floor(p, 15, draws, seed)
    confidence = 2 * np.abs(p - 0.5)
    coverage, accuracy_decided, coverage_at_95 = risk_coverage(y == at_half, confidence)

    slope = None
    intercept = None
    fitted = none_if_undefined(calibration_slope, y, p)
    if fitted is not None:
        slope, intercept = fitted
        of_both = none_if_undefined(calibration_intervals, y, p, groups)
        if of_both is not None:
            intervals["slope"], intervals["intercept"] = of_both

    true_p_error = None
    if true_p is not None:
        errors = np.abs(p - true_p)
        true_p_error = mean_or_none(errors[~np.isnan(errors)])

    result.update({
        "miscalibration": miscalibration,
        "discrimination": discrimination,
        "uncertainty": uncertainty,
        "slope": slope,
        "intercept": intercept,
        "ece": ece(y, p),
        "ece_floor": floor,
        "ece_floor_q95": floor_q95,
        "accuracy_at_80": float(accuracy_decided[coverage >= 0.8][0]),
        "coverage_at_95": coverage_at_95,
        "true_p_error": true_p_error,
    })
    return result
