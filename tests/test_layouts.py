"""Published layouts that need more than a scale's name: each row of the table of formats.

The oracle is torch's float8 cast (or a table of FP4 values, or a nibble's integer) in float32,
times the scale spread over its block with repeat_interleave, rounded to BF16 once.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import (
    E8M0,
    PACKED,
    assert_refused,
    assert_same_bits,
    canonical,
    contents,
    convert,
    ct_config,
    dequantized,
    exponents,
    finite_codes,
    fp4_values,
    load_checkpoint,
    method,
    nvfp4,
    packed,
    positive,
    powers,
    rand,
    write_checkpoint,
)
from fp8_cast_bf16 import main

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = {"weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}


def write_json(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def nibbles(codes):
    """Return the two halves of every byte as integers from 0 to 15, the low half first."""
    raw = codes.view(PACKED)
    return torch.stack([raw & 0xF, raw >> 4], -1).flatten(-2).int()


def experts_nvfp4(experts, rows, second, group=16):
    """Return packed experts of 80 or 160 columns, their E4M3 scales, and their BF16 values.

    second: float32 factors that broadcast to (experts, rows, 1).
    """
    width = 5 * group // 2
    codes = packed(experts * rows, width).view(experts, rows, width)
    scale = positive(finite_codes(experts, rows, 5))
    wide = scale.float() * second
    return codes, scale, dequantized(fp4_values(codes), wide, (1, group))


# --- transformers ---


def test_nvfp4_of_transformers_is_multiplied_by_its_global_scale(tmp_path):
    # huggingface/transformers src/transformers/integrations/finegrained/conversions.py,
    # FineGrainedQuantize: global = amax / (6 * 448), divided out before the blocks are quantized.
    # Only versions after 5.24 save it; input_global_scale is the identity.
    second = torch.tensor(0.0123)
    codes, scale, values = nvfp4(second, divide=False)
    tensors = {
        **{"m.up.weight": codes, "m.up.weight_scale_inv": scale, "m.up.bias": rand(30)},
        **{"m.up.weight_global_scale": second, "m.up.input_global_scale": torch.ones(1)},
    }
    expected = {"m.up.weight": values, "m.up.bias": tensors["m.up.bias"]}
    convert(tmp_path, tensors, expected, method("nvfp4"))


def test_buffers_of_the_nvfp4_kernel_in_transformers_5_24_are_refused(tmp_path):
    # transformers 5.24 integrations/nvfp4.py, NVFP4Linear: the same method, swizzled scales.
    tensors = {
        **{"m.up.weight": packed(32, 32), "m.up.weight_sf_rowmajor": packed(32, 4)},
        "m.up.weight_sf": packed(128, 4).view(torch.int32),
        "m.up.weight_global_scale": rand(1),
    }
    assert_refused(tmp_path, tensors, "m.up.weight", config=method("nvfp4"))


@pytest.mark.parametrize(
    "place, names",
    [
        ("model.layers.0.mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
        ("model.layers.0.block_sparse_moe.experts", ["w1", "w3", "w2"]),
    ],
)
@pytest.mark.parametrize("inner", [128, 192, 200])
def test_fp8_experts_stand_apart_and_their_scales_are_stacked(tmp_path, place, names, inner):
    # Run with transformers 5.24, FineGrainedFP8Config on Qwen3-MoE and Mixtral, save_pretrained.
    # With 192, a block of the stacked grid holds rows of gate and of up. What the block size does
    # not divide stays BF16 (integrations/finegrained_fp8.py, Fp8Quantize), but its scale, which
    # nothing has filled, is written. Versions after 5.24 quantize it, with a ragged last block.
    hidden = 256
    gate, up = finite_codes(2, inner, hidden, seed=1), finite_codes(2, inner, hidden, seed=2)
    down = finite_codes(2, hidden, inner)
    scale, down_scale = rand(2, -(-2 * inner // 128), 2), rand(2, 2, -(-inner // 128))
    down_value = dequantized(down, down_scale)
    if inner == 192:
        down, down_scale = down_value, torch.full_like(down_scale, torch.nan)
    values = [*dequantized(torch.cat([gate, up], 1), scale).split(inner, 1), down_value]
    tensors = {f"{place}.gate_up_proj_scale_inv": scale, f"{place}.down_proj_scale_inv": down_scale}
    expected = {}
    for expert in range(2):
        for name, codes, value in zip(names, [gate, up, down], values, strict=True):
            tensors[f"{place}.{expert}.{name}.weight"] = codes[expert].clone()
            expected[f"{place}.{expert}.{name}.weight"] = value[expert]
    convert(tmp_path, tensors, expected, method("fp8", **BLOCKS))


# --- compressed-tensors INT4 ---


def int4(rows, cols, columns):
    """Return int32 words of eight codes each, and the first columns of what they hold."""
    codes = packed(rows, 4 * cols)
    return codes.view(torch.int32), nibbles(codes)[:, :columns] - 8


def int4_config(**weights):
    config = ct_config(**{**INT4, **weights})
    config["quantization_config"]["format"] = "pack-quantized"
    # What else has bits in such a config says nothing of the weights.
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    return config


@pytest.mark.parametrize("shape_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "columns, block, weights",
    [
        (96, 32, {}),
        (24, 8, {"group_size": 8}),
        (96, 96, {"strategy": "channel", "group_size": None}),
        (43, 43, {"strategy": "channel", "group_size": None}),
        (36, 12, {"group_size": 12, "actorder": "weight"}),
    ],
)
def test_int4_of_compressed_tensors(tmp_path, columns, block, weights, shape_dtype):
    # vllm-project/compressed-tensors compressors/pack_quantized/{base,helpers}.py: element i is
    # bits 4i..4i+3 of the row, plus 8; THUDM/slime tools/convert_k2_thinking_int4_to_bf16.py
    # multiplies in float32. Kimi-K2-Thinking holds weight_shape in I32, current writers in I64.
    words, codes = int4(30, -(-columns // 8), columns)
    scale = rand(30, columns // block, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.experts.0.up_proj"
    tensors = {
        **{f"{name}.weight_packed": words, f"{name}.weight_scale": scale},
        f"{name}.weight_shape": torch.tensor([30, columns], dtype=shape_dtype),
        "model.embed_tokens.weight": rand(8, 8, dtype=torch.bfloat16),
    }
    expected = {f"{name}.weight": dequantized(codes, scale, (1, block))}
    expected["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    config = {"text_config": int4_config(**weights)}  # as in Kimi-K2.5
    convert(tmp_path, tensors, expected, config)


def test_int4_columns_in_the_order_of_their_groups_are_accepted(tmp_path):
    words, codes = int4(30, 8, 64)
    scale = rand(30, 2, dtype=torch.bfloat16)
    tensors = {"m.weight_packed": words, "m.weight_scale": scale}
    tensors |= {"m.weight_shape": torch.tensor([30, 64]), "m.weight_g_idx": torch.arange(64) // 32}
    expected = {"m.weight": dequantized(codes, scale, (1, 32))}
    convert(tmp_path, tensors, expected, int4_config())


CHANNEL = {"strategy": "channel", "group_size": None}
ZERO_POINTS = {"weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}  # packed, these are -8


@pytest.mark.parametrize(
    "weights, change",
    [
        ({"num_bits": 8}, {"weight_shape": torch.tensor([30, 32]), "weight_scale": rand(30, 1)}),
        ({"num_bits": 8, **CHANNEL}, {"weight_scale": rand(30, 1)}),
        ({"num_bits": 8, "group_size": 16}, {"weight_shape": torch.tensor([30, 32])}),
        ({"num_bits": 2}, {"weight_shape": torch.tensor([30, 128])}),
        ({"symmetric": False}, ZERO_POINTS),
        ({}, {"weight_g_idx": (torch.arange(64) // 32).flip(0).int()}),
        ({}, {"weight_shape": torch.tensor([30, 96])}),
        ({}, {"weight_shape": torch.tensor([30, 56])}),
        ({}, {"weight_shape": torch.tensor([31, 64])}),
        ({}, {"weight_shape": torch.tensor([64, 30])}),
        ({**CHANNEL}, {"weight_shape": torch.tensor([30, 65]), "weight_scale": rand(30, 1)}),
        ({}, {"weight_scale": rand(30, 3)}),
        ({}, {"weight_scale": rand(30, 1)}),
        ({"group_size": 128}, {"weight_scale": rand(30, 1)}),
    ],
)
def test_int4_that_its_config_or_shape_contradicts_is_refused(tmp_path, weights, change):
    tensors = {"weight_packed": int4(30, 8, 64)[0], "weight_scale": rand(30, 2)}
    tensors |= {"weight_shape": torch.tensor([30, 64]), **change}
    tensors = {f"m.up.{name}": tensor for name, tensor in tensors.items()}
    assert_refused(tmp_path, tensors, "m.up", config=int4_config(**weights))


# --- W4AFP8 and DeepSeek-V4: packed experts beside FP8 blocks ---


def w4afp8():
    """Return an expert of INT4 with groups of 128 and an FP8 weight, and what they are in BF16."""
    codes, scale = packed(70, 192, dtype=torch.int8), rand(70, 3)
    dense, dense_scale = finite_codes(200, 160), rand(2, 2)
    name = "model.layers.3.mlp.experts.0.up_proj"
    tensors = {
        **{f"{name}.weight": codes, f"{name}.weight_scale_inv": scale},
        f"{name}.input_scale": rand(1, dtype=torch.bfloat16),
        **{"model.q_proj.weight": dense, "model.q_proj.weight_scale_inv": dense_scale},
    }
    signed = (nibbles(codes) ^ 8) - 8
    expected = {f"{name}.weight": dequantized(signed, scale, (1, 128))}
    return tensors, expected | {"model.q_proj.weight": dequantized(dense, dense_scale)}


def test_w4afp8_experts_are_int4_beside_fp8(tmp_path):
    # sgl-project/sglang python/sglang/srt/layers/quantization/w4afp8.py; NVIDIA/TensorRT-LLM
    # pack_int8_tensor_to_packed_int4: the low nibble comes first, and the sign is extended.
    convert(tmp_path, *w4afp8(), method("w4afp8"))


@pytest.mark.parametrize("config", [None, method("fp8", **BLOCKS)])
def test_w4afp8_without_its_method_is_refused(tmp_path, config):
    assert_refused(tmp_path, w4afp8()[0], "experts.0.up_proj.weight", config=config)


def test_mxfp4_of_deepseek_v4_belongs_to_the_method_fp8(tmp_path):
    # deepseek-ai/DeepSeek-V4 inference/convert.py: experts are I8, two E2M1 codes in a byte.
    codes, scale = packed(70, 48, dtype=torch.int8), exponents(70, 3, dtype=E8M0)
    tensors = {"layers.0.ffn.experts.3.w1.weight": codes, "layers.0.ffn.experts.3.w1.scale": scale}
    values = dequantized(fp4_values(codes.view(PACKED)), powers(scale), (1, 32))
    expected = {"layers.0.ffn.experts.3.w1.weight": values}
    convert(tmp_path / "fp8", tensors, expected, method("fp8", **BLOCKS))
    assert_refused(tmp_path / "none", tensors, "layers.0.ffn.experts.3.w1.weight")


# --- ModelOpt ---


def test_nvfp4_of_fused_experts_may_have_a_second_scale_for_each_half(tmp_path):
    # huggingface/transformers integrations/finegrained/conversions.py, FineGrainedWeightGlobals:
    # gate's column first; a checkpoint's gate_up_proj holds the rows of gate before those of up.
    second, down_second = rand(3, 2), rand(3)
    codes, scale, values = experts_nvfp4(3, 26, second.repeat_interleave(13, 1)[..., None])
    down, down_scale, down_values = experts_nvfp4(3, 20, down_second.view(3, 1, 1))
    tensors = {
        **{"experts.gate_up_proj": codes, "experts.gate_up_proj_weight_scale": scale},
        "experts.gate_up_proj_weight_scale_2": second,
        **{"experts.down_proj": down, "experts.down_proj_weight_scale": down_scale},
        "experts.down_proj_weight_scale_2": down_second,
        **{"experts.gate_up_proj_input_scale": rand(3), "experts.down_proj_input_scale": rand(3)},
    }
    expected = {"experts.gate_up_proj": values, "experts.down_proj": down_values}
    config = method("modelopt", quant_algo="NVFP4")
    convert(tmp_path, tensors, expected, config)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_w4a8_nvfp4_fp8_of_modelopt_has_groups_of_32(tmp_path, file):
    # NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py (get_weight_scaling_factor) and
    # modelopt_recipes/configs/numerics/nvfp4_bs32.yaml: the second scale is amax / 448.
    algorithm = {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}
    codes, scale, values = experts_nvfp4(1, 30, torch.tensor(0.0123), group=32)
    tensors = {"l.weight": codes[0], "l.weight_scale": scale[0], "l.input_scale": rand()}
    tensors["l.weight_scale_2"] = torch.tensor(0.0123)
    config = None
    if file == "config.json":
        groups = {"group_0": {"weights": {**NVFP4, "group_size": 32}, "targets": ["Linear"]}}
        config = method("modelopt", **algorithm, config_groups=groups)
    else:
        write_json(tmp_path / "in", file, {"producer": {}, "quantization": algorithm})
    convert(tmp_path, tensors, {"l.weight": values[0]}, config)


def test_nvfp4_of_modelopt_with_groups_of_32_is_refused(tmp_path):
    codes, scale, _ = experts_nvfp4(1, 30, torch.tensor(0.0123), group=32)
    tensors = {"l.weight": codes[0], "l.weight_scale": scale[0]}
    tensors["l.weight_scale_2"] = torch.tensor(0.0123)
    assert_refused(tmp_path, tensors, "l.weight", config=method("modelopt", quant_algo="NVFP4"))


def test_fp8_blocks_of_stacked_experts_have_a_scale_of_five_dimensions(tmp_path):
    # NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py, FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG
    codes, scale = finite_codes(4, 256, 384), rand(4, 2, 1, 3, 1)
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_weight_scale": scale}
    expected = {"experts.gate_up_proj": dequantized(codes, scale.view(4, 2, 3))}
    convert(tmp_path, tensors, expected, method("modelopt", quant_algo="FP8_PB_WO"))


# --- torchao ---


@pytest.mark.parametrize("per_row", [True, False])
def test_torchao_fused_experts(tmp_path, per_row):
    # pytorch/ao torchao/prototype/safetensors/safetensors_support.py: tensor `M.P` is stored as
    # `M._P_qdata` and `M._P_scale`; PerRow of 3-D weights keeps a last axis of 1.
    tensors, expected = {}, {}
    for name, rows, cols in (("gate_up_proj", 52, 40), ("down_proj", 40, 26)):
        block = (1 if per_row else rows, cols)
        codes, scale = finite_codes(3, rows, cols), rand(3, rows // block[0], 1)
        tensors |= {f"experts._{name}_qdata": codes, f"experts._{name}_scale": scale}
        expected[f"experts.{name}"] = dequantized(codes, scale, block)
    convert(tmp_path, tensors, expected, method("torchao"))


@pytest.mark.parametrize("kind", ["MXFP8", "MXFP4", "NVFP4"])
def test_torchao_microscaling_with_plain_scales(tmp_path, kind):
    # pytorch/ao torchao/prototype/mx_formats/{mx_tensor,nvfp4_tensor}.py, is_swizzled_scales False
    if kind == "NVFP4":
        second = rand()
        codes, scale, expected = nvfp4(second, divide=False)
    else:
        second, scale = None, exponents(30, 3, dtype=E8M0)
        codes = packed(30, 48) if kind == "MXFP4" else finite_codes(30, 96)
        values = fp4_values(codes) if kind == "MXFP4" else codes
        expected = dequantized(values, powers(scale), (1, 32))
    tensors = {"l._weight_qdata": codes, "l._weight_scale": scale}
    tensors |= {"l._weight_per_tensor_scale": second} if second is not None else {}
    convert(tmp_path, tensors, {"l.weight": expected}, method("torchao"))


def test_metadata_of_torchao_does_not_reach_the_output(tmp_path):
    # The same file, flatten_tensor_state_dict: an entry for each tensor, and a list of them.
    codes, scale = finite_codes(50, 60), rand(50, 1)
    data = {"_type": "Float8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
    torchao = {"l.weight": json.dumps(data), "l.bias": json.dumps({"_type": "Tensor"})}
    torchao["tensor_names"] = json.dumps(["l.weight", "l.bias"])
    (tmp_path / "in").mkdir()
    tensors = {"l._weight_qdata": codes, "l._weight_scale": scale, "l.bias": rand(50)}
    path = tmp_path / "in/model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "kept": "1", **torchao})
    write_json(tmp_path / "in", "config.json", method("torchao"))
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        metadata = shard.metadata()
        assert set(shard.keys()) == {"l.weight", "l.bias"}
    assert not set(torchao) & set(metadata)
    assert (metadata["format"], metadata["kept"]) == ("pt", "1")


# --- GPTQModel ---


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    "kind, shape, block",
    [("tensor", (), (200, 300)), ("row", (200,), (1, 300)), ("block", (2, 3), (100, 100))],
)
def test_fp8_of_gptqmodel_is_divided_by_its_inverse_scale(tmp_path, kind, shape, block, dtype):
    # ModelCloud/GPTQModel gptqmodel/nn_modules/qlinear/fp8.py, quantize_fp8_weight: 448 / absmax.
    codes, scale = finite_codes(200, 300, dtype=dtype), 448 / rand(*shape)
    wide = scale.view(-(-200 // block[0]), -1)
    wide = wide.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    expected = {"l.weight": canonical((codes.float() / wide).bfloat16())}
    tensors = {"l.weight": codes, "l.weight_scale_inv": scale}
    entries = {"weight_scale_semantics": "inverse", "weight_scale_method": kind, "method": "fp8"}
    if kind == "block":
        entries["weight_block_size"] = list(block)
    convert(tmp_path, tensors, expected, method("fp8", **entries))


def test_other_semantics_of_scales_are_refused(tmp_path):
    tensors = {"l.weight": finite_codes(20, 30), "l.weight_scale_inv": rand(20)}
    config = method("fp8", weight_scale_semantics="direct")
    assert_refused(tmp_path, tensors, "weight_scale_semantics", "direct", config=config)


# --- Inkling: parameters that are called w13_weight and w2_weight ---


EXPERTS = "model.llm.layers.2.mlp.experts"


def test_nvfp4_of_inklings_vendor_keeps_the_gates_own_scale(tmp_path):
    # vllm-project/vllm vllm/models/inkling/nvidia/moe.py and tests/models/inkling; only
    # hf_quant_config.json names the method. The gate's global_scale is a parameter (InklingGate).
    gate = "model.llm.layers.2.mlp.gate"
    kept = {f"{gate}.weight": rand(7, 8, dtype=torch.bfloat16), f"{gate}.global_scale": rand(1)}
    kept[f"{gate}.bias"] = rand(5)
    tensors, expected = dict(kept), dict(kept)
    for name in ("w13_weight", "w2_weight"):
        second = rand(3)
        codes, scale, values = experts_nvfp4(3, 20, second.view(3, 1, 1))
        name = f"{EXPERTS}.{name}"
        tensors |= {name: codes, f"{name}.scale": scale, f"{name}.scale2": second}
        shape = torch.tensor(values.shape)
        tensors |= {f"{name}.input_amax": rand(1), f"{name}.original_shape": shape}
        expected[name] = values
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
    write_json(tmp_path / "in", "hf_quant_config.json", {"quantization": quantization})
    convert(tmp_path, tensors, expected, {"model_type": "inkling_mm_model"})


@pytest.mark.parametrize("wrapped", [False, True])
def test_nvfp4_of_inkling_by_llm_compressor_is_named_like_the_parameter(tmp_path, wrapped):
    # vllm-project/vllm tests/models/inkling/test_moe_weight_layout.py,
    # test_inkling_mapper_maps_compressed_tensors_expert_params: `w13_weight_packed` or
    # `w13_weight.weight_packed`, and so for weight_scale, weight_global_scale, input_global_scale.
    tensors, expected = {}, {}
    for name in ("w13", "w2"):
        second = 500 * rand(3, 1)
        prefix = f"{EXPERTS}.{name}_weight." if wrapped else f"{EXPERTS}.{name}_"
        codes, scale, _ = experts_nvfp4(3, 20, torch.tensor(1.0))
        tensors |= {f"{prefix}weight_packed": codes, f"{prefix}weight_scale": scale}
        tensors[f"{prefix}weight_global_scale"] = second
        tensors[f"{prefix}input_global_scale"] = rand(3, 1)
        wide = scale.float() / second.view(3, 1, 1)
        expected[f"{EXPERTS}.{name}_weight"] = dequantized(fp4_values(codes), wide, (1, 16))
    convert(tmp_path, tensors, expected, ct_config(**NVFP4))


# --- fine-tuners' FP8 for ComfyUI ---


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [16, 64])
def test_block_scales_of_musubi_tuner_have_a_last_axis_of_one(tmp_path, size, dtype):
    # kohya-ss/musubi-tuner src/musubi_tuner/modules/fp8_optimization_utils.py: [out, blocks, 1],
    # [out, 1] or one scale; blocks of 64, or 16 in its fast mode, along the inputs.
    codes, scale = finite_codes(50, 192, dtype=dtype), rand(50, 192 // size, 1)
    row_codes, row = finite_codes(50, 60, dtype=dtype), rand(50, 1)
    tensors = {
        **{"double.0.img.weight": codes, "double.0.img.scale_weight": scale},
        **{"double.0.txt.weight": row_codes, "double.0.txt.scale_weight": row},
        "double.0.img.bias": rand(50, dtype=torch.bfloat16),
    }
    expected = {
        "double.0.img.weight": dequantized(codes, scale[..., 0], (1, size)),
        "double.0.txt.weight": dequantized(row_codes, row, (1, 60)),
        "double.0.img.bias": tensors["double.0.img.bias"],
    }
    convert(tmp_path, tensors, expected, name="qwen_image.safetensors")


def test_blocks_of_musubi_tuner_may_share_a_second_scale(tmp_path):
    # The same file, quantize_weight: the present version writes it whenever there are blocks.
    codes, scale, second = finite_codes(50, 192), rand(50, 3, 1), torch.tensor(0.0123)
    tensors = {"l.weight": codes, "l.scale_weight": scale, "l.scale_weight_tensor": second}
    expected = {"l.weight": dequantized(codes, scale[..., 0] * second, (1, 64))}
    convert(tmp_path, tensors, expected, name="qwen_image.safetensors")


# --- side tensors of caches and activations ---


def test_scale_and_bias_of_an_affine_cache_are_dropped(tmp_path):
    # NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py, _KV_CACHE_REPLACEMENTS
    codes, scale = finite_codes(16, 20), rand()
    kept = {"a.k_proj.bias": rand(16), "a.v_proj.weight": rand(16, 20, dtype=torch.bfloat16)}
    kept |= {"visual.attn.v_bias": rand(16), "visual.attn.q_bias": rand(16)}  # EVA's parameters
    tensors = {
        **{"a.k_proj.weight": codes, "a.k_proj.weight_scale": scale, **kept},
        **{"a.k_proj.k_scale": rand(), "a.k_proj.k_bias": rand(1, 2, 1, 8)},
        **{"a.v_proj.v_scale": rand(), "a.v_proj.v_bias": rand(1, 2, 1, 8)},
    }
    expected = {"a.k_proj.weight": dequantized(codes, scale.view(1, 1), (16, 20)), **kept}
    config = method("modelopt", quant_algo="FP8", kv_cache_quant_algo="NVFP4_AFFINE")
    convert(tmp_path, tensors, expected, config)


@pytest.mark.parametrize(
    "name, quantizer",
    [
        ("model.layers.0.self_attn.prob_output_scale", "quark"),  # vllm-project/vllm pull 15734
        ("model.layers.0.experts.1.w1.act_scale", "fp8"),  # vLLM 0.4 models/mixtral.py
    ],
)
def test_scales_of_activations_are_dropped(tmp_path, name, quantizer):
    codes, scale = finite_codes(16, 20), rand(1)
    weight = name.replace("prob_output_scale", "q_proj.act_scale").replace("act_scale", "weight")
    tensors = {name: rand(1), weight: codes, f"{weight}_scale": scale}
    expected = {weight: dequantized(codes, scale.view(1, 1), (16, 20))}
    convert(tmp_path, tensors, expected, method(quantizer))


def quantized_attention(zero_point):
    codes, scale = finite_codes(16, 20), rand(16, 1)
    tensors = {"self_attn.q_proj.weight": codes, "self_attn.q_proj.weight_scale": scale}
    for kind in "qkv":
        tensors |= {f"self_attn.{kind}_scale": rand(1), f"self_attn.{kind}_zero_point": zero_point}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, {"self_attn.q_proj.weight": dequantized(codes, scale, (1, 20))}


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_zero_points_of_quantized_attention_are_dropped(tmp_path, dtype):
    # vllm-project/compressed-tensors quantization/lifecycle/initialize.py, initialize_attn_qparams
    tensors, expected = quantized_attention(torch.zeros(1).to(dtype))
    convert(tmp_path, tensors, expected, ct_config(type="float", strategy="channel"))


def test_zero_points_of_quantized_attention_that_are_not_zero_are_refused(tmp_path):
    config = ct_config(type="float", strategy="channel")
    tensors, _ = quantized_attention(torch.ones(1).to(E4M3))
    assert_refused(tmp_path, tensors, "self_attn.", "_zero_point", config=config)


# --- configs, indices and files ---


def modelopt_nvfp4():
    second = torch.tensor(0.0123)
    codes, scale, values = nvfp4(second, divide=False)
    tensors = {"l.weight": codes, "l.weight_scale": scale, "l.weight_scale_2": second}
    return tensors, {"l.weight": values}


@pytest.mark.parametrize("producer", ["modelopt", "shared-scales-nvfp4", None])
def test_hf_quant_config_means_modelopt_whoever_produced_it(tmp_path, producer):
    value = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    if producer:
        value["producer"] = {"name": producer, "version": "0.1"}
    write_json(tmp_path / "in", "hf_quant_config.json", value)
    convert(tmp_path, *modelopt_nvfp4(), {"hidden_size": 80})
    assert not (tmp_path / "out/hf_quant_config.json").exists()


def test_packed_weights_without_any_config_are_refused(tmp_path):
    assert_refused(tmp_path, modelopt_nvfp4()[0], "l.weight", "config")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_method_counts_under_either_key_at_any_depth(tmp_path, key, depth):
    config = {key: method("modelopt", quant_algo="NVFP4")["quantization_config"]}
    for _ in range(depth):
        config = {"text_config": config, "hidden_size": 80}
    convert(tmp_path, *modelopt_nvfp4(), config)
    assert key not in (tmp_path / "out/config.json").read_text()


def test_method_in_mistrals_params_counts(tmp_path):
    # vllm-project/vllm 16803: releases by Mistral itself in compressed-tensors
    second = torch.tensor([777.0])
    codes, scale, values = nvfp4(second, divide=True)
    name = "layers.0.feed_forward.w1"
    tensors = {f"{name}.weight_packed": codes, f"{name}.weight_scale": scale}
    tensors[f"{name}.weight_global_scale"] = second
    params = {"dim": 80, "quantization": ct_config(**NVFP4)["quantization_config"]}
    write_json(tmp_path / "in", "params.json", params)
    convert(tmp_path, tensors, {f"{name}.weight": values}, name="consolidated.safetensors")
    assert json.loads((tmp_path / "out/params.json").read_text()) == {"dim": 80}


def test_index_of_a_diffusers_model_is_rebuilt(tmp_path):
    # huggingface/diffusers utils/constants.py, SAFE_WEIGHTS_INDEX_NAME
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    codes, scale = finite_codes(16, 20), rand(1)
    shards = {names[0]: {"a.weight": codes, "b.weight_scale": scale}}
    shards[names[1]] = {"b.weight": codes.clone(), "a.weight_scale": scale.clone()}
    write_checkpoint(tmp_path / "in", shards, index=False)
    weight_map = {tensor: name for name in names for tensor in shards[name]}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(tmp_path / "in", f"{stem}.safetensors.index.json", index)
    main(tmp_path / "in", tmp_path / "out")
    value = dequantized(codes, scale.view(1, 1), (16, 20))
    for name, tensor in load_checkpoint(tmp_path / "out").items():
        assert name in ("a.weight", "b.weight")
        assert_same_bits(tensor, value)
    after = json.loads((tmp_path / f"out/{stem}.safetensors.index.json").read_text())
    assert after["weight_map"] == {"a.weight": names[0], "b.weight": names[1]}
    assert after["metadata"]["total_size"] == 2 * 2 * 16 * 20
    assert set(contents(tmp_path / "out")) == {*names, f"{stem}.safetensors.index.json"}


def test_config_without_a_dtype_gets_none(tmp_path):
    codes, scale = finite_codes(16, 20), rand(1)
    tensors = {"l.weight": codes, "l.weight_scale": scale}
    expected = {"l.weight": dequantized(codes, scale.view(1, 1), (16, 20))}
    convert(tmp_path, tensors, expected, {"hidden_size": 20, **method("fp8")})
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 20}


def test_files_that_only_describe_the_quantization_are_not_copied(tmp_path):
    left = ["hf_quant_config.json", "quant_cfg.json", "quanto_qmap.json"]
    left += ["quant_model_description.json", "quant_model_description_w8a8.json"]
    for name in [*left, "tokenizer.json", "my_quant_notes.json"]:
        write_json(tmp_path / "in", name, {})
    tensors = {"norm.weight": rand(4)}
    convert(tmp_path, tensors, tensors)
    names = {"model.safetensors", "tokenizer.json", "my_quant_notes.json"}
    index = "model.safetensors.index.json"
    assert set(contents(tmp_path / "out")) - {index} == names


@pytest.mark.parametrize("kind, name, said", [
    ("gpt_oss", "mlp.experts.0.up_proj", True),
    ("mixtral", "block_sparse_moe.experts.0.up_proj", True),
    ("mixtral", "block_sparse_moe.experts.0.w1", False),
    ("qwen3_moe", "mlp.experts.0.up_proj", False),
])
def test_experts_that_loaders_may_not_find_are_mentioned(tmp_path, capsys, kind, name, said):
    # vllm-project/llm-compressor takes the fused experts of these models apart
    tensors = {f"model.{name}.weight": finite_codes(4, 4), f"model.{name}.weight_scale": rand(1)}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {"model_type": kind})
    main(tmp_path / "in", tmp_path / "out")
    assert (f"Experts stand by themselves (model.{name}.weight)" in capsys.readouterr().out) == said
