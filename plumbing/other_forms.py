"""Files that are not JSON Lines with labels 0 and 1: what they are, and what converts them."""

import json
import re
import shlex

# Lines of Python. Each reads the file that its first argument names, and prints rows
UNPACK = "import gzip, shutil, sys; shutil.copyfileobj(gzip.open(sys.argv[1]), sys.stdout.buffer)"
FROM_ARRAY = (
    'import json, sys; file = open(sys.argv[1], encoding="utf-8-sig"); '
    "[print(json.dumps(row)) for row in json.load(file)]"
)
FROM_CSV = (  # without its empty cells; a label of 0 or 1 becomes a number
    'import csv, json, sys; file = open(sys.argv[1], encoding="utf-8-sig", newline=""); '
    "csv.field_size_limit(10**9); "
    '[print(json.dumps({name: int(cell) if name == "label" and cell in ("0", "1") else cell '
    "for name, cell in row.items() if cell})) "
    "for row in csv.DictReader(file, delimiter=DELIMITER)]"
)
FROM_WORDS = (
    'import json, sys; file = open(sys.argv[1], encoding="utf-8-sig"); labels = LABELS; '
    '[print(json.dumps({**row, "label": labels[str(row["label"]).strip().lower()]})) '
    "for row in map(json.loads, filter(str.strip, file))]"
)


def refuse_other_form(path, lines):
    """ValueError for a file that is no JSON Lines but gzip, a JSON array or CSV, with a way out."""
    first = lines[0].decode("utf-8-sig", "replace").strip()
    columns = re.split("[,;\t]", first.lower().replace('"', ""))

    if lines[0].startswith(b"\x1f\x8b"):
        form = "a gzip file"
        code = UNPACK
    elif first.startswith("[") and is_array(lines):
        form = "a JSON array"
        code = FROM_ARRAY
    elif "text" in columns or (path.suffix in (".csv", ".tsv") and not first.startswith("{")):
        delimiter = re.search("[,;\t]", first)
        form = "a table, such as CSV"
        code = FROM_CSV.replace("DELIMITER", json.dumps(delimiter[0] if delimiter else ","))
    else:
        return
    raise ValueError(f"{path}: this is {form}, expected JSON Lines: one object per line. "
                     f"To convert it:\n{command(code, path)}")


def is_array(lines):
    """Whether the whole file is one JSON array."""
    try:
        return isinstance(json.loads(b"".join(lines).decode("utf-8-sig")), list)
    except (ValueError, RecursionError):
        return False


def label_advice(path, lines):
    """What to do if the labels of a file are two words, or two numbers, but not 0 and 1.

    A sentence with the command, or None if they are not. Of the two, 1 is proposed for the one that
    is last in the alphabet: yes, true, positive.
    """
    labels = []
    for line in lines:
        try:
            labels.append(json.loads(line.decode("utf-8-sig"))["label"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    if all(isinstance(label, int) and label in (0, 1) for label in labels):
        return None  # nothing is wrong with them
    types = {type(label) for label in labels}
    words = sorted({str(label).strip().lower() for label in labels})
    if len(types) != 1 or len(words) != 2:
        return None

    no, yes = words
    code = FROM_WORDS.replace("LABELS", json.dumps({no: 0, yes: 1}))
    return (f"{path}: the labels are {json.dumps(no)} and {json.dumps(yes)}, expected 0 and 1. To "
            f"make the second one 1 (exchange the numbers if it is not the class that the question "
            f"asks for):\n{command(code, path)}")


def command(code, path):
    """A line for the shell: Python's code, run on a file, into a new file beside it."""
    new = path.with_name(path.stem.removesuffix(".jsonl") + ".converted.jsonl")
    return f"python -c {shlex.quote(code)} {shlex.quote(str(path))} > {shlex.quote(str(new))}"
