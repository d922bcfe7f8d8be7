"""CLSGen (arXiv 2604.11801): a probability and a written explanation from one language model.

    python clsgen.py --run runs/x --text "..."                             # one text, streamed
    python clsgen.py --run runs/x --data new.jsonl --out predictions.jsonl
    python clsgen.py merge --run runs/x --out folder                       # a plain HF folder

One forward pass over [prompt | answer] gives h. The score head reads the last prompt token and
nothing else, z = score(h_P), so it cannot see the answer; lm_head predicts the answer's tokens:

    L = w_cls * mean over examples BCE(z, y)  +  w_lm * mean over answer tokens CE

Notation: B rows, T tokens, D hidden size, V vocabulary, A answer tokens of the batch.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from data import Prompts, collate, encode_rows, printable, read_rows
from model import Linear, checkpoint_files, compare_tensors, disk_name, load_llama, read_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."  # what peft puts before each name; else its names are ours
PEFT_KEYS = set(  # of its adapter_config.json: used, or without effect on a trained adapter
    "r lora_alpha target_modules use_rslora modules_to_save task_type auto_mapping peft_version"
    " base_model_name_or_path revision inference_mode lora_dropout megatron_core qalora_group_size"
    " runtime_config".split()
)
GOLDEN_TEXT = "The quick brown fox jumps over the lazy dog, 12 times out of 30."


# --- LoRA, the two heads, the joint loss ----------------------------------------------------------
class LoRALinear(Linear):
    """y = x W^T + (alpha / rank) x A^T B^T, W frozen (arXiv 2106.09685). A is random and B zero, so
    that wrapping changes nothing. Both are float32, since small updates vanish in bfloat16; their
    products run in the base's dtype. LoRALinear.off = True leaves the base model everywhere."""

    def __init__(self, base, rank, alpha):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        self.lora_A = Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as peft: U(+-1/sqrt(in))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = super().forward(x)  # ours alone: adding in place spares a tensor of its size
        return y if self.off else y.add_(self.lora_B(self.scale * self.lora_A(x)))

    def low_rank(self):
        return self.scale * self.lora_A.weight, self.lora_B.weight

    def merged(self, weight):
        """W + (alpha / rank) B A, summed in float32 and cast once to the dtype of W."""
        a, b = self.low_rank()
        return (weight.float() + (b @ a).detach().cpu()).to(weight.dtype)


def add_lora(llama, rank, alpha, targets=TARGETS):
    """Freezes llama and puts LoRALinear in place of the named projections of every block."""
    if type(rank) is not int or not 0 < rank <= llama.config.hidden_size:
        raise ValueError(f"LoRA rank {rank}; 1 to {llama.config.hidden_size} (hidden size) is due")
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"LoRA targets {sorted(unknown)}; supported are {', '.join(TARGETS)}")
    llama.requires_grad_(False)
    for block in llama.layers:
        for module in (block.self_attn, block.mlp):
            for name, child in list(module.named_children()):
                if name in targets:
                    setattr(module, name, LoRALinear(child, rank, alpha))
    return llama


class CLSGen(nn.Module):
    """A Llama and a score head: what Hugging Face's LlamaForSequenceClassification has too."""

    def __init__(self, llama):
        super().__init__()
        self.model, norm = llama, llama.norm.weight
        self.score = nn.Linear(len(norm), 1, bias=False, device=norm.device)

    @torch.no_grad()
    def start_head(self, label_ids):
        """Starts the score head at the label words: lm_head's row for "Yes" less its row for "No"
        (of two lists of ids, the first that differ; else zero). z is their log-odds then, and both
        losses move a hidden state along one line, as in LM-BFF (arXiv 2012.15723)."""
        pairs = zip(*label_ids, strict=False)
        no, yes = next((pair for pair in pairs if pair[0] != pair[1]), (0, 0))
        rows = self.model.output_embedding().weight
        self.score.weight.copy_(rows[yes].float() - rows[no].float())

    def parameter_groups(self):
        """Every parameter once, {"lora" | "head" | "frozen": {name: parameter}}: the one place that
        decides what trains and what is saved."""
        groups = {"lora": {}, "head": {}, "frozen": {}}
        for name, parameter in self.named_parameters():
            kind = "lora" if ".lora_" in name else "head" if name.startswith("score.") else "frozen"
            groups[kind][name] = parameter.requires_grad_(kind != "frozen")
        return groups

    def logit(self, hidden):
        """Hidden states at the prompt end (B, D) -> z (B,), in float32."""
        return self.score(hidden.float()).squeeze(-1)

    def forward(self, batch):
        """Batch -> z (B,) and the logits of its answer tokens (A, V): one pass for both heads."""
        hidden = self.model(batch.input_ids)  # (B, T, D)
        rows = torch.arange(len(hidden), device=hidden.device)
        z = self.logit(hidden[rows, batch.prompt_end])
        # The vocabulary is the widest product of all: only where an answer token is predicted
        answers = hidden[batch.answer_rows, batch.answer_positions]  # (A, D)
        return z, self.model.logits(answers)


def joint_loss(z, y, logits, targets, n_examples, n_tokens, w_cls, w_lm):
    """(L, BCE, CE) of a micro-batch: z, y (B,); logits (A, V); targets (A,). n_examples, n_tokens
    count the whole optimizer step, so that micro-batches add up to the gradient of one batch."""
    bce = F.binary_cross_entropy_with_logits(z, y, reduction="sum") / n_examples
    lm = F.cross_entropy(logits.float(), targets, reduction="sum") / max(n_tokens, 1)
    # 0 * z.sum() keeps the graph whole where a weight is zero or no row has an answer
    return w_cls * bce + w_lm * lm + 0 * z.sum(), bce, lm


# --- files ----------------------------------------------------------------------------------------
def write_atomically(path, data):
    """Writes bytes or str under a temporary name, syncs, renames: all of it or what was there."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path, tensors, metadata=None):
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {"format": "pt"} | (metadata or {})))


def adapter_tensors(model):
    """LoRA and head under peft's names: opens there as SEQ_CLS, or without head as causal LM."""
    if model.model.packed_head:
        raise ValueError("packed for predictions: load_run(..., pack=False) can be saved or merged")
    groups = model.parameter_groups()
    return {PEFT_PREFIX + name: p.detach() for name, p in (groups["lora"] | groups["head"]).items()}


def read_adapter_config(folder):
    """adapter_config.json of peft -> {"rank", "alpha", "targets"}; rslora's alpha / sqrt(rank) is
    turned into an alpha / rank. ValueError names a setting that makes it more than plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    due = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}
    for key, value in raw.items():
        if key not in PEFT_KEYS and value not in due.get(key, [None, False, {}, []]):
            raise ValueError(f"{path}: {key} is {value!r}, which is not supported")
    rank, alpha, targets = (raw.get(key) for key in ("r", "lora_alpha", "target_modules"))
    fits = type(rank) is int and rank > 0 and type(alpha) in (int, float) and alpha > 0
    if not (fits and isinstance(targets, list) and targets and set(targets) <= set(TARGETS)):
        raise ValueError(f"{path}: r {rank!r}, lora_alpha {alpha!r}, target_modules {targets!r};"
                         f" due are two numbers and a list out of {', '.join(TARGETS)}")
    return {"rank": rank, "alpha": alpha * (rank**0.5 if raw.get("use_rslora") else 1.0),
            "targets": [name for name in TARGETS if name in targets]}


def load_adapter(model, path, need_head=True):
    """Copies a file of `adapter_tensors` into the model; ValueError names what does not fit."""
    try:
        tensors, own = load_file(path), adapter_tensors(model)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    if not need_head and PEFT_PREFIX + "score.weight" not in tensors:
        del own[PEFT_PREFIX + "score.weight"]
    compare_tensors(*({name: t.shape for name, t in side.items()} for side in (own, tensors)), path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def base_fingerprint(folder):
    """SHA-256 of config.json, tokenizer.json and the headers of the weight files."""
    digest = hashlib.sha256()
    for path in (Path(folder) / "config.json", Path(folder) / "tokenizer.json"):
        digest.update(path.read_bytes())
    for path in checkpoint_files(folder):
        with open(path, "rb") as file:  # safetensors allows no header above 100 MB
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), 10**8)))
    return digest.hexdigest()


def versions():
    packages = {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")}
    return {"python": sys.version.split()[0], **packages}


def pick(dtype, device):
    """(dtype, device): CUDA if there is one; "auto" is bfloat16, on a CPU if it multiplies it."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = device.type != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        dtype = "bfloat16" if fast else "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name}; float32, bfloat16 or float16 is due")
    return getattr(torch, name), device


def choose_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """(B, V) -> (B,): the likeliest at temperature 0, else one of softmax(logits / temperature)
    from the smallest set that holds top_p of the mass (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    # Tokens below (1 - top_p) / V weigh less than 1 - top_p together: all are cut, none is sorted
    p, ids = p.topk(int((p >= (1 - top_p) / p.shape[-1]).sum(-1).max()))
    p[p.cumsum(-1) - p > top_p] = 0  # the token that crosses top_p still counts
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(ids.device)
    return ids.gather(-1, drawn).squeeze(-1)


# --- a run: its folder and its predictions --------------------------------------------------------
class Run:
    """A trained model and all that a prediction needs: prompts, calibration, threshold."""

    def __init__(self, model, prompts, meta, name="unsaved"):
        self.model, self.prompts, self.meta, self.name = model, prompts, meta, name
        self.llama, self.device = model.model, model.score.weight.device

    @torch.inference_mode()
    def golden(self):
        """Token ids and raw logit of a fixed sentence: tells another base or head apart."""
        ids, _ = self.prompts.prompt(GOLDEN_TEXT)
        z = self.model.logit(self.llama(torch.tensor([ids], device=self.device))[:, -1]).item()
        dtype = str(self.llama.norm.weight.dtype).removeprefix("torch.")
        return {"text": GOLDEN_TEXT, "ids": ids, "logit": z, "dtype": dtype}

    def save(self, folder):
        """Writes adapter_model.safetensors, adapter_config.json (peft's layout) and clsgen.json."""
        lora = self.meta["lora"]
        write_tensors(folder / "adapter_model.safetensors", adapter_tensors(self.model))
        write_json(folder / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "SEQ_CLS", "r": lora["rank"],
            "lora_alpha": lora["alpha"], "target_modules": lora["targets"], "lora_dropout": 0.0,
            "bias": "none", "modules_to_save": ["classifier", "score"], "inference_mode": True,
            "base_model_name_or_path": self.meta["base"]})
        self.meta |= {"golden": self.golden(), "versions": versions()}
        write_json(folder / "clsgen.json", self.meta)

    def _label_token(self, cache, last, prompt_end):
        """log p("Yes.") - log p("No.") after the prompt, from its cache: (B,)."""
        scores = []
        for ids in self.prompts.label_ids:  # "No." and "Yes.": the word's tokens and the full stop
            tokens = torch.tensor(ids, device=self.device).expand(len(last), -1)
            hidden = last[:, None]
            if len(ids) > 1:
                positions = prompt_end[:, None] + torch.arange(1, len(ids), device=self.device)
                more = self.llama(tokens[:, :-1], cache, positions)
                hidden = torch.cat((hidden, more), dim=1)
            logp = self.llama.logits(hidden).float().log_softmax(-1)
            scores.append(logp.gather(-1, tokens[..., None]).sum((1, 2)))
        return scores[1] - scores[0]

    def _decode(self, cache, last, prompt_end, choose, forced):
        """Yields each row's next token (B,) until all have stopped; for those, a stop id."""
        stop_ids = torch.tensor(self.prompts.stop_ids, device=self.device)
        done = torch.zeros(len(last), dtype=torch.bool, device=self.device)
        for step in range(self.prompts.max_answer):
            tokens = choose(self.llama.logits(last).float())
            for row, ids in enumerate(forced):
                if step < len(ids):
                    tokens[row] = ids[step]
            tokens[done] = stop_ids[0]
            yield tokens
            done |= torch.isin(tokens, stop_ids)
            if done.all():
                return
            last = self.llama(tokens[:, None], cache, prompt_end[:, None] + 1 + step)[:, 0]

    @torch.inference_mode()
    def run_batch(self, examples, explain=True, decide="text", choose=choose_token):
        """Yields the rows' records without text, then their answers token by token, each (B,). One
        prefill gives p, and its cache goes on to the label words and the explanation."""
        batch, prompts = collate(examples, self.device), self.prompts
        room = max(explain * prompts.max_answer, *map(len, prompts.label_ids))
        cache = self.llama.new_cache(len(examples), batch.input_ids.shape[1] + room)
        hidden, prompt_end = self.llama(batch.input_ids, cache), batch.prompt_end
        last = hidden[torch.arange(len(examples)), prompt_end]  # (B, D)
        # float64, which not every device has: in float32, p would be 1 from z = 17 on
        token = self._label_token(cache, last, prompt_end).cpu().double()
        # An LM-only run has no trained head: the label token's score takes its place
        z = token if self.meta["scorer"] == "label_token" else self.model.logit(last).cpu().double()
        calibration, threshold = self.meta["calibration"], self.meta["threshold"]
        p = torch.sigmoid(z / calibration["temperature"] + calibration["bias"])
        scores = torch.stack((p, z.sigmoid(), token.sigmoid()), 1).tolist()
        records = [{
            "id": example.id, "probability": own, "raw_probability": raw,
            "label_token_probability": words, "label": int(own >= threshold),
            "threshold": threshold, "explanation": None, "stated_label": None, "agree": None,
            "tokens_cut": example.tokens_cut, "run": self.name,
            **({} if example.label is None else {"true_label": example.label}),
        } for example, (own, raw, words) in zip(examples, scores, strict=True)]
        yield records
        if explain:
            forced = [prompts.label_ids[one["label"]] for one in records if decide == "head"]
            yield from self._decode(cache, last, prompt_end, choose, forced)

    def predict(self, rows, explain=True, batch_size=16, decide="text", choose=choose_token,
                progress=False):
        """Texts or row dicts -> their records, in order. decide="head" starts each answer with the
        head's decision, so that the text argues for it; by default the text states a label of its
        own, which is what agreement measures. choose(logits) picks a token."""
        rows = [{"id": i} | ({"text": row} if isinstance(row, str) else row)
                for i, row in enumerate(rows, 1)]
        examples = encode_rows(rows, self.prompts, answers=False)
        order = sorted(range(len(rows)), key=lambda i: -len(examples[i]))  # alike lengths together
        results = {}
        for start in tqdm(range(0, len(rows), batch_size), unit="batch", disable=not progress):
            indices = order[start : start + batch_size]
            batch = [examples[i] for i in indices]
            records, *tokens = self.run_batch(batch, explain, decide, choose)
            results |= zip(indices, records, strict=True)
            answers = torch.stack(tokens, 1).tolist() if explain else []
            for record, ids in zip(records, answers, strict=explain):
                stated, text = self.prompts.parse(self.prompts.decode(ids))
                record |= {"explanation": text, "stated_label": stated}
                record["agree"] = stated == record["label"]
        return [results[i] for i in range(len(rows))]


def load_run(folder, model=None, dtype=None, device=None, pack=True):
    """A run folder, or what `merge` made of one -> Run. `model`: the base folder if it has moved;
    `pack`: for predictions only, see Llama.pack. ValueError when the base's fingerprint or the
    golden row says that this is another model."""
    folder, meta = Path(folder), read_json(Path(folder) / "clsgen.json")
    try:
        return _load_run(folder, meta, model, dtype, device, pack)
    except (KeyError, TypeError, AttributeError) as error:  # some key is gone, or of a wrong type
        raise ValueError(f"{folder / 'clsgen.json'} does not fit: {error!r}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _load_run(folder, meta, model, dtype, device, pack):
    dtype, device = pick(dtype or meta["golden"]["dtype"], device)
    merged = (folder / "score.safetensors").exists()
    base = folder if merged else Path(model or meta["base"])
    if not os.path.isdir(base):
        raise ValueError(f"the base model {base} is not there; --model can name it")
    if base_fingerprint(base) != meta["base_fingerprint"]:
        raise ValueError(f"{base}: not the base of this run: other config, tokenizer or tensors")
    llama = load_llama(base, dtype, device)
    clsgen = CLSGen(llama if merged else add_lora(llama, **meta["lora"])).eval()
    load_adapter(clsgen, folder / ("score.safetensors" if merged else "adapter_model.safetensors"))
    digest = hashlib.sha256((folder / "clsgen.json").read_bytes()).hexdigest()[:12]
    if pack:
        llama.pack()
    run = Run(clsgen, Prompts(base, **meta["prompts"]), meta, digest)
    temperature, bias = meta["calibration"]["temperature"], meta["calibration"]["bias"]
    values = meta["scorer"], temperature, bias, meta["threshold"], meta["base_rate"]
    fits = values[0] in ("head", "label_token") and temperature > 0
    if not fits or not all(abs(value) < 1e9 for value in values[1:]):  # NaN neither
        raise ValueError(f"clsgen.json: scorer, calibration, threshold, base rate: {values}")
    stored, here = meta["golden"], run.golden()
    tolerance = 1e-3 if stored["dtype"] == here["dtype"] == "float32" else 0.25
    if stored["ids"] != here["ids"]:
        raise ValueError("the tokenizer is not the one that this run was trained with")
    if not abs(stored["logit"] - here["logit"]) <= tolerance:
        raise ValueError(f"a fixed sentence has logit {here['logit']:.4f}, the run says "
                         f"{stored['logit']:.4f}: other base weights, LoRA or head")
    return run


# --- commands -------------------------------------------------------------------------------------
def merge(run, base, out):
    """Writes run as a plain Hugging Face folder, in the dtype and the shards that its base has."""
    wrapped = {disk_name(name) + ".weight": module for name, module in run.llama.named_modules()
               if isinstance(module, LoRALinear)}
    score = {name: t for name, t in adapter_tensors(run.model).items() if ".score." in name}
    if not wrapped:
        raise ValueError("this run is merged already")
    out.mkdir(parents=True)
    for path in checkpoint_files(base):
        tensors = load_file(path)
        for name in tensors.keys() & wrapped.keys():
            tensors[name] = wrapped[name].merged(tensors[name])
        write_tensors(out / path.name, tensors)
    for path in base.iterdir():  # config, tokenizer, index, chat template
        if path.suffix in (".json", ".model", ".jinja", ".txt"):
            shutil.copyfile(path, out / path.name)
    write_tensors(out / "score.safetensors", score)
    merged = CLSGen(load_llama(out, run.llama.norm.weight.dtype, run.device))
    merged.score = run.model.score
    meta = {"base": str(out), "base_fingerprint": base_fingerprint(out)}
    meta["golden"] = Run(merged, run.prompts, run.meta).golden()
    write_json(out / "clsgen.json", run.meta | meta)


def predict_file(run, args, choose):
    """--data to --out, a line a row. They gather in OUT.part, a chunk at a time and synced, so that
    the same command goes on where it was stopped; its first line says what the command was."""
    rows, part = read_rows(args.data, labels=False), args.out.with_name(args.out.name + ".part")
    names = ("no_explain", "decide", "temperature", "top_p", "seed", "batch")
    head = {"run": run.name, "data": hashlib.sha256(args.data.read_bytes()).hexdigest()}
    head = (json.dumps(head | {name: getattr(args, name) for name in names}) + "\n").encode()
    there = part.exists() and not args.overwrite
    lines = part.read_bytes().splitlines(keepends=True) if there else []
    if lines and lines[0] != head:
        raise ValueError(f"{part} was begun with other arguments or data; --overwrite starts anew")
    # Chunks, and the draws in them, are the same wherever the last call stopped
    chunk, whole = 8 * args.batch, sum(line.endswith(b"\n") for line in lines[1:])
    done = len(rows) if whole == len(rows) else whole // chunk * chunk
    write_atomically(part, b"".join([head, *lines[1 : 1 + done]]))
    with (open(part, "a", encoding="utf-8") as file,
          tqdm(total=len(rows), initial=done, unit="row") as bar):
        for start in range(done, len(rows), chunk):
            choose.keywords["generator"].manual_seed(args.seed + start)
            records = run.predict(rows[start : start + chunk], not args.no_explain, args.batch,
                                  args.decide, choose)
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(records))
    write_atomically(args.out, part.read_bytes().removeprefix(head))
    part.unlink()
    print(f"{len(rows)} predictions in {args.out}")


def predict_text(run, args, choose):
    """--text: the probability at once, then the answer as it is written."""
    examples = encode_rows([{"id": 1, "text": args.text}], run.prompts)
    steps = run.run_batch(examples, not args.no_explain, args.decide, choose)
    record, ids, shown = next(steps)[0], [], 0
    yes, decision = (printable(run.prompts.word(label)) for label in (1, record["label"]))
    print(f"probability of {yes}: {record['probability']:.3f}  (decision: {decision}, threshold "
          f"{record['threshold']:.3f}; {record['tokens_cut']} tokens of the text cut)")
    for tokens in steps:
        ids += tokens.tolist()
        text = printable(run.prompts.decode(ids))
        if not text.endswith("\ufffd"):  # half of a character: wait for its other bytes
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def keep_freed_memory():
    """Tells glibc's malloc to keep what is freed. By default it hands large blocks back to the
    system, and on a CPU the fresh pages of the next step cost a tenth of its time."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def run_main(main):
    """Runs a script's main: one sentence and exit code 2 for what a user can put right."""
    keep_freed_memory()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print("error:", printable(str(error)), file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("stopped", file=sys.stderr) or 130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", nargs="?", choices=["predict", "merge"], default="predict")
    add("--run", required=True, help="a run folder of train.py, or a merged folder")
    add("--text", help="one text: prints its probability and streams the explanation")
    add("--data", type=Path, help="JSON Lines rows with `text`")
    add("--out", type=Path, help="predictions (JSON Lines), or the merged folder")
    add("--overwrite", action="store_true", help="replace the predictions in --out")
    add("--no-explain", action="store_true", help="probabilities only")
    add("--decide", choices=["text", "head"], default="text", help="who states the answer's label")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw from this share of the mass")
    add("--seed", type=int, default=0, help="of the draws")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--model", help="the base model's folder, if it has moved")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the run's")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    merging, no_text, no_data = args.command == "merge", args.text is None, args.data is None
    exists = args.out is not None and args.out.exists() and (merging or not args.overwrite)
    wrong = [text for text, bad in (
        ("give either --text or --data", not merging and no_text == no_data),
        ("--out is missing", args.out is None and (merging or not no_data)),
        (f"{args.out} exists", exists),
        (f"--out {args.out}: no such folder", args.out and not args.out.parent.is_dir()),
        (f"--batch {args.batch} is below 1", args.batch < 1),
        (f"--temperature {args.temperature} is below 0", not args.temperature >= 0),
        (f"--top-p {args.top_p} is not in (0, 1]", not 0 < args.top_p <= 1),
    ) if bad]
    if wrong:
        raise ValueError("; ".join(wrong))
    choose = partial(choose_token, temperature=args.temperature, top_p=args.top_p,
                     generator=torch.Generator().manual_seed(args.seed))
    run = load_run(args.run, args.model, args.dtype, args.device, pack=not merging)
    if merging:
        merge(run, Path(args.model or run.meta["base"]), args.out)
        print(f"merged model in {args.out}")
    else:
        (predict_file if no_text else predict_text)(run, args, choose)


if __name__ == "__main__":
    run_main(main)
