"""Packed weights give the same numbers, and cannot be trained or saved."""

import weakref

import pytest
import torch
from conftest import write_model
from test_model import VARIANTS

from clsgen import TARGETS, CLSGen, add_lora, base_model
from plumbing.adapter import adapter_tensors
from plumbing.checkpoint import load_llama
from plumbing.packed import is_packed, pack



@pytest.mark.parametrize("name", ["tied", "untied", "qwen2", "smollm3", "granite"])
@torch.no_grad()
def test_packed_weights_give_the_same(name, tmp_path):
    """Fails if packing loses a bias or the output projection, keeps the plain weights, or touches a
    model in float32."""
    write_model(tmp_path, **VARIANTS[name])
    able = torch.cpu.get_capabilities().get("avx512_bf16")
    ids = torch.arange(60).view(3, 20) * 6 + 3
    for dtype in (torch.bfloat16, torch.float32):
        plain, packed = load_llama(tmp_path, dtype), pack(load_llama(tmp_path, dtype))
        due = plain.logits(plain(ids))
        torch.testing.assert_close(packed.logits(packed(ids)), due, atol=0.02 * due.std(), rtol=0)
        left = [key for key in dict(packed.named_parameters()) if "proj" in key or "lm_head" in key]
        assert any(key.endswith(".weight") for key in left) == (dtype == torch.float32 or not able)
        layer = weakref.ref(packed.layers[0].self_attn.o_proj)
        del packed
        assert layer() is None, "no circle of references: a model's memory is free at once"


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("variant", ["tied", "qwen2", "qwen3"])
@torch.no_grad()
def test_packed_lora_is_lora(tmp_path, variant, targets):
    """Fails if a projection gets another one's LoRA or bias, if a group of which not all have LoRA
    slips, or if the base model cannot be had from a packed run."""
    write_model(tmp_path, **VARIANTS[variant])
    ids, found = torch.arange(2, 62).view(3, 20), []
    for packed in (False, True):
        torch.manual_seed(0)
        llama = add_lora(load_llama(tmp_path, torch.bfloat16), 4, 8.0, targets)
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        if packed:
            pack(llama)
        found.append([llama(ids)])
        with base_model(llama):
            found[-1].append(llama(ids))
        assert torch.equal(llama(ids), found[-1][0]), "LoRA is on again"
    if not is_packed(llama):
        pytest.skip("nothing is packed on this processor")
    left = [name for name, _ in llama.named_parameters() if "proj" in name]
    assert all(name.endswith("bias") for name in left)
    base = load_llama(tmp_path, torch.bfloat16)(ids)
    for (lora, off), name in zip(found, ("plain", "packed"), strict=True):
        torch.testing.assert_close(lora, found[0][0], atol=0.02, rtol=0.02, msg=name)
        torch.testing.assert_close(off, base, atol=0.02, rtol=0.02, msg=name)
    assert (found[0][0] - base).abs().mean() > 0.2


def test_a_packed_run_is_not_saved(tiny):
    """Fails if a run without its LoRA weights, packed for predictions, is written as if whole."""
    model = CLSGen(add_lora(load_llama(tiny, torch.bfloat16), 4, 8.0))
    assert len(adapter_tensors(model)) == 29
    if is_packed(pack(model.model)):  # not on every processor
        with pytest.raises(ValueError, match="pack=False"):
            adapter_tensors(model)


def test_a_packed_model_cannot_be_trained(tiny):
    """Fails if training goes on with the score head alone, since the LoRA weights are gone."""
    llama = pack(add_lora(load_llama(tiny, torch.bfloat16), 4, 8.0))
    if not is_packed(llama):
        pytest.skip("nothing is packed on this processor")
    with pytest.raises(ValueError, match="packed for predictions"):
        llama(torch.arange(9)[None])
