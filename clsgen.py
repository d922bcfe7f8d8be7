"""CLSGen (arXiv 2604.11801): a probability and a written explanation from one language model.

    python clsgen.py --run runs/x --text "..."                             # one text, streamed
    python clsgen.py --run runs/x --data new.jsonl --out predictions.jsonl
    python clsgen.py merge --run runs/x --out folder                       # a plain HF folder

  prompt tokens (question + text)          | answer tokens: "Yes. Because ..."
  ----------------------------------- x_P  | a_1  a_2 ... a_A
                 Llama + LoRA (one forward pass)
                              h_P          | h_P  h_1 ... h_{A-1}
                               |                   |
                   score head: D -> 1         lm_head: D -> V
                      logit z                p(a_t | x, a_<t)

  L = w_cls * mean over examples BCE(z, y)  +  w_lm * mean over answer tokens CE

The score head reads the last prompt token and nothing else, so z cannot see the answer.
Notation: B rows, T tokens, D hidden size, V vocabulary, A answer tokens of the batch.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from data import Prompts, collate, encode_rows, printable, read_rows
from model import checkpoint_files, compare_tensors, disk_name, load_llama, read_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GOLDEN_TEXT = "The quick brown fox jumps over the lazy dog, 12 times out of 30."

# --- LoRA, the two heads, the joint loss ----------------------------------------------------------


class LoRALinear(nn.Linear):
    """y = x W^T + (alpha / rank) x A^T B^T, W frozen (arXiv 2106.09685).

    A is random and B zero, so that wrapping changes nothing and the first step moves B alone.
    A and B are float32 (small updates vanish in bfloat16); their products run in the base's dtype.
    """

    def __init__(self, base, rank, alpha):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as peft: U(+-1/sqrt(in))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        small = F.linear(x, self.lora_A.weight.to(x.dtype))
        return super().forward(x) + F.linear(small, (self.scale * self.lora_B.weight).to(x.dtype))

    @torch.no_grad()
    def merge_(self):
        """W += (alpha / rank) B A, in float32, cast once; B becomes zero, so twice is once."""
        delta = self.scale * self.lora_B.weight @ self.lora_A.weight
        self.weight.copy_(self.weight.float() + delta)
        self.lora_B.weight.zero_()


def add_lora(llama, rank, alpha, targets=TARGETS):
    """Freezes llama and puts LoRALinear in place of the named projections of every block."""
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
        nn.init.normal_(self.score.weight, std=0.02)

    def parameter_groups(self):
        """Every parameter once: {"lora": ..., "head": ..., "frozen": ...}, name to parameter.
        This is the one place that decides what trains."""
        groups = {"lora": {}, "head": {}, "frozen": {}}
        for name, parameter in self.named_parameters():
            kind = "head" if name.startswith("score.") else "frozen"
            groups["lora" if ".lora_" in name else kind][name] = parameter
        for kind, parameters in groups.items():
            for parameter in parameters.values():
                parameter.requires_grad_(kind != "frozen")
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
    """(L, BCE, CE): the sums of this micro-batch over the counts of the whole optimizer step.

    z, y (B,); logits (A, V), targets (A,). n_examples and n_tokens count the accumulation window
    over all ranks, so that micro-batches add up to the gradient of one large batch.
    """
    bce = F.binary_cross_entropy_with_logits(z, y, reduction="sum") / n_examples
    lm = F.cross_entropy(logits.float(), targets, reduction="sum") / max(n_tokens, 1)
    # 0 * z.sum() keeps the graph whole where a weight is zero or no row has an answer
    return w_cls * bce + w_lm * lm + 0 * z.sum(), bce, lm


# --- files ----------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Writes bytes or str under a temporary name, syncs, renames: all of it or what was there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def base_fingerprint(folder):
    """SHA-256 of config.json, tokenizer.json and the headers of the weight files."""
    digest = hashlib.sha256()
    for path in (Path(folder) / "config.json", Path(folder) / "tokenizer.json"):
        digest.update(path.read_bytes())
    for path in checkpoint_files(folder):
        with open(path, "rb") as file:
            size = file.read(8)
            digest.update(size + file.read(int.from_bytes(size, "little")))
    return digest.hexdigest()


def versions():
    packages = ("torch", "numpy", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def pick_device(device=None):
    """The named device, or CUDA where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def pick_dtype(dtype, device):
    """"auto": bfloat16 where the processor multiplies it fast, else float32."""
    if dtype not in (None, "auto"):
        return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    cpu = torch.cpu.get_capabilities()
    fast = device.type != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


# --- choosing a token -----------------------------------------------------------------------------


def greedy(logits):
    """(B, V) -> (B,), the likeliest token."""
    return logits.argmax(-1)


def sampler(temperature, top_p, seed):
    """A function like greedy that draws from softmax(logits / temperature), from the smallest set of
    tokens that holds top_p of the mass (nucleus sampling, arXiv 1904.09751)."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        p, ids = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
        p[p.cumsum(-1) - p > top_p] = 0  # the token that crosses top_p still counts
        drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(ids.device)
        return ids.gather(-1, drawn).squeeze(-1)

    return choose


# --- the run folder -------------------------------------------------------------------------------


PEFT_PREFIX = "base_model.model."  # what PEFT puts before each name; else its names are ours


def adapter_tensors(model):
    """LoRA and head under PEFT's names: opens there as SEQ_CLS, and as causal LM without the head."""
    groups = model.parameter_groups()
    return {PEFT_PREFIX + name: p.detach() for name, p in (groups["lora"] | groups["head"]).items()}


def load_adapter(model, path):
    """Copies a file of `adapter_tensors` into the model; ValueError names what does not fit."""
    try:
        tensors, own = load_file(path), adapter_tensors(model)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    compare_tensors(*({name: t.shape for name, t in x.items()} for x in (own, tensors)), path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def save_tensors(path, tensors):
    """{name: tensor} -> a safetensors file, written atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {"format": "pt"}))


class Run:
    """A trained model and all that a prediction needs: prompts, calibration, threshold."""

    def __init__(self, model, prompts, meta, name="unsaved"):
        self.model, self.prompts, self.meta, self.name = model, prompts, meta, name

    @property
    def device(self):
        return self.model.score.weight.device

    def golden(self):
        """Token ids and raw logit of a fixed sentence: tells a wrong base or head apart."""
        ids, _ = self.prompts.prompt(GOLDEN_TEXT)
        with torch.inference_mode():
            hidden = self.model.model(torch.tensor([ids], device=self.device))
            z = self.model.logit(hidden[:, -1]).item()
        dtype = str(self.model.model.norm.weight.dtype).removeprefix("torch.")
        return {"text": GOLDEN_TEXT, "ids": ids, "logit": z, "dtype": dtype}

    def save(self, folder):
        """Writes adapter_model.safetensors, adapter_config.json (PEFT's layout) and clsgen.json."""
        folder = Path(folder)
        lora = self.meta["lora"]
        config = {
            "peft_type": "LORA", "task_type": "SEQ_CLS", "r": lora["rank"], "lora_alpha": lora["alpha"],
            "lora_dropout": 0.0, "bias": "none", "target_modules": lora["targets"],
            "modules_to_save": ["classifier", "score"], "fan_in_fan_out": False,
            "base_model_name_or_path": self.meta["base"], "inference_mode": True,
        }
        save_tensors(folder / "adapter_model.safetensors", adapter_tensors(self.model))
        write_json(folder / "adapter_config.json", config)
        self.meta |= {"golden": self.golden(), "versions": versions()}
        write_json(folder / "clsgen.json", self.meta)

    def _prefill(self, examples, room):
        """Runs the prompts once: (cache with `room` more tokens, h_P (B, D), prompt_end (B,))."""
        batch = collate(examples, self.device)
        rows, width = batch.input_ids.shape
        cache = self.model.model.new_cache(rows, width + room)
        hidden = self.model.model(batch.input_ids, cache)
        return cache, hidden[torch.arange(rows), batch.prompt_end], batch.prompt_end

    def _label_token(self, cache, last, prompt_end):
        """log p("Yes.") - log p("No."): the logit of the softmax over the two, from the cache (B,)."""
        llama, scores = self.model.model, []
        for ids in self.prompts.label_ids:
            tokens = torch.tensor(ids, device=self.device).expand(len(last), -1)
            hidden = last[:, None]
            if len(ids) > 1:
                positions = prompt_end[:, None] + torch.arange(1, len(ids), device=self.device)
                hidden = torch.cat((hidden, llama(tokens[:, :-1], cache, positions)), dim=1)
            logp = llama.logits(hidden).float().log_softmax(-1)
            scores.append(logp.gather(-1, tokens[..., None]).sum((1, 2)))
        return scores[1] - scores[0]

    def _decode(self, cache, last, prompt_end, choose, forced=()):
        """Yields each row's next token (B,) until all have stopped; a stop id for those that have."""
        llama, stop_ids = self.model.model, torch.tensor(self.prompts.stop_ids, device=self.device)
        done = torch.zeros(len(last), dtype=torch.bool, device=self.device)
        for step in range(self.prompts.max_answer):
            tokens = choose(llama.logits(last).float())
            for row, ids in enumerate(forced):
                if step < len(ids):
                    tokens[row] = ids[step]
            tokens[done] = stop_ids[0]
            yield tokens
            done |= torch.isin(tokens, stop_ids)
            if done.all():
                return
            last = llama(tokens[:, None], cache, prompt_end[:, None] + 1 + step)[:, 0]

    @torch.inference_mode()
    def run_batch(self, examples, explain=True, decide="text", choose=greedy):
        """Yields the rows' records without text, then their answers token by token, each (B,).

        One prefill gives p, and its cache goes on to the label words and the explanation. An
        LM-only run has no trained head: its label-token score takes the head's place.
        """
        room = self.prompts.max_answer if explain else max(map(len, self.prompts.label_ids))
        cache, last, prompt_end = self._prefill(examples, room)
        token = self._label_token(cache, last, prompt_end)
        z = token if self.meta["scorer"] == "label_token" else self.model.logit(last)
        calibration, threshold = self.meta["calibration"], self.meta["threshold"]
        p = torch.sigmoid(z / calibration["temperature"] + calibration["bias"])
        scores = zip(examples, *(x.tolist() for x in (p, z.sigmoid(), token.sigmoid())), strict=True)
        records = [{
            "id": example.id, "probability": p, "raw_probability": raw,
            "label_token_probability": token, "label": int(p >= threshold), "threshold": threshold,
            "explanation": None, "stated_label": None, "agree": None,
            "tokens_cut": example.tokens_cut, "run": self.name,
            **({} if example.label is None else {"true_label": example.label}),
        } for example, p, raw, token in scores]
        yield records
        if explain:
            decided = [self.prompts.label_ids[record["label"]] for record in records]
            forced = decided if decide == "head" else ()
            yield from self._decode(cache, last, prompt_end, choose, forced)

    def predict(self, rows, explain=True, batch_size=16, decide="text", choose=greedy, progress=False):
        """Texts or row dicts -> a list of records in their order (fields: see run_batch).

        decide="head" starts each answer with the head's decision, so that the text argues for it;
        by default the model states a label of its own, which is what agreement measures.
        """
        rows = [{"id": i, "text": r} if isinstance(r, str) else r for i, r in enumerate(rows, 1)]
        examples = encode_rows(rows, self.prompts, answers=False)
        order = sorted(range(len(rows)), key=lambda i: -len(examples[i]))  # alike lengths together
        results = [None] * len(rows)
        bar = tqdm(total=len(rows), unit="row", desc="predict", disable=not progress)
        for start in range(0, len(rows), batch_size):
            indices = order[start : start + batch_size]
            steps = self.run_batch([examples[i] for i in indices], explain, decide, choose)
            records, *tokens = steps
            for record, ids in zip(records, torch.stack(tokens, 1).tolist() if tokens else ()):
                answer = self.prompts.decode(ids)
                stated = self.prompts.stated_label(answer)
                record |= {"explanation": self.prompts.explanation_of(answer), "stated_label": stated,
                           "agree": stated == record["label"]}
            for i, record in zip(indices, records, strict=True):
                results[i] = record
            bar.update(len(indices))
        bar.close()
        return results


def load_run(folder, model=None, dtype=None, device=None):
    """A run folder, or what `merge` made of one -> Run. `model`: the base folder if it has moved.

    ValueError when the base's fingerprint or the golden row says that this is another model.
    """
    folder, device = Path(folder), pick_device(device)
    meta = read_json(folder / "clsgen.json")
    merged = (folder / "score.safetensors").exists()
    base = folder if merged else Path(model or meta["base"])
    if base_fingerprint(base) != meta["base_fingerprint"]:
        raise ValueError(f"{base}: not the base model of {folder}: its config, tokenizer or tensors "
                         "differ from those that the run was trained with")
    llama = load_llama(base, pick_dtype(dtype or meta["golden"]["dtype"], device), device)
    if not merged:
        add_lora(llama, meta["lora"]["rank"], meta["lora"]["alpha"], meta["lora"]["targets"])
    clsgen = CLSGen(llama).eval()
    load_adapter(clsgen, folder / ("score.safetensors" if merged else "adapter_model.safetensors"))
    digest = hashlib.sha256((folder / "clsgen.json").read_bytes()).hexdigest()[:12]
    run = Run(clsgen, Prompts(base, **meta["prompts"]), meta, digest)
    stored, here = meta["golden"], run.golden()
    if stored["ids"] != here["ids"]:
        raise ValueError(f"{folder}: the tokenizer is not the one that this run was trained with")
    exact = stored["dtype"] == here["dtype"] == "float32"
    if not abs(stored["logit"] - here["logit"]) <= (1e-3 if exact else 0.25):
        raise ValueError(
            f"{folder}: a fixed sentence has logit {here['logit']:.4f} ({here['dtype']}) here and "
            f"{stored['logit']:.4f} ({stored['dtype']}) in the run: other base weights, LoRA or head"
        )
    return run


# --- commands -------------------------------------------------------------------------------------

BESIDE_WEIGHTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                  "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def merge(run, base, out, shard_bytes=5 * 10**9):
    """Writes run as a plain Hugging Face folder: W + (alpha / rank) B A, summed in float32."""
    out.mkdir(parents=True)
    for module in run.model.modules():
        if isinstance(module, LoRALinear):
            module.merge_()
    shards, size = [{}], 0
    for name, tensor in run.model.model.named_parameters():
        if ".lora_" not in name:
            if size and size + tensor.nbytes > shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][disk_name(name)] = tensor
            size += tensor.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = {"total_size": sum(t.nbytes for shard in shards for t in shard.values())}
        write_json(out / "model.safetensors.index.json", {"metadata": total, "weight_map": index})
    for name, shard in zip(names, shards, strict=True):
        save_tensors(out / name, shard)
    for name in BESIDE_WEIGHTS:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    golden = run.golden()
    write_json(out / "config.json", read_json(base / "config.json") | {"torch_dtype": golden["dtype"]})
    save_tensors(out / "score.safetensors", {PEFT_PREFIX + "score.weight": run.model.score.weight})
    run.meta |= {"base": str(out), "base_fingerprint": base_fingerprint(out), "golden": golden}
    write_json(out / "clsgen.json", run.meta)


def predict_file(run, args, choose):
    """--data to --out, a line a row, written as it goes."""
    rows, out = read_rows(args.data, labels=False), Path(args.out)
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} exists; give another --out or --overwrite")
    with open(out, "w", encoding="utf-8") as file:
        bar = tqdm(total=len(rows), unit="row")
        for start in range(0, len(rows), 8 * args.batch):  # sorted by length within eight batches
            part = rows[start : start + 8 * args.batch]
            for record in run.predict(part, not args.no_explain, args.batch, args.decide, choose):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))
        bar.close()
    print(f"{len(rows)} predictions in {out}")


def predict_text(run, args, choose):
    """--text: the probability at once, then the answer as it is written."""
    examples = encode_rows([{"id": 1, "text": args.text}], run.prompts)
    steps = run.run_batch(examples, not args.no_explain, args.decide, choose)
    record, ids, shown = next(steps)[0], [], 0
    print(f"probability of {run.prompts.word(1)}: {record['probability']:.3f}  (decision: "
          f"{run.prompts.word(record['label'])}, threshold {record['threshold']:.3f})")
    if record["tokens_cut"]:
        print(f"({record['tokens_cut']} tokens cut from the middle of the text)")
    for tokens in steps:
        ids += tokens.tolist()
        text = printable(run.prompts.decode(ids))
        if not text.endswith("\ufffd"):  # half of a character: wait for its other bytes
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def run_main(main):
    """Runs a script's main: one sentence and exit code 2 for what a user can put right."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", choices=["predict", "merge"], default="predict")
    parser.add_argument("--run", required=True, help="a run folder of train.py, or a merged folder")
    parser.add_argument("--text", help="one text: print its probability and stream the explanation")
    parser.add_argument("--data", help="a JSON Lines file of rows with `text`")
    parser.add_argument("--out", help="predictions (JSON Lines), or the merged folder")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--no-explain", action="store_true", help="probabilities only")
    parser.add_argument("--decide", choices=["text", "head"], default="text",
                        help="who states the label in the answer: the text itself, or the head")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the mass to draw from")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch", type=int, default=16, help="rows at a time")
    parser.add_argument("--model", help="the base model's folder, if it has moved")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    wrong = [text for bad, text in (
        (args.command == "merge" and not args.out, "merge needs --out"),
        (args.command == "predict" and (args.text is None) == (args.data is None),
         "give either --text or --data"),
        (args.data and not args.out, "--data needs --out"),
        (args.temperature < 0, "--temperature is below 0"),
        (not 0 < args.top_p <= 1, "--top-p is not in (0, 1]"),
        (args.batch < 1, "--batch is below 1"),
    ) if bad]
    if wrong:
        raise ValueError("; ".join(wrong))
    run = load_run(args.run, args.model, args.dtype, args.device)
    if args.command == "merge":
        if Path(args.out).exists():
            raise ValueError(f"{args.out} exists; merge writes a new folder")
        merge(run, Path(args.model or run.meta["base"]), Path(args.out))
        print(f"merged model in {args.out}")
        return
    choose = sampler(args.temperature, args.top_p, args.seed) if args.temperature else greedy
    (predict_text if args.text is not None else predict_file)(run, args, choose)


if __name__ == "__main__":
    run_main(main)
