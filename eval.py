"""Evaluation of runs: how good is the probability, and is the explanation any good?

    python eval.py --run runs/x --data test.jsonl
    python eval.py --run runs/clsgen --run runs/cls --run runs/lm --model models/x --data test.jsonl

prints tables and writes eval.json and predictions.jsonl: into runs/x/eval/test for one run, into
out/test for several. --model adds the base model, zero-shot. Nothing is fitted on --data:
calibration and threshold came with each run; those of the base model are found on --valid.

A run has up to three scores, which are measured one by one and called scorers: its own p,
calibrated ("head", or "label token" where no head was trained); the same as it came ("raw"); and
next to a head, the probability of the label words ("label token"). What the metrics are stands in
metrics.py. Notation: N rows, y (N,) labels, p (N,) probabilities of class 1.
"""

import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from clsgen import CLSGen
from data import read_rows
from metrics import auroc, checked, group_numbers, none_if_undefined, score_metrics, text_metrics
from plumbing.checkpoint import base_fingerprint, load_llama
from plumbing.files import continue_job, write_atomically
from plumbing.packed import pack
from plumbing.script import refuse, run_main, versions
from plumbing.tables import table
from prompts import Prompts
from run import Fitted, Run, fit, load_run

ZERO_SHOT = "zero-shot"  # stands in the list of run folders for the base model

TABLES = {  # title: columns, by their names in eval.json
    "the probability; log loss in nats":
        "calibrated auroc average_precision log_loss brier",
    "decisions at p >= .5, f1 at the run's threshold; the 80 % of rows with the largest |p - .5|":
        "accuracy f1_half f1 accuracy_at_80 coverage_at_95",
    "calibration: ECE, and that of a perfect p (mean, 95 %); CORP parts; slope 1 is best":
        "ece ece_floor ece_floor_q95 miscalibration discrimination uncertainty slope intercept "
        "true_p_error",
    "does the text say what p says?":
        "n_explained n_parsable auroc_alignment kappa kappa_all kappa_matched kappa_oracle "
        "agree_share agree_accuracy agree_coverage_at_95",
    "is it still a text? NLL of the reference and KL from the base model, nats a token; evidence":
        "parsable empty distinct_2 rep_4 reference_nll base_kl flesch evidence_recall "
        "evidence_precision evidence_invented",
    "minus the first line's, on the same resamples":
        "auroc_difference log_loss_difference reference_nll_difference",
}  # fmt: skip


def main(argv=None):
    args = parse(argv)
    started = time.perf_counter()

    # read the rows and load every scorer: what is wrong says so now, not after hours of work
    file_rows = read_rows(args.data)
    rows = choose_rows(file_rows, args)
    valid = read_rows(args.valid) if args.valid else []
    folders = list(args.run)
    if args.model:
        folders.append(ZERO_SHOT)
    for folder in folders[1:]:  # the first one is loaded right after this
        load_scorer(folder, args)
    prepare(args.out, args.overwrite)

    # one run after the other: predict, measure, write
    comparison = Comparison(rows, file_rows, args)
    columns = {}  # {scorer: its metrics}
    lines = []  # of predictions.jsonl
    for folder in folders:
        run = load_scorer(folder, args)
        if folder == ZERO_SHOT and valid:
            calibrate_zero_shot(run, valid, args)

        scored = score_rows(run, rows, args)
        has_threshold = folder != ZERO_SHOT or bool(valid)
        for scorer, metrics in comparison.measure_run(run, scored, has_threshold).items():
            if len(folders) > 1:
                scorer = f"{folder} {scorer}"
            columns[scorer] = metrics

        lines += prediction_lines(rows, scored.predictions)
        write_atomically(args.out / "predictions.jsonl", "".join(lines))
        base_rate = run.fitted.base_rate
        del run  # makes room for the next one

    # and what no model is needed for: the training rows' share of class 1, for every row
    columns["majority"] = comparison.measure(np.full(len(rows), base_rate))

    # the results
    report = {
        "metrics": columns,
        **describe(rows),
        "seconds": time.perf_counter() - started,
        "arguments": vars(args),
        "versions": versions(),
    }
    write_atomically(args.out / "eval.json", json.dumps(report, indent=1, default=str) + "\n")
    remove_parts(args.out)
    print_report(report, args)


# --- what is scored, and by whom ------------------------------------------------------------------
def parse(argv=None):
    """The arguments. ValueError if some do not fit together or the results are there already."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", required=True, type=Path, action="append",
        help="run folder, from train.py; again for each run to compare with the first")
    add("--data", required=True, type=Path, help="JSON Lines file with labels")
    add("--model", help="folder of the base model: scored as well, zero-shot, with the first run's "
        "prompts (default: not, and each run names its base)")
    add("--valid", type=Path, help="validation rows: calibrate the base model's p as a run's is")
    add("--rows", type=int, help="only the first N rows of a seeded shuffle (default: all)")
    add("--explain", type=int, help="texts for the first N of that shuffle only (default: all)")
    add("--out", type=Path, help="results (default: RUN/eval/DATA; of several runs, out/DATA)")
    add("--overwrite", action="store_true", help="replace results that are there, or half there")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="of the base model")
    add("--device", help="such as cpu or cuda")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--draws", type=int, default=1000, help="resamples for intervals and for the ECE floor")
    add("--seed", type=int, default=0, help="of the shuffle and the resamples")
    args = parser.parse_args(argv)

    if args.out is None:
        results = args.run[0] / "eval" if len(args.run) == 1 else Path("out")
        args.out = results / args.data.stem

    problems = []
    rows = 1 if args.rows is None else args.rows
    explain = 0 if args.explain is None else args.explain
    if min(rows, args.batch, args.draws) < 1 or explain < 0:
        problems.append("--rows, --batch and --draws must be at least 1, --explain at least 0")
    if args.valid and not args.model:
        problems.append("--valid is for the base model, of --model; runs are calibrated already")
    if len(set(args.run)) < len(args.run):
        problems.append("--run names one folder twice")
    if (args.out / "eval.json").exists() and not args.overwrite:
        problems.append(f"{args.out}/eval.json exists; give another --out or --overwrite")
    refuse(problems)
    return args


def choose_rows(file_rows, args):
    """All rows; with --rows or --explain, the first of a seeded shuffle.

    ValueError if a class of the file is not among them.
    """
    if args.rows is None and args.explain is None:
        return file_rows
    order = np.random.default_rng(args.seed).permutation(len(file_rows))
    rows = [file_rows[i] for i in order[: args.rows]]

    labels = [row["label"] for row in rows]
    classes = sorted({row["label"] for row in file_rows})
    checked(labels, labels, need=classes)
    return rows


def load_scorer(folder, args):
    """The run of a folder; of ZERO_SHOT, the base model with the first run's prompts.

    The base model answers by its label-token score, and has neither calibration nor threshold.
    """
    if folder != ZERO_SHOT:
        return load_run(folder, args.model, args.dtype, args.device)

    first = load_run(args.run[0], args.model, args.dtype, args.device)
    llama = load_llama(args.model, first.llama.norm.weight.dtype, first.device)
    model = CLSGen(pack(llama)).eval()
    prompts = Prompts(args.model, **first.prompts.settings())
    fitted = Fitted(scorer="label_token", base_rate=first.fitted.base_rate)
    run = Run(model, prompts, fitted, name=ZERO_SHOT, has_lora=False)
    run.about = {"base_fingerprint": base_fingerprint(args.model)}
    return run


def calibrate_zero_shot(run, valid, args):
    """Gives the base model what the runs got when they were trained: a calibration, a threshold."""
    y = [row["label"] for row in valid]
    z = run.raw_logits(valid, args.batch, progress=True)
    run.fitted, sentence = fit(run.fitted.scorer, y, z, run.fitted.base_rate)
    print(f"{ZERO_SHOT} {sentence}")


# --- predicting, which may be stopped and continued -----------------------------------------------
@dataclass
class Scored:
    """What one run says about N rows."""

    predictions: list  # N records
    sums: np.ndarray  # (N, 3) its reference_sums, 0 for the rows without a text
    seconds: float


def prepare(out, overwrite):
    """Makes the folder of the results. With --overwrite, what a stopped call left there goes."""
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        remove_parts(out)


def remove_parts(out):
    """Removes what `score_rows` has kept, and no other file."""
    for path in out.glob("scored-*.part"):
        path.unlink()


def score_rows(run, rows, args):
    """Scores all rows with one run, and has it write texts for the first --explain: Scored.

    The three pieces of this work are kept in a file of --out until all runs are done, so that a
    stopped command continues. The file's name is a hash of what decides about its content.
    """
    explained = rows[: args.explain]
    others = rows[len(explained) :]

    def texts():
        return run.predict(explained, True, args.batch, progress=bool(explained))

    def probabilities():
        return run.predict(others, False, args.batch, progress=bool(others))

    def references():
        return run.reference_sums(explained, args.batch, progress=bool(explained)).tolist()

    def timed(work):
        started = time.perf_counter()
        result = work()
        return {"result": result, "seconds": time.perf_counter() - started}

    job = [
        run.name,
        run.about,
        run.prompts.settings(),
        asdict(run.fitted),
        rows,
        len(explained),
        args.batch,
        args.dtype,
        versions(),
    ]
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    part = args.out / f"scored-{digest[:16]}.part"
    if part.exists():
        print(f"run {run.name}: what was scored before is kept; --overwrite scores it again")

    work = [texts, probabilities, references]
    pieces = list(continue_job(part, {"run": run.name, "sha256": digest}, work, timed))
    with_text, without_text, reference_sums = [piece["result"] for piece in pieces]

    sums = np.zeros((len(rows), 3))
    if explained:
        sums[: len(explained)] = reference_sums
    seconds = sum(piece["seconds"] for piece in pieces)
    return Scored(with_text + without_text, sums, seconds)


def prediction_lines(rows, predictions):
    """The lines of predictions.jsonl: each record, and the group of its row."""
    lines = []
    for row, prediction in zip(rows, predictions, strict=True):
        record = {**prediction, "group": row.get("group")}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return lines


# --- measuring ------------------------------------------------------------------------------------
class Comparison:
    """Measures scorers on the same rows, and all others against the first."""

    def __init__(self, rows, file_rows, args):
        self.rows = rows
        self.file_rows = file_rows  # which may hold more, see `evidence_scores`
        self.args = args
        self.y = [row["label"] for row in rows]
        self.groups = [row.get("group") for row in rows]
        self.true_p = np.array([row.get("probability", np.nan) for row in rows])
        self.first = {}  # {name of a metric: p or sums of the first scorer}

    def measure(self, p, decisions=None, sums=None):
        """`score_metrics` of one score."""
        draws, seed = self.args.draws, self.args.seed
        metrics = score_metrics(
            self.y, p, decisions, self.groups, draws, seed, self.true_p, sums, self.first
        )
        if not self.first:
            self.first = {"auroc": p, "log_loss": p, "reference_nll": sums}
        return {"calibrated": False, **metrics}

    def measure_run(self, run, scored, has_threshold):
        """{scorer: metrics} of a run's own score, the same as it came, and the label words'.

        The texts count with the run's own score. has_threshold: whether its decisions do, too.
        """

        def column(key):
            return np.array([prediction[key] for prediction in scored.predictions])

        # the run's own score
        decisions = column("label") if has_threshold else None
        sums = scored.sums[:, [0, 2]] if scored.sums.any() else None
        own = self.measure(column("probability"), decisions, sums)

        # its texts
        explained = self.rows[: self.args.explain]
        texts = text_metrics(
            explained,
            scored.predictions[: len(explained)],
            scored.sums[: len(explained)],
            self.file_rows,
            self.args.seed,
        )
        own.update(texts)

        own["calibrated"] = (run.fitted.temperature, run.fitted.bias) != (1.0, 0.0)
        own["run"] = run.name
        own["prompts_cut"] = int((column("tokens_cut") > 0).sum())
        own["seconds"] = scored.seconds

        # and the other two
        has_head = run.fitted.scorer == "head"
        own_name = "head" if has_head else "label token"
        scorers = {own_name: own}
        if has_threshold:
            scorers["raw"] = self.measure(column("raw_probability"))
        if has_head:
            scorers["label token"] = self.measure(column("label_token_probability"))
        return scorers


def describe(rows):
    """What eval.json says about the rows themselves."""
    labels = [row["label"] for row in rows]
    groups = [row.get("group") for row in rows]
    simulated = [row for row in rows if "probability" in row]
    bayes_auroc = none_if_undefined(
        auroc,
        [row["label"] for row in simulated],
        [row["probability"] for row in simulated],
    )
    return {
        "n": len(rows),
        "positives": sum(labels),
        "groups": len(set(group_numbers(groups, len(rows)))),
        "bayes_auroc": bayes_auroc,
    }


# --- printing -------------------------------------------------------------------------------------
def print_report(report, args):
    """The rows, a warning if there are too few groups, the tables, and where all of it is."""
    print(f"\n{args.data}: {report['n']} rows, {report['positives']} positive, {report['groups']} "
          f"groups; [95 % interval, groups resampled {args.draws} times]")  # fmt: skip
    if report["bayes_auroc"]:
        print(f"the true p that the rows give has AUROC {report['bayes_auroc']:.3f}: the ceiling")
    if report["groups"] < 20:
        print("warning: under 20 groups the intervals are too narrow")
    print_tables(report["metrics"])
    print(f"\nwrote {args.out}/eval.json and predictions.jsonl")


def print_tables(columns):
    """The tables of {scorer: metrics}, each with the scorers that have any of its columns."""
    tables = {title: keys.split() for title, keys in TABLES.items()}
    tables["other metrics"] = other_metrics(columns)
    for title, keys in tables.items():
        shown = {}
        for name, metrics in columns.items():
            if any(key in metrics for key in keys):
                shown[name] = metrics
        if shown:
            print(f"\n{title}\n{table(shown, keys)}")


def other_metrics(columns):
    """The names of metrics that are in no table: a new metric is printed without a line here."""
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


if __name__ == "__main__":
    run_main(main)
