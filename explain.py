"""Data construction: a teacher model explains rows that only have labels.

    python explain.py --data labels.jsonl --out x.jsonl --question "Is ...?" --model models/teacher
    python explain.py --data ... --question "Is ...?" --endpoint http://host:8000/v1 --teacher NAME

The teacher is told the label and writes up to --tries explanations of it; the first that passes
every check is kept. No row is dropped: one without an explanation still trains the score head.
"""

import argparse
import hashlib
import json
import re
import unicodedata
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import read_rows
from metrics import auroc
from plumbing.chat import Refused
from plumbing.checkpoint import base_fingerprint
from plumbing.files import continue_job, sha256_of, write_atomically
from plumbing.giving_up import (
    counts, cut_off_advice, hold_back_refused, last_refusal, outcomes_of, stop_if_hopeless)
from plumbing.near_texts import UNSPACED, shingles
from plumbing.remarks import warn_of_default_question
from plumbing.script import Help, refuse, run_main
from plumbing.teachers import LocalTeacher, ServerTeacher, key_of
from prompts import SYSTEM, add_prompt_arguments, check_settings, stated_label
from text_metrics import repetition

INSTRUCTION = (  # what a teacher reads below a row's text; the question stands above the text
    'The answer is "{}". In one to three sentences, explain which facts in the text lead to this '
    "answer, in the words of the text."
)


# --- what happens to a row ------------------------------------------------------------------------
def explain_batch(rows, teacher, source, args):
    """Rows with labels -> the same rows, explained where one of --tries samples passes every check.

    Every row gets an `explanation_source`: the entries of source (who explains, and with which
    arguments), `zero_shot` (the teacher's p of class 1 before it is told the label), `tries` (how
    many samples it wrote) and `checks` (what became of each sample: the first check that it failed,
    or "passed"; "cut off" where the bound on its tokens came before it said anything).

    The last check is a reader: the teacher itself, who sees the question and the explanation only
    and must find the label.
    """
    rows = [dict(row) for row in rows]

    # What does the teacher say while it does not know the label?
    zero_shot = teacher.score([row["text"] for row in rows])
    for row, p in zip(rows, zero_shot, strict=True):
        row["explanation_source"] = {**source, "zero_shot": round(p, 4), "tries": 0, "checks": []}

    for attempt in range(args.tries):
        unexplained = without_explanation(rows)
        if not unexplained:
            break

        # Now it is told, and writes a sample for each row
        tasks = [task(row, args.labels) for row in unexplained]
        seeds = [seed_of(row, attempt, args.seed) for row in unexplained]
        samples = teacher.write(tasks, seeds)

        # The checks that need no model
        readable = []
        for row, sample in zip(unexplained, samples, strict=True):
            if sample is None:
                failed = ["cut off"]
            else:
                sample = without_label(sample, row, args.labels)
                failed = failed_checks(sample, row, args)
            row["explanation_source"]["tries"] = attempt + 1
            if failed:
                row["explanation_source"]["checks"].append(failed[0])
            else:
                readable.append((row, sample))

        # The reader
        read = teacher.score([sample for _, sample in readable])
        for (row, sample), p in zip(readable, read, strict=True):
            outcome = "reader"
            if leans_to(row["label"], p):
                outcome = "passed"
                row["explanation"] = sample
            row["explanation_source"]["checks"].append(outcome)

    return rows


def without_explanation(rows):
    return [row for row in rows if "explanation" not in row]


def refused_row(row, source, refusal):
    """The row where a server refused to answer about it: it keeps its label alone."""
    outcome = {"zero_shot": 0.5, "tries": 0, "checks": ["refused"], "refusal": refusal}
    return {**row, "explanation_source": {**source, **outcome}}


def task(row, labels):
    """The row's text and, below it, the label and what the teacher is to do."""
    return f"{row['text']}\n\n{INSTRUCTION.format(labels[row['label']])}"


def seed_of(row, attempt, seed):
    """The seed of one sample, 31 bits as servers take it.

    It depends on --seed, row and try alone: not on the batch, nor on where a job was continued.
    """
    key = f"{seed} {attempt} {row['id']}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def without_label(sample, row, labels):
    """The sample without the row's label word in front: training puts "Yes. " there itself."""
    stated, rest = stated_label(sample, labels)
    if stated != row["label"]:
        return sample
    return rest[:1].upper() + rest[1:]


def leans_to(label, p):
    """Whether p of class 1 is on the label's side. At .5 it is on neither."""
    return p > 0.5 if label == 1 else p < 0.5


# --- the checks: does this text pass as an explanation of this row? -------------------------------
def says_something(text, row, args):
    """It is more than thoughts, and more than the label's word."""
    return text != ""


def keeps_to_the_label(text, row, args):
    """It does not state the other label."""
    return stated_label(text, args.labels)[0] in (None, row["label"])


def argues_from_the_text(text, row, args):
    """It does not speak of a label that it was given, except in words of the row's text."""
    text = one_line(text)
    own = one_line(row["text"]).lower()
    the_words = "|".join(map(re.escape, args.labels))
    label_is = rf"the (answer|label) ((is|was|of|says) {QUOTE}?|{QUOTE})({the_words})"

    for phrase in (*TOLD, label_is):
        for match in re.finditer(rf"\b({phrase})\b", text, re.IGNORECASE):
            if match[0].lower() not in own:
                return False
    return True


def one_line(text):
    """The text with one blank wherever it has white space."""
    return " ".join(text.split())


def is_grounded(text, row, args):
    """Enough of its content words come from the row's text; those of the question do not count."""
    own = stems(text) - stems(args.question)
    found = own & stems(row["text"])
    return len(found) >= max(1, args.grounded * len(own))


def invents_no_number(text, row, args):
    """Each of its numbers stands in the question or in the row's text."""
    return numbers(text) <= numbers(f"{args.question} {row['text']}")


def has_the_right_length(text, row, args):
    """It has as many words as --words allows."""
    low, high = args.words
    return low <= len(words(text)) <= high


def is_finished(text, row, args):
    """Its last sentence ends, perhaps within quotation marks."""
    return text.rstrip("\"'”’»」』)）").endswith(tuple(".!?。！？．।॥؟۔።։"))


def does_not_loop(text, row, args):
    """At most a fifth of its runs of four words are repeats."""
    _, repeated = repetition([" ".join(words(text))])  # None where it has fewer than four words
    return repeated is None or repeated <= 0.2


def repeats_no_prompt(text, row, args):
    """It repeats neither five words of our instructions nor the question."""
    if shingles(text) & shingles(f"{SYSTEM} {INSTRUCTION}"):
        return False
    return args.question.lower() not in text.lower()


def has_no_markup(text, row, args):
    """It has no special tokens, no tags, and no broken or control characters."""
    return not MARKUP.search(text)


CHECKS = {  # by the names that explanation_source has for them
    "empty": says_something,
    "label": keeps_to_the_label,
    "told": argues_from_the_text,
    "grounded": is_grounded,
    "numbers": invents_no_number,
    "length": has_the_right_length,
    "unfinished": is_finished,
    "loop": does_not_loop,
    "prompt": repeats_no_prompt,
    "markup": has_no_markup,
}

# How a text speaks of an answer that it was given. "Discharge instructions" and "the label warns"
# are ordinary words
QUOTE = "[\"“'‘]"
TOLD = (
    "(given|provided|correct|known|assigned|expected|stated) (answer|label)",
    "(answer|label) ((that|which|as) (was|is) )?(given|provided)",
    "(answer|label) (is|was) (supported|justified|right|based)",
    "this answer (is|was|follows|comes)",
    f"the answer,? (is|of|must|should|would|follows|comes|lies|{QUOTE})",
    "(as|since|because) the (answer|label) (is|says|states)",
    r"(support|justif|explain|lead|point|match|confirm|favou?r)\w*( to| towards| for| with)?"
    " (the|this|that) (answer|label)",
    "(consistent|accordance|agreement|line) with the (answer|label)",
    "I (was|am|have been) (told|given|asked|instructed)",
    "you (told|gave|asked|provided|stated)",
    "(my|your|above|these) instructions",
    "as an AI",
)
MARKUP = re.compile(
    r"<\|.*?\|>|</?\w+>|\[/?INST"
    "|[\0-\x08\x0b-\x1f\x7f\ufffd\ud800-\udfff]"
)


def failed_checks(text, row, args):
    """The names of the checks that a text fails, in the order of CHECKS."""
    failed = []
    for name, passes in CHECKS.items():
        if not passes(text, row, args):
            failed.append(name)
    return failed


HANGUL = "\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}、。，！？：；「」『』（）]+")


def words(text):
    """A text's words: what is between blanks; where a script has none, each character."""
    return WORD.findall(text)


def stems(text):
    """A text's content words, by their first five letters: "reports" meets "reported".

    Words of less than four letters do not count. Where a script has no blanks between words, and in
    Korean, whose words change their ends, each two neighbouring characters count as a word.
    """
    found = set()
    for pair in re.findall(rf"(?=([{UNSPACED}{HANGUL}]{{2}}))", text):
        found.add(pair)

    # letters with their accents and vowel signs
    letters = ""
    for character in re.sub(rf"[{UNSPACED}{HANGUL}]", " ", text.lower()):
        letters += character if unicodedata.category(character)[0] in "LM" else " "
    for word in letters.split():
        if len(word) >= 4:
            found.add(word[:5])
    return found


def numbers(text):
    """The numbers in a text as floats: "1,000" is 1000, "64." is 64."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return set(map(float, re.findall(r"\d*\.?\d+", text)))


# --- the command ----------------------------------------------------------------------------------
def main(argv=None):
    args = parse_arguments(argv)
    check_arguments(args)
    rows = read_rows(args.data)

    # Who explains, and what the explanations depend on
    if args.model and not args.teacher:
        args.teacher = args.model.resolve().name
    basis = basis_of(args)
    fingerprint = hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:12]
    source = {"teacher": args.teacher, "arguments": fingerprint}

    # A server gets a row at a time, and several such requests at once. A local model's last digits
    # depend on what else is in a batch, so its batches are always the same rows.
    if args.endpoint:
        teacher = ServerTeacher(args)
        batch_size = 1
    else:
        teacher = LocalTeacher(args)
        batch_size = args.batch
    warn_of_default_question(args.question)
    rows_to_ask = without_explanation(rows)
    batches = []
    for start in range(0, len(rows_to_ask), batch_size):
        batches.append(rows_to_ask[start : start + batch_size])

    def work(batch):
        try:
            return explain_batch(batch, teacher, source, args)
        except Refused as error:  # by a server, which gets a row at a time
            return [refused_row(batch[0], source, str(error))]
        except ValueError as error:
            raise ValueError(f"at row {batch[0]['id']!r}: {error}") from None

    # The results gather in OUT.part, so that the same command continues after a stop
    part = args.out.with_name(args.out.name + ".part")
    about = {**basis, "rows_a_line": batch_size, "rows": "unexplained"}  # once it was all rows
    asked = []  # the rows that the teacher was asked about, in order
    with (
        ThreadPool(args.concurrency) as pool,
        tqdm(total=len(rows_to_ask), desc="explain", unit="row") as bar,
    ):

        def in_order(work, batches):
            results = pool.imap(work, batches) if args.endpoint else map(work, batches)
            results = hold_back_refused(results)
            return stop_if_hopeless(results, asked, len(rows_to_ask), args)

        for batch in continue_job(part, about, batches, work, in_order):
            asked += batch
            bar.update(len(batch))

    # A row that has an explanation already stays as it is
    asked_by_id = {row["id"]: row for row in asked}
    lines = []
    for row in rows:
        row = asked_by_id.get(row["id"], row)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(args.out, "".join(lines))
    part.unlink()

    if asked:
        report(asked, args)
    else:
        print("every row has an explanation already: nothing was asked")
    explained = sum("explanation" in row for row in asked)
    unexplained = len(asked) - explained
    print(f"\n{args.out}: {len(rows)} rows, of which {unexplained} are without an explanation and "
          "train the score head only")
    if asked and not explained:
        print("warning: no row got an explanation; docs/data.md says what each check asks for")
    if args.endpoint:
        for sentence in teacher.server.changed_fields():
            print(sentence)


def basis_of(args):
    """Whatever an explanation depends on, by name; a JSON object.

    Left out are the key, where the files are, and how fast it goes. The order of the names counts
    for the fingerprint in explanation_source, so new ones belong at the end.
    """
    left_out = ("data", "out", "model", "key_env", "batch", "concurrency", "timeout", "retries")
    basis = {"command": "explain"}
    for name, value in vars(args).items():
        if name not in left_out:
            basis[name] = value

    basis["model"] = base_fingerprint(args.model) if args.model else None
    basis["instruction"] = INSTRUCTION
    basis["data"] = sha256_of(args.data)
    return basis


def report(asked, args):
    """Prints for each class what became of its rows, and how good the teacher is by itself."""
    shares = []
    for label, word in enumerate(args.labels):
        shares.append(report_class(asked, label, word))
    if outcomes_of(asked)["cut off"]:
        print(f"warning: {cut_off_advice(args)}")
    if last_refusal(asked):
        print(last_refusal(asked))

    y = [row["label"] for row in asked]
    both_classes = len(set(y)) == 2
    if both_classes:
        zero_shot = [row["explanation_source"]["zero_shot"] for row in asked]
        print(f"teacher's AUROC from the text alone: {auroc(y, zero_shot):.3f}")
        if abs(shares[1] - shares[0]) > 0.1:
            print("warning: the text will be learned from one class more than from the other")


def report_class(asked, label, word):
    """Prints what became of one class's rows. Returns the share of them that is explained."""
    rows = [row for row in asked if row["label"] == label]

    against = 0  # rows that the teacher would label otherwise, before it is told
    tries = Counter()  # how many samples it took, where one was kept
    lengths = []  # in words, of those that were kept
    for row in rows:
        source = row["explanation_source"]
        against += leans_to(1 - label, source["zero_shot"])

        if "explanation" in row:
            tries[source["tries"]] += 1
            lengths.append(len(words(row["explanation"])))

    kept = len(lengths)
    share = kept / max(1, len(rows))
    if not lengths:
        lengths = [0]

    print(f"{word}: {kept} of {len(rows)} rows explained ({share:.0%})")
    print(f"  samples   {counts(outcomes_of(rows))}")
    print(f"  by try    {counts(tries)}")
    print(f"  words     {min(lengths)} to {max(lengths)}, median {np.median(lengths):.0f}")
    print(f"  teacher   would label {against} of the rows otherwise")
    return share


# --- arguments ------------------------------------------------------------------------------------
def check_arguments(args):
    """ValueError names everything that is wrong with the arguments; nothing was done before it."""
    problems = []

    # The endpoint is not shown: where it is wrong, it may well hold a password
    if args.endpoint and not args.teacher:
        problems.append("--endpoint needs --teacher, the model's name there")
    if args.endpoint and not re.fullmatch(r"https?://[^@?#\s]+", args.endpoint):
        problems.append("--endpoint must be an http:// or https:// address without user and query")
    key = key_of(args)
    if args.key_env and not (key and key.isascii() and key.isprintable()):
        problems.append("--key-env must name an environment variable that holds a key")

    whole_numbers = {
        "--concurrency": args.concurrency,
        "--tries": args.tries,
        "--words": min(args.words),
        "--batch": args.batch,
    }
    for flag, value in whole_numbers.items():
        if value < 1:
            problems.append(f"{flag} is {value}, expected 1 or more")
    if args.retries < 0:
        problems.append(f"--retries is {args.retries}, expected 0 or more")
    if not args.timeout > 0:
        problems.append(f"--timeout is {args.timeout}, expected more than 0 seconds")
    if not args.temperature >= 0:
        problems.append(f"--temperature is {args.temperature}, expected 0 or more")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top-p is {args.top_p}, expected a number above 0 and up to 1")
    low, high = args.words
    if low > high:
        problems.append(f"--words is {low} {high}, expected the lower number first")

    # what a prompt is made of; a server gets it, too
    if not args.question.strip():
        problems.append("--question is blank, expected the question that p answers")
    try:
        check_settings(args.question, args.labels, args.format, args.max_prompt, args.max_answer)
    except ValueError as error:
        problems.append(str(error))

    if args.out.exists():
        problems.append(f"{args.out} exists; give another --out")
    if not args.out.parent.is_dir():
        problems.append(f"--out {args.out}: no such folder")
    refuse(problems)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--data", required=True, type=Path, help="JSON Lines rows with labels")
    add("--out", required=True, type=Path, help="the rows, explained; continues after a stop")
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--model", type=Path, help="the teacher: a Hugging Face folder")
    teacher.add_argument("--endpoint", help="or a server, OpenAI's protocol: http://host:port/v1")
    add_prompt_arguments(parser)  # --question, and a group of others

    add = parser.add_argument_group("samples and checks").add_argument
    add("--tries", type=int, default=4, help="samples for a row")
    add("--temperature", type=float, default=0.7, help="of the samples")
    add("--top-p", type=float, default=0.9, help="draw from this share of the probability mass")
    add("--seed", type=int, default=0, help="of the draws")
    add("--grounded", type=float, default=0.5, help="least share of content words from the text")
    add("--words", type=int, nargs=2, default=[5, 80], metavar=("LOW", "HIGH"), help="length")

    add = parser.add_argument_group("with --endpoint").add_argument
    add("--teacher", help="the model's name at the endpoint")
    add("--key-env", help="environment variable that holds the endpoint's key")
    add("--concurrency", type=int, default=4, help="requests at a time")
    add("--timeout", type=float, default=120, help="seconds that a server may be silent")
    add("--retries", type=int, default=5, help="of a request, after 1, 2, 4, ... seconds")

    add = parser.add_argument_group("with --model").add_argument
    add("--batch", type=int, default=16, help="rows at a time")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of the teacher; auto: bfloat16 if the processor multiplies it, else float32, on a "
        "GPU float16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main, when_stopped="stopped; the same command continues")
