"""report.html: what an evaluation found, as one page that a person reads.

    python report.py runs/x/eval/test      # eval.py has written it already; this writes it again

Reads eval.json and predictions.jsonl in that folder, the data file, and the log.jsonl of each run.
Without the data file, or if it has changed, the page leaves the rows' texts out and says so.

The page needs nothing but itself: no network, no library. Every text in it is escaped
(plumbing/markup.py), and its Content-Security-Policy lets no script run but plumbing/report.js,
which has the threshold slider and the list of predictions. The frame of the page is
plumbing/report.html, its look is plumbing/report.css, and the pictures are drawn in
plumbing/drawings.py.
"""

import argparse
import base64
import hashlib
from datetime import datetime
from pathlib import Path
from string import Template

import numpy as np

from metrics import equal_mass_bins
from plumbing.drawings import distribution, interval, reliability, risk, roc, sample, training
from plumbing.files import sha256_of, write_atomically
from plumbing.markup import escaped, joined, json_text, tag
from plumbing.remarks import count_shared
from plumbing.report_data import data_for_page
from plumbing.report_files import lacks_something, read_evaluation, rows_by_id
from plumbing.resume import name_hashes_by_role
from plumbing.script import Help, run_main
from plumbing.tables import cell

HEADLINES = [  # (name in eval.json, title, how to read it, the value that a dotted line marks)
    ("auroc", "AUROC", "Higher is better: 1 is a perfect ranking, 0.5 is chance.", 0.5),
    ("log_loss", "Log loss", "Lower is better: 0 is perfect. A useful probability has less than "
     "the majority, which gives every row the same one.", None),
    ("f1", "F1 at the run's threshold", "Higher is better: 1 is perfect.", None),
    ("slope", "Calibration slope", "1 is ideal; below 1, probabilities are too extreme.", 1),
    ("intercept", "Calibration intercept", "0 is ideal; below 0, probabilities are too high.", 0),
    ("ece", "Calibration error (ECE)", "Lower is better. Even a perfect probability has some on a "
     "limited number of rows.", None),
    ("parsable", "Texts that state a label", "Higher is better: 1 is all of them.", None),
    ("kappa_matched", "Agreement of text and probability (kappa)",
     "At the threshold that suits both best, not the run's. Higher is better: 0 is chance.", 0),
    ("rep_4", "Repetition within a text", "Lower is better: 0 is none.", None),
    ("reference_nll", "Reference loss of the text", "Lower is better, in nats a token.", None),
]
CALIBRATION = ("log_loss", "slope", "intercept", "ece")  # also shown before calibration
TRAINING = {  # name in log.jsonl: (title, unit) of a picture
    "bce": ("label loss", "nats a row"),
    "lm": ("text loss", "nats a token"),
    "auroc": ("AUROC on validation rows", "AUROC"),
    "base_kl": ("distance from the base model (KL)", "nats a token"),
    "rep_4": ("repetition in texts", "share of word sequences"),
    "parsable": ("texts that state a label", "share of texts"),
}
FROM_0_TO_1 = ("auroc", "f1", "parsable", "kappa_matched", "rep_4")

GLOSSARY = [  # (metric, what it is and how to read it: the good direction, perfect, useless)
    ("Probability (p)", "how likely class 1 is, from 0 to 1. Of the rows with p = 0.7, seven in "
     "ten should be of class 1."),
    ("95 % interval", "where the number would probably be on all rows of this kind, of which the "
     "test rows are a sample. It does not contain what another training would change."),
    ("AUROC", "the chance that a random row of class 1 has a higher probability than a random row "
     "of class 0. Higher is better; perfect 1, useless 0.5."),
    ("Log loss", "the mean of -log of the true class's probability. Lower is better; perfect 0; "
     "useless is what the majority has, and 0.693 is a coin's."),
    ("Precision", "the share of the rows decided as class 1 that are of class 1. Higher is better; "
     "perfect 1; useless is the share of class 1."),
    ("Recall", "the share of the rows of class 1 that are found. Higher is better; perfect 1, and "
     "also 1 if everything is decided as class 1, so read it with precision."),
    ("F1", "the harmonic mean of precision and recall. Higher is better; perfect 1; useless is "
     "what always deciding for class 1 has."),
    ("Accuracy", "the share of right decisions. Higher is better; perfect 1; useless is the share "
     "of the more frequent class."),
    ("Slope and intercept", "of a logistic regression of the label on the log-odds of p. Perfect 1 "
     "and 0; a slope of 0 means that p says nothing."),
    ("Calibration error", "how far p is from the observed share of class 1, on average over 15 "
     "bins with equally many rows. Lower is better, down to what a perfect probability has here."),
    ("Reliability", "the observed share at each probability. A perfect probability follows the "
     "diagonal; a useless one is a level line. The band holds 95 % of the curves of resamples."),
    ("Risk and coverage", "how many decisions at p = 0.5 are wrong if the rows nearest to 0.5 are "
     "left undecided. With a good p the line falls towards the left; with a useless one it is "
     "level."),
    ("Kappa", "how far two sets of labels agree beyond chance. Higher is better; perfect 1, "
     "useless 0. Text and p come from one model: agreement alone does not prove a reason."),
    ("Repetition", "the share of four-word sequences in a text that repeat earlier ones. Lower is "
     "better; perfect 0; a text that has collapsed is near 1."),
    ("Reference loss", "the mean of -log of the probability of each token of the rows' own "
     "explanations. Lower is better; useless is what the base model has."),
    ("Distance from the base model (KL)", "how far the model's next words are from those before "
     "training, in nats a token. 0 is no change; it has no best value."),
]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    parser.add_argument("folder", type=Path, help="with eval.json, from eval.py")
    args = parser.parse_args(argv)
    try:
        path = write_report(args.folder)
    except (KeyError, TypeError) as error:  # the page needs what an earlier version did not write
        raise lacks_something(args.folder, error) from error
    print(f"wrote {path}")


def write_report(folder):
    """Writes report.html into a folder that eval.py has written, and returns its path.

    ValueError if the folder's files are missing or damaged.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_atomically(path, page(read_evaluation(folder)))
    return path


# --- the page -------------------------------------------------------------------------------------
def page(evaluation):
    """The whole page: plumbing/report.html with what this evaluation fills in."""
    runs = evaluation.runs
    data, left_out = data_for_page(evaluation)
    title = f"{' and '.join(run.name for run in runs)} on {evaluation.results['data']['file']}"
    questions = dict.fromkeys(run.about["prompts"]["question"] for run in runs)

    # no script and no style but these two, and nothing from elsewhere
    script = asset("report.js")
    style = asset("report.css")
    policy = (f"default-src 'none'; script-src '{hash_of(script)}'; style-src '{hash_of(style)}'; "
              f"base-uri 'none'; form-action 'none'")

    return Template(asset("report.html")).substitute(
        policy=policy,
        style=style,
        title=escaped(title),
        question=escaped(" / ".join(questions)),
        short=in_short(evaluation),
        measured=measured(evaluation),
        warnings=warnings(evaluation),
        numbers=numbers(evaluation),
        pictures=pictures(runs),
        left_out=tag("p", left_out, class_="note") if left_out else "",
        reading=definitions(GLOSSARY),
        data=json_text(data),
        script=script,
    )


def asset(name):
    """The text of a file of plumbing/."""
    return (Path(__file__).parent / "plumbing" / name).read_text(encoding="utf-8")


def hash_of(source):
    """The hash by which a Content-Security-Policy lets one script or style be used."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def definitions(entries):
    """[(term, text)] as a list of definitions."""
    pairs = [tag("div", tag("dt", term), tag("dd", text)) for term, text in entries]
    return tag("dl", joined(pairs))


# --- in short -------------------------------------------------------------------------------------
def in_short(evaluation):
    """What was found, run by run, in the words of its decisions."""
    results = evaluation.results
    found = []
    for run in evaluation.runs:
        no, yes = run.words()
        y = run.column("true_label")
        decided = run.column("label")
        n_decided = int(decided.sum())
        wrong = int(((decided == 1) & (y == 0)).sum())
        missed = int(((decided == 0) & (y == 1)).sum())
        found.append(f"{run.name} decides {yes} for {n_decided} of {len(y)} rows, {wrong} of them "
                     f"wrongly, and misses {missed} of the {int(y.sum())} rows that are {yes}.")

        ranked = (f"A random row that is {yes} has a higher probability than a random row that is "
                  f"{no} in {run.metrics['auroc']:.0%} of cases (AUROC)")
        if results["bayes_auroc"] is not None:
            ranked += f"; {results['bayes_auroc']:.0%} is the most that can be expected here"
        found.append(f"{ranked}.")

        explained = [record for record in run.records if record["explanation"] is not None]
        disagree = sum(record["stated_label"] != record["label"] for record in explained)
        if explained:
            found.append(f"{disagree} of its {len(explained)} texts do not state what is decided.")
    return tag("ul", joined(tag("li", sentence) for sentence in found))


# --- what was measured, and what to be careful about ----------------------------------------------
def measured(evaluation):
    """Data, question, runs, and how the evaluation was made, in sentences."""
    results = evaluation.results
    runs = evaluation.runs
    no, yes = runs[0].words()
    n = results["n"]
    positives = results["positives"]
    explained = sum(record["explanation"] is not None for record in runs[0].records)

    entries = []
    questions = dict.fromkeys(run.about["prompts"]["question"] for run in runs)
    entries.append(("Question", f"{' / '.join(questions)} {yes} is class 1, {no} is class 0."))

    groups = "No two rows share a group."
    if results["groups"] < n:
        groups = f"They come from {results['groups']} groups, which the intervals keep together."
    entries.append(("Test file", f"{results['data']['file']}: {n} rows were scored, {positives} of "
                    f"them ({positives / n:.1%}) are {yes}. {groups} Explanations were written "
                    f"for {explained} rows. SHA-256 {results['data']['sha256'][:16]}."))

    for run in runs:
        entries.append(("Run", describe_run(run)))
    if results["bayes_auroc"] is not None:
        entries.append(("Ceiling", f"The rows are simulated, so their true probability is known. "
                        f"It has an AUROC of {results['bayes_auroc']:.3f}; no run can be expected "
                        f"to have more."))

    date = datetime.fromisoformat(results["date"])
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    entries.append(("Made", f"{date:%d %B %Y, %H:%M}, in {results['seconds']:.0f} seconds, with "
                    f"{packages}."))
    return definitions(entries)


def describe_run(run):
    """One run in a few sentences: what it is, and how it decides."""
    about = run.about
    if about["folder"] is None:
        what = f"The base model {about['base']} without training, asked as the first run is"
    else:
        what = f"{run.name} (fingerprint {about['fingerprint']}), on the base {about['base']}"
    fitted = about["fitted"]
    if fitted is None:
        return f"{what}. It has neither calibration nor threshold; decisions are at 0.5."

    scores = {"head": "score head", "label_token": "label words"}
    how = "not calibrated"
    if run.metrics["calibrated"]:
        how = (f"calibrated on validation rows (temperature "
               f"{fitted['calibration']['temperature']:.3f}, bias "
               f"{fitted['calibration']['bias']:.3f})")
    return (f"{what}. Its probability is that of the {scores[fitted['scorer']]}, {how}; it decides "
            f"{run.words()[1]} from {fitted['threshold']:.3f} on.")


def warnings(evaluation):
    """What makes the numbers less reliable, or the page less complete, as a list."""
    results = evaluation.results
    found = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in results["warnings"]]
    for run in evaluation.runs:
        metrics = run.metrics
        cut = metrics["prompts_cut"]
        if cut:
            found.append(f"{run.name}: {cut} of {results['n']} texts were too long and lost tokens "
                         f"from their middle, which the model did not see.")
        if not metrics["calibrated"]:
            found.append(f"{run.name}: its probability is not calibrated on validation rows.")
        limits = metrics["intervals"]["auroc"]
        if limits and limits[1] < 0.5:
            found.append(f"{run.name}: it ranks these rows the wrong way, worse than chance.")
        elif limits and limits[0] <= 0.5:
            found.append(f"{run.name}: the interval of AUROC contains 0.5. These rows do not show "
                         f"that it ranks better than chance.")
        if metrics["ece"] > metrics["ece_floor_q95"]:
            doubt = (f"{run.name}: its calibration error is above what 95 % of perfect "
                     f"probabilities have on as many rows. {worst_probability(run)}")
            if results["groups"] < results["n"]:
                doubt += (" This takes rows as independent: where the rows of a group are alike, "
                          "more than 5 % of perfect probabilities are above that line.")
            found.append(doubt)
        found += seen_before(run, evaluation)

    if evaluation.no_texts:
        found.append(evaluation.no_texts)
    if not found:
        found.append("Nothing that this page checks: enough rows of each class and enough groups, "
                     "no text cut, no test row seen in training.")
    return tag("ul", joined(tag("li", sentence) for sentence in found), class_="warnings")


def worst_probability(run):
    """In which tenth of the rows p is farthest from the share of class 1, as a sentence."""
    y = run.column("true_label")
    p = run.column("probability")
    bin_of_row = equal_mass_bins(p, 10)  # rows with the same p share one, so some may be empty

    worst = None
    largest_gap = -1.0
    for number in np.unique(bin_of_row):
        rows = np.flatnonzero(bin_of_row == number)
        gap = abs(p[rows].mean() - y[rows].mean())
        if gap > largest_gap:
            worst = rows
            largest_gap = gap
    return (f"Do not take it at its word: of the {len(worst)} rows around {p[worst].mean():.2f}, "
            f"the share of {run.words()[1]} is {y[worst].mean():.2f}.")


def seen_before(run, evaluation):
    """Sentences about test rows that the run's training or its calibration has seen."""
    if run.about["folder"] is None:
        return []
    if not run.log:
        return [f"{run.name}: the log of its training is not there, so this page has no training "
                f"curves, and it is not known whether test rows were trained on."]

    sentences = []
    tested = [evaluation.rows.get(str(record["id"]), {}) for record in run.records]
    config = run.log[0].get("config", {})
    name_hashes_by_role(config)  # logs of earlier versions named them by file
    for key, use in (("data", "training"), ("valid", "validation")):
        name = config.get(key)
        if name is None or not evaluation.rows:
            continue
        rows = rows_as_they_were(Path(name), config.get(f"{key}_sha256"))
        if rows is None:
            sentences.append(f"{run.name}: its {use} file {name} is not there as it was, so it is "
                             f"not known whether test rows are in it.")
            continue
        shared = count_shared(rows.values(), tested)
        for what in ("text", "group"):
            if shared[what]:
                sentences.append(f"{run.name}: {shared[what]} of {len(tested)} test rows share "
                                 f"their {what} with a {use} row. The numbers are too good.")
    return sentences


def rows_as_they_were(path, sha256):
    """{id: row} of a file, or None if it is gone, has changed, or is refused by now."""
    if not path.is_file() or sha256_of(path) != sha256:
        return None
    try:
        return rows_by_id(path)
    except ValueError:
        return None


# --- the numbers ----------------------------------------------------------------------------------
def numbers(evaluation):
    """A block for each headline number, with all that it has to be compared with, then the rest."""
    results = evaluation.results
    titles = titles_of_scorers(evaluation)
    blocks = []
    for key, title, reading, marked in HEADLINES:
        lines = compared(key, results, titles)
        if lines:
            blocks.append(number_block(title, reading, lines, marked, key in FROM_0_TO_1))

    # all metrics of eval.json
    keys = {}
    for metrics in results["metrics"].values():
        keys.update(dict.fromkeys(metrics))
    heads = [tag("th", title, scope="col") for title in ("", *titles.values())]
    lines = [tag("tr", joined(heads))]
    for key in keys:
        if key in ("intervals", "run"):
            continue
        cells = [tag("th", key.replace("_", " "), scope="row")]
        for scorer in titles:
            cells.append(tag("td", cell(results["metrics"][scorer], key)))
        lines.append(tag("tr", joined(cells)))
    everything = tag("details", tag("summary", "All numbers of eval.json"),
                     tag("div", tag("table", joined(lines)), class_="wide", tabindex="0",
                         role="region", aria_label="All numbers"))
    return joined([tag("div", joined(blocks), class_="blocks"), everything])


def titles_of_scorers(evaluation):
    """{scorer of eval.json: its name for a reader}: "runs/x", "runs/x, before calibration"."""
    words = {"raw": "before calibration", "label token": "label words",
             "stated confidence": "the percentage that it states",
             "stated confidence raw": "stated, before calibration"}
    titles = {}
    for scorer in evaluation.results["metrics"]:
        titles[scorer] = scorer
        for run in evaluation.runs:
            prefix = f"{run.name} " if len(evaluation.runs) > 1 else ""
            kind = scorer.removeprefix(prefix)
            if scorer == run.about["scorer"]:
                titles[scorer] = run.name
            elif scorer.startswith(prefix) and kind in words:
                titles[scorer] = f"{run.name}, {words[kind]}"
    return titles


def compared(key, results, titles):
    """[(title, value, interval, remark)] of one metric: those who have it, and what to compare."""
    lines = []
    for scorer, metrics in results["metrics"].items():
        if metrics.get(key) is None or (scorer.endswith("raw") and key not in CALIBRATION):
            continue
        remark = ""
        intervals = metrics["intervals"]
        if metrics.get(f"{key}_difference") is not None and scorer != "majority":
            difference = cell(metrics, f"{key}_difference")
            remark = f"difference from the first: {difference}"
        if key == "ece":
            remark = (f"a perfect probability: {metrics['ece_floor']:.3f}, and in 95 % of files "
                      f"below {metrics['ece_floor_q95']:.3f}")
        lines.append((titles[scorer], metrics[key], intervals.get(key), remark))

    if key == "auroc" and results["bayes_auroc"] is not None:
        lines.append(("the true probability", results["bayes_auroc"], None, "the ceiling"))
    if key == "f1":
        always = 2 * results["positives"] / (results["n"] + results["positives"])
        lines.append(("always class 1", always, None, ""))
    return lines


def number_block(title, reading, lines, marked, is_share):
    """One metric of several scorers: a table with a name, a picture of the interval, a number.

    marked: the value at a dotted line, ideal or useless; None for no line.
    """
    ends = [0.0, 1.0] if is_share else [0.0]
    for _, value, limits, _ in lines:
        ends += [value, *(limits or ())]
    scale = (min(ends), max(ends))

    shown = []
    for name, value, limits, remark in lines:
        picture = interval(value, limits, scale, marked)
        number = [f"{value:.3f} "]
        if limits is not None:
            number.append(tag("span", f"[{limits[0]:.3f}, {limits[1]:.3f}]", class_="limits"))
        if remark:
            number.append(tag("small", remark))
        shown.append(tag("tr", tag("th", name, scope="row"), tag("td", picture),
                         tag("td", *number)))
    return tag("div", tag("h3", title), tag("p", reading), tag("table", joined(shown)),
               class_="block")


# --- pictures -------------------------------------------------------------------------------------
def pictures(runs):
    """All figures, each with a caption that says what to look for."""
    keys = legend(runs)
    figures = [
        figure("Is the probability right?", [
            panel for run in runs for panel in probability_panels(run)],
            "Reliability: the curve is the observed share of class 1 at each probability (isotonic "
            "regression), with a band that holds 95 % of the curves of resampled rows. The dotted "
            "diagonal is ideal; the bars count rows. Distribution: rows of class 1 upwards, of "
            "class 0 downwards; the less the two overlap, the better. The dashed line is the "
            "run's threshold."),
        figure("How well does it rank, and how sure is it?", [
            ("ROC", roc([(run.name, run.about["curves"], chosen_point(run)) for run in runs])),
            ("Risk and coverage, decided at 0.5",
             risk([(run.name, run.about["curves"]) for run in runs]))],
            "ROC: the further towards the upper left, the better; the mark is where the run's "
            "threshold decides, and the dotted diagonal is chance. Risk and coverage: the share of "
            "wrong decisions at 0.5 if the rows nearest to 0.5 are left undecided.", keys),
    ]

    logs = [(run.name, run.log) for run in runs]
    panels = []
    for key, (title, unit) in TRAINING.items():
        title = title[0].upper() + title[1:]
        drawn = training(title, unit, key, logs)
        if drawn is not None:
            panels.append((title, drawn))
    if panels:
        last = " ".join(last_validation(run) for run in runs if run.log)
        figures.append(figure(
            "How did the training go?", panels,
            "The thin line joins the training steps, the marks are validations. A few texts are "
            "watched for signs of collapse: a growing distance from the base model, repetition, "
            f"texts that no longer state a label. {last}", keys))
    return joined(figures)


def probability_panels(run):
    """The two pictures of one run's p."""
    curves = run.about["curves"]
    drawn = distribution(run.name, curves, run.words(), run.threshold())
    return [(f"{run.name}: reliability", reliability(run.name, curves)),
            (f"{run.name}: distribution by true label", drawn)]


def last_validation(run):
    """What was measured at the last validation of a training, as a sentence."""
    measured = [line["valid"] for line in run.log if "valid" in line]
    if not measured:
        return ""
    found = []
    for key, (title, _) in TRAINING.items():
        if measured[-1].get(key) is not None:
            found.append(f"{title} {measured[-1][key]:.3f}")
    return f"Last validation of {run.name}: {', '.join(found)}."


def figure(title, panels, caption, keys=""):
    """Several pictures [(name, SVG)] with one title and one caption."""
    shown = [tag("div", tag("h4", name), drawn, class_="panel") for name, drawn in panels]
    return tag("figure", tag("h3", title), tag("div", joined(shown), class_="panels"), keys,
               tag("figcaption", caption))


def legend(runs):
    """Which line is which run: by dashes and marks, and by colour."""
    entries = [tag("li", sample(i), run.name) for i, run in enumerate(runs)]
    return tag("ul", joined(entries), class_="legend")


def chosen_point(run):
    """(share of class 0, share of class 1) that the run decides as class 1."""
    y = run.column("true_label")
    decided = run.column("label")
    return float(decided[y == 0].mean()), float(decided[y == 1].mean())


if __name__ == "__main__":
    run_main(main)
