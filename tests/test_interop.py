"""Published checkpoints in, Hugging Face's tools out: configs, chat templates, peft, merging."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from clsgen import TARGETS
from plumbing.adapter import read_adapter_config
from plumbing.checkpoint import read_config
from plumbing.model_checks import warn_of_template
from plumbing.train_arguments import parse
from prompts import FRAMES, SYSTEM, Prompts, encode, frame_of
from run import load_run
from train import main as train

# --- configs as published -------------------------------------------------------------------------
SHARED = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1,
          "eos_token_id": 2, "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
LLAMA = SHARED | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False,
                  "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
                  "rope_scaling": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
ROPE3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
         "original_max_position_embeddings": 8192}
MISTRAL = SHARED | {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                    "attention_dropout": 0.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN = SHARED | {"attention_dropout": 0.0, "use_sliding_window": False, "rms_norm_eps": 1e-6,
                 "rope_theta": 1000000.0}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
PUBLISHED = {  # name: (config, sizes, what it has to become)
    "Llama-2-7b-chat-hf": (LLAMA, (32000, 4096, 11008, 32, 32, 32, 4096), {"head_dim": 128}),
    "Meta-Llama-3-8B": (LLAMA | {"rope_theta": 500000.0}, (128256, 4096, 14336, 32, 32, 8, 8192),
                        {"rope_theta": 500000.0, "rope_scaling": None}),
    "Llama-3.1-8B-Instruct": (
        LLAMA | {"rope_theta": 500000.0, "rope_scaling": ROPE3, "eos_token_id": [128001, 128009]},
        (128256, 4096, 14336, 32, 32, 8, 131072), {"tie_word_embeddings": False}),
    "Llama-3.2-1B": (
        LLAMA | {"rope_theta": 500000.0, "rope_scaling": ROPE3 | {"factor": 32.0}, "head_dim": 64,
                 "tie_word_embeddings": True}, (128256, 2048, 8192, 16, 32, 8, 131072),
        {"tie_word_embeddings": True, "head_dim": 64}),
    "TinyLlama-1.1B-Chat-v1.0": (LLAMA, (32000, 2048, 5632, 22, 32, 4, 2048), {"head_dim": 64}),
    "SmolLM2-135M-Instruct": (
        LLAMA | {"rope_theta": 100000, "rope_interleaved": False, "is_llama_config": True,
                 "tie_word_embeddings": True, "transformers.js_config": {"dtype": "q4"}},
        (49152, 576, 1536, 30, 9, 3, 8192), {"head_dim": 64, "rope_theta": 100000}),
    "Mistral-7B-v0.1": (MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096},
                        (32000, 4096, 14336, 32, 32, 8, 32768), {"sliding_window": 4096}),
    "Mistral-7B-Instruct-v0.3": (MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None},
                                 (32768, 4096, 14336, 32, 32, 8, 32768), {"sliding_window": None}),
    "Qwen2.5-7B-Instruct": (
        QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                "sliding_window": 131072, "max_window_layers": 28, "tie_word_embeddings": False},
        (152064, 3584, 18944, 28, 28, 4, 32768), {"qkv_bias": True, "sliding_window": None}),
    "Qwen3-8B": (
        QWEN | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
                "attention_bias": False, "max_window_layers": 36, "sliding_window": None,
                "rope_scaling": None, "tie_word_embeddings": False},
        (151936, 4096, 12288, 36, 32, 8, 40960), {"qk_norm": True, "qkv_bias": False}),
    "Qwen2.5-7B-Instruct with YaRN, by unsloth": (
        QWEN | {"model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 28,
                "use_mrope": False, "unsloth_version": "2025.1", "unsloth_fixed": True,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768,
                                 "type": "yarn"}},
        (152064, 3584, 18944, 28, 28, 4, 32768),
        {"rope_type": "yarn", "max_position_embeddings": 131072}),
    "Seed-OSS-36B-Instruct": (
        QWEN | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "head_dim": 128,
                "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
                "residual_dropout": 0.1, "mlp_bias": False, "rope_theta": 10000000.0,
                "rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": False},
        (155136, 5120, 27648, 64, 80, 8, 524288),
        {"qkv_bias": True, "o_bias": False, "head_dim": 128}),
    "SmolLM3-3B": (
        QWEN | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "mlp_bias": False,
                "attention_bias": False, "layer_types": ["full_attention"] * 36,
                "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4,
                "max_window_layers": 28, "pretraining_tp": 2, "rope_scaling": None,
                "rope_theta": 5000000.0, "sliding_window": None},
        (128256, 2048, 11008, 36, 16, 4, 65536),
        {"layers_without_rope": tuple(range(3, 36, 4)), "tie_word_embeddings": True}),
    "granite-3.3-2b-instruct": (
        LLAMA | {"architectures": ["GraniteForCausalLM"], "model_type": "granite",
                 "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
                 "logits_scaling": 8.0, "residual_multiplier": 0.22, "rope_theta": 10000000.0,
                 "tie_word_embeddings": True}, (49159, 2048, 8192, 40, 32, 8, 131072),
        {"query_scale": 0.125, "logits_scaling": 8.0}),
    "internlm3-8b-instruct": (
        SHARED | {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3",
                  "attention_dropout": 0.0, "bias": False, "qkv_bias": False, "head_dim": 128,
                  "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"},
                  "rms_norm_eps": 1e-5, "rope_theta": 50000000, "rope_scaling": {
                      "factor": 6.0, "rope_type": "dynamic"}},
        (128512, 4096, 10240, 48, 32, 2, 32768), {"rope_type": "dynamic", "qkv_bias": False}),
    "IQuest-Coder-V1-40B-Instruct": (
        LLAMA | {"model_type": "iquestcoder", "head_dim": 128, "clip_qkv": None,
                 "use_sliding_window": False, "sliding_window": None, "rope_theta": 500000.0},
        (76800, 5120, 27648, 80, 40, 8, 131072), {"head_dim": 128}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_without_a_warning(name, capsys):
    """Fails if a key of a published config is unknown, or means something else here."""
    raw, sizes, due = PUBLISHED[name]
    config = read_config(raw | dict(zip(SIZES, sizes, strict=True)))
    assert {key: getattr(config, key) for key in due} == due
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changes", [
    {"model_type": "gemma2"}, {"model_type": "phi3"}, {"model_type": "gpt_neox"},
    {"model_type": "mixtral", "num_local_experts": 8}, {"model_type": "qwen2_moe"},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"partial_rotary_factor": 0.5},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}])
def test_other_architectures_are_refused_in_a_sentence_that_says_what_is_supported(changes):
    """Fails if a model that computes otherwise is loaded as a Llama."""
    with pytest.raises(ValueError, match=r"^config.json: .* is .*, expected ") as error:
        read_config(CONFIG | changes)
    assert "\n" not in str(error.value)
    if "model_type" in str(error.value):
        assert "llama, mistral, qwen2, qwen3" in str(error.value)


# --- chat templates -------------------------------------------------------------------------------
# The templates of the published tokenizer files for one system and one user message, and tokenizers
# built as theirs are: Llama-2 prepends a blank to each piece, Mistral v0.3 to a whole input only,
# and Tekken, of Mistral-Nemo and later, to none. Tekken has hundreds of special tokens, and those
# for a system line only from Mistral-Small-2501 on.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{{ '<|im_start|>assistant\n' }}")
LLAMA3 = ("<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
          "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
LLAMA2 = ("<s>[INST] <<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
          "{{ messages[1].content | trim }} [/INST]")
MISTRAL_V1 = "<s> [INST] {{ messages[0].content }}\n\n{{ messages[1].content }} [/INST]"
MISTRAL_V3 = "<s>[INST] {{ messages[0].content }}\n\n{{ messages[1].content }}[/INST]"
MISTRAL_NEMO = ("{{ bos_token }}[INST]{{ messages[0].content }}\n\n{{ messages[1].content }}"
                "[/INST]")
MISTRAL_V7 = ("{{ bos_token }}[SYSTEM_PROMPT] {{ messages[0].content }}[/SYSTEM_PROMPT]"
              "[INST] {{ messages[1].content }}[/INST]")
MISTRAL_SMALL = MISTRAL_V7.replace("] ", "]")
GRANITE = ("{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
           "<|end_of_text|>\n{% endfor %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}")
SEED = ("{% for m in messages %}<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>{% endfor %}"
        "{{ '<seed:bos>assistant\n' }}")
SENTENCE_PIECE = ("<unk>", "<s>", "</s>")
V3_TOKENS = (*SENTENCE_PIECE, "[INST]", "[/INST]")
V7_TOKENS = (*V3_TOKENS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
TEKKEN = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[IMG]", "[PREFIX]", "<SPECIAL_20>")
SEED_TOKENS = ("<seed:bos>", "<seed:pad>", "<seed:eos>", "<seed:think>", "</seed:think>")
TEMPLATES = {  # name: (template, format flag, shape of the tokenizer, added tokens)
    "SmolLM2, Qwen2.5": (CHATML, None, "bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    "Qwen3": (CHATML, None, "bytes", ("<|im_start|>", "<|im_end|>", "<think>", "</think>")),
    "Llama-3": (LLAMA3, None, "bytes", ("<|begin_of_text|>", "<|start_header_id|>",
                                        "<|end_header_id|>", "<|eot_id|>")),
    "Llama-2": (LLAMA2, "llama2", "prepend", SENTENCE_PIECE),
    "Llama-2, converted again": (LLAMA2, "llama2", "metaspace", SENTENCE_PIECE),
    "Mistral-v0.1": (MISTRAL_V1, "mistral-v1", "prepend", SENTENCE_PIECE),
    "Llama-2, always a blank": (LLAMA2, "llama2", "always", SENTENCE_PIECE),
    "Mistral-v0.1, converted again": (MISTRAL_V1, "mistral-v1", "metaspace", SENTENCE_PIECE),
    "Mistral-v0.3": (MISTRAL_V3, None, "metaspace", V3_TOKENS),
    "Mistral-v0.3, as first published": (MISTRAL_V3, None, "prepend", V3_TOKENS),
    "Mistral-v0.3, never a blank": (MISTRAL_V3, None, "never", V3_TOKENS),
    "Mistral-Nemo": (MISTRAL_NEMO, None, "tekken", V3_TOKENS + TEKKEN),
    "Mistral-Nemo, from tekken.json": (MISTRAL_NEMO, None, "tekken", V7_TOKENS + TEKKEN),
    "Mistral-v0.3, with all tokens": (MISTRAL_V3, None, "metaspace", V7_TOKENS),
    "Mistral-Large-2411": (MISTRAL_V7, None, "metaspace", V7_TOKENS),
    "Mistral-Small-2501": (MISTRAL_SMALL, None, "tekken", V7_TOKENS + TEKKEN),
    "Granite-3": (GRANITE, None, "bytes", (
        "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")),
    "Seed-OSS": (SEED, None, "bytes", SEED_TOKENS),
    "Hermes on Llama-3": ("{{ bos_token }}" + CHATML, None, "bytes",
                          ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>")),
    "SmolLM2, its bos_token": ("{# bos_token #}" + CHATML, None, "bytes",
                               ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>")),
}


def build_tokenizer(folder, shape, added):
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if shape == "bytes":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif shape == "tekken":
        words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif shape == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if shape == "metaspace" else shape
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    corpus = [SYSTEM, "Will it rain? [INST] <<SYS>> [/INST] system user assistant \n\n 12 days"] * 9
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *map(chr, range(33, 127)), *"▁\né中"]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet,
                                  special_tokens=[AddedToken(t, normalized=False) for t in added])
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))


def write_template(folder, template, bos):
    config = {"chat_template": template, "bos_token": bos, "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_frame_is_the_models_own_chat_template(name, tmp_path, capsys):
    """Fails if a blank, a newline, a special token or a piece boundary differs from theirs, if a
    start token is left out or doubled, or if there is a warning although nothing differs."""
    from transformers import PreTrainedTokenizerFast

    template, flag, shape, added = TEMPLATES[name]
    build_tokenizer(tmp_path, shape, added)
    bos = next((token for token in added if token in ("<s>", "<|begin_of_text|>")), None)
    if name.startswith("SmolLM2"):
        bos = "<|im_start|>"
    write_template(tmp_path, template, bos)
    file = str(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, chat_template=template, bos_token=bos)
    prompts = Prompts(tmp_path, question="Will it rain?", format=flag)
    warn_of_template(prompts, {name: frame_of(name, prompts.chat) for name in FRAMES})
    assert capsys.readouterr().err == ""
    for text in ("the day was long", "two\n lines\n\n  and 12 blanks", "(é 中", "▁ is no blank"):
        messages = [{"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"Will it rain?\n\n{text}"}]
        due = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompts.prompt(text) == (due, 0), text
        rendered = prompts.rendered()
        whole = rendered["before_text"] + text + rendered["after_text"]
        assert theirs(whole, add_special_tokens=False).input_ids == due


@pytest.mark.parametrize("shape, due", [("tekken", "mistral-v7-tekken"), ("never", "mistral-v7")])
def test_without_a_template_the_tokens_decide(shape, due, tmp_path):
    """Fails if a tokenizer that has [SYSTEM_PROMPT] gets a frame without it where nothing says that
    its model does not use it."""
    build_tokenizer(tmp_path, shape, V7_TOKENS)
    assert Prompts(tmp_path).format == due


# What the docs name as left out: a date (Llama 3.1 to 3.3), metadata (SmolLM3)
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
METADATA = "## Metadata\n\nToday Date: 26 Jul 2024\nReasoning Mode: /think\n\n"


@pytest.mark.parametrize("template, start, left_out", [
    (LLAMA3, "<|end_header_id|>\n\n", DATE), (CHATML, "system\n", METADATA)])
def test_what_a_frame_leaves_out_is_what_the_docs_name(template, start, left_out, tmp_path):
    """Fails if the frame differs from such a template in anything else."""
    from transformers import PreTrainedTokenizerFast

    name = "Llama-3" if template == LLAMA3 else "SmolLM2, Qwen2.5"
    build_tokenizer(tmp_path, "bytes", TEMPLATES[name][3])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    prompts = Prompts(tmp_path, question="Will it rain?")
    messages = [{"role": "system", "content": left_out + SYSTEM},
                {"role": "user", "content": "Will it rain?\n\nthe day"}]
    theirs.chat_template = template
    due = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert due.count(start + left_out) == 1
    ids = theirs.encode(due.replace(left_out, ""), add_special_tokens=False)
    assert prompts.prompt("the day")[0] == ids


@pytest.mark.parametrize("shape, added, template, format, words", [
    ("prepend", SENTENCE_PIECE, LLAMA2, None, "plain does not follow; --format llama2 does"),
    ("prepend", SENTENCE_PIECE, MISTRAL_V1, None, "--format mistral-v1 does"),
    ("prepend", SENTENCE_PIECE, "<|user|>\n{{ messages }}", None, "no other --format follows it"),
    ("prepend", SENTENCE_PIECE, MISTRAL_V1, "llama2", "no <<SYS>>; --format mistral-v1 does"),
    ("bytes", ("<s>", "<|im_start|>", "<|im_end|>"), "{{ bos_token }}" + CHATML, "chatml",
     "begins with <s>; --format chatml-bos does"),
    ("bytes", ("<s>", "<|im_start|>", "<|im_end|>"), "<|User|>{{ x }}", None, "no <|im_start|>"),
    ("prepend", SENTENCE_PIECE, LLAMA2, "plain", None), ("prepend", SENTENCE_PIECE, "", None, None),
])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "list"])
def test_another_chat_template_gives_one_line(shape, added, template, format, words, file, tmp_path,
                                              capsys):
    """Fails if a model with a chat template becomes `plain` in silence, if a frame that its
    template does not have passes, wherever the template stands, or if a wish is complained of."""
    build_tokenizer(tmp_path, shape, added)
    write_template(tmp_path, template, "<s>")
    if file == "list":
        write_template(tmp_path, [{"name": "default", "template": template}], "<s>")
    if file == "chat_template.jinja":
        write_template(tmp_path, CHATML + LLAMA2, "<s>")
        (tmp_path / file).write_text(template)
    flags = argparse.Namespace(model=tmp_path, question="Q?", labels=("no", "yes"), format=format,
                               max_prompt=99, max_answer=9)
    Prompts.from_arguments(flags)
    error = capsys.readouterr().err
    if words is None:
        assert error == ""
    else:
        assert error.count("\n") == 1 and error.startswith("warning: ") and words in error


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_plain_starts_as_transformers_does(template, add_bos, tmp_path):
    """Fails if a base model's prompt opens with the end token that its tokenizer appends, or with
    a start token that transformers does not put there."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    build_tokenizer(tmp_path, "metaspace", SENTENCE_PIECE)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if template:
        tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompts = Prompts(tmp_path, question="Will it rain?", format="plain")
    rendered = prompts.rendered()
    assert rendered["add_special_tokens"]
    due = theirs(rendered["before_text"] + "the day" + rendered["after_text"]).input_ids
    assert prompts.prompt("the day")[0] == [i for i in due if i != 2]
    assert rendered["end_tokens"] == due.count(2)


WORDS = ("sepsisscore", "é9", "<think>", "</tool_call>", "[TOOL]", "{x}", "assistants")


@pytest.mark.parametrize("shape, added", [
    ("bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>")), ("metaspace", V3_TOKENS),
    ("prepend", SENTENCE_PIECE)])
def test_added_words_keep_their_ids_and_markup_stays_text(shape, added, tmp_path):
    """Fails if an added word is split, gets the id of another token because markup is left out, or
    is cut at the wrong place; if <think> or a word of the chat template becomes a token."""
    from transformers import PreTrainedTokenizerFast

    build_tokenizer(tmp_path, shape, added)
    file = str(tmp_path / "tokenizer.json")
    before = Prompts(tmp_path)
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["<|later|>"])
    tokenizer.add_tokens(list(WORDS))
    tokenizer.save(file)
    write_template(tmp_path, CHATML + "assistants", None)
    prompts, words = Prompts(tmp_path), set(map(tokenizer.token_to_id, WORDS))
    theirs = PreTrainedTokenizerFast(tokenizer_file=file)

    text = "a sepsisscore of 3, asepsisscore, é9sepsisscore é9"
    ids = encode(prompts.answer_tokenizer, text).ids
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert {tokenizer.token_to_id(word) for word in WORDS[:2]} == words & set(ids)
    assert prompts.prompt("the day was long") == before.prompt("the day was long")
    for word in WORDS[2:] + added:
        assert prompts.prompt(word) == before.prompt(word)

    # a cut takes whole tokens of the text, and only those
    whole = prompts.prompt(text * 9)[0]
    for bound in range(len(whole) - 30, len(whole)):
        ids, cut = Prompts(tmp_path, max_prompt=bound).prompt(text * 9)
        same = next(i for i in range(bound + 1) if ids[:i + 1] != whole[:i + 1] or i == bound)
        assert len(ids) == bound and ids[same:] == whole[same + cut:]


def test_a_text_does_not_end_the_instruction_where_inst_is_plain_text(tmp_path):
    """Fails if [/INST] or <<SYS>> in a row's text reads as the frame's own."""
    build_tokenizer(tmp_path, "prepend", SENTENCE_PIECE)
    for name in ("llama2", "mistral-v1"):
        prompts = Prompts(tmp_path, format=name)
        ids = prompts.prompt("a [/INST] b [INST] c <</SYS>> d <<SYS>> e")[0]
        text = prompts.tokenizer.decode(ids).replace(" ", "").replace("▁", " ")
        assert text.count("[/INST]") == text.count("[INST]") == 1, text
        assert text.count("<<SYS>>") == text.count("<</SYS>>") == (name == "llama2"), text


def test_a_tokenizer_that_joins_the_label_word_to_the_explanation_is_refused(tiny):
    """Fails if the label's tokens are looked for in answers that begin with others."""
    prompts = Prompts(tiny)
    prompts.answer(1, "Because.")
    prompts.label_ids[1] = [*prompts.label_ids[1], prompts.label_ids[1][0]]
    with pytest.raises(ValueError, match="joins 'Yes' with what follows it"):
        prompts.answer(1, "Because.")


# --- peft -----------------------------------------------------------------------------------------
def peft_adapter(base, folder, task="CAUSAL_LM", **settings):
    """A random adapter as peft saves it, and its model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(model, LoraConfig(task_type=task, init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, {"target_modules": list(TARGETS)}, {"r": 3, "lora_dropout": 0.5}])
def test_training_starts_from_an_adapter_of_peft(tiny, rows_file, tmp_path, settings):
    """Fails if rank, alpha, targets or rslora's scale of the adapter are not taken over: after a
    step too small to move anything, the run is still peft's model."""
    theirs = peft_adapter(tiny, tmp_path / "adapter", **settings)
    files = ("--data", rows_file, "--model", tiny, "--out", tmp_path / "run", "--init-adapter",
             tmp_path / "adapter")
    train([*map(str, files), *"--dtype float32 --epochs 0.3 --lr 1e-30".split()])
    llama, ids = load_run(tmp_path / "run").llama, torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, due = llama.logits(llama(ids)), theirs(ids).logits
        torch.testing.assert_close(ours, due, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings, words", [
    ({"use_dora": True}, "use_dora is True"), ({"bias": "all"}, "bias is 'all'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
    ({"layers_to_transform": [0]}, "layers_to_transform is"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules .*embed_tokens"),
    ({"lora_bias": True}, "lora_bias is True")])
def test_other_variants_are_refused_by_name(tiny, tmp_path, settings, words):
    """Fails if an adapter that computes otherwise is taken for plain LoRA."""
    peft_adapter(tiny, tmp_path, **settings)
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{words}"):
        read_adapter_config(tmp_path)


def test_a_flag_that_contradicts_the_adapter_is_refused(tiny, rows_file, tmp_path):
    """Fails if --rank is silently overruled, or if --targets in another order contradict it."""
    peft_adapter(tiny, tmp_path)
    with pytest.raises(ValueError, match="--rank 8: .* has 4"):
        train(["--data", str(rows_file), "--rank", "8", "--init-adapter", str(tmp_path)])
    targets = read_adapter_config(tmp_path)["targets"]
    flags = ["--data", str(rows_file), "--init-adapter", str(tmp_path), "--targets"]
    assert parse(flags + targets[::-1]).targets == targets  # the order says nothing


@pytest.fixture(scope="module")
def first(tiny, rows_file, tmp_path_factory):
    """A folder in which the README's example run is there: runs/first on models/smollm2-135m."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").mkdir()
    (folder / "models" / "smollm2-135m").symlink_to(tiny)
    flags = ("--model models/smollm2-135m --out runs/first --dtype float32 --max-answer 40 "
             "--epochs 2 --lr 0.02").split()
    subprocess.run([sys.executable, ROOT / "train.py", "--data", rows_file, *flags],
                   cwd=folder, check=True, capture_output=True)
    return folder


def test_train_here_open_and_save_in_peft_open_here(first, tmp_path, monkeypatch):
    """Fails if a tensor's name, the scale or the head does not survive the way through peft."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    monkeypatch.chdir(first)
    model, run = Path("models/smollm2-135m"), Path("runs/first")
    assert json.loads((run / "clsgen.json").read_text())["base"] == str(first / model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")
    PeftModel.from_pretrained(base, run).save_pretrained(tmp_path)
    (tmp_path / "clsgen.json").write_text((run / "clsgen.json").read_text())
    ours, again = (load_run(folder, model) for folder in (run, tmp_path))
    assert ours.golden() == again.golden()
    found = read_adapter_config(tmp_path)
    assert found == {"rank": 16, "alpha": 32.0, "targets": list(TARGETS)}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", "".join(map(Path.read_text, PAGES)), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_snippets_of_readme_and_docs_run_as_they_stand(first, snippet):
    """Fails if a name, a path or an argument in a snippet is not what the code has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", snippet], cwd=first, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformers_loads_a_merged_folder_without_a_word(first, tmp_path):
    """Fails if a tensor is missing or left over, or the config no longer describes the weights."""
    subprocess.run([sys.executable, ROOT / "export.py", "--run", "runs/first", "--out",
                    tmp_path / "merged"], cwd=first, check=True, capture_output=True)
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "merged"], capture_output=True,
                          text=True, check=True)
    assert not re.search("warn|missing|unexpected|newly|not used", done.stderr, re.IGNORECASE)
    assert load_run(tmp_path / "merged").fitted.scorer == "head"
