"""Tables of what benchmarks/real.py has measured, as markdown: systems, and differences of systems.

    python benchmarks/result_tables.py                  # all data sets in benchmarks/results/
    python benchmarks/result_tables.py --figures out    # and pictures

A value is the mean over the seeds. Its 95 % interval takes test rows and seeds together: the
variance over rows comes from 1,000 resamples of whole groups, the same for every system, and the
variance over seeds from the seeds' own values on all rows. The limits are t standard errors away,
with Satterthwaite's degrees of freedom (1946): three seeds whose values differ much have about two,
and so a wide interval. They are taken on the metric's own scale (metrics.limits), so that no AUROC
is above 1; those of a difference are symmetric. Where there is one seed, the interval is that of
rows alone.

A difference of two systems is taken for each seed that both have, and on the same rows. It counts
from MARGINS on, which were written down before anything was run with several seeds. If its interval
crosses zero, no difference was seen.

Probabilities are calibrated here, by metrics.calibrate on the stored validation rows, so that all
systems have the same calibration whatever version of the code has trained them. Those of the base
model keep the calibration that they have.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import (  # noqa: E402
    auroc, calibrate, calibrated, calibration_intervals, calibration_slope, curves, ece, ece_floor,
    group_numbers, limits, log_loss, none_if_undefined, per_token, resamples, sigmoid,
    student_t)
from plumbing.drawings import forest, reliability, side_by_side  # noqa: E402
from plumbing.files import read_json, write_atomically  # noqa: E402
from plumbing.script import run_main  # noqa: E402
from report import asset  # noqa: E402

DATA_TITLES = {  # in this order
    "notes": "notes",
    "esnli": "e-SNLI",
    "comve": "ComVE",
    "pubmedqa": "PubMedQA",
    "clinifact": "CliniFact",
}
TITLES = {  # system or scorer: its line, in this order
    "majority": "majority",
    "TF-IDF, words": "bag of words",
    "TF-IDF, words and pairs": "bag of words and pairs",
    "zero-shot": "zero-shot label token",
    "zero-shot stated confidence": "zero-shot stated confidence",
    "cls-only": "cls-only",
    "lm-only": "LM-only",
    "lm-only-vocabulary": "LM-only, label loss over the vocabulary",
    "lm-only-words": "LM-only, label loss between the label words",
    "clsgen-random": "CLSGen, random head",
    "clsgen-label-words": "CLSGen, from the label words",
    "clsgen-detached": "CLSGen, detached head",
}
OURS = "clsgen-label-words"
TRAINED = ("cls-only", "lm-only", "lm-only-vocabulary", "lm-only-words", "clsgen-random", OURS)
METRICS = {"auroc": "AUROC", "log_loss": "log loss", "text_nll": "reference loss"}
FUNCTIONS = {"auroc": auroc, "log_loss": log_loss, "text_nll": per_token}
MARGINS = {"auroc": 0.02, "log_loss": 0.03, "text_nll": 0.05}  # the last is a share


@dataclass
class Scores:
    """What one system, with one seed, says about N test rows."""

    seed: int | None  # None: it was not trained
    y: np.ndarray  # (N,)
    groups: list  # N
    p: np.ndarray  # (N,) calibrated
    raw_p: np.ndarray | None = None  # (N,) before calibration
    sums: np.ndarray | None = None  # (N, 2) see metrics.per_token; None: it writes no text
    metrics: dict | None = None  # of eval.json
    swapped_p: np.ndarray | None = None  # (N,) calibrated, of the pairs in the other order

    def measure(self, rows):
        """{metric: value} on some rows. Undefined if a class is missing."""
        y = self.y[rows]
        measured = {"auroc": auroc(y, self.p[rows]), "log_loss": log_loss(y, self.p[rows])}
        if self.sums is not None:
            measured["text_nll"] = per_token(None, self.sums[rows])
        return measured


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    add("--draws", type=int, default=1000, help="resamples of rows")
    add("--figures", type=Path, help="folder for SVG pictures (default: none)")
    args = parser.parse_args(argv)

    results = read_results(args.results)
    if not results:
        raise ValueError(f"{args.results} has no result of benchmarks/real.py")

    sets = {}  # {data set: its systems, {system: its Scores, one a seed}}
    drawn_sets = {}  # {data set: what `draw` makes of its systems}
    for data, of_data in results.items():
        sets[data] = scores_of(of_data)
        drawn_sets[data] = draw(sets[data], args.draws)
        print_systems(data, sets[data], drawn_sets[data], of_data)

    for name in METRICS:
        print_differences(name, sets, drawn_sets)
    print_calibration(sets)
    print_evidence(sets)
    print_rereading(sets)
    for data, systems in sets.items():
        print_swapped(data, systems)
    print_unseen(results)

    if args.figures is not None:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name in ("auroc", "text_nll"):
            figure = draw_overview(name, sets, drawn_sets)
            write_atomically(args.figures / f"{name}.svg", figure)
        for data, systems in sets.items():
            figure = draw_reliability(systems)
            write_atomically(args.figures / f"{data}_reliability.svg", figure)


def draw_overview(name, sets, drawn_sets):
    """One metric of every system on every data set that a system was trained on, as SVG."""
    panels = []
    shown = set()
    for data, systems in sets.items():
        if OURS not in systems:
            continue
        found = {}
        for system, runs in systems.items():
            drawn = drawn_sets[data][system]
            if system != "majority" and name in drawn[0]:
                measured = measure_all(name, runs, drawn)
                found[TITLES[system]] = estimate(*measured, FUNCTIONS[name])
        panels.append((DATA_TITLES[data], found))
        shown.update(found)
    names = [title for title in TITLES.values() if title in shown]
    return forest(names, panels, asset("report.css"))


def draw_reliability(systems):
    """The reliability diagrams of the first seed of each trained system, as SVG."""
    panels = []
    for system in TRAINED:
        if system in systems:
            first = systems[system][0]
            drawn = reliability(TITLES[system], curves(first.y, first.p, first.groups))
            panels.append((TITLES[system], drawn))
    return side_by_side(panels, asset("report.css"))


# --- reading --------------------------------------------------------------------------------------
def read_results(folder):
    """{data set: its results, ordered by seed}. Other JSON files of the folder are left out."""
    results = {data: [] for data in DATA_TITLES}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if {"data", "system", "test"} <= result.keys():
            results[result["data"]].append(result)
    for of_data in results.values():
        of_data.sort(key=lambda result: result["seed"] or 0)
    return {data: of_data for data, of_data in results.items() if of_data}


def scores_of(results):
    """{system: its Scores, one a seed}, in the order of TITLES."""
    found = {}
    for result in results:
        if result["system"] == "baselines":
            for scorer in result["metrics"]:
                found[scorer] = [baseline_scores(result, scorer)]
        else:
            found.setdefault(result["system"], []).append(run_scores(result))
    return {system: found[system] for system in TITLES if system in found}


def baseline_scores(result, scorer):
    """Scores of majority, or of a bag of words."""
    rows = result["test"]
    y = np.array(rows["label"])
    p = np.full(len(y), result["base_rate"])
    if f"{scorer}: z" in rows:
        valid = result["valid"]
        temperature, bias, _ = calibrate(valid["label"], valid[f"{scorer}: z"])
        p = calibrated(rows[f"{scorer}: z"], temperature, bias)
    return Scores(None, y, rows.get("group"), p, metrics=result["metrics"][scorer])


def run_scores(result):
    """Scores of a trained run, or of the base model."""
    rows = result["test"]
    p = sigmoid(np.array(rows["calibrated_z"]))
    swapped_p = None
    if "valid" in result:
        temperature, bias, _ = calibrate(result["valid"]["label"], result["valid"]["z"])
        p = calibrated(rows["z"], temperature, bias)
        if "swapped" in result:
            swapped_p = calibrated(result["swapped"]["z"], temperature, bias)
    return Scores(
        seed=result["seed"],
        y=np.array(rows["label"]),
        groups=rows.get("group"),
        p=p,
        raw_p=sigmoid(np.array(rows["z"])),
        sums=np.stack((rows["nll"], rows["tokens"]), axis=1),
        metrics={
            **own_metrics(result),
            "agree": agreement(result),
            "text_flips": result.get("swapped", {}).get("text_flips"),
        },
        swapped_p=swapped_p,
    )


def own_metrics(result):
    """The metrics of a run's own score and of its texts."""
    for metrics in result["metrics"].values():
        if "parsable" in metrics:
            return metrics
    return {}


def agreement(result):
    """The share of texts that state the run's own decision: p >= its threshold, as calibrated then.

    None for the base model, which has no threshold.
    """
    if "threshold" not in result:
        return None
    rows = result["test"]
    decisions = sigmoid(np.array(rows["calibrated_z"])) >= result["threshold"]
    stated = np.array([-1 if label is None else label for label in rows["stated"]])
    return np.mean(decisions == stated)  # -1, no label, equals neither decision


# --- seeds and rows together ----------------------------------------------------------------------
def draw(systems, draws, seed=0):
    """{system: [for each of its Scores, {metric: (draws,) its values on resampled rows}]}.

    Whole groups are resampled. All systems and seeds see the same rows. A resample in which a class
    is missing is drawn again.
    """
    first = next(iter(systems.values()))[0]
    number = group_numbers(first.groups, len(first.y))
    row_sets = []
    for rows in resamples(number, seed):
        if len(set(first.y[rows])) == 2:
            row_sets.append(rows)
        if len(row_sets) == draws:
            break

    drawn = {}
    for system, runs in systems.items():
        drawn[system] = []
        for scores in runs:
            found = [scores.measure(rows) for rows in row_sets]
            names = found[0]
            drawn[system].append({name: np.array([one[name] for one in found]) for name in names})
    return drawn


def measure_all(name, runs, drawn):
    """(S,) a metric of each of S seeds on all rows, and (S, draws) on the resampled rows.

    runs: the Scores of each seed; drawn: what `draw` made of them.
    """
    all_rows = np.arange(len(runs[0].y))
    values = np.array([scores.measure(all_rows)[name] for scores in runs])
    return values, np.array([one[name] for one in drawn])


def estimate(values, drawn, metric=None):
    """(mean over the seeds, low, high), the 95 % interval over rows and seeds together.

    values (S,): of each seed on all rows; drawn (S, draws): of each on resampled rows. metric: see
    `metrics.limits`; None for a difference.
    """
    n_seeds = len(values)
    variance_of_rows = drawn.mean(axis=0).var()
    variance_of_seeds = 0.0
    degrees = np.inf
    if n_seeds > 1:
        variance_of_seeds = values.var(ddof=1) / n_seeds
    variance = variance_of_rows + variance_of_seeds
    if variance_of_seeds > 0:
        degrees = variance**2 / (variance_of_seeds**2 / (n_seeds - 1))

    reach = student_t(degrees) * np.sqrt(variance)
    return values.mean(), *limits(metric, values.mean(), reach)


def estimate_difference(name, own, other):
    """`estimate` of own minus other; of the reference loss as a share of the other.

    own, other: (Scores of each seed, what `draw` made of them). Pairs of the same seed are taken. A
    system that was not trained is compared with every seed. None if the two share no seed.
    """
    pairs = []
    for one, its_draws in zip(*own, strict=True):
        for two, other_draws in zip(*other, strict=True):
            if two.seed in (one.seed, None):
                pairs.append((one, its_draws, two, other_draws))
    if not pairs:
        return None

    own_values, own_drawn = measure_all(name, [p[0] for p in pairs], [p[1] for p in pairs])
    values, drawn = measure_all(name, [p[2] for p in pairs], [p[3] for p in pairs])
    if name == "text_nll":
        return estimate(own_values / values - 1, own_drawn / drawn - 1)
    return estimate(own_values - values, own_drawn - drawn)


def is_large(name, value, low, high):
    """Whether a difference in a metric counts as one, see MARGINS. low, high: its interval."""
    return abs(value) >= MARGINS[name] and not low <= 0 <= high


# --- printing -------------------------------------------------------------------------------------
def print_systems(data, systems, drawn, results):
    """What each system gives on one data set."""
    first = next(iter(systems.values()))[0]
    machines = {machine(result) for result in results}
    commits = {cost["commit"][:7] for result in results for cost in result["costs"].values()}
    print(f"\n### {DATA_TITLES[data]}\n\n{len(first.y)} test rows; {', '.join(sorted(machines))}; "
          f"commit {', '.join(sorted(commits))}\n")

    print_line("system", "seeds", *METRICS.values(), "states a label", "agrees", "repetition")
    print_line(*["---"] * 8)
    for system, runs in systems.items():
        cells = [TITLES[system], str(len(runs))]
        for name in METRICS:
            cell = ""
            if name in drawn[system][0]:
                measured = measure_all(name, runs, drawn[system])
                cell = with_interval(*estimate(*measured, FUNCTIONS[name]))
            cells.append(cell)
        for key in ("parsable", "agree", "rep_4"):
            cells.append(mean_cell([scores.metrics.get(key) for scores in runs], 2))
        print_line(*cells)

    # it is not in the rows' numbers, so its interval is that of eval.py: rows alone
    for result in results:
        stated = result["metrics"].get("zero-shot stated confidence")
        if stated is not None:
            cells = [TITLES["zero-shot stated confidence"], "1"]
            for name in ("auroc", "log_loss"):
                low, high = stated["intervals"][name] or (None, None)
                cells.append(with_interval(stated[name], low, high))
            print_line(*cells, "", "", "", "")


def machine(result):
    """What a result was made on."""
    hardware = result["hardware"]
    return hardware.get("gpu", hardware["processor"])


def print_differences(name, sets, drawn_sets):
    """Our system minus each other one in one metric, a column for each data set."""
    unit = ", as a share of the other's" if name == "text_nll" else ""
    print(f"\n### {METRICS[name]} of {TITLES[OURS]}, minus that of another system{unit}\n")
    with_ours = [data for data in sets if OURS in sets[data]]
    print_line("the other system", *[DATA_TITLES[data] for data in with_ours])
    print_line(*["---"] * (1 + len(with_ours)))
    for system in TITLES:
        if system == OURS:
            continue
        cells = []
        for data in with_ours:
            cells.append(difference_cell(name, system, sets[data], drawn_sets[data]))
        if any(cells):
            print_line(TITLES[system], *cells)


def difference_cell(name, system, systems, drawn):
    """Our system minus another one in one metric on one data set; bold where it counts.

    Empty if the other was not run, has no such metric, or shares no seed with ours.
    """
    if system not in systems or name not in drawn[system][0]:
        return ""
    ours = (systems[OURS], drawn[OURS])
    other = (systems[system], drawn[system])
    difference = estimate_difference(name, ours, other)
    if difference is None:
        return ""

    cell = with_interval(*difference)
    if is_large(name, *difference):
        return f"**{cell}**"
    return cell


def print_calibration(sets):
    """Intercept, slope and ECE, raw and calibrated: means over the seeds.

    An interval is the mean of the seeds' intervals, which are those of rows alone. Where a cut of p
    separates the classes for one of the seeds, slope and intercept are n/a.
    """
    print("\n### Calibration, raw and then calibrated\n")
    print_line("set and system", "", "intercept", "slope",
               "calibration error (of a perfect p: mean, 95 %)", "log loss")
    print_line(*["---"] * 6)
    for data, systems in sets.items():
        for system in TRAINED:
            if system not in systems:
                continue
            for kind in ("raw", "calibrated"):
                found = [calibration_of(scores, kind) for scores in systems[system]]
                cells = []
                for name in ("intercept", "slope"):
                    values = [one[name] for one in found]  # of each seed, with its limits
                    if None in values:
                        cells.append("n/a")
                    else:
                        cells.append(with_interval(*np.mean(values, axis=0)))
                error, floor, q95 = np.mean([one["ece"] for one in found], axis=0)
                cells.append(f"{number(error)} ({number(floor)}, {number(q95)})")
                cells.append(number(np.mean([one["log_loss"] for one in found])))
                print_line(f"{DATA_TITLES[data]}: {TITLES[system]}", kind, *cells)


def calibration_of(scores, kind):
    """One seed's numbers for a line of the calibration table.

    Slope and intercept are (value, low, high), or None where they are undefined; the ECE is (value,
    mean of a perfect p, its 95 % line).
    """
    y = scores.y
    p = scores.raw_p if kind == "raw" else scores.p
    found = {"slope": None, "intercept": None, "ece": (ece(y, p), *ece_floor(p)),
             "log_loss": log_loss(y, p)}
    fitted = none_if_undefined(calibration_slope, y, p)
    intervals = none_if_undefined(calibration_intervals, y, p, scores.groups)
    if intervals is not None:
        found["slope"] = (fitted[0], *intervals[0])
        found["intercept"] = (fitted[1], *intervals[1])
    return found


def print_evidence(sets):
    """Which phrases the texts cite, where rows have `evidence`, and kappa for all."""
    print("\n### What the texts cite, and kappa at the best threshold\n")
    print_line("set and system", "recall of the evidence", "precision", "kappa")
    print_line(*["---"] * 4)
    for data, systems in sets.items():
        for system in TRAINED:
            runs = systems.get(system, [])
            cells = []
            for key in ("evidence_recall", "evidence_precision", "kappa_matched"):
                cells.append(mean_cell([scores.metrics.get(key) for scores in runs], 2))
            if any(cells):
                print_line(f"{DATA_TITLES[data]}: {TITLES[system]}", *cells)


def print_rereading(sets):
    """Does an explanation, read alone, lead to its decision? And that of another row?"""
    print("\n### Reading again: AUROC and flipped decisions (with texts of other rows)\n")
    trained = {data: systems for data, systems in sets.items() if OURS in systems}
    print_line("system", *[DATA_TITLES[data] for data in trained])
    print_line(*["---"] * (1 + len(trained)))
    for system in TRAINED:
        cells = []
        for systems in trained.values():
            runs = systems.get(system, [])
            shown = []
            for key in ("reread_auroc", "shuffled_auroc", "reread_flips", "shuffled_flips"):
                shown.append(mean_cell([scores.metrics.get(key) for scores in runs], 2))
            cell = ""
            if all(shown):
                cell = "{} ({}), {} ({})".format(*shown)
            cells.append(cell)
        print_line(TITLES[system], *cells)


def print_swapped(data, systems):
    """What changes if the two statements of a pair change places."""
    if not any(runs[0].swapped_p is not None for runs in systems.values()):
        return
    print(f"\n### {DATA_TITLES[data]}: swapped pairs\n")
    print_line("system", "distance of p + p' from 1", "decisions that flip", "texts that flip")
    print_line(*["---"] * 4)
    for system in TRAINED:
        runs = systems.get(system, [])
        errors = []
        flips = []
        for scores in runs:
            errors.append(np.abs(scores.p + scores.swapped_p - 1).mean())
            flips.append(((scores.p >= 0.5) != (scores.swapped_p >= 0.5)).mean())
        texts = [scores.metrics.get("text_flips") for scores in runs]
        print_line(TITLES[system], mean_cell(errors, 2), mean_cell(flips, 2), mean_cell(texts, 2))


def print_unseen(results):
    """The test rows of groups that training has not seen."""
    for of_data in results.values():
        for result in of_data:
            unseen = result.get("unseen_groups")
            if unseen and unseen["metrics"]:
                found = unseen["metrics"]
                low, high = found["intervals"]["auroc"] or (None, None)  # None: all of one group
                print(f"\n{DATA_TITLES[result['data']]}, {TITLES.get(result['system'])}, seed "
                      f"{result['seed']}: {unseen['n']} rows of groups that training has not "
                      f"seen: AUROC {with_interval(found['auroc'], low, high)}")


def with_interval(value, low, high):
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value):
    return "n/a" if value is None else f"{value:.3f}"


def mean_cell(values, digits):
    if not values or None in values:
        return ""
    return f"{np.mean(values):.{digits}f}"


def print_line(*cells):
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(main)
