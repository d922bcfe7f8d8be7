"""The synthetic discharge notes: how they are made, and what a bag of words can get out of them.

Every test names the mutation of examples/discharge/generate.py (or of the committed files) that it
would catch."""

import json
import math

import pytest
from conftest import ROOT, run_script
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

FOLDER = ROOT / "examples" / "discharge"
SIZES = {"train": 1200, "valid": 1000, "test": 500}

# Written out again, so that a change of a weight or of a frame in generate.py is seen here.
INTERCEPT = -5.6
WEIGHTS = {
    "metastatic cancer": 6.4, "spreading cancer": 6.4, "severe sepsis": 5.8, "blood poisoning": 5.8,
    "heart failure": 5.3, "cardiac failure": 5.3, "low oxygen levels": 4.8,
    "laboured breathing": 4.8, "kidney failure": 4.3, "renal failure": 4.3, "frequent falls": 3.8,
    "repeated falls": 3.8, "independent walking": -5.6, "unaided walking": -5.6,
    "family support": -5.0, "supportive relatives": -5.0,
}
NEGATED = [
    "The patient has no {}.", "no history of {}", "no signs of {}", "{} was ruled out",
    "Asked about {}, the patient denies it", "{} as absent",
    "Family history of {}, none in the patient", "The patient never had {}",
]
CITES = {True: ("risk is raised by", "Danger"), False: ("risk is lowered by", "Protection")}
DIES = ("Death within 30 days is likely", "risk of death is high", "the patient died")
SURVIVES = ("Survival beyond 30 days", "risk of death is low", "the patient survived")


@pytest.fixture(scope="module")
def splits():
    files = {split: (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") for split in SIZES}
    return {split: [json.loads(x) for x in text.splitlines()] for split, text in files.items()}


@pytest.fixture(scope="module")
def rows(splits):
    return [row for split in SIZES for row in splits[split]]


def column(rows, field):
    return [row[field] for row in rows]


def test_the_committed_files_are_what_the_seed_gives(tmp_path):
    """Fails if a draw moves, the seed changes, or a committed file was edited by hand."""
    run_script(FOLDER / "generate.py", "--out", tmp_path).check_returncode()
    for split in SIZES:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_rows_are_complete_unique_and_short(splits, rows):
    """Fails if a split loses a row, a field is renamed, an id repeats, a test note is a training
    note too (`seen` restarted per split), or a row leaves the planned 40-70 tokens (1.2 a word)."""
    assert {split: len(part) for split, part in splits.items()} == SIZES
    fields = ["id", "text", "label", "explanation", "probability", "evidence"]
    assert all(list(row) == fields for row in rows)
    assert len(set(column(rows, "id"))) == len(set(column(rows, "text"))) == len(rows)
    assert all(32 <= len(row["text"].split()) <= 56 for row in rows)
    assert all(12 <= len(row["explanation"].split()) <= 32 for row in rows)


def test_evidence_is_what_the_note_asserts_and_gives_the_probability(rows):
    """Fails if evidence takes a negated mention, misses an asserted one, or alters its spelling; if
    a weight, a sign or the intercept changes, or a negated factor counts too."""
    for row in rows:
        mentioned = {phrase for phrase in WEIGHTS if phrase in row["text"]}
        negated = {p for p in mentioned if any(n.format(p) in row["text"] for n in NEGATED)}
        assert len(mentioned) == 4 and set(row["evidence"]) == mentioned - negated, row["id"]
        assert 1 <= len(row["evidence"]) <= 3, row["id"]
        logit = INTERCEPT + sum(WEIGHTS[phrase] for phrase in row["evidence"])
        assert row["probability"] == round(1 / (1 + math.exp(-logit)), 4), row["id"]


def test_labels_are_drawn_from_the_probability(rows):
    """Fails if the label is the rounded probability, or is drawn from another one."""
    surprise = sum(row["label"] - row["probability"] for row in rows)
    variance = sum(row["probability"] * (1 - row["probability"]) for row in rows)
    assert abs(surprise) < 3 * variance**0.5
    # A label that follows the odds every time would never be against them.
    expected = sum(min(row["probability"], 1 - row["probability"]) for row in rows)
    against = sum((row["probability"] >= 0.5) != row["label"] for row in rows)
    assert abs(against - expected) < 3 * variance**0.5


def test_a_factor_is_asserted_as_often_as_negated(rows):
    """Fails if the coin is not fair, or if notes that assert everything are kept."""
    for weight in set(WEIGHTS.values()):
        phrases = [phrase for phrase in WEIGHTS if WEIGHTS[phrase] == weight]
        mentions = sum(phrase in row["text"] for row in rows for phrase in phrases)
        asserted = sum(phrase in row["evidence"] for row in rows for phrase in phrases)
        standard_error = 0.5 / mentions**0.5
        assert abs(asserted / mentions - 0.5) < 3 * standard_error, phrases


def test_the_explanation_cites_the_evidence_and_argues_for_the_label(rows):
    """Fails if a phrase is left out, a negated one is cited, or raising and lowering swap; if the
    verdict contradicts the label, hides a draw against the odds, or opens with the label's word,
    which the trainer puts there itself."""
    for row in rows:
        text = row["explanation"]
        assert {phrase for phrase in WEIGHTS if phrase in text} == set(row["evidence"]), row["id"]
        for phrase in row["evidence"]:
            sentence = next(s for s in text.split(". ") if phrase in s)
            sides = [side for side in CITES if any(words in sentence for words in CITES[side])]
            assert sides == [WEIGHTS[phrase] > 0], row["id"]
        verdicts = [any(words in text for words in group) for group in (SURVIVES, DIES)]
        assert verdicts == [row["label"] == 0, row["label"] == 1], row["id"]
        assert ("Although" in text) == ((row["probability"] >= 0.5) != row["label"]), row["id"]
        assert text.split()[0].lower().strip(".,:;") not in ("yes", "no"), row["id"]


def test_the_risk_ranks_the_rows_and_a_bag_of_words_does_not(splits):
    """Fails if the weights shrink (Bayes AUROC under .93), grow (over .96) or a class is rare, or
    if mentions or negation words alone tell the label (say, if negated factors are left out)."""
    for part in splits.values():
        assert 0.30 <= sum(column(part, "label")) / len(part) <= 0.60
    train, test = splits["train"], splits["test"]
    labels = column(test, "label")
    bayes = roc_auc_score(labels, column(test, "probability"))
    assert 0.93 <= bayes <= 0.96
    for ngrams in ((1, 1), (1, 2)):
        vectorizer, model = TfidfVectorizer(ngram_range=ngrams), LogisticRegression(max_iter=1000)
        model.fit(vectorizer.fit_transform(column(train, "text")), column(train, "label"))
        scores = model.predict_proba(vectorizer.transform(column(test, "text")))[:, 1]
        assert roc_auc_score(labels, scores) <= 0.80 * bayes, ngrams
