"""What an evaluation has left in its files, for report.py."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import parse_object, parse_row
from plumbing.files import read_json, sha256_of


@dataclass
class Evaluated:
    """One run of an evaluation."""

    name: str
    about: dict  # of eval.json: folder, fingerprint, prompts, fitted, curves, ...
    metrics: dict  # of its own score and its texts
    records: list  # N predictions
    log: list  # the lines of its log.jsonl; none if they are not there, or of another training

    def column(self, key):
        return np.array([record[key] for record in self.records])

    def threshold(self):
        """That of its decisions, which stands in all records."""
        return self.records[0]["threshold"]

    def words(self):
        """(the word of class 0, that of class 1)."""
        return [word[0].upper() + word[1:] for word in self.about["prompts"]["labels"]]


@dataclass
class Evaluation:
    results: dict  # eval.json
    runs: list  # of Evaluated
    rows: dict  # {id as a string: row of the data file}; none if there are no texts
    no_texts: str | None  # why there are none


def read_evaluation(folder):
    """The Evaluation in a folder. ValueError says what is missing."""
    results = read_json(folder / "eval.json")
    try:
        runs = read_runs(results, folder)
        rows, no_texts = read_texts(results["data"])
    except (KeyError, TypeError) as error:
        raise lacks_something(folder, error) from error
    return Evaluation(results, runs, rows, no_texts)


def lacks_something(folder, error):
    """The ValueError for an eval.json in which something is not there, or is not as expected."""
    return ValueError(f"{folder}/eval.json does not have what a report needs ({error!r}); an "
                      "earlier version wrote it: eval.py with --overwrite writes it again")


def read_runs(results, folder):
    n = results["n"]
    expected = n * len(results["runs"])
    predictions = read_lines(folder / "predictions.jsonl")
    if len(predictions) != expected:
        raise ValueError(f"{folder}/predictions.jsonl has {len(predictions)} lines, expected {n} "
                         f"for each run of eval.json: they are not of one evaluation")

    runs = []
    for start, (name, about) in enumerate(results["runs"].items()):
        records = predictions[start * n : (start + 1) * n]
        if any(record.get("run") not in (None, about["fingerprint"]) for record in records):
            raise ValueError(f"{folder}/predictions.jsonl is of another run than eval.json: "
                             "eval.py with --overwrite writes both again")
        metrics = results["metrics"][about["scorer"]]
        runs.append(Evaluated(name, about, metrics, records, read_log(about)))
    return runs


def read_log(about):
    """The lines of a run's log.jsonl, if it is still the run that was evaluated."""
    if about["folder"] is None:  # the base model
        return []
    folder = Path(about["folder"])
    log = folder / "log.jsonl"
    described = folder / "clsgen.json"
    if not (log.is_file() and described.is_file()):
        return []
    if not sha256_of(described).startswith(about["fingerprint"]):
        return []
    return read_lines(log)


def read_lines(path):
    """The JSON values of a file, one a line; half a line at the end does not count."""
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return values


def read_texts(data):
    """({id as a string: row} of the data file, None), or ({}, why the texts are left out)."""
    path = Path(data["file"])
    if not path.is_file():
        return {}, f"The data file {path} is not there, so this page has no texts of rows."
    if sha256_of(path) != data["sha256"]:
        return {}, (f"The data file {path} has changed since the evaluation (it has another "
                    f"SHA-256), so this page has no texts of rows.")
    return rows_by_id(path), None


def rows_by_id(path):
    """{id as a string: row} of a JSON Lines file that `data.read_rows` has taken before."""
    rows = {}
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_row(parse_object(line), labels=False)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        rows[str(row.get("id", number))] = row
    return rows
