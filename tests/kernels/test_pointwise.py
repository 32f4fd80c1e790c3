"""Kernels of a step of sampling, run by Triton's interpreter, against the modules whose place they take."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as t
from transformers.models.llama import modeling_llama

SIZES = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def close(found, expected, **how):
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **how)


def single(dtype):
    """Each kernel against the code of transformers, in a type: half precision rounds where that does."""
    from trl.kernels import pointwise

    torch.manual_seed(0)
    norm = modeling_llama.LlamaRMSNorm(24)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 5, 24)
    close(pointwise.norm_rows(x.to(dtype), norm.to(dtype).weight, norm.variance_epsilon), norm(x.to(dtype)))
    gates, ups = torch.randn(2, 7, 300).to(dtype)
    close(pointwise.gated(gates, ups), torch.nn.functional.silu(gates) * ups)
    rows = torch.randn(1, 5, 6 * 8).to(dtype)
    query, key = rows[..., :32].view(1, 5, 4, 8).transpose(1, 2), rows[..., 32:].view(1, 5, 2, 8).transpose(1, 2)
    angle = torch.linspace(0.1, 3.0, 20).view(1, 5, 4).repeat(1, 1, 2)
    for angles in (torch.float32, dtype):
        cos, sin = angle.cos().to(angles), angle.sin().to(angles)
        for found, expected in zip(
            pointwise._turn_both(query, key, cos, sin),
            modeling_llama.apply_rotary_pos_emb(query, key, cos, sin),
            strict=True,
        ):
            close(
                found,
                expected,
                rtol=1e-2 if angles != torch.float32 else 1e-5,
                atol=1e-2 if angles != torch.float32 else 1e-5,
            )


def whole():
    """Models inside the context: llama and qwen3 have everything replaced, gemma3 turns as it did and is right too."""
    from trl.kernels.pointwise import one_kernel_each

    replaced = {}
    for config in (t.LlamaConfig, t.Qwen3Config, t.Gemma3TextConfig):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config(**SIZES)).eval()
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            expected = model(ids).logits
            before = sys.modules[type(model).__module__].apply_rotary_pos_emb
            with one_kernel_each(model):
                swapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
                found = model(ids).logits
        assert sys.modules[type(model).__module__].apply_rotary_pos_emb is before
        assert not any("forward" in vars(module) for module in model.modules())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        replaced[config] = len(swapped)
    assert replaced == {t.LlamaConfig: 7, t.Qwen3Config: 11, t.Gemma3TextConfig: 0}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_by_the_interpreter():
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    code = "import torch, test_pointwise as t; t.single(torch.float32); t.single(torch.bfloat16); t.whole()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    )
