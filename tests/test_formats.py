"""Every family of quantized checkpoints on the hub: its own names, dtypes and shape relations.

The oracle is torch's float8 cast (or a table of FP4 values) in float32, times the scale spread over
its block with repeat_interleave, rounded to BF16.
"""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import (
    CONFIG,
    E8M0,
    INDEX,
    PACKED,
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
    nvfp4,
    packed,
    positive,
    powers,
    rand,
    write_checkpoint,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, main, make_plan
from fp8_cast_bf16 import load_checkpoint as load_headers
from make_checkpoint import deepseek_v3_tensors, make_layout


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
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
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


def test_shape_of_packed_weights_doubles_in_header_index_and_sizes(tmp_path):
    codes, scale = packed(10, 32, dtype=torch.int8), exponents(10, 2, dtype=E8M0)
    tensors = {"e.weight": codes, "e.scale": scale}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG)
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        assert shard.get_slice("e.weight").get_shape() == [10, 64]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 10 * 64 * 2


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


def test_comfyui_metadata_is_stripped(tmp_path):
    codes, scale = finite_codes(50, 60), rand()
    tensors = {"l.weight": codes, "l.weight_scale": scale}
    layers = {"layers": {"l": {"format": "float8_e4m3fn"}}}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/x.safetensors"
    save_file(tensors, path, metadata={"_quantization_metadata": json.dumps(layers), "kept": "1"})
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/x.safetensors", "pt") as shard:
        metadata = shard.metadata()
    assert metadata.pop("fp8_cast_bf16")
    assert metadata == {"format": "pt", "kept": "1"}


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
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    for window in (16 << 20, 4096):
        monkeypatch.setattr("fp8_cast_bf16.WINDOW", window)
        for device in ("cpu", "cuda"):
            main(tmp_path / "in", tmp_path / device, device=device)
        assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu")


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
        ("F6_E2M3", 6, "6-bit"),
        ("F6_E3M2", 6, "6-bit"),
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
    assert_refused(tmp_path, tensors, "l is in ComfyUI's format", format_name)


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


def test_config_that_outlived_its_quantization_is_cleaned(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": None}
    tensors = {"w.weight": rand(3, 3, dtype=torch.bfloat16)}
    convert(tmp_path, tensors, tensors, config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("scale", ["a.weight_scales", "a.scales", "a.weight._scale"])
def test_weight_with_a_scale_of_unknown_name_is_not_cast(tmp_path, scale):
    tensors = {"a.weight": finite_codes(4, 4), scale: rand(4, 1)}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors})
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
    assert_refused(tmp_path, tensors, "a.scale is F8_E8M0")


def test_parameter_beside_a_rival_scale_is_kept_whatever_its_modules_are_called(tmp_path):
    codes, scale, parameter = finite_codes(4, 4), rand(1, 1), rand(4)
    name = "weight_net.l."
    tensors = {f"{name}weight": codes, f"{name}weight_scale": scale, f"{name}scale": parameter}
    expected = {f"{name}weight": dequantized(codes, scale, (4, 4)), f"{name}scale": parameter}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    convert(tmp_path, tensors, expected, config)


def test_fp8_tensor_that_serves_no_weight_is_refused_rather_than_left(tmp_path):
    tensors = {"a.input_scale": finite_codes(3), "b.weight": finite_codes(4, 4)}
    assert_refused(tmp_path, tensors, "a.input_scale is F8_E4M3, but named like")


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


def test_plan_of_deepseek_v3_has_the_known_counts(tmp_path):
    """The figures of the release: 163 shards, 46,183 tensors, 45,808 of them dequantized."""
    make_layout(tmp_path, list(deepseek_v3_tensors()), 163)
    plan = make_plan(load_headers(tmp_path))
    steps = [*plan.steps]
    assert len(plan.shards) == 163
    assert len(steps) == 46_183
    assert sum(step.quantization is not None for step in steps) == 45_808
    with_f32_bias = sum(step.output.stop - step.output.start for step in steps) // 2
    assert with_f32_bias - 59 * 256 == 684_489_845_504  # values


def test_gguf_and_bin_checkpoints_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        main(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "in") == {"pytorch_model.bin": b"x"}
