"""The state of a stopped training: everything that is needed to continue exactly.

The order of the rows and the initial values follow from the seed, and nothing else is random. So
the weights, AdamW's moments and the number of the step are the whole state. It is one file, so that
a crash cannot leave it half old and half new.
"""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plumbing.files import write_atomically, write_tensors

STATE = Path("resume") / "state.safetensors"  # in the run folder

# What may lie elsewhere when a run is resumed: data_sha256 and the like in the configuration tell
# whether the content is the same
PLACES = ("data", "valid", "model")


def save_state(folder, trained, optimizer, state, best):
    """Saves weights, moments and `state`: {"step", "config", "tokens", "seconds", "best_bce", ...}.

    trained {name: parameter}; best {name: tensor}, what is kept for the end.
    """
    tensors = {}
    for name, tensor in best.items():
        tensors["best." + name] = tensor
    for name, parameter in trained.items():
        tensors["weight." + name] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():  # step, exp_avg, exp_avg_sq
            tensors[f"{key}.{name}"] = value

    text = json.dumps(state)
    (folder / STATE).parent.mkdir(exist_ok=True)
    write_tensors(folder / STATE, tensors, {"state": text, "sha256": digest_of(text, tensors)})


def read_state(folder):
    """(state, tensors) as saved, with the keys of this version.

    ValueError where there is none, or a damaged one.
    """
    path = folder / STATE
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        if metadata["sha256"] != digest_of(metadata["state"], tensors):
            raise ValueError("it is damaged")
        state = json.loads(metadata["state"])
        name_hashes_by_role(state["config"])
        state["config"].setdefault("head_start", "label-words")  # once the only start there was
        return state, tensors
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: nothing to resume from ({error})") from None


def name_hashes_by_role(config):
    """Earlier versions called a file's hash "sha256 of PATH"; it becomes data_sha256 and the like.

    config: the configuration of a run, which is changed.
    """
    for name in ("data", "valid"):
        old_key = f"sha256 of {config.get(name)}"
        if old_key in config:
            config[f"{name}_sha256"] = config[old_key]
    for key in list(config):
        if key.startswith("sha256 of "):
            del config[key]


def restore(folder, trained, optimizer, config, writes=True):
    """Puts the saved tensors back -> (state, best), and cuts log.jsonl back to the saved step.

    writes: False where another process does the latter.
    ValueError when flags, data, base model or number of ranks are not what they were. Where data
    and base model lie is not compared.
    """
    state, tensors = read_state(folder)
    compare_configs(folder, state["config"], config)
    for name in PLACES:
        state["config"][name] = config[name]
    try:
        for name, parameter in trained.items():
            parameter.data.copy_(tensors["weight." + name])
            if "step." + name in tensors:
                optimizer.state[parameter] = {
                    "step": tensors["step." + name],
                    "exp_avg": tensors["exp_avg." + name].to(parameter.device),
                    "exp_avg_sq": tensors["exp_avg_sq." + name].to(parameter.device),
                }

        kept_lines = []
        for line in (folder / "log.jsonl").read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and json.loads(line).get("step", 0) <= state["step"]:
                kept_lines.append(line)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: {STATE} or log.jsonl does not fit: {error!r}") from None
    if writes:
        write_atomically(folder / "log.jsonl", b"".join(kept_lines))

    best = {}
    for name, tensor in tensors.items():
        if name.startswith("best."):
            best[name.removeprefix("best.")] = tensor
    return state, best


def compare_configs(folder, before, now):
    """ValueError that names what has changed; a warning for what changes the last bits only."""
    changes = []
    for name in [*now, *(before.keys() - now.keys())]:
        if name in PLACES or before.get(name) == now.get(name):
            continue
        change = f"{name} was {before.get(name)}, is {now.get(name)}"
        if name in ("versions", "threads"):
            print(f"warning: {change}: the result may differ in the last bits")
        else:
            changes.append(change)
    if changes:
        raise ValueError(f"--resume {folder}: {'; '.join(changes)}. A stopped run continues as it "
                         f"began; once it is finished, {how_to_train_further(folder)}")


def how_to_train_further(folder):
    """The part of a sentence that says what to do instead of resuming a run with other flags."""
    return (f"--init-adapter {folder} --out OTHER trains further from its weights, with new flags "
            "and rows (give the same --question)")


def digest_of(text, tensors):
    """The SHA-256 of the state's JSON and of every tensor: it tells a damaged save."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().data)
    return digest.hexdigest()
