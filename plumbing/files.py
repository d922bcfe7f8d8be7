"""Files that are whole or not there, and jobs that continue where they were stopped."""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import save


def read_json(path):
    """The JSON object in a file, as a dict. ValueError names the file when there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sha256_of(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_atomically(path, data):
    """Writes bytes or text so that a reader sees all of it, or what was there before.

    The data goes to a temporary name, is synced to the disk, and then takes its place.
    """
    path = Path(path)
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes a JSON value, indented, as `write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as a safetensors file, as `write_atomically` does."""
    on_cpu = {}
    for name, tensor in tensors.items():
        on_cpu[name] = tensor.detach().cpu()

    header = {"format": "pt"}  # what other readers expect to find there
    if metadata is not None:
        header.update(metadata)
    write_atomically(path, save(on_cpu, header))


def continue_job(part, about, units, work, in_order=map, overwrite=False):
    """Yields work(unit) for each unit, in order. A stopped job continues where it was.

    The file `part` keeps the results: its first line says what the job is about, each line after it
    is one result as JSON. The caller deletes it, once all results are where they belong.
    in_order(work, units) gives the results in the order of the units: map, or a pool's imap.

    ValueError if `part` was begun for something else or is damaged; overwrite=True starts anew.
    """
    part = Path(part)
    first_line = json.dumps(about).encode()

    lines = []
    if part.exists() and not overwrite:
        lines = part.read_bytes().split(b"\n")[:-1]  # the last piece is empty, or cut by the stop
    holds_results = len(lines) > 1  # else nothing is lost
    if holds_results and lines[0] != first_line:
        raise ValueError(f"{part} was begun with other arguments or other data; "
                         "delete it to start anew")

    done = lines[1:]
    if len(done) > len(units):
        raise ValueError(f"{part}: it has more results than there are; delete it to start anew")
    write_atomically(part, b"\n".join([first_line, *done]) + b"\n")
    for number, line in enumerate(done, 2):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{part}:{number}: damaged ({error}); delete it to start anew") from None

    with open(part, "ab") as file:
        for result in in_order(work, units[len(done) :]):
            line = json.dumps(result, ensure_ascii=False)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            yield result
