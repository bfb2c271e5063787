"""The table of formats: how each writer names, packs and scales its weights.

The oracle is torch's float8 cast (or a table of FP4 values, or a nibble's integer) in float32,
times the scale spread over its block with repeat_interleave, rounded to BF16 once. Titles are those
of FORMATS; every row has at least one layout here.
"""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch

import checkpoints as c
import fp8_cast_bf16
from checkpoints import at, dequantized, exponents, finite_codes, method, packed, powers, rand
from fp8_cast_bf16 import main

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BF16, I8, I32, I64, U8 = torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL = {"strategy": "channel", "group_size": None}
CT_TITLE = "compressed-tensors, ModelOpt, fbgemm, Quark, auto-round, AutoFP8"
SCALES = rand(2, 2)


def int4_config(**weights):
    # What else has bits in such a config says nothing of the weights.
    group = {"weights": {**INT4, **weights}, "input_activations": {"num_bits": 8}}
    cache = {"num_bits": 8, "type": "float"}
    return method("compressed-tensors", format="pack-quantized", config_groups={"a": group},
                  kv_cache_scheme=cache)


def quark(**weight):
    """Return a config of Quark with MXFP4 for all layers but q_proj."""
    fp4_spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    layers = {"*q_proj": {"weight": weight, "input_tensors": {"group_size": 128}}}
    return method("quark", layer_quant_config=layers if weight else {},
                  global_quant_config={"weight": fp4_spec, "input_tensors": fp4_spec})


@dataclass(frozen=True)
class Layout:
    """files: JSON beside the shard. left: what config.json or params.json is in the output."""

    title: str
    kind: str
    tensors: dict
    expected: dict
    config: dict | None = None
    files: dict = field(default_factory=dict)
    left: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


def single(title, kind, value, config=None, **leaves):
    """Return a layout of one weight."""
    return Layout(title, kind, at("l", **leaves), {"l.weight": value}, config)


def layouts():
    """Yield a layout for each way in which a writer stores weights that a row describes."""
    codes, wide, block = finite_codes(50, 60), finite_codes(200, 300), rand(2, 3)
    scalar, row = rand(), rand(50, 1)
    tensor, rows = dequantized(codes, scalar.view(1, 1), (50, 60)), dequantized(codes, row, (1, 60))

    # ModelCloud/GPTQModel nn_modules/qlinear/fp8.py, quantize_fp8_weight: 448 / absmax.
    for dtype in (E4M3, E5M2):
        given = finite_codes(200, 300, dtype=dtype)
        for shape, high, broad in (((), 200, 300), ((200,), 1, 300), ((2, 3), 100, 100)):
            scale = 448 / rand(*shape)
            spread = scale.view(200 // high, -1).repeat_interleave(high, 0)
            value = c.canonical((given.float() / spread.repeat_interleave(broad, 1)).bfloat16())
            config = method("fp8", weight_scale_semantics="inverse", weight_block_size=[100, 100])
            yield single("GPTQModel", f"{[*shape]} {dtype}", value, config, weight=given,
                         weight_scale_inv=scale)

    title = "DeepSeek-V3, Kimi-K2, Qwen3, GLM-5, MiniMax, Mistral"
    every, grid, plural = finite_codes(4, 150, 130), rand(4, 2, 2), rand(4, 1, 1)
    yield single(title, "blocks", dequantized(wide, block), c.CONFIG, weight=wide,
                 weight_scale_inv=block)
    yield Layout(title, "Step-3.5, fused experts",  # transformers before 5.0 has the plural
                 {**at("moe.up_proj", weight=every, weight_scale_inv=grid), "e.gate_up_proj": every,
                  "e.gate_up_proj_scales_inv": plural, "e.gate_up_proj_activation_scale": rand(4)},
                 {"moe.up_proj.weight": dequantized(every, grid),
                  "e.gate_up_proj": dequantized(every, plural, (150, 130))})
    yield Layout(title, "a name in inv", {"conv_inv": codes, "conv_inv_scale_inv": scalar},
                 {"conv_inv": tensor})
    # XiaomiMiMo/MiMo-V2.5: blocks start anew in each tensor-parallel slice
    for high, scale_rows, parts in ((13568, 108, 4), (27136, 216, 8), (14848, 116, 1)):
        given, scale = finite_codes(high, 256), rand(scale_rows, 2)
        pieces = zip(given.chunk(parts), scale.chunk(parts), strict=True)
        value = torch.cat([dequantized(*piece) for piece in pieces])
        yield Layout(title, f"MiMo qkv_proj in {parts} slices", at(
            "qkv_proj", weight=given, weight_scale_inv=scale), {"qkv_proj.weight": value}, c.CONFIG)
    given, raw = c.every_code(50, 96), exponents(50, 3)
    value = dequantized(given, powers(raw), (1, 32))
    config = method("mxfp8", weight_block_size=[1, 32])
    for dtype in (U8, E8M0):
        yield single(title, f"MXFP8 {dtype}", value, config, weight=given,
                     weight_scale_inv=raw.view(dtype))
        yield single(CT_TITLE, f"MXFP8 {dtype}", value, config, weight=given,
                     weight_scale=raw.view(dtype))

    for inner in (40, 64):  # a square down_proj shows nothing in its shapes
        up, down = finite_codes(2, 64, 2 * inner), finite_codes(2, inner, 64)
        up_scale, scale = rand(2, 1, 2 * inner), rand(2, 64, 1)
        yield Layout("Llama 4 (fbgemm)", f"{inner} columns", {
            **at("e", gate_up_proj=up, gate_up_proj_scale=up_scale),
            **at("e", down_proj=down, down_proj_scale=scale)},
                     {"e.gate_up_proj": dequantized(up, up_scale, (64, 1)),
                      "e.down_proj": dequantized(down, scale.transpose(1, 2), (inner, 1))},
                     method("fbgemm_fp8"))

    for dtype in (BF16, torch.float32):
        for shape, size, weights in (
                ((1,), (200, 300), {"strategy": "tensor"}), ((), (200, 300), {}),
                ((200, 1), (1, 300), {"strategy": "channel"}),
                ((200, 3), (1, 128), {"group_size": 128}), ((200, 4), (1, 96), {"group_size": 96}),
                ((2, 3), (128, 128), {"block_structure": [128, 128]}),
                ((4, 5), (50, 64), {"block_structure": "50x64"})):
            scale = rand(*shape, dtype=dtype)
            value = dequantized(wide, scale.view(-(-200 // size[0]), -1), size)
            kept = {"k_proj.output_scale": rand(1), "lm_head.weight": rand(4, 4, dtype=BF16)}
            # `ignore` names a module that is FP8 on disk: dtypes count, not lists.
            config = c.ct_config(**weights)
            config["quantization_config"]["ignore"] = ["lm_head", "re:.*q_proj"]
            yield Layout(CT_TITLE, f"{shape} {dtype}",
                         {**at("q_proj", weight=wide, weight_scale=scale, input_scale=rand(1),
                               weight_zero_point=torch.zeros(shape).to(E4M3)), **kept},
                         {"q_proj.weight": value, **kept}, config)
    given, scale = finite_codes(300, 100), rand(3, 1)
    yield single(CT_TITLE, "one column of blocks", dequantized(given, scale), c.ct_config(
        strategy="block"), weight=given, weight_scale=scale)
    cache = at("a.attn", v_scale=rand(1), q_scale=rand(), prob_scale=rand(), kv_scale=rand(1))
    yield Layout(CT_TITLE, "AutoFP8, ModelOpt with a cache", cache | at(
        "k_proj", weight=codes, weight_scale=scalar, input_scale=rand(), k_scale=rand()),
        {"k_proj.weight": tensor}, method("modelopt", kv_cache_quant_algo="FP8"))
    given, channel, axes = finite_codes(300, 200), rand(300), rand(3, 1, 2, 1)
    config = method("modelopt", config_groups={"a": {"weights": {"group_size": 16}}})
    yield single(CT_TITLE, "ModelOpt channel", dequantized(given, channel.view(-1, 1), (1, 200)),
                 config, weight=given, weight_scale=channel)
    yield single(CT_TITLE, "ModelOpt 4-D blocks", dequantized(given, axes.view(3, 2)), config,
                 weight=given, weight_scale=axes)
    given = finite_codes(3, 80, 90)
    for shape, size in (((3,), (80, 90)), ((3, 80), (1, 90)), ((3, 90), (80, 1))):
        scale = rand(*shape)
        value = dequantized(given, scale.view(3, -(-80 // size[0]), -(-90 // size[1])), size)
        yield Layout(CT_TITLE, f"ModelOpt experts {shape}", at(
            "e", up_proj=given, up_proj_weight_scale=scale, up_proj_input_scale=rand(3)),
            {"e.up_proj": value})
    given, scale = finite_codes(4, 256, 384), rand(4, 2, 1, 3, 1)  # FP8_2D_BLOCKWISE
    yield Layout(CT_TITLE, "ModelOpt experts in 5-D blocks", at(
        "e", up_proj=given, up_proj_weight_scale=scale),
        {"e.up_proj": dequantized(given, scale.view(4, 2, 3))}, method("modelopt"))
    yield single(CT_TITLE, "fbgemm", rows, method("fbgemm_fp8"), weight=codes, weight_scale=row,
                 input_scale_ub=rand(1))
    given = finite_codes(50, 300)
    for count, size in ((1, (50, 300)), (50, (1, 300)), (150, (1, 128))):  # auto-round: flattened
        scale = rand(count, dtype=BF16)
        value = dequantized(given, scale.view(1, 1) if count == 1 else scale.view(50, -1), size)
        yield single(CT_TITLE, f"auto-round {count}", value, method("auto-round", group_size=128),
                     weight=given, weight_scale=scale, weight_zp=torch.zeros(1))
    given, scale = finite_codes(6, 5, 3, 3), rand(6)
    flat, shape = given.view(6, 45), (6, 5, 3, 3)
    yield single(CT_TITLE, "convolution by rows", weight=given, weight_scale=scale,
                 value=dequantized(flat, scale.view(6, 1), (1, 45)).view(shape))
    yield single(CT_TITLE, "convolution", dequantized(flat, scalar.view(1, 1), (6, 45)).view(shape),
                 weight=given, weight_scale=scalar)

    # deepseek-ai/DeepSeek-V4, with its engram tables and tensors that are called like scales
    raw, table, table_raw = exponents(7, 5, dtype=E8M0), finite_codes(99, 256), exponents(99, 8)
    given, expert = finite_codes(200, 160), packed(70, 48, dtype=I8)
    expert_raw, kept = exponents(70, 3, dtype=E8M0), {
        "ffn.gate.tid2eid": torch.arange(12).view(6, 2), "attn.attn_sink": rand(4),
        "hc_attn_scale": rand(3), "ffn.gate.bias": rand(4), "attn_norm.weight": rand(8, dtype=BF16)}
    yield Layout("DeepSeek-V4", "dense and engram",
                 {**at("wq_a", weight=given, scale=raw), **kept,
                  **at("engram.embed", weight=table, scale=table_raw.view(E8M0))},
                 {"wq_a.weight": dequantized(given, powers(raw), (32, 32)), **kept,
                  "engram.embed.weight": dequantized(table, powers(table_raw), (1, 32))},
                 {"expert_dtype": "fp4", **method("fp8", weight_block_size=[32, 32]),
                  "text_config": {"expert_dtype": "fp4", "dtype": "float8_e4m3fn"}},
                 left={"text_config": {"dtype": "bfloat16"}})
    yield Layout("experts of DeepSeek-V4 (MXFP4)", "I8",
                 {**at("experts.3.w1", weight=expert, scale=expert_raw), **kept},
                 {"experts.3.w1.weight": c.fp4(expert, powers(expert_raw), 32), **kept},
                 {"a": {"b": [{"expert_dtype": "fp4", "moe_quant_algo": "NVFP4"}]}, **c.CONFIG},
                 left={"a": {"b": [{}]}})
    for name in ("a.emb", "b.weight"):
        yield Layout("Fish Audio", name, {name: codes, f"{name}.scale": row[:, 0]}, {name: rows})
    yield Layout("Mistral consolidated", "scales of activations",
                 {**at("a.wq", weight=codes, qscale_weight=scalar, qscale_act=rand()),
                  "a.qscale_act": rand(), "a.q_fake_quantizer.qscale_act": rand()},
                 {"a.wq.weight": tensor},
                 files={"params.json": {"dim": 5, "quantization": {"qformat_weight": "fp8_e4m3"},
                                        "quantization_config": {}}}, left={"dim": 5})

    title, kept = "ComfyUI scaled, musubi-tuner", {"l.bias": rand(50, dtype=BF16)}
    yield Layout(title, "scaled_fp8",
                 {"scaled_fp8": torch.zeros(0).to(E4M3), **kept,
                  **at("l", weight=codes, scale_weight=scalar, scale_input=rand())},
                 {"l.weight": tensor, **kept}, options={"missing_scale": "error"})
    for dtype in (E4M3, E5M2):  # kohya-ss/musubi-tuner modules/fp8_optimization_utils.py
        given = finite_codes(50, 192, dtype=dtype)
        for size in (16, 64):
            scale = rand(50, 192 // size, 1)
            yield single(title, f"blocks of {size} {dtype}", dequantized(
                given, scale[..., 0], (1, size)), weight=given, scale_weight=scale)
    second = torch.tensor(0.0123)
    yield single(title, "second scale", dequantized(given, scale[..., 0] * second, (1, 64)),
                 weight=given, scale_weight=scale, scale_weight_tensor=second)

    yield single("torchao", "rows", rows, _weight_qdata=codes, _weight_scale=row)
    yield single("torchao", "tensor", tensor, _weight_qdata=codes, _weight_scale=scalar.view(1, 1),
                 _weight_zero_point=torch.zeros(1))
    for size in (1, 52):  # prototype/safetensors: PerRow of 3-D weights keeps a last axis of 1
        given, scale = finite_codes(3, 52, 40), rand(3, 52 // size, 1)
        yield Layout("torchao", f"experts, {size} rows", at(
            "e", _up_proj_qdata=given, _up_proj_scale=scale),
            {"e.up_proj": dequantized(given, scale, (size, 40))}, method("torchao"))
    given, raw = finite_codes(30, 96), exponents(30, 3, dtype=E8M0)
    yield single("torchao", "MXFP8", dequantized(given, powers(raw), (1, 32)), method("torchao"),
                 _weight_qdata=given, _weight_scale=raw)
    parts, short = {f"t.shard_{i}.weight": codes.roll(i) for i in range(3)}, rand(1, dtype=BF16)
    yield Layout("Qwen3.8 n-gram tables", "three shards", {**parts, "t.weight_scale": short}, {
        name: dequantized(part, short.view(1, 1), (50, 60)) for name, part in parts.items()})
    yield from stacked_experts()

    given = c.every_code(130, 140)
    yield Layout("FP8 as bytes", "the ancestor's demo", {
        "weight_1": given.view(U8), "weight_1_scale_inv": SCALES, **kept},
        {"weight_1": dequantized(given, SCALES), **kept})
    for title, dtype in (("ComfyUI, E4M3 by note", E4M3), ("ComfyUI, E5M2 by note", E5M2)):
        given = c.every_code(50, 60, dtype)
        yield single(title, "bytes", dequantized(given, scalar.view(1, 1), (50, 60)), None,
                     weight=given.view(U8), weight_scale=scalar,
                     comfy_quant=c.note(format=f"{dtype}"[6:]))

    given, row_scale = c.every_code(200, 160, I8), rand(200, 1)
    value = dequantized(given, row_scale, (1, 160))
    yield single("INT8 in blocks", "128x128", dequantized(given, SCALES), method("blockwise_int8"),
                 weight=given, weight_scale_inv=SCALES)
    for name in ("compressed-tensors", "w8a8_int8", "quark", "modelopt"):
        yield single("INT8 of compressed-tensors, w8a8, Quark, ModelOpt", name, value, method(name),
                     weight=given, weight_scale=row_scale)
    yield single("INT8 of lmdeploy", "rows", value, method("smooth_quant"), weight=given,
                 scale=row_scale)
    yield single("INT8 of torchao", "rows", value, method("torchao"), _weight_qdata=given,
                 _weight_scale=row_scale)
    yield from small_floats()
    yield from integers()
    given = {"a": c.every_code(16, 16), "b.weight": c.every_code(16, 16, E5M2)}
    yield Layout("plain FP8 cast", "E4M3 and E5M2", given,
                 {name: c.canonical(t.float().bfloat16()) for name, t in given.items()},
                 options={"missing_scale": "cast"})


def stacked_experts():
    """Yield what transformers 5.24 saves of Qwen3-MoE and Mixtral under FineGrainedFP8Config."""
    # With 192, a block of the stacked grid holds rows of gate and of up. What the block size does
    # not divide stays BF16 (integrations/finegrained_fp8.py), but its scale, which nothing has
    # filled, is written. Versions after 5.24 quantize it, with a ragged last block.
    for place, names in (("mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
                         ("block_sparse_moe.experts", ["w1", "w3", "w2"])):
        for inner in (128, 192, 200):
            gate, up = (finite_codes(2, inner, 256, seed=seed) for seed in (1, 2))
            down, scale = finite_codes(2, 256, inner), rand(2, -(-2 * inner // 128), 2)
            down_scale = rand(2, 2, -(-inner // 128))
            values = [*dequantized(torch.cat([gate, up], 1), scale).split(inner, 1),
                      dequantized(down, down_scale)]
            if inner == 192:
                down, down_scale = values[2], torch.full_like(down_scale, torch.nan)
            tensors = at(place, gate_up_proj_scale_inv=scale, down_proj_scale_inv=down_scale)
            expected = {}
            for name, given, value in zip(names, [gate, up, down], values, strict=True):
                tensors |= {f"{place}.{i}.{name}.weight": given[i] for i in range(2)}
                expected |= {f"{place}.{i}.{name}.weight": value[i] for i in range(2)}
            yield Layout("experts saved by transformers 5", f"{place} {inner}", tensors, expected,
                         method("fp8", weight_block_size=[128, 128]))


def small_floats():
    """Yield MXFP4 and NVFP4."""
    given, raw = packed(30, 48), exponents(30, 3)
    value, dense, scale = c.fp4(given, powers(raw), 32), finite_codes(256, 256), SCALES
    both = {"l.weight": value, "q_proj.weight": dequantized(dense, scale)}
    yield single("MXFP4 of torchao", "plain", value, method("torchao"), _weight_qdata=given,
                 _weight_scale=raw.view(E8M0))
    # intel/auto-round missing_tensors.py: what a layer of 16 bits says is of no weight.
    extra = {"mtp.fc": {"bits": 16, "data_type": "fp"}}
    for config in (c.ct_config(num_bits=4),
                   method("auto-round", data_type="mx_fp", extra_config=extra)):
        name = config["quantization_config"]["quant_method"]
        yield single("compressed-tensors MXFP4", name, value, config, weight_packed=given,
                     weight_scale=raw)
    experts = at("l", weight=given, weight_scale=raw)
    # radixark/miles tools/convert_mimo_v2_to_bf16.py
    yield Layout("experts of MiMo-V2.5 and V2.6 (MXFP4)", "beside FP8 blocks",
                 experts | at("q_proj", weight=dense, weight_scale_inv=scale), both,
                 {"quantization_config": {**c.FP8_CONFIG, "store_dtype": "mxfp4"}})
    # amd/GLM-5.3-Quark-MXFP4-AttnFP8: vllm-project/vllm 54556, sgl-project/sglang 38998
    tensors = experts | at("q_proj", weight=dense, weight_scale=scale)
    block = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 128]}
    title = "MXFP4 of Quark and ModelOpt"
    yield Layout(title, "Quark beside FP8 blocks", tensors, both, quark(**block))
    yield single(title, "ModelOpt", value, method("modelopt"), weight=given, weight_scale=raw)
    # aiter 2318, vllm quark.py: with the group size, blocks of 64 would be refused; with the dtype,
    # the FP4 weights.
    fine = rand(4, 4)
    other = {"dtype": "fp6_e2m3", "scale_format": "e5m3", "group_size": 16, "block_size": [9, 9]}
    for place in ("input_tensors", "output_tensors", "input_activations", "kv_cache_quant_config"):
        config = method("quark", global_quant_config={"weight": {"dtype": "fp4"}, place: [other]})
        yield Layout(title, f"other {place}", tensors | {"q_proj.weight_scale": fine},
                     both | {"q_proj.weight": dequantized(dense, fine, (64, 64))}, config)

    factor, divisor = torch.tensor(0.0123), torch.tensor([777.0])
    given, scale, value = c.nvfp4(factor)
    yield single("NVFP4 of torchao", "plain", value, method("torchao"), _weight_qdata=given,
                 _weight_scale=scale, _weight_per_tensor_scale=factor)
    tensors = at("l", weight=given, weight_scale=scale, weight_scale_2=factor, input_scale=rand())
    title, sidecar = "NVFP4 of ModelOpt and Quark", {"quant_algo": "NVFP4", "group_size": 16}
    for name in ("modelopt", "quark"):
        yield Layout(title, name, tensors, {"l.weight": value}, method(name))
    for producer in ({"producer": {"name": "shared-scales-nvfp4"}}, {}):
        files = {"hf_quant_config.json": {**producer, "quantization": sidecar}}
        yield Layout(title, f"only hf_quant_config {producer}", tensors, {"l.weight": value},
                     {"hidden_size": 80}, files, left={"hidden_size": 80})
    # nvidia/DeepSeek-V4-*-NVFP4: two files name a method each
    expert, raw = packed(70, 48, dtype=I8), exponents(70, 3, dtype=E8M0)
    yield Layout(title, "and MXFP4 of DeepSeek-V4", tensors | at("mtp", weight=expert, scale=raw),
                 {"l.weight": value, "mtp.weight": c.fp4(expert, powers(raw), 32)}, c.CONFIG,
                 {"hf_quant_config.json": {"quantization": {"quant_algo": "MIXED_PRECISION"}}})
    # transformers FineGrainedWeightGlobals: one second scale for gate's rows, one for up's
    for second, wide in ((s := rand(3), s.view(3, 1, 1)),
                         (s := rand(3, 2), s.repeat_interleave(13, 1)[..., None])):
        experts, expert_scale, values = c.nvfp4(wide, rows=(3, 26))
        yield Layout(title, f"experts {[*second.shape]}",
                     at("e", up_proj=experts, up_proj_weight_scale=expert_scale,
                        up_proj_weight_scale_2=second, up_proj_input_scale=rand(3)),
                     {"e.up_proj": values}, method("modelopt", quant_algo="NVFP4"))
    w4a8, w4a8_scale, w4a8_value = c.nvfp4(factor, group=32)
    algorithm = {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}
    for config, files in ((method("modelopt", **algorithm), {}),
                          (None, {"hf_quant_config.json": {"quantization": algorithm}})):
        yield Layout("ModelOpt W4A8_NVFP4_FP8", f"{[*files]}", at(
            "l", weight=w4a8, weight_scale=w4a8_scale, weight_scale_2=factor),
            {"l.weight": w4a8_value}, config, files)
    # transformers integrations/finegrained/conversions.py: global = amax / (6 * 448)
    yield single("transformers NVFP4", "a factor", value, method("nvfp4"), weight=given,
                 weight_scale_inv=scale, weight_global_scale=factor, input_global_scale=rand(1))
    given, scale, value = c.nvfp4(divisor, divide=True)
    tensors = at("l", weight_packed=given, weight_scale=scale, weight_global_scale=divisor)
    title, config = "compressed-tensors NVFP4", c.ct_config(num_bits=4, group_size=16)
    yield Layout(title, "a divisor", {**tensors, "l.input_global_scale": rand(1)},
                 {"l.weight": value}, config)
    # vllm-project/vllm 16803: releases by Mistral itself in compressed-tensors
    files = {"params.json": {"dim": 80, "quantization": config["quantization_config"]}}
    yield Layout(title, "params.json", tensors, {"l.weight": value}, None, files, left={"dim": 80})
    # vllm-project/vllm models/inkling/nvidia and tests/models/inkling: parameters are called
    # w13_weight; the gate's global_scale is one; only hf_quant_config.json names the method.
    kept = at("gate", weight=rand(7, 8, dtype=BF16), global_scale=rand(1), bias=rand(5))
    second, files = rand(3), {"hf_quant_config.json": {"quantization": sidecar}}
    given, scale, value = c.nvfp4(second.view(3, 1, 1), rows=(3, 20))
    yield Layout("Inkling NVFP4", "the vendor's", {"e.w13_weight": given, **kept, **at(
        "e.w13_weight", scale=scale, scale2=second, input_amax=rand(1),
        original_shape=torch.tensor(value.shape))}, {"e.w13_weight": value, **kept}, None, files)
    second = 500 * rand(3, 1)
    given, scale, value = c.nvfp4(second.view(3, 1, 1), True, (3, 20))
    for prefix in ("experts.w2_weight.", "experts.w2_"):  # wrapped in a module of its name, or not
        names = (f"{prefix}{end}" for end in (
            "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))
        tensors = dict(zip(names, (given, scale, second, second), strict=True))
        yield Layout(title, f"Inkling, {prefix}", tensors, {"experts.w2_weight": value}, config)


def integers():
    """Yield INT4."""
    # sgl-project/sglang layers/quantization/w4afp8.py; NVIDIA/TensorRT-LLM
    # pack_int8_tensor_to_packed_int4: the low nibble comes first, and the sign is extended.
    given, scale, dense = packed(70, 192, dtype=I8), rand(70, 3), finite_codes(200, 160)
    value = dequantized((c.nibbles(given) ^ 8) - 8, scale, (1, 128))
    yield Layout("W4AFP8", "experts beside FP8",
                 {**at("l", weight=given, weight_scale_inv=scale, input_scale=rand(1)),
                  **at("q_proj", weight=dense, weight_scale_inv=SCALES)},
                 {"l.weight": value, "q_proj.weight": dequantized(dense, SCALES)}, method("w4afp8"))
    # vllm-project/compressed-tensors compressors/pack_quantized: element i is bits 4i..4i+3 of the
    # row, plus 8; THUDM/slime tools/convert_k2_thinking_int4_to_bf16.py multiplies in float32.
    # Kimi-K2-Thinking holds weight_shape in I32, current writers in I64.
    for dtype in (I32, I64):
        for columns, group, weights in ((96, 32, {}), (24, 8, {"group_size": 8}), (96, 96, CHANNEL),
                                        (43, 43, CHANNEL),
                                        (36, 12, {"group_size": 12, "actorder": "weight"})):
            words, codes = c.int4(30, columns)
            scale, order = rand(30, columns // group, dtype=BF16), torch.arange(columns) // group
            yield Layout("Kimi-K2-Thinking, compressed-tensors INT4", f"{columns}/{group} {dtype}",
                         at("l", weight_packed=words, weight_scale=scale,
                            weight_shape=torch.tensor([30, columns], dtype=dtype),
                            weight_g_idx=order if columns == 96 else None),
                         {"l.weight": dequantized(codes, scale, (1, group))},
                         {"text_config": int4_config(**weights)},  # as in Kimi-K2.5
                         left={"text_config": {}})


LAYOUTS = [*layouts()]


def write_files(source, layout):
    for name, value in layout.files.items():
        c.write_json(source / name, value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"{x.title}: {x.kind}" for x in LAYOUTS])
def test_each_layout_of_the_table_is_converted(tmp_path, monkeypatch, layout):
    if sum(tensor.nbytes for tensor in layout.expected.values()) < 1 << 20:
        monkeypatch.setattr("fp8_cast_bf16.WINDOW", 12 << 10)
    write_files(tmp_path / "in", layout)
    c.convert(tmp_path, c.fresh(layout.tensors), layout.expected, layout.config, **layout.options)
    names = {"config.json"} if layout.config else {*layout.files} & {"params.json"}
    texts = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    assert {*texts} == names  # No other config tells of a quantization any more.
    assert all(json.loads(text) == layout.left for text in texts.values())


def test_every_row_of_the_table_has_a_layout():
    rows = {row.title for row in fp8_cast_bf16.FORMATS} | {"plain FP8 cast"}
    assert {layout.title for layout in LAYOUTS} == rows


# Those that hold no FP8 weight, which needs no config.
OTHERS = {x.title: x for x in LAYOUTS if (x.config or x.files) and not any(
    t.dtype in (E4M3, E5M2) for name, t in x.tensors.items() if "scale" not in name)}


@pytest.mark.parametrize("config", [None, c.CONFIG, method("gptq"), method("bitnet")])
@pytest.mark.parametrize("layout", OTHERS.values(), ids=OTHERS)
def test_bytes_and_integers_need_a_method_that_names_their_format(tmp_path, layout, config):
    if config == c.CONFIG and layout.title == "experts of DeepSeek-V4 (MXFP4)":
        pytest.skip("fp8 is its method")
    message = c.assert_refused(tmp_path, c.fresh(layout.tensors), config=config)
    assert any(name in message for name in layout.tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [16 << 20, 4096])
def test_gpu_and_cpu_write_the_same_bytes(tmp_path, monkeypatch, window):
    monkeypatch.setattr("fp8_cast_bf16.WINDOW", window)
    for number, layout in enumerate({x.title: x for x in LAYOUTS}.values()):
        source = tmp_path / str(number) / "in"
        write_files(source, layout)
        c.write_checkpoint(source, {c.SHARD: c.fresh(layout.tensors)}, layout.config, index=False)
        for device in ("cpu", "cuda"):
            main(source, source.parent / device, device=device, **layout.options)
        assert c.contents(source.parent / "cuda") == c.contents(source.parent / "cpu")


# --- weights, and the grids of their scales ---

GRIDS = {  # By the shape of codes and that of their scales: rows and columns that share a scale.
    (130, 300): {(): (130, 300), (1,): (130, 300), (1, 1): (130, 300), (130,): (1, 300),
                 (130, 1): (1, 300), (1, 300): (130, 1), (2, 3): (128, 128), (5, 10): (32, 32),
                 (130, 10): (1, 32)},
    (3, 140, 200): {(3,): (140, 200), (3, 1): (140, 200), (3, 1, 1): (140, 200), (1,): (140, 200),
                    (3, 140, 1): (1, 200), (3, 1, 200): (140, 1), (3, 2, 2): (128, 128)},
    (576, 256): {(5, 2): (128, 128)}, (192, 128): {(2, 1): (128, 128)},
    (256, 256): {(4, 4): (64, 64)}, (1, 140, 200): {(2, 2): (128, 128)},
    (140, 200): {(1, 2, 2): (128, 128)}, (300,): {(1,): (1, 300)},
}


@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("shape, scale_shape, block", [
    (shape, *grid) for shape, grids in GRIDS.items() for grid in grids.items()])
def test_shape_of_the_scales_decides_the_grid(tmp_path, shape, scale_shape, block, scale_dtype):
    codes, scale = finite_codes(*shape), rand(*scale_shape, dtype=scale_dtype)
    rows = -(-codes.shape[-2] // block[0]) if codes.dim() > 1 else 1
    experts = scale.numel() // (rows * -(-codes.shape[-1] // block[1]))
    wide = scale.view(experts, rows, -1)
    expected = dequantized(codes.view(-1, *codes.shape[-2:]), wide, block).view(shape)
    c.convert(tmp_path, {"w": codes, "w_scale_inv": scale}, {"w": expected})


SQUARE = finite_codes(256, 256)
HADAMARD = {"type": "hadamard", "apply": [{"targets": ["L"], "location": "weight_output"}]}
ROWS = torch.arange(256) // 64
READ = [  # a fact, the block size that counts for SQUARE, its scales and side tensors, and a config
    ("blocks of a config at any depth", (96, 100), {"weight_scale_inv": rand(3, 3)},
     {"text_config": {"quantization_config": {"weight_block_size": [96, 100]}}}),
    *[("blocks that cannot be meant", (128, 128), {"weight_scale_inv": SCALES},
       method("fp8", weight_block_size=size, block_structure=size))
      for size in ("1" * 5000 + "x1", [10**30, 128], [0, 0], [True], "x", None, {})],
    *[(f"groups of {cols} beside blocks", (1, cols), {"weight_scale_inv": rand(256, 256 // cols)},
       c.CONFIG) for cols in (16, 32, 128, 256)],
    ("two scales, of which the method means one", (256, 256),
     {"weight_scale_inv": rand(1, 1), "weight_scale": rand(1)}, method("fp8")),
    ("a rotation that is in the weights", (256, 256), {"weight_scale": rand(1, 1)},
     {"quantization_config": {"transform_config": {"config_groups": {"R1": HADAMARD}}}}),
    *[(f"ordered groups {order.dtype}", (1, 64), {"weight_scale": rand(256, 4),
                                                  "weight_g_idx": order},
       c.ct_config(strategy="group", group_size=64)) for order in (ROWS, ROWS.int())],
]


@pytest.mark.parametrize("fact, block, sides, config", READ)
def test_grid_is_the_one_that_the_config_means(tmp_path, fact, block, sides, config):
    scale = next(iter(sides.values()))
    c.convert(tmp_path, c.fresh(at("l", weight=SQUARE, **sides)),
              {"l.weight": dequantized(SQUARE, scale, block)}, config)


def mimo(names):
    """Return K and V of MiMo-V2-Flash. 320 rows of each head are one matrix, so the first half of a
    head of V takes the second scale of its K; alone, V would fit 128x128 (sgl-project/sglang-jax
    969, vllm-project/vllm 57508).
    """
    tensors = {"k": (finite_codes(768, 256), rand(8, 2)), "v": (finite_codes(512, 256), rand(4, 2))}
    return {f"{name}_proj.{leaf}": tensor for name in names for leaf, tensor in zip(
        ("weight", "weight_scale_inv"), tensors[name], strict=True)}


def of_int4(**change):
    tensors = {"weight_packed": c.int4(30, 64)[0], "weight_scale": rand(30, 2),
               "weight_shape": torch.tensor([30, 64]), **change}
    return at("m.up", **tensors)


ROW_SCALES = rand(30, 1)
REFUSED = [  # tensors, a config, and what the message says
    *[(at("w", weight=SQUARE, weight_scale_inv=rand(*grid)), c.CONFIG,
       ["w.weight", "[256, 256]", str([*grid]), "128x128", "[2, 2]"])
      for grid in ((4, 4), (8, 8), (2, 4), (1, 2), (4, 8))],
    *[({"w": finite_codes(200, 300), "w_scale_inv": rand(*grid)},  # the first is cut off, as 1x32
       method("fp8", weight_block_size=[32, 32]),
       ["w is [200, 300]", f"w_scale_inv {[*grid]}", "32x32", "[7, 10]"])
      for grid in ((200, 10), (2, 3))],
    (at("w", weight=finite_codes(300, 300), weight_scale_inv=rand(7, 5)), None,
     ["w.weight is [300, 300]", "_scale_inv [7, 5]"]),
    ({"w": finite_codes(3, 3), "w_scale_inv": torch.ones(1, dtype=I64)}, None,
     ["w (F8_E4M3, beside w_scale_inv)"]),
    (at("w", weight=finite_codes(192, 128), weight_scale=rand(2, 1)),
     {"text_config": method("fp8", weight_block_size=[96, 128]), **c.CONFIG},
     ["w.weight is [192, 128]", "two grids"]),
    (at("o_proj", weight=finite_codes(1356, 128), weight_scale_inv=rand(12, 1)), {},  # no fused qkv
     ["o_proj.weight is [1356, 128]", "[12, 1]"]),
    *[(mimo(names), c.CONFIG, ["k_proj.weight is [768, 256]", "[8, 2]"]) for names in ("kv", "vk")],
    (at("e", w=finite_codes(3, 64, 64), w_weight_scale=rand(3, 64)), None,
     ["e.w is [3, 64, 64]", "[3, 64]", "two grids"]),
    *[(at("e", w=finite_codes(3, 140, 200), w_scale_inv=rand(*shape)), None,
       ["e.w is [3, 140, 200]", str([*shape])])
      for shape in ((2, 2), (3, 7, 2), (2, 3, 64, 1), (7,))],
    *[(at("w", weight=finite_codes(5, 8), weight_scale=rand(5, 2), weight_g_idx=torch.tensor(
        order, dtype=dtype)), c.ct_config(strategy="group", group_size=4), ["w.weight_g_idx"])
      for order in ([1, 0] * 4, [0] * 7 + [1]) for dtype in (I32, I64)],
    *[(at("w", weight=packed(4, 16), weight_scale=scale), None, ["w.weight", "w.weight_scale"])
      for scale in (torch.ones(4, 4, dtype=I32), packed(3, 1))],
    # packed integers that their config or their shape contradicts
    *[(of_int4(**change), int4_config(**weights), ["m.up.weight"]) for weights, change in (
        ({"num_bits": 8}, {"weight_shape": torch.tensor([30, 32]), "weight_scale": ROW_SCALES}),
        ({"num_bits": 8, **CHANNEL}, {"weight_scale": ROW_SCALES}),
        ({"num_bits": 8, "group_size": 16}, {"weight_shape": torch.tensor([30, 32])}),
        ({"num_bits": 2}, {"weight_shape": torch.tensor([30, 128])}),
        ({"symmetric": False}, {"weight_zero_point": torch.zeros(4, 2, dtype=I32)}),  # -8, packed
        ({}, {"weight_g_idx": (torch.arange(64) // 32).flip(0).int()}),
        *[({}, {"weight_shape": torch.tensor(shape)})
          for shape in ([30, 96], [30, 56], [31, 64], [64, 30])],
        (CHANNEL, {"weight_shape": torch.tensor([30, 65]), "weight_scale": ROW_SCALES}),
        ({}, {"weight_scale": rand(30, 3)}), ({}, {"weight_scale": ROW_SCALES}),
        ({"group_size": 128}, {"weight_scale": ROW_SCALES}))],
]


@pytest.mark.parametrize("tensors, config, words", REFUSED)
def test_scales_that_fit_no_grid_or_two_are_refused(tmp_path, tensors, config, words):
    c.assert_refused(tmp_path, c.fresh(tensors), *words, config=config)


def test_f4_dtype_counts_elements_not_bytes_and_its_width_is_even(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8_cast_bf16.WINDOW", 4096)
    codes, scale = packed(70, 64), exponents(70, 4)
    fine = {"e.weight": ("F4", [70, 128], codes), "e.scale": ("F8_E8M0", [70, 4], scale)}
    odd = {"e.weight": ("F4", [2, 3], packed(3, 1)), "e.scale": ("F8_E8M0", [2, 1], exponents(2))}
    c.write_json(tmp_path / "in/config.json", c.CONFIG)
    c.write_raw(tmp_path / "in" / c.SHARD, odd)
    c.assert_folder_refused(tmp_path / "in", "e.weight is [2, 3] (E2M1")
    c.write_raw(tmp_path / "in" / c.SHARD, fine)
    main(tmp_path / "in", tmp_path / "out")
    c.assert_holds(tmp_path / "out" / c.SHARD, {"e.weight": c.fp4(codes, powers(scale), 32)})
    c.assert_yields(tmp_path / "in", tmp_path / "out", workers=2)


@pytest.mark.parametrize("dtype", c.BITS)
def test_a_lone_tensor_is_kept_and_yielded_in_its_dtype_or_refused_for_it(tmp_path, dtype):
    c.write_raw(tmp_path / "in" / c.SHARD, {"t": (dtype, [8])})
    if dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        message = c.assert_folder_refused(tmp_path / "in", f"{tmp_path / 'in' / c.SHARD}: ")
        # An older safetensors does not know the dtype and refuses the file itself.
        assert re.search(rf"t \({dtype}\) looks quantized|not a whole safetensors file", message)
    else:
        main(tmp_path / "in", tmp_path / "out")
        c.assert_yields(tmp_path / "in", tmp_path / "out", missing_scale="keep")
        entry = c.header_of(tmp_path / "out" / c.SHARD)["t"]
        assert entry == {"dtype": dtype, "shape": [8], "data_offsets": [0, c.BITS[dtype]]}
