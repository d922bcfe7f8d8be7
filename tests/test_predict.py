"""The prediction command: one text, a file, a stop in the middle."""

import json

import pytest
import torch
from conftest import assert_refused, greedy_without_cache, run_script

from plumbing.script import printable
from predict import main, parse, token_chooser
from run import Run



def test_one_text_on_the_command_line(run, tmp_path, capsys):
    """Fails if the printed probability is not predict's, or the streamed text differs from it."""
    text = "case 3: the result is bad"
    main(["--run", str(tmp_path / "run"), "--text", text])
    out = capsys.readouterr().out
    assert f"probability of Yes: {run.predict([text])[0]['probability']:.3f}" in out
    answer = run.prompts.decode(greedy_without_cache(run, text))
    assert printable(answer).rstrip("\ufffd") in out


def test_a_file_of_predictions(rows_file, rows, run, tmp_path):
    """Fails if rows come out in another order, twice or not at all, or a file is overwritten."""
    out = tmp_path / "p.jsonl"
    command = f"--run {tmp_path / 'run'} --data {rows_file} --out {out} --no-explain".split()
    main([*command, "--batch", "3"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    with pytest.raises(ValueError, match="exists"):
        main(command)
    main([*command, "--overwrite"])


def stop_at_the_third(monkeypatch):
    """The third chunk of a prediction is stopped as by Ctrl-C; returns the list of its calls."""
    predict, calls = Run.predict, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*arguments)

    monkeypatch.setattr("run.Run.predict", stopping)
    return calls


def test_a_stopped_prediction_goes_on_from_any_byte(rows, run, tmp_path, monkeypatch):
    """Fails if a row is lost, doubled or computed again, or draws depend on where it stopped."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row | {"id": f"{row['id']}\u2028"}) + "\n" for row in rows))
    command = f"--run {tmp_path / 'run'} --data {data} --out {out} --batch 1".split()
    command += ["--temperature", "1"]
    main(command)
    due, part = out.read_bytes(), tmp_path / "p.jsonl.part"
    out.unlink()

    calls = stop_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    begun = part.read_bytes()
    assert begun.count(b"\n") == 1 + 2 and not out.exists()  # what it is, and two chunks of 8
    with pytest.raises(ValueError, match="other arguments or other data"):
        main([*command, "--seed", "9"])
    for size in (begun.index(b"\n") + 1, len(begun) // 2, len(begun) - 1, len(begun)):
        part.write_bytes(begun[:size])
        calls[:] = [None] * 3
        main(command)
        assert out.read_bytes() == due and not part.exists()
        assert len(calls) - 3 == 5 - (begun[:size].count(b"\n") - 1), "chunks of 8 still to do"
        out.unlink()


def test_the_draws_of_chunks_and_seeds_do_not_overlap():
    """Fails if --seed 1 from row 128 draws what --seed 129 draws from row 0, or one seed is not
    enough to draw the same again."""
    def draws(seed, start):
        args = parse(f"--run x --text a --temperature 1 --seed {seed}".split())
        return token_chooser(args, start)(torch.zeros(8, 1000)).tolist()

    places = [(0, 0), (1, 0), (129, 0), (0, 128), (1, 128), (0, 1), (-1, 1), (2**63, 0)]
    found = [draws(*place) for place in places]
    assert len({*map(tuple, found)}) == len(places)
    assert found == [draws(*place) for place in places]


@pytest.mark.parametrize("line", [b"5", b"[]", b'[{"id": "x"}]', None])
def test_a_damaged_part_is_refused(rows, rows_file, run, tmp_path, monkeypatch, line):
    """Fails if records of other rows, or of none, are written as predictions."""
    out = tmp_path / "p.jsonl"

    stop_at_the_third(monkeypatch)
    command = f"--run {tmp_path / 'run'} --data {rows_file} --out {out} --batch 1 --no-explain"
    with pytest.raises(KeyboardInterrupt):
        main(command.split())
    part = tmp_path / "p.jsonl.part"
    head, first, second = part.read_bytes().splitlines()
    kept = [head, line, second] if line else [head, second]  # None: a line is gone
    part.write_bytes(b"\n".join(kept) + b"\n")
    with pytest.raises(ValueError, match="p.jsonl.part: damaged"):
        main(command.split())
    assert not out.exists()


@pytest.mark.parametrize("arguments, words", [
    ("", "one of --text and --data"), ("--text=", "--text is blank"), ("--data x", "--out is"),
    ("--text a --top-p 0 --batch 0", "--batch is 0"), ("--text a", "nowhere"),
    ("--text a --out p.jsonl", "--out is for --data")])
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments, words):
    """Fails if a user's mistake ends in a traceback, or in exit code 0 or 1."""
    done = run_script("predict.py", *arguments.split(), "--run", "nowhere")
    assert_refused(done, "error: ", words)
