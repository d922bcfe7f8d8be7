"""What eval.py prints: one table of the most important metrics, or with --tables all of them."""

import textwrap

from plumbing.tables import aligned, table

LEGEND = """\
AUROC: 0.5 is chance. Slope and intercept: 1 and 0 are best. Floor: the error that a perfect
probability has on as many rows. Kappa: agreement of text and probability, at the threshold that
suits both best. Text loss: of the rows' own explanations, in nats a token."""

TABLES = {  # title: columns, by their names in eval.json
    "the probability; log loss in nats":
        "calibrated auroc average_precision log_loss brier",
    "decisions at p >= .5, F1 at the run's threshold; the 80 % of rows with the largest |p - .5|":
        "accuracy f1_half f1 accuracy_at_80 coverage_at_95",
    "is p calibrated? intercept 0 and slope 1 are best; raw is before calibration; CORP parts":
        "calibrated intercept slope ece ece_floor ece_floor_q95 miscalibration discrimination "
        "uncertainty true_p_error",
    "does the text say what p says?":
        "n_explained n_parsable auroc_alignment kappa_matched kappa_all agree_share "
        "agree_accuracy agree_coverage_at_95",
    "does an explanation, read alone, lead to its decision? shuffled: that of another row":
        "n_reread reread_auroc shuffled_auroc reread_flips shuffled_flips",
    "is it still a text? losses in nats a token; evidence":
        "parsable empty distinct_2 rep_4 reference_nll base_kl flesch evidence_recall "
        "evidence_precision evidence_invented",
    "answers without a number from 0 to 100, which get the base rate":
        "unreadable",
    "minus the first line's, on the same resamples":
        "auroc_difference log_loss_difference reference_nll_difference",
}

HEADINGS = {  # of the columns whose names in eval.json say too little
    "auroc": "AUROC",
    "f1_half": "F1 at .5",
    "f1": "F1",
    "ece": "calibration error",
    "ece_floor": "of a perfect p",
    "ece_floor_q95": "its 95 % line",
    "true_p_error": "distance from true p",
    "n_explained": "texts",
    "n_parsable": "of them with a label",
    "auroc_alignment": "alignment",
    "kappa_matched": "kappa, best threshold",
    "kappa_all": "kappa, all texts",
    "agree_share": "text agrees",
    "agree_accuracy": "accuracy if it agrees",
    "n_reread": "texts",
    "reread_auroc": "AUROC",
    "shuffled_auroc": "AUROC, shuffled",
    "reread_flips": "decisions flipped",
    "shuffled_flips": "decisions flipped, shuffled",
    "parsable": "states a label",
    "distinct_2": "distinct word pairs",
    "rep_4": "repetition",
    "reference_nll": "reference loss",
    "base_kl": "KL from base",
    "flesch": "reading ease",
    "auroc_difference": "AUROC difference",
    "reference_nll_difference": "reference loss difference",
}


def print_report(report, args):
    """Prints the number of rows, why the intervals may not be relied on, and the tables."""
    print(f"\n{args.data}: {report['n']} rows, {report['positives']} positive, "
          f"{report['groups']} groups; [95 % interval, groups resampled {args.draws} times]")
    if report["bayes_auroc"] is not None:
        print(f"the true p of the rows has AUROC {report['bayes_auroc']:.3f}: the ceiling")
    for sentence in report["warnings"]:
        print(f"warning: {sentence}")
    print_summary(report["metrics"], has_groups=report["groups"] < report["n"])
    if args.tables:
        print_tables(report["metrics"])

    print(f"\n{args.out}/report.html shows all of this with pictures, and every prediction")
    print(f"{args.out}/eval.json and predictions.jsonl have it for programs")
    if not args.tables:
        print("--tables prints all numbers")


def print_summary(columns, has_groups=False):
    """Prints the main numbers of each scorer after calibration, in at most 100 columns.

    has_groups: whether some rows share a group.
    """
    lines = [
        ["", "AUROC", "log", "slope and", "calibration", "kappa", "text"],
        ["", "", "loss", "intercept", "error (floor)", "", "loss"],
    ]
    for name, metrics in columns.items():
        if name.split()[-1] == "raw":
            continue
        cells = [
            short(metrics, "auroc"),
            short(metrics, "log_loss"),
            together("{}, {}", short(metrics, "slope", 2), short(metrics, "intercept", 2)),
            together("{} ({})", short(metrics, "ece"), short(metrics, "ece_floor")),
            short(metrics, "kappa_matched", 2),
            short(metrics, "reference_nll"),
        ]
        limits = metrics["intervals"].get("auroc")
        if limits is not None:
            cells[0] += f" [{limits[0]:.2f}, {limits[1]:.2f}]"

        # a long name takes several lines
        first, *others = textwrap.wrap(name, 29)
        lines.append([first, *cells])
        for part in others:
            lines.append([part, *[""] * len(cells)])
    print(f"\n{aligned(lines)}\n")
    print(LEGEND)
    for name, metrics in columns.items():
        print_doubts(name, metrics, has_groups)


def print_doubts(name, metrics, has_groups):
    """Prints what speaks against taking a run's own score or its texts at their word."""
    if "n_disagree" not in metrics:  # this is not a run's own score
        return
    if metrics["n_disagree"]:
        print(f"{name}: {metrics['n_disagree']} of {metrics['n_explained']} texts do not state "
              "the label that is decided")
    if metrics["ece"] > metrics["ece_floor_q95"]:
        print(f"warning: {name}: the calibration error is {metrics['ece']:.3f}; 95 % of perfect "
              f"probabilities\nhave less than {metrics['ece_floor_q95']:.3f} on so many rows: do "
              "not take p at its word")
        if has_groups:
            print("(This takes rows as independent. Where the rows of a group are alike, more than "
                  "5 % of perfect\nprobabilities are above that line.)")


def short(metrics, name, digits=3):
    """A metric as a cell, empty if the scorer has none."""
    value = metrics.get(name)
    return "" if value is None else f"{value:.{digits}f}"


def together(form, first, second):
    """Two cells as one, empty if one of them is."""
    return form.format(first, second) if first and second else ""


def print_tables(columns):
    """Prints the tables of {scorer: metrics}, each with the scorers that have one of its keys."""
    tables = {title: keys.split() for title, keys in TABLES.items()}
    tables["other metrics"] = other_metrics(columns)
    for title, keys in tables.items():
        shown = {}
        for name, metrics in columns.items():
            if any(key in metrics for key in keys):
                shown[name] = metrics
        if shown:
            print(f"\n{title}\n{table(shown, keys, HEADINGS)}")


def other_metrics(columns):
    """The names of metrics that are in no table, so that a new metric is printed, too."""
    known = {"seconds"}
    for keys in TABLES.values():
        known.update(keys.split())

    others = []
    for metrics in columns.values():
        for name, value in metrics.items():
            if isinstance(value, float) and name not in known:
                known.add(name)
                others.append(name)
    return others
