"""The closed world: what a row of the table describes is converted, what else looks quantized ends
the run before anything is written, and parameters and tables are copied.
"""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import LAYOUTS

import checkpoints as c
from checkpoints import at, dequantized, every_code, exponents, finite_codes, method, packed, rand
from fp8_cast_bf16 import CheckpointError, main

E4M3, BF16, I8, I32, U8 = torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.int32, torch.uint8
CODES, INTEGERS, BYTES = finite_codes(4, 8), every_code(4, 8, I8), packed(4, 16)
WIDE, ONES, COLUMN = packed(128, 64), torch.ones(4, 4), rand(4, 1)
FP4_SCALES, TILES = c.positive(finite_codes(4, 1)), c.positive(finite_codes(128, 8))
FP8_WEIGHT = {"o.weight": finite_codes(4, 32), "o.weight_scale_inv": torch.tensor([0.5])}
FP8_VALUES = {"o.weight": dequantized(FP8_WEIGHT["o.weight"], torch.tensor([[0.5]]), (4, 32))}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
DIVISOR = torch.tensor([777.0])
NVFP4 = dict(zip(("weight_packed", "weight_scale", "values"), c.nvfp4(DIVISOR, True), strict=True))
NVFP4_VALUES = {"l.weight": NVFP4.pop("values")}
NVFP4 = at("l", **NVFP4, weight_global_scale=DIVISOR)


def quark(**weight):
    return method("quark", global_quant_config={"weight": weight}, export={}, exclude=[])


def under(place, value):
    """Return a config in which a value stands under these keys."""
    for key in reversed(place.split()):
        value = {key: value}
    return value


# --- what is converted, copied and dropped ---


def yes(fact, tensors, expected, config=None, **options):
    return pytest.param(tensors, expected, config, options, id=fact)


def beside(fact, kept, dropped=None, config=None):
    """Return a case of tensors beside an FP8 weight that is converted."""
    tensors = {**FP8_WEIGHT, **kept, **(dropped or {})}
    return yes(fact, tensors, {**FP8_VALUES, **kept}, config)


TABLES = {
    **at("ffn.gate", tid2eid=torch.arange(12).view(6, 2), weight=rand(2, 4)),  # DeepSeek-V4
    "layers.1.ffn.gate.tid2eid": torch.arange(12, dtype=I32).view(6, 2),
    "text_model.embeddings.position_ids": torch.arange(77).view(1, 77),
    **at("attn", mask=ONES.bool(), relative_position_index=torch.arange(16).int().view(4, 4)),
}
FUSED = at("experts", up_proj=finite_codes(2, 130, 140), up_proj_scale_inv=rand(2, 2, 2))
FUSED_VALUES = {"experts.up_proj": dequantized(*FUSED.values())}
# vllm-project/vllm-ascend quantization/methods/kv_c8.py and modelslim_config.py, beside MXFP8 whose
# method stands in quant_model_description.json only
MXFP8 = at("a.k_proj", weight=finite_codes(50, 96), weight_scale=exponents(50, 3))
MXFP8_VALUES = {"a.k_proj.weight": dequantized(
    MXFP8["a.k_proj.weight"], c.powers(MXFP8["a.k_proj.weight_scale"]), (1, 32))}
ASCEND_CACHE = {
    **{f"a.fa_{kind}.scale": COLUMN for kind in "qkv"},
    **{f"a.fa_{kind}.offset": torch.ones(4, 1, dtype=I8) for kind in "qkv"},
    **{f"a.{kind}_proj.kv_cache_{leaf}": rand(64) for kind in "kv" for leaf in ("scale", "offset")},
}
ATTENTION = {f"a.{kind}_scale": rand(1) for kind in "qkv"}
# LTX-2 and SeedVR2: what is not a scale was cast to FP8 with the rest.
CASTS = {f"blocks.0.{name}": finite_codes(*shape) for name, shape in {
    "scale_shift_table": (6, 32), "scale_shift_table_a2v_ca_audio": (5, 32), "b": (4, 32),
    "attn1.to_q.weight": (8, 32), "ada.attn_scale": (32,), "ada.attn_shift": (32,),
    "ada.weight": (4, 32), "a": (4, 32), "a_norm.layer_scale": (32,)}.items()}
NOT_CAST = at("blocks.0", **{"b_norm.layer_scale": rand(32), "scale_shift_table_c": rand(2, 32)})
SCALED = at("a", weight=CODES, scale_weight=torch.tensor(0.001))
SCALED_VALUES = {"a.weight": dequantized(CODES, torch.tensor([[0.001]]), (4, 8))}
PLAIN = at("b", weight=rand(4, 4, dtype=BF16), bias=rand(4))
TENSOR = at("l", weight=CODES, weight_scale=rand(1, 1))
VALUES = dequantized(*TENSOR.values(), (4, 8))
CACHE = method("fp8", kv_cache_scheme={"num_bits": 8})
# vllm-project/vllm vllm/models/inkling: mlp.gate.global_scale is a learned parameter.
OTHERS = {**at("mlp.gate", weight=rand(4, 4), global_scale=rand(1)),
          **at("x", weight=rand(4, 4), input_amax=rand(4), weight_shape=torch.arange(2))}

ACCEPTED = [
    # FP8 with a scale has one meaning, and a method may stand in many places.
    *[beside(f"FP8 under {name}", {}, {}, {**method(name), "quantization_bit": 8})
      for name in ("fp8", "modelopt", "bitnet", "gptq", "nobody knows")],
    *[yes(f"method under {place}", NVFP4, NVFP4_VALUES, under(
        place, c.ct_config(num_bits=4, group_size=16)["quantization_config"]))
      for place in ("quantization_config", "compression_config", "text_config quantization_config",
                    "a b compression_config")],
    # With no method, bytes without a scale are a table.
    *[beside(f"{key} {value!r}", {"l.weight": packed(4, 4)}, {}, {key: value})
      for key in ("quantization_bit", "quant_type", "dfloat11_config")
      for value in (None, 0, False, "", {})],
    *[beside(f"bytes under {config}", {"l.weight": BYTES, "down_proj": INTEGERS}, {}, config)
      for config in (None, c.CONFIG)],
    yes("scales of no quantized weight", {**PLAIN, **at("b", weight_scale_inv=rand(1, 1)),
                                          "gone_scale_inv": rand(1)}, PLAIN),
    yes("no elements", {"e": torch.zeros(0, 4), **at("l", weight=finite_codes(0, 8),
                                                     weight_scale_inv=torch.zeros(0, 1))},
        {"e": torch.zeros(0, 4), "l.weight": torch.zeros(0, 8).bfloat16()}),
    yes("bytes alone", *[{"l.weight": BYTES, "down_proj": INTEGERS, "mask": ONES.bool()}] * 2),
    *[beside(f"tables under {config}", TABLES, {}, config)
      for config in (None, c.CONFIG, method("modelopt"))],
    yes("tables alone", TABLES, TABLES, method("compressed-tensors")),
    *[beside(f"{dtype} never holds codes", at("t", weight=ONES.to(dtype), weight_scale=COLUMN),
             {}, method("gptq")) for dtype in (torch.int64, torch.uint64, torch.bool)],
    # parameters, whatever they are called
    beside("bias and other modules", {
        **{"o.bias": rand(4), "alpha": rand(1), "o.norm.weight": rand(4), "o_norm.weight": rand(4)},
        **at("plain", weight=rand(4, 4, dtype=BF16), alpha=rand(4), foo=rand(2)),
        **{"router.proj.weight": rand(4, 4), "router.scale": rand(4)},  # Gemma 4
        **at("gate", weight=rand(4, 4), e_score_correction_bias=rand(4)),
        **at("block", layer_scale=rand(4), table=torch.arange(8).view(2, 4))}),
    beside("parameters called scale", {"o.scale": rand(4), "logit_scale": rand(), "b.layer_scale":
           rand(4), **at("vision", weight=rand(3, 3), weight_scale=rand(3))}, {}, method("fp8")),
    yes("a parameter beside a rival scale", {"weight_l.scale": DIVISOR, **{
        f"weight_{name}": tensor for name, tensor in TENSOR.items()}}, {
        "weight_l.scale": DIVISOR, "weight_l.weight": VALUES}, method("compressed-tensors")),
    *[yes(f"a fused name and {name}", {**FUSED, f"experts.{name}": DIVISOR},
          {**FUSED_VALUES, f"experts.{name}": DIVISOR})
      for name in ("up_proj_bias", "up_projector", "up_proj_norm.weight", "foo")],
    # scales of caches and of activations, and parameters of the same names
    *[beside(f"cache {[*shape]}", {}, at("a", k_scale=rand(*shape), v_scale=rand(*shape), q_scale=
             rand(*(8 if n == 2 else n for n in shape))), HEADS | CACHE)
      for shape in ((), (1,), (1, 1), (2,), (2, 1, 1))],
    # A tower that is not quantized may have such parameters, beside quantized layers of others.
    *[beside(f"{name} {[*shape]} under {key} {cache}", {} if cache else found,
             found if cache else {}, HEADS | method("fp8", **{key: cache}))
      for name, shape in (("q_scale", ()), ("q_scale", (8, 1, 1)), ("k_scale", (2,)))
      for found in [{f"visual.attn.{name}": rand(*shape)}] for cache in (None, "FP8")
      for key in ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config")],
    *[beside(f"q_scale beside {kind}", {"a.q_scale": DIVISOR}, {f"a.{kind}_scale": rand(1)})
      for kind in "kv"],
    beside("q_scale beside both", {}, ATTENTION, c.CONFIG),
    # lucidrains/local-attention local_attention/transformer.py: q_scale and k_scale of (dim_head,)
    *[beside(f"learned scales, {config}", {**at("a", q_scale=rand(64), k_scale=rand(64)),
                                           "b.v_scale": rand(4, 16)}, {}, config)
      for config in (None, HEADS, {"num_attention_heads": 64, "hidden_size": 4096})],
    yes("scales where nothing is quantized", ATTENTION, ATTENTION),
    # NVIDIA/Model-Optimizer modelopt/torch/export/quant_utils.py, _KV_CACHE_REPLACEMENTS; EVA has
    # parameters of such names.
    beside("affine cache", {"o.bias": rand(16), **at("vit", v_bias=rand(16), q_bias=rand(16))},
           {**at("o", k_scale=rand(), k_bias=rand(1, 2, 1, 8)),
            **at("a", v_scale=rand(), v_bias=rand(1, 2, 1, 8))},
           method("modelopt", kv_cache_quant_algo="NVFP4_AFFINE")),
    # vllm-project/vllm pull 15734; vLLM 0.4 models/mixtral.py
    beside("scales of activations", {"norm.activation_scale": rand(1)}, {
        "a.prob_output_scale": rand(1), **at("o", act_scale=rand(1), activation_scale=rand(1))}),
    # vllm-project/compressed-tensors quantization/lifecycle/initialize.py, initialize_attn_qparams
    *[beside(f"zero points of attention {dtype}", {}, ATTENTION | {
        f"a.{kind}_zero_point": torch.zeros(1).to(dtype) for kind in "qkv"},
        c.ct_config(type="float", strategy="channel")) for dtype in (E4M3, I8)],
    yes("cache of Ascend", {c.SHARD: MXFP8, "kv.safetensors": ASCEND_CACHE}, MXFP8_VALUES, {}),
    yes("cache of AngelSlim",  # Tencent/AngelSlim compressor/quant/core/save.py, PTQSaveVllmHF
        {c.SHARD: MXFP8, "kv.safetensors": {f"a.{kind}_cache.scale": rand() for kind in "kv"}},
        MXFP8_VALUES, {}),
    yes("side tensors of other weights", {**NVFP4, "l.input_global_scale": rand(1), **OTHERS},
        {**NVFP4_VALUES, **OTHERS}, c.ct_config(num_bits=4, group_size=16)),
    yes("side tensors in FP8", {**SCALED, "scaled_fp8": finite_codes(2), "a.input_zero_point":
                                torch.zeros(1).to(E4M3)}, SCALED_VALUES, missing_scale="error"),
    # silveroxides/convert_to_quant format_migration.py: ComfyUI's older files give plain weights 1.
    *[yes(f"a dummy {[*shape]} {dtype}", {"scaled_fp8": torch.zeros(0).to(E4M3), **SCALED, **PLAIN,
          **at("b", scale_weight=torch.ones(shape, dtype=dtype), scale_input=rand())},
          {**SCALED_VALUES, **PLAIN})
      for shape in ((), (1,)) for dtype in (torch.float32, torch.float16, BF16)],
    *[yes(f"{name} near a plain cast", {"te.l.weight": CODES, f"te.{name}": DIVISOR},
          {"te.l.weight": CODES.float().bfloat16(), f"te.{name}": DIVISOR}, missing_scale="cast")
      for name in ("l.alpha", "scale", "logit_scale", "layer_scale")],
    yes("plain casts called scales", {**CASTS, **NOT_CAST},
        {name: codes.float().bfloat16() for name, codes in CASTS.items()} | NOT_CAST,
        missing_scale="cast"),
]


@pytest.mark.parametrize("tensors, expected, config, options", ACCEPTED)
def test_what_is_known_is_converted(tmp_path, tensors, expected, config, options):
    tensors = {name: c.fresh(value) if isinstance(value, dict) else value.clone()
               for name, value in tensors.items()}
    c.convert(tmp_path, tensors, expected, config, **options)


@pytest.mark.parametrize("dtype", [BF16, torch.int64, torch.uint64, torch.bool])
def test_scale_of_what_is_not_quantized_is_dropped_and_named(tmp_path, dtype, capsys):
    plain = {"a.weight": ONES.to(dtype)}
    c.convert(tmp_path, {**FP8_WEIGHT, **plain, "a.weight_scale_inv": rand(1, 1)},
              {**FP8_VALUES, **plain})
    assert "no weight: a.weight_scale_inv\n" in capsys.readouterr().out


# --- what is refused ---


def no(fact, tensors, config=None, words="", **options):
    """Return a case, and what of its message: one of the words, or the name of the first tensor."""
    return pytest.param(tensors, config, words or next(iter(tensors)), options, id=fact)


STRANGERS = """weight_offset left_trans svd_up quant_bias pre_quant_scale input_rotation alpha foo
smooth_factor lora_a weight_codebook deq_scale weight_scale_2""".split()
UNKNOWN_PARTNERS = """weight_quantizer._scale weight._scale weight_scaling_factor scales
weights_scaling_factor scale_reciprocal weight_scales fp8_scale weight_scale_row""".split()
ORPHANS = """weight_scale qscale_weight scale_weight up_scale_inv up_scales_inv
up_weight_scale""".split()
PARTNERS = {  # Integers, and what beside them is named like their scale.
    "l.weight l.weight_scale": I8, "l.weight l.scales": U8, "l.weight l.weight.absmax": U8,
    "l.weight l.weights_scaling_factor": I8, "l.weight l.weight_quantizer._scale": U8,
    "l.codes l.codes_scale": torch.int16, "e.down_proj e.down_proj_scale": U8,
    "w.blocks w.scales": U8, "w w_scale_inv": I32, "emb emb.scale": I8,
}
UNDER_A_METHOD = [*(("l.weight", dtype) for dtype in (U8, I8, I32, torch.uint32)), ("q_proj", U8),
                  ("l.w_packed", U8), ("l.qweight", I32), ("l._x_qdata", U8), ("e.down_proj", I8)]
ASCEND = at("l", weight_scale=COLUMN, weight_offset=torch.zeros(4, 1))
GROUP = {"qscheme": "per_group", "group_size": 32}
MX = at("l", weight_packed=BYTES, weight_scale=exponents(4, 1))
MX_WEIGHT = at("l", weight=packed(30, 48), weight_scale=exponents(30, 3))
MODELOPT = method("modelopt", quant_algo="NVFP4")
MODELOPT_NVFP4 = at("l", weight=packed(4, 8), weight_scale=FP4_SCALES, weight_scale_2=rand())
INKLING_LOOP = at("e", w13_weight=packed(8, 8).view(2, 4, 8), w13_weight_amax=rand(2),
                  w13_weight_scale=finite_codes(2, 4, 1).abs(),
                  w13_weight_outer_scale_denominator=rand())

REFUSED = [
    *[no(f"{leaf} beside a weight", {**FP8_WEIGHT, f"o.{leaf}": rand(4)}, None, f"o.{leaf}")
      for leaf in STRANGERS],
    *[no(f"{ending} after a fused name", {**FUSED, f"experts.up_proj{ending}": rand(2)}, None,
         f"experts.up_proj{ending}")
      for ending in """_zero_point _pre_quant_scale _weight_offset _svdquant_lora_a _input_rotation
                       _weight_scale_2 .pre_quant_scale .weight_offset""".split()],
    *[no(f"{dtype} {pair} {[*more]}", {**dict(zip(pair.split(), (
        every_code(4, 8, U8).to(dtype), COLUMN), strict=True)), **more})
      for pair, dtype in PARTNERS.items() for more in ({}, FP8_WEIGHT)],
    *[no(f"{dtype} {name} {[*more]}", {name: torch.ones(4, 8).to(dtype), **more}, method("gptq"))
      for name, dtype in UNDER_A_METHOD for more in ({}, FP8_WEIGHT)],
    *[no(f"{key} {value}", {"l.weight": packed(4, 4), **FP8_WEIGHT}, {key: value})
      for key in ("quantization_bit", "quant_type", "dfloat11_config")
      for value in (8, "int8", {"version": "0.2.0"})],
    *[no(f"orphan {leaf} {option}", {"m.0.up.weight": CODES, f"m.{leaf}": rand(3, 3)}, None,
         f"m.{leaf}", missing_scale=option) for leaf in ORPHANS for option in ("keep", "cast")],
    *[no(f"FP8 and {leaf} {option}", {"l.weight": CODES, f"l.{leaf}": COLUMN}, None,
         f"l.{leaf}", missing_scale=option)
      for leaf in UNKNOWN_PARTNERS for option in ("keep", "cast")],
    *[no(f"exponents {name}", {name: exponents(1, 1, dtype=c.E8M0), "a.weight": rand(3, 3),
                               **FP8_WEIGHT}) for name in ("a.scale", "a.weight_scale", "alone")],
    no("FP8 without a scale", {"w": CODES}, None, "w has no scale, one of 1 weights",
       missing_scale="error"),
    no("FP8 of no weight", {"a.input_scale": finite_codes(3), "b.weight": CODES}),
    # ModelCloud/GPTQModel, quantize_fp8_weight: the only semantics it writes is "inverse".
    *[no(f"semantics {word}", FP8_WEIGHT, method("fp8", weight_scale_semantics=word),
         "weight_scale_semantics|o.weight") for word in ("forward", "unknown")],
    # Bytes with a scale_inv are E4M3 only without a method, and only with this name.
    *[no(f"bytes under {name}", at("w", weight=packed(130, 140), weight_scale_inv=rand(2, 2)),
         method(name)) for name in ("gptq", "fp8")],
    no("bytes and a weight_scale", at("w", weight=packed(130, 140), weight_scale=rand(2, 2))),
    no("bytes under a sidecar", {"l.weight": BYTES}, {"": method("gptq")}),
    # side tensors that would change values, and scales that are too many
    *[no(f"indexer.{kind}_rot", {f"a.indexer.{kind}_rot": rand(128, 128, dtype=BF16), **MXFP8})
      for kind in "qk"],
    *[no(f"a dummy {value.dtype} {[*value.shape]}", {"b.scale_weight": value, **PLAIN, **SCALED})
      for value in (torch.tensor(1.0000001), torch.tensor(1.0).double(), rand(4))],
    no("zero points of attention", {"a.q_zero_point": CODES[0, :1], **ATTENTION, **TENSOR}),
    no("zero points", at("w", weight_zero_point=torch.tensor([0, 0, 1, 0], dtype=I8),
                         weight=INTEGERS, weight_scale=COLUMN), method("w8a8_int8")),
    no("rival scales", {**TENSOR, "l.weight_scale_inv": rand(1, 1)}, None, "two scales"),
    no("NVFP4 without one", at("l", weight=packed(4, 8), weight_scale=FP4_SCALES), MODELOPT),
    no("NVFP4 with two", {"l.weight_global_scale": rand(1), **MODELOPT_NVFP4}, MODELOPT),
    no("FP8 with a second scale", {"l.weight_scale_2": rand(1), **TENSOR}),
    no("packed and plain", {**MX, "l.weight": rand(4, 32)}, c.ct_config(num_bits=4), "l.weight"),
    no("two of one name", {**MX, **at("l", _weight_qdata=CODES, _weight_scale=COLUMN)},
       c.ct_config(num_bits=4), "becomes l.weight"),
    no("rotation at run time", TENSOR, under(
        "quantization_config transform_config config_groups R1",
        {"apply": [{"targets": ["L"], "location": "input"}]}), "transform_config"),
    no("sparse", {"w": ONES}, under("compression_config sparsity_config sparsity_structure", "2:4"),
       "sparsity_config"),
    no("no known kind", {"l.blob": packed(4, 4)}, method("mystery"), "l.blob (U8"),
    *[no(f"ComfyUI {name}", at("l", weight=packed(4, 4), weight_scale=rand(1),
                               comfy_quant=c.note(format=name)), None, name)
      for name in ("mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4")],
    *[no(f"note {text}", {"l.comfy_quant": torch.tensor(list(text), dtype=U8)}, None, "ComfyUI")
      for text in (b"{", b"3", b"{}", b'{"format": []}', b"\xff")],
    no("a note without a scale", at("l", weight=BYTES, comfy_quant=c.note(format="float8_e4m3fn"))),
    # layouts of rows under a config that says something else
    no("MXFP4 of MiMo without store_dtype", MX_WEIGHT, c.CONFIG),
    *[no(f"W4AFP8, {config}", at("e", weight=packed(4, 128, dtype=I8), weight_scale_inv=rand(4, 2))
         | FP8_WEIGHT, config) for config in (None, c.CONFIG)],
    no("FP6 of Quark", MX_WEIGHT, quark(dtype="fp6_e2m3")),
    no("a layer of 4 bits of auto-round", MX,
       method("auto-round", extra_config={"m": {"bits": 4, "data_type": "fp"}})),
    no("NVFP4 of ModelOpt in groups of 32", {**MODELOPT_NVFP4, "l.weight": BYTES}, MODELOPT),
    # huggingface/transformers integrations/gemma_quant.py
    no("Gemma QAT mobile", at("l", weight=BYTES, weight_scale=COLUMN), method("gemma")),
    no("Gemma QAT mobile, I8", at("l", weight=INTEGERS, weight_scale=COLUMN), method("gemma")),
    no("Gemma QAT mobile, embedding", at("e", embedding_quantized=BYTES, embedding_scale=COLUMN),
       method("gemma")),
    # intel/neural-compressor fp8_quant/_quant_common/helper_modules.py: stored [in, out], but not
    # in every layer
    no("Intel Neural Compressor", SCALED, under("quantization_config fp8_config", "E4M3"),
       "/config.json: Intel Neural Compressor"),
    no("Intel Neural Compressor, sidecar", SCALED, {"": {"fp8_config": "E4M3", "mode": "LOAD"}},
       "/quantization_config.json: Intel Neural Compressor"),
    # huggingface/transformers integrations/bitnet.py: [N / 4, K], two bits
    no("BitNet", at("l", weight=packed(1, 32), weight_scale=rand(1)), method("bitnet")),
    # ModelTC/LightX2V tools/convert/quant/quant.py: scales in tiles of 128x4, rows padded;
    # NVIDIA/Model-Optimizer modelopt/torch/export/diffusers_utils.py: the same tiles
    *[no(f"LightX2V NVFP4, {rows} rows", at("l", weight=packed(rows, 64), weight_scale=TILES,
                                            weight_global_scale=rand())) for rows in (100, 128)],
    no("LightX2V MXFP4", at("l", weight=WIDE, weight_scale=exponents(128, 4))),
    no("ModelOpt diffusers", at("l", weight=WIDE, weight_scale=TILES, weight_scale_2=rand())),
    # sgl-project/sglang python/sglang/multimodal_gen, ModelOptFp4Config
    no("swapped nibbles", MODELOPT_NVFP4, method("modelopt", swap_weight_nibbles=True),
       "swap_weight_nibbles"),
    # vllm-project/vllm-ascend vllm_ascend/quantization/methods: w8a8_static, w4a4_flatquant
    *[no(f"Ascend {[*more]} {config}", {"l.weight": INTEGERS, **ASCEND, **more}, config, "l.")
      for more, config in (({}, None), ({"l.left_trans": rand(2, 2)}, None),
                           ({"l.deq_scale": rand(4)}, method("ascend")))],
    no("Ascend FP8", {**ASCEND, "l.weight": CODES}, None, "l.weight_offset"),
    *[no(f"SDNQ {codes.dtype}", at("l", weight=codes, scale=COLUMN), method("sdnq"), "sdnq")
      for codes in (INTEGERS, CODES)],  # Disty0/sdnq src/sdnq/dequantizer.py
    # A fork of compressed-tensors with a MixFP4PackedCompressor; the second name is the older
    *[no(form, NVFP4, method("compressed-tensors", format=form), f"{form}|l.weight_packed")
      for form in ("mixfp4-pack-quantized", "mixed-fp4-int4-pack-quantized")],
    *[no(f"quanto {codes.dtype}", at("l.weight", _data=codes, _scale=COLUMN))
      for codes in (INTEGERS, CODES)],  # huggingface/optimum-quanto optimum/quanto/nn/qmodule.py
    # NVIDIA/TensorRT-LLM tensorrt_llm/quantization
    no("TensorRT-LLM INT8", at("l", weight=packed(64, 64), per_channel_scale=rand(64))),
    # aredden/flux-fp8-api float8_quantize.py: scale divides, weight is a placeholder
    no("flux-fp8", at("l", float8_data=CODES, weight=torch.zeros(1).half(), scale=rand(),
                      scale_reciprocal=rand(), input_scale=rand()), None, "l.float8_data|l.scale"),
    *[no(f"Paddle {codes.dtype}", at("l", quant_weight=codes, weight_scale=rand(4)), None, "l.")
      for codes in (INTEGERS, CODES)],  # PaddleNLP paddlenlp/quantization/quantization_utils.py
    # amd-quark quark/torch/export/nn/modules/realquantizer.py: integers per group are transposed
    no("Quark INT4 beside FP8", {**at("l", weight=packed(64, 4).view(I32), weight_scale=rand(2, 8)),
                                 **FP8_WEIGHT}, quark(dtype="int4", **GROUP)),
    *[no(f"Quark INT8 per group, {cols} columns", at("l", weight=every_code(64, cols, I8),
         weight_scale=rand(2, cols)), quark(dtype="int8", **GROUP)) for cols in (4, 64)],
    # amd-quark quark/torch/quantization/config/config.py, AmdFP4Spec
    no("Quark FP4 with E5M3 scales", at("l", weight=BYTES, weight_scale=exponents(4, 1)),
       quark(dtype="fp4", scale_format="e5m3", **GROUP), "l.weight|e5m3"),
    *[no(f"Quark {dtype} in bytes", at("l", weight=BYTES, weight_scale=rand(*shape)),
         quark(dtype=dtype, scale_format="float32"), f"l.weight|{dtype}")
      for dtype, shape in (("fp8_e5m3", ()), ("uint8", (4, 1)), ("fp4", (4, 1)))],
    no("rotation of Quark", MX_WEIGHT, method("quark", algo_config=[{"r4": True}]), "r4"),
    no("gpt-oss", at("e", up_proj_blocks=packed(2, 16), up_proj_scales=packed(2, 1))),
    # intel/auto-round auto_round/export/export_to_autoround/qlinear_int.py
    no("auto-round MXINT4", MX, method("auto-round", group_size=32, data_type="mx_int")),
    no("hadamard of auto-round", MX, method("auto-round", hadamard_config={"a": 32}), "hadamard"),
    # vllm-project/compressed-tensors compressors/pack_quantized: the container of INT4 too
    no("W8A16", at("l", weight_packed=packed(4, 32).view(I32), weight_scale=COLUMN,
                   weight_shape=torch.tensor([4, 32])),
       c.ct_config(type="int", strategy="channel"), "l.weight_packed|num_bits"),
    # huggingface/transformers quantizers/quantizer_torchao.py
    no("torchao SmoothQuant", at("l", _weight_act_pre_scale=rand(8), _weight_qdata=CODES,
                                 _weight_scale=COLUMN), method("torchao")),
    # pytorch/ao prototype/mx_formats: scales of [192, 416] in tiles
    *[no(f"torchao swizzled {codes.dtype}", at("l", _weight_qdata=codes, _weight_scale=exponents(
        64, 64, dtype=c.E8M0)), method("torchao"))
      for codes in (packed(192, 208), finite_codes(192, 416))],
    # NVIDIA/Model-Optimizer modelopt/torch/export: experts of Llama 4 and gpt-oss stay transposed
    no("ModelOpt transposed NVFP4", at(
        "experts", up_proj=packed(384, 256).view(4, 96, 256), up_proj_weight_scale_2=rand(),
        up_proj_weight_scale=c.positive(finite_codes(4, 12, 256))), MODELOPT),
    no("ModelOpt transposed FP8 blocks",
       at("experts", up_proj=finite_codes(4, 256, 384), up_proj_weight_scale=rand(4, 3, 1, 2, 1)),
       method("modelopt", quant_algo="FP8_PB_WO")),
    # NVIDIA/Model-Optimizer modelopt/torch/quantization/nn/modules/tensor_quantizer.py
    no("ModelOpt compressed NVFP4", {"l.weight": BYTES, **at(
        "l.weight_quantizer", _scale=c.positive(finite_codes(4, 2)), _double_scale=rand())}),
    # vllm-project/vllm, issue 47396: one scale each for q, k and v, whose rows differ
    no("ModelOpt Qwen3.5", at("a.in_proj_qkv", weight=finite_codes(96, 8), weight_scale=rand(3)),
       method("modelopt", quant_algo="FP8")),
    # THUDM/ChatGLM-6B quantization.py
    no("ChatGLM", at("l", weight=INTEGERS, weight_scale=rand(4)), {"quantization_bit": 8}),
    # huggingface/transformers core_model_loading.py, Inkling2LoopDequantizeExperts
    no("Inkling 2 loop", INKLING_LOOP), no("Inkling 2, ModelOpt", INKLING_LOOP, method("modelopt")),
    # transformers 5.24 integrations/nvfp4.py, NVFP4Linear: swizzled scales
    no("NVFP4 of the kernel in transformers 5.24", at(
        "m", weight=packed(32, 32), weight_sf_rowmajor=packed(32, 4), weight_global_scale=rand(1),
        weight_sf=packed(128, 4).view(I32)), method("nvfp4")),
    no("GPTQ", at("l", qweight=packed(4, 16).view(I32), scales=rand(1, 4))),
    no("MLX", at("l", weight=packed(4, 16).view(torch.uint32), scales=COLUMN)),
    no("bitsandbytes INT8", at("l", weight=packed(8, 1, dtype=I8), SCB=rand(8))),
    no("HQQ", at("l", W_q=packed(4, 4), scale=rand(4), zero=rand(4))),
    no("fouroversix", at("l", quantized_weight_values=BYTES,
                         quantized_weight_scale_factors=rand(4))),
    no("EXL3", at("l", trellis=packed(4, 4).to(torch.int16), suh=rand(4), svh=rand(4))),
    no("bitmask", {"l.weight.bitmask": packed(4, 4), "l.weight.compressed": rand(4)}),
    # layouts that came out wrong or half converted when others attacked the rules
    no("INT4 of torchao as INT8", at("l", _weight_qdata=every_code(1024, 64, I8),
                                     _weight_scale=rand(16, 64)), method("torchao")),
    no("INT8 in groups of rows", at("l", weight=WIDE.view(I8), weight_scale=rand(4, 64)),
       method("compressed-tensors")),
    no("lmdeploy blocks", at("l", weight=WIDE.view(I8), scale=rand(2, 1)), method("smooth_quant")),
    *[no(f"nunchaku {scales.dtype}", at("l", qweight=packed(64, 64), wscales=scales))
      for scales in (rand(2, 64), finite_codes(8, 64))],
    no("SqueezeLLM", at("l", qweight=packed(4, 256).view(I32), lookup_table=rand(64, 16))),
    no("AQLM beside FP8", {"l.codes": packed(64, 8).to(torch.int16), **FP8_WEIGHT}, method("aqlm")),
    no("flat bytes", {"l.weight": packed(64, 1).view(-1), "l.weight.absmax": rand(1)}),
]


@pytest.mark.parametrize("tensors, config, words, options", REFUSED)
def test_what_no_format_describes_is_refused_by_name(tmp_path, tensors, config, words, options):
    if config and "" in config:  # It stands in a file of its own.
        c.write_json(tmp_path / "in/quantization_config.json", config[""])
        config = None
    message = c.assert_refused(tmp_path, c.fresh(tensors), config=config, **options)
    assert any(word in message for word in words.split("|")), message


@pytest.mark.parametrize("name", ["model0-mp8.safetensors", "model-rank-0-part-0.safetensors"])
def test_slices_of_tensor_parallel_ranks_are_refused(tmp_path, name):
    # vllm-project/vllm model_loader/sharded_state_loader.py, DEFAULT_PATTERN
    c.assert_refused(tmp_path, {"w": rand(4, 4)}, f"{name}: ", "tensor-parallel", name=name)


@pytest.mark.parametrize("tensors, config", [
    (NVFP4, c.ct_config(num_bits=4, group_size=16)), (MODELOPT_NVFP4, MODELOPT)])
def test_negative_block_scales_of_nvfp4_end_the_conversion(tmp_path, tensors, config):
    scale = tensors["l.weight_scale"].float()
    scale[2] = -1.5
    tensors = {**tensors, "l.weight_scale": scale.to(E4M3)}
    c.write_checkpoint(tmp_path / "in", {c.SHARD: tensors}, config)
    with pytest.raises(CheckpointError, match=r"l\.weight_scale"):
        main(tmp_path / "in", tmp_path / "out")
    assert not {c.SHARD, "config.json", c.INDEX} & {*c.contents(tmp_path / "out")}


LEAVES = st.from_regex(r"[a-z][a-z0-9]{0,8}(_[a-z0-9]{1,8}){0,3}", fullmatch=True)
# Names that a format may give to a scale, a side tensor or a parameter of its own.
KNOWN_LEAVES = """weight bias scale scales weight_scale weight_scale_inv weight_scale_2 scale_2
scale_weight scale_input scale_inv qscale_weight qscale_act weight_packed weight_shape input_scale
output_scale act_scale activation_scale input_scale_ub k_scale v_scale q_scale kv_scale prob_scale
prob_output_scale global_scale weight_global_scale input_global_scale comfy_quant k_bias v_bias
input_amax original_shape weight_g_idx""".split()
KNOWN = {x.title: x for x in LAYOUTS if not x.files and not x.options and all(
    name.startswith("l.") and name != "l.qkv_proj" for name in x.tensors)}


@pytest.mark.parametrize("layout", KNOWN.values(), ids=KNOWN)
@settings(max_examples=15, deadline=None)
@given(leaf=(st.sampled_from(STRANGERS[:-1]) | LEAVES).filter(
           lambda leaf: leaf not in KNOWN_LEAVES and not re.search("(_|^)(zp|zero_point)$", leaf)),
       dtype=st.sampled_from([torch.float32, BF16, I32, torch.int64]))
def test_any_unknown_tensor_in_the_module_of_any_known_format_is_refused(layout, leaf, dtype):
    tensors = {**layout.tensors, f"l.{leaf}": torch.ones(4).to(dtype)}
    with tempfile.TemporaryDirectory() as folder:
        c.assert_refused(Path(folder), c.fresh(tensors), f"l.{leaf}", config=layout.config)
