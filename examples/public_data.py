"""Public data sets: from the published files to rows, the ones that docs/results.md was made with.

    python examples/public_data.py esnli --source downloads/esnli --out data/esnli

Nothing is downloaded: put the published files (FILES) into the folder --source, under their own
names. The result is train.jsonl and test.jsonl, and for ComVE test_swapped.jsonl.

e-SNLI (Camburu et al., NeurIPS 2018), https://github.com/OanaMariaCamburu/e-SNLI, MIT; the texts
are from SNLI, CC BY-SA 4.0. Does the premise entail the hypothesis? Neutral pairs are dropped. The
files are the authors' tokenised copy of the development half, from the history of the repository's
folder dataset/: s1.dev and s2.dev of commit c39b05b, labels.dev and preproc1_expl_1.dev of commit
38f9d62, there in dataset/eSNLI/.

PubMedQA (Jin et al., EMNLP 2019), https://github.com/pubmedqa/pubmedqa, MIT. Is the answer to the
question yes? "maybe" is dropped. The test rows are the official ones. The explanation is the
abstract's own conclusion, which the text lacks.

CliniFact, https://github.com/ds4dh/CliniFact, MIT. Is the abstract evidence for the claim, or is it
inconclusive? Background papers of a trial ("no information") are dropped: a bag of words knows them
by their subject. So are the p-values (the label seems to be made from them) and all other columns
that the claim does not need. The test rows are the published validation set. The files are those of
data/processed/primary_outcome_publication_dataset/ in commit 7b3501a. There are no explanations;
benchmarks/real.py takes the abstract's own conclusion.

ComVE, SemEval 2020 Task 4 (Wang et al., 2020), CC BY-SA 4.0, folder "ALL data" of
https://github.com/wangcunxiang/SemEval2020-Task4-Commonsense-Validation-and-Explanation
Which of two statements is against common sense? These two files hold both statements and the
reasons of subtask C in one line a pair. The first of three reasons is the explanation; the
confusing reasons of subtask B are dropped. Test rows are the published development set.
"""

import argparse
import csv
import hashlib
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.files import read_json, write_atomically  # noqa: E402
from plumbing.script import run_main  # noqa: E402

FILES = {
    "esnli": ("s1.dev", "s2.dev", "labels.dev", "preproc1_expl_1.dev"),
    "pubmedqa": ("ori_pqal.json", "test_ground_truth.json"),
    "clinifact": ("train_set.csv", "validation_set.csv"),
    "comve": ("train.csv", "dev.csv"),
}


def main(argv=None):
    args = parse(argv)
    missing = [name for name in FILES[args.name] if not (args.source / name).exists()]
    if missing:
        raise ValueError(f"{args.source} lacks {', '.join(missing)}; "
                         f"{Path(__file__).name} says at its top where they are published")

    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in CONVERTERS[args.name](args.source).items():
        path = args.out / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(path, "".join(lines))
        positives = sum(row["label"] for row in rows)
        print(f"{path}: {len(rows)} rows, {positives} of them of class 1")


# --- e-SNLI ---------------------------------------------------------------------------------------
def convert_esnli(source):
    """{split: rows}. The id is the line's number from 0, the group a hash of the premise."""
    columns = [read_lines(source / name) for name in FILES["esnli"]]
    train = []
    test = []
    for number, (premise, hypothesis, label, why) in enumerate(zip(*columns, strict=True)):
        if label == "neutral":
            continue
        digest = hashlib.sha1(premise.encode()).hexdigest()[:10]
        row = {
            "id": f"esnli-dev-{number}",
            "text": f"Premise: {joined(premise)}\nHypothesis: {joined(hypothesis)}",
            "label": int(label == "entailment"),
            "explanation": capitalised(joined(why)),
            "group": digest,
        }
        # a twelfth of the premises, with all their rows
        side = test if int(digest, 16) % 12 == 0 else train
        side.append(row)

    for rows in (train, test):
        random.Random(0).shuffle(rows)
    return {"train": train, "test": test}


def joined(text):
    """Tokenised text with the spaces before commas, full stops and apostrophes removed."""
    return re.sub(r" ([.,;'])", r"\1", text)


def read_lines(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


# --- PubMedQA -------------------------------------------------------------------------------------
def convert_pubmedqa(source):
    """{split: rows}, the test rows in the order of their ids. Each row is a paper of its own."""
    papers = read_json(source / "ori_pqal.json")
    test_ids = read_json(source / "test_ground_truth.json")
    train = []
    test = []
    for number, paper in papers.items():
        if paper["final_decision"] == "maybe":
            continue
        context = " ".join(paper["CONTEXTS"])
        row = {
            "id": f"pubmedqa-{number}",
            "text": f"Question: {paper['QUESTION']}\n\nContext: {context}",
            "label": int(paper["final_decision"] == "yes"),
            "explanation": paper["LONG_ANSWER"],
        }
        side = test if number in test_ids else train
        side.append(row)

    test.sort(key=lambda row: row["id"])
    return {"train": train, "test": test}


# --- CliniFact ------------------------------------------------------------------------------------
INCONCLUSIVE, EVIDENCE, NO_INFORMATION = "0", "1", "2"

COMPARISONS = {  # as the authors' own scripts word them
    "Superiority": "superior",
    "Superiority or Other": "superior or other",
    "Non-Inferiority": "non-inferior",
    "Equivalence": "equivalent",
    "Non-Inferiority or Equivalence": "non-inferior or equivalent",
}


def convert_clinifact(source):
    """{split: rows}. The group is the trial; some trials are in both splits."""
    splits = {"train": "train_set.csv", "test": "validation_set.csv"}
    converted = {}
    for split, name in splits.items():
        rows = []
        for line in read_csv(source / name):
            if line["label"] == NO_INFORMATION:
                continue
            text = (f"Claim: {claim(line)}\n\nTitle: {line['article_title']}\n\n"
                    f"Abstract: {line['article_abstract']}")
            rows.append({
                "id": f"clinifact-{line['index']}",
                "text": text,
                "label": int(line["label"] == EVIDENCE),
                "group": line["nctId"],
            })
        converted[split] = rows
    return converted


def claim(line):
    """What a trial's record says that it tests, as a sentence."""
    kinds = re.findall(r"'([^']*)'", line["nonInferiorityTypes"])
    comparison = COMPARISONS[kinds[0]]
    return (f"{line['intervention_group_title']} is {comparison} to "
            f"{line['comparator_group_title']} in terms of {line['outcome_title']} "
            f"{line['outcome_timeFrame']}")


# --- ComVE ----------------------------------------------------------------------------------------
def convert_comve(source):
    """{split: rows}, and the test rows with the two statements in the other order.

    The files say which statement makes sense. Which one stands first was drawn once, for each pair:
    comve_order.txt has the resulting labels, those of train.csv, a blank line, those of dev.csv.
    """
    order = Path(__file__).with_name("comve_order.txt").read_text(encoding="ascii")
    converted = {"train": [], "test": [], "test_swapped": []}
    for part, digits in zip(("train", "dev"), order.split("\n\n"), strict=True):
        labels = digits.replace("\n", "")
        for number, line in enumerate(read_csv(source / f"{part}.csv")):
            label = int(labels[number])
            row = {
                "id": f"comve-{part}-{number}",
                "text": pair(line, label),
                "label": label,
                "explanation": sentence(line["Right Reason1"]),
                "group": f"{part}-{number}",
            }
            if part == "train":
                converted["train"].append(row)
                continue
            swapped = {
                **row,
                "id": f"{row['id']}-swapped",
                "text": pair(line, 1 - label),
                "label": 1 - label,
            }
            converted["test"].append(row)
            converted["test_swapped"].append(swapped)
    return converted


def pair(line, label):
    """Both statements; the second is the one against common sense if the label is 1."""
    statements = [sentence(line["Incorrect Statement"]), sentence(line["Correct Statement"])]
    if label == 1:
        statements.reverse()
    first, second = statements
    return f"Statement 1: {first}\nStatement 2: {second}"


def sentence(text):
    """The text with single spaces, a capital letter and a full stop, so that no typing habit of the
    crowd workers tells the classes apart."""
    text = capitalised(" ".join(text.split()))
    if text[-1] not in ".!?":
        text += "."
    return text


# --- shared ---------------------------------------------------------------------------------------
def capitalised(text):
    return text[:1].upper() + text[1:]


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


CONVERTERS = {
    "esnli": convert_esnli,
    "pubmedqa": convert_pubmedqa,
    "clinifact": convert_clinifact,
    "comve": convert_comve,
}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", choices=FILES, help="data set")
    add("--source", type=Path, required=True, help="folder of the published files")
    add("--out", type=Path, required=True, help="folder of train.jsonl and test.jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
