"""What is odd about rows that can be read: it is said before they are used."""

from plumbing.script import printable
from plumbing.split import count_classes
from prompts import QUESTION, stated_label


class LineNumber(int):
    """The id of a row to which the file gives none: its line's number, not a name of its own."""


def print_remarks(path, rows, prompts):
    """Prints a warning for each odd thing about the rows of a file, as train.py and data.py do."""
    for sentence in remarks(rows, prompts):
        print(f"warning: {path}: {printable(sentence)}")


def remarks(rows, prompts):
    """What is odd about rows that can be read: a list of sentences."""

    def some(odd_rows):
        """How many rows, by class, and the first of them, as a phrase."""
        counts = count_classes(odd_rows)
        ids = ", ".join(repr(row["id"]) for row in odd_rows[:3])
        return (f"{len(odd_rows)} rows ({counts[1]} {prompts.word(1)}, {counts[0]} "
                f"{prompts.word(0)}; the first: {ids})")

    found = []

    # explanations
    totals = count_classes(rows)
    explained = count_classes(row for row in rows if "explanation" in row)
    for label in (0, 1):
        if explained[label] == 0 and explained[1 - label] > 0:
            found.append(f"none of the {totals[label]} {prompts.word(label)} rows has an "
                         f"explanation, but {explained[1 - label]} of the {totals[1 - label]} "
                         f"{prompts.word(1 - label)} rows have one")

    against = contradicting_rows(rows, prompts.labels)
    if against:
        found.append(f"the explanation states the other label in {some(against)}, "
                     f"as {against[0]['explanation'][:60]!r}")

    twice = [row for row in rows if stated_by(row, prompts.labels) == row["label"]]
    if twice:
        answer = f"{prompts.word(twice[0]['label'])}. {twice[0]['explanation']}"
        found.append(f"the explanation opens with its own label word in {some(twice)}; training "
                     f"puts the word before it once more: {answer[:60]!r}")

    # texts
    labels_of = {}
    for row in rows:
        labels_of.setdefault(row["text"], set()).add(row["label"])
    torn = [row for row in rows if len(labels_of[row["text"]]) == 2]
    if torn:
        found.append(f"the same text has both labels in {some(torn)}")
    return found


def contradicting_rows(rows, labels):
    """The rows whose explanation opens with the other label's word: "No. It is bad." for yes."""
    return [row for row in rows if stated_by(row, labels) == 1 - row["label"]]


def stated_by(row, labels):
    """The label that a row's explanation states by itself, or None."""
    return stated_label(row.get("explanation", ""), labels)[0]


def refuse_contradictions(path, rows, prompts):
    """ValueError if explanations state the other label: training would write "Yes. No. It ..."."""
    against = contradicting_rows(rows, prompts.labels)
    if not against:
        return
    first = against[0]
    raise ValueError(
        f"{path}: {len(against)} explanations state the other label than their rows, the first in "
        f"row {first['id']!r} ({prompts.word(first['label'])}): {first['explanation'][:60]!r}; "
        f"correct them, or give --allow-contradictions")


def warn_of_default_question(question):
    """Prints a warning if nobody has said what is asked about the texts."""
    if question == QUESTION:
        print(f"warning: the question is the default one, {QUESTION!r}; --question sets yours")


def count_shared(train, test):
    """How many test rows share their group, id or text with a training row: {name: count}.

    A line's number is not an id: two rows of one line number have nothing in common.
    """
    counts = {}
    for name in ("group", "id", "text"):
        known = {str(row[name]) for row in train if is_given(row, name)}  # 5 and "5" are the same
        counts[name] = sum(is_given(row, name) and str(row[name]) in known for row in test)
    return counts


def warn_of_shared(train, valid):
    """Prints a warning if validation rows share something with training rows."""
    shared = count_shared(train, valid)
    counts = ", ".join(f"{name} {count}" for name, count in shared.items() if count)
    if counts:
        print(f"warning: of {len(valid)} validation rows, this many share with a training row: "
              f"{counts}; calibration and threshold need rows that training has not seen")


def is_given(row, name):
    """Whether the file gives this field of a row."""
    return name in row and not isinstance(row[name], LineNumber)
