"""Real architectures, end to end: made with transformers, quantized, converted, loaded again."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from checkpoints import (
    FP8_CONFIG,
    assert_same_bits,
    canonical,
    dequantized,
    load_checkpoint,
    write_checkpoint,
)
from fp8_cast_bf16 import main
from make_checkpoint import quantize_per_block

SMALL = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        moe_intermediate_size=144,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=140,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=40),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, head_dim=40, moe_intermediate_size=144, num_experts=4, num_experts_per_tok=2
    ),
}


def quantize(tensors: dict, scale_dtype: torch.dtype) -> tuple[dict, dict]:
    """Return the FP8 form of a model's projection weights and what they must come back as."""
    given, expected = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            given[name] = expected[name] = tensor
            continue
        codes, scales = quantize_per_block(tensor.float())
        given[name], given[name + "_scale_inv"] = codes, scales.to(scale_dtype)
        expected[name] = dequantized(codes, given[name + "_scale_inv"])
    return given, expected


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_converted_model_loads_and_computes_the_same_logits(tmp_path, name, scale_dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "master")
    config = json.loads((tmp_path / "master/config.json").read_text())
    given, expected = quantize(load_checkpoint(tmp_path / "master"), scale_dtype)
    assert len(given) - len(expected) > 15
    # every third tensor into the same shard, so that scales come to stand apart from their weights
    shards = {f"model-{i:05}-of-00003.safetensors": {} for i in range(3)}
    for number, (tensor_name, tensor) in enumerate(given.items()):
        shards[list(shards)[number % 3]][tensor_name] = tensor
    write_checkpoint(tmp_path / "fp8", shards, {**config, "quantization_config": FP8_CONFIG})
    write_checkpoint(tmp_path / "expected", {"model.safetensors": expected}, config, index=False)

    main(tmp_path / "fp8", tmp_path / "bf16")

    for tensor_name, tensor in load_checkpoint(tmp_path / "bf16").items():
        assert_same_bits(tensor, expected[tensor_name])
    converted, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", output_loading_info=True
    )
    assert not any(info.values()), info
    assert converted.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "expected", dtype=torch.bfloat16)
    tokens = torch.arange(24).view(2, 12) * 7 % 300
    with torch.no_grad():
        logits, expected_logits = converted(tokens).logits, reference(tokens).logits
    assert_same_bits(canonical(logits), canonical(expected_logits))
    assert logits.std() > 0
