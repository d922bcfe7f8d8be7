"""A trained run: its folder, and the records that it predicts.

    from run import load_run

    run = load_run("runs/x")
    for record in run.predict(["some text"]):
        print(record["probability"], record["explanation"])

A run folder holds everything that a prediction needs except the folder of the base model.
Notation: N rows, B rows of a batch, D hidden size, V vocabulary, A answer tokens of a batch.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clsgen import CLSGen, Reading, add_lora, base_model, choose_token
from data import collate, encode_rows
from metrics import (
    FEWEST_ROWS, best_f1_threshold, calibrate, calibrated, clipped_logit, rarer_class)
from plumbing.adapter import adapter_config, adapter_tensors, check_lora, load_adapter
from plumbing.checkpoint import base_fingerprint, find_base, load_llama
from plumbing.files import read_json, sha256_of, write_json, write_tensors
from plumbing.packed import pack as pack_weights
from plumbing.resume import STATE
from plumbing.script import dtype_name, pick_device, versions
from prompts import Prompts

GOLDEN_TEXT = "The quick brown fox jumps over the lazy dog, 12 times out of 30."


# --- from a logit to a decision -------------------------------------------------------------------
@dataclass
class Fitted:
    """How a run turns its logit into a probability and a decision, as found on validation rows.

        z  ->  p = sigmoid(z / temperature + bias)  ->  label = (p >= threshold)

    ValueError for a value that is impossible.
    """

    scorer: str = "head"  # "head" or "label_token": whose logit z is
    temperature: float = 1.0
    bias: float = 0.0
    threshold: float = 0.5
    base_rate: float = 0.5  # the share of class 1 in the training rows

    def __post_init__(self):
        numbers = (self.temperature, self.bias, self.threshold, self.base_rate)
        fits = self.scorer in ("head", "label_token") and self.temperature > 0
        fits = fits and all(abs(number) < 1e9 for number in numbers)  # NaN does not fit either
        if not fits:
            raise ValueError(f"impossible: scorer {self.scorer!r} with temperature, bias, "
                             f"threshold and base rate {numbers}")

    def probability(self, z):
        """Logits, a float64 tensor, as calibrated probabilities."""
        return torch.sigmoid(z / self.temperature + self.bias)

    def is_calibrated(self):
        """Whether p is another one than that of the raw logit."""
        return (self.temperature, self.bias) != (1.0, 0.0)

    def settings(self):
        """The keys and values that clsgen.json has for it."""
        return {
            "scorer": self.scorer,
            "calibration": {"temperature": self.temperature, "bias": self.bias},
            "threshold": self.threshold,
            "base_rate": self.base_rate,
        }

    @classmethod
    def from_settings(cls, about):
        calibration = about["calibration"]
        return cls(about["scorer"], calibration["temperature"], calibration["bias"],
                   about["threshold"], about["base_rate"])


def fit(scorer, y, z, base_rate):
    """(Fitted, a sentence that says what was done) from labels and raw logits of validation rows.

    First the calibration by log loss, then the threshold of the best F1 on the calibrated p.
    Nothing is fitted to fewer than FEWEST_ROWS rows of either class. y, z (N,).
    """
    label, rows = rarer_class(y)
    if rows < FEWEST_ROWS:
        fitted = Fitted(scorer, base_rate=base_rate)
        return fitted, (
            f"nothing is fitted: class {label} has {rows} of the {len(y)} validation rows, and "
            f"{FEWEST_ROWS} of each class are needed; p stays as it is (temperature 1, bias 0), "
            f"the threshold is {fitted.threshold}. More validation rows (--valid) change that")

    temperature, bias, sentence = calibrate(y, z)
    threshold = best_f1_threshold(y, calibrated(z, temperature, bias))
    fitted = Fitted(scorer, temperature, bias, threshold, base_rate)
    return fitted, f"{sentence}; threshold {threshold:.3f}"


# --- a run ----------------------------------------------------------------------------------------
def as_rows(rows):
    """Texts or row dicts, or a single one of either, as a list of row dicts with an id.

    ValueError for anything else.
    """
    if isinstance(rows, str | dict):
        rows = [rows]
    if not isinstance(rows, Iterable):
        raise ValueError(f"rows is {rows!r}, expected a text, a dict, or a list of them")
    named_rows = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"row {number} is {row!r}, expected a text, or a dict with one")
        named_rows.append({"id": number, **row})
    return named_rows


def batch_starts(n, batch_size, progress):
    """Where each batch of n rows begins, with a progress bar of this name if there is one."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    starts = range(0, n, batch_size)
    return tqdm(starts, desc=progress, unit="batch", disable=not progress or not starts)


class Run:
    """A model and all that a prediction needs: its prompts, and what was fitted.

    name: what its records call it, after load_run the first digits of the SHA-256 of clsgen.json.
    has_lora=False: a merged run or a base model, which has no LoRA that could be switched off.
    """

    def __init__(self, model, prompts, fitted, name="unsaved", has_lora=True):
        self.model = model
        self.llama = model.model
        self.device = model.score.weight.device
        self.prompts = prompts
        self.fitted = fitted
        self.name = name
        self.has_lora = has_lora
        self.about = {}  # the content of clsgen.json

    def predict(self, rows, explain=True, batch_size=16, decide="text", choose=choose_token,
                progress=None):
        """Texts or row dicts -> a list of their records, in the same order. One text is enough.

        decide="head" starts each answer with the head's decision, so that the text argues for it.
        By default the text states a label of its own, which is what agreement measures.
        progress: the name of a progress bar, None for no bar.
        choose(logits (B, V)) picks the next token of each row, (B,).
        """
        if decide not in ("text", "head"):
            raise ValueError(f'decide is {decide!r}, expected "text" or "head"')
        examples = encode_rows(as_rows(rows), self.prompts, with_answers=False)

        # rows of similar length share a batch, so that little is padded
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        records = [None] * len(examples)
        for start in batch_starts(len(order), batch_size, progress):
            indices = order[start : start + batch_size]
            batch = [examples[i] for i in indices]
            predicted = self._predict_batch(batch, explain, decide, choose)
            for i, record in zip(indices, predicted, strict=True):
                records[i] = record
        return records

    def _predict_batch(self, examples, explain, decide, choose):
        """Examples -> their records. The prompts are read once, for p and for the text."""
        reading = self.read(examples, explain)
        records = self.records(examples, reading)
        if not explain:
            return records

        decisions = []
        if decide == "head":
            decisions = [record["label"] for record in records]
        tokens = torch.stack(list(self.write(reading, choose, decisions)), dim=1)  # (B, n)
        for record, ids in zip(records, tokens.tolist(), strict=True):
            stated, text = self.prompts.parse(self.prompts.decode(ids))
            record["explanation"] = text
            record["stated_label"] = stated
            record["agree"] = stated == record["label"]
        return records

    def read(self, examples, explain=True):
        """Examples -> a Reading of their prompts, with room for an explanation if one follows."""
        batch = collate(examples, self.device)
        room = max(len(ids) for ids in self.prompts.label_ids)
        if explain:
            room = max(room, self.prompts.max_answer)
        return Reading(self.model, batch.input_ids, batch.prompt_end, room)

    def records(self, examples, reading):
        """The records of a batch without their texts: an audit record for each row."""
        no_ids, yes_ids = self.prompts.label_ids
        no = reading.log_probability(no_ids)
        yes = reading.log_probability(yes_ids)

        # float64, since in float32 p is 1 from z = 17 on; on the CPU, since some devices lack it
        token_z = (yes - no).cpu().double()
        if self.fitted.scorer == "head":
            z = reading.z().cpu().double()
        else:  # LM-only training and the base model have no trained head
            z = token_z
        if not (z.isfinite() & token_z.isfinite()).all():
            dtype = dtype_name(self.llama.norm.weight.dtype)
            raise ValueError(f"a logit is not a number: the model's values are too large for "
                             f"{dtype}; --dtype float32 holds them")

        p = self.fitted.probability(z).tolist()
        raw_p = z.sigmoid().tolist()
        token_p = token_z.sigmoid().tolist()
        records = []
        for i, example in enumerate(examples):
            record = {
                "id": example.id,
                "probability": p[i],
                "raw_probability": raw_p[i],
                "label_token_probability": token_p[i],
                "label": int(p[i] >= self.fitted.threshold),
                "threshold": self.fitted.threshold,
                "explanation": None,
                "stated_label": None,
                "agree": None,
                "tokens_cut": example.tokens_cut,
                "run": self.name,
            }
            if example.label is not None:
                record["true_label"] = example.label
            records.append(record)
        return records

    def write(self, reading, choose=choose_token, decisions=()):
        """Yields the texts' tokens, (B,) a step. `decisions`: labels that they have to state."""
        openings = [self.prompts.label_ids[label] for label in decisions]
        return reading.write(self.prompts.stop_ids, self.prompts.max_answer, choose, openings)

    # for evaluation
    def raw_logits(self, rows, batch_size=16, progress=None):
        """(N,) logits of the run's own score before calibration, from -36 to 36.

        They are computed from raw_probability, which is 1 in float64 from a logit of 36 on.
        """
        records = self.predict(rows, explain=False, batch_size=batch_size, progress=progress)
        p = np.array([record["raw_probability"] for record in records])
        return clipped_logit(p, tiny=np.finfo(np.float64).eps)

    @torch.inference_mode()
    def reference_sums(self, rows, batch_size=16, progress=None):
        """(N, 3) sums over the tokens of each row's own explanation, in nats.

        -log p(token), then KL(run || base model), and the number of tokens. Without a LoRA that
        could be switched off the base model is not known: the KL is NaN.
        """
        examples = encode_rows(as_rows(rows), self.prompts, limit_answers=False)
        explained = [i for i, example in enumerate(examples) if example.answer]
        order = sorted(explained, key=lambda i: -len(examples[i]))

        sums = np.zeros((len(examples), 3))
        for start in batch_starts(len(order), batch_size, progress):
            indices = np.array(order[start : start + batch_size])
            batch = collate([examples[i] for i in indices], self.device)
            _, logits = self.model(batch)  # (A, V)
            base_logits = None
            if self.has_lora:
                with base_model(self.model):
                    _, base_logits = self.model(batch)

            values = nll_and_kl(logits, base_logits, batch.targets)  # (A, 2)
            row_of_token = indices[batch.answer_rows.cpu().numpy()]  # (A,)
            np.add.at(sums[:, :2], row_of_token, values)
            np.add.at(sums[:, 2], row_of_token, 1)
        return sums

    # what identifies a run
    @torch.inference_mode()
    def golden(self):
        """The logit of a fixed sentence, by the read-out of all predictions, and its token ids.

        The logit differs if base, LoRA or head differ. `read_out` is the logit of made-up hidden
        states, which no base and no precision changes: it differs if head or read-out differ.
        """
        ids, _ = self.prompts.prompt(GOLDEN_TEXT)
        hidden = self.llama(torch.tensor([ids], device=self.device))
        prompt_end = torch.tensor([len(ids) - 1], device=self.device)
        return {
            "text": GOLDEN_TEXT,
            "ids": ids,
            "logit": self.model.read_out(hidden, prompt_end).item(),
            "dtype": dtype_name(self.llama.norm.weight.dtype),
            "read_out": read_out_mark(self.model),
        }


def nll_and_kl(logits, base_logits, targets):
    """-log p(target) and KL(p || p of the base model) of each token in nats, as an array (A, 2).

    logits (A, V) and targets (A,). Without base_logits (None) the KL is NaN. Some tokens are taken
    at a time, since in float32 all of them would need several gigabytes with a large vocabulary.
    """
    values = []
    for start in range(0, len(targets), 256):
        some = slice(start, start + 256)
        log_p = logits[some].float().log_softmax(-1)  # (up to 256, V)
        nll = -log_p.gather(-1, targets[some, None])[:, 0]
        kl = torch.full_like(nll, torch.nan)
        if base_logits is not None:
            base_log_p = base_logits[some].float().log_softmax(-1)
            kl = (log_p.exp() * (log_p - base_log_p)).sum(-1)
        values.append(torch.stack((nll, kl), dim=1))
    return torch.cat(values).cpu().numpy()


# --- which read-out this is -----------------------------------------------------------------------
MADE_UP_TOKENS = 40
MADE_UP_END = 29  # where the last prompt token is; the other ten stand for an answer


def made_up_states(model):
    """Hidden states (1, 40, D) that no model has made, on the head's device."""
    size = model.score.in_features
    states = torch.arange(MADE_UP_TOKENS * size, dtype=torch.float32).sin()
    return states.view(1, MADE_UP_TOKENS, size).to(model.score.weight.device)


@torch.inference_mode()
def read_out_mark(model):
    """The logit of made-up hidden states: another head or another read-out has another one."""
    states = made_up_states(model)
    return model.read_out(states, torch.tensor([MADE_UP_END], device=states.device)).item()


@torch.inference_mode()
def reads_last_prompt_token(model):
    """Whether the read-out is the score of the last prompt state, as in peft's SEQ_CLS."""
    last = made_up_states(model)[:, MADE_UP_END]
    return abs(read_out_mark(model) - model.score(last).item()) < 1e-4


def check_read_out(stored, model):
    """ValueError if the `read_out_mark` on record is not the model's. None: there is no record."""
    if stored is not None:
        check_same(stored, read_out_mark(model), 1e-3, "made-up hidden states have",
                   "another read-out or another head")


# --- the run folder -------------------------------------------------------------------------------
def save_run(run, folder, about):
    """Writes adapter_model.safetensors, adapter_config.json (peft's layout) and clsgen.json.

    about: {"base": its folder, "base_fingerprint", "lora": {"rank", "alpha", "targets"}} and
    whatever else is to be on record.
    """
    write_tensors(folder / "adapter_model.safetensors", adapter_tensors(run.model))
    task = "SEQ_CLS" if reads_last_prompt_token(run.model) else None
    write_json(folder / "adapter_config.json", adapter_config(about["lora"], about["base"], task))
    run.about = {
        **about,
        **run.fitted.settings(),
        "prompts": run.prompts.settings(),
        "prompt_frame": run.prompts.rendered(),  # for other tools
        "golden": run.golden(),
        "versions": versions(),
    }
    write_json(folder / "clsgen.json", run.about)  # last: with it, a run counts as finished


def load_run(folder, model=None, dtype=None, device=None, pack=True):
    """A run folder, or what export.py made of one, as a Run.

    model: the folder of the base model, if it has moved. dtype: by default the one that it was
    trained in. A machine that only emulates bfloat16 opens a bfloat16 run as "auto" does.
    pack: False to train or to export it, see plumbing/packed.py.
    ValueError when the base's fingerprint or the golden row says that this is another model, and
    for whatever else does not fit.
    """
    folder = Path(folder)
    about = read_about(folder)
    try:
        return _load_run(folder, about, model, dtype, device, pack)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None


def read_about(folder):
    """The content of a run's clsgen.json, with all that is needed. ValueError says what is not."""
    path = folder / "clsgen.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.exists() and (folder / STATE).exists():
        raise ValueError(f"{folder}: its training has not finished; "
                         f"python train.py --resume {folder} continues it")
    if not path.exists():
        raise ValueError(f"{folder}: not a run folder, it has no clsgen.json")

    about = read_json(path)
    wanted = {"base": str, "base_fingerprint": str, "prompts": dict, "lora": dict,
              "calibration": dict, "golden": dict}
    for key, kind in wanted.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"{path}: {key} is missing or not what it has to be")
    return about


def _load_run(folder, about, model, dtype, device, pack):
    try:
        fitted = Fitted.from_settings(about)
        golden = {key: about["golden"][key] for key in ("ids", "logit", "dtype")}
        golden["read_out"] = about["golden"].get("read_out")  # earlier versions have none
        lora = {key: about["lora"][key] for key in ("rank", "alpha", "targets")}
        check_lora(**lora, where="clsgen.json")
    except (KeyError, TypeError) as error:
        raise ValueError(f"clsgen.json does not fit: {error!r}") from None
    if dtype is None:
        dtype = golden["dtype"]
        if dtype == "bfloat16":
            dtype = "auto"  # the same, unless this machine only emulates it
    dtype, device = pick_device(dtype, device)

    # the base model that the run was trained on: the run's own folder, if it is merged
    score_file = folder / "score.safetensors"
    is_merged = score_file.exists()
    base = folder if is_merged else Path(model or find_base(about["base"]))
    if model is None and not os.path.isdir(base):
        raise ValueError(f"the base model {base} is not there; --model can name it")
    if base_fingerprint(base) != about["base_fingerprint"]:
        raise ValueError(f"{base}: not the base of this run: other config, tokenizer or tensors")
    llama = load_llama(base, dtype, device)

    # LoRA and head
    if is_merged:
        clsgen = CLSGen(llama)
        load_adapter(clsgen, score_file)
    else:
        clsgen = CLSGen(add_lora(llama, **lora))
        load_adapter(clsgen, folder / "adapter_model.safetensors")
    clsgen.eval()
    if pack:
        pack_weights(llama)

    try:
        prompts = Prompts(base, **about["prompts"])
    except TypeError as error:  # a setting that there is not
        raise ValueError(f"clsgen.json: prompts do not fit: {error}") from None
    fingerprint = sha256_of(folder / "clsgen.json")[:12]
    run = Run(clsgen, prompts, fitted, fingerprint, has_lora=not is_merged)
    run.about = about
    compare_golden(golden, run)
    return run


def compare_golden(stored, run):
    """ValueError when a run's golden row is not what it was when the run was saved."""
    found = run.golden()
    if stored["ids"] != found["ids"]:
        raise ValueError("the prompt of a fixed sentence has other token ids than in training: "
                         "prompts.py is another, or the tokenizer")

    check_read_out(stored["read_out"], run.model)
    both_float32 = stored["dtype"] == found["dtype"] == "float32"
    tolerance = 1e-3 if both_float32 else 0.25
    check_same(stored["logit"], found["logit"], tolerance, "a fixed sentence has",
               "other base weights, LoRA or head")


def check_same(stored, found, tolerance, what, reason):
    """ValueError if two logits differ by more than the tolerance, or if one is no number."""
    is_number = type(stored) in (int, float)
    if not is_number or not abs(stored - found) <= tolerance:  # NaN does not pass either
        raise ValueError(f"{what} logit {found:.4f}, the run says {stored!r}: {reason}")
