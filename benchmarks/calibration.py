"""Which calibration has the best log loss on other rows, if few rows are there to fit it on?

    python benchmarks/calibration.py                           # simulated logits, a minute
    python benchmarks/calibration.py benchmarks/results/esnli-*-s?.json --out calibration.json
    python benchmarks/calibration.py runs/*/eval/held/predictions.jsonl

The JSON files are results of benchmarks/real.py: their validation rows and their unused rows are
taken, never test rows, without their groups, and the table shows the mean over the runs of a set.
Other files hold records of predict.py or eval.py for labelled rows that nothing was fitted on;
`raw_probability` and `true_label` are read. Rows are drawn again and again: some to fit on, all
others to score on. Whole groups stay together where the records have a `group`, as eval.py's do.
With the same draws for all, p = sigmoid(slope z + bias) of the logit z is fitted in six ways:

    raw           slope 1, bias 0
    temperature   bias 0
    both          temperature and bias
    selected      both if this beats the temperature alone by AIC, else the temperature alone
    shrunk bias   both, the bias with a Gaussian prior of mean 0
    shrunk both   the same, and the slope with a Gaussian prior of mean 1

A fit whose slope is not positive, or that does not exist, leaves p raw, as metrics.calibrate does.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from metrics import clipped_logit, group_numbers, log_loss, sigmoid  # noqa: E402
from plumbing.files import read_json, write_json  # noqa: E402
from plumbing.script import refuse, run_main  # noqa: E402

METHODS = ("raw", "temperature", "both", "selected", "shrunk bias", "shrunk both")
SIZES = (30, 75, 150, 300)  # rows to fit on
SLOPE_DEVIATION = 0.3  # of the priors
BIAS_DEVIATION = 0.3
SIMULATED = {  # name: (temperature, bias, separation of the classes, share of positives)
    "calibrated": (1.0, 0.0, 2.0, 0.5),
    "slightly off": (1.2, 0.1, 2.0, 0.5),
    "overconfident": (2.0, 0.5, 2.0, 0.5),
    "biased": (1.0, -0.5, 2.0, 0.5),
    "few positives": (1.2, 0.1, 2.0, 0.15),
    "nearly perfect": (1.5, 0.2, 4.0, 0.5),
}


def main(argv=None):
    args = parse(argv)
    sources = {}  # {name: [(y, z, number of each row's group)]}, of whose runs a mean is shown
    for path in args.predictions:
        if path.suffix == ".json":
            data, run = read_result(path)
            sources.setdefault(data, []).append(run)
        else:
            sources.update(read_sources(path))
    if not sources:
        sources = {name: [simulate(*settings)] for name, settings in SIMULATED.items()}

    print("log loss on the rows that were not fitted on, minus that of raw; negative is better\n")
    print(f"| source | rows | {' | '.join(METHODS)} |")
    print("|" + "---|" * (2 + len(METHODS)))
    results = []
    for name, runs in sources.items():
        for size in SIZES:
            if size > min(len(y) for y, _, _ in runs) / 2:
                continue
            losses = [compare(*run, size, args.splits, args.seed) for run in runs]
            mean = dict(zip(METHODS, np.mean(losses, axis=(0, 1)).tolist(), strict=True))
            results.append({"source": name, "runs": len(runs), "rows": size, "log_loss": mean})

            cells = [f"{mean['raw']:.4f}"]
            for method in METHODS[1:]:
                cells.append(f"{mean[method] - mean['raw']:+.4f}")
            print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)

    if args.out is not None:
        write_json(args.out, {"results": results, "splits": args.splits, "seed": args.seed,
                              "slope_deviation": SLOPE_DEVIATION, "bias_deviation": BIAS_DEVIATION})


def compare(y, z, number, size, splits, seed):
    """(splits, methods) the log losses of the rows that are left, for random rows to fit on.

    y, z (N,) labels and raw logits; number (N,) the group of each row.
    """
    rng = np.random.default_rng([seed, size])
    losses = []
    for _ in range(splits):
        # whole groups in random order, until there are enough rows
        rank_of_group = rng.permutation(number.max() + 1)
        order = np.argsort(rank_of_group[number], kind="stable")
        fit_rows = order[:size]
        score_rows = order[size:]
        cut_group = number[order[size - 1]]
        score_rows = score_rows[number[score_rows] != cut_group]

        parameters = fit_all(y[fit_rows], z[fit_rows])
        losses.append([
            log_loss(y[score_rows], sigmoid(slope * z[score_rows] + bias))
            for slope, bias in parameters
        ])
    return np.array(losses)


# --- fits -----------------------------------------------------------------------------------------
def fit_all(y, z):
    """[(slope, bias)] of METHODS."""
    raw = (1.0, 0.0)
    temperature = fit(y, z, np.inf, 0.0)
    both = fit(y, z, np.inf, np.inf)
    shrunk_bias = fit(y, z, np.inf, BIAS_DEVIATION)
    shrunk_both = fit(y, z, SLOPE_DEVIATION, BIAS_DEVIATION)

    # AIC: one more parameter has to raise the log-likelihood by more than 1
    selected = temperature
    if temperature is not None and both is not None:
        gain = log_likelihood(y, z, both) - log_likelihood(y, z, temperature)
        if gain > 1:
            selected = both
    return [found or raw
            for found in (raw, temperature, both, selected, shrunk_bias, shrunk_both)]


def fit(y, z, slope_deviation, bias_deviation):
    """(slope, bias) of the highest log-likelihood plus the log of two Gaussian priors.

    The deviations of the priors, around a slope of 1 and a bias of 0: infinity for no prior; 0 for
    no bias. None if there is no finite fit, if the slope is not positive, or if a class is missing.
    """
    if y.min() == y.max():
        return None
    design = np.stack([z, np.ones_like(z)], axis=1)  # (N, 2)
    bias_deviation = max(bias_deviation, 1e-3)  # as good as none, and no division by zero
    precision = np.array([slope_deviation, bias_deviation]) ** -2.0
    center = np.array([1.0, 0.0])

    # Newton's method; the more a step would change a logit, the shorter it becomes
    weights = center.copy()
    for _ in range(200):
        fitted = sigmoid(design @ weights)
        gradient = design.T @ (y - fitted) - precision * (weights - center)
        variance = fitted * (1 - fitted)
        hessian = (design * variance[:, None]).T @ design + np.diag(precision)
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:  # the classes are separated
            return None
        weights = weights + step / (1 + np.abs(design @ step).max())
        if np.abs(step).max() <= 1e-8 * (1 + np.abs(weights).max()):
            slope, bias = weights.tolist()
            return (slope, bias) if slope > 0 else None
    return None


def log_likelihood(y, z, parameters):
    """The log-likelihood of labels y under (slope, bias)."""
    slope, bias = parameters
    return -len(y) * log_loss(y, sigmoid(slope * z + bias))


# --- logits and labels ----------------------------------------------------------------------------
def read_sources(path):
    """{name: [(y, z, group numbers)]} of a predictions.jsonl, for each run that it holds."""
    records_of_run = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            records_of_run.setdefault(record["run"], []).append(record)

    sources = {}
    for run, records in records_of_run.items():
        if any("true_label" not in record for record in records):
            raise ValueError(f"{path}: some records have no true_label")
        y = np.array([record["true_label"] for record in records], dtype=np.float64)
        p = np.array([record["raw_probability"] for record in records])
        groups = [record.get("group") for record in records]
        z = clipped_logit(p, tiny=1e-15)
        sources[f"{path} {run}"] = [(y, z, group_numbers(groups, len(records)))]
    return sources


def read_result(path):
    """(data set, (y, z, group numbers)) of a result of real.py: all rows but the test rows."""
    result = read_json(path)
    y = []
    z = []
    for name in ("valid", "unused"):
        rows = result.get(name, {"label": [], "z": []})
        y += rows["label"]
        z += rows["z"]
    return result["data"], (np.array(y, dtype=np.float64), np.array(z), np.arange(len(y)))


def simulate(temperature, bias, separation, share, rows=20_000):
    """(y, z, group numbers): logits z for which sigmoid(z / temperature + bias) is perfect."""
    rng = np.random.default_rng(0)
    y = (rng.random(rows) < share).astype(np.float64)
    score = rng.normal(size=rows) + separation * y
    logit = np.log(share / (1 - share)) + separation * score - separation**2 / 2
    return y, temperature * (logit - bias), np.arange(rows)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("predictions", type=Path, nargs="*", help="predictions.jsonl files (default: simulated)")
    add("--splits", type=int, default=200, help="random splits for each source and size")
    add("--seed", type=int, default=0, help="of the splits")
    add("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(argv)

    problems = []
    if args.splits < 1:
        problems.append(f"--splits is {args.splits}, expected 1 or more")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_main(main)
