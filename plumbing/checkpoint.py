"""A Hugging Face folder to a Llama. What is wrong with it is refused here, by name.

    llama = load_llama("models/smollm2-135m")      # config.json and *.safetensors
    logits = llama.logits(llama(input_ids))         # (B, T) -> (B, T, D) -> (B, T, V)

Nothing on this path can run code: the files are JSON and safetensors.
"""

import hashlib
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model import ACTIVATIONS, FAMILIES, STATED, Llama, LlamaConfig
from plumbing.files import read_json
from plumbing.script import warn

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
DEFAULT_MODEL = str(ROOT / "models" / "smollm2-135m")  # of every script, called from anywhere

# --- config.json ----------------------------------------------------------------------------------
# Keys that would change the computation, with the one value of each that is computed here
FIXED = {
    "mlp_bias": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "bias": False,  # these three are those of InternLM3 and IQuestCoder
    "qkv_bias": False,
    "clip_qkv": None,
    "mscale": None,  # these three are YaRN's, as DeepSeek and GPT-OSS have it
    "mscale_all_dim": None,
    "truncate": True,
    "transformers_weights": None,  # would name another file of weights
}
# Keys that are read below, and keys that change nothing here
USED = set(
    "model_type hidden_act tie_word_embeddings attention_bias sliding_window use_sliding_window"
    " layer_types rms_norm_eps rope_theta rope_scaling rope_parameters vocab_size hidden_size"
    " intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " max_position_embeddings max_sequence_length no_rope_layers embedding_multiplier"
    " residual_multiplier attention_multiplier logits_scaling".split()
)
HARMLESS = set(
    # names, versions, and how the model is to be stored or run
    "architectures _name_or_path name_or_path auto_map dtype torch_dtype transformers_version"
    " use_cache attn_implementation _attn_implementation _attn_implementation_autoset"
    " is_llama_config transformers.js_config unsloth_version unsloth_fixed tokenizer_class"
    " model_max_length pretraining_tp use_bfloat16 torchscript"
    # what the tensors or other keys say too, or what matters for images alone
    " attention_out_bias max_window_layers no_rope_layer_interval use_mrope"
    # of training it
    " initializer_range attention_dropout residual_dropout hidden_dropout attn_pdrop embd_pdrop"
    " resid_pdrop gradient_checkpointing finetuned"
    # of other tasks and outputs
    " id2label label2id num_labels problem_type classifier_dropout finetuning_task"
    " task_specific_params output_attentions output_hidden_states return_dict"
    # tokens, which `read_eos_ids` reads, and defaults of generation
    " bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id do_sample temperature top_k"
    " top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids"
    " suppress_tokens num_beams early_stopping max_length min_length max_new_tokens"
    " num_return_sequences".split()
)
# What each rope_type has to be told
ROPE_NUMBERS = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
             "attention_factor"),
}
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
TOO_LARGE = 2**24  # for a size: below it, no product of two sizes overflows


def read_config(raw, name="config.json"):
    """The content of a config.json, a dict, as a LlamaConfig.

    Every key is used, known to change nothing, or refused by name (ValueError). A key that is
    unknown gives one warning line.
    """

    def expect(fits, key, value, expected):
        if not fits:
            found = "missing" if value is None and key not in raw else repr(value)
            if len(found) > 80:
                found = found[:80] + " ..."
            raise ValueError(f"{name}: {key} is {found}, expected {expected}")

    def number(key, source=raw):
        value = source.get(key)
        is_number = type(value) in (int, float) and 0 < value < math.inf
        expect(is_number, key, value, "a number above 0")
        return value

    def expect_size(key, value):
        is_size = type(value) is int and 0 < value < TOO_LARGE
        expect(is_size, key, value, "a whole number from 1 to 2^24 - 1")

    def size(key, default=None):
        value = raw.get(key, default)
        expect_size(key, value)
        return value

    for key in ("quantization_config", "quantization", "compression_config"):
        if raw.get(key):
            raise ValueError(f"{name}: {key} is set, so the weights are quantised, expected plain "
                             "ones: take the unquantised version of this model")

    # the family, and what is fixed
    model_type = raw.get("model_type")
    known = isinstance(model_type, str) and model_type in FAMILIES
    expect(known, "model_type", model_type, "one of " + ", ".join(FAMILIES))
    family = FAMILIES[model_type]
    variants = {field: value for field, value in family.items() if value != STATED}
    rope = rope_settings(raw)
    expect(isinstance(rope, dict), "rope_scaling", rope, "an object or null")
    for key, fixed in FIXED.items():
        value = {**raw, **rope}.get(key, fixed)
        expect(value == fixed, key, value, repr(fixed))
    activation = raw.get("hidden_act", "silu")
    known = isinstance(activation, str) and activation in ACTIVATIONS
    expect(known, "hidden_act", activation, "one of " + ", ".join(ACTIVATIONS))

    # sizes
    vocab_size = size("vocab_size")
    hidden_size = size("hidden_size")
    intermediate_size = size("intermediate_size")
    layers = size("num_hidden_layers")
    heads = size("num_attention_heads")
    kv_heads = size("num_key_value_heads", default=heads)  # old Llama configs leave it out
    expect(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads}")
    positions = positions_of(raw)
    expect_size("max_position_embeddings", positions)

    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = hidden_size // heads
    fits = type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0
    fits = fits and heads * head_dim < TOO_LARGE
    expect(fits, "head_dim", head_dim, f"an even number below 2^24 / {heads}")

    # rotary positions
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = isinstance(rope_type, str) and rope_type in ROPE_NUMBERS
    expect(known, "rope_type", rope_type, "one of " + ", ".join(ROPE_NUMBERS))
    theta = {"rope_theta": 10000.0, **variants, **raw, **rope}  # the last one wins
    variants["rope_theta"] = number("rope_theta", theta)
    if rope_type == "yarn":  # what is left out is as in the paper
        expect(variants["rope_theta"] > 1, "rope_theta", variants["rope_theta"], "more than 1")
        attention_factor = 0.1 * math.log(max(number("factor", rope), 1)) + 1
        rope = {"beta_fast": 32, "beta_slow": 1, "attention_factor": attention_factor, **rope}
    rope_scaling = None
    if ROPE_NUMBERS[rope_type]:
        rope_scaling = {key: number(key, rope) for key in ROPE_NUMBERS[rope_type]}
    if rope_type == "llama3":
        low = rope_scaling["low_freq_factor"]
        high = rope_scaling["high_freq_factor"]
        expect(low < high, "high_freq_factor", high, f"more than low_freq_factor, {low}")

    # the window: of all layers or of none. Qwen2 stores one that it does not use
    has_window = family.get("sliding_window") == STATED
    layer_types = raw.get("layer_types") or []
    layer_type = "sliding_attention" if has_window else "full_attention"
    same = isinstance(layer_types, list) and all(kind == layer_type for kind in layer_types)
    expect(same, "layer_types", layer_types, f"a list of {layer_type} only")
    uses_window = raw.get("use_sliding_window")
    expect(not uses_window, "use_sliding_window", uses_window, "false")
    if has_window:
        stated = "sliding_window" in raw  # where it is missing, transformers would take 4096
        expect(stated, "sliding_window", None, "a number or null")
        if raw["sliding_window"] is not None:
            variants["sliding_window"] = size("sliding_window")

    # layers without rope, which this list marks with a 0
    if family.get("layers_without_rope") == STATED:
        flags = raw.get("no_rope_layers")
        fits = isinstance(flags, list) and len(flags) >= layers and all(x in (0, 1) for x in flags)
        expect(fits, "no_rope_layers", flags, f"a list of {layers} times 0 or 1")
        variants["layers_without_rope"] = tuple(i for i in range(layers) if not flags[i])

    # Granite's multipliers
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if family.get(key) == STATED:
            variants[key] = number(key)
    if family.get("query_scale") == STATED:  # it takes the place of 1 / sqrt(head_dim)
        variants["query_scale"] = number("attention_multiplier") * head_dim**0.5

    # config.json decides the activation and the biases only where the family's row does not; with
    # tied embeddings it is the other way round
    has_bias = bool(raw.get("attention_bias"))
    variants = {"activation": activation, "qkv_bias": has_bias, "o_bias": has_bias, **variants}
    is_tied = raw.get("tie_word_embeddings", variants.get("tie_word_embeddings"))
    variants["tie_word_embeddings"] = bool(is_tied)

    known = USED | HARMLESS | FIXED.keys()
    known_of_rope = known | {"rope_type", "type", *ROPE_NUMBERS[rope_type]}
    unknown = sorted((raw.keys() - known) | (rope.keys() - known_of_rope))
    if unknown:
        warn(f"{name}: unknown keys: {unknown}")

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=number("rms_norm_eps"),
        rope_type=rope_type,
        rope_scaling=rope_scaling,
        **variants,
    )


def rope_settings(raw):
    """What a config.json says about rotary positions: `rope_scaling`, or `rope_parameters` (new).

    A value of null says nothing.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return rope
    return {key: value for key, value in rope.items() if value is not None}


def positions_of(raw):
    """How many positions a config.json gives its model, or what else it says there.

    LLaMA-1's configs have another name for it. YaRN makes it `factor` times as many: the cards of
    Qwen tell their readers to add YaRN, and to leave the number as it is.
    """
    positions = raw.get("max_position_embeddings", raw.get("max_sequence_length"))
    rope = rope_settings(raw)
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
        numbers = [positions, rope.get("factor"), rope.get("original_max_position_embeddings")]
        if all(type(number) in (int, float) and 0 < number < TOO_LARGE for number in numbers):
            positions, factor, original = numbers
            positions = max(positions, int(factor * original))
    return positions


# --- a folder and its files -----------------------------------------------------------------------
def model_file(folder, *names):
    """The path of the first of these files that a model's folder has.

    ValueError if it has none of them: one sentence that says how to get or to convert a model.
    """
    for name in names:
        path = Path(folder) / name
        if os.path.isfile(path):
            return path
    raise ValueError(f"{folder}: {missing_because(str(folder), names[0])}")


def missing_because(folder, name):
    """What is wrong with a model's folder that lacks the file `name`, and what to do about it."""
    # no folder
    if os.path.isfile(folder):
        if folder.endswith(".gguf"):
            parent, file = os.path.split(folder)
            return "a GGUF file, expected a folder; " + conversion(parent or ".", file)
        return "a file, expected the folder of a model"
    if not os.path.isdir(folder):
        if os.path.abspath(folder) == DEFAULT_MODEL:
            return ("no such folder; `python examples/smollm2.py` makes it, "
                    "or --model names the folder of another model")
        hub_id = folder.rstrip("/")
        if re.fullmatch(r"(?!models/|runs/)\w[\w.-]*(/[\w.-]+)?", hub_id):
            target = f"models/{Path(folder).name}"
            return ("no such folder; if it is a model on the Hugging Face hub, "
                    f"`hf download {hub_id} --local-dir {target}` gets it for --model {target}")
        return "no such folder"

    # another kind of folder
    files = sorted(os.listdir(folder))
    if "config.json" not in files and ADAPTER_CONFIG in files:
        base = read_json(Path(folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
        return f"a run or a LoRA adapter, expected a model; its base is {base!r}"
    if "config.json" not in files:
        for file in files:
            if file.endswith(".gguf"):
                return f"{name} is missing; " + conversion(folder, file)

    # a model in other formats
    if name == "tokenizer.json" and {"tokenizer.model", "vocab.json", "tekken.json"} & set(files):
        return f"{name} is missing; " + conversion(folder)
    if name == "model.safetensors" and any(re.match("pytorch_model.*bin", file) for file in files):
        return f"{name} is missing; " + conversion(folder)
    return f"{name} is missing"


def conversion(folder, gguf=None):
    """The command that converts a folder, or a GGUF file in it, to the files that are read here."""
    source = repr(folder)
    if gguf:
        source += f", gguf_file={gguf!r}"
    target = repr(os.path.join(folder, "converted"))
    return (f"where transformers is installed, this makes {target}: "
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f'[C.from_pretrained({source}).save_pretrained({target}) for C in (M, T)]"')


def checkpoint_files(folder):
    """The safetensors files of a folder, found as transformers finds them.

    model.safetensors if it is there, whatever an index says; else the files that the index names.
    """
    path = model_file(folder, "model.safetensors", INDEX)
    if path.name != INDEX:
        return [path]

    weight_map = read_json(path).get("weight_map")
    names = []
    if isinstance(weight_map, dict):
        names = sorted({str(name) for name in weight_map.values()})
    elsewhere = [name for name in names if Path(name).name != name]
    if not names or elsewhere:
        raise ValueError(f"{path}: expected weight_map to name files in this folder")
    return [model_file(folder, name) for name in names]


def check_no_adapter(folder):
    """ValueError if a model's folder holds an adapter too, which transformers would load on top."""
    if os.path.isfile(Path(folder) / ADAPTER_CONFIG):
        raise ValueError(f"{folder}: it holds a LoRA adapter next to the model; to train without "
                         f"it, move {ADAPTER_CONFIG} away, else merge the two first")


def base_name(folder):
    """How a run remembers its base: relative to the scripts where it lies among them, else whole.

    `find_base` finds it from any working directory.
    """
    path = Path(os.path.abspath(folder))
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return str(path)


def find_base(name):
    """The folder of what `base_name` wrote, or of what earlier versions did: as it was given."""
    if not os.path.isdir(name) and os.path.isdir(ROOT / name):
        return ROOT / name
    return Path(name)


def base_fingerprint(folder):
    """The SHA-256 of config.json, tokenizer.json and the headers of the weight files.

    Not of the weights, which would take minutes: the golden row of a run tells those apart.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update(model_file(folder, name).read_bytes())
    for path in checkpoint_files(folder):
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_size, 10**8)))  # safetensors allows no larger one
    return digest.hexdigest()


def disk_name(name):
    """The name of a Llama's parameter in a checkpoint."""
    if name.startswith("lm_head."):
        return name
    return "model." + name


def compare_tensors(expected, found, where):
    """ValueError that names missing, surplus and mis-shaped tensors. Both are {name: shape}."""
    wrong = []
    for name in sorted(expected.keys() - found.keys()):
        wrong.append(f"missing {name}")
    for name in sorted(found.keys() - expected.keys()):
        wrong.append(f"surplus {name}")
    for name, shape in expected.items():
        if name in found and list(found[name]) != list(shape):
            wrong.append(f"{name} is {list(found[name])}, expected {list(shape)}")

    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{where}: the tensors do not fit: {'; '.join(wrong[:5])}{more}")


# --- loading --------------------------------------------------------------------------------------
def load_llama(folder, dtype=torch.bfloat16, device="cpu"):
    """A Hugging Face folder as a Llama in eval mode. ValueError says what is wrong with it."""
    config_path = model_file(folder, "config.json")
    config = read_config(read_json(config_path), config_path)
    files = checkpoint_files(folder)

    # Tied checkpoints may repeat the embedding as lm_head; old ones store the rotary table
    unused = ["rotary_emb.inv_freq"]
    if config.tie_word_embeddings:
        unused.append("lm_head.weight")
    shapes, file_of = tensors_in(files, tuple(unused))
    if config.num_hidden_layers > len(shapes):  # building a million layers would take for ever
        raise ValueError(
            f"{folder}: {config.num_hidden_layers} layers, but {len(shapes)} tensors")

    with torch.device("meta"):  # shapes only: no memory is taken before the checkpoint fits
        llama = Llama(config)
    expected = {}
    for name, parameter in llama.named_parameters():
        expected[disk_name(name)] = parameter.shape
    compare_tensors(expected, shapes, folder)

    state = {}
    for name, _ in llama.named_parameters():  # one at a time, cast as it is copied
        with safe_open(file_of[disk_name(name)], "pt") as file:
            tensor = file.get_tensor(disk_name(name))
            state[name] = tensor.to(device, dtype, copy=True)
    llama.load_state_dict(state, assign=True)
    return llama.eval()


def tensors_in(files, unused):
    """({name: shape}, {name: file}) of all tensors but those whose names end in one of `unused`."""
    shapes = {}
    file_of = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    if name.endswith(unused):
                        continue
                    tensor = file.get_slice(name)
                    kind = tensor.get_dtype()
                    if kind not in ("F64", "F32", "F16", "BF16"):  # quantised: it needs scales too
                        raise ValueError(f"{path}: {name} is stored as {kind}, expected floats")
                    shapes[name] = tensor.get_shape()
                    file_of[name] = path
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    return shapes, file_of
