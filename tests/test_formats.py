"""The table of formats: how each writer names, packs and scales its weights.

The oracle is torch's float8 cast (or a table of FP4 values, or a nibble's integer) in float32,
times the scale spread over its block with repeat_interleave, rounded to BF16 once.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import (
    CONFIG,
    E8M0,
    FP8_CONFIG,
    INDEX,
    PACKED,
    SHARD,
    assert_folder_refused,
    assert_refused,
    assert_same_bits,
    canonical,
    contents,
    convert,
    ct_config,
    dequantized,
    every_code,
    exponents,
    finite_codes,
    fp4_values,
    load_checkpoint,
    method,
    nibbles,
    nvfp4,
    packed,
    positive,
    powers,
    rand,
    write_checkpoint,
    write_json,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, main

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = {"weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}

# --- weights, and the grids of their scales ---


@pytest.mark.parametrize(
    "dtype, config",
    [
        (torch.float8_e4m3fn, None),
        (torch.float8_e5m2, None),
        (torch.uint8, None),
        (torch.int8, method("blockwise_int8")),
    ],
)
def test_one_byte_weights_with_a_scale_are_dequantized(tmp_path, dtype, config):
    codes, scale = every_code(140, 130, dtype), torch.rand(2, 2)
    got = convert(tmp_path, {SHARD: {"w": codes, "w_scale_inv": scale}}, config=config)
    values = codes.view(torch.float8_e4m3fn) if dtype == torch.uint8 else codes
    assert_same_bits(got["w"], dequantized(values, scale))


@pytest.mark.parametrize(
    "dtype, config",
    [(torch.int8, None), (torch.int8, {"quantization_config": FP8_CONFIG}),
     (torch.uint8, {"quantization_config": FP8_CONFIG})],
)
def test_bytes_with_a_scale_that_the_config_does_not_explain_are_refused(tmp_path, dtype, config):
    tensors = {"w": every_code(140, 130, dtype), "w_scale_inv": torch.rand(2, 2)}
    with pytest.raises(CheckpointError, match=r"w \([IU]8, beside w_scale_inv.* looks quantized"):
        convert(tmp_path, {SHARD: tensors}, config=config)
    assert not (tmp_path / "out").exists()


def test_one_byte_tensors_without_a_scale_are_data(tmp_path):
    tensors = {
        "packed": torch.arange(256).to(torch.uint8),
        "signed": torch.arange(-128, 128).to(torch.int8),
        "mask": torch.tensor([True, False]),
    }
    got = convert(tmp_path, {SHARD: tensors})
    for name, tensor in tensors.items():
        assert_same_bits(got[name], tensor)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, scale_shape, block",
    [
        ((130, 300), (), (130, 300)),
        ((130, 300), (1,), (130, 300)),
        ((130, 300), (1, 1), (130, 300)),
        ((130, 300), (130,), (1, 300)),
        ((130, 300), (130, 1), (1, 300)),
        ((130, 300), (1, 300), (130, 1)),
        ((130, 300), (2, 3), (128, 128)),
        ((576, 256), (5, 2), (128, 128)),
        ((130, 300), (5, 10), (32, 32)),
        ((130, 300), (130, 10), (1, 32)),
        ((192, 128), (2, 1), (128, 128)),
        ((3, 140, 200), (3,), (140, 200)),
        ((3, 140, 200), (3, 1), (140, 200)),
        ((3, 140, 200), (3, 1, 1), (140, 200)),
        ((3, 140, 200), (3, 140, 1), (1, 200)),
        ((3, 140, 200), (3, 1, 200), (140, 1)),
        ((3, 140, 200), (3, 2, 2), (128, 128)),
        ((3, 140, 200), (1,), (140, 200)),
        ((1, 140, 200), (2, 2), (128, 128)),
        ((140, 200), (1, 2, 2), (128, 128)),
        ((300,), (1,), (1, 300)),
    ],
)
def test_shape_of_the_scales_decides_the_grid(tmp_path, shape, scale_shape, block, scale_dtype):
    codes = finite_codes(*shape)
    scale = (torch.rand(scale_shape) + 0.01).to(scale_dtype)
    rows = -(-codes.shape[-2] // block[0]) if codes.dim() > 1 else 1
    experts = scale.numel() // (rows * -(-codes.shape[-1] // block[1]))
    wide = scale.view(experts, rows, -1)
    expected = dequantized(codes.view(-1, *codes.shape[-2:]), wide, block).view(shape)
    got = convert(tmp_path, {SHARD: {"w": codes, "w_scale_inv": scale}})
    assert_same_bits(got["w"], expected)


def test_block_size_of_the_config_is_used_at_any_depth(tmp_path):
    codes, scale = finite_codes(200, 300), torch.rand(3, 3)
    config = {"text_config": {"quantization_config": {"weight_block_size": [96, 100]}}}
    got = convert(tmp_path, {SHARD: {"w": codes, "w_scale_inv": scale}}, config=config)
    assert_same_bits(got["w"], dequantized(codes, scale, (96, 100)))


@pytest.mark.parametrize("group", [16, 32, 128])
def test_groups_that_fit_exactly_may_stand_beside_the_blocks_of_the_config(tmp_path, group):
    codes, scale = finite_codes(200, 384), torch.rand(200, 384 // group)
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    got = convert(tmp_path, {SHARD: {"w": codes, "w_scale_inv": scale}}, config=config)
    assert_same_bits(got["w"], dequantized(codes, scale, (1, group)))


@pytest.mark.parametrize(
    "scale_shape", [(200, 10), (2, 3)], ids=["1x32, cut off at the edge", "128x128"]
)
def test_a_grid_that_contradicts_the_config_is_an_error_with_both_grids(tmp_path, scale_shape):
    tensors = {"w": finite_codes(200, 300), "w_scale_inv": torch.rand(scale_shape)}
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    message = (rf"w is \[200, 300\].*scaled by w_scale_inv {re.escape(str([*scale_shape]))}.*"
               r"the config names blocks of 32x32, which need \[7, 10\]")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, {SHARD: tensors}, config=config)
    assert not (tmp_path / "out").exists()


def test_scale_that_fits_no_grid_is_an_error_with_both_shapes(tmp_path):
    tensors = {"x.weight": finite_codes(300, 300), "x.weight_scale_inv": torch.rand(7, 5)}
    with pytest.raises(CheckpointError, match=r"x\.weight is \[300, 300\].*_scale_inv \[7, 5\]"):
        convert(tmp_path, {SHARD: tensors})
    assert not (tmp_path / "out").exists()


def test_scale_of_an_unknown_dtype_is_an_error(tmp_path):
    tensors = {"w": finite_codes(3, 3), "w_scale_inv": torch.ones(1, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"w \(F8_E4M3, beside w_scale_inv\) looks quantized"):
        convert(tmp_path, {SHARD: tensors})
    assert not (tmp_path / "out").exists()


def test_activation_scales_of_converted_weights_are_dropped(tmp_path):
    scales = ["q.weight_scale_inv", "q.activation_scale", "up_scale_inv", "up_activation_scale"]
    tensors = {name: torch.ones(1) for name in [*scales, "norm.activation_scale"]}
    tensors |= {"q.weight": finite_codes(4, 4), "up": finite_codes(4, 4)}
    got = convert(tmp_path, {SHARD: tensors})
    assert set(got) == {"q.weight", "up", "norm.activation_scale"}


def test_the_demo_of_the_ancestor_works(tmp_path):
    codes = torch.randint(0, 127, (10, 10), dtype=torch.uint8)
    scale, other = torch.tensor([0.5]).bfloat16(), torch.randn(5, 5).bfloat16()
    tensors = {"weight_1": codes, "weight_1_scale_inv": scale, "weight_2": other}
    got = convert(tmp_path, {"model-00001.safetensors": tensors})
    assert set(got) == {"weight_1", "weight_2"}
    expected = dequantized(codes.view(torch.float8_e4m3fn), scale.view(1, 1))
    assert_same_bits(got["weight_1"], expected)
    assert_same_bits(got["weight_2"], other)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_scale_of_a_weight_that_no_format_knows_is_refused(tmp_path, dtype):
    tensors = {"w": torch.ones(2, 2, dtype=dtype), "w_scale_inv": torch.ones(1)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors})
    assert_folder_refused(tmp_path / "in", "beside w_scale_inv", "in no format known here")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.bool])
def test_what_never_holds_codes_is_copied_and_the_scale_beside_it_is_named(tmp_path, dtype, capsys):
    tensors = {"w": torch.ones(2, 2, dtype=dtype), "w_scale_inv": torch.ones(1)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors})
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_file(tmp_path / "out/model.safetensors")["w"], tensors["w"])
    assert "Dropped scales of no weight: w_scale_inv\n" in capsys.readouterr().out


def test_an_exponent_that_is_the_scale_of_no_weight_is_refused(tmp_path):
    tensors = {"norm.weight": torch.ones(4), "norm.scale": torch.ones(4).to(torch.float8_e8m0fnu)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors})
    assert_folder_refused(tmp_path / "in", "norm.scale (F8_E8M0) looks quantized")


# --- the families of the hub ---


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "scale_shape, block, weights",
    [
        ((1,), (200, 300), {"strategy": "tensor"}),
        ((), (200, 300), {"strategy": "tensor"}),
        ((200, 1), (1, 300), {"strategy": "channel"}),
        ((200, 3), (1, 128), {"strategy": "group", "group_size": 128}),
        ((200, 4), (1, 96), {"strategy": "group", "group_size": 96}),
        ((2, 3), (128, 128), {"strategy": "block", "block_structure": [128, 128]}),
        ((4, 5), (50, 64), {"strategy": "block", "block_structure": "50x64"}),
    ],
)
def test_compressed_tensors_fp8(tmp_path, scale_shape, block, weights, scale_dtype):
    codes, scale = finite_codes(200, 300), rand(*scale_shape, dtype=scale_dtype)
    tensors = {
        "m.q_proj.weight": codes,
        "m.q_proj.weight_scale": scale,
        "m.q_proj.input_scale": rand(1),
        "m.q_proj.weight_zero_point": torch.zeros(scale_shape).to(torch.float8_e4m3fn),
        "m.k_proj.output_scale": rand(1),
        "lm_head.weight": rand(4, 4, dtype=torch.bfloat16),
    }
    wide = scale.view(-(-200 // block[0]), -1)
    expected = {
        "m.q_proj.weight": dequantized(codes, wide, block),
        "m.k_proj.output_scale": tensors["m.k_proj.output_scale"],  # its weight is not quantized
        "lm_head.weight": tensors["lm_head.weight"],
    }
    # `ignore` names a module that is FP8 on disk: dtypes count, not lists
    config = ct_config(**weights)
    config["quantization_config"]["ignore"] = ["lm_head", "re:.*q_proj"]
    convert(tmp_path, tensors, expected, config)


def test_one_column_of_scales_can_be_a_block_grid(tmp_path):
    codes, scale = finite_codes(300, 100), rand(3, 1)
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale)}, ct_config(strategy="block"))


def test_autofp8_and_modelopt_per_tensor(tmp_path):
    codes, scale = finite_codes(60, 70), rand()
    tensors = {
        **{"a.k_proj.weight": codes, "a.k_proj.weight_scale": scale},
        **{"a.k_proj.input_scale": rand(), "a.k_proj.k_scale": rand(), "a.kv_scale": rand(1)},
        **{"a.attn.v_scale": rand(1), "a.attn.q_scale": rand(), "a.attn.prob_scale": rand()},
    }
    expected = {"a.k_proj.weight": dequantized(codes, scale.view(1, 1), (60, 70))}
    config = method("modelopt", quant_algo="FP8", kv_cache_quant_algo="FP8")
    convert(tmp_path, tensors, expected, config)


def test_modelopt_per_channel_and_4d_blocks(tmp_path):
    codes, channel, block = finite_codes(300, 200), rand(300), rand(3, 1, 2, 1)
    tensors = {"c.weight": codes, "c.weight_scale": channel}
    tensors |= {"b.weight": codes.clone(), "b.weight_scale": block}
    expected = {
        "c.weight": dequantized(codes, channel.view(-1, 1), (1, 200)),
        "b.weight": dequantized(codes, block.view(3, 2)),
    }
    convert(tmp_path, tensors, expected)


@pytest.mark.parametrize(
    "scale_shape, block", [((3,), (80, 90)), ((3, 80), (1, 90)), ((3, 90), (80, 1))]
)
def test_modelopt_stacked_experts(tmp_path, scale_shape, block):
    codes, scale = finite_codes(3, 80, 90), rand(*scale_shape)
    wide = scale.view(3, -(-80 // block[0]), -(-90 // block[1]))
    tensors = {"experts.up_proj": codes, "experts.up_proj_weight_scale": scale}
    tensors["experts.up_proj_input_scale"] = rand(3)
    convert(tmp_path, tensors, {"experts.up_proj": dequantized(codes, wide, block)})


def test_fbgemm_rows(tmp_path):
    codes, scale = finite_codes(60, 70), rand(60, 1)
    tensors = {"q.weight": codes, "q.weight_scale": scale, "q.input_scale_ub": rand(1)}
    config = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    convert(tmp_path, tensors, {"q.weight": dequantized(codes, scale, (1, 70))}, config)


@pytest.mark.parametrize("inner", [40, 64])
def test_llama4_down_proj_is_scaled_along_its_last_axis(tmp_path, inner):
    hidden = 64  # a square down_proj shows nothing in its shapes
    up, up_scale = finite_codes(2, hidden, 2 * inner), rand(2, 1, 2 * inner)
    down, down_scale = finite_codes(2, inner, hidden), rand(2, hidden, 1)
    tensors = {
        **{"e.gate_up_proj": up, "e.gate_up_proj_scale": up_scale},
        **{"e.down_proj": down, "e.down_proj_scale": down_scale},
    }
    expected = {
        "e.gate_up_proj": dequantized(up, up_scale, (hidden, 1)),
        "e.down_proj": dequantized(down, down_scale.transpose(1, 2), (inner, 1)),
    }
    convert(tmp_path, tensors, expected, {"quantization_config": {"quant_method": "fbgemm_fp8"}})


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_mxfp8(tmp_path, name, dtype):
    codes, raw = every_code(50, 96), exponents(50, 3, dtype=dtype)
    config = {"quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}}
    expected = {"w.weight": dequantized(codes, powers(raw), (1, 32))}
    convert(tmp_path, {"w.weight": codes, f"w.{name}": raw}, expected, config)


def test_power_of_two_scales_are_exact():
    values = finite_codes(64, 64).float()
    scales = powers(torch.arange(100, 164).to(torch.uint8)).view(64, 1)
    assert torch.equal((values * scales).bfloat16().double(), values.double() * scales.double())


def deepseek_v4():
    """Return a layer of DeepSeek-V4 in its own names, and what it is in BF16."""
    dense, dense_scale = finite_codes(200, 160), exponents(7, 5, dtype=E8M0)
    expert, expert_scale = packed(70, 48, dtype=torch.int8), exponents(70, 3, dtype=E8M0)
    engram, engram_scale = finite_codes(1000, 256), exponents(1000, 8, dtype=E8M0)
    wkv, wkv_scale = finite_codes(100, 96), exponents(4, 3, dtype=E8M0)
    kept = {
        "layers.0.ffn.gate.tid2eid": torch.arange(12).view(6, 2),
        "layers.0.attn.attn_sink": torch.randn(4),
        "layers.0.hc_attn_scale": torch.randn(3),
        "layers.0.ffn.gate.bias": torch.randn(4),
        "layers.0.attn_norm.weight": torch.randn(8).bfloat16(),
    }
    tensors = {
        **{"layers.0.attn.wq_a.weight": dense, "layers.0.attn.wq_a.scale": dense_scale},
        "layers.0.ffn.experts.3.w1.weight": expert,
        "layers.0.ffn.experts.3.w1.scale": expert_scale,
        **{"layers.1.engram.embed.weight": engram, "layers.1.engram.embed.scale": engram_scale},
        **{"layers.1.engram.wkv.weight": wkv, "layers.1.engram.wkv.scale": wkv_scale},
        **kept,
    }
    expected = {
        "layers.0.attn.wq_a.weight": dequantized(dense, powers(dense_scale), (32, 32)),
        "layers.0.ffn.experts.3.w1.weight": dequantized(
            fp4_values(expert.view(torch.uint8)), powers(expert_scale), (1, 32)
        ),
        "layers.1.engram.embed.weight": dequantized(engram, powers(engram_scale), (1, 32)),
        "layers.1.engram.wkv.weight": dequantized(wkv, powers(wkv_scale), (32, 32)),
        **kept,
    }
    return tensors, expected


def test_deepseek_v4_and_its_engram_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8_cast_bf16.WINDOW", 3 * 4096)
    config = {
        "expert_dtype": "fp4",
        "text_config": {"expert_dtype": "fp4", "dtype": "bfloat16"},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    }
    tensors, expected = deepseek_v4()
    convert(tmp_path, tensors, expected, config)
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == {"text_config": {"dtype": "bfloat16"}}


def test_f4_dtype_counts_elements_not_bytes(tmp_path):
    codes, scale = packed(10, 32), exponents(10, 2)
    raw = {"e.weight": ("F4", [10, 64], codes), "e.scale": ("F8_E8M0", [10, 2], scale)}
    write_raw(tmp_path / "in/model.safetensors", raw)
    (tmp_path / "in/config.json").write_text(json.dumps(CONFIG))
    main(tmp_path / "in", tmp_path / "out")
    expected = dequantized(fp4_values(codes), powers(scale), (1, 32))
    assert_same_bits(load_checkpoint(tmp_path / "out")["e.weight"], expected)


def test_nvfp4_of_modelopt_beside_fp8(tmp_path):
    second = torch.tensor(0.0123)
    codes, scale, values = nvfp4(second, divide=False)
    dense, dense_scale = finite_codes(200, 160), exponents(2, 2, dtype=E8M0)
    tensors = {
        **{"e.0.w1.weight": codes, "e.0.w1.weight_scale": scale, "e.0.w1.weight_scale_2": second},
        **{"e.0.w1.input_scale": rand(), "wq.weight": dense, "wq.scale": dense_scale},
    }
    expected = {"e.0.w1.weight": values, "wq.weight": dequantized(dense, powers(dense_scale))}
    config = {"moe_quant_algo": "NVFP4", "quantization_config": {"quant_method": "fp8"}}
    write_checkpoint(tmp_path / "in", {})
    nvidia = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}
    (tmp_path / "in/hf_quant_config.json").write_text(json.dumps(nvidia))
    (tmp_path / "in" / INDEX).unlink()
    convert(tmp_path, tensors, expected, config)
    assert "moe_quant_algo" not in (tmp_path / "out/config.json").read_text()


def test_nvfp4_of_compressed_tensors_is_divided_and_renamed(tmp_path):
    second = torch.tensor([777.0])
    codes, scale, values = nvfp4(second, divide=True)
    tensors = {
        "m.up.weight_packed": codes,
        "m.up.weight_scale": scale,
        "m.up.weight_global_scale": second,
        "m.up.input_global_scale": rand(1),
    }
    convert(tmp_path, tensors, {"m.up.weight": values}, ct_config(num_bits=4, group_size=16))


def test_nvfp4_of_stacked_experts_has_a_second_scale_for_each(tmp_path):
    codes, scale, second = packed(60, 40).view(3, 20, 40), positive(finite_codes(3, 20, 5)), rand(3)
    wide = scale.float() * second.view(3, 1, 1)
    tensors = {
        "experts.gate_up_proj": codes,
        "experts.gate_up_proj_weight_scale": scale,
        "experts.gate_up_proj_weight_scale_2": second,
        "experts.gate_up_proj_input_scale": rand(3),
    }
    values = dequantized(fp4_values(codes).view(3, 20, 80), wide, (1, 16))
    convert(tmp_path, tensors, {"experts.gate_up_proj": values}, method("modelopt"))


def test_mxfp4_of_compressed_tensors_and_quark(tmp_path):
    codes, raw = packed(30, 48), exponents(30, 3)
    values = dequantized(fp4_values(codes), powers(raw), (1, 32))
    tensors = {"a.weight_packed": codes, "a.weight_scale": raw}
    convert(tmp_path / "ct", tensors, {"a.weight": values}, ct_config(num_bits=4))
    tensors = {"b.weight": codes, "b.weight_scale": raw}
    convert(tmp_path / "quark", tensors, {"b.weight": values}, method("quark"))


@pytest.mark.parametrize(
    "rows, scale_rows, parts", [(13568, 108, 4), (27136, 216, 8), (14848, 116, 1)]
)
def test_mimo_qkv_has_a_grid_for_each_tensor_parallel_part(tmp_path, rows, scale_rows, parts):
    codes, scale = finite_codes(rows, 256), rand(scale_rows, 2)
    pieces = zip(codes.chunk(parts), scale.chunk(parts), strict=True)
    expected = torch.cat([dequantized(*piece) for piece in pieces])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = {"l.0.qkv_proj.weight": codes, "l.0.qkv_proj.weight_scale_inv": scale}
    convert(tmp_path, tensors, {"l.0.qkv_proj.weight": expected}, config)


def test_grid_for_each_part_is_for_fused_qkv_only(tmp_path):
    tensors = {"o_proj.weight": finite_codes(1356, 128), "o_proj.weight_scale_inv": rand(12, 1)}
    with pytest.raises(CheckpointError, match="no block size fits"):
        convert(tmp_path, tensors, {})


@pytest.mark.parametrize("names", ["kv", "vk"])
def test_keys_and_values_that_mimo_v2_flash_quantized_as_one_matrix_are_refused(tmp_path, names):
    # sgl-project/sglang-jax 969, vllm-project/vllm 57508: 320 rows of each head are one matrix, so
    # the first half of a head of V takes the second scale of its K; alone, V would fit 128x128.
    rows = {"k": (768, 8), "v": (512, 4)}
    tensors = {}
    for name in names:
        tensors[f"{name}_proj.weight"] = finite_codes(rows[name][0], 256)
        tensors[f"{name}_proj.weight_scale_inv"] = rand(rows[name][1], 2)
    complaints = "k_proj.weight is [768, 256]", "[8, 2]", "no block size fits"
    assert_refused(tmp_path, tensors, *complaints, config=CONFIG)


MIMO = {**FP8_CONFIG, "store_dtype": "mxfp4", "mxfp4_block_size": 32}


def test_mxfp4_experts_of_mimo_stand_beside_fp8_blocks(tmp_path):
    # radixark/miles tools/convert_mimo_v2_to_bf16.py
    codes, raw = packed(30, 48), exponents(30, 3)
    dense, scale = finite_codes(200, 160), rand(2, 2)
    name = "model.layers.1.mlp.experts.0.up_proj"
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": raw}
    tensors |= {"o_proj.weight": dense, "o_proj.weight_scale_inv": scale}
    expected = {f"{name}.weight": dequantized(fp4_values(codes), powers(raw), (1, 32))}
    expected["o_proj.weight"] = dequantized(dense, scale)
    convert(tmp_path / "mimo", tensors, expected, {"quantization_config": MIMO})
    assert_refused(tmp_path / "fp8", tensors, f"{name}.weight", config=CONFIG)


def quark_config(**layer):
    """Return a config of Quark with MXFP4 for all layers but q_proj."""
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    more = {"layer_quant_config": {"*q_proj": layer}} if layer else {}
    return {"global_quant_config": {"weight": weight, "input_tensors": weight}, "export": {}} | more


def test_fp8_blocks_stand_beside_mxfp4_of_quark(tmp_path):
    # amd/GLM-5.3-Quark-MXFP4-AttnFP8: vllm-project/vllm 54556, sgl-project/sglang 38998
    codes, raw = packed(30, 48), exponents(30, 3)
    dense, scale = finite_codes(256, 256), rand(2, 2)
    tensors = {"e.weight": codes, "e.weight_scale": raw}
    tensors |= {"q_proj.weight": dense, "q_proj.weight_scale": scale}
    expected = {"e.weight": dequantized(fp4_values(codes), powers(raw), (1, 32))}
    expected["q_proj.weight"] = dequantized(dense, scale)
    block = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 128]}
    entries = quark_config(weight=block, input_tensors={"dtype": "fp8_e4m3", "group_size": 128})
    convert(tmp_path, tensors, expected, method("quark", **entries))


@pytest.mark.parametrize(
    "place", ["input_tensors", "output_tensors", "input_activations", "kv_cache_quant_config"]
)
def test_sizes_and_dtypes_of_activations_and_caches_say_nothing_of_weights(tmp_path, place):
    # With the group size, blocks of 64 would be refused; with the dtype, the FP4 weights.
    codes, raw = packed(30, 48), exponents(30, 3)
    dense, scale = finite_codes(256, 256), rand(4, 4)
    tensors = {"e.weight": codes, "e.weight_scale": raw}
    tensors |= {"q_proj.weight": dense, "q_proj.weight_scale": scale}
    expected = {"e.weight": dequantized(fp4_values(codes), powers(raw), (1, 32))}
    expected["q_proj.weight"] = dequantized(dense, scale, (64, 64))
    other = {"dtype": "fp6_e2m3", "scale_format": "e5m3", "group_size": 16, "block_size": [9, 9]}
    config = method("quark", global_quant_config={"weight": {"dtype": "fp4"}, place: [other]})
    convert(tmp_path / "fine", tensors, expected, config)
    config = method("quark", global_quant_config={"weight": {"dtype": "fp6_e2m3"}})
    assert_refused(tmp_path / "weight", tensors, "e.weight", config=config)


def test_layers_that_auto_round_leaves_in_16_bits_say_nothing_of_the_others(tmp_path):
    # intel/auto-round missing_tensors.py
    codes, raw = packed(30, 48), exponents(30, 3)
    tensors = {"l.weight_packed": codes, "l.weight_scale": raw}
    expected = {"l.weight": dequantized(fp4_values(codes), powers(raw), (1, 32))}
    extra = {"mtp.fc": {"bits": 16, "data_type": "fp"}}
    config = method("auto-round", bits=4, data_type="mx_fp", extra_config=extra)
    convert(tmp_path / "16", tensors, expected, config)
    config["quantization_config"]["extra_config"]["mtp.fc"]["bits"] = 4
    assert_refused(tmp_path / "4", tensors, "l.weight_packed", config=config)


def test_step3_and_fused_experts(tmp_path):
    codes, grid, plural = finite_codes(4, 150, 130), rand(4, 2, 2), rand(4, 1, 1)
    tensors = {
        **{"moe.up_proj.weight": codes, "moe.up_proj.weight_scale_inv": grid},
        **{"e.gate_up_proj": codes.clone(), "e.gate_up_proj_scales_inv": plural},
        "e.gate_up_proj_activation_scale": rand(4),
    }
    expected = {
        "moe.up_proj.weight": dequantized(codes, grid),
        "e.gate_up_proj": dequantized(codes, plural, (150, 130)),
    }
    convert(tmp_path, tensors, expected)


def test_qwen_ngram_shards_share_the_scale_of_their_parent(tmp_path):
    codes, scale = finite_codes(50, 160), rand(1, dtype=torch.bfloat16)
    tensors = {f"t.shard_{i}.weight": codes.roll(i).clone() for i in range(3)}
    values = {
        name: dequantized(t, scale.view(1, 1), (50, 160)) for name, t in tensors.items()
    }
    convert(tmp_path, {**tensors, "t.weight_scale": scale}, values)


def test_torchao(tmp_path):
    codes, row, tensor = finite_codes(50, 60), rand(50, 1), rand(1, 1)
    tensors = {"a._weight_qdata": codes, "a._weight_scale": row}
    tensors |= {"b._weight_qdata": codes.clone(), "b._weight_scale": tensor}
    tensors["b._weight_zero_point"] = torch.zeros(1)
    expected = {"a.weight": dequantized(codes, row, (1, 60))}
    expected["b.weight"] = dequantized(codes, tensor, (50, 60))
    convert(tmp_path, tensors, expected)


@pytest.mark.parametrize("numel, block", [(1, (50, 300)), (50, (1, 300)), (150, (1, 128))])
def test_auto_round_flattens_its_scales(tmp_path, numel, block):
    codes, scale = finite_codes(50, 300), rand(numel, dtype=torch.bfloat16)
    wide = scale.view(1, 1) if numel == 1 else scale.view(50, -1)
    config = {"quantization_config": {"quant_method": "auto-round", "group_size": 128}}
    tensors = {"w.weight": codes, "w.weight_scale": scale, "w.weight_zp": torch.zeros(1)}
    convert(tmp_path, tensors, {"w.weight": dequantized(codes, wide, block)}, config)


def test_comfyui_legacy_scaled(tmp_path):
    codes, scale = finite_codes(50, 60), rand()
    tensors = {
        "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        "double.0.img.weight": codes,
        "double.0.img.scale_weight": scale,
        "double.0.img.scale_input": rand(),
        "double.0.img.bias": torch.randn(50).bfloat16(),
    }
    expected = {"double.0.img.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    expected["double.0.img.bias"] = tensors["double.0.img.bias"]
    convert(tmp_path, tensors, expected, name="flux.safetensors")


def note(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_comfyui_notes_say_what_bytes_are(tmp_path, dtype):
    codes, scale = every_code(50, 60, dtype), rand()
    tensors = {
        "l.weight": codes.view(torch.uint8),
        "l.weight_scale": scale,
        "l.comfy_quant": note(format=str(dtype).removeprefix("torch.")),
    }
    expected = {"l.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    convert(tmp_path, tensors, expected, name="qwen_image.safetensors")


def test_plain_fp8_casts_are_exact(tmp_path):
    codes = {"a": every_code(16, 16), "b.weight": every_code(16, 16, torch.float8_e5m2)}
    expected = {name: canonical(tensor.float().bfloat16()) for name, tensor in codes.items()}
    convert(tmp_path, codes, expected, name="t5xxl.safetensors", missing_scale="cast")


@pytest.mark.parametrize("scale, block", [((2, 2), (128, 128)), ((200, 1), (1, 160))])
def test_block_and_channel_int8(tmp_path, scale, block):
    codes, scale = every_code(200, 160, torch.int8), rand(*scale)
    name = "w.weight_scale_inv" if block[0] == 128 else "w.weight_scale"
    expected = {"w.weight": dequantized(codes, scale, block)}
    config = method("blockwise_int8" if block[0] == 128 else "w8a8_int8")
    convert(tmp_path, {"w.weight": codes, name: scale}, expected, config)


def test_mistral_consolidated(tmp_path):
    codes, scale = finite_codes(50, 60), rand()
    a = "layers.0.attention"
    tensors = {
        **{f"{a}.wq.weight": codes, f"{a}.wq.qscale_weight": scale, f"{a}.wq.qscale_act": rand()},
        **{f"{a}.kv_fake_quantizer.qscale_act": rand(), f"{a}.q_fake_quantizer.qscale_act": rand()},
        f"{a}.qscale_act": rand(),  # shared by several weights
        "norm.weight": torch.ones(4).bfloat16(),
    }
    expected = {f"{a}.wq.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    expected["norm.weight"] = tensors["norm.weight"]
    (tmp_path / "in").mkdir()
    params = {"dim": 5, "quantization": {"qformat_weight": "fp8_e4m3"}, "quantization_config": {}}
    (tmp_path / "in/params.json").write_text(json.dumps(params))
    convert(tmp_path, tensors, expected, name="consolidated.safetensors")
    assert json.loads((tmp_path / "out/params.json").read_text()) == {"dim": 5}


def test_fish_scales_hang_on_the_weights_own_name(tmp_path):
    codes, scale = finite_codes(50, 60), rand(50)
    tensors = {"a.emb": codes, "a.emb.scale": scale, "b.weight": codes.clone()}
    tensors["b.weight.scale"] = scale.clone()
    value = dequantized(codes, scale.view(-1, 1), (1, 60))
    convert(tmp_path, tensors, {"a.emb": value, "b.weight": value})


def test_convolution_with_a_scale_per_tensor_or_row(tmp_path):
    codes, row = finite_codes(6, 5, 3, 3), rand(6)
    tensors = {"a.weight": codes, "a.weight_scale": row, "b.weight": codes.clone()}
    tensors["b.weight_scale"] = rand(1)
    flat = codes.view(6, 45)
    expected = {"a.weight": dequantized(flat, row.view(6, 1), (1, 45)).view(6, 5, 3, 3)}
    b = dequantized(flat, tensors["b.weight_scale"].view(1, 1), (6, 45))
    convert(tmp_path, tensors, {**expected, "b.weight": b.view(6, 5, 3, 3)})


def test_parameters_that_are_called_scale_are_kept(tmp_path):
    codes, scale = finite_codes(50, 60), rand(1)
    kept = {"router.scale": rand(4), "blocks.0.layer_scale": rand(4), "logit_scale": rand()}
    kept |= {"vision.weight": rand(3, 3), "vision.weight_scale": rand(3)}
    tensors = {**kept, "router.weight": codes, "router.weight_scale_inv": scale}
    expected = {**kept, "router.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    config = {"quantization_config": {"quant_method": "fp8"}}
    convert(tmp_path, tensors, expected, config)


@pytest.mark.gpu
def test_gpu_and_cpu_write_the_same_bytes_for_fp4_and_second_scales(tmp_path, monkeypatch):
    tensors, _ = deepseek_v4()
    for name, second in (("weight", "weight_scale_2"), ("weight_packed", "weight_global_scale")):
        codes, scale, _ = nvfp4(torch.tensor(613.0), divide=False)
        tensors |= {f"{name}.{name}": codes, f"{name}.weight_scale": scale}
        tensors[f"{name}.{second}"] = torch.tensor(613.0)
    config = {"parts": [method(name) for name in ("fp8", "modelopt", "compressed-tensors")]}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, config)
    for window in (16 << 20, 4096):
        monkeypatch.setattr("fp8_cast_bf16.WINDOW", window)
        for device in ("cpu", "cuda"):
            main(tmp_path / "in", tmp_path / device, device=device)
        assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu")


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
        write_json(tmp_path / "in" / file, {"producer": {}, "quantization": algorithm})
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
    write_json(tmp_path / "in/hf_quant_config.json", {"quantization": quantization})
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


# vllm-project/vllm-ascend quantization/methods/kv_c8.py and modelslim_config.py, beside MXFP8 whose
# method stands in quant_model_description.json only
ASCEND_CACHE = {
    **{f"a.fa_{kind}.scale": rand(4, 1) for kind in "qkv"},
    **{f"a.fa_{kind}.offset": torch.ones(4, 1, dtype=torch.int8) for kind in "qkv"},
    **{f"a.{kind}_proj.kv_cache_scale": rand(64) for kind in "kv"},
    **{f"a.{kind}_proj.kv_cache_offset": rand(64) for kind in "kv"},
}
MXFP8 = {"a.k_proj.weight": finite_codes(50, 96), "a.k_proj.weight_scale": exponents(50, 3)}
# Tencent/AngelSlim compressor/quant/core/save.py, PTQSaveVllmHF
ANGELSLIM_CACHE = {f"a.{kind}_cache.scale": rand() for kind in "kv"}


@pytest.mark.parametrize("cache", [ASCEND_CACHE, ANGELSLIM_CACHE], ids=["Ascend", "AngelSlim"])
def test_scales_and_offsets_of_a_cache_are_dropped_under_any_name(tmp_path, capsys, cache):
    values = dequantized(MXFP8["a.k_proj.weight"], powers(MXFP8["a.k_proj.weight_scale"]), (1, 32))
    convert(tmp_path, {SHARD: MXFP8, "kv.safetensors": cache}, {"a.k_proj.weight": values}, {})


@pytest.mark.parametrize("kind", "qk")
def test_rotations_of_an_indexer_are_refused(tmp_path, kind):
    tensors = {**MXFP8, f"a.indexer.{kind}_rot": rand(128, 128, dtype=torch.bfloat16)}
    assert_refused(tmp_path, tensors, f"a.indexer.{kind}_rot is a rotation")


DUMMY = {"b.weight": rand(4, 4).bfloat16(), "b.scale_input": rand(), "b.bias": rand(4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_of_1_that_comfyui_gives_a_plain_weight_is_dropped(tmp_path, shape, dtype):
    # silveroxides/convert_to_quant format_migration.py
    codes, scale = finite_codes(50, 60), torch.tensor(0.001)
    tensors = {"scaled_fp8": torch.zeros(0).to(E4M3), "a.weight": codes, "a.scale_weight": scale}
    tensors |= {**DUMMY, "b.scale_weight": torch.ones(shape, dtype=dtype)}
    expected = {"a.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    expected |= {name: DUMMY[name] for name in ("b.weight", "b.bias")}
    convert(tmp_path, tensors, expected)
    with pytest.raises(CheckpointError, match=r"b\.scale_weight has to be read to plan"):
        main(tmp_path / "in", tmp_path / "other", delete_source=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("scale", [torch.tensor(1.0000001), torch.tensor(1.0).double(), rand(4)])
def test_scale_that_is_not_1_beside_a_plain_weight_is_refused(tmp_path, scale):
    tensors = {"a.weight": finite_codes(4, 4), "a.scale_weight": rand()}
    assert_refused(tmp_path, {**tensors, **DUMMY, "b.scale_weight": scale}, "b.scale_weight is not")


# --- configs ---


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
    write_json(tmp_path / "in/hf_quant_config.json", value)
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
    write_json(tmp_path / "in/params.json", params)
    convert(tmp_path, tensors, {f"{name}.weight": values}, name="consolidated.safetensors")
    assert json.loads((tmp_path / "out/params.json").read_text()) == {"dim": 80}


def test_config_without_a_dtype_gets_none(tmp_path):
    codes, scale = finite_codes(16, 20), rand(1)
    tensors = {"l.weight": codes, "l.weight_scale": scale}
    expected = {"l.weight": dequantized(codes, scale.view(1, 1), (16, 20))}
    convert(tmp_path, tensors, expected, {"hidden_size": 20, **method("fp8")})
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 20}


# --- what is refused ---

FP8_WEIGHT = {"l.weight": finite_codes(4, 4), "l.weight_scale": rand(1)}


@pytest.mark.parametrize(
    "tensors, name",
    [
        (FP8_WEIGHT | {"l.pre_quant_scale": rand(4)}, "l.pre_quant_scale"),  # AWQ
        (FP8_WEIGHT | {"l.svdquant_lora_a": rand(4, 2)}, "l.svdquant_lora_a"),
        (FP8_WEIGHT | {"l.input_rotation": rand(4, 4).double()}, "l.input_rotation"),
        # GPTQ
        ({"l.qweight": packed(4, 16).view(torch.int32), "l.scales": rand(1, 4)}, "l.qweight"),
        ({"l.weight": packed(4, 16).view(torch.uint32), "l.scales": rand(4, 1)}, "l.weight"),  # MLX
        ({"l.weight": packed(8, 1), "l.weight.absmax": rand(1)}, "l.weight"),  # bitsandbytes
        ({"l.weight": packed(8, 1).view(torch.int8), "l.SCB": rand(8)}, "l.weight"),
        ({"l.W_q": packed(4, 4), "l.scale": rand(4), "l.zero": rand(4)}, "l.W_q"),  # HQQ
        ({"l.quantized_weight_values": packed(4, 4), "l.quantized_weight_scale_factors": rand(4)},
         "l.quantized_weight_values"),  # fouroversix
        ({"l.trellis": packed(4, 4).to(torch.int16), "l.suh": rand(4), "l.svh": rand(4)},
         "l.trellis"),  # EXL3
        ({"l.weight.bitmask": packed(4, 4), "l.weight.compressed": rand(4)}, "l.weight.bitmask"),
        ({"e.gate_up_proj_blocks": packed(2, 16), "e.gate_up_proj_scales": packed(2, 1)},
         "e.gate_up_proj_blocks"),  # gpt-oss
    ],
)
def test_what_a_scale_does_not_undo_is_refused_by_name(tmp_path, tensors, name):
    assert_refused(tmp_path, tensors, f"model.safetensors: {name} ", "with the tool")


@pytest.mark.parametrize(
    "dtype, bits, what",
    [
        ("F6_E2M3", 6, "F6_E2M3. looks"),
        ("F6_E3M2", 6, "F6_E3M2. looks"),
        ("F8_E4M3FNUZ", 8, "FNUZ"),
        ("F8_E5M2FNUZ", 8, "FNUZ"),
    ],
)
def test_floats_that_no_format_uses_are_refused(tmp_path, dtype, bits, what):
    raw = {"w": (dtype, [4], torch.zeros(bits // 2, dtype=PACKED))}
    write_raw(tmp_path / "in/model.safetensors", raw)
    # where the installed safetensors does not know the dtype, it refuses the file itself
    with pytest.raises(CheckpointError, match=f"{what}|not a whole safetensors file"):
        main(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_of_tensor_parallel_ranks_are_refused(tmp_path):
    name = "model0-mp8.safetensors"
    assert_refused(tmp_path, {"w": torch.ones(1)}, name, "tensor-parallel", name=name)


@pytest.mark.parametrize("format_name", ["mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4"])
def test_formats_of_comfyui_with_tiled_scales_are_refused(tmp_path, format_name):
    tensors = {"l.weight": packed(4, 4), "l.weight_scale": rand(1)}
    tensors["l.comfy_quant"] = note(format=format_name)
    assert_refused(tmp_path, tensors, "is in ComfyUI's format", format_name)


@pytest.mark.parametrize("text", [b"{", b"3", b"{}", b'{"format": []}', b"\xff"])
def test_notes_of_comfyui_that_are_not_valid_are_refused(tmp_path, text):
    tensors = {"l.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    assert_refused(tmp_path, tensors, "ComfyUI")


@pytest.mark.parametrize("location, fine", [("input", False), ("weight_output", True)])
def test_rotations_at_run_time_are_refused(tmp_path, location, fine):
    groups = {"R1": {"type": "hadamard", "apply": [{"targets": ["L"], "location": location}]}}
    config = {"quantization_config": {"transform_config": {"config_groups": groups}}}
    codes, scale = finite_codes(4, 4), rand(1, 1)
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    if fine:
        convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (4, 4))}, config)
    else:
        assert_refused(tmp_path, tensors, "config.json", "transform_config", config=config)


def test_sparse_weights_are_refused(tmp_path):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"compression_config": {"sparsity_config": sparsity}}
    assert_refused(tmp_path, {"w": torch.ones(1)}, "sparsity_config", config=config)


def test_two_rival_scales_are_refused_unless_the_method_decides(tmp_path):
    codes, scale = finite_codes(4, 4), rand(1, 1)
    tensors = {"w.weight": codes, "w.weight_scale_inv": scale, "w.weight_scale": rand(1)}
    assert_refused(tmp_path, tensors, "w.weight has two scales", "w.weight_scale_inv and")
    config = {"quantization_config": {"quant_method": "fp8"}}
    convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (4, 4))}, config)


def test_square_experts_with_one_scale_per_row_or_column_are_refused(tmp_path):
    tensors = {"e.w": finite_codes(3, 64, 64), "e.w_weight_scale": rand(3, 64)}
    assert_refused(tmp_path, tensors, "e.w is [3, 64, 64]", "[3, 64]", "two grids fit")


@pytest.mark.parametrize("scale", [(2, 2), (3, 7, 2), (2, 3, 64, 1), (7,)])
def test_experts_whose_scales_fit_no_grid_are_refused(tmp_path, scale):
    tensors = {"e.w": finite_codes(3, 140, 200), "e.w_scale_inv": rand(*scale)}
    assert_refused(tmp_path, tensors, "no block size fits")


def test_zero_points_that_are_not_zero_are_refused(tmp_path):
    tensors = {"w.weight": every_code(4, 4, torch.int8), "w.weight_scale": rand(4, 1)}
    tensors["w.weight_zero_point"] = torch.tensor([0, 0, 1, 0], dtype=torch.int8)
    complaint, config = "w.weight_zero_point is not all zero", method("w8a8_int8")
    assert_refused(tmp_path, tensors, complaint, config=config)


@pytest.mark.parametrize("seconds", [(), ("w.weight_scale_2", "w.weight_global_scale")])
def test_nvfp4_needs_exactly_one_second_scale(tmp_path, seconds):
    tensors = {"w.weight": packed(4, 8), "w.weight_scale": finite_codes(4, 1)}
    tensors |= {name: rand(1) for name in seconds}
    refused = "w.weight_global_scale" if seconds else "w.weight (U8, beside w.weight_scale)"
    assert_refused(tmp_path, tensors, refused, config=method("modelopt"))


def test_second_scale_of_a_weight_that_is_not_nvfp4_is_refused(tmp_path):
    tensors = {"w.weight": finite_codes(4, 8), "w.weight_scale": rand(1)}
    tensors["w.weight_scale_2"] = rand(1)
    assert_refused(tmp_path, tensors, "w.weight_scale_2 stands beside w.weight")


@pytest.mark.parametrize("scale", [torch.ones(4, 4, dtype=torch.int32), packed(3, 1)])
def test_packed_weight_whose_scale_fits_no_format_is_refused(tmp_path, scale):
    assert_refused(tmp_path, {"w.weight": packed(4, 16), "w.weight_scale": scale}, "w.weight_scale")


def test_packed_and_plain_weight_of_one_name_are_refused(tmp_path):
    tensors = {"w.weight_packed": packed(4, 16), "w.weight_scale": exponents(4, 1)}
    tensors["w.weight"] = torch.ones(4, 32)
    assert_refused(tmp_path, tensors, "w.weight", config=ct_config(num_bits=4))


@pytest.mark.parametrize(
    "order, fine", [([0] * 4 + [1] * 4, True), ([1, 0] * 4, False), ([0] * 7 + [1], False)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reordered_groups_are_refused(tmp_path, order, fine, dtype):
    codes, scale = finite_codes(5, 8), rand(5, 2)
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    tensors["w.weight_g_idx"] = torch.tensor(order, dtype=dtype)
    config = ct_config(strategy="group", group_size=4)
    if fine:
        convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (1, 4))}, config)
    else:
        assert_refused(tmp_path, tensors, "w.weight_g_idx reorders", config=config)


def test_side_tensors_in_fp8_are_not_weights_without_a_scale(tmp_path):
    codes, scale = finite_codes(5, 8), rand()
    tensors = {"w.weight": codes, "w.scale_weight": scale, "scaled_fp8": finite_codes(2)}
    tensors["w.input_zero_point"] = torch.zeros(1).to(torch.float8_e4m3fn)
    expected = {"w.weight": dequantized(codes, scale.view(1, 1), (5, 8))}
    convert(tmp_path, tensors, expected, missing_scale="error")


def test_two_weights_that_would_get_one_name_are_refused(tmp_path):
    tensors = {"w.weight_packed": packed(4, 16), "w.weight_scale": exponents(4, 1)}
    tensors |= {"w._weight_qdata": finite_codes(4, 16), "w._weight_scale": rand(4, 1)}
    complaint, config = "becomes w.weight, which exists too", ct_config(num_bits=4)
    assert_refused(tmp_path, tensors, complaint, config=config)


def test_bytes_that_a_note_explains_are_refused_without_their_scale(tmp_path):
    tensors = {"l.weight": packed(4, 16), "l.comfy_quant": note(format="float8_e4m3fn")}
    assert_refused(tmp_path, tensors, "l.weight (U8")


def test_quantization_of_no_known_kind_is_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "mystery"}}
    complaints = "quant_method mystery", "l.blob (U8)"
    assert_refused(tmp_path, {"l.blob": packed(4, 4)}, *complaints, config=config)


@pytest.mark.parametrize("scale", ["a.weight_scales", "a.scales", "a.weight._scale"])
def test_weight_with_a_scale_of_unknown_name_is_not_cast(tmp_path, scale):
    tensors = {"a.weight": finite_codes(4, 4), scale: rand(4, 1)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors})
    message = re.escape(f"a.weight (F8_E4M3, beside {scale}) looks quantized")
    with pytest.raises(CheckpointError, match=message):
        main(tmp_path / "in", tmp_path / "out", missing_scale="cast")
    assert not (tmp_path / "out").exists()


def test_grid_that_two_block_sizes_of_the_config_fit_is_refused(tmp_path):
    tensors = {"w.weight": finite_codes(192, 128), "w.weight_scale": rand(2, 1)}
    config = {
        "text_config": {"quantization_config": {"weight_block_size": [96, 128]}},
        "quantization_config": {"weight_block_size": [128, 128]},
    }
    assert_refused(tmp_path, tensors, "two grids fit", config=config)


@pytest.mark.parametrize("size", ["1" * 5000 + "x1", [10**30, 128], [0, 0], [True], "x", None, {}])
def test_block_sizes_that_cannot_be_meant_are_ignored(tmp_path, size):
    codes, scale = finite_codes(200, 100), rand(2, 1)
    config = {"quantization_config": {"weight_block_size": size, "block_structure": size}}
    tensors = {"w.weight": codes, "w.weight_scale_inv": scale}
    convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale)}, config)


def test_exponents_of_a_plain_weight_are_refused(tmp_path):
    tensors = {"a.weight": rand(3, 3), "a.scale": exponents(1, 1, dtype=E8M0)}
    assert_refused(tmp_path, tensors, "a.scale (F8_E8M0) looks quantized")


def test_parameter_beside_a_rival_scale_is_kept_whatever_its_modules_are_called(tmp_path):
    codes, scale, parameter = finite_codes(4, 4), rand(1, 1), rand(4)
    name = "weight_net.l."
    tensors = {f"{name}weight": codes, f"{name}weight_scale": scale, f"{name}scale": parameter}
    expected = {f"{name}weight": dequantized(codes, scale, (4, 4)), f"{name}scale": parameter}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    convert(tmp_path, tensors, expected, config)


def test_fp8_tensor_that_serves_no_weight_is_refused_rather_than_left(tmp_path):
    tensors = {"a.input_scale": finite_codes(3), "b.weight": finite_codes(4, 4)}
    assert_refused(tmp_path, tensors, "a.input_scale (F8_E4M3) looks quantized")


def test_fp8_weight_whose_name_ends_in_inv_is_a_weight(tmp_path):
    codes, scale = finite_codes(4, 4), rand(1)
    tensors = {"conv_inv": codes, "conv_inv_scale_inv": scale}
    convert(tmp_path, tensors, {"conv_inv": dequantized(codes, scale.view(1, 1), (4, 4))})


def test_odd_packed_width_is_refused(tmp_path):
    raw = {"w.weight": ("F4", [2, 3], torch.zeros(3, dtype=PACKED))}
    raw["w.scale"] = ("F8_E8M0", [2, 1], exponents(2, 1))
    write_raw(tmp_path / "in/model.safetensors", raw)
    (tmp_path / "in/config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"w.weight is \[2, 3\] \(E2M1"):
        main(tmp_path / "in", tmp_path / "out")
