"""The files of peft (github.com/huggingface/peft): LoRA and score head under its names and keys."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from clsgen import TARGETS
from plumbing.checkpoint import compare_tensors
from plumbing.files import read_json
from plumbing.packed import is_packed

PREFIX = "base_model.model."  # peft's; after it, its names equal ours
SCORE = "score.weight"  # the head, as transformers and a merged folder call it
# transformers has no sequence classification class for these families
NO_CLASSIFIER = ("granite", "internlm3", "iquestcoder")
HEAD = PREFIX + SCORE

# Keys of adapter_config.json that are used below, or have no effect on a trained adapter
KNOWN = set(
    "r lora_alpha target_modules use_rslora modules_to_save task_type auto_mapping peft_version"
    " base_model_name_or_path revision inference_mode lora_dropout megatron_core qalora_group_size"
    " runtime_config".split()
)
# Other keys must be empty, except these, which may have the values here
PLAIN = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],
}


def adapter_tensors(model):
    """{peft's name: tensor} of a CLSGen's LoRA and head, sharing their memory.

    It opens in peft as SEQ_CLS, or, without the head, as CAUSAL_LM. ValueError for a packed model,
    whose LoRA is gone.
    """
    if is_packed(model.model):
        raise ValueError("this run is packed for predictions: load_run(..., pack=False) gives one "
                         "that can be saved or exported")
    parts = model.parameters_by_part()
    tensors = {}
    for name, parameter in (parts["lora"] | parts["head"]).items():
        tensors[PREFIX + name] = parameter.detach()
    return tensors


def lora_alone(tensors):
    """Those of `adapter_tensors` that are no part of the head."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


def adapter_config(lora, base, task):
    """The content of adapter_config.json. lora: {"rank", "alpha", "targets"}; base: its folder.

    task: "SEQ_CLS" for LoRA and head, where peft computes the score of the last prompt token. A
    read-out that computes something else must not claim it: with "CAUSAL_LM", or None for an
    unknown one, the file describes the LoRA alone.
    """
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": lora["targets"],
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
        "base_model_name_or_path": base,
    }
    if task == "SEQ_CLS":
        config["modules_to_save"] = ["classifier", "score"]
    return config


def read_adapter_config(folder):
    """peft's adapter_config.json -> {"rank", "alpha", "targets"}.

    rslora's alpha / sqrt(rank) becomes the alpha of an alpha / rank. ValueError names a setting
    that makes it more than plain LoRA.
    """
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    for key, value in raw.items():
        allowed = PLAIN.get(key, [None, False, {}, []])
        if key not in KNOWN and value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r}, which is not supported")

    rank = raw.get("r")
    alpha = raw.get("lora_alpha")
    targets = raw.get("target_modules")
    check_lora(rank, alpha, targets, path)

    if raw.get("use_rslora"):
        alpha = alpha * rank**0.5
    else:
        alpha = float(alpha)
    return {"rank": rank, "alpha": alpha, "targets": [name for name in TARGETS if name in targets]}


def check_lora(rank, alpha, targets, where):
    """ValueError if these are no rank, alpha and targets of a LoRA. where: what they come from."""
    if not (type(rank) is int and rank > 0):
        raise ValueError(f"{where}: LoRA's rank is {rank!r}, expected 1 or more")
    if not (type(alpha) in (int, float) and alpha > 0):
        raise ValueError(f"{where}: LoRA's alpha is {alpha!r}, expected a number above 0")
    is_list = isinstance(targets, list) and len(targets) > 0
    if not is_list or not all(name in TARGETS for name in targets):
        raise ValueError(f"{where}: LoRA's target_modules are {targets!r}, expected a list out of "
                         f"{', '.join(TARGETS)}")


def load_adapter(model, path, need_head=True):
    """Copies a file of `adapter_tensors`, or the head of a merged folder, into the model.

    need_head=False: a file without a head leaves the model's as it is. ValueError names what does
    not fit.
    """
    own = adapter_tensors(model)
    try:
        tensors = load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    if SCORE in tensors:  # of a merged folder, which has the head alone
        tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if HEAD not in tensors and not need_head:
        own = lora_alone(own)

    expected = {name: tensor.shape for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    compare_tensors(expected, found, path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
