"""Tables of what benchmarks/real.py has measured, as markdown: systems, and differences of systems.

    python benchmarks/result_tables.py                  # all data sets in benchmarks/results/

A value is the mean over the seeds. Its 95 % interval takes seeds and rows together: each of 1,000
draws picks the seeds with replacement, and whole groups of test rows with replacement, the same for
every system and seed; the interval holds the middle 95 % of the means. With three seeds this
understates how much seeds vary (by about a fifth); where there is one seed, it says nothing of it.

A difference of two systems is taken within each draw, so rows and seeds are paired. It counts from
MARGINS on, which were written down before anything was run. If its interval crosses zero, no
difference was seen, and the farther end of the interval says how large one could still be.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import auroc, group_numbers, log_loss, per_token, sigmoid  # noqa: E402
from plumbing.files import read_json  # noqa: E402
from plumbing.script import run_main  # noqa: E402

TITLES = {  # system or scorer: its line, in this order
    "majority": "majority",
    "TF-IDF, words": "bag of words",
    "TF-IDF, words and pairs": "bag of words and pairs",
    "zero-shot": "zero-shot label token",
    "zero-shot stated confidence": "zero-shot stated confidence",
    "cls-only": "cls-only",
    "lm-only": "LM-only",
    "lm-only-vocabulary": "LM-only, label loss (a) over the vocabulary",
    "lm-only-words": "LM-only, label loss (b) between the label words",
    "clsgen-random": "CLSGen, random head",
    "clsgen-label-words": "CLSGen, from the label words",
}
OURS = ("clsgen-label-words", "clsgen-random")
METRICS = {"auroc": "AUROC", "log_loss": "log loss", "text_nll": "text NLL"}
MARGINS = {"auroc": 0.02, "log_loss": 0.03, "text_nll": 0.05}  # the last is a share


@dataclass
class Scores:
    """What one system, with one seed, says about N test rows."""

    y: np.ndarray  # (N,)
    groups: list  # N
    p: np.ndarray  # (N,) calibrated
    sums: np.ndarray | None = None  # (N, 2) see metrics.per_token; None: it writes no text
    metrics: dict | None = None  # of eval.json
    minutes: float | None = None  # of training and evaluation

    def measure(self, rows):
        """{metric: value} on some rows. ValueError if a class is missing."""
        y = self.y[rows]
        measured = {"auroc": auroc(y, self.p[rows]), "log_loss": log_loss(y, self.p[rows])}
        if self.sums is not None:
            measured["text_nll"] = per_token(None, self.sums[rows])
        return measured


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    add("--draws", type=int, default=1000, help="resamples of seeds and rows")
    args = parser.parse_args(argv)

    results = read_results(args.results)
    if not results:
        raise ValueError(f"{args.results} has no result of benchmarks/real.py")
    for data, of_data in results.items():
        systems = scores_of(of_data)
        draws = draw(systems, args.draws)
        print_systems(data, systems, draws, of_data)
        for system in OURS:
            if system in systems:
                print_differences(system, systems, draws)
        print_apart(of_data)


# --- reading --------------------------------------------------------------------------------------
def read_results(folder):
    """{data set: its results, ordered by seed}. Other JSON files of the folder are left out."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if {"data", "system", "test"} <= result.keys():
            results.setdefault(result["data"], []).append(result)
    for of_data in results.values():
        of_data.sort(key=lambda result: result["seed"] or 0)
    return results


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
    rows = result["test"]
    y = np.array(rows["label"])
    p = np.full(len(y), result["base_rate"])
    if f"{scorer}: calibrated_z" in rows:
        p = sigmoid(np.array(rows[f"{scorer}: calibrated_z"]))
    return Scores(y, rows.get("group"), p, metrics=result["metrics"][scorer])


def run_scores(result):
    rows = result["test"]
    seconds = sum(cost["seconds"] for cost in result["costs"].values())
    return Scores(
        y=np.array(rows["label"]),
        groups=rows.get("group"),
        p=sigmoid(np.array(rows["calibrated_z"])),
        sums=np.stack((rows["nll"], rows["tokens"]), axis=1),
        metrics=own_metrics(result),
        minutes=seconds / 60,
    )


def own_metrics(result):
    """The metrics of a run's own score and of its texts."""
    for metrics in result["metrics"].values():
        if "parsable" in metrics:
            return metrics
    return {}


# --- seeds and rows together ----------------------------------------------------------------------
def draw(systems, draws, seed=0):
    """{system: {metric: (draws,) means over the drawn seeds on the drawn rows}}.

    A draw in which a class is missing is drawn again.
    """
    first = next(iter(systems.values()))[0]
    number = group_numbers(first.groups, len(first.y))
    rows_of_group = [np.flatnonzero(number == group) for group in range(number.max() + 1)]
    most_seeds = max(len(seeds) for seeds in systems.values())

    rng = np.random.default_rng(seed)
    found = []  # of each draw: {system: {metric: mean}}
    while len(found) < draws:
        groups = rng.integers(len(rows_of_group), size=len(rows_of_group))
        rows = np.concatenate([rows_of_group[group] for group in groups])
        picked = rng.integers(most_seeds, size=most_seeds)
        if len(set(first.y[rows])) == 2:
            found.append({system: mean_of([seeds[i % len(seeds)] for i in picked], rows)
                          for system, seeds in systems.items()})

    columns = {}
    for system in systems:
        names = found[0][system]
        columns[system] = {name: np.array([one[system][name] for one in found]) for name in names}
    return columns


def mean_of(seeds, rows):
    """{metric: its mean over some Scores, which may occur twice, on some rows}."""
    measured = {}
    for scores in seeds:
        if id(scores) not in measured:
            measured[id(scores)] = scores.measure(rows)
    values = [measured[id(scores)] for scores in seeds]
    return {name: float(np.mean([one[name] for one in values])) for name in values[0]}


def means(seeds):
    """{metric: its mean over the seeds} on all rows."""
    return mean_of(seeds, np.arange(len(seeds[0].y)))


def verdict(name, value, low, high):
    """A difference in words. name: the metric; low, high: its interval."""
    if low <= 0 <= high:
        return f"no difference larger than {number(max(-low, high))} was seen"
    word = "higher" if value > 0 else "lower"
    if abs(value) < MARGINS[name]:
        return f"{word}, by less than the margin"
    return word


# --- printing -------------------------------------------------------------------------------------
def print_systems(data, systems, draws, results):
    hardware = {result["hardware"]["processor"] for result in results}
    commits = {cost["commit"][:7] for result in results for cost in result["costs"].values()}
    first = next(iter(systems.values()))[0]
    print(f"\n## {data}\n\n{len(first.y)} test rows; {', '.join(sorted(hardware))}; "
          f"commit {', '.join(sorted(commits))}\n")

    print_line("system", "seeds", *METRICS.values(), "states a label", "minutes")
    print_line(*["---"] * 7)
    for system, seeds in systems.items():
        cells = [TITLES[system], str(len(seeds))]
        values = means(seeds)
        for name in METRICS:
            cell = ""
            if name in values:
                cell = with_interval(values[name], *interval(draws[system][name]))
            cells.append(cell)
        cells.append(mean_cell([scores.metrics.get("parsable") for scores in seeds], 2))
        cells.append(mean_cell([scores.minutes for scores in seeds], 0))
        print_line(*cells)

    # it is not in the rows' numbers, so its interval is that of eval.py: rows alone
    for result in results:
        stated = result["metrics"].get("zero-shot stated confidence")
        if stated is not None:
            cells = [TITLES["zero-shot stated confidence"], "1"]
            for name in ("auroc", "log_loss"):
                limits = stated["intervals"][name] or (None, None)
                cells.append(with_interval(stated[name], *limits))
            print_line(*cells, "", "", "")


def print_differences(ours, systems, draws):
    print(f"\n{TITLES[ours]}, minus\n")
    print_line("system", "AUROC", "log loss", "text NLL, as a share of the other's")
    print_line(*["---"] * 4)
    for system, seeds in systems.items():
        if system == ours:
            continue
        cells = [TITLES[system]]
        own = means(systems[ours])
        other = means(seeds)
        for name in METRICS:
            cell = ""
            if name in own and name in other:
                value = difference(name, own[name], other[name])
                low, high = interval(difference(name, draws[ours][name], draws[system][name]))
                cell = f"{with_interval(value, low, high)}: {verdict(name, value, low, high)}"
            cells.append(cell)
        print_line(*cells)


def difference(name, own, other):
    """Own minus other; of the text NLL as a share of the other."""
    if name == "text_nll":
        return own / other - 1
    return own - other


def print_apart(results):
    """Test groups that training has not seen, and pairs in the other order, one line a run."""
    for result in results:
        title = f"{TITLES.get(result['system'])}, seed {result['seed']}"
        unseen = result.get("unseen_groups")
        if unseen and unseen["metrics"]:
            found = unseen["metrics"]
            limits = found["intervals"]["auroc"] or (None, None)  # None: all are of one group
            print(f"\n{title}: {unseen['n']} rows of groups that training has not seen: AUROC "
                  f"{with_interval(found['auroc'], *limits)}")
        swapped = result.get("swapped")
        if swapped:
            print(f"\n{title}: swapped pairs: mean |p + p' - 1| "
                  f"{number(swapped['sum_error'])}, decisions that flip "
                  f"{number(swapped['decision_flips'])}, texts that change sides "
                  f"{number(swapped['text_flips'])}")


def interval(values):
    return np.percentile(values, (2.5, 97.5))


def with_interval(value, low, high):
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value):
    return "n/a" if value is None else f"{value:.3f}"


def mean_cell(values, digits):
    if None in values:
        return ""
    return f"{np.mean(values):.{digits}f}"


def print_line(*cells):
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(main)
