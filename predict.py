"""Predictions of a trained run: a probability, a decision and an explanation for each text.

    python predict.py --run runs/x --text "..."                             # one text, streamed
    python predict.py --run runs/x --data new.jsonl --out predictions.jsonl # a record a row
    torchrun --nproc_per_node 8 -- predict.py --run runs/x --data ...       # shared by 8 GPUs

Only `text` is needed in a row. A stopped command continues when it is given again.
"""

import argparse
import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from clsgen import choose_token
from data import encode_rows, read_rows
from plumbing.files import continue_job, sha256_of, write_atomically
from plumbing.ranks import Ranks
from plumbing.script import Help, dtype_name, printable, refuse, run_main, versions
from run import load_run


def main(argv=None):
    args = parse(argv)
    ranks = Ranks(args.device)  # one process, or one of several that torchrun has started
    rows = []
    if args.data is not None:
        rows = read_rows(args.data, labels=False)  # before the model loads: a bad file says so now
    run = load_run(args.run, args.model, args.dtype, args.device)
    ranks.connect(run.device)
    if args.text is not None:
        predict_text(run, args)
    else:
        predict_file(run, rows, args, ranks)
    ranks.leave()


def predict_text(run, args):
    """Prints the probability of one text at once, and then the explanation as it is written."""
    explain = not args.no_explain
    examples = encode_rows([{"id": 1, "text": args.text}], run.prompts)
    reading = run.read(examples, explain)
    (record,) = run.records(examples, reading)
    yes = printable(run.prompts.word(1))
    decision = printable(run.prompts.word(record["label"]))
    print(f"probability of {yes}: {record['probability']:.3f}  (decision: {decision}, threshold "
          f"{record['threshold']:.3f}; {record['tokens_cut']} tokens of the text cut)")

    if explain:
        decisions = [record["label"]] if args.decide == "head" else []
        choose = token_chooser(args)
        ids = []
        text = ""
        shown = 0  # characters
        for tokens in run.write(reading, choose, decisions):
            ids += tokens.tolist()
            text = printable(run.prompts.decode(ids))
            if not text.endswith("\ufffd"):  # half of a character: wait for its other bytes
                print(text[shown:], end="", flush=True)
                shown = len(text)
        print(text[shown:], end="")
    print()


def predict_file(run, rows, args, ranks):
    """Writes a record for each row to --out. The ranks share the chunks, and rank 0 writes."""
    chunk_size = 8 * args.batch
    part = args.out.with_name(args.out.name + ".part")
    about = {
        "run": run.name,
        "data": sha256_of(args.data),
        "no_explain": args.no_explain,
        "decide": args.decide,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "draws": "by hash",  # earlier versions drew others from the same seed
        "batch": args.batch,
        "chunk_size": chunk_size,
        "dtype": dtype_name(run.llama.norm.weight.dtype),
        "device": run.device.type,
        "versions": versions(),
    }

    def predict_chunk(start):
        # the draws of a chunk are its own, so that they are the same wherever a job was stopped
        choose = token_chooser(args, start)
        chunk = rows[start : start + chunk_size]
        return run.predict(chunk, not args.no_explain, args.batch, args.decide, choose)

    if ranks.rank > 0:
        for _ in ranks.share(predict_chunk):
            pass
        return

    starts = range(0, len(rows), chunk_size)
    lines = []
    with tqdm(total=len(rows), unit="row") as bar:
        results = continue_job(part, about, starts, predict_chunk, ranks.share, args.overwrite)
        for start, records in zip(starts, results, strict=True):
            check_ids(records, rows[start : start + chunk_size], part)
            for record in records:
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            bar.update(len(records))

    write_atomically(args.out, "".join(lines))
    part.unlink()
    print(f"{len(rows)} predictions in {args.out}")


def check_ids(records, rows, part):
    """ValueError if records that were kept in the file `part` are not those of the rows."""
    try:
        ids = [record["id"] for record in records]
    except (TypeError, KeyError):
        ids = None
    if ids != [row["id"] for row in rows]:
        raise ValueError(f"{part}: damaged; delete it to start anew")


def token_chooser(args, start=0):
    """clsgen.choose_token with the flags of this command, and with the draws of its chunk.

    start: the first row of the chunk. A hash of both numbers is the seed: their sum would give the
    rows from 128 on with --seed 1 the draws that the first rows have with --seed 129.
    """
    digest = hashlib.sha256(f"{args.seed} {start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return partial(choose_token, temperature=args.temperature, top_p=args.top_p,
                   generator=generator)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--run", required=True, help="a run folder of train.py, or a merged folder of export.py")
    add("--text", help="one text: prints its probability and streams the explanation")
    add("--data", type=Path, help="JSON Lines rows with `text`")
    add("--out", type=Path, help="predictions of --data, JSON Lines")
    add("--overwrite", action="store_true", help="replace the predictions in --out")

    add = parser.add_argument_group("the explanation").add_argument
    add("--no-explain", action="store_true", help="probabilities only")
    add("--decide", choices=["text", "head"], default="text",
        help="text: the answer states a label of its own; head: it opens with the run's decision")
    add("--temperature", type=float, default=0.0, help="of the draws; 0: the likeliest token")
    add("--top-p", type=float, default=1.0, help="draw from this share of the mass")
    add("--seed", type=int, default=0, help="of the draws")

    add = parser.add_argument_group("model and machine").add_argument
    add("--model", help="the base model's folder, if it has moved")
    add("--batch", type=int, default=16, help="rows at a time")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the run's")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)

    problems = []
    if (args.text is None) == (args.data is None):
        problems.append("give one of --text and --data")
    if args.text is not None and not args.text.strip():
        problems.append("--text is blank")
    if args.data is not None and args.out is None:
        problems.append("--out is missing")
    if args.text is not None and args.out is not None:
        problems.append("--out is for --data; what --text gives is printed")
    if args.out is not None:
        if args.out.exists() and not args.overwrite:
            problems.append(f"{args.out} exists; give another --out or --overwrite")
        if not args.out.parent.is_dir():
            problems.append(f"--out {args.out}: no such folder")
    if args.batch < 1:
        problems.append(f"--batch is {args.batch}, expected 1 or more")
    if not args.temperature >= 0:
        problems.append(f"--temperature is {args.temperature}, expected 0 or more")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top-p is {args.top_p}, expected a share above 0, up to 1")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_main(main, when_stopped="stopped; the same command continues --data")
