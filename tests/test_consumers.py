"""What loads the output, and what others make of the input: transformers, compressed-tensors.

Real architectures are made with transformers, quantized, converted and loaded again. And each
program's own dequantization is held against the converter's: compressed-tensors multiplies in the
dtype of the scale. The product of a code's 4 significant bits with a BF16 scale's 8 is rounded once
to BF16 there as here, so the two agree to the last bit; with F32 scales both round the float32
product.
"""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    FineGrainedFP8Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from checkpoints import (
    FP8_CONFIG,
    assert_same_bits,
    canonical,
    dequantized,
    finite_codes,
    load_checkpoint,
    packed,
    rand,
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
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
BF16 = torch.bfloat16

# --- what loads the output ---


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


# --- what others make of the input ---


def exponent_bytes(*shape):
    return torch.randint(100, 140, shape, dtype=torch.uint8)


SCHEMES = {
    "tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, rand(1, dtype=BF16)),
    "channel": ("float-quantized", {**FP8, "strategy": "channel"}, rand(256, 1, dtype=BF16)),
    "channel-f32": ("float-quantized", {**FP8, "strategy": "channel"}, rand(256, 1)),
    "group": (
        "float-quantized",
        {**FP8, "strategy": "group", "group_size": 64},
        rand(256, 4, dtype=BF16),
    ),
    "block": (
        "float-quantized",
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        rand(2, 2),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        exponent_bytes(256, 8),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        exponent_bytes(256, 8),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "scale_dtype": torch.float8_e4m3fn},
        finite_codes(256, 16).abs(),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decompresses_to_the_same_bits(tmp_path, name):
    format_name, arguments, scale = SCHEMES[name]
    if name in ("mxfp4", "nvfp4"):
        given = {"weight_packed": packed(256, 128), "weight_scale": scale}
    else:
        given = {"weight": finite_codes(256, 256), "weight_scale": scale}
    if name == "nvfp4":
        given["weight_global_scale"] = torch.tensor([613.0])
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(format_name)
    theirs = compressor.decompress(dict(given), scheme)["weight"].to(BF16)
    groups = {"group_0": scheme.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    tensors = {f"m.{key}": tensor for key, tensor in given.items()}
    write_checkpoint(
        tmp_path / "in", {"model.safetensors": tensors}, {"quantization_config": config}
    )
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_checkpoint(tmp_path / "out")["m.weight"], canonical(theirs))


def tiny_qwen3(**sizes):
    """Return a Qwen3 with random weights in BF16."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=200, hidden_size=256, head_dim=64, **sizes)
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return AutoModelForCausalLM.from_config(config, dtype=BF16)


def assert_loads_like(fp8, bf16):
    """Compare what transformers makes of the FP8 checkpoint itself with what it loads of ours."""
    dequantize = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=dequantize)
    ours, info = AutoModelForCausalLM.from_pretrained(bf16, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.dtype == BF16
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        if "norm" in name:  # DeepSeek-V4's norms are widened, but not under a quantization
            tensor = tensor.to(theirs[name].dtype)
        assert_same_bits(tensor, theirs[name])


def save_quantized(folder, model, config, quantize):
    """Save a model, and beside it the same with each tensor as `quantize` returns it."""
    model.save_pretrained(folder / "master")
    given = {}
    for name, tensor in load_checkpoint(folder / "master").items():
        given |= quantize(name, tensor) or {name: tensor}
    saved = json.loads((folder / "master/config.json").read_text())
    write_checkpoint(folder / "fp8", {"model.safetensors": given}, {**saved, **config}, index=False)
    main(folder / "fp8", folder / "bf16")


def test_transformers_dequantizes_qwen3_to_the_same_bits(tmp_path):
    # whole blocks only: transformers computes the block from the shapes, which is wrong for ragged
    model = tiny_qwen3(intermediate_size=384, num_hidden_layers=2)

    def quantize(name, tensor):
        if name.endswith("_proj.weight"):
            codes, scale = quantize_per_block(tensor.float())
            return {name: codes, name + "_scale_inv": scale.bfloat16()}

    save_quantized(tmp_path, model, {"quantization_config": FP8_CONFIG}, quantize)
    assert_loads_like(tmp_path / "fp8", tmp_path / "bf16")


def test_transformers_dequantizes_deepseek_v4_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 256, "hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "index_n_heads": 2, "o_groups": 2}
    ranks = {"q_lora_rank": 128, "o_lora_rank": 64, "index_head_dim": 64, "index_topk": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "hc_mult": 2}
    config = DeepseekV4Config(
        **small, **heads, **ranks, **experts, num_hidden_layers=4, sliding_window=16
    )

    def quantize(name, tensor):
        """FP4 routed experts in I8, FP8 attention and shared experts, E8M0 scales, as released."""
        scale = name.removesuffix("weight") + "scale"
        if ".ffn.experts." in name:
            codes = torch.randint(0, 256, (tensor.shape[0], tensor.shape[1] // 2)).to(torch.uint8)
            exponents = torch.randint(118, 124, (tensor.shape[0], tensor.shape[1] // 32))
        elif any(part in name for part in (".wq_", ".wo_", ".shared_experts.")):
            codes = (torch.randn(tensor.shape) * 100).to(torch.float8_e4m3fn)
            exponents = torch.randint(115, 119, (tensor.shape[0] // 128, tensor.shape[1] // 128))
        else:
            return None
        codes = codes.view(torch.int8) if codes.dtype == torch.uint8 else codes
        return {name: codes, scale: exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}

    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    quantization = {**FP8_CONFIG, "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    extra = {"expert_dtype": "fp4", "quantization_config": quantization}
    save_quantized(tmp_path, model, extra, quantize)
    assert "expert_dtype" not in (tmp_path / "bf16/config.json").read_text()
    assert_loads_like(tmp_path / "fp8", tmp_path / "bf16")


def test_transformers_is_wrong_where_the_last_block_is_cut_off(tmp_path):
    """192 rows over 2 rows of scales: blocks of 128 by the format, of 96 in transformers 5.23.

    It divides the rows by the rows of scales, where the format fixes the block and cuts the last.
    """
    model = tiny_qwen3(intermediate_size=192, num_hidden_layers=1)
    expected, computed = {}, {}

    def quantize(name, tensor):
        if name.endswith("up_proj.weight"):
            codes, scale = quantize_per_block(tensor.float())
            for rows, values in ((128, expected), (96, computed)):
                wide = scale.repeat_interleave(rows, 0).repeat_interleave(128, 1)[:192]
                values[name] = (codes.float() * wide).bfloat16()
            return {name: codes, name + "_scale_inv": scale}

    save_quantized(tmp_path, model, {"quantization_config": FP8_CONFIG}, quantize)
    ours = load_checkpoint(tmp_path / "bf16")
    dequantize = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=dequantize
    ).state_dict()
    assert expected
    for name, tensor in expected.items():
        assert_same_bits(ours[name], tensor)
        assert not torch.equal(expected[name], computed[name])
        # a transformers that has mended this computes what we do
        assert any(torch.equal(theirs[name], values[name]) for values in (expected, computed))
