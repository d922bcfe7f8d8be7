"""benchmarks/real.py and its tables: jobs that stop and continue, and what their files hold.

The trainings are of the tiny model, on forty rows.
"""

import json
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT, write_rows

sys.path.insert(0, str(ROOT / "benchmarks"))

import real  # noqa: E402
import result_tables  # noqa: E402

SETS = {"comve": real.DataSet("Is it bad?", 40, seeds=1, max_answer=64, rows=20, valid_share=0.4)}
TRAINED = {
    "lm-only-words": "--cls-weight 0 --label-loss words --rank 2",
    "clsgen-label-words": "--head-start label-words --rank 2",
}
RUNS = [f"comve-{system}-s0" for system in TRAINED]

# real.py as a command, with these sets and systems instead of its own
SCRIPT = f"""
import sys
sys.path.insert(0, "benchmarks")
import real
from plumbing.script import run_main
from real import DataSet
real.SETS = {SETS}
real.TRAINED = {TRAINED}
run_main(real.main, when_stopped="stopped; the same command continues")
"""


@pytest.fixture
def folder(rows, tmp_path):
    """A data folder as examples/public_data.py writes it, every row with an explanation."""
    explained = [{"explanation": "It is so.", **row} for row in rows]
    data = tmp_path / "data" / "comve"
    data.mkdir(parents=True)
    write_rows(data / "train.jsonl", explained)
    test = [{**row, "id": f"t{row['id']}", "group": f"new {row['group']}"} for row in explained]
    test[:6] = [{**row, "group": f"g{i // 2}"} for i, row in enumerate(test[:6])]
    write_rows(data / "test.jsonl", test)
    swapped = [{**row, "id": f"{row['id']}-swapped", "label": 1 - row["label"]} for row in test]
    write_rows(data / "test_swapped.jsonl", swapped)
    return tmp_path


def flags(folder, model):
    return ["comve", "--folder", str(folder / "data"), "--model", str(model),
            "--work", str(folder / "work"), "--out", str(folder / "out")]


def test_stop_and_continue_with_two_jobs(folder, tiny, monkeypatch, capsys):
    """Fails if Ctrl-C loses a step or leaves a command running, if what is done is done again, or
    if a result lacks what a later table needs."""
    command = [sys.executable, "-c", SCRIPT, *flags(folder, tiny)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = [folder / "work" / title / "run" / "log.jsonl" for title in RUNS]
    while process.poll() is None and not all(has_steps(log) for log in logs):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130, (out, error)
    assert "the same command continues" in error
    assert not list((folder / "out").glob("*.json"))
    for log in logs:
        assert (log.parent / "resume" / "state.safetensors").exists()

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        steps = [line["step"] for line in lines if "lr" in line]
        assert steps == list(range(1, len(steps) + 1))
        assert "--resume" in (log.parents[1] / "log.txt").read_text()

    names = {path.stem for path in (folder / "out").glob("*.json")}
    assert names == {*RUNS, "comve-baselines", "comve-zero-shot"}
    check_result(folder / "out" / "comve-clsgen-label-words-s0.json", folder)
    zero_shot = json.loads((folder / "out" / "comve-zero-shot.json").read_text())
    assert "zero-shot label token" in zero_shot["metrics"]
    assert all(name.startswith("zero-shot") for name in zero_shot["metrics"])

    # given once more, there is nothing to do
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(real, "SETS", SETS)
    monkeypatch.setattr(real, "TRAINED", TRAINED)
    real.main(flags(folder, tiny))
    assert "4 jobs, 4 done before" in capsys.readouterr().out

    result_tables.main(["--results", str(folder / "out"), "--draws", "20",
                        "--figures", str(folder / "figures")])
    figure = ElementTree.parse(folder / "figures" / "comve_reliability.svg")
    assert "CLSGen, from the label words" in figure.getroot().itertext()
    tables = capsys.readouterr().out
    assert "| CLSGen, from the label words | 1 | " in tables
    assert "rows of groups that training has not seen" in tables
    assert "swapped pairs" in tables and "Reading again" in tables


def has_steps(log):
    return log.exists() and '"step": 2' in log.read_text()


def check_result(path, folder):
    result = json.loads(path.read_text())
    assert path.stat().st_size < 150_000
    assert (result["seed"], result["system"]) == (0, "clsgen-label-words")
    assert set(result["costs"]) == {"train", "eval", "valid", "unused", "swapped"}
    train = result["costs"]["train"]
    assert "--seed 0" in train["command"] and train["seconds"] > 0
    assert train["commit"] == real.commit()  # "" in a folder that git does not know
    assert "auroc" in result["last_validation"] and "head" in result["metrics"]

    lines = (folder / "work" / path.stem / "eval" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    test = result["test"]
    assert test["id"] == [record["id"] for record in records]
    p = 1 / (1 + np.exp(-np.array(test["z"])))
    assert p == pytest.approx([record["raw_probability"] for record in records], abs=1e-4)
    assert sum(test["nll"]) / sum(test["tokens"]) == pytest.approx(
        result["metrics"]["head"]["reference_nll"], abs=1e-3)

    valid = (folder / "work" / "comve-valid.jsonl").read_text().splitlines()
    assert result["valid"]["id"] == [json.loads(line)["id"] for line in valid]
    assert len(result["unused"]["z"]) == 4
    assert result["unseen_groups"]["n"] == 34
    assert len(result["swapped"]["z"]) == 40


def test_the_order_of_work():
    """Fails if the ablation no longer comes first, or a system or a seed is left out."""
    jobs = real.all_jobs(list(real.SETS))
    assert len({job.title for job in jobs}) == len(jobs) == 3 * (6 * 3 + 2) + 2 * (6 + 2) + 2 * 3
    assert {job.system for job in jobs[:24]} == set(real.ABLATION)
    assert {job.data for job in jobs[:40]} == {"notes", "esnli"}
    assert {job.data for job in jobs[40:60]} == {"comve"}


def test_a_job_killed_before_its_first_save_begins_again(folder, tiny):
    """Fails if the log that such a job has left keeps the same command from continuing."""
    args = real.parse(flags(folder, tiny))
    train = real.steps_of(real.Job("notes", "cls-only", 0), args)[0]
    assert train.resume() is None
    run = args.work / "notes-cls-only-s0" / "run"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("")
    assert train.resume() == [*train.command, "--overwrite"]


def test_a_step_that_continues_keeps_its_peaks(folder, tiny, monkeypatch):
    """Fails if the second part of a step forgets how much memory the first one took on the GPU."""
    args = real.parse([*flags(folder, tiny), "--device", "cuda"])
    job = real.Job("comve", "cls-only", 0)
    real.job_folder(job, args).mkdir(parents=True)
    step = real.steps_of(job, args)[0]
    monkeypatch.setitem(real.SCRIPTS, step.command[0], lambda flags: None)
    for peak in (5e9, 2e9):
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda peak=peak: peak)
        real.do_step(job, step, args)
    assert real.read_costs(job, args)[step.name]["peak_gpu_memory_gb"] == 5


def test_a_row_without_a_group_is_of_an_unseen_one(folder, tiny, rows):
    """Fails if a training row without a group makes all test rows without one known."""
    args = real.parse(flags(folder, tiny))
    args.work.mkdir(parents=True)
    bare = [{key: value for key, value in row.items() if key != "group"} for row in rows]
    for split in ("train", "valid"):
        write_rows(real.rows_path("comve", split, args), [*bare[:20], *rows[20:]])
    predictions = [{"true_label": i % 2, "probability": 0.5, "group": group}
                   for i, group in enumerate([None] * 12 + [row["group"] for row in rows[20:]])]
    assert real.unseen(real.Job("comve", "cls-only", 0), predictions, args)["n"] == 12


def test_a_failed_job_does_not_stop_the_others(folder, tiny, monkeypatch, capsys):
    """Fails if one broken system costs the results of the others, or if it goes unsaid."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(real, "SETS", SETS)
    monkeypatch.setattr(real, "all_jobs", lambda names: [
        real.Job("comve", "broken", 0), real.Job("comve", real.BASELINES)])
    monkeypatch.setitem(real.TRAINED, "broken", "--lr -1")
    with pytest.raises(ValueError, match="not done: comve-broken-s0"):
        real.main(flags(folder, tiny))
    assert (folder / "out" / "comve-baselines.json").exists()
    assert "comve-broken-s0: has failed" in capsys.readouterr().out
    assert "lr is -1" in (folder / "work" / "comve-broken-s0" / "log.txt").read_text()


@pytest.mark.parametrize("value, low, high, counts", [
    (0.03, -0.01, 0.07, False), (-0.03, -0.05, -0.01, True), (0.01, 0.005, 0.015, False)])
def test_which_differences_count(value, low, high, counts):
    """Fails if an interval that crosses zero, or less than the margin, becomes a result."""
    assert result_tables.is_large("auroc", value, low, high) == counts


@pytest.mark.parametrize("seed_deviation", [0.0, 0.5, 2.0, 8.0])
def test_the_interval_takes_rows_and_seeds(seed_deviation):
    """Fails if the seeds' spread is left out, or counts as if three seeds were many: then the truth
    is outside of the interval too often."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        values = rng.normal(0, seed_deviation, 3) + rng.normal()  # rows move all seeds together
        drawn = values[:, None] + rng.normal(size=200)
        _, low, high = result_tables.estimate(values, drawn)
        inside += low <= 0 <= high
    assert 920 <= inside <= 990, inside


def test_an_interval_stays_within_the_bounds_of_its_metric():
    """Fails if an AUROC near 1 has a limit above 1, a small loss one below 0, if values that are
    all the same have no interval, or if that of a difference is not symmetric."""
    values = np.array([0.98, 1.0, 0.99])
    drawn = values[:, None] + np.linspace(-0.01, 0.01, 200)
    auroc, log_loss = (result_tables.FUNCTIONS[name] for name in ("auroc", "log_loss"))
    value, low, high = result_tables.estimate(values, drawn, auroc)
    assert value == pytest.approx(0.99) and 0.9 < low < 0.985 and 0.99 < high < 1
    value, low, high = result_tables.estimate(values, drawn)
    assert value - low == pytest.approx(high - value) and high > 1
    value, low, high = result_tables.estimate(1 - values, 1 - drawn, log_loss)
    assert 0 < low < value < high and value / low == pytest.approx(high / value)
    assert result_tables.estimate(np.ones(3), np.ones((3, 200)), auroc) == (1, 1, 1)


def test_a_difference_pairs_the_seeds():
    """Fails if a seed is compared with another one, or if resampled rows are not the same ones."""
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2

    def scores(seed, shift):
        p = 1 / (1 + np.exp(-rng.normal(shift * (2 * y - 1))))
        return result_tables.Scores(seed, y, None, p)

    own = [scores(seed, seed) for seed in (0, 1, 3)]
    systems = {"a": own, "b": own[1:], "c": [scores(None, 0.5)]}
    drawn = result_tables.draw(systems, 50)
    pair = ((own, drawn["a"]), (systems["b"], drawn["b"]))
    assert result_tables.estimate_difference("auroc", *pair) == (0, 0, 0)
    untrained = ((own, drawn["a"]), (systems["c"], drawn["c"]))
    value, low, high = result_tables.estimate_difference("auroc", *untrained)
    each = [one.measure(np.arange(100))["auroc"] for one in own]
    other = systems["c"][0].measure(np.arange(100))["auroc"]
    assert value == pytest.approx(np.mean(each) - other) and low < value < high


def test_a_table_has_a_line_for_what_cannot_be_computed(capsys):
    """Fails if systems that share no seed end in a traceback, or if one whose p separates the
    classes loses its line of the calibration table."""
    y = np.arange(40) % 2
    p = np.clip(0.2 + 0.6 * y + np.linspace(-0.1, 0.1, 40), 0, 1)

    def scores(seed):
        return result_tables.Scores(seed, y, None, p, raw_p=p)

    sets = {"notes": {result_tables.OURS: [scores(0)], "lm-only": [scores(1)]}}
    drawn = {"notes": result_tables.draw(sets["notes"], 20)}
    result_tables.print_differences("auroc", sets, drawn)
    assert "LM-only" not in capsys.readouterr().out
    result_tables.print_calibration(sets)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "LM-only | raw" in line]
    ece = f"{result_tables.ece(y, p):.3f}"
    assert line.split(" | ")[2:4] == ["n/a", "n/a"] and f"| {ece} (" in line


@pytest.mark.parametrize("text, found", [
    ("RESULTS: Many. CONCLUSIONS: It works. It is safe.", "It works. It is safe."),
    ("CONCLUSION: It works.\nFUNDING: None.", "It works."),
    ("All rats ran. None of them stopped.", "None of them stopped."),
    ("CONCLUSION: It works. TRIAL REGISTRATION: NCT1.", "It works."),
])
def test_an_abstracts_conclusion(text, found):
    """Fails if the explanation of CliniFact's rows is something else of the abstract."""
    assert real.conclusion(text) == found
