"""The training loop end to end on a tiny model: what it learns, writes, refuses, and repeats."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, make_run, run_script, write_rows
from safetensors.torch import load_file, save_file

import eval as evaluation
import export
from clsgen import CLSGen, add_lora
from data import Example
from metrics import auroc, best_f1_threshold, calibrate
from plumbing.checkpoint import load_llama
from plumbing.files import write_tensors
from plumbing.ranks import Ranks
from plumbing.resume import STATE, compare_configs, digest_of, read_state, restore
from plumbing.train_arguments import check_arguments, make_parser, parse
from prompts import Prompts
from run import load_run
from train import epoch_order, main, micro_batches, schedule, validate


def arguments(tiny, rows_file, out, *more):
    flags = "--epochs 6 --batch 8 --dtype float32 --rank 4 --valid-fraction 0.3 --lr 0.02"
    flags += " --head-lr 0.02 --max-answer 40 --seed 3"
    files = ["--data", rows_file, "--model", tiny, "--out", out]
    return [*map(str, files), *flags.split(), *map(str, more)]


@pytest.fixture(scope="module")
def trained(tiny, rows_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "joint"
    main(arguments(tiny, rows_file, out))
    return out


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_both_losses_fall_and_the_run_predicts(trained, rows):
    """Fails if one of the losses does not reach the parameters, or another model is saved."""
    steps = [line for line in log_of(trained) if "bce" in line]
    assert steps[-1]["bce"] < 0.8 * steps[0]["bce"] and steps[-1]["lm"] < 0.5 * steps[0]["lm"]
    records = load_run(trained).predict(rows)
    labels, p = [row["label"] for row in rows], [record["probability"] for record in records]
    assert auroc(labels, p) > 0.9


def test_the_log_starts_with_the_whole_configuration(trained):
    """Fails if a flag, the resolved dtype or a version is not on record."""
    config = log_of(trained)[0]["config"]
    assert config["lr"] == 0.02 and config["dtype"] == "float32" and config["versions"]["torch"]
    assert config["format"] == "chatml"
    assert config["steps"] == sum("bce" in line for line in log_of(trained))


def test_the_same_seed_gives_the_same_bytes(tiny, rows_file, trained, tmp_path):
    """Fails if order, initial values or anything else is drawn from an unseeded source."""
    main(arguments(tiny, rows_file, tmp_path / "again"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_calibration_is_that_of_the_validation_rows(tiny, rows, rows_file, tmp_path, capsys):
    """Fails if they are fitted on training rows, or the threshold on uncalibrated probabilities."""
    valid = [{**r, "id": f"v{i}", "label": r["label"] ^ (i % 7 == 0)} for i, r in enumerate(rows)]
    path = write_rows(tmp_path / "valid.jsonl", valid)
    # so long that the logits spread: on nearly equal ones, rounding moves the fit
    main(arguments(tiny, rows_file, tmp_path / "run", "--valid", path, "--epochs", 12))
    assert "40 validation rows, this many share with a training row: group 40, text 40" in (
        capsys.readouterr().out)
    meta = json.loads((tmp_path / "run" / "clsgen.json").read_text())
    records = load_run(tmp_path / "run").predict(valid, explain=False)
    y, raw, p = (np.array([record[key] for record in records])
                 for key in ("true_label", "raw_probability", "probability"))
    temperature, bias, _ = calibrate(y, np.log(raw / (1 - raw)))
    due = {"temperature": temperature, "bias": bias}
    assert temperature != 1 and meta["calibration"] == pytest.approx(due, rel=1e-3)
    assert meta["threshold"] == pytest.approx(best_f1_threshold(y, p), abs=1e-4)


@pytest.mark.parametrize("weight, scorer", [
    ("--lm-weight", "head"), ("--cls-weight", "label_token")])
def test_the_baselines_are_the_same_loop(tiny, rows, tmp_path, weight, scorer):
    """Fails if a zero weight still trains its part: the head must stay where it starts, at the
    label words."""
    path = write_rows(tmp_path / "rows.jsonl", [row for row in rows if "explanation" in row])
    main(arguments(tiny, path, tmp_path / "run", weight, 0))
    meta = json.loads((tmp_path / "run" / "clsgen.json").read_text())
    assert meta["scorer"] == scorer
    steps = [line for line in log_of(tmp_path / "run") if "bce" in line]
    measured = [line["valid"]["auroc"] for line in log_of(tmp_path / "run") if "valid" in line]
    assert measured and all((auroc is None) == (scorer == "label_token") for auroc in measured)
    if scorer == "head":
        assert {line["lm"] for line in steps} == {0.0} and steps[-1]["bce"] < steps[0]["bce"]
    else:
        assert steps[-1]["lm"] < 0.5 * steps[0]["lm"]
        main(arguments(tiny, path, tmp_path / "other", weight, 0, "--head-lr", 9))
        heads = [load_run(tmp_path / name).model.score.weight for name in ("run", "other")]
        untrained = CLSGen(load_llama(tiny, torch.float32))
        untrained.start_head(Prompts(tiny).label_ids)
        assert torch.equal(*heads) and torch.equal(heads[0], untrained.score.weight)


def test_label_loss_is_one_more_term_of_steps_and_validation(tiny, rows, tmp_path):
    """Fails if the ablation trains without its term, or the log leaves it out."""
    path = write_rows(tmp_path / "rows.jsonl", [row for row in rows if "explanation" in row])
    for kind in ("vocabulary", "words"):
        out = tmp_path / kind
        main(arguments(tiny, path, out, "--cls-weight", 0, "--label-loss", kind))
        steps = [line for line in log_of(out) if "bce" in line]
        measured = [line["valid"] for line in log_of(out) if "valid" in line]
        assert steps[-1]["label"] < steps[0]["label"] and measured[-1]["label"] > 0
        assert measured[-1]["bce"] is None
    assert load_run(tmp_path / "words").fitted.scorer == "label_token"


def test_a_random_head_starts_elsewhere_by_the_seed(tiny, rows_file, tmp_path):
    """Fails if --head-start is ignored, or the start does not follow from the seed."""
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ("--head-start", "random", "--head-lr", 1e-12, "--seed", seed)
        main(arguments(tiny, rows_file, tmp_path / name, *flags))
        heads.append(load_run(tmp_path / name).model.score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std() < 0.03


def test_two_validation_rows_are_shown_once_each(tiny, rows, tmp_path, capsys):
    """Fails if the middle row of two is shown again as the last one."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    valid = write_rows(tmp_path / "valid.jsonl", [rows[0], rows[1]])
    assert rows[0]["label"] != rows[1]["label"]
    main(arguments(tiny, data, tmp_path / "run", "--valid", valid, "--epochs", 0.1))
    assert capsys.readouterr().out.count("probability 0.") == 2


def test_the_first_and_the_last_screen(tiny, rows, tmp_path, capsys):
    """Fails if one of the lines is missing that a person checks before and after a training."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", rows)
    main(arguments(tiny, data, tmp_path / "run", "--epochs", 1, "--question", "Bad?"))
    first, last = capsys.readouterr().out.split("the first row, format chatml:")
    for words in (
        "question      Bad?\n", "rows          28: ", "explanations  22; 6 rows without one\n",
        "validation    12 rows: ", "weights of LoRA, 32 of the score head",
        "steps         4, of 8 rows; ",
        f"log           {tmp_path}/run/log.jsonl",
    ):
        assert words in first, first
    assert "min to go" in last
    validation, fitted, cost, folder, following = last.splitlines()[-5:]
    assert re.match(r"validation    AUROC \d.* log loss \d.* on 12 rows", validation)
    assert re.match(r"fitted there  nothing is fitted: .* the threshold is 0.5", fitted)
    assert re.match(r"cost          0.\d min, \d.\d GB of memory", cost)
    assert folder == f"run folder    {tmp_path}/run"
    assert following == f"next          python eval.py --run {tmp_path}/run --data {test}"


def test_label_only_rows_have_no_place_in_lm_only_training(tiny, rows_file, tmp_path):
    """Fails if --cls-weight 0 silently trains on fewer rows than it was given."""
    with pytest.raises(ValueError, match="rows have none, the first is"):
        main(arguments(tiny, rows_file, tmp_path / "run", "--cls-weight", 0))


def test_validation_without_explanations_has_no_lm_loss(tiny):
    """Fails if rows without an answer token are reported as texts that are predicted perfectly."""
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 2, 4.0))
    examples = [Example(i, [3, 4, 5], [], i % 2, 0) for i in range(4)]
    args = parse(["--data", "rows.jsonl"])
    measured, z = validate(model, examples, args, Prompts(tiny), torch.device("cpu"), Ranks("cpu"))
    assert measured["lm"] is None and measured["bce"] > 0 and z.shape == (4,)


def test_the_label_loss_of_validation_is_a_mean_over_the_rows_with_an_answer(tiny):
    """Fails if rows without an explanation, which have no label's token, make it look lower."""
    prompts = Prompts(tiny)
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 2, 4.0))
    args = parse(["--data", "rows.jsonl", "--cls-weight", "0", "--label-loss", "words"])
    answered = [Example(i, [3, 4, 5], prompts.answer(i % 2, "So."), i % 2, 0) for i in range(4)]
    bare = [Example(i, [3, 4, 5], [], i % 2, 0) for i in range(4, 8)]
    there = torch.device("cpu"), Ranks("cpu")
    few, _ = validate(model, answered, args, prompts, *there)
    all_rows, _ = validate(model, answered + bare, args, prompts, *there)
    assert all_rows["label"] == pytest.approx(few["label"], rel=1e-5)


def test_validation_takes_as_many_rows_at_a_time_as_training(tiny, monkeypatch):
    """Fails if it runs out of memory where training did not, for the logits of more rows."""
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 2, 4.0))
    examples = [Example(i, [3] * (i + 1), [4] * (9 - i), i % 2, 0) for i in range(7)]
    args = parse(["--data", "rows.jsonl", "--micro-batch", "2"])
    sizes, forward = [], CLSGen.forward
    monkeypatch.setattr(CLSGen, "forward", lambda self, batch: (
        sizes.append(len(batch.labels)), forward(self, batch))[1])
    validate(model, examples, args, Prompts(tiny), torch.device("cpu"), Ranks("cpu"))
    assert sizes == [2, 2, 2, 1]


def test_keep_best_keeps_the_best_validation(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if the last step is kept all the same, or the worst; or its weights are not those."""
    script, weights = [0.6, 0.4, 0.5, 0.3, 0.7, 0.9, 0.8], []

    def scripted(model, *rest):  # on real numbers it depends on the threads which step is best
        measured, z = validate(model, *rest)
        weights.append(model.score.weight.detach().clone())
        return measured | {"bce": script[len(weights) - 1]}, z

    monkeypatch.setattr("train.validate", scripted)
    flags = ("--keep-best", "--valid-every", 3)
    main(arguments(tiny, rows_file, tmp_path / "run", *flags))
    valid = {x["step"]: x["valid"]["bce"] for x in log_of(tmp_path / "run") if "valid" in x}
    kept = json.loads((tmp_path / "run" / "clsgen.json").read_text())["step"]
    assert kept == 12 and valid[kept] == min(valid.values()) < valid[max(valid)]
    head = load_run(tmp_path / "run").model.score.weight
    assert torch.equal(head, weights[3]) and not torch.equal(head, weights[-1])


def test_an_epoch_takes_every_row_once_at_random_and_stratified():
    """Fails if rows repeat or are left out within an epoch, or steps of one class."""
    labels = np.arange(40) % 4 == 0
    epochs = [epoch_order(labels, 0, epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    for epoch in epochs:
        shares = [labels[epoch[i : i + 8]].sum() for i in range(0, 40, 8)]
        assert set(shares) <= {1, 2, 3}, "a fourth of 8 rows, give or take one"


def test_micro_batches_hold_each_row_once_sorted_by_length():
    """Fails if a row of the step is lost, or short and long rows are padded together."""
    examples = [[0] * n for n in (5, 1, 4, 2, 3)]
    parts = micro_batches(examples, 2)
    assert [[len(row) for row in part] for part in parts] == [[1, 2], [3, 4], [5]]


def test_schedule_rises_and_ends_at_zero():
    """Fails if a step has rate zero, the peak is missed, or the decay stops short."""
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[0] == 0.1 and max(shares) == shares[9] == 1.0
    assert shares[99] == pytest.approx(1 / 91) and all(np.diff(shares[9:]) < 0)
    assert schedule(0, 1, 0.05) == 1.0


def test_all_impossible_flags_are_named_at_once(tmp_path):
    """Fails if only the first is reported, or one passes."""
    (tmp_path / "clsgen.json").write_text("{}")
    flags = "--rank 0 --lr -1 --cls-weight 0 --lm-weight 0 --valid-fraction 1 --epochs inf"
    flags += " --valid-every 0 --warmup 2 --keep-best"
    with pytest.raises(ValueError) as error:
        check_arguments(parse(["--data", "x", "--out", str(tmp_path), *flags.split()]))
    named = ("--rank is 0", "--lr is -1", "nothing would train", "--valid-fraction is 1.0")
    named += ("--epochs is inf", "--valid-every is 0", "--warmup is 2", "--keep-best")
    named += ("has a run already",)
    for words in named:
        assert words in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--batch", "0"], "--batch is 0"),
    (["--model", "nowhere"], "nowhere"),
])
def test_a_wrong_call_is_one_sentence_and_exit_code_2(tiny, rows_file, tmp_path, flags, words):
    """Fails if a user's mistake ends in a traceback, or leaves a run folder behind."""
    done = run_script("train.py", *arguments(tiny, rows_file, tmp_path / "run"), *flags)
    assert_refused(done, "error: ", words)
    assert not (tmp_path / "run").exists()


def test_evaluation_of_a_run_end_to_end(trained, rows_file, capsys):
    """Fails if a column of the table, the JSON or a prediction is missing."""
    command = ["--run", str(trained), "--data", str(rows_file), "--draws", "50", "--explain", "8"]
    evaluation.main(command)
    out = capsys.readouterr().out
    assert "AUROC" in out and "majority" in out and "label token" in out
    report = json.loads((trained / "eval" / rows_file.stem / "eval.json").read_text())
    assert report["n"] == 40 and report["metrics"]["head"]["n_explained"] == 8
    lines = (trained / "eval" / rows_file.stem / "predictions.jsonl").read_text().splitlines()
    explained = [json.loads(line)["explanation"] is not None for line in lines]
    assert len(explained) == 40 and sum(explained) == 8
    with pytest.raises(ValueError, match="exists"):
        evaluation.main(command)


# --- stopping and going on ------------------------------------------------------------------------
def start(*command, module=(), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *module, ROOT / "train.py", *command]
    return subprocess.Popen(
        [*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True, **options)


def steps_done(out):
    return (out / "log.jsonl").read_text().count('"tokens"') if (out / "log.jsonl").exists() else 0


def wait_for(process, out, step):
    while steps_done(out) < step and process.poll() is None:
        time.sleep(0.005)


def assert_same_run(run, due):
    """Weights to the last byte, and the log but for its times."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / name).read_bytes() == (due / name).read_bytes()
    logs = [[line | {"seconds": 0} for line in log_of(x)] for x in (run, due)]
    assert logs[0] == logs[1]


KILLS = int(os.environ.get("CLSGEN_KILLS", 5))


def test_a_killed_run_ends_as_if_nothing_had_happened(tiny, rows_file, tmp_path):
    """Fails if a save is ever half written or misses part of the state (moments, position, log),
    or if a resumed run takes other rows. CLSGEN_KILLS=20 kills more often."""
    due, out, chance = tmp_path / "due", tmp_path / "out", random.Random(time.time_ns())
    # at this rate the best validation comes early, so that a save that forgets it shows
    flags = ["--save-every", 1, "--valid-every", 7, "--epochs", 30, "--keep-best", "--lr", 0.1]
    main(arguments(tiny, rows_file, due, *flags))
    command = arguments(tiny, rows_file, out, *flags)
    for _ in range(KILLS):
        resume = ["--resume", out] if (out / STATE).exists() else [*command, "--overwrite"]
        process = start(*resume)
        wait_for(process, out, steps_done(out) + chance.randrange(1, 15))
        time.sleep(chance.random() / 20)
        process.kill()
        process.communicate()
    assert steps_done(out) > KILLS
    process = start("--resume", out)
    assert "error" not in process.communicate()[1]
    assert_same_run(out, due)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
        tiny, rows_file, tmp_path, number, code):
    """Fails if the step under way is lost, another exit code comes, or the sentence is missing."""
    out = tmp_path / "out"
    rarely = ["--epochs", 3000, "--save-every", 10**6, "--valid-every", 10**6]
    process = start(*arguments(tiny, rows_file, out, *rarely))
    wait_for(process, out, 3)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    done = steps_done(out)
    assert f"stopped after step {done}; --resume {out} continues" in error
    assert read_state(out)[0]["step"] == done
    with pytest.raises(ValueError, match="epochs was 3000.0, is 1.0"):
        main(["--resume", str(out), "--epochs", "1"])
    with pytest.raises(ValueError, match="--resume .* or --overwrite"):
        main(arguments(tiny, rows_file, out))


def unfinish(run):
    """Makes a finished run one that was stopped between its last save and its end."""
    (run / "clsgen.json").unlink()


def rename_hashes(run, data):
    """Gives a state the name that earlier versions had for the hash of the training rows."""
    tensors = load_file(run / STATE)
    state, _ = read_state(run)
    state["config"][f"sha256 of {data}"] = state["config"].pop("data_sha256")
    text = json.dumps(state)
    save_file(tensors, run / STATE, {"state": text, "sha256": digest_of(text, tensors)})


def test_resume_refuses_what_changed_and_names_it(tiny, rows_file, tmp_path, capsys, monkeypatch):
    """Fails if a run goes on with other rows, flags or base; or is stopped by what changes bits
    only, the number of threads."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(rows_file.read_bytes())
    resume = ["--resume", str(tmp_path / "run")]
    main(arguments(tiny, rows, tmp_path / "run", "--epochs", 0.3))
    unfinish(tmp_path / "run")
    with pytest.raises(ValueError, match="lr was 0.02, is 0.5.*--init-adapter .*run --out OTHER"):
        main([*resume, "--lr", "0.5"])
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + "[1]\n")
    with pytest.raises(ValueError, match="log.jsonl does not fit"):
        main(resume)
    log.write_text(log.read_text().replace("[1]\n", '{"step": 2, "half'))
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    main(resume)
    assert "is 77: the result may differ" in capsys.readouterr().out
    unfinish(tmp_path / "run")
    rows.write_text(rows.read_text().replace("case 1:", "case 100:"))
    with pytest.raises(ValueError, match="data_sha256 was"):
        main(resume)
    (tmp_path / "run" / STATE).write_bytes((tmp_path / "run" / STATE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="nothing to resume from"):
        main(resume)


@pytest.mark.parametrize("old", [False, True])
def test_a_run_whose_files_were_moved_can_be_resumed(tiny, rows_file, trained, tmp_path, old):
    """Fails if places are compared and not contents, if a state with the key of earlier versions is
    refused, if the flag to give is not named, or if the new places are forgotten."""
    model, data, adapter = (tmp_path / name for name in ("model", "data.jsonl", "adapter"))
    shutil.copytree(tiny, model)
    shutil.copy(rows_file, data)
    shutil.copytree(trained, adapter)
    flags = ["--valid", data, "--init-adapter", adapter, "--epochs", 1]
    main(arguments(model, data, tmp_path / "run", *flags))
    due = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    unfinish(tmp_path / "run")
    if old:
        rename_hashes(tmp_path / "run", data)
    shutil.rmtree(adapter)
    for path in (model, data, tmp_path / "run"):
        path.rename(tmp_path / f"new-{path.name}")

    run = tmp_path / "new-run"
    with pytest.raises(ValueError, match="--data names .*--valid names .*--model names"):
        main(["--resume", str(run)])
    moved = {"--data": "new-data.jsonl", "--valid": "new-data.jsonl", "--model": "new-model"}
    command = ["--resume", str(run)]
    for flag, name in moved.items():
        command += [flag, str(tmp_path / name)]
    main(command)
    assert (run / "adapter_model.safetensors").read_bytes() == due
    assert load_run(run).about["base"] == str(tmp_path / "new-model")


def test_the_places_of_a_resumed_run_are_remembered(tiny, rows_file, tmp_path):
    """Fails if a run that was stopped again has to be told once more where its files are."""
    data = shutil.copy(rows_file, tmp_path / "rows.jsonl")
    out = tmp_path / "run"
    main(arguments(tiny, data, out, "--epochs", 0.3))
    unfinish(out)
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 32.0))
    parts = model.parameters_by_part()
    optimizer = torch.optim.AdamW([*parts["lora"].values(), *parts["head"].values()])
    config = read_state(out)[0]["config"] | {"data": "elsewhere.jsonl"}
    state, _ = restore(out, parts["lora"] | parts["head"], optimizer, config)
    assert state["config"] == config


def test_a_training_that_runs_is_not_replaced(tiny, rows_file, tmp_path):
    """Fails if a second training in the same folder takes the log of one that saved nothing yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="may be running; give another --out, or --overwrite"):
        main(arguments(tiny, rows_file, tmp_path / "run"))


def test_a_merged_run_is_not_resumed(tiny, rows_file, tmp_path):
    """Fails if the advice is to start from an adapter that a merged folder does not have."""
    make_run(tiny, tmp_path / "run")
    export.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "merged")])
    with pytest.raises(ValueError, match="merged model.* --model .*merged trains further"):
        main(["--resume", str(tmp_path / "merged")])


def test_a_blank_question_is_refused(tiny, rows_file, tmp_path):
    """Fails if a training starts that asks nothing."""
    with pytest.raises(ValueError, match="--question is blank"):
        main(arguments(tiny, rows_file, tmp_path / "run", "--question", " "))

    # a training that an earlier version has begun so continues
    call = arguments(tiny, rows_file, tmp_path / "run", "--question", " ", "--resume", "runs/x")
    Prompts.from_arguments(make_parser().parse_args(call))


def test_a_finished_run_is_not_done_again(tiny, rows_file, trained, tmp_path, capsys):
    """Fails if --resume repeats the end of a finished run in silence, ends in an error where there
    is nothing to do, or does not say how to train further."""
    before = (trained / "clsgen.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        main(["--resume", str(trained)])
    assert not stop.value.code and f"{trained} is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"is finished; --init-adapter {trained} --out OTHER"):
        main(["--resume", str(trained), "--epochs", "9"])
    assert (trained / "clsgen.json").stat().st_mtime_ns == before


def test_a_run_can_be_trained_further_from_its_weights(tiny, rows, rows_file, trained, tmp_path):
    """Fails if --init-adapter of a run folder starts from another head, or from another LoRA."""
    further = ["--init-adapter", trained, "--epochs", 0.1, "--lr", 1e-9, "--head-lr", 1e-9]
    main(arguments(tiny, rows_file, tmp_path / "run", *further))
    first, second = (load_run(folder) for folder in (trained, tmp_path / "run"))
    assert second.raw_logits(rows) == pytest.approx(first.raw_logits(rows), abs=1e-4)
    assert [record["explanation"] for record in second.predict(rows[:4])] == [
        record["explanation"] for record in first.predict(rows[:4])]


def test_a_training_of_before_keeps_its_validation_rows(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if a state that does not say how its rows were split is refused, or takes other rows
    now; or if one that says it is taken for an older one. The ids are from the code of then."""
    out, taken = tmp_path / "run", []
    main(arguments(tiny, rows_file, out, "--epochs", 0.3))
    monkeypatch.setattr("train.finish", lambda args, model, prompts, rows, *rest: taken.append(
        {int(row["id"][1:]) for row in rows}))
    unfinish(out)
    main(["--resume", str(out)])

    state, tensors = read_state(out)
    assert state["config"].pop("split")
    text = json.dumps(state)
    write_tensors(out / STATE, tensors, {"state": text, "sha256": digest_of(text, tensors)})
    main(["--resume", str(out)])
    now, before = taken
    assert before == {32, 33, 24, 25, 36, 37, 16, 17, 6, 7, 26, 27} != now


def test_explanations_that_contradict_their_labels_are_refused(tiny, rows, tmp_path):
    """Fails if "Yes. No. It is bad." trains unasked, if the flag does not allow it, or if a
    training that was allowed to can't be continued without the flag."""
    said = [{**row, "explanation": "No. It is bad."} if row["label"] else row for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", said)
    few = ("--epochs", 0.3)
    with pytest.raises(ValueError, match="16 explanations .* 'r0' .*--allow-contradictions"):
        main(arguments(tiny, path, tmp_path / "run", *few))
    assert not (tmp_path / "run").exists()
    main(arguments(tiny, path, tmp_path / "run", "--allow-contradictions", *few))
    unfinish(tmp_path / "run")
    main(["--resume", str(tmp_path / "run")])


def test_what_is_odd_is_said_before_the_training(tiny, rows, rows_file, tmp_path, capsys):
    """Fails if one of these starts without a word: few steps, the default question, explanations of
    one class, validation rows that are training rows, be they a file's or split off."""
    plain = [{"text": row["text"], "label": row["label"]} for row in rows]
    bad = [row | ({"explanation": "It is bad."} if row["label"] else {}) for row in plain]
    path = write_rows(tmp_path / "bad.jsonl", bad + bad)
    few = ("--epochs", 0.3, "--overwrite")

    main(arguments(tiny, path, tmp_path / "run", *few))
    out = capsys.readouterr().out
    assert "56 training rows, 8 a step, make only 2 steps" in out
    assert "the question is the default one" in out
    assert "none of the 48 No rows has an explanation" in out
    assert re.search("warning: of 24 validation rows, this many share .* text [0-9]+;", out)

    # a line number is no id, and other rows share nothing
    other = write_rows(tmp_path / "other.jsonl", [
        {**row, "text": row["text"] + "!"} for row in plain])
    for valid, shared in ((path, "of 80 validation rows, .*: text 80;"), (other, None)):
        main(arguments(tiny, path, tmp_path / "run", *few, "--valid", valid, "--question", "Bad?"))
        out = capsys.readouterr().out
        assert "default one" not in out
        assert bool(re.search(shared or "validation rows, this many", out)) == bool(shared)


def test_another_read_out_does_not_continue_a_training(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if a fork that reads another token goes on where the last one was read."""
    main(arguments(tiny, rows_file, tmp_path / "run", "--epochs", 0.3))
    unfinish(tmp_path / "run")
    main(["--resume", str(tmp_path / "run")])
    unfinish(tmp_path / "run")
    read_out = CLSGen.read_out
    monkeypatch.setattr(CLSGen, "read_out", lambda self, h, end: read_out(self, h, end - 1))
    with pytest.raises(ValueError, match="another read-out"):
        main(["--resume", str(tmp_path / "run")])


def test_a_flag_that_is_gone_does_not_continue_a_training():
    """Fails if only the flags of now are compared, so that a fork's own is dropped in silence."""
    with pytest.raises(ValueError, match="brier_weight was 0.1, is None"):
        compare_configs("run", {"lr": 1, "brier_weight": 0.1}, {"lr": 1})


@pytest.mark.parametrize("trouble", ["full", "vanished", "blocked"])
def test_a_disk_that_fails_leaves_the_last_save(tiny, rows_file, tmp_path, trouble):
    """Fails if a save in place cuts the old one, or the error is a traceback. "full": no file may
    grow beyond 16 kB, as on a full disk; "blocked": there is a file where a folder is due."""
    out, due = tmp_path / "out", tmp_path / "due"
    flags = ["--epochs", 30, "--save-every", 2]
    main(arguments(tiny, rows_file, due, *flags))
    process = start(*arguments(tiny, rows_file, out, *flags))
    wait_for(process, out, 3)
    process.kill()
    process.communicate()
    saved = (out / STATE).read_bytes()
    limit = (16384, 16384) if trouble == "full" else (resource.RLIM_INFINITY,) * 2
    process = start("--resume", out, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, limit))
    if trouble != "full":
        wait_for(process, out, steps_done(out) + 1)
        (out if trouble == "vanished" else out / "resume").rename(tmp_path / "away")
        (out / "resume").touch() if trouble == "blocked" else None
    error = process.communicate()[1].split("\n")[-2]
    assert process.returncode == 2 and error.startswith("error: "), error
    if trouble == "full":
        assert (out / STATE).read_bytes() == saved
    else:
        (out / "resume").unlink() if trouble == "blocked" else None
        (tmp_path / "away").rename(out if trouble == "vanished" else out / "resume")
    assert start("--resume", out).communicate()
    assert_same_run(out, due)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tiny, rows_file, tmp_path, what, monkeypatch):
    """Fails if the weights of the last save are lost, or the rows are not named."""
    main(arguments(tiny, rows_file, tmp_path / "run", "--epochs", 0.3))
    saved = (tmp_path / "run" / STATE).read_bytes()
    if what == "loss":
        monkeypatch.setattr("train.joint_loss", lambda z, *_: {"bce": z.sum() * float("nan")})
    else:
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: float("nan"))
    with pytest.raises(ValueError, match=rf"{what} is not finite; rows.*: \['r\d+', 'r\d+'"):
        main(arguments(tiny, rows_file, tmp_path / "other"))
    assert not (tmp_path / "other" / "clsgen.json").exists()
    assert (tmp_path / "run" / STATE).read_bytes() == saved


def test_two_processes_take_the_step_that_one_takes(tiny, rows_file, tmp_path):
    """Fails if ranks share rows, scale the loss otherwise, or count their own tokens only."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outs = [tmp_path / name for name in ("one", "two")]
    slowly = ["--lr", 0.005, "--head-lr", 0.005]  # near 0 a loss is mostly rounding
    for epochs in (0.3, 4):  # one step, then a run
        for out, module in zip(outs, ([], torchrun), strict=True):
            more = ["--epochs", epochs, "--overwrite", *slowly]
            process = start(*arguments(tiny, rows_file, out, *more), module=module)
            assert process.communicate() and process.returncode == 0
        if epochs < 1:  # after one step AdamW's first moment is a tenth of the gradient
            one, two = (load_file(out / STATE) for out in outs)
            for name in one:
                if name.startswith("exp_avg."):
                    torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)
    one, two = ([x["valid"] for x in log_of(out) if "valid" in x][-1] for out in outs)
    assert two == pytest.approx(one, rel=1e-3)
    stopped = tmp_path / "stopped"
    command = arguments(tiny, rows_file, stopped, "--epochs", 4, *slowly)
    process = start(*command, module=torchrun)
    wait_for(process, stopped, 5)
    process.terminate()
    process.communicate()
    assert (stopped / STATE).exists() and not (stopped / "clsgen.json").exists()
    assert start("--resume", stopped, module=torchrun).communicate()
    assert_same_run(stopped, outs[1])

    # a cluster's signal reaches every process, and each once more by way of torchrun
    at_once = tmp_path / "at-once"
    rarely = ["--valid-every", 1000, "--save-every", 1000]
    command = arguments(tiny, rows_file, at_once, "--epochs", 40, *rarely)
    process = start(*command, module=torchrun)
    wait_for(process, at_once, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children), process.pid]:
        os.kill(pid, signal.SIGTERM)
    _, error = process.communicate()
    assert error.count("stopped after step") == 1 and error.count("torchrun ends it") == 2, error
    assert read_state(at_once)[0]["step"] == steps_done(at_once)

    unfinish(stopped)
    with pytest.raises(ValueError, match="ranks was 2, is 1"):
        main(["--resume", str(stopped)])
