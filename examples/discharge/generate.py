"""Synthetic discharge notes with a known 30-day mortality risk. Invented text: not medical advice.

The question that goes with the rows: "Will the patient die within 30 days?"

A note mentions four weighted factors, two distractors, and nothing else. How `probability` arises:

    probability = sigmoid(INTERCEPT + sum of the weights of the factors that the note ASSERTS)
    label       ~ Bernoulli(probability)

A factor is asserted or negated by a fair coin, in a frame of words that has a twin for the other
case ("found signs of X" | "found no signs of X"). A note mentions three of six factors that raise
the risk and one of two that lower it. So the phrase of a factor says little about the label, and
the words of a frame say little about which factor they belong to: the reader has to see which
phrase a negation negates. `evidence` lists the asserted phrases, verbatim from the text, and
`explanation` argues from exactly those.

Standard library only; the same seed gives the same bytes:

    python examples/discharge/generate.py                 # rewrites the committed files
    python examples/discharge/generate.py --out /tmp/d    # train.jsonl, valid.jsonl, test.jsonl
"""

import argparse
import json
import math
import random
from pathlib import Path

SIZES = {"train": 1200, "valid": 300, "test": 500}

INTERCEPT = -5.6

# Weight on the logit when asserted, and the phrases that name the factor. Weights are invented.
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

# (asserted, negated). {} never opens a sentence: the phrase is lower case wherever it stands. The
# word before it is mostly the same in both, or word pairs would give the answer away.
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

# No weight. Some carry negation words of their own; of each line, a note has one at most.
DISTRACTORS = [
    ("A penicillin allergy is known since childhood.", "There is no known allergy to penicillin."),
    ("Cataract surgery was done many years ago.", "The patient never had any cataract surgery."),
    ("The diet on the ward was low in salt.", "There was no special diet on the ward."),
    ("The patient wears reading glasses only.", "The patient does not wear glasses for reading."),
    ("The tetanus vaccine was given last spring.", "The patient does not take any vitamins."),
]

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


def explain(rng, raising, lowering, label, probability):
    """Two sentences that cite every phrase, and one that argues from them for the label."""
    raised = rng.choice(RAISES if raising else NO_RAISE).format(" and ".join(raising))
    lowered = rng.choice(LOWERS if lowering else NO_LOWER).format(" and ".join(lowering))
    with_odds = (probability >= 0.5) == (label == 1)
    # The side that the odds favour comes first.
    order = [raised, lowered] if probability >= 0.5 else [lowered, raised]
    return " ".join([*order, rng.choice(VERDICTS[label, with_odds])])


def make_row(rng):
    """One note with its label; the caller adds the id."""
    factors = rng.sample(RISKS, 3) + rng.sample(PROTECTIONS, 1)
    mentions = [(weight, rng.choice(phrases)) for weight, phrases in factors]
    rng.shuffle(mentions)

    # A note that asserts nothing has no evidence, so it is drawn again; so is one that asserts
    # everything, which keeps the share of asserted mentions at one half exactly.
    asserted = [rng.random() < 0.5 for _ in mentions]
    while all(asserted) or not any(asserted):
        asserted = [rng.random() < 0.5 for _ in mentions]

    sentences = [
        (true if is_asserted else false).format(phrase)
        for (true, false), (_, phrase), is_asserted in zip(
            rng.sample(FRAMES, len(mentions)), mentions, asserted, strict=True
        )
    ]
    for choices in rng.sample(DISTRACTORS, 2):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(choices))

    kept = [mention for mention, is_asserted in zip(mentions, asserted, strict=True) if is_asserted]
    logit = INTERCEPT + sum(weight for weight, _ in kept)
    probability = round(1 / (1 + math.exp(-logit)), 4)
    label = int(rng.random() < probability)  # drawn from the rounded value: that is what is stored
    raising = [phrase for weight, phrase in kept if weight > 0]
    lowering = [phrase for weight, phrase in kept if weight < 0]
    return {
        "text": " ".join(sentences),
        "label": label,
        "explanation": explain(rng, raising, lowering, label, probability),
        "probability": probability,
        "evidence": [phrase for _, phrase in kept],
    }


def generate(seed):
    """{"train": rows, "valid": rows, "test": rows}; no text occurs twice, within or across them."""
    rng = random.Random(seed)
    seen = set()
    splits = {}
    for split, size in SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            row = make_row(rng)
            if row["text"] not in seen:
                seen.add(row["text"])
                rows.append({"id": f"discharge-{split}-{len(rows) + 1:04d}", **row})
    return splits


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in generate(args.seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        # Bytes, so that Windows does not turn \n into \r\n.
        (args.out / f"{split}.jsonl").write_bytes(lines.encode())
        positives = sum(row["label"] for row in rows) / len(rows)
        print(f"{args.out / split}.jsonl: {len(rows)} rows, {positives:.1%} positive")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the synthetic discharge notes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--seed", type=int, default=30, help="seed of every draw")
    main(parser.parse_args())
