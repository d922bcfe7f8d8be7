"""eval.py and what reads its results, with a tiny model. The metrics themselves: test_metrics.py.

Every test names the mutation that it would catch.
"""

import json
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_rows

import eval as ev
import train
from clsgen import TARGETS, CLSGen, add_lora, base_model
from metrics import best_f1_threshold, calibrate, log_loss, sigmoid
from model import Llama
from plumbing.checkpoint import base_fingerprint, load_llama, read_config
from prompts import Prompts
from run import Fitted, Run, fit, load_run, save_run
from text_metrics import collapse

sys.path.insert(0, str(ROOT / "benchmarks"))
import calibration  # noqa: E402
import comprehensiveness as comp  # noqa: E402
import coverage  # noqa: E402
import llama8b  # noqa: E402
import random_llama  # noqa: E402
import speed  # noqa: E402
import swapped  # noqa: E402
from plumbing import eval_tables  # noqa: E402


def test_the_threshold_is_one_of_calibrated_probabilities():
    """Fails if it is one of p before calibration, or if temperature and bias are not passed on."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20000)
    y, z = rng.random(20000) < 1 / (1 + np.exp(-logit)), 3 * (logit - 0.5)
    fitted, sentence = fit("head", y, z, 0.4)
    temperature, bias, calibration = calibrate(y, z)
    assert (fitted.temperature, fitted.bias) == (temperature, bias)
    p = sigmoid(z / fitted.temperature + fitted.bias)
    assert fitted.threshold == best_f1_threshold(y, p)
    assert sentence == f"{calibration}; threshold {fitted.threshold:.3f}"
    assert (fitted.scorer, fitted.base_rate) == ("head", 0.4)


@pytest.fixture(scope="module")
def runs(tiny, rows_file, tmp_path_factory):
    """A folder with two runs of random LoRA and head; in `out` the results of comparing them."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name, scorer, base_rate in ((0, "joint", "head", 0.4), (1, "lm", "label_token", 0.3)):
        torch.manual_seed(seed)
        model = CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8.0)).eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        prompts = Prompts(tiny, "Is it bad?", max_answer=12)
        fitted = Fitted(scorer, temperature=2.0, bias=0.5, threshold=0.6,
                        base_rate=base_rate)
        about = {"base": str(tiny), "base_fingerprint": base_fingerprint(tiny),
                 "lora": {"rank": 4, "alpha": 8, "targets": list(TARGETS)}}
        (folder / name).mkdir()
        save_run(Run(model, prompts, fitted), folder / name, about)
    ev.main(f"--run {folder}/joint --run {folder}/lm --model {tiny} --data {rows_file} --batch 7 "
            f"--draws 20 --out {folder}/out".split())
    return folder


def read(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "eval.json").read_text()), list(map(json.loads, lines))


def test_reference_sums(runs, rows, tiny):
    """Fails if prompt or pad tokens count, if rows are mixed up, if the KL is turned round, or if
    LoRA stays off."""
    run, base = load_run(runs / "joint"), load_llama(tiny, torch.float32)
    for row, found in zip(rows, run.reference_sums(rows, 7), strict=True):
        if "explanation" not in row:
            assert not found.any()
            continue
        prompt = run.prompts.prompt(row["text"])[0]
        answer = run.prompts.answer(row["label"], row["explanation"])
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            ours, theirs = (llama.logits(llama(ids))[0, len(prompt) - 1 : -1].log_softmax(-1)
                            for llama in (run.llama, base))
        nll = F.nll_loss(ours, torch.tensor(answer), reduction="sum").item()
        kl = F.kl_div(theirs, ours, log_target=True, reduction="sum").item()
        assert found == pytest.approx([nll, kl, len(answer)], rel=1e-4) and kl > 1
    merged = Run(CLSGen(base), run.prompts, run.fitted, has_lora=False)  # as export.py makes it
    assert collapse([], merged.reference_sums(rows, 7))["base_kl"] is None


def test_one_command_compares(runs, rows):
    """Fails if a scorer is missing or misnamed, if the base model answers with LoRA, with another
    score or with a threshold, or if the differences are not against the first run's own score."""
    report, predictions = read(runs / "out")
    metrics, names = report["metrics"], [f"{runs}/joint head", f"{runs}/joint raw"]
    names += [f"{runs}/joint label token", f"{runs}/lm label token", f"{runs}/lm raw"]
    names += ["zero-shot label token", "zero-shot stated confidence", "majority"]
    assert list(metrics) == names
    assert [one["calibrated"] for one in metrics.values()] == [1, 0, 0, 1, 0, 0, 0, 0]
    for key, due in (("f1", [1, 0, 0, 1, 0, 0, 0, 0]), ("rep_4", [1, 0, 0, 1, 0, 1, 0, 0])):
        assert [key in one for one in metrics.values()] == due
    assert [one["run"] for one in predictions[::40]] == [
        load_run(runs / "joint").name, load_run(runs / "lm").name, "zero-shot"]
    assert [one["group"] for one in predictions] == [row["group"] for row in rows] * 3
    own, *others = metrics.values()
    due = [one["auroc"] - own["auroc"] for one in others]
    assert [one["auroc_difference"] for one in others] == due and "auroc_difference" not in own
    run, zero = load_run(runs / "joint"), predictions[80:]
    with base_model(run.model):
        due = [one["label_token_probability"] for one in run.predict(rows, explain=False)]
    assert [one["probability"] for one in zero] == pytest.approx(due, abs=1e-5)


def test_the_base_model_is_loaded_when_the_run_is_gone(runs, tiny, monkeypatch):
    """Fails if two models are in memory at once, for which a GPU may have no room."""
    loaded = []

    def load_and_watch(*args):
        run = load_run(*args)
        loaded.append(weakref.ref(run.llama))
        return run

    def load_alone(*args):
        assert loaded[0]() is None
        return load_llama(*args)

    monkeypatch.setattr(ev, "load_run", load_and_watch)
    monkeypatch.setattr(ev, "load_llama", load_alone)
    args = SimpleNamespace(run=[runs / "joint"], model=str(tiny), dtype="float32", device="cpu")
    ev.load_zero_shot(args)
    assert len(loaded) == 1


@pytest.mark.parametrize("more, scored", [("", 2), ("--overwrite", 3), ("--rows 40", 3)])
def test_a_stopped_evaluation_goes_on(runs, rows_file, tiny, tmp_path, monkeypatch, capsys, more,
                                      scored):
    """Fails if a run that was scored before the stop is scored again, if what was kept is taken for
    other rows or against --overwrite, if it gives other numbers, if a file of others goes, or if
    the message does not name the folder."""
    call = (f"--run {runs}/joint --run {runs}/lm --model {tiny} --data {rows_file} "
            f"--batch 7 --draws 20 --out {tmp_path} ")
    predict, seen = Run.predict, []

    def watched(run, *rows, **options):
        seen.append(run.name)
        if stop and len(set(seen)) == 2:
            raise KeyboardInterrupt
        return predict(run, *rows, **options)

    monkeypatch.setattr(Run, "predict", watched)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        ev.main(call.split())
    # one line says what the job is, then one for each piece of work: all four of the first run's
    kept = [len(part.read_bytes().splitlines()) for part in tmp_path.glob("*.part")]
    assert sorted(kept) == [1, 5]
    stop, seen[:], other = False, [], tmp_path / "p.jsonl.part"
    other.touch()  # of predict.py, in the same folder
    ev.main((call + more).split())
    assert len(set(seen)) == scored and list(tmp_path.glob("*.part")) == [other]
    said = f"{runs}/joint: what was scored before is kept" in capsys.readouterr().out
    assert said == (not more)
    if not more:
        (found, texts), (due, due_texts) = read(tmp_path), read(runs / "out")
        for one in [*found["metrics"].values(), *due["metrics"].values()]:
            one.pop("seconds", None)
        assert found["metrics"] == due["metrics"] and texts == due_texts


def test_the_base_model_is_calibrated_as_a_run_is(runs, rows, rows_file, tiny, tmp_path):
    """Fails if --valid changes the runs, or leaves the base model's p or threshold as they were."""
    other = [{**row, "label": row["label"] ^ (i % 3 == 0)} for i, row in enumerate(rows)]
    valid = write_rows(tmp_path / "valid.jsonl", other)
    ev.main(f"--run {runs}/joint --run {runs}/lm --model {tiny} --data {rows_file} --batch 7 "
            f"--draws 20 --out {runs}/valid --valid {valid} --explain 0".split())
    (report, found), (_, before) = read(runs / "valid"), read(runs / "out")
    found, before = ([{one["id"]: one for one in lines[i : i + 40]} for i in (0, 40, 80)]
                     for lines in (found, before))
    for mine, was in zip(found, before, strict=True):
        raw, p, raw_was, p_was = (np.array([side[row["id"]][key] for row in rows]) for side in (
            mine, was) for key in ("raw_probability", "probability"))
        assert raw == pytest.approx(raw_was, abs=1e-5)
        assert (p == pytest.approx(p_was, abs=1e-5)) == (mine is not found[-1])
    y, z = [row["label"] for row in other], np.log(raw / (1 - raw))
    temperature, bias, _ = calibrate(y, z)
    due = sigmoid(z / temperature + bias)
    assert temperature != 1 and p == pytest.approx(due, abs=1e-4)
    assert found[-1]["r0"]["threshold"] == pytest.approx(best_f1_threshold(y, due), abs=1e-4)
    own = report["metrics"]["zero-shot label token"]
    assert own["calibrated"] and "f1" in own and "zero-shot raw" in report["metrics"]


def test_three_rows_of_a_class_fit_nothing_and_are_marked(runs, rows, tiny, tmp_path, capsys):
    """Fails if the base model is calibrated on what train.py would not be, or if intervals from so
    few rows are printed or written as any others."""
    bad, good = ([row for row in rows if row["label"] == label] for label in (1, 0))
    few = write_rows(tmp_path / "few.jsonl", [*bad[:3], *good])
    ev.main(f"--run {runs}/joint --model {tiny} --data {few} --valid {few} --draws 20 "
            f"--out {tmp_path} --explain 0".split())
    shown, (report, _) = capsys.readouterr().out, read(tmp_path)
    assert "zero-shot: nothing is fitted: class 1 has 3 of the 27" in shown
    assert "warning: class 1 has 3 of the 27 rows" in shown
    assert "class 1 has 3" in report["warnings"][0]
    assert not report["metrics"]["zero-shot label token"]["calibrated"]


@pytest.mark.parametrize("answer, p", [
    ("70%", 0.7), ("The probability is 12.5 percent.", 0.125), ("2024: 30", 0.3), ("5-10 %", 0.05),
    ("0", 0.005), ("100 %", 0.995), ("150", None), ("high", None), ("", None),
])
def test_a_percentage_is_read(answer, p):
    """Fails if a number above 100 counts, if a decimal is cut, or if 0 or 100 stays certain."""
    assert ev.read_percentage(answer) == p


def test_the_base_model_states_its_confidence(runs, rows, rows_file, tiny, tmp_path, monkeypatch):
    """Fails if the instruction does not follow the row's text in the same frame, if what cannot be
    read does not get the first run's base rate, or if --valid calibrates it on the test rows."""
    prompts = []
    predict, said = Run.predict, {}

    def watched(run, rows, *args, **options):
        records = predict(run, rows, *args, **options)
        if run.prompts.max_answer == 16:
            prompts.append(run.prompts)
            for i, (row, record) in enumerate(zip(rows, records, strict=True)):
                record["explanation"] = said.get(row["text"], ["70 %", "none"][i % 2])
        return records

    monkeypatch.setattr(Run, "predict", watched)
    call = (f"--run {runs}/joint --model {tiny} --data {rows_file} --explain 0 --draws 5 "
            f"--batch 40 --seed 3 --out {tmp_path}/")
    ev.main(f"{call}a".split())
    found = read(tmp_path / "a")[0]["metrics"]["zero-shot stated confidence"]
    order = np.random.default_rng(3).permutation(40)
    y = np.array([rows[i]["label"] for i in order])
    p = np.tile([0.7, 0.4], 20)
    assert found["unreadable"] == 0.5 and found["brier"] == pytest.approx(np.mean((p - y) ** 2))
    ids, _ = prompts[0].prompt("It is.")
    shown = prompts[0].tokenizer.decode(ids, skip_special_tokens=False)
    asked = ev.ASK_PERCENTAGE.format("yes")
    assert f"Is it bad?\n\nIt is.\n\n{asked}<|im_end|>\n<|im_start|>assistant" in shown

    # validation rows on which a stated 90 % means about a half, and 10 % about a sixth
    texts = [f"valid {i}" for i in range(60)]
    said.update({text: f"{90 - 80 * (i % 2)}" for i, text in enumerate(texts)})
    labels = [int(i % 4 == 0 or i % 12 == 1) for i in range(60)]
    valid = write_rows(tmp_path / "valid.jsonl", [
        {"text": text, "label": label} for text, label in zip(texts, labels, strict=True)])
    ev.main(f"{call}b --valid {valid}".split())
    both = read(tmp_path / "b")[0]["metrics"]
    assert both["zero-shot stated confidence raw"]["brier"] == found["brier"]
    own = both["zero-shot stated confidence"]
    assert (own["calibrated"], own["unreadable"], "f1" in own) == (True, 0.5, True)
    temperature, bias, _ = calibrate(labels, np.tile([np.log(9), -np.log(9)], 30))
    logit = np.where(p == 0.7, np.log(7 / 3), np.log(2 / 3)) / temperature + bias
    assert temperature > 2 and bias < -0.2
    assert own["brier"] == pytest.approx(np.mean((sigmoid(logit) - y) ** 2), abs=1e-6)


def test_a_run_reads_its_explanations(runs, rows, rows_file, tmp_path, monkeypatch):
    """Fails if the label word is read too, if an empty explanation is, or if records are mixed
    up."""
    predict, seen = Run.predict, []

    def short(run, rows, explain=True, **options):
        records = predict(run, rows, explain=explain, **options)
        seen.append(rows)
        if explain:
            for i, record in enumerate(records):
                record["explanation"] = ["", "It is bad.", " ", f"good {i}"][i % 4]
        return records

    monkeypatch.setattr(Run, "predict", short)
    ev.main(f"--run {runs}/joint --data {rows_file} --explain 8 --draws 5 --out {tmp_path}".split())
    metrics, records = read(tmp_path)
    records = records[:8]
    texts = ["It is bad.", "good 3", "It is bad.", "good 7"]
    assert seen[-1] == texts
    again = [load_run(runs / "joint").predict(text, explain=False)[0] for text in texts]
    found = metrics["metrics"]["head"]
    flips = [one["label"] != records[i]["label"] for one, i in zip(again, (1, 3, 5, 7),
                                                                 strict=True)]
    assert found["n_reread"] == 4 and found["reread_flips"] == np.mean(flips)


def test_a_piece_of_work_is_not_done_twice(runs, rows_file, tmp_path, monkeypatch):
    """Fails if a stop between texts and probabilities loses the texts, or if what is kept counts
    without its seconds."""
    call = f"--run {runs}/joint --data {rows_file} --draws 20 --explain 8 --out {tmp_path}".split()
    predict, explained = Run.predict, []

    def watched(run, rows, explain=True, **options):
        explained.append(explain)
        if stop and not explain:
            raise KeyboardInterrupt
        return predict(run, rows, explain=explain, **options)

    monkeypatch.setattr(Run, "predict", watched)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        ev.main(call)
    (part,) = tmp_path.glob("*.part")
    took = json.loads(part.read_text().splitlines()[1])["seconds"]
    stop = False
    ev.main(call)
    assert explained == [True, False, False, False] and not list(tmp_path.glob("*.part"))
    assert read(tmp_path)[0]["metrics"]["head"]["seconds"] > took > 0


def test_a_new_metric_is_printed(capsys):
    """Fails if a metric that no table names is left out, or if another value is taken for one."""
    one = {"auroc": 0.5, "new": 0.25, "intervals": {"new": (0.0, 0.5)}, "n": 3, "run": "x",
           "seconds": 1.0}
    eval_tables.print_tables({"a": one, "b": {"auroc": 0.75}})
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2 and tables[1].split("\n")[0] == "other metrics"
    assert tables[1].split()[2:] == ["new", "a", "0.250", "[0.000,", "0.500]"]


def test_rows_explain_and_the_results_folder(runs, rows_file, capsys):
    """Fails if --rows takes the head of the file, if --explain explains others than the first of
    the shuffle, if results are replaced without --overwrite, or if a bad flag gets through."""
    call = f"--run {runs / 'lm'} --data {rows_file} --draws 20 ".split()
    ev.main([*call, "--rows", "30", "--explain", "10"])
    report, predictions = read(runs / "lm" / "eval" / "rows")
    assert list(report["metrics"]) == ["label token", "raw", "majority"] and report["n"] == 30
    order = np.random.default_rng(0).permutation(40)[:30]
    assert [one["id"] for one in predictions] == [f"r{i}" for i in order]
    assert [one["explanation"] is not None for one in predictions] == [True] * 10 + [False] * 20
    assert f"{report['metrics']['raw']['auroc']:.3f} [" in capsys.readouterr().out
    for more, reason in (
        ("--valid x", "--model"),
        ("", "--overwrite"),
        ("--rows 0 --batch 0", "--rows is 0, expected 1 or more; --batch is 0, expected 1 or more"),
        ("--draws 0", "--draws is 0, expected 1 or more"),
        ("--explain -1", "--explain is -1, expected 0 or more"),
        ("--seed -1", "--seed is -1, expected 0 or more"),
        ("--rows 1 --overwrite", "--rows 1 leaves one class only"),
        (" ".join(call[:2]), "twice"),
        ("--overwrite --run nowhere", "nowhere"),
        ("--model x --run zero-shot", "rename"),
    ):
        with pytest.raises(ValueError, match=reason):
            ev.main([*call, *more.split()])


def test_majority_is_the_first_runs_base_rate(runs, rows, rows_file, tmp_path):
    """Fails if it is the last run's."""
    call = f"--run {runs}/joint --run {runs}/lm --data {rows_file} --explain 0 --draws 5 "
    ev.main((call + f"--out {tmp_path}").split())
    majority = read(tmp_path)[0]["metrics"]["majority"]
    y = np.array([row["label"] for row in rows])
    assert majority["brier"] == pytest.approx(np.mean((y - 0.4) ** 2))


def test_the_collapse_meter_only_watches(tiny, rows_file, tmp_path, monkeypatch):
    """Fails if the meter moves a weight, or is not in the log."""
    for name in "ab":
        train.main(f"--data {rows_file} --model {tiny} --out {tmp_path / name} --epochs 1 --rank 4 "
                   "--dtype float32 --valid-fraction 0.3".split())
        monkeypatch.setattr(train, "watch_text", lambda *args: {})
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    valid = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[-1])["valid"]
    assert one == other and valid["base_kl"] > 0 and valid["parsable"] is not None


def test_comprehensiveness():
    """Fails if one shared word is a citation, if a control takes a cited word or another length,
    if the fall is not of the decided class, or if rows that cite nothing count."""
    text = "There is a history of heart failure, and the patient has no family support at home."
    cited = comp.cited_words(text, "Heart failure. A patient without family support.")
    assert cited.tolist() == [0, 1, 1, 0, 1, 1, 0]  # history heart failure patient family ...
    assert comp.without(text, cited) == "There is a history of , and the patient has no at home."
    assert comp.random_words(cited, np.random.default_rng(0)) is None  # no room for two
    for seed in range(20):
        cited = np.arange(20) % 15 < 2
        drawn = comp.random_words(cited, np.random.default_rng(seed))
        assert not (drawn & cited).any() and drawn.sum() == 4

    class Fake:  # as a run, and as arguments
        seed, batch, draws = 0, 4, 20

        def predict(self, texts, **_):
            return [{"probability": 0.1 + 0.8 * ("heart failure" in text)} for text in texts]

    rows = [{"text": "heart failure" + " calm quiet ward evening" * 3}] * 27
    records = [{"probability": 0.9, "explanation": "Heart failure."},
               {"probability": 0.2, "explanation": "Heart failure."},
               {"probability": 0.1, "explanation": "Calm."}] * 9
    found = comp.measure_words(Fake(), rows, records, Fake)
    # p .9 falls by .8, at random by 0; p .2, decided as 0, by .1 - .2, at random by .9 - .2
    falls = found["comprehensiveness"], found["random_fall"], found["difference"]
    assert falls == pytest.approx((0.35, 0.35, 0), abs=1e-12)
    assert (found["rows"], found["rows_uncited"], found["rows_no_room"]) == (18, 9, 0)


@pytest.mark.parametrize("evidence, number", [(["result is bad"], "cited"), (None, "difference")])
def test_comprehensiveness_of_a_run(run, rows, tmp_path, evidence, number):
    """Fails if the script cannot read a run's explanations, score texts with it, or write what it
    finds."""
    name = load_run(tmp_path / "run").name
    if evidence:
        rows = [row | {"evidence": evidence if evidence[0] in row["text"] else []} for row in rows]
    records = run.predict(rows, explain=False)
    for record in records:
        record.update(run=name, explanation="The result is bad.")
    data = write_rows(tmp_path / "x.jsonl", rows)
    write_rows(tmp_path / "predictions.jsonl", records)

    folders = ["--run", tmp_path / "run", "--data", data, "--results", tmp_path]
    comp.main([*map(str, folders), "--draws", "20"])
    found = json.loads((tmp_path / "comprehensiveness.json").read_text())
    assert -1 < found[number] < 1 and len(found["intervals"][number]) == 2


def test_comprehensiveness_of_phrases():
    """Fails if two phrases are dropped at once, if one that is cited as absent counts as cited, if
    a control is of another kind, or if the fall is not of the decided class."""
    weights = {"heart failure": 0.4, "sepsis": 0.2, "frequent falls": 0.1}

    class Fake:  # as a run, and as arguments
        seed, batch, draws = 0, 4, 20

        def predict(self, texts, **_):
            return [{"probability": sum(weight for phrase, weight in weights.items()
                                        if phrase in text.lower())} for text in texts]

    row = {"text": "Heart failure, sepsis. No frequent falls.", "evidence": ["heart failure"]}
    both = {**row, "evidence": ["heart failure", "sepsis"]}
    known = comp.known_phrases([both, {"evidence": ["frequent falls"]}])
    for text, kinds in (("Heart failure.", [{"heart failure"}, {"sepsis"}, {"frequent falls"}]),
                        ("Sepsis, no heart failure.",
                         [{"sepsis"}, {"heart failure"}, {"frequent falls"}])):
        found = comp.phrases_by_kind(both, text, known)
        assert [{phrase.strip() for phrase in found[kind]} for kind in comp.KINDS] == kinds
    assert comp.phrases_by_kind(row, "Sepsis.", known)["uncited"] == {" heart failure "}
    assert comp.without_phrase("A Heart  failure, heart failures.", " heart failure ") == (
        "A , heart failures.")

    rows = [both, both, row]
    records = [{"probability": 0.7, "explanation": "Heart failure."},
               {"probability": 0.2, "explanation": "Heart failure. Sepsis."},
               {"probability": 0.7, "explanation": "Nothing."}]
    found = comp.measure_phrases(Fake(), rows, records, known, Fake)
    # row 1: .7 - .3, .7 - .5, .7 - .6; row 2, decided as 0: (.3 - .2 + .5 - .2) / 2
    assert found["cited"] == pytest.approx((0.4 + 0.2) / 2)
    assert (found["rows_cited"], found["rows_uncited"], found["rows_absent"]) == (2, 2, 3)
    assert found["uncited"] == pytest.approx((0.2 + 0.4) / 2)
    assert (found["cited_minus_uncited"], found["rows_cited_minus_uncited"]) == (
        pytest.approx(0.2), 1)
    with pytest.raises(ValueError, match="cite no evidence"):
        comp.measure_phrases(Fake(), rows[2:], records[2:], known, Fake)


def test_swapped_pairs(tmp_path, capsys):
    """Fails if p is compared with p', if a pair without a label in one text counts, if pairs are
    matched by place, or if ids or runs that do not belong together get through."""
    def write(name, suffix, lines, run="r"):
        return str(write_rows(tmp_path / name, [
            {"id": f"{i}{suffix}", "probability": p, "stated_label": stated, "run": run}
            for i, p, stated in lines]))

    pairs = write("pairs.jsonl", "", [("a", 0.9, 1), ("b", 0.2, 0), ("c", 0.6, None)])
    turned = write("turned.jsonl", "-swapped", [("c", 0.4, 1), ("a", 0.2, 0), ("b", 0.3, 0)])
    swapped.main([pairs, turned, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    # |.9 + .2 - 1|, |.2 + .3 - 1|, 0
    assert found["sum_error"] == pytest.approx((0.1 + 0.5) / 3)
    assert found["decision_flips"] == pytest.approx(2 / 3)
    assert (found["pairs"], found["pairs_stated"], found["text_flips"]) == (3, 2, 0.5)
    other_run = write("other.jsonl", "-swapped",
                      [(name, 0.5, 1) for name in "abc"], run="another")
    for wrong, reason in ((pairs, "6 have no partner"), (other_run, "2 runs")):
        with pytest.raises(ValueError, match=reason):
            swapped.main([pairs, wrong])


@pytest.mark.parametrize("fitted, others", [
    (Fitted("label_token"), []), (Fitted("head"), ["label token"]),
    (Fitted("label_token", temperature=2.0), ["raw"]),
    (Fitted("head", bias=0.1), ["raw", "label token"])])
def test_no_score_is_measured_twice(fitted, others):
    """Fails if a p that is not calibrated is measured again as the one before calibration."""
    rows = [{"label": i % 2} for i in range(8)]
    record = {"raw_probability": 0.5, "label_token_probability": 0.5}
    scored = ev.Scored([record] * 8, [], np.zeros((0, 3)), [], 0.0)
    comparison = ev.Comparison(rows, rows, SimpleNamespace(draws=5, seed=0))
    assert list(comparison.measure_others(SimpleNamespace(fitted=fitted), scored)) == others


def test_the_ceiling_is_that_of_the_same_rows():
    """Fails if some rows with a true p give the ceiling of an AUROC that all rows have."""
    rows = [{"label": label, "probability": p} for label, p in ((0, 0.2), (1, 0.9), (0, 0.5))]
    assert ev.describe(rows)["bayes_auroc"] == 1
    assert ev.describe([*rows, {"label": 1}])["bayes_auroc"] is None
    assert ev.describe([{"label": label} for label in (0, 1)])["bayes_auroc"] is None


def test_what_needs_a_gpu_says_so():
    """Fails if the peer's writing without --device ends in a traceback."""
    with pytest.raises(ValueError, match="--peer .*--device cuda"):
        llama8b.main(["--peer"])


def test_the_summary_fits_the_screen(capsys):
    """Fails if a long name makes the table wider than 100 columns, if a scorer before calibration
    is in it, or if a missing number is shown as one."""
    full = {"auroc": 0.9, "log_loss": 0.31, "slope": 1.1, "intercept": -0.25, "ece": 0.04,
            "ece_floor": 0.03, "kappa_matched": 0.98, "reference_nll": 1.5,
            "intervals": {"auroc": (0.85, 0.95)}}
    bare = {"auroc": 0.5, "slope": None, "intervals": {}}
    name = "runs/a-folder-with-a-long-name/and-another"
    eval_tables.print_summary({f"{name} head": full, f"{name} raw": full, "majority": bare})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    table = [line.split() for line in lines[1:6]]
    assert table[2][1:] == ["0.900", "[0.85,", "0.95]", "0.310", "1.10,", "-0.25", "0.040",
                            "(0.030)", "0.98", "1.500"]
    assert table[3][0].endswith("another") or "head" in table[3]
    assert [line for line in lines if line.startswith("majority")][0].split() == [
        "majority", "0.500"]
    assert not any("raw" in line for line in lines)

    # what speaks against it is said below
    doubtful = full | {"n_disagree": 4, "n_explained": 50, "ece": 0.2, "ece_floor_q95": 0.1}
    eval_tables.print_summary({"head": doubtful, "majority": bare})
    out = capsys.readouterr().out
    assert "head: 4 of 50 texts do not state the label that is decided" in out
    assert "the calibration error is 0.200; 95 % of perfect" in out
    assert "have less than 0.100 on so many rows" in out
    assert "independent" not in out
    assert max(map(len, out.splitlines())) <= 100
    eval_tables.print_summary({"head": doubtful}, has_groups=True)
    out = capsys.readouterr().out
    assert "This takes rows as independent" in out
    assert max(map(len, out.splitlines())) <= 100


def test_calibrations_are_compared(tmp_path, capsys):
    """Fails if a fit is not the best one, if a prior does not pull, if rows that were fitted on
    are scored, if groups are parted, or if a fit that there is not is taken."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 4000)
    y = (rng.random(4000) < sigmoid(logit)).astype(float)
    z = 2 * (logit - 0.5)
    assert calibration.fit(y, z, 0.3, 0.3) == pytest.approx(
        (1 / calibrate(y, z)[0], calibrate(y, z)[1]), rel=1e-4)
    few = y[:50], z[:50]
    slope, bias = calibration.fit(*few, np.inf, np.inf)
    pulled = calibration.fit(*few, 0.01, 0.01)
    assert abs(pulled[0] - 1) < 0.05 < abs(slope - 1) and abs(pulled[1]) < 0.05 < abs(bias)
    assert calibration.fit(*few, np.inf, 0.0)[1] == pytest.approx(0, abs=1e-3)
    assert calibration.fit(y, -z, np.inf, np.inf) is None
    assert calibration.fit(np.array([0.0, 1.0]), np.array([-1.0, 1.0]), np.inf, np.inf) is None

    # two groups, one of each label: no fit, and all of the other group is scored and nothing else
    labels, number = np.repeat([0.0, 1.0], 20), np.repeat([0, 1], 20)
    losses = calibration.compare(labels, np.ones(40), number, 15, 8, 0)
    due = [log_loss([label], sigmoid([1.0])) for label in (1, 0)]
    assert np.unique(losses.round(9)) == pytest.approx(due)

    path = write_rows(tmp_path / "p.jsonl", [
        {"raw_probability": p, "true_label": int(label), "run": "r", "group": None}
        for p, label in zip(sigmoid(z[:80]), y[:80], strict=True)])
    calibration.main([str(path), "--splits", "3", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [one["rows"] for one in found] == [30] and found[0]["source"] == f"{path} r"
    path.write_text('{"raw_probability": 0.5, "run": "r"}\n')
    with pytest.raises(ValueError, match="true_label"):
        calibration.main([str(path)])


def test_coverage_is_counted(monkeypatch, capsys, tmp_path):
    """Fails if an interval is compared with another metric's truth, or if a line is missing."""
    monkeypatch.setattr(coverage, "SIZES", (40,))
    monkeypatch.setattr(coverage, "AUROCS", (0.8,))
    monkeypatch.setattr(coverage, "SHARES", (0.5,))
    coverage.main(f"--files 15 --draws 20 --out {tmp_path}/out.json".split())
    lines = json.loads((tmp_path / "out.json").read_text())["coverage"]
    assert [line["grouped"] for line in lines] == [False, True]
    assert all(line[name] > 0.6 for line in lines for name in line if name not in (
        "rows", "grouped", "positives", "true_auroc"))


def test_random_llama(tiny, tmp_path, monkeypatch):
    """Fails if a shape is not the published one, if a tensor is left empty, if the folder does not
    load as any other, or if one that is there is written over."""
    for name, count in (("1b", 1_235_814_400), ("8b", 8_030_261_248)):
        with torch.device("meta"):
            llama = Llama(read_config(random_llama.COMMON | random_llama.SHAPES[name]))
        assert sum(parameter.numel() for parameter in llama.parameters()) == count
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 2}
    monkeypatch.setitem(random_llama.SHAPES, "1b", random_llama.SHAPES["1b"] | small)
    call = ["1b", "--out", str(tmp_path / "new"), "--tokenizer", str(tiny)]
    random_llama.main(call)
    for name, parameter in load_llama(tmp_path / "new", torch.float32).named_parameters():
        due = (1.0, 0.0) if "norm" in name else (0.0, 0.02)  # mean, deviation
        assert (parameter.mean().item(), parameter.std().item()) == pytest.approx(due, abs=2e-3)
    assert Prompts(tmp_path / "new", "Is it bad?").prompt("It is.")
    for wrong, reason in ((call, "exists"), ([*call[:-1], str(tmp_path)], "tokenizer.json")):
        with pytest.raises((ValueError, OSError), match=reason):
            random_llama.main(wrong)


def test_speed(tiny, tmp_path, monkeypatch, capsys):
    """Fails if a side prints no line of JSON, if the fastest run is the median or that of the
    slowest process, if sides do not take turns, or if a busy machine goes unsaid."""
    speed.main(f"--side ours --case explain/1 --model {tiny} --dtype float32 --repeats 3".split())
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["rate"] == 48 / sorted(line["seconds"])[1]
    assert line["fastest"] == 48 / min(line["seconds"])

    calls = []

    def run_side(side, case, args):
        calls.append(side)
        return line | {"rate": float(len(calls)), "fastest": 10.0 * len(calls)}

    monkeypatch.setattr(speed, "run_side", run_side)
    for load, warned in ((0.6, True), (0.5, False)):
        monkeypatch.setattr(speed.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        calls.clear()
        speed.main(f"--cases explain/1 train/4x512-cls --model {tiny} --rounds 2 "
                   f"--out {tmp_path}/x.json".split())
        assert ("load average" in capsys.readouterr().out) == warned
    assert calls == ["ours", "theirs", "ours", "theirs", "ours", "ours"]
    cases = json.loads((tmp_path / "x.json").read_text())["cases"]
    assert cases["explain/1"]["rate"] == [2.0, 3.0]
    assert cases["explain/1"]["fastest"] == [30.0, 40.0]
    assert cases["train/4x512-cls"]["fastest"] == [60.0]
