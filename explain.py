"""Data construction: a teacher model explains rows that only have labels.

    python data.py explain --data labels.jsonl --out train.jsonl --model models/smollm2-135m
    python data.py explain ... --endpoint http://localhost:8000/v1 --teacher NAME

The teacher knows the label and writes up to --tries explanations; the first that passes every check
is kept. No row is dropped: one without explanation still trains the score head.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from tqdm import tqdm

from clsgen import CLSGen, Run, base_fingerprint, choose_token, pick
from data import SYSTEM, Prompts, add_prompt_arguments, encode_rows, parse_row, printable, read_rows
from data import shingles, stated_label
from eval import auroc, repetition
from model import load_llama

INSTRUCTION = (  # below question and text
    'The answer is "{}". In one to three sentences, explain which facts in the text lead to this '
    "answer, in the words of the text."
)
# What an explanation says that knows of a label it was given; and what is markup, or broken
TOLD = re.compile(r"\b((the|this|right|correct|given|known) (answer|label)|instructions?"
                  r"|I (was|am) (told|given|asked)|as an ai)\b", re.IGNORECASE)
MARKUP = re.compile("<\\|.*?\\|>|</?\\w+>|\\[/?INST|[\0-\x08\x0b-\x1f\x7f\ufffd\ud800-\udfff]")


def faults(text, row, args):
    """Names of the checks that an explanation of this row fails. The reader's comes after them."""
    def stems(text):  # content words by their first five letters: "reports" meets "reported"
        return {word[:5] for word in re.findall(r"[^\W\d_]{4,}", text.lower())}

    def numbers(text):
        return set(map(float, re.findall(r"\d*\.?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))))

    own = stems(text) - stems(args.question)
    passed = {
        "label": stated_label(text, args.labels)[0] in (None, row["label"]),
        "told": not TOLD.search(text),
        "grounded": len(own & stems(row["text"])) >= max(1, args.grounded * len(own)),
        "numbers": numbers(text) <= numbers(f"{args.question} {row['text']}"),
        "length": args.words[0] <= len(text.split()) <= args.words[1],
        "unfinished": text.rstrip("\"')”’").endswith((".", "!", "?", "。")),
        "loop": (repetition([text])[1] or 0) <= 0.2,
        "prompt": not shingles(text) & shingles(f"{SYSTEM} {INSTRUCTION}")
                  and args.question.lower() not in text.lower(),
        "markup": not MARKUP.search(text),
    }
    return [name for name, good in passed.items() if not good]


def without_thinking(reply):
    """What follows a teacher's thinking; an unfinished thought says nothing."""
    return reply.rsplit("</think>", 1)[-1].split("<think>")[0].replace("**", "").strip()


def local_teacher(args):
    """(write, score) of a model folder: write(texts, seeds) draws an answer to each text below the
    question, score(texts) gives each the label-token score, p of class 1."""
    prompts = Prompts(args.model, args.question, args.labels, args.format, args.max_prompt,
                      args.max_answer)
    teacher = Run(CLSGen(load_llama(args.model, *pick(args.dtype, None)).pack()), prompts,
                  {"scorer": "label_token", "calibration": {"temperature": 1, "bias": 0},
                   "threshold": 0.5})

    def write(texts, seeds):
        examples = encode_rows([{"id": None, "text": text} for text in texts], prompts)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]

        def choose(logits):  # a generator a row: batch mates change nothing
            return torch.cat([choose_token(row[None], args.temperature, args.top_p, draw)
                              for row, draw in zip(logits, draws, strict=True)])

        _, *tokens = teacher.run_batch(examples, choose=choose)
        answers = [[i for i in ids if i not in prompts.stop_ids]
                   for ids in torch.stack(tokens, 1).tolist()]
        decode = partial(prompts.tokenizer.decode, skip_special_tokens=False)
        return [without_thinking(decode(ids)) for ids in answers]

    def score(texts):
        return [record["probability"] for record in teacher.predict(texts, False, args.batch)]

    return write, score


def ask(text, temperature, seed, args):
    """What a server with OpenAI's chat completions says to a text below the question. What may pass
    is tried again: 429, 5xx, a connection that fails or is slow, a malformed reply. ValueError."""
    key = os.environ.get(args.key_env or "", "").strip()
    half = 2 * args.max_prompt  # characters, some four a token: the middle of a long text is cut
    text = f"{text[:half]} ... {text[-half:]}" if len(text) > 2 * half else text
    messages = [{"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{args.question}\n\n{text}"}]
    body = {"model": args.teacher, "messages": messages, "max_tokens": args.max_answer,
            "temperature": temperature, "top_p": args.top_p, "seed": seed}
    request = Request(args.endpoint.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
                      {"Content-Type": "application/json"})
    if key:  # unredirected: a redirect must not hand it to another host
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(args.retries + 1):
        wait = 2**attempt
        try:
            with urlopen(request, timeout=args.timeout) as reply:
                said = json.loads(reply.read())["choices"][0]["message"]["content"] or ""
            return without_thinking(said).replace(key or "\0", "[key]")
        except HTTPError as error:
            problem = f"HTTP {error.code} "
            with suppress(OSError, HTTPException):
                problem += error.read(500).decode(errors="replace")
            if error.code < 500 and error.code != 429:
                break  # such as a wrong model name
            after = error.headers.get("Retry-After", "")
            wait = min(int(after), 60) if after.isdecimal() else wait
        except (OSError, HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            problem = "no chat completion in the reply"
        if attempt < args.retries:
            time.sleep(wait)
    problem = " ".join(problem.replace(key or "\0", "[key]").split())
    raise ValueError(printable(f"{args.endpoint}, model {args.teacher}: {problem}"))


def server_teacher(args):
    """The same from a server. It can only state a label: the score is 0 or 1, or .5 for neither."""
    form = '{{}}\n\nAnswer with one word, "{}" or "{}".'.format(*args.labels)

    def write(texts, seeds):
        return [ask(text, args.temperature, seed, args)
                for text, seed in zip(texts, seeds, strict=True)]

    def score(texts):
        replies = [ask(form.format(text), 0, args.seed, args) for text in texts]
        stated = [stated_label(reply, args.labels)[0] for reply in replies]
        return [0.5 if label is None else float(label) for label in stated]

    return write, score


def explain_batch(rows, write, score, args):
    """Rows -> rows with an explanation, where one of --tries samples passes every check, and with
    explanation_source. The last check is a reader who sees the question and the explanation only
    and must find the label. A row that has an explanation stays as it is."""
    rows = [dict(row) for row in rows]
    asked = [row for row in rows if "explanation" not in row]
    for row, p in zip(asked, score([row["text"] for row in asked]), strict=True):
        row["explanation_source"] = {"teacher": args.teacher, "arguments": args.fingerprint,
                                     "zero_shot": round(p, 4), "tries": 0, "checks": []}
    for attempt in range(args.tries):
        if not (asked := [row for row in asked if "explanation" not in row]):
            break
        # The draws depend on seed, row and try, not on batch or resuming. Servers take 31 bits
        keys = [f"{args.seed} {attempt} {row['id']}".encode() for row in asked]
        seeds = [int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1 for key in keys]
        texts = write([f"{row['text']}\n\n{INSTRUCTION.format(args.labels[row['label']])}"
                       for row in asked], seeds)
        passing = []
        for row, text in zip(asked, texts, strict=True):
            stated, rest = stated_label(text, args.labels)
            if stated == row["label"]:  # "Yes. " is put there in training
                text = rest[:1].upper() + rest[1:]
            failed, source = faults(text, row, args), row["explanation_source"]
            source["checks"].append(failed[0] if failed else "reader")
            source["tries"] = attempt + 1
            passing += [] if failed else [(row, text)]
        for (row, text), p in zip(passing, score([text for _, text in passing]), strict=True):
            if (p - 0.5) * (2 * row["label"] - 1) > 0:
                row["explanation"], row["explanation_source"]["checks"][-1] = text, "passed"
    return rows


def resume(args, rows):
    """The rows that --out has, after a half-written last line is cut off. ValueError, and nothing
    is touched, where it was begun with other arguments or rows."""
    if not args.out.exists():
        return []
    content, done = args.out.read_bytes(), []
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        row = parse_row(line, number, labels=True)
        given = rows[number - 1] if number <= len(rows) else {"id": None}
        source = row.get("explanation_source")
        began = source.get("arguments") if isinstance(source, dict) else None
        if row["id"] != given["id"] or not ("explanation" in given or began == args.fingerprint):
            raise ValueError(f"{args.out}:{number}: written with other arguments or for other "
                             "rows; give another --out")
        done.append(row)
    os.truncate(args.out, len(whole))
    return done


def report(rows, labels):
    """Prints by class what came of rows without explanation, and how good the teacher alone is."""
    def counts(values):
        return ", ".join(f"{name}: {n}" for name, n in sorted(Counter(values).items())) or "none"

    shares, zero_shot = [], [row["explanation_source"]["zero_shot"] for row in rows]
    for label, word in enumerate(labels):
        mine = [row for row in rows if row["label"] == label]
        kept = [row for row in mine if "explanation" in row]
        sources = [row["explanation_source"] for row in mine]
        lengths = [len(row["explanation"].split()) for row in kept] or [0]
        against = sum(source["zero_shot"] < 0.5 if label else source["zero_shot"] > 0.5
                      for source in sources)
        shares.append(len(kept) / max(1, len(mine)))
        print(f"{word}: {len(kept)} of {len(mine)} rows explained ({shares[label]:.0%})\n"
              f"  samples   {counts(check for source in sources for check in source['checks'])}\n"
              f"  by try    {counts(row['explanation_source']['tries'] for row in kept)}\n"
              f"  words     {min(lengths)} to {max(lengths)}, median {np.median(lengths):.0f}\n"
              f"  teacher   would label {against} of the rows otherwise")
    if len({row["label"] for row in rows}) == 2:
        y = [row["label"] for row in rows]
        print(f"teacher's AUROC from the text alone: {auroc(y, zero_shot):.3f}")
        if abs(shares[1] - shares[0]) > 0.1:
            print("warning: the text will be learned from one class more than from the other")


def explain(args):
    """Rows with labels -> the same rows with explanations, appended to --out in their order."""
    key = os.environ.get(args.key_env or "", "").strip()
    wrong = [text for text, bad in (
        ("--endpoint needs --teacher, the model's name there", args.endpoint and not args.teacher),
        ("--endpoint is no http:// or https:// address without user and query",
         args.endpoint and not re.fullmatch(r"https?://[^@?#\s]+", args.endpoint)),
        ("--key-env names no variable that holds a key",
         args.key_env and not (key and key.isascii() and key.isprintable())),
        ("--tries, --batch, --concurrency and --words start at 1",
         min(args.tries, args.batch, args.concurrency, *args.words) < 1),
        ("--temperature starts at 0, --timeout and --top-p above it, --top-p ends at 1",
         not (args.temperature >= 0 < args.timeout and 0 < args.top_p <= 1)),
        ("--labels are not two words", len({word.strip().lower() for word in args.labels}) < 2),
        (f"--out {args.out}: no such folder", not args.out.parent.is_dir()),
    ) if bad]
    if wrong:
        raise ValueError("; ".join(wrong))
    rows = read_rows(args.data)
    args.teacher = args.teacher or args.model.resolve().name
    # Whatever changes an explanation; no key, and not where the files are or how fast it goes
    free = "data out model key_env batch concurrency timeout retries".split()
    known = {name: value for name, value in vars(args).items() if name not in free}
    known |= {"model": args.model and base_fingerprint(args.model), "instruction": INSTRUCTION,
              "data": hashlib.sha256(args.data.read_bytes()).hexdigest()}
    args.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    done, size = resume(args, rows), 1 if args.endpoint else args.batch
    write, score = (server_teacher if args.endpoint else local_teacher)(args)

    def work(batch):
        try:
            return explain_batch(batch, write, score, args)
        except ValueError as error:
            raise ValueError(f"at row {batch[0]['id']!r}: {error}") from None

    # Batches of the whole file: a local model's last digits depend on batch mates
    batches = [rows[i : i + size] for i in range(len(done) // size * size, len(rows), size)]
    with (ThreadPool(args.concurrency) as pool, open(args.out, "ab") as file,
          tqdm(total=len(rows), initial=len(done), desc="explain", unit="row") as bar):
        for batch in (pool.imap if args.endpoint else map)(work, batches):
            batch = batch[len(done) % size :]  # what a stop has left of the first
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in batch]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            done += batch
            bar.update(len(batch))
    asked = [new for row, new in zip(rows, done, strict=True) if "explanation" not in row]
    report(asked, args.labels)


def add_arguments(parser):
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--model", type=Path, help="the teacher: a Hugging Face folder")
    teacher.add_argument("--endpoint", help="or a server, OpenAI's protocol: http://host:port/v1")
    add = parser.add_argument
    add("--data", required=True, type=Path, help="JSON Lines rows with labels")
    add("--out", required=True, type=Path, help="the rows explained; goes on where it stopped")
    add("--teacher", help="the model's name at the endpoint")
    add("--key-env", help="environment variable that holds the endpoint's key")
    add("--concurrency", type=int, default=4, help="requests at a time")
    add("--timeout", type=float, default=120, help="seconds that a server may be silent")
    add("--retries", type=int, default=5, help="of a request, after 1, 2, 4, ... seconds")
    add("--tries", type=int, default=4, help="samples a row")
    add("--temperature", type=float, default=0.7, help="of the samples")
    add("--top-p", type=float, default=0.9, help="draw from this share of the mass")
    add("--seed", type=int, default=0, help="of the draws")
    add("--grounded", type=float, default=0.5, help="least share of content words from the text")
    add("--words", type=int, nargs=2, default=[5, 80], metavar=("LOW", "HIGH"), help="length")
    add("--batch", type=int, default=16, help="rows at a time with --model")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add_prompt_arguments(parser)
