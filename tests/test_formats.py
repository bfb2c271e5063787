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
from safetensors.torch import load_file

import checkpoints as c
import fp8_cast_bf16
from checkpoints import dequantized, exponents, finite_codes, method, packed, powers, rand
from fp8_cast_bf16 import CheckpointError, main

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
BF16, I8, I32, I64, U8 = torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8
CT, BLOCKS = "compressed-tensors", {"weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL = {"strategy": "channel", "group_size": None}


def at(module, **leaves):
    return {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items() if tensor is not None}


def one(scale):
    return scale.view(1, 1)


def fp4(codes, scale, group):
    return dequantized(c.fp4_values(codes), scale, (1, group))


def int4(rows, columns):
    """Return int32 words of eight codes each, and the integers in their first columns."""
    codes = packed(rows, 4 * -(-columns // 8))
    return codes.view(I32), c.nibbles(codes)[:, :columns] - 8


def int4_config(**weights):
    # What else has bits in such a config says nothing of the weights.
    group = {"weights": {**INT4, **weights}, "input_activations": {"num_bits": 8}}
    cache = {"num_bits": 8, "type": "float"}
    return method(CT, format="pack-quantized", config_groups={"a": group}, kv_cache_scheme=cache)


def quark(**weight):
    """Return a config of Quark with MXFP4 for all layers but q_proj."""
    fp4_spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    layers = {"*q_proj": {"weight": weight, "input_tensors": {"group_size": 128}}}
    return method("quark", layer_quant_config=layers if weight else {},
                  global_quant_config={"weight": fp4_spec, "input_tensors": fp4_spec})


def note(**entries):
    return torch.tensor([*json.dumps(entries).encode()], dtype=U8)


def nvfp4(experts, rows, second, group=16, divide=False):
    """Return packed experts, their E4M3 scales, and their values under second scales that broadcast
    to (experts, rows, 1).
    """
    codes = packed(experts * rows, 5 * group // 2).view(experts, rows, -1)
    scale = c.positive(finite_codes(experts, rows, 5))
    wide = scale.float() / second if divide else scale.float() * second
    return codes, scale, fp4(codes, wide, group)


@dataclass(frozen=True)
class Layout:
    title: str
    kind: str
    tensors: dict
    expected: dict
    config: dict | None = None
    files: dict = field(default_factory=dict)  # JSON beside the shard
    options: dict = field(default_factory=dict)


def layouts():
    """Yield a layout for each way in which a writer stores weights that a row describes."""
    codes, wide, block = finite_codes(50, 60), finite_codes(200, 300), rand(2, 3)
    scalar, row = rand(), rand(50, 1)
    tensor, rows = dequantized(codes, one(scalar), (50, 60)), dequantized(codes, row, (1, 60))

    # ModelCloud/GPTQModel nn_modules/qlinear/fp8.py, quantize_fp8_weight: 448 / absmax.
    for dtype in (E4M3, E5M2):
        given = finite_codes(200, 300, dtype=dtype)
        for kind, shape, (high, broad) in (("tensor", (), (200, 300)), ("row", (200,), (1, 300)),
                                           ("block", (2, 3), (100, 100))):
            scale = 448 / rand(*shape)
            spread = scale.view(-(-200 // high), -1).repeat_interleave(high, 0)
            value = c.canonical((given.float() / spread.repeat_interleave(broad, 1)).bfloat16())
            sizes = {"weight_block_size": [100, 100]} if kind == "block" else {}
            yield Layout("GPTQModel", f"{kind} {dtype}",
                         at("l", weight=given, weight_scale_inv=scale), {"l.weight": value},
                         method("fp8", weight_scale_semantics="inverse", **sizes))

    title = "DeepSeek-V3, Kimi-K2, Qwen3, GLM-5, MiniMax, Mistral"
    every, grid, plural = finite_codes(4, 150, 130), rand(4, 2, 2), rand(4, 1, 1)
    yield Layout(title, "blocks", at("l", weight=wide, weight_scale_inv=block),
                 {"l.weight": dequantized(wide, block)}, c.CONFIG)
    yield Layout(title, "Step-3.5, fused experts",  # transformers before 5.0 has the plural
                 {**at("moe.up_proj", weight=every, weight_scale_inv=grid), "e.gate_up_proj": every,
                  "e.gate_up_proj_scales_inv": plural, "e.gate_up_proj_activation_scale": rand(4)},
                 {"moe.up_proj.weight": dequantized(every, grid),
                  "e.gate_up_proj": dequantized(every, plural, (150, 130))})
    yield Layout(title, "a name that ends in inv",
                 {"conv_inv": codes, "conv_inv_scale_inv": scalar}, {"conv_inv": tensor})
    # XiaomiMiMo/MiMo-V2.5: blocks start anew in each tensor-parallel slice
    for high, scale_rows, parts in ((13568, 108, 4), (27136, 216, 8), (14848, 116, 1)):
        given, scale = finite_codes(high, 256), rand(scale_rows, 2)
        pieces = zip(given.chunk(parts), scale.chunk(parts), strict=True)
        yield Layout(title, f"MiMo qkv_proj in {parts} slices",
                     at("l.qkv_proj", weight=given, weight_scale_inv=scale),
                     {"l.qkv_proj.weight": torch.cat([dequantized(*piece) for piece in pieces])},
                     c.CONFIG)
    for name, dtype in (("weight_scale_inv", U8), ("weight_scale", U8),
                        ("weight_scale_inv", E8M0), ("weight_scale", E8M0)):
        given, raw = c.every_code(50, 96), exponents(50, 3, dtype=dtype)
        yield Layout(title if "inv" in name else CT_TITLE, f"MXFP8 {name} {dtype}",
                     at("l", **{"weight": given, name: raw}),
                     {"l.weight": dequantized(given, powers(raw), (1, 32))},
                     method("mxfp8", weight_block_size=[1, 32]))

    for inner in (40, 64):  # a square down_proj shows nothing in its shapes
        up, down = finite_codes(2, 64, 2 * inner), finite_codes(2, inner, 64)
        up_scale, scale = rand(2, 1, 2 * inner), rand(2, 64, 1)
        yield Layout("Llama 4 (fbgemm)", f"{inner} columns",
                     at("e", gate_up_proj=up, gate_up_proj_scale=up_scale, down_proj=down,
                        down_proj_scale=scale),
                     {"e.gate_up_proj": dequantized(up, up_scale, (64, 1)),
                      "e.down_proj": dequantized(down, scale.transpose(1, 2), (inner, 1))},
                     method("fbgemm_fp8"))

    for dtype in (BF16, torch.float32):
        for shape, size, weights in (
                ((1,), (200, 300), {"strategy": "tensor"}),
                ((), (200, 300), {"strategy": "tensor"}),
                ((200, 1), (1, 300), {"strategy": "channel"}),
                ((200, 3), (1, 128), {"strategy": "group", "group_size": 128}),
                ((200, 4), (1, 96), {"strategy": "group", "group_size": 96}),
                ((2, 3), (128, 128), {"strategy": "block", "block_structure": [128, 128]}),
                ((4, 5), (50, 64), {"strategy": "block", "block_structure": "50x64"})):
            scale = rand(*shape, dtype=dtype)
            value = dequantized(wide, scale.view(-(-200 // size[0]), -1), size)
            kept = {"k_proj.output_scale": rand(1), "lm_head.weight": rand(4, 4, dtype=BF16)}
            config = c.ct_config(**weights)
            # `ignore` names a module that is FP8 on disk: dtypes count, not lists.
            config["quantization_config"]["ignore"] = ["lm_head", "re:.*q_proj"]
            yield Layout(CT_TITLE, f"{shape} {dtype}",
                         {**at("q_proj", weight=wide, weight_scale=scale, input_scale=rand(1),
                               weight_zero_point=torch.zeros(shape).to(E4M3)), **kept},
                         {"q_proj.weight": value, **kept}, config)
    given, scale = finite_codes(300, 100), rand(3, 1)
    yield Layout(CT_TITLE, "one column of blocks", at("l", weight=given, weight_scale=scale),
                 {"l.weight": dequantized(given, scale)}, c.ct_config(strategy="block"))
    yield Layout(CT_TITLE, "AutoFP8, ModelOpt with a cache",
                 {**at("a.k_proj", weight=codes, weight_scale=scalar, input_scale=rand(),
                       k_scale=rand()), "a.kv_scale": rand(1),
                  **at("a.attn", v_scale=rand(1), q_scale=rand(), prob_scale=rand())},
                 {"a.k_proj.weight": tensor},
                 method("modelopt", quant_algo="FP8", kv_cache_quant_algo="FP8"))
    given, channel, axes = finite_codes(300, 200), rand(300), rand(3, 1, 2, 1)
    yield Layout(CT_TITLE, "ModelOpt per channel and in 4-D blocks",
                 {**at("a", weight=given, weight_scale=channel),
                  **at("b", weight=given, weight_scale=axes)},
                 {"a.weight": dequantized(given, channel.view(-1, 1), (1, 200)),
                  "b.weight": dequantized(given, axes.view(3, 2))},
                 method("modelopt", config_groups={"a": {"weights": {"group_size": 16}}}))
    given = finite_codes(3, 80, 90)
    for shape, size in (((3,), (80, 90)), ((3, 80), (1, 90)), ((3, 90), (80, 1))):
        scale = rand(*shape)
        value = dequantized(given, scale.view(3, -(-80 // size[0]), -(-90 // size[1])), size)
        yield Layout(CT_TITLE, f"ModelOpt experts {shape}",
                     at("e", up_proj=given, up_proj_weight_scale=scale,
                        up_proj_input_scale=rand(3)), {"e.up_proj": value})
    given, scale = finite_codes(4, 256, 384), rand(4, 2, 1, 3, 1)  # FP8_2D_BLOCKWISE
    yield Layout(CT_TITLE, "ModelOpt experts in 5-D blocks",
                 at("e", up_proj=given, up_proj_weight_scale=scale),
                 {"e.up_proj": dequantized(given, scale.view(4, 2, 3))}, method("modelopt"))
    yield Layout(CT_TITLE, "fbgemm",
                 at("l", weight=codes, weight_scale=row, input_scale_ub=rand(1)),
                 {"l.weight": rows}, method("fbgemm_fp8"))
    given = finite_codes(50, 300)
    for count, size in ((1, (50, 300)), (50, (1, 300)), (150, (1, 128))):  # auto-round: flattened
        scale = rand(count, dtype=BF16)
        value = dequantized(given, one(scale) if count == 1 else scale.view(50, -1), size)
        yield Layout(CT_TITLE, f"auto-round {count}",
                     at("l", weight=given, weight_scale=scale, weight_zp=torch.zeros(1)),
                     {"l.weight": value}, method("auto-round", group_size=128))
    given, scale = finite_codes(6, 5, 3, 3), rand(6)
    flat, shape = given.view(6, 45), (6, 5, 3, 3)
    yield Layout(CT_TITLE, "convolution", {**at("a", weight=given, weight_scale=scale),
                                           **at("b", weight=given, weight_scale=scalar)},
                 {"a.weight": dequantized(flat, scale.view(6, 1), (1, 45)).view(shape),
                  "b.weight": dequantized(flat, one(scalar), (6, 45)).view(shape)})

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
                 method("fp8", weight_block_size=[32, 32]))
    yield Layout("experts of DeepSeek-V4 (MXFP4)", "I8",
                 {**at("experts.3.w1", weight=expert, scale=expert_raw), **kept},
                 {"experts.3.w1.weight": fp4(expert, powers(expert_raw), 32), **kept}, c.CONFIG)
    yield Layout("Fish Audio", "embedding and weight",
                 {"a.emb": codes, "a.emb.scale": row[:, 0].clone(),
                  "b.weight": codes, "b.weight.scale": row[:, 0].clone()},
                 {"a.emb": rows, "b.weight": rows})
    name = "layers.0.attention"
    yield Layout("Mistral consolidated", "scales of activations",
                 {**at(f"{name}.wq", weight=codes, qscale_weight=scalar, qscale_act=rand()),
                  f"{name}.qscale_act": rand(), f"{name}.q_fake_quantizer.qscale_act": rand()},
                 {f"{name}.wq.weight": tensor},
                 files={"params.json": {"dim": 5, "quantization": {"qformat_weight": "fp8_e4m3"}}})

    title, kept = "ComfyUI scaled, musubi-tuner", {"l.bias": rand(50, dtype=BF16)}
    yield Layout(title, "scaled_fp8",
                 {"scaled_fp8": torch.zeros(0).to(E4M3), **kept,
                  **at("l", weight=codes, scale_weight=scalar, scale_input=rand())},
                 {"l.weight": tensor, **kept}, options={"missing_scale": "error"})
    for dtype in (E4M3, E5M2):  # kohya-ss/musubi-tuner modules/fp8_optimization_utils.py
        given = finite_codes(50, 192, dtype=dtype)
        for size in (16, 64):
            scale = rand(50, 192 // size, 1)
            yield Layout(title, f"blocks of {size} {dtype}",
                         {**at("l", weight=given, scale_weight=scale), **kept},
                         {"l.weight": dequantized(given, scale[..., 0], (1, size)), **kept})
    second = torch.tensor(0.0123)
    yield Layout(title, "second scale",
                 at("l", weight=given, scale_weight=scale, scale_weight_tensor=second),
                 {"l.weight": dequantized(given, scale[..., 0] * second, (1, 64))})

    one_by_one = rand(1, 1)
    yield Layout("torchao", "rows and tensor",
                 {**at("a", _weight_qdata=codes, _weight_scale=row),
                  **at("b", _weight_qdata=codes, _weight_scale=one_by_one,
                       _weight_zero_point=torch.zeros(1))},
                 {"a.weight": rows, "b.weight": dequantized(codes, one_by_one, (50, 60))})
    for size in (1, 52):  # prototype/safetensors: PerRow of 3-D weights keeps a last axis of 1
        given, scale = finite_codes(3, 52, 40), rand(3, 52 // size, 1)
        yield Layout("torchao", f"experts, {size} rows",
                     at("e", _up_proj_qdata=given, _up_proj_scale=scale),
                     {"e.up_proj": dequantized(given, scale, (size, 40))}, method("torchao"))
    given, raw = finite_codes(30, 96), exponents(30, 3, dtype=E8M0)
    yield Layout("torchao", "MXFP8", at("l", _weight_qdata=given, _weight_scale=raw),
                 {"l.weight": dequantized(given, powers(raw), (1, 32))}, method("torchao"))
    quarter = rand(1, dtype=BF16)
    yield Layout("Qwen3.8 n-gram tables", "three shards",
                 {**{f"t.shard_{i}.weight": codes.roll(i) for i in range(3)},
                  "t.weight_scale": quarter},
                 {f"t.shard_{i}.weight": dequantized(codes.roll(i), one(quarter), (50, 60))
                  for i in range(3)})
    yield from stacked_experts()

    given = c.every_code(130, 140)
    scale = rand(2, 2)
    yield Layout("FP8 as bytes", "the ancestor's demo",
                 {"weight_1": given.view(U8), "weight_1_scale_inv": scale,
                  "weight_2": kept["l.bias"]},
                 {"weight_1": dequantized(given, scale), "weight_2": kept["l.bias"]})
    for title, dtype in (("ComfyUI, E4M3 by note", E4M3), ("ComfyUI, E5M2 by note", E5M2)):
        given = c.every_code(50, 60, dtype)
        yield Layout(title, "bytes", at("l", weight=given.view(U8), weight_scale=scalar,
                                        comfy_quant=note(format=f"{dtype}"[6:])),
                     {"l.weight": dequantized(given, one(scalar), (50, 60))})

    given, row_scale = c.every_code(200, 160, I8), rand(200, 1)
    value = dequantized(given, row_scale, (1, 160))
    yield Layout("INT8 in blocks", "128x128", at("l", weight=given, weight_scale_inv=scale_of(200)),
                 {"l.weight": dequantized(given, scale_of(200))}, method("blockwise_int8"))
    for name in ("compressed-tensors", "w8a8_int8", "quark", "modelopt"):
        yield Layout("INT8 of compressed-tensors, w8a8, Quark, ModelOpt", name,
                     at("l", weight=given, weight_scale=row_scale), {"l.weight": value},
                     method(name))
    yield Layout("INT8 of lmdeploy", "rows", at("l", weight=given, scale=row_scale),
                 {"l.weight": value}, method("smooth_quant"))
    yield Layout("INT8 of torchao", "rows", at("l", _weight_qdata=given, _weight_scale=row_scale),
                 {"l.weight": value}, method("torchao"))
    yield from small_floats()
    yield from integers()
    given = {"a": c.every_code(16, 16), "b.weight": c.every_code(16, 16, E5M2)}
    yield Layout("plain FP8 cast", "E4M3 and E5M2", given,
                 {name: c.canonical(t.float().bfloat16()) for name, t in given.items()},
                 options={"missing_scale": "cast"})


CT_TITLE = "compressed-tensors, ModelOpt, fbgemm, Quark, auto-round, AutoFP8"
SCALES = rand(2, 2)


def scale_of(rows):
    return SCALES[: -(-rows // 128)]


def stacked_experts():
    """Yield what transformers 5.24 saves of Qwen3-MoE and Mixtral under FineGrainedFP8Config.

    With 192, a block of the stacked grid holds rows of gate and of up. What the block size does not
    divide stays BF16 (integrations/finegrained_fp8.py), but its scale, which nothing has filled, is
    written. Versions after 5.24 quantize it, with a ragged last block.
    """
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
                         method("fp8", **BLOCKS))


def small_floats():
    """Yield MXFP4 and NVFP4."""
    given, raw = packed(30, 48), exponents(30, 3)
    value, dense, scale = fp4(given, powers(raw), 32), finite_codes(256, 256), SCALES
    beside = at("q_proj", weight=dense, weight_scale=scale)
    both = {"l.weight": value, "q_proj.weight": dequantized(dense, scale)}
    yield Layout("MXFP4 of torchao", "plain",
                 at("l", _weight_qdata=given, _weight_scale=raw.view(E8M0)), {"l.weight": value},
                 method("torchao"))
    mx = at("l", weight_packed=given, weight_scale=raw)
    title = "compressed-tensors MXFP4"
    yield Layout(title, "compressed-tensors", mx, {"l.weight": value}, c.ct_config(num_bits=4))
    # intel/auto-round missing_tensors.py: what a layer of 16 bits says is of no weight.
    extra = {"mtp.fc": {"bits": 16, "data_type": "fp"}}
    yield Layout(title, "auto-round", mx, {"l.weight": value},
                 method("auto-round", data_type="mx_fp", extra_config=extra))
    # radixark/miles tools/convert_mimo_v2_to_bf16.py
    mimo = {**c.FP8_CONFIG, "store_dtype": "mxfp4", "mxfp4_block_size": 32}
    yield Layout("experts of MiMo-V2.5 and V2.6 (MXFP4)", "beside FP8 blocks",
                 {**at("l", weight=given, weight_scale=raw),
                  **at("q_proj", weight=dense, weight_scale_inv=scale)}, both,
                 {"quantization_config": mimo})
    # amd/GLM-5.3-Quark-MXFP4-AttnFP8: vllm-project/vllm 54556, sgl-project/sglang 38998
    tensors = {**at("l", weight=given, weight_scale=raw), **beside}
    block = {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 128]}
    title = "MXFP4 of Quark and ModelOpt"
    yield Layout(title, "Quark beside FP8 blocks", tensors, both, quark(**block))
    yield Layout(title, "ModelOpt", at("l", weight=given, weight_scale=raw), {"l.weight": value},
                 method("modelopt"))
    # aiter 2318, vllm quark.py: with the group size, blocks of 64 would be refused; with the dtype,
    # the FP4 weights.
    fine = rand(4, 4)
    other = {"dtype": "fp6_e2m3", "scale_format": "e5m3", "group_size": 16, "block_size": [9, 9]}
    for place in ("input_tensors", "output_tensors", "input_activations", "kv_cache_quant_config"):
        yield Layout(title, f"other {place}",
                     tensors | {"q_proj.weight_scale": fine},
                     both | {"q_proj.weight": dequantized(dense, fine, (64, 64))},
                     method("quark", global_quant_config={"weight": {"dtype": "fp4"},
                                                          place: [other]}))

    factor, divisor = torch.tensor(0.0123), torch.tensor([777.0])
    given, scale, value = (t[0] for t in nvfp4(1, 30, factor))
    yield Layout("NVFP4 of torchao", "plain",
                 at("l", _weight_qdata=given, _weight_scale=scale, _weight_per_tensor_scale=factor),
                 {"l.weight": value}, method("torchao"))
    tensors = at("l", weight=given, weight_scale=scale, weight_scale_2=factor, input_scale=rand())
    title, sidecar = "NVFP4 of ModelOpt and Quark", {"quant_algo": "NVFP4", "group_size": 16}
    for name in ("modelopt", "quark"):
        yield Layout(title, name, tensors, {"l.weight": value}, method(name))
    for producer in ({"producer": {"name": "shared-scales-nvfp4"}}, {}):
        yield Layout(title, f"only hf_quant_config {producer}", tensors, {"l.weight": value},
                     {"hidden_size": 80},
                     {"hf_quant_config.json": {**producer, "quantization": sidecar}})
    # nvidia/DeepSeek-V4-*-NVFP4: two files name a method each
    expert, raw = packed(70, 48, dtype=I8), exponents(70, 3, dtype=E8M0)
    yield Layout(title, "beside MXFP4 of DeepSeek-V4",
                 {**tensors, **at("mtp", weight=expert, scale=raw)},
                 {"l.weight": value, "mtp.weight": fp4(expert, powers(raw), 32)}, c.CONFIG,
                 {"hf_quant_config.json": {"quantization": {"quant_algo": "MIXED_PRECISION"}}})
    # transformers FineGrainedWeightGlobals: one second scale for gate's rows, one for up's
    for second, wide in ((s := rand(3), s.view(3, 1, 1)),
                         (s := rand(3, 2), s.repeat_interleave(13, 1)[..., None])):
        experts, expert_scale, values = nvfp4(3, 26, wide)
        yield Layout(title, f"experts {[*second.shape]}",
                     at("e", up_proj=experts, up_proj_weight_scale=expert_scale,
                        up_proj_weight_scale_2=second, up_proj_input_scale=rand(3)),
                     {"e.up_proj": values}, method("modelopt", quant_algo="NVFP4"))
    w4a8, w4a8_scale, w4a8_value = (t[0] for t in nvfp4(1, 30, factor, group=32))
    algorithm = {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32}
    for config, files in ((method("modelopt", **algorithm), {}),
                          (None, {"hf_quant_config.json": {"quantization": algorithm}})):
        yield Layout("ModelOpt W4A8_NVFP4_FP8", f"{[*files]}",
                     at("l", weight=w4a8, weight_scale=w4a8_scale, weight_scale_2=factor),
                     {"l.weight": w4a8_value}, config, files)
    # transformers integrations/finegrained/conversions.py: global = amax / (6 * 448)
    yield Layout("transformers NVFP4", "a factor",
                 at("l", weight=given, weight_scale_inv=scale, weight_global_scale=factor,
                    input_global_scale=torch.ones(1)), {"l.weight": value}, method("nvfp4"))
    given, scale, value = (t[0] for t in nvfp4(1, 30, divisor, divide=True))
    tensors = at("l", weight_packed=given, weight_scale=scale, weight_global_scale=divisor)
    title, config = "compressed-tensors NVFP4", c.ct_config(num_bits=4, group_size=16)
    yield Layout(title, "a divisor", {**tensors, "l.input_global_scale": rand(1)},
                 {"l.weight": value}, config)
    # vllm-project/vllm 16803: releases by Mistral itself in compressed-tensors
    yield Layout(title, "params.json", tensors, {"l.weight": value}, files={
        "params.json": {"dim": 80, "quantization": config["quantization_config"]}})
    # vllm-project/vllm models/inkling/nvidia and tests/models/inkling: parameters are called
    # w13_weight; the gate's global_scale is one; only hf_quant_config.json names the method.
    kept = at("gate", weight=rand(7, 8, dtype=BF16), global_scale=rand(1), bias=rand(5))
    second = rand(3)
    given, scale, value = nvfp4(3, 20, second.view(3, 1, 1))
    yield Layout("Inkling NVFP4", "the vendor's",
                 {**kept, "experts.w13_weight": given,
                  **at("experts.w13_weight", scale=scale, scale2=second, input_amax=rand(1),
                       original_shape=torch.tensor(value.shape))},
                 {**kept, "experts.w13_weight": value},
                 files={"hf_quant_config.json": {"quantization": sidecar}})
    second = 500 * rand(3, 1)
    given, scale, value = nvfp4(3, 20, second.view(3, 1, 1), divide=True)
    for prefix in ("experts.w2_weight.", "experts.w2_"):  # wrapped in a module of its name, or not
        yield Layout(title, f"Inkling, {prefix}",
                     {f"{prefix}weight_packed": given, f"{prefix}weight_scale": scale,
                      f"{prefix}weight_global_scale": second,
                      f"{prefix}input_global_scale": rand(3, 1)},
                     {"experts.w2_weight": value}, config)


def integers():
    """Yield INT4."""
    # sgl-project/sglang layers/quantization/w4afp8.py; NVIDIA/TensorRT-LLM
    # pack_int8_tensor_to_packed_int4: the low nibble comes first, and the sign is extended.
    given, scale, dense = packed(70, 192, dtype=I8), rand(70, 3), finite_codes(200, 160)
    yield Layout("W4AFP8", "experts beside FP8",
                 {**at("e.0.up_proj", weight=given, weight_scale_inv=scale, input_scale=rand(1)),
                  **at("q_proj", weight=dense, weight_scale_inv=SCALES)},
                 {"e.0.up_proj.weight": dequantized((c.nibbles(given) ^ 8) - 8, scale, (1, 128)),
                  "q_proj.weight": dequantized(dense, SCALES)}, method("w4afp8"))
    # vllm-project/compressed-tensors compressors/pack_quantized: element i is bits 4i..4i+3 of the
    # row, plus 8; THUDM/slime tools/convert_k2_thinking_int4_to_bf16.py multiplies in float32.
    # Kimi-K2-Thinking holds weight_shape in I32, current writers in I64.
    for dtype in (I32, I64):
        for columns, group, weights in ((96, 32, {}), (24, 8, {"group_size": 8}), (96, 96, CHANNEL),
                                        (43, 43, CHANNEL),
                                        (36, 12, {"group_size": 12, "actorder": "weight"})):
            words, codes = int4(30, columns)
            scale, order = rand(30, columns // group, dtype=BF16), torch.arange(columns) // group
            yield Layout("Kimi-K2-Thinking, compressed-tensors INT4", f"{columns}/{group} {dtype}",
                         at("l", weight_packed=words, weight_scale=scale,
                            weight_shape=torch.tensor([30, columns], dtype=dtype),
                            weight_g_idx=order if columns == 96 else None),
                         {"l.weight": dequantized(codes, scale, (1, group))},
                         {"text_config": int4_config(**weights)})  # as in Kimi-K2.5


LAYOUTS = [*layouts()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"{x.title}: {x.kind}" for x in LAYOUTS])
def test_each_layout_of_the_table_is_converted(tmp_path, layout):
    for name, value in layout.files.items():
        c.write_json(tmp_path / "in" / name, value)
    tensors = {name: tensor.clone() for name, tensor in layout.tensors.items()}
    c.convert(tmp_path, tensors, layout.expected, layout.config, **layout.options)
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    for name in {"config.json", "params.json"} & {*c.contents(tmp_path / "out")}:
        assert "quant" not in (tmp_path / "out" / name).read_text()


def test_every_row_of_the_table_has_a_layout():
    rows = {row.title for row in fp8_cast_bf16.FORMATS} | {"plain FP8 cast"}
    assert {layout.title for layout in LAYOUTS} == rows


def is_fp8(layout):
    codes = (t for name, t in layout.tensors.items() if "scale" not in name)
    return any(tensor.dtype in (E4M3, E5M2) for tensor in codes)


OTHERS = {x.title: x for x in LAYOUTS if (x.config or x.files) and not is_fp8(x)}


@pytest.mark.parametrize("config", [None, method("gptq"), method("bitnet")])
@pytest.mark.parametrize("layout", OTHERS.values(), ids=OTHERS)
def test_bytes_and_integers_need_a_method_that_names_their_format(tmp_path, layout, config):
    tensors = {name: tensor.clone() for name, tensor in layout.tensors.items()}
    c.assert_refused(tmp_path, tensors, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [16 << 20, 4096])
def test_gpu_and_cpu_write_the_same_bytes(tmp_path, monkeypatch, window):
    monkeypatch.setattr("fp8_cast_bf16.WINDOW", window)
    for number, layout in enumerate({x.title: x for x in LAYOUTS}.values()):
        source = tmp_path / str(number) / "in"
        for name, value in layout.files.items():
            c.write_json(source / name, value)
        tensors = {name: tensor.clone() for name, tensor in layout.tensors.items()}
        c.write_checkpoint(source, {c.SHARD: tensors}, layout.config, index=False)
        for device in ("cpu", "cuda"):
            main(source, source.parent / device, device=device, **layout.options)
        assert c.contents(source.parent / "cuda") == c.contents(source.parent / "cpu")


def quantized_attention(zero_point):
    codes, scale = finite_codes(16, 20), rand(16, 1)
    tensors = {"self_attn.q_proj.weight": codes, "self_attn.q_proj.weight_scale": scale}
    for kind in "qkv":
        tensors |= {f"self_attn.{kind}_scale": rand(1), f"self_attn.{kind}_zero_point": zero_point}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, {"self_attn.q_proj.weight": dequantized(codes, scale, (1, 20))}


# --- weights, and the grids of their scales ---


def test_one_byte_tensors_without_a_scale_are_data(tmp_path):
    tensors = {
        "packed": torch.arange(256).to(U8),
        "signed": torch.arange(-128, 128).to(I8),
        "mask": torch.tensor([True, False]),
    }
    got = c.convert(tmp_path, {c.SHARD: tensors})
    for name, tensor in tensors.items():
        c.assert_same_bits(got[name], tensor)


@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16, torch.float16])
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
    got = c.convert(tmp_path, {c.SHARD: {"w": codes, "w_scale_inv": scale}})
    c.assert_same_bits(got["w"], expected)


def test_block_size_of_the_config_is_used_at_any_depth(tmp_path):
    codes, scale = finite_codes(200, 300), torch.rand(3, 3)
    config = {"text_config": {"quantization_config": {"weight_block_size": [96, 100]}}}
    got = c.convert(tmp_path, {c.SHARD: {"w": codes, "w_scale_inv": scale}}, config=config)
    c.assert_same_bits(got["w"], dequantized(codes, scale, (96, 100)))


@pytest.mark.parametrize(
    "scale_shape", [(200, 10), (2, 3)], ids=["1x32, cut off at the edge", "128x128"]
)
def test_a_grid_that_contradicts_the_config_is_an_error_with_both_grids(tmp_path, scale_shape):
    tensors = {"w": finite_codes(200, 300), "w_scale_inv": torch.rand(scale_shape)}
    config = {"quantization_config": {"weight_block_size": [32, 32]}}
    message = (rf"w is \[200, 300\].*scaled by w_scale_inv {re.escape(str([*scale_shape]))}.*"
               r"the config names blocks of 32x32, which need \[7, 10\]")
    with pytest.raises(CheckpointError, match=message):
        c.convert(tmp_path, {c.SHARD: tensors}, config=config)
    assert not (tmp_path / "out").exists()


def test_scale_that_fits_no_grid_is_an_error_with_both_shapes(tmp_path):
    tensors = {"x.weight": finite_codes(300, 300), "x.weight_scale_inv": torch.rand(7, 5)}
    with pytest.raises(CheckpointError, match=r"x\.weight is \[300, 300\].*_scale_inv \[7, 5\]"):
        c.convert(tmp_path, {c.SHARD: tensors})
    assert not (tmp_path / "out").exists()


def test_scale_of_an_unknown_dtype_is_an_error(tmp_path):
    tensors = {"w": finite_codes(3, 3), "w_scale_inv": torch.ones(1, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"w \(F8_E4M3, beside w_scale_inv\) looks quantized"):
        c.convert(tmp_path, {c.SHARD: tensors})
    assert not (tmp_path / "out").exists()


def test_grid_that_two_block_sizes_of_the_config_fit_is_refused(tmp_path):
    tensors = {"w.weight": finite_codes(192, 128), "w.weight_scale": rand(2, 1)}
    config = {
        "text_config": {"quantization_config": {"weight_block_size": [96, 128]}},
        "quantization_config": {"weight_block_size": [128, 128]},
    }
    c.assert_refused(tmp_path, tensors, "two grids fit", config=config)


@pytest.mark.parametrize("size", ["1" * 5000 + "x1", [10**30, 128], [0, 0], [True], "x", None, {}])
def test_block_sizes_that_cannot_be_meant_are_ignored(tmp_path, size):
    codes, scale = finite_codes(200, 100), rand(2, 1)
    config = {"quantization_config": {"weight_block_size": size, "block_structure": size}}
    tensors = {"w.weight": codes, "w.weight_scale_inv": scale}
    c.convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale)}, config)


def test_grid_for_each_part_is_for_fused_qkv_only(tmp_path):
    tensors = {"o_proj.weight": finite_codes(1356, 128), "o_proj.weight_scale_inv": rand(12, 1)}
    with pytest.raises(CheckpointError, match="no block size fits"):
        c.convert(tmp_path, tensors, {})


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
    c.assert_refused(tmp_path, tensors, *complaints, config=c.CONFIG)


def test_square_experts_with_one_scale_per_row_or_column_are_refused(tmp_path):
    tensors = {"e.w": finite_codes(3, 64, 64), "e.w_weight_scale": rand(3, 64)}
    c.assert_refused(tmp_path, tensors, "e.w is [3, 64, 64]", "[3, 64]", "two grids fit")


@pytest.mark.parametrize("scale", [(2, 2), (3, 7, 2), (2, 3, 64, 1), (7,)])
def test_experts_whose_scales_fit_no_grid_are_refused(tmp_path, scale):
    tensors = {"e.w": finite_codes(3, 140, 200), "e.w_scale_inv": rand(*scale)}
    c.assert_refused(tmp_path, tensors, "no block size fits")


def test_f4_dtype_counts_elements_not_bytes(tmp_path):
    codes, scale = packed(10, 32), exponents(10, 2)
    raw = {"e.weight": ("F4", [10, 64], codes), "e.scale": ("F8_E8M0", [10, 2], scale)}
    c.write_raw(tmp_path / "in/model.safetensors", raw)
    (tmp_path / "in/config.json").write_text(json.dumps(c.CONFIG))
    main(tmp_path / "in", tmp_path / "out")
    expected = dequantized(c.fp4_values(codes), powers(scale), (1, 32))
    c.assert_same_bits(c.load_checkpoint(tmp_path / "out")["e.weight"], expected)


def test_odd_packed_width_is_refused(tmp_path):
    raw = {"w.weight": ("F4", [2, 3], torch.zeros(3, dtype=U8))}
    raw["w.scale"] = ("F8_E8M0", [2, 1], exponents(2, 1))
    c.write_raw(tmp_path / "in/model.safetensors", raw)
    (tmp_path / "in/config.json").write_text(json.dumps(c.CONFIG))
    with pytest.raises(CheckpointError, match=r"w.weight is \[2, 3\] \(E2M1"):
        main(tmp_path / "in", tmp_path / "out")


ZERO_POINTS = {"weight_zero_point": torch.zeros(4, 2, dtype=I32)}  # packed, these are -8


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
    tensors = {"weight_packed": int4(30, 64)[0], "weight_scale": rand(30, 2)}
    tensors |= {"weight_shape": torch.tensor([30, 64]), **change}
    tensors = {f"m.up.{name}": tensor for name, tensor in tensors.items()}
    c.assert_refused(tmp_path, tensors, "m.up", config=int4_config(**weights))


# --- side tensors, caches and parameters ---


def test_activation_scales_of_converted_weights_are_dropped(tmp_path):
    scales = ["q.weight_scale_inv", "q.activation_scale", "up_scale_inv", "up_activation_scale"]
    tensors = {name: torch.ones(1) for name in [*scales, "norm.activation_scale"]}
    tensors |= {"q.weight": finite_codes(4, 4), "up": finite_codes(4, 4)}
    got = c.convert(tmp_path, {c.SHARD: tensors})
    assert set(got) == {"q.weight", "up", "norm.activation_scale"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.bool])
def test_what_never_holds_codes_is_copied_and_the_scale_beside_it_is_named(tmp_path, dtype, capsys):
    tensors = {"w": torch.ones(2, 2, dtype=dtype), "w_scale_inv": torch.ones(1)}
    c.write_checkpoint(tmp_path / "in", {c.SHARD: tensors})
    main(tmp_path / "in", tmp_path / "out")
    c.assert_same_bits(load_file(tmp_path / "out/model.safetensors")["w"], tensors["w"])
    assert "Dropped scales of no weight: w_scale_inv\n" in capsys.readouterr().out


def test_parameters_that_are_called_scale_are_kept(tmp_path):
    codes, scale = finite_codes(50, 60), rand(1)
    kept = {"router.scale": rand(4), "blocks.0.layer_scale": rand(4), "logit_scale": rand()}
    kept |= {"vision.weight": rand(3, 3), "vision.weight_scale": rand(3)}
    tensors = {**kept, "router.weight": codes, "router.weight_scale_inv": scale}
    expected = {**kept, "router.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    config = {"quantization_config": {"quant_method": "fp8"}}
    c.convert(tmp_path, tensors, expected, config)


def test_scale_and_bias_of_an_affine_cache_are_dropped(tmp_path):
    # NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py, _KV_CACHE_REPLACEMENTS
    codes, scale = finite_codes(16, 20), rand()
    kept = {"a.k_proj.bias": rand(16), "a.v_proj.weight": rand(16, 20, dtype=BF16)}
    kept |= {"visual.attn.v_bias": rand(16), "visual.attn.q_bias": rand(16)}  # EVA's parameters
    tensors = {
        **{"a.k_proj.weight": codes, "a.k_proj.weight_scale": scale, **kept},
        **{"a.k_proj.k_scale": rand(), "a.k_proj.k_bias": rand(1, 2, 1, 8)},
        **{"a.v_proj.v_scale": rand(), "a.v_proj.v_bias": rand(1, 2, 1, 8)},
    }
    expected = {"a.k_proj.weight": dequantized(codes, scale.view(1, 1), (16, 20)), **kept}
    config = method("modelopt", quant_algo="FP8", kv_cache_quant_algo="NVFP4_AFFINE")
    c.convert(tmp_path, tensors, expected, config)


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
    c.convert(tmp_path, tensors, expected, method(quantizer))


@pytest.mark.parametrize("dtype", [E4M3, I8])
def test_zero_points_of_quantized_attention_are_dropped(tmp_path, dtype):
    # vllm-project/compressed-tensors quantization/lifecycle/initialize.py, initialize_attn_qparams
    tensors, expected = quantized_attention(torch.zeros(1).to(dtype))
    c.convert(tmp_path, tensors, expected, c.ct_config(type="float", strategy="channel"))


def test_zero_points_of_quantized_attention_that_are_not_zero_are_refused(tmp_path):
    config = c.ct_config(type="float", strategy="channel")
    tensors, _ = quantized_attention(torch.ones(1).to(E4M3))
    c.assert_refused(tmp_path, tensors, "self_attn.", "_zero_point", config=config)


# vllm-project/vllm-ascend quantization/methods/kv_c8.py and modelslim_config.py, beside MXFP8 whose
# method stands in quant_model_description.json only
ASCEND_CACHE = {
    **{f"a.fa_{kind}.scale": rand(4, 1) for kind in "qkv"},
    **{f"a.fa_{kind}.offset": torch.ones(4, 1, dtype=I8) for kind in "qkv"},
    **{f"a.{kind}_proj.kv_cache_scale": rand(64) for kind in "kv"},
    **{f"a.{kind}_proj.kv_cache_offset": rand(64) for kind in "kv"},
}
MXFP8 = {"a.k_proj.weight": finite_codes(50, 96), "a.k_proj.weight_scale": exponents(50, 3)}
# Tencent/AngelSlim compressor/quant/core/save.py, PTQSaveVllmHF
ANGELSLIM_CACHE = {f"a.{kind}_cache.scale": rand() for kind in "kv"}


@pytest.mark.parametrize("cache", [ASCEND_CACHE, ANGELSLIM_CACHE], ids=["Ascend", "AngelSlim"])
def test_scales_and_offsets_of_a_cache_are_dropped_under_any_name(tmp_path, capsys, cache):
    values = dequantized(MXFP8["a.k_proj.weight"], powers(MXFP8["a.k_proj.weight_scale"]), (1, 32))
    c.convert(tmp_path, {c.SHARD: MXFP8, "kv.safetensors": cache}, {"a.k_proj.weight": values}, {})


@pytest.mark.parametrize("kind", "qk")
def test_rotations_of_an_indexer_are_refused(tmp_path, kind):
    tensors = {**MXFP8, f"a.indexer.{kind}_rot": rand(128, 128, dtype=BF16)}
    c.assert_refused(tmp_path, tensors, f"a.indexer.{kind}_rot is a rotation")


DUMMY = {"b.weight": rand(4, 4).bfloat16(), "b.scale_input": rand(), "b.bias": rand(4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scale_of_1_that_comfyui_gives_a_plain_weight_is_dropped(tmp_path, shape, dtype):
    # silveroxides/convert_to_quant format_migration.py
    codes, scale = finite_codes(50, 60), torch.tensor(0.001)
    tensors = {"scaled_fp8": torch.zeros(0).to(E4M3), "a.weight": codes, "a.scale_weight": scale}
    tensors |= {**DUMMY, "b.scale_weight": torch.ones(shape, dtype=dtype)}
    expected = {"a.weight": dequantized(codes, scale.view(1, 1), (50, 60))}
    expected |= {name: DUMMY[name] for name in ("b.weight", "b.bias")}
    c.convert(tmp_path, tensors, expected)
    with pytest.raises(CheckpointError, match=r"b\.scale_weight has to be read to plan"):
        main(tmp_path / "in", tmp_path / "other", delete_source=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("scale", [torch.tensor(1.0000001), torch.tensor(1.0).double(), rand(4)])
def test_scale_that_is_not_1_beside_a_plain_weight_is_refused(tmp_path, scale):
    tensors = {"a.weight": finite_codes(4, 4), "a.scale_weight": rand()}
    tensors |= {**DUMMY, "b.scale_weight": scale}
    c.assert_refused(tmp_path, tensors, "b.scale_weight is not 1")


# --- what is refused ---


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
    raw = {"w": (dtype, [4], torch.zeros(bits // 2, dtype=U8))}
    c.write_raw(tmp_path / "in/model.safetensors", raw)
    # where the installed safetensors does not know the dtype, it refuses the file itself
    with pytest.raises(CheckpointError, match=f"{what}|not a whole safetensors file"):
        main(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_of_tensor_parallel_ranks_are_refused(tmp_path):
    name = "model0-mp8.safetensors"
    c.assert_refused(tmp_path, {"w": torch.ones(1)}, name, "tensor-parallel", name=name)


@pytest.mark.parametrize("format_name", ["mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4"])
def test_formats_of_comfyui_with_tiled_scales_are_refused(tmp_path, format_name):
    tensors = {"l.weight": packed(4, 4), "l.weight_scale": rand(1)}
    tensors["l.comfy_quant"] = note(format=format_name)
    c.assert_refused(tmp_path, tensors, "is in ComfyUI's format", format_name)


@pytest.mark.parametrize("text", [b"{", b"3", b"{}", b'{"format": []}', b"\xff"])
def test_notes_of_comfyui_that_are_not_valid_are_refused(tmp_path, text):
    tensors = {"l.comfy_quant": torch.tensor(list(text), dtype=U8)}
    c.assert_refused(tmp_path, tensors, "ComfyUI")


@pytest.mark.parametrize("location, fine", [("input", False), ("weight_output", True)])
def test_rotations_at_run_time_are_refused(tmp_path, location, fine):
    groups = {"R1": {"type": "hadamard", "apply": [{"targets": ["L"], "location": location}]}}
    config = {"quantization_config": {"transform_config": {"config_groups": groups}}}
    codes, scale = finite_codes(4, 4), rand(1, 1)
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    if fine:
        c.convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (4, 4))}, config)
    else:
        c.assert_refused(tmp_path, tensors, "config.json", "transform_config", config=config)


def test_sparse_weights_are_refused(tmp_path):
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"compression_config": {"sparsity_config": sparsity}}
    c.assert_refused(tmp_path, {"w": torch.ones(1)}, "sparsity_config", config=config)


def test_two_rival_scales_are_refused_unless_the_method_decides(tmp_path):
    codes, scale = finite_codes(4, 4), rand(1, 1)
    tensors = {"w.weight": codes, "w.weight_scale_inv": scale, "w.weight_scale": rand(1)}
    c.assert_refused(tmp_path, tensors, "w.weight has two scales", "w.weight_scale_inv and")
    config = {"quantization_config": {"quant_method": "fp8"}}
    c.convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (4, 4))}, config)


def test_zero_points_that_are_not_zero_are_refused(tmp_path):
    tensors = {"w.weight": c.every_code(4, 4, I8), "w.weight_scale": rand(4, 1)}
    tensors["w.weight_zero_point"] = torch.tensor([0, 0, 1, 0], dtype=I8)
    complaint, config = "w.weight_zero_point is not all zero", method("w8a8_int8")
    c.assert_refused(tmp_path, tensors, complaint, config=config)


@pytest.mark.parametrize("seconds", [(), ("w.weight_scale_2", "w.weight_global_scale")])
def test_nvfp4_needs_exactly_one_second_scale(tmp_path, seconds):
    tensors = {"w.weight": packed(4, 8), "w.weight_scale": finite_codes(4, 1)}
    tensors |= {name: rand(1) for name in seconds}
    refused = "w.weight_global_scale" if seconds else "w.weight (U8, beside w.weight_scale)"
    c.assert_refused(tmp_path, tensors, refused, config=method("modelopt"))


def test_second_scale_of_a_weight_that_is_not_nvfp4_is_refused(tmp_path):
    tensors = {"w.weight": finite_codes(4, 8), "w.weight_scale": rand(1)}
    tensors["w.weight_scale_2"] = rand(1)
    c.assert_refused(tmp_path, tensors, "w.weight_scale_2 stands beside w.weight")


@pytest.mark.parametrize("scale", [torch.ones(4, 4, dtype=torch.int32), packed(3, 1)])
def test_packed_weight_whose_scale_fits_no_format_is_refused(tmp_path, scale):
    tensors = {"w.weight": packed(4, 16), "w.weight_scale": scale}
    c.assert_refused(tmp_path, tensors, "w.weight_scale")


def test_packed_and_plain_weight_of_one_name_are_refused(tmp_path):
    tensors = {"w.weight_packed": packed(4, 16), "w.weight_scale": exponents(4, 1)}
    tensors["w.weight"] = torch.ones(4, 32)
    c.assert_refused(tmp_path, tensors, "w.weight", config=c.ct_config(num_bits=4))


@pytest.mark.parametrize(
    "order, fine", [([0] * 4 + [1] * 4, True), ([1, 0] * 4, False), ([0] * 7 + [1], False)]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_reordered_groups_are_refused(tmp_path, order, fine, dtype):
    codes, scale = finite_codes(5, 8), rand(5, 2)
    tensors = {"w.weight": codes, "w.weight_scale": scale}
    tensors["w.weight_g_idx"] = torch.tensor(order, dtype=dtype)
    config = c.ct_config(strategy="group", group_size=4)
    if fine:
        c.convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (1, 4))}, config)
    else:
        c.assert_refused(tmp_path, tensors, "w.weight_g_idx reorders", config=config)


def test_side_tensors_in_fp8_are_not_weights_without_a_scale(tmp_path):
    codes, scale = finite_codes(5, 8), rand()
    tensors = {"w.weight": codes, "w.scale_weight": scale, "scaled_fp8": finite_codes(2)}
    tensors["w.input_zero_point"] = torch.zeros(1).to(torch.float8_e4m3fn)
    expected = {"w.weight": dequantized(codes, scale.view(1, 1), (5, 8))}
    c.convert(tmp_path, tensors, expected, missing_scale="error")


def test_two_weights_that_would_get_one_name_are_refused(tmp_path):
    tensors = {"w.weight_packed": packed(4, 16), "w.weight_scale": exponents(4, 1)}
    tensors |= {"w._weight_qdata": finite_codes(4, 16), "w._weight_scale": rand(4, 1)}
    complaint, config = "becomes w.weight, which exists too", c.ct_config(num_bits=4)
    c.assert_refused(tmp_path, tensors, complaint, config=config)


def test_bytes_that_a_note_explains_are_refused_without_their_scale(tmp_path):
    tensors = {"l.weight": packed(4, 16), "l.comfy_quant": note(format="float8_e4m3fn")}
    c.assert_refused(tmp_path, tensors, "l.weight (U8")


def test_quantization_of_no_known_kind_is_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "mystery"}}
    complaints = "quant_method mystery", "l.blob (U8)"
    c.assert_refused(tmp_path, {"l.blob": packed(4, 4)}, *complaints, config=config)


def test_parameter_beside_a_rival_scale_is_kept_whatever_its_modules_are_called(tmp_path):
    codes, scale, parameter = finite_codes(4, 4), rand(1, 1), rand(4)
    name = "weight_net.l."
    tensors = {f"{name}weight": codes, f"{name}weight_scale": scale, f"{name}scale": parameter}
    expected = {f"{name}weight": dequantized(codes, scale, (4, 4)), f"{name}scale": parameter}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    c.convert(tmp_path, tensors, expected, config)


def test_fp8_tensor_that_serves_no_weight_is_refused_rather_than_left(tmp_path):
    tensors = {"a.input_scale": finite_codes(3), "b.weight": finite_codes(4, 4)}
    c.assert_refused(tmp_path, tensors, "a.input_scale (F8_E4M3) looks quantized")
