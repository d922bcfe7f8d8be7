"""When explain.py stops asking a teacher, and the sentences that say what became of the rows."""

from collections import Counter

FIRST_ROWS = 20  # if none of them can be explained, something is wrong
MOST_REFUSED = 5  # rows in a row that a server may refuse


def hold_back_refused(results):
    """Yields the results in order. ValueError where a server refuses MOST_REFUSED rows in a row.

    A refused row is held back until a later one is answered, or all are done. So where a server
    refuses everything from some row on, that is no verdict on these rows: they are not in OUT.part,
    and the same command asks for them again.
    """
    held_back = []
    for rows in results:
        held_back.append(rows)
        if not last_refusal(rows):
            yield from held_back
            held_back = []
        elif len(held_back) == MOST_REFUSED:
            raise ValueError(
                f"the server refused {MOST_REFUSED} rows in a row; {last_refusal(rows)}")
    yield from held_back


def stop_if_hopeless(results, asked_before, total, args):
    """Yields the results. ValueError after the first FIRST_ROWS rows if none has an explanation.

    asked_before: the rows that this job asked about before it was stopped and continued; if they
    are FIRST_ROWS already, the user has been told. total: how many rows there are to ask about.
    """
    is_beginning = len(asked_before) < FIRST_ROWS
    asked = list(asked_before)
    for rows in results:
        yield rows  # they are in OUT.part now: whatever follows, nothing is lost
        asked += rows
        if is_beginning and FIRST_ROWS <= len(asked) < total:
            is_beginning = False
            if not any("explanation" in row for row in asked):
                raise ValueError(nothing_explained(asked, args))


def nothing_explained(asked, args):
    """The sentence that says why a job stops after its first rows, and how to go on."""
    outcomes = outcomes_of(asked)
    problem = f"none of the first {len(asked)} rows got an explanation ({counts(outcomes)})"
    if outcomes["cut off"]:
        problem += f"; {cut_off_advice(args)}"
    else:
        problem += "; docs/data.md says what each check asks for"
    if last_refusal(asked):
        problem += f"; {last_refusal(asked)}"
    return (f"{problem}; the same command continues with the other rows, or starts anew if you "
            f"delete {args.out}.part")


def last_refusal(asked):
    """What the server said about the last row that it refused, as a phrase; else ""."""
    for row in reversed(asked):
        if "refusal" in row["explanation_source"]:
            refusal = row["explanation_source"]["refusal"]
            return f"the last refusal was at row {row['id']!r}: {refusal}"
    return ""


def outcomes_of(asked):
    """How often each check stopped a sample, as a Counter."""
    outcomes = Counter()
    for row in asked:
        outcomes.update(row["explanation_source"]["checks"])
    return outcomes


def cut_off_advice(args):
    """What to do where samples are cut off before they say anything."""
    return (f"--max-answer {args.max_answer} cuts the teacher off before it says anything, "
            "perhaps in its thinking: give a larger one")


def counts(counter):
    """A Counter as text, sorted by name: "grounded: 2, passed: 17"."""
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items())) or "none"
