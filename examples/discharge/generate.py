"""This script writes synthetic discharge notes, each with its known risk of death within 30 days.

    python examples/discharge/generate.py                 # rewrites the committed files
    python examples/discharge/generate.py --out /tmp/d    # train.jsonl, valid.jsonl, test.jsonl

The text is invented and is no medical advice. The question that goes with the rows: "Will the
patient die within 30 days?"

A note mentions four weighted factors, two facts without weight, and nothing else:

    probability = sigmoid(INTERCEPT + sum of the weights of the factors that the note ASSERTS)
    label       ~ Bernoulli(probability)

A factor is asserted or negated by a fair coin, in a sentence that has a twin for the other case
("found signs of X" | "found no signs of X"). A note mentions three of six factors that raise
the risk and one of two that lower it. So the phrase of a factor says little about the label, and
the words around it say little about which factor they belong to: the reader has to see which phrase
a negation negates. `evidence` lists the asserted phrases, verbatim from the text, and `explanation`
argues from exactly those.

It needs the standard library only, and the same seed gives the same bytes.
"""

import argparse
import json
import math
import random
from pathlib import Path

# How many rows go to which file, in the order of their draws. The second part of valid comes last,
# so that it moves no row of the test file
PARTS = [("train", 1200), ("valid", 300), ("test", 500), ("valid", 700)]


def generate(seed):
    """The rows of all files, {"train": rows, "valid": rows, "test": rows}. No text occurs twice."""
    rng = random.Random(seed)
    texts = set()  # of all three, so that no test note is a training note too
    splits = {"train": [], "valid": [], "test": []}
    for split, size in PARTS:
        rows = splits[split]
        full = len(rows) + size
        while len(rows) < full:
            row = make_row(rng)
            if row["text"] in texts:
                continue
            texts.add(row["text"])
            row_id = f"discharge-{split}-{len(rows) + 1:04d}"
            rows.append({"id": row_id, **row})
    return splits


def make_row(rng):
    """One note with its label and its explanation, a dict without an id."""
    # the factors that it mentions, each by one of its phrases
    factors = rng.sample(RISKS, 3) + rng.sample(PROTECTIONS, 1)
    mentions = []  # pairs (weight, phrase)
    for weight, phrases in factors:
        mentions.append((weight, rng.choice(phrases)))
    rng.shuffle(mentions)

    # a sentence for each, which asserts or negates it
    is_asserted = draw_asserted(rng, len(mentions))
    frames = rng.sample(FRAMES, len(mentions))
    sentences = []
    asserted = []  # the mentions that count
    for i, (weight, phrase) in enumerate(mentions):
        asserting, negating = frames[i]
        if is_asserted[i]:
            sentences.append(asserting.format(phrase))
            asserted.append((weight, phrase))
        else:
            sentences.append(negating.format(phrase))

    # two facts without weight, at any place among them
    for choices in rng.sample(DISTRACTORS, 2):
        place = rng.randrange(len(sentences) + 1)
        sentences.insert(place, rng.choice(choices))

    # the label is drawn from the rounded probability: that is what is stored
    logit = INTERCEPT + sum(weight for weight, _ in asserted)
    probability = round(1 / (1 + math.exp(-logit)), 4)
    label = int(rng.random() < probability)
    return {
        "text": " ".join(sentences),
        "label": label,
        "explanation": explain(rng, asserted, label, probability),
        "probability": probability,
        "evidence": [phrase for _, phrase in asserted],
    }


def draw_asserted(rng, n_mentions):
    """For each mention whether the note asserts it, a fair coin.

    A note that asserts nothing would have no evidence, so it is drawn again. So is one that asserts
    everything, which keeps the share of asserted mentions at one half exactly.
    """
    while True:
        is_asserted = [rng.random() < 0.5 for _ in range(n_mentions)]
        if any(is_asserted) and not all(is_asserted):
            return is_asserted


def explain(rng, asserted, label, probability):
    """Two sentences that cite every asserted phrase, and one that argues from them for the label.

    asserted: the pairs (weight, phrase) that the note asserts.
    """
    raising = [phrase for weight, phrase in asserted if weight > 0]
    lowering = [phrase for weight, phrase in asserted if weight < 0]
    raised = cite(rng, raising, RAISES, NO_RAISE)
    lowered = cite(rng, lowering, LOWERS, NO_LOWER)

    # the side that the odds favour comes first
    odds_favour_death = probability >= 0.5
    sentences = [lowered, raised]
    if odds_favour_death:
        sentences = [raised, lowered]

    goes_with_odds = odds_favour_death == (label == 1)
    sentences.append(rng.choice(VERDICTS[label, goes_with_odds]))
    return " ".join(sentences)


def cite(rng, phrases, frames, sentences_for_none):
    """A sentence that names all the phrases, or one that says that there are none."""
    if not phrases:
        return rng.choice(sentences_for_none)
    return rng.choice(frames).format(" and ".join(phrases))


# --- factors --------------------------------------------------------------------------------------
# All numbers are invented. A factor is its weight on the logit, and the phrases that name it
INTERCEPT = -5.6
RISKS = [
    (6.4, ["metastatic cancer", "spreading cancer"]),
    (5.8, ["severe sepsis", "blood poisoning"]),
    (5.3, ["heart failure", "cardiac failure"]),
    (4.8, ["low oxygen levels", "laboured breathing"]),
    (4.3, ["kidney failure", "renal failure"]),
    (3.8, ["frequent falls", "repeated falls"]),
]
PROTECTIONS = [
    (-5.6, ["independent walking", "unaided walking"]),
    (-5.0, ["family support", "supportive relatives"]),
]

# --- sentences of a note --------------------------------------------------------------------------
# A frame is a sentence with a gap for the phrase. A line has an asserting frame and its negating
# twin. No gap opens a sentence, so a phrase is lower case wherever it stands. The word before the
# gap is mostly the same in both twins, or word pairs would give the answer away.
FRAMES = [
    ("The patient has {}.", "The patient has no {}."),
    ("There is a history of {}.", "There is no history of {}."),
    ("The ward team found signs of {}.", "The ward team found no signs of {}."),
    ("On this stay {} was confirmed.", "On this stay {} was ruled out."),
    ("Asked about {}, the patient reports it.", "Asked about {}, the patient denies it."),
    ("The chart lists {} as present.", "The chart lists {} as absent."),
    ("Personal history of {}.", "Family history of {}, none in the patient."),
    ("The patient still has {}.", "The patient never had {}."),
]

# Facts without weight. Some have negation words of their own. A note has at most one of each line.
DISTRACTORS = [
    ("A penicillin allergy is known since childhood.", "There is no known allergy to penicillin."),
    ("Cataract surgery was done many years ago.", "The patient never had any cataract surgery."),
    ("The diet on the ward was low in salt.", "There was no special diet on the ward."),
    ("The patient wears reading glasses only.", "The patient does not wear glasses for reading."),
    ("The tetanus vaccine was given last spring.", "The patient does not take any vitamins."),
]

# --- sentences of an explanation ------------------------------------------------------------------
RAISES = ["The risk is raised by {}.", "Danger comes from {}."]
LOWERS = ["The risk is lowered by {}.", "Protection comes from {}."]
NO_RAISE = ["Nothing that raises the risk is present.", "Nothing raises the risk."]
NO_LOWER = ["Nothing protective is present.", "Nothing lowers the risk."]

# By (label, does the label go with the odds?). Against the odds, the sentence says so.
VERDICTS = {
    (1, True): ["Death within 30 days is likely.", "On balance, the risk of death is high."],
    (0, True): ["Survival beyond 30 days is likely.", "On balance, the risk of death is low."],
    (1, False): ["Although the notes point to a low risk, the patient died."],
    (0, False): ["Although the notes point to a high risk, the patient survived."],
}


# --- the command line -----------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description="Write the synthetic discharge notes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--seed", type=int, default=30, help="seed of every draw")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in generate(args.seed).items():
        path = args.out / f"{split}.jsonl"
        lines = [json.dumps(row) + "\n" for row in rows]
        path.write_bytes("".join(lines).encode())  # bytes: in Windows, text would end in \r\n

        share = sum(row["label"] for row in rows) / len(rows)
        print(f"{path}: {len(rows)} rows, {share:.1%} positive")


if __name__ == "__main__":
    main()
