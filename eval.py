"""Evaluation of runs: how good is the probability, and is the explanation any good?

    python eval.py --run runs/x --data test.jsonl
    python eval.py --run runs/clsgen --run runs/cls --run runs/lm --model models/x --data test.jsonl

Prints a table, and writes eval.json, predictions.jsonl and report.html, a page for people: to
runs/x/eval/test for one run, to out/test for several. --model adds the base model, zero-shot.
Nothing is fitted on --data: each run brings its calibration and threshold; those of the base model
are fitted on --valid.

A run has up to three scores, called scorers, and each is measured by itself: its own p, calibrated
("head", or "label token" where no head was trained); the same p before calibration ("raw"); and, if
it has a head, the probability of the label words ("label token"). The base model is also asked for
a percentage ("stated confidence"). metrics.py and text_metrics.py define the metrics.
Notation: N rows, y (N,) labels, p (N,) probabilities of class 1.
"""

import argparse
import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np

from clsgen import CLSGen
from data import read_rows
from metrics import (
    auroc, calibrated, clipped_logit, curves, group_numbers, interval_warnings, none_if_undefined,
    score_metrics)
from plumbing.checkpoint import base_fingerprint, load_llama
from plumbing.eval_tables import print_report
from plumbing.files import continue_job, sha256_of, write_atomically
from plumbing.model_checks import check_base
from plumbing.packed import pack
from plumbing.script import Help, dtype_name, refuse, run_main, versions
from prompts import Prompts
from report import write_report
from run import Fitted, Run, fit, load_run
from text_metrics import text_metrics

ZERO_SHOT = "zero-shot"  # the name of the base model in the results


def main(argv=None):
    args = parse(argv)
    started = time.perf_counter()

    # read the rows and load every run: an error shows now, not after hours of work
    file_rows = read_rows(args.data)
    data = {"file": str(args.data), "sha256": sha256_of(args.data)}
    rows = choose_rows(file_rows, args)
    valid = read_rows(args.valid) if args.valid else []
    loaders = {}  # {name: the function that loads it}
    for folder in args.run:
        loaders[str(folder)] = partial(load_run, folder, args.model, args.dtype, args.device)
    if args.model:
        loaders[ZERO_SHOT] = partial(load_zero_shot, args)
    names = list(loaders)
    for name in names[1:]:  # the first one is loaded right after this
        loaders[name]()

    if args.overwrite:
        remove_parts(args.out)

    # one run after the other: predict, measure, write
    comparison = Comparison(rows, file_rows, args)
    columns = {}  # {scorer: its metrics}
    runs = {}  # {name: what report.py needs to know of it}
    lines = []  # of predictions.jsonl
    base_rate = None  # the share of class 1 that the first run was trained on
    for name, load in loaders.items():
        run = load()
        args.out.mkdir(parents=True, exist_ok=True)  # not before there is a run
        if name == ZERO_SHOT and valid:
            calibrate_zero_shot(run, valid, args)
        is_fitted = name != ZERO_SHOT or bool(valid)  # whether it has calibration and threshold
        scored = score_rows(name, run, rows, args)

        # its own score, and then the others; all that follow are compared with the first run's own
        own_name = "head" if run.fitted.scorer == "head" else "label token"
        measured = {own_name: comparison.measure_own(run, scored, is_fitted)}
        if name == names[0]:
            comparison.compare_with(scored)
            base_rate = run.fitted.base_rate
        measured.update(comparison.measure_others(run, scored))
        if name == ZERO_SHOT:
            measured.update(comparison.measure_stated(run, scored, valid))

        prefix = f"{name} " if len(loaders) > 1 else ""
        for scorer, metrics in measured.items():
            columns[prefix + scorer] = metrics
        runs[name] = comparison.describe_run(name, run, scored, is_fitted)
        runs[name]["scorer"] = prefix + own_name
        lines += prediction_lines(rows, scored)
        write_atomically(args.out / "predictions.jsonl", "".join(lines))
        del run  # makes room for the next one

    # a baseline without a model: the first run's share of class 1 for every row
    columns["majority"] = comparison.measure(np.full(len(rows), base_rate))

    # the results
    report = {
        "metrics": columns,
        **describe(rows),
        "data": data,
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "runs": runs,
        "seconds": time.perf_counter() - started,
        "arguments": vars(args),
        "versions": versions(),
    }
    write_atomically(args.out / "eval.json", json.dumps(report, indent=1, default=str) + "\n")
    remove_parts(args.out)
    write_report(args.out)
    print_report(report, args)


# --- what is scored, and by whom ------------------------------------------------------------------
def parse(argv=None):
    """The arguments. ValueError if some do not fit together or the results are there already."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--run", required=True, type=Path, action="append",
        help="run folder, from train.py; again for each run to compare with the first")
    add("--data", required=True, type=Path, help="JSON Lines file with labels")
    add("--out", type=Path, help="results (default: RUN/eval/DATA; of several runs, out/DATA)")
    add("--overwrite", action="store_true", help="replace results that are there, or half there")
    add("--tables", action="store_true", help="print all metrics, not only the most important ones")

    add = parser.add_argument_group("the base model").add_argument
    add("--model", help="folder of the base model: scored as well, zero-shot, with the first run's "
        "prompts (default: not, and each run names its base)")
    add("--valid", type=Path, help="validation rows: calibrate the base model's p as a run's is")

    add = parser.add_argument_group("how much").add_argument
    add("--rows", type=int, help="only the first N rows of a seeded shuffle (default: all)")
    add("--explain", type=int, help="texts for the first N of that shuffle only (default: all)")
    add("--draws", type=int, default=1000, help="resamples for intervals and for the ECE floor")
    add("--seed", type=int, default=0, help="of the shuffle and the resamples")

    add = parser.add_argument_group("the machine").add_argument
    add("--batch", type=int, default=16, help="rows at a time")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the run's")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)

    if args.out is None:
        results = args.run[0] / "eval" if len(args.run) == 1 else Path("out")
        args.out = results / args.data.stem

    problems = []

    def check(name, least):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name} is {value}, expected {least} or more")

    for name in ("rows", "batch", "draws"):
        check(name, least=1)
    for name in ("explain", "seed"):
        check(name, least=0)
    if args.valid and not args.model:
        problems.append("--valid is for the base model, of --model; runs are calibrated already")
    if len(set(args.run)) < len(args.run):
        problems.append("--run names one folder twice")
    if args.model and ZERO_SHOT in map(str, args.run):
        problems.append(f"--run {ZERO_SHOT}: the base model has this name; rename the folder")
    if (args.out / "eval.json").exists() and not args.overwrite:
        problems.append(f"{args.out}/eval.json exists; give another --out or --overwrite")
    refuse(problems)
    return args


def choose_rows(file_rows, args):
    """All rows; with --rows or --explain, the first of a seeded shuffle.

    ValueError if they are all of one class.
    """
    if args.rows is None and args.explain is None:
        return file_rows
    order = np.random.default_rng(args.seed).permutation(len(file_rows))
    rows = [file_rows[i] for i in order[: args.rows]]

    labels = {row["label"] for row in rows}
    if len(labels) < 2:
        raise ValueError(f"--rows {args.rows} leaves one class only; give more")
    return rows


def load_zero_shot(args):
    """The base model with the first run's prompts, as a run that answers by its label-token score.

    It has neither calibration nor threshold.
    """
    first = load_run(args.run[0], args.model, args.dtype, args.device)
    dtype = first.llama.norm.weight.dtype
    device = first.device
    prompts = Prompts(args.model, **first.prompts.settings())
    check_base(prompts, args.model)
    fitted = Fitted(scorer="label_token", base_rate=first.fitted.base_rate)
    del first  # a GPU may have room for one model only

    llama = load_llama(args.model, dtype, device)
    model = CLSGen(pack(llama)).eval()
    run = Run(model, prompts, fitted, name=ZERO_SHOT, has_lora=False)
    run.about = {"base_fingerprint": base_fingerprint(args.model)}
    return run


def calibrate_zero_shot(run, valid, args):
    """Fits the base model's calibration and threshold on `valid`, as train.py fits a run's."""
    y = [row["label"] for row in valid]
    z = run.raw_logits(valid, args.batch, progress="validation rows")
    run.fitted, sentence = fit(run.fitted.scorer, y, z, run.fitted.base_rate)
    print(f"{ZERO_SHOT}: {sentence}")


# --- the confidence that the base model states, as a baseline -------------------------------------
ASK_PERCENTAGE = ('How likely is it that the answer is "{}"? '
                  "Reply with a percentage from 0 to 100, and with nothing else.")


def ask_percentages(run, rows, args):
    """Has the base model say in percent how likely class 1 is: its answers, as texts.

    The prompt is that of all other scores, with the instruction below the row's text.
    """
    settings = {**run.prompts.settings(), "max_answer": 16}
    prompts = Prompts(args.model, **settings)
    instruction = ASK_PERCENTAGE.format(prompts.labels[1])
    prompts = prompts.with_instruction(instruction)

    asked = Run(run.model, prompts, run.fitted, run.name, has_lora=False)
    records = asked.predict(rows, batch_size=args.batch, progress="stated confidence")
    return [record["explanation"] for record in records]


def read_percentage(answer):
    """The first number from 0 to 100 in an answer, as a probability; None if there is none.

    0 % and 100 % become .5 % and 99.5 %: a whole percentage is rounded, and a p of 0 or 1 would
    cost a single wrong row 36 nats of log loss.
    """
    for number in re.findall(r"\d+(?:\.\d+)?", answer):
        if float(number) <= 100:
            return min(max(float(number) / 100, 0.005), 0.995)
    return None


def stated_confidence(answers, base_rate):
    """(p (N,), the share of answers that cannot be read). Those get the base rate."""
    read = [read_percentage(answer) for answer in answers]
    p = [base_rate if value is None else value for value in read]
    return np.array(p), float(np.mean([value is None for value in read]))


# --- predicting, which may be stopped and continued -----------------------------------------------
@dataclass
class Scored:
    """What one run says about N rows. The first M of them, M <= N, were asked for a text."""

    predictions: list  # N records
    rereadings: list  # M records of the explanations, None where one is empty
    sums: np.ndarray  # (M, 3) the run's reference_sums
    percentages: list  # the N answers of the base model to ASK_PERCENTAGE; of a run, none
    seconds: float

    def column(self, key):
        """(N,) one value of every record."""
        return np.array([prediction[key] for prediction in self.predictions])

    def nll_sums(self):
        """(N, 2) what `per_token` makes the reference NLL of; None without a reference text."""
        if not self.sums.any():
            return None
        sums = np.zeros((len(self.predictions), 2))
        sums[: len(self.sums)] = self.sums[:, [0, 2]]
        return sums


def score_rows(name, run, rows, args):
    """Scores all rows with one run, and has it write texts for the first --explain rows: Scored.

    The work has four units, and a fifth for the base model. Their results are kept in a file of
    --out until all runs are done, so that a stopped command continues.
    """
    explained = rows[: args.explain]
    others = rows[len(explained) :]
    done = {}  # {unit: its result}; the loop below fills it, so "rereadings" finds the texts there
    units = {
        "texts": lambda: run.predict(
            explained, batch_size=args.batch, progress="probabilities and texts"),
        "probabilities": lambda: run.predict(
            others, explain=False, batch_size=args.batch, progress="probabilities"),
        "references": lambda: run.reference_sums(
            explained, args.batch, progress="reference losses").tolist(),
        "rereadings": lambda: reread(run, done["texts"], args),
    }
    if name == ZERO_SHOT:
        units["percentages"] = lambda: ask_percentages(run, rows, args)

    def score(unit):
        started = time.perf_counter()
        result = units[unit]()
        return {"result": result, "seconds": time.perf_counter() - started}

    part = part_file(run, rows, args)
    if part.exists():
        print(f"{name}: what was scored before is kept; --overwrite scores it again")
    seconds = 0.0
    job = continue_job(part, {"run": run.name}, list(units), score)
    for unit, scored in zip(units, job, strict=True):
        done[unit] = scored["result"]
        seconds += scored["seconds"]
    return Scored(
        predictions=done["texts"] + done["probabilities"],
        rereadings=done["rereadings"],
        sums=np.array(done["references"]).reshape(-1, 3),
        percentages=done.get("percentages", []),
        seconds=seconds,
    )


def reread(run, predictions, args):
    """Has a run read its own explanations, without the label word, each as if it were a text.

    Returns their records in the same order, None where an explanation is empty.
    """
    explanations = [prediction["explanation"] for prediction in predictions]
    places = [i for i, text in enumerate(explanations) if text.strip()]
    texts = [explanations[i] for i in places]
    found = run.predict(texts, explain=False, batch_size=args.batch, progress="reading again")

    records = [None] * len(explanations)
    for i, record in zip(places, found, strict=True):
        records[i] = record
    return records


def part_file(run, rows, args):
    """Where a run's results are kept: its name is a hash of everything that its content depends on.

    Thus a command with other rows or another --batch scores again, and does not mix the two.
    """
    content = {
        "run": run.name,
        "about": run.about,
        "prompts": run.prompts.settings(),
        "fitted": asdict(run.fitted),
        "rows": rows,
        "explain": args.explain,
        "batch": args.batch,
        "dtype": dtype_name(run.llama.norm.weight.dtype),
        "device": str(run.device),
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return args.out / f"scored-{digest[:16]}.part"


def remove_parts(out):
    """Removes the files of `part_file`, and no others."""
    for path in out.glob("scored-*.part"):
        path.unlink()


def prediction_lines(rows, scored):
    """The lines of predictions.jsonl: each record, the row's group, the loss of its explanation."""
    sums = scored.nll_sums()
    if sums is None:
        sums = np.zeros((len(rows), 2))

    lines = []
    for row, prediction, (nll, tokens) in zip(rows, scored.predictions, sums, strict=True):
        record = {
            **prediction,
            "group": row.get("group"),
            "reference_nll": float(nll),
            "reference_tokens": int(tokens),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return lines


# --- measuring ------------------------------------------------------------------------------------
class Comparison:
    """Measures scores of the same N rows, and compares them with the first run's."""

    def __init__(self, rows, file_rows, args):
        self.rows = rows
        self.file_rows = file_rows  # which may hold more, see `evidence_scores`
        self.args = args
        self.y = [row["label"] for row in rows]
        self.groups = [row.get("group") for row in rows]
        self.true_p = np.array([row.get("probability", np.nan) for row in rows])
        self.first = {}  # {name of a metric: the first run's p or sums}

    def compare_with(self, scored):
        """All scores that are measured from now on get the difference from this run's own score."""
        p = scored.column("probability")
        self.first = {"auroc": p, "log_loss": p, "reference_nll": scored.nll_sums()}

    def measure(self, p, decisions=None, sums=None):
        """`score_metrics` of one score."""
        metrics = score_metrics(
            self.y,
            p,
            decisions,
            groups=self.groups,
            draws=self.args.draws,
            seed=self.args.seed,
            true_p=self.true_p,
            sums=sums,
            first=self.first,
        )
        return {"calibrated": False, **metrics}

    def measure_own(self, run, scored, is_fitted):
        """The metrics of a run's own score and of its texts.

        is_fitted: whether it has a threshold, so that its decisions count.
        """
        decisions = scored.column("label") if is_fitted else None
        own = self.measure(scored.column("probability"), decisions, scored.nll_sums())

        explained = self.rows[: self.args.explain]
        texts = text_metrics(
            explained,
            scored.predictions[: len(explained)],
            scored.rereadings,
            scored.sums,
            self.file_rows,
            self.args.seed,
        )
        own.update(texts)

        own["calibrated"] = run.fitted.is_calibrated()
        own["run"] = run.name
        own["n_disagree"] = sum(record["agree"] is False for record in scored.predictions)
        own["prompts_cut"] = int((scored.column("tokens_cut") > 0).sum())
        own["seconds"] = scored.seconds
        return own

    def measure_others(self, run, scored):
        """{scorer: metrics} of the own score before calibration, and of the label words next to it.

        Each only where it is not the own score itself.
        """
        others = {}
        if run.fitted.is_calibrated():
            others["raw"] = self.measure(scored.column("raw_probability"))
        if run.fitted.scorer == "head":
            others["label token"] = self.measure(scored.column("label_token_probability"))
        return others

    def measure_stated(self, run, scored, valid):
        """{scorer: metrics} of the confidence that the base model states.

        With rows of `valid`, it is calibrated on them, as a run's p is.
        """
        base_rate = run.fitted.base_rate
        raw, unreadable = stated_confidence(scored.percentages, base_rate)
        measured_raw = self.measure(raw)
        if not valid:
            return {"stated confidence": {**measured_raw, "unreadable": unreadable}}

        # what it says about the validation rows gives calibration and threshold
        y = [row["label"] for row in valid]
        stated, _ = stated_confidence(ask_percentages(run, valid, self.args), base_rate)
        fitted, sentence = fit(run.fitted.scorer, y, clipped_logit(stated), base_rate)
        print(f"{ZERO_SHOT} stated confidence: {sentence}")

        p = calibrated(clipped_logit(raw), fitted.temperature, fitted.bias)
        own = self.measure(p, p >= fitted.threshold)
        own["calibrated"] = fitted.is_calibrated()
        own["unreadable"] = unreadable
        measured = {"stated confidence": own}
        if fitted.is_calibrated():
            measured["stated confidence raw"] = measured_raw
        return measured

    def describe_run(self, name, run, scored, is_fitted):
        """What eval.json says about a run, next to its metrics: what it is, and its curves."""
        return {
            "folder": None if name == ZERO_SHOT else name,
            "fingerprint": run.name,
            "base": run.about.get("base", self.args.model),
            "base_fingerprint": run.about["base_fingerprint"],
            "prompts": run.prompts.settings(),
            "fitted": run.fitted.settings() if is_fitted else None,
            "curves": curves(self.y, scored.column("probability"), self.groups,
                             min(self.args.draws, 200), self.args.seed),
        }


def describe(rows):
    """What eval.json says about the rows themselves, as a dict."""
    labels = [row["label"] for row in rows]
    groups = [row.get("group") for row in rows]
    bayes_auroc = None  # the true p's, on the same rows as the runs' AUROC
    if all("probability" in row for row in rows):
        true_p = [row["probability"] for row in rows]
        bayes_auroc = none_if_undefined(auroc, labels, true_p)

    return {
        "n": len(rows),
        "positives": sum(labels),
        "groups": len(set(group_numbers(groups, len(rows)))),
        "bayes_auroc": bayes_auroc,
        "warnings": interval_warnings(labels, groups),
    }


if __name__ == "__main__":
    run_main(main, when_stopped="stopped; the same command continues")
