"""Figures from what eval.py and train.py wrote: reliability, ROC, risk and coverage, training.

    python benchmarks/figures.py out/eval.json [runs/x/log.jsonl] --out folder

y and p are those of predictions.jsonl beside eval.json. Needs matplotlib. Lines are told apart by
their dashes and greys, so that a black and white print will do.
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

LINES = [("black", "-"), ("0.45", "-"), ("black", "--"), ("0.45", "--"), ("black", ":"),
         ("0.45", ":"), ("black", "-."), ("0.45", "-.")]


# --- reading --------------------------------------------------------------------------------------
def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_scorers(path):
    """eval.json -> {scorer: its predictions}, of those that were made by a run."""
    report, records = read_json(path), {}
    names = {metrics.get("run"): name for name, metrics in report["metrics"].items()}
    for record in read_lines(path.parent / "predictions.jsonl"):
        records.setdefault(names.get(record["run"], record["run"]), []).append(record)
    return records


def columns(records):
    """(y, p, stated label or NaN, groups) of predictions."""
    y, p, stated = (np.array([record[key] for record in records], dtype=np.float64)
                    for key in ("true_label", "probability", "stated_label"))
    return y, p, stated, [record.get("group") for record in records]


# --- figures: each takes pyplot and gives a figure ------------------------------------------------
def panels(plt, count, **share):
    """A figure with square panels (three at most in a row, four in two rows), as a list."""
    wide = 2 if count == 4 else min(count, 3)
    rows = -(-count // wide)
    figure, axes = plt.subplots(rows, wide, figsize=(4 * wide + 0.6, 4.2 * rows), squeeze=False,
                                layout="constrained", **share)
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:count])


def reliability(plt, scorers, draws=300, seed=0):
    """The CORP curve: isotonic regression of y on p, with the middle 95 % of the curves of
    resamples (whole groups), over the histogram of p."""
    figure, axes = panels(plt, len(scorers))
    for axis, (name, records) in zip(axes, scorers.items(), strict=True):
        y, p, _, groups = columns(records)
        grid, curves = np.unique(p), []

        def curve(y, p, grid=grid, curves=curves):
            values, first = np.unique(p, return_index=True)
            curves.append(np.interp(grid, values, isotonic(y, p)[first]))
            return 0.0

        bootstrap({"curve": (curve, p)}, y, groups, draws, seed)  # the first is of the rows as such
        low, high = np.percentile(curves[1:], (2.5, 97.5), axis=0)
        axis.fill_between(grid, low, high, color="0.85", linewidth=0, label="95 % of resamples")
        axis.plot([0, 1], [0, 1], color="0.45", linewidth=1, linestyle=":", label="ideal")
        axis.plot(grid, curves[0], color="black", label="CORP curve")
        axis.axhline(0, color="black", linewidth=0.8)  # under it, the histogram
        axis.set(xlim=(0, 1), ylim=(-0.25, 1.02), yticks=np.linspace(0, 1, 6),
                 xlabel="predicted probability", ylabel="observed share of class 1")
        axis.set_title(f"{name}, {len(y)} rows")
        axis.legend(loc="upper left", frameon=False, fontsize="small", title_fontsize="small",
                    title=f"miscalibration {corp(y, p)[0]:.3f}", alignment="left")
        below = axis.twinx()
        counts, _, _ = below.hist(p, bins=np.linspace(0, 1, 21), color="0.6", edgecolor="white")
        below.set(ylim=(0, 1.27 / 0.22 * counts.max()), yticks=[0, int(counts.max())])
        below.set_ylabel("rows", y=0.25 / 1.27 / 2, labelpad=-6)
    return figure


def roc(plt, scorers):
    """True against false positives over all thresholds, all scorers in one."""
    figure, (axis,) = panels(plt, 1)
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for (name, records), (grey, dashes) in zip(scorers.items(), cycle(LINES), strict=False):
        y, p, *_ = columns(records)
        values, where = np.unique(-p, return_inverse=True)
        rates = [np.r_[0, np.cumsum(np.bincount(where, weights=y == label, minlength=len(values)))]
                 / (y == label).sum() for label in (0, 1)]
        axis.plot(*rates, color=grey, linestyle=dashes, label=f"{name}: {auroc(y, p):.3f}")
    axis.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="false positives, share of class 0",
             ylabel="true positives, share of class 1", title="ROC, with the area under it")
    axis.legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def risk(plt, scorers):
    """Accuracy of p >= .5 where only some rows are decided: those of the largest |p - .5|; and
    those whose text states the same label first."""
    figure, axes = panels(plt, len(scorers), sharey=True)
    for axis, (name, records) in zip(axes, scorers.items(), strict=True):
        y, p, stated, _ = columns(records)
        correct, sure, agree = (p >= 0.5) == y, np.abs(p - 0.5), (p >= 0.5) == stated
        axis.axhline(0.95, color="0.8", linewidth=1)
        ways = [("small |p - .5|", sure, LINES[0])]
        # not where only some rows were asked for a text: the others cannot disagree
        if all(one["explanation"] is not None for one in records) and not np.isnan(stated).all():
            ways += [("text disagrees, then the same", (agree + sure) / 2, LINES[3])]
        for label, confidence, (grey, dashes) in ways:
            share, accuracy, largest = risk_coverage(correct, confidence)
            some = share >= 0.05  # the accuracy of a handful of rows is noise
            axis.plot(share[some], accuracy[some], color=grey, linestyle=dashes,
                      label=f"{label}; accuracy .95 for {largest:.0%}")
        axis.set(xlim=(0, 1), xlabel="share of rows decided", ylabel="accuracy among them",
                 title=f"{name}, {len(y)} rows")
        axis.legend(loc="lower left", frameon=False, fontsize="small", title_fontsize="small",
                    title="left out first:", alignment="left")
    low = min(np.min(line.get_ydata()) for axis in axes for line in axis.lines)
    axes[0].set_ylim(low - 0.35 * (1 - low), 1.01)  # room for the legend
    return figure


def training(plt, log):
    """Both losses over the steps of a run, and the collapse meter where the log has one."""
    steps = [line for line in log if "bce" in line]
    valid = [{"step": line["step"], **line["valid"]} for line in log if "valid" in line]
    meter = any(line.get("base_kl") is not None for line in valid)
    figure, axes = plt.subplots(1 + meter, 2, figsize=(9, 3.2 + 3.2 * meter), sharex=True,
                                squeeze=False, layout="constrained")

    def draw(axis, lines, key, **style):
        known = [line for line in lines if line.get(key) is not None]
        axis.plot([line["step"] for line in known], [line[key] for line in known], **style)

    for axis, key, name in ((axes[0, 0], "bce", "score head: BCE, nats a row"),
                            (axes[0, 1], "lm", "text: NLL, nats a token")):
        if any(line[key] for line in steps):  # a baseline may not compute the other loss
            draw(axis, steps, key, color="0.7", linewidth=0.8, label="training step")
        draw(axis, valid, key, color="black", marker="o", markersize=4, label="validation")
        axis.set(ylabel=name, ylim=(0, None))
    if meter:
        for key, (grey, dashes), marker in zip(
                ("distinct_2", "rep_4", "empty", "parsable"), LINES, "os^x", strict=False):
            draw(axes[1, 0], valid, key, color=grey, linestyle=dashes, marker=marker,
                 markersize=4, label=key)
        axes[1, 0].set(ylabel="share, in a few texts", ylim=(-0.03, 1.4),
                       yticks=np.linspace(0, 1, 6))
        draw(axes[1, 1], valid, "base_kl", color="black", marker="o", markersize=4, label="base_kl")
        top = max(line["base_kl"] for line in valid if line.get("base_kl") is not None)
        axes[1, 1].set(ylabel="KL from base, nats a token", ylim=(0, 1.2 * top + 1e-3))
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize="small", ncols=2)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


# --- command --------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="eval.json, predictions.jsonl beside it")
    parser.add_argument("log", nargs="?", type=Path, help="log.jsonl of a run, for its training")
    parser.add_argument("--out", required=True, type=Path, help="folder for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that are there")
    args = parser.parse_args(argv)
    names = ["reliability", "roc", "risk_coverage"] + ["training"] * bool(args.log)
    there = [name for name in names if (args.out / f"{name}.png").exists()]
    if there and not args.overwrite:
        raise ValueError(f"{args.out} has {', '.join(there)}; give another --out or --overwrite")
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        scorers = read_scorers(args.results)
        figures = [reliability(pyplot, scorers), roc(pyplot, scorers), risk(pyplot, scorers)]
        figures += [training(pyplot, read_lines(args.log))] if args.log else []
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the files are not eval.py's and train.py's: {error!r}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(names, figures, strict=True):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        write_atomically(args.out / f"{name}.png", png.getvalue())
    print(f"wrote {', '.join(f'{name}.png' for name in names)} to {args.out}")


if __name__ == "__main__":
    run_main(main)
