"""examples/public_data.py: a few lines of each published file become the rows that were used."""

import json
import sys

import pytest
from conftest import ROOT, assert_refused, run_script

sys.path.insert(0, str(ROOT / "examples"))

from public_data import main  # noqa: E402

ESNLI = {  # premise, hypothesis, label, explanation
    "s1.dev": """\
Two women are embracing while holding to go packages .
Two women are embracing while holding to go packages .
Two women are embracing while holding to go packages .
A premise with the number 7 .
""",
    "s2.dev": """\
The sisters are hugging goodbye while holding to go packages after just eating lunch .
Two woman are holding packages .
The men are fighting outside a deli .
boys play football
""",
    "labels.dev": "neutral\nentailment\ncontradiction\nentailment\n",
    "preproc1_expl_1.dev": """\
the to go packages may not be from lunch .
the packages are packages ;  it 's a way to say that they do n't differ .
women are not men .
boys are boys
""",
}

PAPERS = {
    "5": {"QUESTION": "Is it?", "CONTEXTS": ["It was.", "It is."], "final_decision": "yes",
          "LONG_ANSWER": "It is, we conclude."},
    "12": {"QUESTION": "May it?", "CONTEXTS": ["So."], "final_decision": "maybe",
           "LONG_ANSWER": "Who knows."},
    "31": {"QUESTION": "Will it?", "CONTEXTS": ["No."], "final_decision": "no",
           "LONG_ANSWER": "Never."},
    "4": {"QUESTION": "Does it?", "CONTEXTS": ["No."], "final_decision": "no",
          "LONG_ANSWER": "Not."},
}
PUBMEDQA = {
    "ori_pqal.json": json.dumps(PAPERS),
    "test_ground_truth.json": '{"4": "no", "12": "maybe", "31": "no"}',
}

COLUMNS = ("nctId,outcome_title,outcome_timeFrame,intervention_group_title,"
           "comparator_group_title,label,pValues,nonInferiorityTypes,index,article_title,"
           "article_abstract")
TRIALS = f"""\
{COLUMNS}
NCT1,Change in Pain,12 weeks,Drug,Placebo,1,['0.0123'],"['Superiority or Other', 'Other']",7,\
A trial,\
"BACKGROUND: Pain, it hurts.
CONCLUSION: Less of it."
NCT2,Change in Pain,"6, 9 weeks",Drug,Placebo,2,['0.0123'],['Superiority'],8,Pain,Pain is bad.
NCT2,Falls,1 year,Drug A,Drug B,0,['0.0123'],['Non-Inferiority or Equivalence'],9,Falls,Some fell.
"""
CLINIFACT = {"train_set.csv": TRIALS, "validation_set.csv": TRIALS.replace("NCT1", "NCT3")}

STATEMENTS = """\
Correct Statement,Incorrect Statement,Right Reason1,Confusing Reason1
He poured milk on his cereal.,He poured orange juice on his cereal.,It doesn't taste good.,Wet
He drinks milk.,He drinks apple.,Apple can not be drunk,Wet
he ran  a mile,"Jeff ran 100,000 miles",way to long,Jeff
"""
COMVE = {"train.csv": STATEMENTS, "dev.csv": "\ufeff" + STATEMENTS}


def converted(name, files, tmp_path):
    """{split: rows} that the script makes of these files."""
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    main([name, "--source", str(tmp_path), "--out", str(out)])
    splits = {}
    for path in out.glob("*.jsonl"):
        splits[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return splits


def test_esnli(tmp_path):
    """Fails if neutral pairs stay, ids shift, or a premise's rows are on both sides."""
    found = converted("esnli", ESNLI, tmp_path)
    rows = {row["id"]: row for row in found["train"] + found["test"]}
    assert sorted(rows) == ["esnli-dev-1", "esnli-dev-2", "esnli-dev-3"]
    assert rows["esnli-dev-1"] == {
        "id": "esnli-dev-1",
        "text": "Premise: Two women are embracing while holding to go packages.\n"
                "Hypothesis: Two woman are holding packages.",
        "label": 1,
        "explanation": "The packages are packages;  it's a way to say that they do n't differ.",
        "group": "3dfc172c63",
    }
    assert rows["esnli-dev-2"]["label"] == 0
    assert rows["esnli-dev-2"]["group"] == "3dfc172c63"
    assert [row["id"] for row in found["test"]] == ["esnli-dev-3"]


def test_pubmedqa(tmp_path):
    """Fails if "maybe" stays, or a row of the official test half trains."""
    found = converted("pubmedqa", PUBMEDQA, tmp_path)
    assert found["train"] == [{
        "id": "pubmedqa-5",
        "text": "Question: Is it?\n\nContext: It was. It is.",
        "label": 1,
        "explanation": "It is, we conclude.",
    }]
    assert [row["id"] for row in found["test"]] == ["pubmedqa-31", "pubmedqa-4"]


def test_clinifact(tmp_path):
    """Fails if background papers stay, the claim is worded otherwise, or a p-value is fed."""
    found = converted("clinifact", CLINIFACT, tmp_path)
    evidence, inconclusive = found["train"]
    assert evidence == {
        "id": "clinifact-7",
        "text": "Claim: Drug is superior or other to Placebo in terms of Change in Pain 12 weeks"
                "\n\nTitle: A trial\n\nAbstract: BACKGROUND: Pain, it hurts.\n"
                "CONCLUSION: Less of it.",
        "label": 1,
        "group": "NCT1",
    }
    assert inconclusive["text"].startswith("Claim: Drug A is non-inferior or equivalent to Drug B ")
    assert inconclusive["label"] == 0
    assert "0.0123" not in json.dumps(found)
    assert found["test"][0]["group"] == "NCT3"


def test_comve(tmp_path):
    """Fails if order and label disagree, or a habit of typing is left."""
    found = converted("comve", COMVE, tmp_path)
    first, second, third = found["train"]
    assert first == {
        "id": "comve-train-0",
        "text": "Statement 1: He poured milk on his cereal.\n"
                "Statement 2: He poured orange juice on his cereal.",
        "label": 1,
        "explanation": "It doesn't taste good.",
        "group": "train-0",
    }
    assert second["label"] == 0
    assert second["text"] == "Statement 1: He drinks apple.\nStatement 2: He drinks milk."
    assert third["text"] == "Statement 1: Jeff ran 100,000 miles.\nStatement 2: He ran a mile."
    assert third["explanation"] == "Way to long."

    for row, swapped in zip(found["test"], found["test_swapped"], strict=True):
        assert swapped["id"] == row["id"] + "-swapped"
        assert swapped["label"] == 1 - row["label"]
        assert swapped["text"] != row["text"]
        assert swapped["group"] == row["group"]
    assert found["test"][0]["id"] == "comve-dev-0"


def test_the_drawn_order_is_whole():
    """Fails if a line of the file is lost: all rows after it would change their label."""
    parts = (ROOT / "examples" / "comve_order.txt").read_text().split("\n\n")
    labels = [part.replace("\n", "") for part in parts]
    assert [len(part) for part in labels] == [10_000, 1_000]
    assert [part.count("1") for part in labels] == [4_922, 515]


@pytest.mark.parametrize("name", ["esnli", "comve"])
def test_missing_files_are_named(name, tmp_path):
    """Fails if a file that is not there ends in a traceback, or in half a data set."""
    done = run_script("examples/public_data.py", name, "--source", tmp_path,
                      "--out", tmp_path / "out")
    assert_refused(done, "dev", "published")
    assert not (tmp_path / "out").exists()
