"""Figures from what eval.py and train.py wrote: reliability, ROC, risk and coverage, training.

    python benchmarks/figures.py out/eval.json [runs/x/log.jsonl] --out folder

y and p are those of predictions.jsonl next to eval.json. Needs matplotlib. Lines differ in dashes
and greys, so that a black and white print will do.
"""

import argparse
import io
import json
import sys
from itertools import cycle
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import auroc, bootstrap, corp, isotonic, risk_coverage  # noqa: E402
from plumbing.files import read_json, write_atomically  # noqa: E402
from plumbing.script import run_main  # noqa: E402

LINES = [  # (grey, dashes)
    ("black", "-"),
    ("0.45", "-"),
    ("black", "--"),
    ("0.45", "--"),
    ("black", ":"),
    ("0.45", ":"),
    ("black", "-."),
    ("0.45", "-."),
]


def main(argv=None):
    args = parse(argv)
    names = ["reliability", "roc", "risk_coverage"]
    if args.log:
        names.append("training")
    existing = [name for name in names if (args.out / f"{name}.png").exists()]
    if existing and not args.overwrite:
        raise ValueError(
            f"{args.out} has {', '.join(existing)}; give another --out or --overwrite"
        )

    try:
        import matplotlib
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        scorers = read_scorers(args.results)
        figures = [reliability(pyplot, scorers), roc(pyplot, scorers), risk(pyplot, scorers)]
        if args.log:
            figures.append(training(pyplot, read_lines(args.log)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the files are not eval.py's and train.py's: {error!r}") from None

    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(names, figures, strict=True):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        write_atomically(args.out / f"{name}.png", png.getvalue())
    files = ", ".join(f"{name}.png" for name in names)
    print(f"wrote {files} to {args.out}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="eval.json, with predictions.jsonl next to it")
    parser.add_argument("log", nargs="?", type=Path, help="log.jsonl of a run, for its training")
    parser.add_argument("--out", required=True, type=Path, help="folder for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that are there")
    return parser.parse_args(argv)


# --- reading --------------------------------------------------------------------------------------
def read_lines(path):
    """The JSON values of a file, one a line."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_scorers(path):
    """{scorer: its predictions} of an eval.json: the own scores of the runs."""
    report = read_json(path)
    name_of_run = {}
    for name, metrics in report["metrics"].items():
        name_of_run[metrics.get("run")] = name

    records = {}
    for record in read_lines(path.parent / "predictions.jsonl"):
        name = name_of_run.get(record["run"], record["run"])
        records.setdefault(name, []).append(record)
    return records


def column(records, key):
    """(N,) one value of each prediction, as floats; None becomes NaN."""
    return np.array([record[key] for record in records], dtype=np.float64)


# --- figures: each takes pyplot and gives a figure ------------------------------------------------
def panels(plt, count, **share):
    """(figure, [axis]): square panels, three at most in a row, and four in two rows."""
    wide = 2 if count == 4 else min(count, 3)
    rows = -(-count // wide)
    size = (4 * wide + 0.6, 4.2 * rows)
    figure, axes = plt.subplots(
        rows, wide, figsize=size, squeeze=False, layout="constrained", **share
    )
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:count])


def reliability(plt, scorers, draws=300, seed=0):
    """Calibration: the CORP curve of each scorer, over the histogram of its p."""
    figure, axes = panels(plt, len(scorers))
    for axis, (name, records) in zip(axes, scorers.items(), strict=True):
        y = column(records, "true_label")
        p = column(records, "probability")
        groups = [record.get("group") for record in records]
        grid, curve, low, high = corp_curve(y, p, groups, draws, seed)

        # the curve
        axis.fill_between(grid, low, high, color="0.85", linewidth=0, label="95 % of resamples")
        axis.plot([0, 1], [0, 1], color="0.45", linewidth=1, linestyle=":", label="ideal")
        axis.plot(grid, curve, color="black", label="CORP curve")
        axis.set(xlabel="predicted probability", ylabel="observed share of class 1")
        axis.set(xlim=(0, 1), ylim=(-0.25, 1.02), yticks=np.linspace(0, 1, 6))
        axis.set_title(f"{name}, {len(y)} rows")
        miscalibration, _, _ = corp(y, p)
        legend(axis, "upper left", title=f"miscalibration {miscalibration:.3f}")

        # and below zero the histogram, on an axis of its own
        axis.axhline(0, color="black", linewidth=0.8)
        below = axis.twinx()
        counts, _, _ = below.hist(p, bins=np.linspace(0, 1, 21), color="0.6", edgecolor="white")
        most = counts.max()
        below.set(ylim=(0, 1.27 / 0.22 * most), yticks=[0, int(most)])
        below.set_ylabel("rows", y=0.25 / 1.27 / 2, labelpad=-6)
    return figure


def corp_curve(y, p, groups, draws, seed):
    """(grid, curve, low, high): isotonic regression of y on p, at the different values of p.

    low and high hold the middle 95 % of the curves of resamples of whole groups.
    """
    grid = np.unique(p)
    curves = []

    def keep_curve(y, p):  # a metric for `bootstrap`, which calls it for each resample
        values, first = np.unique(p, return_index=True)
        fit = isotonic(y, p)[first]
        curves.append(np.interp(grid, values, fit))
        return 0.0

    bootstrap({"curve": (keep_curve, p)}, y, groups, draws, seed)
    curve, *resampled = curves  # the first call was for the rows themselves
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    return grid, curve, low, high


def roc(plt, scorers):
    """True against false positives over all thresholds, with all scorers in one panel."""
    figure, (axis,) = panels(plt, 1)
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for (name, records), (grey, dashes) in zip(scorers.items(), cycle(LINES), strict=False):
        y = column(records, "true_label")
        p = column(records, "probability")
        false_positives = share_above(p, y == 0)
        true_positives = share_above(p, y == 1)
        label = f"{name}: {auroc(y, p):.3f}"
        axis.plot(false_positives, true_positives, color=grey, linestyle=dashes, label=label)

    axis.set(xlabel="false positives, share of class 0", ylabel="true positives, share of class 1")
    axis.set(xlim=(0, 1), ylim=(0, 1.005), title="ROC, with the area under it")
    legend(axis, "lower right")
    return figure


def share_above(p, mask):
    """(1 + U,) the share of the rows in a mask that have p >= t, for falling thresholds t."""
    values, value_of_row = np.unique(-p, return_inverse=True)
    counts = np.bincount(value_of_row, weights=mask, minlength=len(values))
    above = np.concatenate([[0], np.cumsum(counts)])
    return above / mask.sum()


def risk(plt, scorers):
    """Accuracy of p >= .5 if some rows are left undecided, in two orders.

    First those with small |p - .5|; or first those whose text states the other label.
    """
    figure, axes = panels(plt, len(scorers), sharey=True)
    for axis, (name, records) in zip(axes, scorers.items(), strict=True):
        y = column(records, "true_label")
        p = column(records, "probability")
        stated = column(records, "stated_label")
        at_half = p >= 0.5
        confidence = np.abs(p - 0.5)

        axis.axhline(0.95, color="0.8", linewidth=1)
        draw_risk(axis, at_half == y, confidence, LINES[0], "small |p - .5|")

        # rows that were not asked for a text cannot disagree with it
        all_have_text = all(record["explanation"] is not None for record in records)
        if all_have_text and not np.isnan(stated).all():
            agree_first = ((at_half == stated) + confidence) / 2
            draw_risk(axis, at_half == y, agree_first, LINES[3], "text disagrees, then the same")

        axis.set(xlim=(0, 1), xlabel="share of rows decided", ylabel="accuracy among them")
        axis.set_title(f"{name}, {len(y)} rows")
        legend(axis, "lower left", title="left out first:")

    lowest = 1.0
    for axis in axes:
        for line in axis.lines:
            lowest = min(lowest, np.min(line.get_ydata()))
    axes[0].set_ylim(lowest - 0.35 * (1 - lowest), 1.01)  # room for the legend
    return figure


def draw_risk(axis, correct, confidence, line, name):
    """Draws accuracy against the share of decided rows, without the noise of a handful of rows."""
    grey, dashes = line
    share, accuracy, largest = risk_coverage(correct, confidence)
    enough = share >= 0.05
    label = f"{name}; accuracy .95 for {largest:.0%}"
    axis.plot(share[enough], accuracy[enough], color=grey, linestyle=dashes, label=label)


def training(plt, log):
    """Both losses over the steps of a run, and the collapse meter if the log has one."""
    steps = [line for line in log if "bce" in line]
    valid = []
    for line in log:
        if "valid" in line:
            valid.append({"step": line["step"], **line["valid"]})
    kl = [line["base_kl"] for line in valid if line.get("base_kl") is not None]

    rows = 2 if kl else 1
    figure, axes = plt.subplots(
        rows, 2, figsize=(9, 3.2 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    draw_loss(axes[0, 0], steps, valid, "bce", "score head: BCE, nats a row")
    draw_loss(axes[0, 1], steps, valid, "lm", "text: NLL, nats a token")

    # the collapse meter
    if kl:
        axis = axes[1, 0]
        meters = ("distinct_2", "rep_4", "empty", "parsable")
        for key, (grey, dashes), marker in zip(meters, LINES, "os^x", strict=False):
            draw(axis, valid, key, color=grey, linestyle=dashes, marker=marker, markersize=4,
                 label=key)
        axis.set(ylabel="share, in a few texts", ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6))

        axis = axes[1, 1]
        draw(axis, valid, "base_kl", color="black", marker="o", markersize=4, label="base_kl")
        axis.set(ylabel="KL from base, nats a token", ylim=(0, 1.2 * max(kl) + 1e-3))

    for axis in axes.flat:
        axis.legend(frameon=False, fontsize="small", ncols=2)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_loss(axis, steps, valid, key, name):
    """Draws one loss of all steps and of all validations."""
    if any(line[key] for line in steps):  # a baseline may not compute the other loss
        draw(axis, steps, key, color="0.7", linewidth=0.8, label="training step")
    draw(axis, valid, key, color="black", marker="o", markersize=4, label="validation")
    axis.set(ylabel=name, ylim=(0, None))


def draw(axis, lines, key, **style):
    """Draws one value of log lines over the steps, where it is known."""
    steps = []
    values = []
    for line in lines:
        if line.get(key) is not None:
            steps.append(line["step"])
            values.append(line[key])
    axis.plot(steps, values, **style)


def legend(axis, place, title=None):
    """A small legend, with its title above the left end."""
    axis.legend(loc=place, frameon=False, fontsize="small", title_fontsize="small", title=title,
                alignment="left")


if __name__ == "__main__":
    run_main(main)
