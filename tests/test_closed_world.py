"""The closed world: what a format positively describes is converted, what else looks quantized ends
the run before anything is written, and parameters and tables are copied.
"""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints as c
from checkpoints import (
    dequantized,
    every_code,
    exponents,
    finite_codes,
    method,
    packed,
    positive,
    rand,
)
from fp8_cast_bf16 import CheckpointError, main

BF16, I8, I32 = torch.bfloat16, torch.int8, torch.int32
CT = "compressed-tensors"
FP8_WEIGHT = {"o.weight": finite_codes(4, 32), "o.weight_scale_inv": torch.tensor([0.5])}
FP8_VALUES = {"o.weight": dequantized(FP8_WEIGHT["o.weight"], torch.tensor([[0.5]]), (4, 32))}


def groups(form, **weights):
    """Return a config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return method(CT, format=form, config_groups={"group_0": group})


def quark(**weight):
    return method("quark", global_quant_config={"weight": weight}, export={}, exclude=[])


def at(prefix, **leaves):
    return {f"{prefix}.{leaf}": tensor for leaf, tensor in leaves.items()}


CODES, BLOCK_SCALES, BYTES = finite_codes(4, 8), positive(finite_codes(4, 1)), packed(4, 16)
KNOWN = {
    "FP8 blocks": (
        at("l", weight=finite_codes(130, 140), weight_scale_inv=rand(2, 2)), c.CONFIG
    ),
    "FP8 per tensor": (at("l", weight=CODES, weight_scale=rand()), None),
    "NVFP4 of compressed-tensors": (
        at("l", weight_packed=packed(4, 8), weight_scale=BLOCK_SCALES, weight_global_scale=rand(1)),
        groups("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
    ),
    "NVFP4 of ModelOpt": (
        at("l", weight=packed(4, 8), weight_scale=BLOCK_SCALES, weight_scale_2=rand()),
        method("modelopt", quant_algo="NVFP4"),
    ),
    "MXFP4": (
        at("l", weight_packed=BYTES, weight_scale=exponents(4, 1)),
        groups("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
    ),
    "INT4": (
        at("l", weight_packed=BYTES.view(I32), weight_scale=rand(4, 1, dtype=BF16),
           weight_shape=torch.tensor([4, 32])),
        groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "torchao": (at("l", _weight_qdata=CODES, _weight_scale=rand(4, 1)), method("torchao")),
    "INT8": (
        at("l", weight=every_code(4, 8, I8), weight_scale=rand(4, 1)),
        groups("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
}
OTHER_CONTAINERS = [kind for kind in KNOWN if not kind.startswith(("FP8", "torchao"))]

# --- 1: the methods, and where they stand ---


@pytest.mark.parametrize("name", ["fp8", "modelopt", "bitnet", "gptq", "nobody knows"])
def test_fp8_with_a_scale_is_known_whatever_the_config_says(tmp_path, name):
    c.convert(tmp_path, FP8_WEIGHT, FP8_VALUES, {**method(name), "quantization_bit": 8})


@pytest.mark.parametrize("semantics", ["forward", "unknown"])
def test_fp8_yields_to_a_key_that_says_the_contrary_in_unknown_words(tmp_path, semantics):
    # ModelCloud/GPTQModel, quantize_fp8_weight: the only semantics it writes is "inverse".
    config = method("fp8", weight_scale_semantics=semantics)
    message = c.assert_refused(tmp_path, FP8_WEIGHT, config=config)
    assert re.search(r"weight_scale_semantics|o\.weight", message)


def test_bytes_with_a_scale_inv_are_e4m3_only_without_a_method(tmp_path):
    codes, scale = every_code(130, 140), rand(2, 2)
    tensors = {"w.weight": codes.view(torch.uint8), "w.weight_scale_inv": scale}
    c.convert(tmp_path / "none", tensors, {"w.weight": dequantized(codes, scale)})
    c.assert_refused(tmp_path / "other", tensors, "w.weight", config=method("gptq"))
    tensors = {"w.weight": codes.view(torch.uint8), "w.weight_scale": scale}
    c.assert_refused(tmp_path / "name", tensors, "w.weight")


@pytest.mark.parametrize(
    "place",
    [
        ("config.json", "quantization_config"),
        ("config.json", "compression_config"),
        ("config.json", "text_config", "quantization_config"),
        ("config.json", "a", "b", "compression_config"),
        ("params.json", "quantization"),  # vllm-project/vllm, issue 16803
    ],
)
def test_method_may_stand_in_any_of_its_places(tmp_path, place):
    second = torch.tensor([777.0])
    codes, scale, values = c.nvfp4(second, divide=True)
    tensors = {"l.weight_packed": codes, "l.weight_scale": scale, "l.weight_global_scale": second}
    config = KNOWN["NVFP4 of compressed-tensors"][1]["quantization_config"]
    for key in reversed(place[1:]):
        config = {key: config}
    c.write_json(tmp_path / "in" / place[0], config)
    c.convert(tmp_path, tensors, {"l.weight": values})


@pytest.mark.parametrize("key", ["quantization_bit", "quant_type", "dfloat11_config"])
@pytest.mark.parametrize("value", [8, "int8", {"version": "0.2.0"}, None, 0, False, "", {}])
def test_keys_that_name_a_quantization_without_a_method_count_unless_empty(tmp_path, key, value):
    tensors = {**FP8_WEIGHT, "l.weight": packed(4, 4)}
    if value:
        c.assert_refused(tmp_path, tensors, "l.weight", config={key: value})
    else:  # with no method, bytes without a scale are a table
        expected = {**FP8_VALUES, "l.weight": tensors["l.weight"]}
        c.convert(tmp_path, tensors, expected, {key: value})


# --- 2: the tensors of a module are all accounted for ---

STRANGERS = [
    *["weight_offset", "left_trans", "svd_up", "quant_bias", "pre_quant_scale", "input_rotation"],
    *["alpha", "foo", "smooth_factor", "lora_a", "weight_codebook", "deq_scale"],
]


@pytest.mark.parametrize("leaf", STRANGERS)
def test_unknown_tensor_beside_a_converted_weight_is_refused_by_name(tmp_path, leaf):
    c.assert_refused(tmp_path, {**FP8_WEIGHT, f"o.{leaf}": rand(4)}, f"o.{leaf}")


def test_bias_and_what_stands_in_other_modules_is_copied(tmp_path):
    copied = {
        **{"o.bias": rand(4), "alpha": rand(1), "o.norm.weight": rand(4), "o_norm.weight": rand(4)},
        **{"plain.weight": rand(4, 4, dtype=BF16), "plain.alpha": rand(4), "plain.foo": rand(2)},
        **{"router.proj.weight": rand(4, 4), "router.scale": rand(4)},  # Gemma 4
        **{"gate.weight": rand(4, 4), "gate.e_score_correction_bias": rand(4)},
        **{"block.layer_scale": rand(4), "block.table": torch.arange(8).view(2, 4)},
    }
    c.convert(tmp_path, {**FP8_WEIGHT, **copied}, {**FP8_VALUES, **copied})


def test_weight_without_a_scale_may_stand_beside_anything(tmp_path):
    codes, alpha = finite_codes(4, 8), rand(4)
    expected = {"l.weight": codes.float().bfloat16(), "l.alpha": alpha}
    c.convert(tmp_path, {"l.weight": codes, "l.alpha": alpha}, expected, missing_scale="cast")


def fused():
    codes, scale = finite_codes(2, 130, 140), rand(2, 2, 2)
    tensors = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scale}
    return tensors, {"experts.up_proj": dequantized(codes, scale)}


@pytest.mark.parametrize(
    "ending",
    [
        *["_zero_point", "_pre_quant_scale", "_weight_offset", "_svdquant_lora_a"],
        *["_input_rotation", "_weight_scale_2", ".pre_quant_scale", ".weight_offset"],
    ],
)
def test_ending_of_quantization_after_a_fused_name_is_refused(tmp_path, ending):
    tensors = {**fused()[0], f"experts.up_proj{ending}": rand(2)}
    c.assert_refused(tmp_path, tensors, f"experts.up_proj{ending}")


@pytest.mark.parametrize("name", ["up_proj_bias", "up_projector", "up_proj_norm.weight", "foo"])
def test_name_that_only_begins_like_a_fused_weight_is_a_parameter(tmp_path, name):
    tensors, expected = fused()
    parameter = {f"experts.{name}": rand(2, 3)}
    c.convert(tmp_path, {**tensors, **parameter}, {**expected, **parameter})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (2, 1, 1)])
def test_cache_scales_with_one_element_or_one_per_head_are_dropped(tmp_path, shape):
    scales = {f"attn.{letter}_scale": rand(*shape) for letter in "kv"}
    scales["attn.q_scale"] = rand(*(8 if size == 2 else size for size in shape))
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    config |= method("fp8", kv_cache_scheme={"num_bits": 8})
    c.convert(tmp_path, {**FP8_WEIGHT, **scales}, FP8_VALUES, config)


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize("key", ["kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_config"])
@pytest.mark.parametrize("cache", [None, "FP8"])
@pytest.mark.parametrize(
    "leaf, shape", [("q_scale", ()), ("q_scale", (8, 1, 1)), ("k_scale", (2,))]
)
def test_scale_that_may_be_learned_is_dropped_only_where_a_config_names_a_cache(
    tmp_path, leaf, shape, key, cache
):
    # A tower that is not quantized may have such parameters, beside quantized layers of others.
    learned = {f"visual.attn.{leaf}": rand(*shape)}
    expected = FP8_VALUES | ({} if cache else learned)
    c.convert(tmp_path, {**FP8_WEIGHT, **learned}, expected, HEADS | method("fp8", **{key: cache}))


@pytest.mark.parametrize("beside, dropped", [("k", False), ("v", False), ("kv", True)])
def test_single_scale_of_queries_is_dropped_beside_those_of_keys_and_values(
    tmp_path, beside, dropped
):
    query, others = {"a.q_scale": rand()}, {f"a.{letter}_scale": rand(1) for letter in beside}
    expected = FP8_VALUES | ({} if dropped else query)
    c.convert(tmp_path, {**FP8_WEIGHT, **query, **others}, expected, c.CONFIG)


@pytest.mark.parametrize("config", [None, {"num_attention_heads": 8, "num_key_value_heads": 2}])
def test_learned_scales_of_queries_and_keys_are_parameters(tmp_path, config):
    # lucidrains/local-attention local_attention/transformer.py: q_scale and k_scale of (dim_head,)
    learned = {"attn.q_scale": rand(64), "attn.k_scale": rand(64), "b.v_scale": rand(4, 16)}
    c.convert(tmp_path, {**FP8_WEIGHT, **learned}, {**FP8_VALUES, **learned}, config)


def test_side_tensors_are_dropped_only_beside_weights_that_have_them(tmp_path):
    # vllm-project/vllm vllm/models/inkling: mlp.gate.global_scale is a learned parameter.
    tensors, config = KNOWN["NVFP4 of compressed-tensors"]
    copied = {
        **{"mlp.gate.weight": rand(4, 4), "mlp.gate.global_scale": rand(1)},
        **{"x.weight": rand(4, 4), "x.input_amax": rand(4), "x.weight_shape": torch.arange(2)},
    }
    tensors = {**tensors, "l.input_global_scale": rand(1), **copied}
    c.write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    main(tmp_path / "in", tmp_path / "out")
    got = c.load_checkpoint(tmp_path / "out")
    assert set(got) == {"l.weight", *copied}
    for name, tensor in copied.items():
        c.assert_same_bits(got[name], tensor)


LEAVES = st.from_regex(r"[a-z][a-z0-9]{0,8}(_[a-z0-9]{1,8}){0,3}", fullmatch=True)
# Names that a format may give to a scale, a side tensor or a parameter of its own.
KNOWN_LEAVES = """weight bias scale scales weight_scale weight_scale_inv weight_scale_2 scale_2
scale_weight scale_input scale_inv qscale_weight qscale_act weight_packed weight_shape input_scale
output_scale act_scale activation_scale input_scale_ub k_scale v_scale q_scale kv_scale prob_scale
prob_output_scale global_scale weight_global_scale input_global_scale comfy_quant k_bias v_bias
input_amax original_shape weight_g_idx""".split()


@pytest.mark.parametrize("kind", KNOWN)
@settings(max_examples=20, deadline=None)
@given(
    leaf=(st.sampled_from(STRANGERS) | LEAVES).filter(
        lambda leaf: leaf not in KNOWN_LEAVES and not re.search("(_|^)(zp|zero_point)$", leaf)
    ),
    dtype=st.sampled_from([torch.float32, BF16, I32, torch.int64]),
)
def test_any_unknown_tensor_in_the_module_of_any_known_format_is_refused(kind, leaf, dtype):
    tensors, config = KNOWN[kind]
    with tempfile.TemporaryDirectory() as folder:
        stranger = torch.ones(4).to(dtype)
        message = c.assert_refused(Path(folder), {**tensors, f"l.{leaf}": stranger}, config=config)
    assert f"l.{leaf}" in message


# --- 3: nothing is half converted ---


@pytest.mark.parametrize("others", [{}, FP8_WEIGHT], ids=["alone", "beside FP8"])
@pytest.mark.parametrize(
    "name, partner, dtype",
    [
        ("l.weight", "l.weight_scale", I8),
        ("l.weight", "l.weight_scale", I32),
        ("l.weight", "l.scales", torch.uint8),
        ("l.weight", "l.weights_scaling_factor", I8),
        ("l.weight", "l.weight.absmax", torch.uint8),
        ("l.weight", "l.weight_quantizer._scale", torch.uint8),
        ("l.codes", "l.codes_scale", torch.int16),
        ("e.down_proj", "e.down_proj_scale", torch.uint8),
        ("emb", "emb.scale", I8),
        ("w.blocks", "w.scales", torch.uint8),
    ],
)
def test_integers_with_a_partner_named_like_a_scale_are_refused(
    tmp_path, name, partner, dtype, others
):
    tensors = {**others, name: every_code(4, 8, torch.uint8).to(dtype), partner: rand(4, 1)}
    c.assert_refused(tmp_path, tensors, name)


@pytest.mark.parametrize("others", [{}, FP8_WEIGHT], ids=["alone", "beside FP8"])
@pytest.mark.parametrize(
    "name, dtype",
    [
        *[("l.weight", torch.uint8), ("l.weight", I8), ("l.weight", I32)],
        *[("l.weight", torch.uint32), ("l.w_packed", torch.uint8), ("l.qweight", I32)],
        *[("l._x_qdata", torch.uint8), ("e.down_proj", I8), ("q_proj", torch.uint8)],
    ],
)
def test_integers_named_like_weights_are_refused_under_a_method(tmp_path, name, dtype, others):
    tensors = {**others, name: torch.ones(4, 8).to(dtype)}
    c.assert_refused(tmp_path, tensors, name, config=method("gptq"))


@pytest.mark.parametrize("config", [None, c.CONFIG, method("modelopt")])
def test_tables_and_masks_are_copied(tmp_path, config):
    tables = {
        # deepseek-ai/DeepSeek-V4: experts by token, two-dimensional
        **{"ffn.gate.tid2eid": torch.arange(12).view(6, 2), "ffn.gate.weight": rand(2, 4)},
        "layers.1.ffn.gate.tid2eid": torch.arange(12, dtype=I32).view(6, 2),
        "text_model.embeddings.position_ids": torch.arange(77).view(1, 77),
        "attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "attn.relative_position_index": torch.arange(16, dtype=I32).view(4, 4),
    }
    c.convert(tmp_path, {**FP8_WEIGHT, **tables}, {**FP8_VALUES, **tables}, config)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.bool])
def test_wide_integers_and_truth_values_never_hold_codes(tmp_path, dtype):
    table = {"t.weight": torch.ones(4, 4).to(dtype), "t.weight_scale": rand(4, 1)}
    c.convert(tmp_path, {**FP8_WEIGHT, **table}, {**FP8_VALUES, **table}, method("gptq"))


@pytest.mark.parametrize("config", [None, c.CONFIG])
def test_bytes_without_a_partner_or_a_method_are_copied(tmp_path, config):
    table = {"l.weight": packed(4, 4), "down_proj": packed(4, 4, dtype=I8)}
    c.convert(tmp_path, {**FP8_WEIGHT, **table}, {**FP8_VALUES, **table}, config)


@pytest.mark.parametrize("option", ["keep", "cast"])
@pytest.mark.parametrize(
    "leaf",
    [
        *["weight_scale", "qscale_weight", "scale_weight"],
        *["up_scale_inv", "up_scales_inv", "up_weight_scale"],
    ],
)
def test_scale_of_no_weight_above_fp8_without_a_scale_is_refused(tmp_path, leaf, option):
    tensors = {"m.0.up.weight": finite_codes(4, 8), f"m.{leaf}": rand(3, 3)}
    assert f"m.{leaf}" in c.assert_refused(tmp_path, tensors, missing_scale=option)


@pytest.mark.parametrize("leaf", ["scale", "logit_scale", "layer_scale"])
def test_parameter_named_scale_above_plain_casts_is_rand(tmp_path, leaf):
    name, codes = "text_encoders.clip_l.transformer.weight", finite_codes(4, 8)
    parameter = {f"text_encoders.clip_l.{leaf}": rand()}
    expected = {name: codes.float().bfloat16(), **parameter}
    c.convert(tmp_path, {name: codes, **parameter}, expected, missing_scale="cast")


def test_scale_of_a_plain_weight_is_dropped_where_no_fp8_weight_lacks_one(tmp_path, capsys):
    tensors = {**FP8_WEIGHT, "a.weight": rand(3, 3), "a.weight_scale_inv": rand(1, 1)}
    c.convert(tmp_path, tensors, {**FP8_VALUES, "a.weight": tensors["a.weight"]})
    assert "a.weight_scale_inv" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.scale", "a.weight_scale", "alone"])
def test_exponents_that_are_no_known_scale_are_refused(tmp_path, name):
    tensors = {**FP8_WEIGHT, "a.weight": rand(3, 3), name: exponents(1, 1, dtype=c.E8M0)}
    c.assert_refused(tmp_path, tensors, name)


# --- 4: partners, and what is cast ---


@pytest.mark.parametrize("option", ["keep", "cast"])
@pytest.mark.parametrize(
    "leaf",
    [
        *["weight_quantizer._scale", "weight._scale", "weight_scaling_factor", "scales"],
        *["weights_scaling_factor", "scale_reciprocal", "weight_scales"],
    ],
)
def test_fp8_weight_with_a_partner_of_no_known_format_is_refused(tmp_path, leaf, option):
    tensors = {"l.weight": finite_codes(4, 8), f"l.{leaf}": rand(4, 1)}
    assert f"l.{leaf}" in c.assert_refused(tmp_path, tensors, missing_scale=option)


def test_plain_casts_of_parameters_named_like_scales_are_cast(tmp_path):
    codes = {  # LTX-2 and SeedVR2: what is not a scale was cast to FP8 with the rest
        "blocks.0.scale_shift_table": (6, 32),
        "blocks.0.scale_shift_table_a2v_ca_audio": (5, 32),
        "blocks.0.attn1.to_q.weight": (8, 32),
        "blocks.0.ada.attn_scale": (32,),
        "blocks.0.ada.attn_shift": (32,),
        "blocks.0.ada.weight": (4, 32),
        **{"blocks.0.a": (4, 32), "blocks.0.a_norm.layer_scale": (32,)},
    }
    codes = {name: finite_codes(*shape) for name, shape in codes.items()}
    expected = {name: tensor.float().bfloat16() for name, tensor in codes.items()}
    plain = {"blocks.0.b_norm.layer_scale": rand(32), "blocks.0.scale_shift_table_c": rand(2, 32)}
    codes["blocks.0.b"] = finite_codes(4, 32)
    expected["blocks.0.b"] = codes["blocks.0.b"].float().bfloat16()
    c.convert(tmp_path, {**codes, **plain}, {**expected, **plain}, missing_scale="cast")


# --- 5: grids that contradict the config ---


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 4), (1, 2), (4, 8)])
def test_grid_that_contradicts_the_config_is_refused_with_both_grids(tmp_path, grid):
    tensors = {"w.weight": finite_codes(256, 256), "w.weight_scale_inv": rand(*grid)}
    complaints = "w.weight", "128", "[2, 2]", str(list(grid))
    c.assert_refused(tmp_path, tensors, *complaints, config=c.CONFIG)


@pytest.mark.parametrize("cols", [32, 16, 128, 256])
def test_finer_scales_of_single_rows_may_stand_beside_the_blocks_of_a_config(tmp_path, cols):
    codes, scale = finite_codes(256, 256), rand(256, 256 // cols)
    tensors = {**FP8_WEIGHT, "w.weight": codes, "w.weight_scale_inv": scale}
    expected = {**FP8_VALUES, "w.weight": dequantized(codes, scale, (1, cols))}
    c.convert(tmp_path, tensors, expected, c.CONFIG)


def test_without_a_config_a_grid_may_have_other_blocks(tmp_path):
    codes, scale = finite_codes(256, 256), rand(4, 4)
    tensors = {"w.weight": codes, "w.weight_scale_inv": scale}
    c.convert(tmp_path, tensors, {"w.weight": dequantized(codes, scale, (64, 64))})


# --- 6: second scales ---


@pytest.mark.parametrize("kind", ["NVFP4 of compressed-tensors", "NVFP4 of ModelOpt"])
def test_negative_block_scales_of_nvfp4_end_the_conversion(tmp_path, kind):
    tensors, config = KNOWN[kind]
    scale = tensors["l.weight_scale"].float()
    scale[2] = -1.5
    tensors = {**tensors, "l.weight_scale": scale.to(torch.float8_e4m3fn)}
    c.write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, config)
    with pytest.raises(CheckpointError, match=r"l\.weight_scale"):
        main(tmp_path / "in", tmp_path / "out")
    for name in "model.safetensors", "config.json", "model.safetensors.index.json":
        assert not (tmp_path / "out" / name).exists()


# --- layouts that others publish and that no format here describes ---

FP4_SCALES, INTEGERS = positive(finite_codes(128, 8)), every_code(4, 8, I8)
ASCEND = at("l", weight_scale=rand(4, 1), weight_offset=torch.zeros(4, 1))
QUARK_GROUP = {"qscheme": "per_group", "group_size": 32}
NOTE = torch.tensor([*b'{"format": "int8_tensorwise"}'], dtype=torch.uint8)
INKLING_LOOP = at(
    "e", w13_weight=packed(8, 8).view(2, 4, 8), w13_weight_scale=finite_codes(2, 4, 1).abs(),
    w13_weight_amax=rand(2), w13_weight_outer_scale_denominator=rand(),
)
LAYOUTS = [  # what it is, its tensors and config, and one of the words that the message names
    # huggingface/transformers integrations/gemma_quant.py
    ("Gemma QAT mobile", at("l", weight=BYTES, weight_scale=rand(4, 1)), method("gemma"),
     "l.weight"),
    ("Gemma QAT mobile, I8", at("l", weight=INTEGERS, weight_scale=rand(4, 1)), method("gemma"),
     "l.weight"),
    ("Gemma QAT mobile, embedding",
     at("e", embedding_quantized=BYTES, embedding_scale=rand(4, 1)), method("gemma"),
     "e.embedding_quantized"),
    # intel/neural-compressor fp8_quant/_quant_common/helper_modules.py: stored [in, out]
    ("Intel Neural Compressor",
     at("l", **{"weight": finite_codes(8, 8), "scale_weight": rand(8, dtype=BF16),
                "scale_input": rand(), "quant_input.scale_inv": rand()}),
     {"quantization_config": {"fp8_config": "E4M3", "hp_dtype": "bf16", "mode": "LOAD"}},
     "config.json: Intel Neural Compressor"),
    # huggingface/transformers integrations/bitnet.py: [N / 4, K], two bits
    ("BitNet", at("l", weight=packed(1, 32), weight_scale=rand(1)), method("bitnet"), "l.weight"),
    # NVIDIA/TensorRT-LLM pack_int8_tensor_to_packed_int4, whose writer deletes quantization_config
    ("W4AFP8 without a config",
     {**FP8_WEIGHT, **at("e.w1", weight=packed(4, 128, dtype=I8), weight_scale_inv=rand(4, 2))},
     None, "e.w1.weight"),
    # ModelTC/LightX2V tools/c.convert/quant/quant.py: scales in tiles of 128x4, rows padded
    ("LightX2V NVFP4",
     at("l", weight=packed(128, 64), weight_scale=FP4_SCALES, weight_global_scale=rand()), None,
     "l.weight"),
    ("LightX2V NVFP4, padded",
     at("l", weight=packed(100, 64), weight_scale=FP4_SCALES, weight_global_scale=rand()), None,
     "l.weight"),
    ("LightX2V MXFP4", at("l", weight=packed(128, 64), weight_scale=exponents(128, 4)), None,
     "l.weight"),
    # NVIDIA/Model-Optimizer modelopt/torch/export/diffusers_utils.py: the same tiles
    ("ModelOpt diffusers",
     at("l", weight=packed(128, 64), weight_scale=FP4_SCALES, weight_scale_2=rand()), None,
     "l.weight"),
    # sgl-project/sglang python/sglang/multimodal_gen, ModelOptFp4Config
    ("swapped nibbles", KNOWN["NVFP4 of ModelOpt"][0],
     method("modelopt", quant_algo="NVFP4", swap_weight_nibbles=True), "swap_weight_nibbles"),
    # vllm-project/vllm-ascend vllm_ascend/quantization/methods/w8a8_static.py
    ("Ascend", {**ASCEND, "l.weight": INTEGERS}, None, "l.weight"),
    ("Ascend W8A8",
     {**ASCEND, **at("l", weight=INTEGERS, quant_bias=torch.ones(4).to(I32), deq_scale=rand(4))},
     method("ascend"), "l.weight|l.quant_bias|l.deq_scale"),
    ("Ascend FP8", {**ASCEND, "l.weight": CODES}, None, "l.weight_offset"),
    # vllm-project/vllm-ascend vllm_ascend/quantization/methods/w4a4_flatquant.py
    ("FlatQuant", {**ASCEND, **at("l", weight=INTEGERS, left_trans=rand(2, 2), clip_ratio=rand(1))},
     None, "l.weight|l.left_trans"),
    # Disty0/sdnq src/sdnq/dequantizer.py
    ("SDNQ FP8 with SVD",
     at("l", weight=CODES, scale=rand(4, 1), svd_up=rand(4, 2), svd_down=rand(2, 8)),
     method("sdnq"), "sdnq"),
    ("SDNQ INT8", at("l", weight=INTEGERS, scale=rand(4, 1)), method("sdnq"), "sdnq"),
    # A fork of compressed-tensors with a MixFP4PackedCompressor; the second name is the older
    *[(form, KNOWN["NVFP4 of compressed-tensors"][0], groups(form, num_bits=4, type="float"),
       f"{form}|l.weight_packed")
      for form in ("mixfp4-pack-quantized", "mixed-fp4-int4-pack-quantized")],
    # huggingface/optimum-quanto optimum/quanto/nn/qmodule.py
    *[(f"quanto {codes.dtype}",
       at("l", **{"weight._data": codes, "weight._scale": rand(4, 1), "input_scale": rand()}),
       None, "l.weight._data") for codes in (INTEGERS, CODES)],
    # NVIDIA/TensorRT-LLM tensorrt_llm/quantization
    ("TensorRT-LLM",
     at("l", weight=CODES, weights_scaling_factor=rand(1), activation_scaling_factor=rand(1)),
     None, "l.weight"),
    # aredden/flux-fp8-api float8_quantize.py: scale divides, weight is a placeholder
    ("flux-fp8",
     at("l", float8_data=CODES, weight=torch.zeros(1).half(), scale=rand(), scale_reciprocal=rand(),
        input_scale=rand(), input_scale_reciprocal=rand()),
     None, "l.float8_data|l.scale"),
    # PaddlePaddle/PaddleNLP paddlenlp/quantization/quantization_utils.py
    *[(f"Paddle {codes.dtype}", at("l", quant_weight=codes, weight_scale=rand(4)), None,
       "l.quant_weight|l.weight_scale") for codes in (INTEGERS, CODES)],
    # amd-quark quark/torch/export/nn/modules/realquantizer.py: integers per group are transposed
    ("Quark INT4 beside FP8",
     {**FP8_WEIGHT, **at("l", weight=packed(64, 4).view(I32), weight_scale=rand(2, 8))},
     quark(dtype="int4", **QUARK_GROUP), "l.weight"),
    *[(f"Quark INT8 per group, {cols} columns",
       at("l", weight=every_code(64, cols, I8), weight_scale=rand(2, cols)),
       quark(dtype="int8", **QUARK_GROUP), "l.weight") for cols in (4, 64)],
    # amd-quark quark/torch/quantization/config/config.py, AmdFP4Spec
    ("Quark FP4 with E5M3 scales", at("l", weight=BYTES, weight_scale=exponents(4, 1)),
     quark(dtype="fp4", scale_format="e5m3", **QUARK_GROUP), "l.weight|e5m3"),
    *[(f"Quark {dtype} in bytes", at("l", weight=BYTES, weight_scale=rand(*shape)),
       quark(dtype=dtype, scale_format="float32"), f"l.weight|{dtype}")
      for dtype, shape in [("fp8_e5m3", ()), ("uint8", (4, 1)), ("fp4", (4, 1))]],
    # openai/gpt-oss gpt_oss/torch/weights.py
    ("gpt-oss, original", at("mlp1_weight", blocks=BYTES, scales=exponents(4, 1)), None,
     "mlp1_weight.blocks"),
    # intel/auto-round auto_round/export/export_to_autoround/qlinear_int.py
    ("auto-round MXINT4", KNOWN["MXFP4"][0],
     method("auto-round", bits=4, group_size=32, data_type="mx_int"), "l.weight_packed|mx_int"),
    # vllm-project/compressed-tensors compressors/pack_quantized: the container of INT4 too
    ("W8A16",
     at("l", weight_packed=packed(4, 32).view(I32), weight_scale=rand(4, 1),
        weight_shape=torch.tensor([4, 32])),
     groups("pack-quantized", num_bits=8, type="int", strategy="channel"),
     "l.weight_packed|num_bits"),
    # huggingface/transformers quantizers/quantizer_torchao.py
    ("torchao SmoothQuant", {**KNOWN["torchao"][0], "l._weight_act_pre_scale": rand(8)},
     method("torchao"), "l._weight_act_pre_scale"),
    # pytorch/ao prototype/mx_formats: scales of [192, 416] in tiles
    *[(f"torchao swizzled {codes.dtype}",
       at("l", _weight_qdata=codes, _weight_scale=exponents(64, 64, dtype=c.E8M0)),
       method("torchao"), "swizzled") for codes in (packed(192, 208), finite_codes(192, 416))],
    # NVIDIA/Model-Optimizer modelopt/torch/export: experts of Llama 4 and gpt-oss stay transposed
    ("ModelOpt transposed NVFP4",
     at("experts", up_proj=packed(384, 256).view(4, 96, 256), up_proj_weight_scale_2=rand(),
        up_proj_weight_scale=positive(finite_codes(4, 12, 256))),
     method("modelopt", quant_algo="NVFP4"), "experts.up_proj"),
    ("ModelOpt transposed FP8 blocks",
     at("experts", up_proj=finite_codes(4, 256, 384), up_proj_weight_scale=rand(4, 3, 1, 2, 1)),
     method("modelopt", quant_algo="FP8_PB_WO"), "experts.up_proj"),
    # NVIDIA/Model-Optimizer modelopt/torch/quantization/nn/modules/tensor_quantizer.py
    ("ModelOpt compressed FP8",
     at("q_proj", **{"weight": CODES, "weight_quantizer._scale": rand()}), None, "q_proj.weight"),
    ("ModelOpt compressed NVFP4",
     at("q_proj", **{"weight": BYTES, "weight_quantizer._scale": positive(finite_codes(4, 2)),
                     "weight_quantizer._double_scale": rand()}), None, "q_proj.weight"),
    # vllm-project/vllm, issue 47396: one scale each for q, k and v, whose rows differ
    ("ModelOpt Qwen3.5", at("a.in_proj_qkv", weight=finite_codes(96, 8), weight_scale=rand(3)),
     method("modelopt", quant_algo="FP8"), "a.in_proj_qkv.weight"),
    # THUDM/ChatGLM-6B quantization.py
    ("ChatGLM", at("l", weight=INTEGERS, weight_scale=rand(4)), {"quantization_bit": 8},
     "l.weight|quantization_bit"),
    # huggingface/transformers core_model_loading.py, Inkling2LoopDequantizeExperts
    ("Inkling 2 loop", INKLING_LOOP, None, "e.w13_weight"),
    ("Inkling 2 loop, modelopt", INKLING_LOOP, method("modelopt"), "e.w13_weight"),
    # Comfy-Org/ComfyUI comfy/quant_ops.py
    ("ComfyUI INT8", at("l", weight=INTEGERS, weight_scale=rand(), comfy_quant=NOTE), None,
     "int8_tensorwise"),
    # layouts of rows above under a config that says something else
    ("MXFP4 of MiMo without store_dtype",
     at("l", weight=packed(30, 48), weight_scale=exponents(30, 3)), c.CONFIG, "l.weight"),
    ("W4AFP8 under fp8", at("l", weight=packed(4, 128, dtype=I8), weight_scale_inv=rand(4, 2)),
     c.CONFIG, "l.weight"),
    ("FP6 of Quark", at("l", weight=packed(30, 48), weight_scale=exponents(30, 3)),
     quark(dtype="fp6_e2m3"), "l.weight"),
    ("a layer of 4 bits of auto-round",
     at("l", weight_packed=packed(30, 48), weight_scale=exponents(30, 3)),
     method("auto-round", data_type="mx_fp", extra_config={"m": {"bits": 4, "data_type": "fp"}}),
     "l.weight_packed"),
    ("NVFP4 of ModelOpt in groups of 32",
     at("l", weight=packed(30, 80), weight_scale=positive(finite_codes(30, 5)),
        weight_scale_2=rand()), method("modelopt", quant_algo="NVFP4"), "l.weight"),
    # transformers 5.24 integrations/c.nvfp4.py, NVFP4Linear: swizzled scales
    ("NVFP4 of the kernel in transformers 5.24",
     at("m", weight=packed(32, 32), weight_sf_rowmajor=packed(32, 4),
        weight_sf=packed(128, 4).view(I32), weight_global_scale=rand(1)), method("nvfp4"),
     "m.weight"),
    # layouts of other quantizers
    ("AWQ", {**FP8_WEIGHT, "o.pre_quant_scale": rand(4)}, None, "o.pre_quant_scale"),
    ("GPTQ", at("l", qweight=packed(4, 16).view(I32), scales=rand(1, 4)), None, "l.qweight"),
    ("MLX", at("l", weight=packed(4, 16).view(torch.uint32), scales=rand(4, 1)), None, "l.weight"),
    ("bitsandbytes NF4", {"l.weight": packed(8, 1), "l.weight.absmax": rand(1)}, None, "l.weight"),
    ("bitsandbytes INT8", at("l", weight=packed(8, 1, dtype=I8), SCB=rand(8)), None, "l.weight"),
    ("HQQ", at("l", W_q=packed(4, 4), scale=rand(4), zero=rand(4)), None, "l.W_q"),
    ("fouroversix",
     at("l", quantized_weight_values=packed(4, 4), quantized_weight_scale_factors=rand(4)), None,
     "l.quantized_weight_values"),
    ("EXL3", at("l", trellis=packed(4, 4).to(torch.int16), suh=rand(4), svh=rand(4)), None,
     "l.trellis"),
    ("bitmask", {"l.weight.bitmask": packed(4, 4), "l.weight.compressed": rand(4)}, None,
     "l.weight.bitmask"),
    ("gpt-oss", at("e", up_proj_blocks=packed(2, 16), up_proj_scales=packed(2, 1)), None,
     "e.up_proj_blocks"),
    # layouts that came out wrong or half converted when others attacked the rules
    ("hadamard of auto-round",
     {"l.weight_packed": packed(64, 32), "l.weight_scale": exponents(64, 2)},
     method("auto-round", data_type="mx_fp", hadamard_config={"block_size": 32}), "hadamard"),
    ("rotation of Quark", {"l.weight": packed(64, 64), "l.weight_scale": exponents(64, 4)},
     method("quark", algo_config=[{"name": "rotation", "r4": True}]), "r4"),
    ("INT4 of torchao as INT8", {"l._weight_qdata": every_code(1024, 64, torch.int8),
                                 "l._weight_scale": rand(16, 64)}, method("torchao"), "l._w"),
    ("INT8 in groups of rows", {"l.weight": every_code(128, 128, torch.int8),
                                "l.weight_scale": rand(4, 128)}, method("compressed-tensors"),
     "l.weight"),
    ("lmdeploy in blocks", {"l.weight": every_code(128, 128, torch.int8), "l.scale": rand(2, 2)},
     method("smooth_quant"), "l.weight"),
    ("nunchaku INT4", {"l.qweight": packed(64, 64), "l.wscales": rand(2, 64)}, None, "l.qweight"),
    ("nunchaku FP4", {"l.qweight": packed(64, 64), "l.wscales": finite_codes(8, 64)}, None, "l.q"),
    ("SqueezeLLM", {"l.qweight": packed(4, 256).view(torch.int32), "l.lookup_table": rand(64, 16)},
     None, "l.qweight"),
    ("TensorRT-LLM INT8", {"l.weight": packed(64, 64), "l.per_channel_scale": rand(64)}, None,
     "l.weight"),
    ("AQLM beside FP8", {"l.codes": packed(64, 8).to(torch.int16), "m.weight": finite_codes(4, 4),
                         "m.weight_scale": rand(1)}, method("aqlm"), "l.codes"),
    ("FP8 with a scale of another name",
     {"l.weight": finite_codes(4, 4), "l.fp8_scale": rand(4, 1)}, None, "l.fp8_scale"),
    ("FP8 with a scale of another kind", {"l.weight": finite_codes(4, 4),
                                          "l.weight_scale_row": rand(4, 1)}, None, "l.weight"),
    ("flat bytes", {"l.weight": packed(64, 1).view(-1), "l.weight.absmax": rand(1)}, None,
     "l.weight"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_published_layout_that_no_format_describes_is_refused(tmp_path, layout):
    _, tensors, config, words = layout
    message = c.assert_refused(tmp_path, tensors, config=config)
    assert any(word in message for word in words.split("|")), message


def test_state_that_a_rank_of_vllm_saved_is_refused(tmp_path):
    # vllm-project/vllm model_loader/sharded_state_loader.py, DEFAULT_PATTERN
    name = "model-rank-0-part-0.safetensors"
    assert name in c.assert_refused(tmp_path, {"l.weight": rand(4, 4)}, name=name)


def test_sidecar_config_names_a_method_as_well(tmp_path):
    c.write_checkpoint(tmp_path / "in", {}, {}, index=False)
    (tmp_path / "in/quantization_config.json").write_text('{"quant_method": "gptq"}')
    c.assert_refused(tmp_path, {"l.weight": every_code(64, 64, torch.int8)}, "l.weight (I8)")


def test_sidecar_config_of_intel_neural_compressor_is_refused_by_its_name(tmp_path):
    # Not every layer is transposed, so even an FP8 weight with a known scale cannot be read.
    c.write_json(tmp_path / "in/quantization_config.json", {"fp8_config": "E4M3", "mode": "LOAD"})
    tensors = {"l.weight": finite_codes(4, 8), "l.scale_weight": rand()}
    c.assert_refused(tmp_path, tensors, "quantization_config.json: Intel", "transposed")


def test_cache_scales_are_parameters_where_nothing_is_quantized(tmp_path):
    tensors = {"a.k_scale": rand(), "a.q_scale": rand(64)}
    c.convert(tmp_path / "plain", tensors, tensors)
    tensors |= {"l.weight": finite_codes(4, 4), "l.weight_scale": rand(1)}
    expected = {"a.q_scale": tensors["a.q_scale"]}  # 4096 / 64 heads are 64 long
    scale = tensors["l.weight_scale"].view(1, 1)
    expected["l.weight"] = dequantized(tensors["l.weight"], scale, (4, 4))
    config = {"num_attention_heads": 64, "hidden_size": 4096}
    c.convert(tmp_path / "fp8", tensors, expected, config)


def test_tables_are_copied_whatever_the_method(tmp_path):
    tables = {"attn.relative_position_index": torch.arange(64, dtype=torch.int32).view(8, 8)}
    c.convert(tmp_path, tables, tables, method("compressed-tensors"))
