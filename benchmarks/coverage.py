"""Do the 95 % intervals of metrics.py cover the true value in 95 of 100 files?

    python benchmarks/coverage.py --out coverage.json     # about half an hour on one core

Simulates many small test files whose true AUROC, log loss and so on are known, computes their
intervals as eval.py does, and counts how often these contain the truth.

A row's score is N(0, 1), plus d for a positive row, which has AUROC = Phi(d / sqrt(2)). p is the
true probability of class 1 given the score, so slope and intercept are truly 1 and 0. A second
scorer is as good, with noise that correlates by .7. With groups, four rows of a group share half of
the variance of their noise, and their labels are alike too (an intraclass correlation of 1/3).
"""

import argparse
import itertools
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics as mt  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import run_main, versions  # noqa: E402

SIZES = (20, 50, 150, 500)
SHARES = (0.1, 0.5)  # of positives
AUROCS = (0.6, 0.8, 0.95, 0.99)
GROUP = 4  # rows
CORRELATION = 0.7  # of the two scorers' noise


def main(argv=None):
    args = parse(argv)
    results = []
    for by_group, n, share, auroc in itertools.product((False, True), SIZES, SHARES, AUROCS):
        truth = true_values(share, auroc)
        rng = np.random.default_rng([n, by_group])
        covered = {name: [] for name in truth}
        while len(covered["auroc"]) < args.files:
            y, p, other, groups = simulate(rng, n, share, auroc, by_group)
            if not 0 < y.sum() < n:
                continue
            found = intervals(y, p, other, groups, args.draws)
            for name, limits in found.items():
                low, high = limits
                covered[name].append(low - 1e-9 <= truth[name] <= high + 1e-9)

        line = {"rows": n, "grouped": by_group, "positives": share, "true_auroc": auroc}
        for name, hits in covered.items():
            line[name] = round(float(np.mean(hits)), 2)
        results.append(line)
        print_line(line, heading=len(results) == 1)

    print("\nthe lowest over the true AUROCs:\n")
    for i, line in enumerate(lowest(results)):
        print_line(line, heading=i == 0)
    if args.out is not None:
        write_json(args.out, {"coverage": results, "files": args.files, "draws": args.draws,
                              "versions": versions()})


def simulate(rng, n, share, auroc, by_group):
    """One file: labels, the p of two scorers, and the group of each row."""
    groups = np.arange(n)
    label_share = np.full(n, share)
    if by_group:
        groups = groups // GROUP
        label_share = rng.beta(2 * share, 2 * (1 - share), n)[groups]
    y = (rng.random(n) < label_share).astype(np.float64)

    d = separation(auroc)
    first = noise(rng, groups, by_group)
    second = CORRELATION * first + np.sqrt(1 - CORRELATION**2) * noise(rng, groups, by_group)
    p = [mt.sigmoid(np.log(share / (1 - share)) + d * (one + d * y) - d * d / 2)
         for one in (first, second)]
    return y, *p, groups.tolist()


def noise(rng, groups, by_group):
    """(N,) draws from N(0, 1); half of their variance belongs to the group."""
    own = rng.normal(size=len(groups))
    if not by_group:
        return own
    shared = rng.normal(size=len(groups))[groups]
    return np.sqrt(0.5) * (own + shared)


def separation(auroc):
    """The distance d of the two classes' mean scores."""
    return np.sqrt(2) * NormalDist().inv_cdf(auroc)


def measures(y, p, other):
    """The metrics for `bootstrap`; the differences are those of the two scorers."""
    return {
        "auroc": (mt.auroc, p),
        "average_precision": (mt.average_precision, p),
        "f1": (mt.f1_score, p >= 0.3),
        "accuracy": (mt.accuracy, p >= 0.5),
        "log_loss": (mt.log_loss, p),
        "auroc_difference": mt.difference(mt.auroc, p, other),
        "log_loss_difference": mt.difference(mt.log_loss, p, other),
    }


def true_values(share, auroc):
    """{metric: its true value}, from a file of 300,000 rows."""
    y, p, other, _ = simulate(np.random.default_rng(0), 300_000, share, auroc, by_group=False)
    truth = {name: metric(y, values) for name, (metric, values) in measures(y, p, other).items()}
    truth.update(auroc=auroc, auroc_difference=0.0, log_loss_difference=0.0, slope=1.0,
                 intercept=0.0)
    return truth


def intervals(y, p, other, groups, draws):
    """{metric: its interval} of one file, without those that are undefined there."""
    found, _ = mt.bootstrap(measures(y, p, other), y, groups, draws, seed=0)
    limits = mt.none_if_undefined(mt.calibration_intervals, y, p, groups)
    if limits is not None:
        found["slope"], found["intercept"] = limits
    return found


def lowest(results):
    """The lines of `results` without the true AUROC: of each metric the lowest coverage over it."""
    lines = {}
    for result in results:
        line = {name: value for name, value in result.items() if name != "true_auroc"}
        setting = (line["rows"], line["grouped"], line["positives"])
        before = lines.setdefault(setting, line)
        for name, value in line.items():
            if name not in ("rows", "grouped", "positives"):
                before[name] = min(before[name], value)
    return list(lines.values())


def print_line(line, heading):
    """One line of a Markdown table, in percent."""
    if heading:
        print("|", " | ".join(line).replace("_", " "), "|")
        print("|" + "---|" * len(line))
    cells = []
    for name, value in line.items():
        if name in ("rows", "positives", "true_auroc"):
            cells.append(f"{value:g}")
        elif name == "grouped":
            cells.append("in fours" if value else "alone")
        else:
            cells.append(f"{100 * value:.0f}")
    print("|", " | ".join(cells), "|", flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--files", type=int, default=200, help="simulated files for each line")
    add("--draws", type=int, default=100, help="resamples for each file")
    add("--out", type=Path, help="JSON file with the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
