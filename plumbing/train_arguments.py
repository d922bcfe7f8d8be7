"""The flags of train.py, which of them cannot be, and the configuration that they make."""

import argparse
import math
from pathlib import Path

import torch

from clsgen import TARGETS
from plumbing.adapter import read_adapter_config
from plumbing.checkpoint import DEFAULT_MODEL, base_fingerprint
from plumbing.files import sha256_of
from plumbing.resume import PLACES, STATE, how_to_train_further, read_state
from plumbing.script import Help, dtype_name, refuse, versions
from prompts import add_prompt_arguments


def parse(argv=None):
    """The flags of train.py. With --resume, those that the run had."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        return resumed(args, parser, argv)

    if args.data is None:
        raise ValueError("--data is missing (or --resume)")
    if args.init_adapter:
        take_over_adapter(args, parser)
    if args.out is None:
        args.out = Path("runs") / args.data.stem
    # The rule by which validation rows are split off from --data
    args.split = None if args.valid else "by the rows of groups"
    return args


def resumed(args, parser, argv):
    """The flags of a stopped run, for those of --resume."""
    end_if_finished(args, parser)
    state, _ = read_state(args.resume)
    saved = {name: state["config"][name] for name in vars(args) if name in state["config"]}
    # They become the defaults, so that a flag given now wins; `restore` refuses if it differs
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.out = args.resume
    args.split = state["config"].get("split")  # None, too, if it was stopped before there was one
    check_places(args)
    return args


def make_parser():
    """All flags, in groups."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data ROWS --question TEXT [--model FOLDER] [other flags]\n"
              "       %(prog)s --resume RUN",
        description="Joint training: LoRA and a score head on one Llama.", formatter_class=Help)
    parser.add_argument("--data", type=Path, help="training rows, JSON Lines")
    parser.add_argument("--model", default=DEFAULT_MODEL,
                        help="Hugging Face folder of the base model")
    add_prompt_arguments(parser)  # --question, and a group of others

    add = parser.add_argument_group("validation rows").add_argument
    add("--valid", type=Path, help="validation rows, JSON Lines")
    add("--valid-fraction", type=float, default=0.1, help="without --valid: this share of --data")
    add("--valid-rows", type=int, default=500, help="validate on at most this many rows")
    add("--allow-contradictions", action="store_true",
        help="train on explanations that state the other label, too")

    add = parser.add_argument_group("the run folder").add_argument
    add("--out", type=Path, help="run folder (default: runs/ and the name of --data)")
    add("--overwrite", action="store_true", help="replace the run in --out, from the first step on")
    add("--resume", type=Path, metavar="RUN", help="continue this run with the flags it had; "
        "--data, --valid and --model name the new places of what was moved")
    add("--keep-best", action="store_true", help="keep the step of lowest validation BCE")
    add("--valid-every", type=int, help="validate every so many steps (default: each epoch)")
    add("--save-every", type=int, default=50, help="save every so many steps; validations save too")

    add = parser.add_argument_group("the model").add_argument
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the base; auto: bfloat16 if the processor multiplies it, else float32")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--alpha", type=float, default=32.0, help="LoRA's product is scaled by alpha / rank")
    add("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="PROJ",
        help="projections that LoRA wraps")
    add("--init-adapter", help="start from a run, or from a LoRA adapter of peft: with its rank, "
        "alpha, targets")
    add("--head-start", default="label-words", choices=["label-words", "random"],
        help="initial score head: lm_head's row for the word of class 1 minus that of class 0")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")

    add = parser.add_argument_group("loss and steps").add_argument
    add("--cls-weight", type=float, default=1.0, help="of the score head's BCE")
    add("--lm-weight", type=float, default=1.0, help="of the explanations' cross-entropy")
    add("--label-loss", choices=["vocabulary", "words"], help="with --cls-weight 0: one more term, "
        "the cross-entropy of the label's token over all tokens, or over the two label words")
    add("--epochs", type=float, default=3.0, help="passes over the training rows")
    add("--batch", type=int, default=16, help="rows of one optimizer step")
    add("--micro-batch", type=int, default=4, help="rows of one forward pass")
    add("--lr", type=float, default=1e-3, help="peak learning rate of LoRA")
    add("--head-lr", type=float, default=2e-4, help="peak learning rate of the score head")
    add("--warmup", type=float, default=0.05, help="share of the steps; then linear decay to zero")
    add("--clip", type=float, default=1.0, help="gradient norm, of LoRA and of the head")
    add("--seed", type=int, default=0, help="of initial values, order and validation split")

    return parser


def end_if_finished(args, parser):
    """Ends a script that is to resume a finished run: there is nothing left to do.

    ValueError if flags ask for something else than what the run has done.
    """
    if not (args.resume / "clsgen.json").exists():
        return
    sentence = f"{args.resume} is finished; {how_to_train_further(args.resume)}"
    if not (args.resume / "adapter_model.safetensors").exists():
        raise ValueError(f"{args.resume} is a merged model, which has no training to resume; "
                         f"--model {args.resume} trains further on it")
    if args != parser.parse_args(["--resume", str(args.resume)]):
        raise ValueError(sentence)
    print(sentence)
    parser.exit()


def check_places(args):
    """ValueError that names the flag for each file of a stopped run that is not there any more."""
    problems = []
    for name in PLACES:
        place = getattr(args, name)
        if place is not None and not Path(place).exists():
            problems.append(f"{place} is not there any more; --{name} names its new place")
    refuse(problems)


def loss_weights(args):
    """The weight of each term of clsgen.joint_loss. A term that is not here has weight 1."""
    return {"bce": args.cls_weight, "lm": args.lm_weight}


def trains_head(args):
    """Whether the score head trains. Otherwise every term that reads z must have weight 0."""
    return args.cls_weight > 0


def take_over_adapter(args, parser):
    """Sets rank, alpha and targets to those of --init-adapter.

    ValueError for a flag that says something else, unless it says the default.
    """
    args.targets = [name for name in TARGETS if name in args.targets]
    for name, value in read_adapter_config(args.init_adapter).items():
        given = getattr(args, name)
        if given not in (parser.get_default(name), value):
            raise ValueError(f"--{name} {given}: {args.init_adapter} has {value}")
        setattr(args, name, value)


def check_arguments(args):
    """ValueError that names all flags that cannot be, at once."""
    problems = []

    def check(fits, name, expected):
        if not fits:
            value = getattr(args, name)
            problems.append(f"--{name.replace('_', '-')} is {value}, expected {expected}")

    for name in ("rank", "batch", "micro_batch", "valid_rows", "max_prompt", "max_answer",
                 "save_every"):
        check(getattr(args, name) >= 1, name, "1 or more")
    for name in ("seed", "cls_weight", "lm_weight"):
        check(getattr(args, name) >= 0, name, "0 or more")
    for name in ("alpha", "epochs", "lr", "head_lr", "clip"):
        check(0 < getattr(args, name) < math.inf, name, "a number above 0")
    check(0 <= args.warmup <= 1, "warmup", "a share of the steps, from 0 to 1")
    check(0 < args.valid_fraction < 1, "valid_fraction", "a share of the rows, between 0 and 1")
    check(args.valid_every is None or args.valid_every >= 1, "valid_every", "1 or more")

    if not any(loss_weights(args).values()):
        problems.append("--cls-weight and --lm-weight are both 0: nothing would train")
    if args.label_loss and trains_head(args):
        problems.append("--label-loss is for --cls-weight 0: next to the score head's BCE, "
                        "the label would count twice")
    if args.keep_best and not trains_head(args):
        problems.append("--keep-best goes by the BCE, which --cls-weight 0 does not train")

    if not args.overwrite and not args.resume:
        if (args.out / "clsgen.json").exists():
            problems.append(f"{args.out} has a run already; give another --out or --overwrite")
        elif (args.out / STATE).exists():
            problems.append(f"{args.out} has a stopped run; "
                            f"give --resume {args.out} or --overwrite")
        elif (args.out / "log.jsonl").exists():
            problems.append(f"{args.out} has a training that has saved nothing so far, and may be "
                            "running; give another --out, or --overwrite if it is not")
    refuse(problems)


def configuration(args, prompts, steps, dtype, device, ranks):
    """Everything that decides the result, for the log and for --resume, which compares it."""
    config = {}
    for name, value in vars(args).items():
        if name not in ("out", "overwrite", "resume", "allow_contradictions"):
            config[name] = str(value) if isinstance(value, Path) else value
    config.update({
        "device": device.type,
        "dtype": dtype_name(dtype),
        "steps": steps,
        "format": prompts.format,
        "ranks": ranks.count,
        "threads": torch.get_num_threads(),
        "base_sha256": base_fingerprint(args.model),
        "versions": versions(),
    })
    for name in ("data", "valid"):
        path = getattr(args, name)
        if path:
            config[f"{name}_sha256"] = sha256_of(path)
    return config
