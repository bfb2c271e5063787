"""The plan: what every byte of the output will be, and what --dry-run tells of it."""

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
    KEY,
    ONE,
    SHARD,
    TWO,
    arguments,
    assert_laid_out_as,
    assert_same_bits,
    contents,
    convert,
    dequantized,
    every_code,
    exponents,
    finite_codes,
    metadata_of,
    method,
    packed,
    rand,
    write_checkpoint,
    write_json,
)
from fp8_cast_bf16 import CheckpointError, cli, main, make_plan
from make_checkpoint import deepseek_v3_tensors, make_layout

# --- the output: order, header, metadata ---


def test_tensors_of_every_dtype_are_laid_out_as_the_reference_writer_does(tmp_path):
    names = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "float32"]
    names += ["float64", "int64", "uint32", "uint64"]
    tensors = {f"z{i}": torch.ones(3, dtype=getattr(torch, name)) for i, name in enumerate(names)}
    tensors["kept"] = finite_codes(3, 3)
    tensors["cast.weight"] = finite_codes(3, 3)
    expected = {**tensors, "cast.weight": dequantized(tensors["cast.weight"], torch.ones(1, 1))}
    tensors["cast.weight_scale_inv"] = torch.ones(())
    convert(tmp_path, {SHARD: tensors}, index=False)
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert_laid_out_as(tmp_path / "expected", tmp_path / "out/model.safetensors")


def test_shape_of_packed_weights_doubles_in_header_index_and_sizes(tmp_path):
    codes, scale = packed(10, 32, dtype=torch.int8), exponents(10, 2, dtype=E8M0)
    tensors = {"e.weight": codes, "e.scale": scale}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, CONFIG)
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        assert shard.get_slice("e.weight").get_shape() == [10, 64]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 10 * 64 * 2


def test_no_scale_inv_reaches_the_output_even_without_a_weight(tmp_path):
    tensors = {"w": torch.ones(3), "w_scale_inv": torch.ones(1), "gone_scale_inv": torch.ones(1)}
    assert set(convert(tmp_path, {SHARD: tensors})) == {"w"}
    assert "_scale_inv" not in (tmp_path / "out" / INDEX).read_text()


def test_shard_that_holds_only_scales_is_not_written(tmp_path):
    shards = {ONE: {"w": finite_codes(4, 4)}, TWO: {"w_scale_inv": torch.ones(1)}}
    convert(tmp_path, shards)
    assert not (tmp_path / "out" / TWO).exists()
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"] == {"w": ONE}


def test_metadata_of_a_shard_is_kept_and_says_format_pt(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/model.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"origin": "here", "format": "np"})
    main(tmp_path / "in", tmp_path / "out")
    found = metadata_of(tmp_path / "out/model.safetensors")
    assert re.fullmatch("[0-9a-f]{16}", found.pop(KEY))
    assert found == {"format": "pt", "origin": "here"}


def test_comfyui_metadata_is_stripped(tmp_path):
    codes, scale = finite_codes(50, 60), rand()
    tensors = {"l.weight": codes, "l.weight_scale": scale}
    layers = {"layers": {"l": {"format": "float8_e4m3fn"}}}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/x.safetensors"
    save_file(tensors, path, metadata={"_quantization_metadata": json.dumps(layers), "kept": "1"})
    main(tmp_path / "in", tmp_path / "out")
    metadata = metadata_of(tmp_path / "out/x.safetensors")
    assert metadata.pop(KEY)
    assert metadata == {"format": "pt", "kept": "1"}


def test_metadata_of_torchao_does_not_reach_the_output(tmp_path):
    # pytorch/ao torchao/prototype/safetensors/safetensors_support.py, flatten_tensor_state_dict:
    # an entry for each tensor, and a list of them.
    codes, scale = finite_codes(50, 60), rand(50, 1)
    data = {"_type": "Float8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
    torchao = {"l.weight": json.dumps(data), "l.bias": json.dumps({"_type": "Tensor"})}
    torchao["tensor_names"] = json.dumps(["l.weight", "l.bias"])
    (tmp_path / "in").mkdir()
    tensors = {"l._weight_qdata": codes, "l._weight_scale": scale, "l.bias": rand(50)}
    path = tmp_path / "in/model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "kept": "1", **torchao})
    write_json(tmp_path / "in/config.json", method("torchao"))
    main(tmp_path / "in", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        metadata = shard.metadata()
        assert set(shard.keys()) == {"l.weight", "l.bias"}
    assert not set(torchao) & set(metadata)
    assert (metadata["format"], metadata["kept"]) == ("pt", "1")


# --- FP8 weights without a scale ---


def test_weight_without_scale_stays_fp8_with_a_warning_twice(tmp_path, capsys):
    got = convert(tmp_path, {SHARD: {"w": every_code(16, 16), "n": torch.ones(2)}})
    assert_same_bits(got["w"], every_code(16, 16))
    printed = capsys.readouterr()
    assert "Warning: Missing scale_inv tensor for w, skipping conversion\n" in printed.err
    assert "FP8 weights without a scale, kept in FP8: 1\n  w\n" in printed.out
    assert printed.out.splitlines()[-1].startswith("1 weight is still FP8: the output will not")


def test_weight_without_scale_can_be_cast(tmp_path):
    codes = every_code(16, 16, torch.float8_e5m2)
    got = convert(tmp_path, {SHARD: {"w": codes}}, missing_scale="cast")
    assert_same_bits(got["w"], dequantized(codes, torch.ones(1, 1)))


def test_weight_without_scale_can_be_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w has no scale"):
        convert(tmp_path, {SHARD: {"w": every_code(16, 16)}}, missing_scale="error")
    assert not (tmp_path / "out").exists()


# --- the plan as a whole ---


def test_plan_of_deepseek_v3_has_the_known_counts(tmp_path):
    """The figures of the release: 163 shards, 46,183 tensors, 45,808 of them dequantized."""
    make_layout(tmp_path, list(deepseek_v3_tensors()), 163)
    plan = make_plan(tmp_path)
    steps = [*plan.steps]
    assert len(plan.shards) == 163
    assert len(steps) == 46_183
    assert sum(step.quantization is not None for step in steps) == 45_808
    with_f32_bias = sum(step.output.stop - step.output.start for step in steps) // 2
    assert with_f32_bias - 59 * 256 == 684_489_845_504  # values


def test_a_dry_run_prints_the_plan_and_creates_nothing(source, capsys):
    before = contents(source.parent)
    assert cli(arguments(source, "--dry-run", "--device", "cpu", "--workers", "3")) == 0
    assert not (source.parent / "out").exists()
    assert contents(source.parent) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "Device: cpu (as asked), 3 workers",
        "Input: 2 shards, 9 tensors, 162kB",
        "Output: 2 shards, 6 tensors, 325kB",
        "  3 weights to dequantize: E4M3, F32 scale per 128x128 block",
        "  3 tensors to copy",
        "Dropped: 2 weight_scale_inv, 1 up_proj_scale_inv",
    ]
    assert lines[6].startswith("Space: 344kB to write, ")
    assert lines[6].endswith(" free; memory: 3 workers, at most 33.6MB each")
    assert len(lines) == 7


def test_what_is_dropped_is_told_by_kind_the_most_common_first(tmp_path, capsys):
    tensors, report = {"norm": torch.ones(3)}, tmp_path / "report.json"
    for number in range(3):
        tensors |= {f"{number}.k.weight": finite_codes(4, 4), f"{number}.k.weight_scale": rand(1)}
        tensors |= {f"{number}.k_scale": rand()} if number else {}
    write_checkpoint(tmp_path / "in", {SHARD: tensors | {"0.k.input_scale": rand()}}, CONFIG)
    main(tmp_path / "in", tmp_path / "out", dry_run=True, report=report)
    assert "Dropped: 3 weight_scale, 2 k_scale, 1 input_scale\n" in capsys.readouterr().out
    told = json.loads(report.read_text())["dropped"]
    assert told == {"weight_scale": 3, "k_scale": 2, "input_scale": 1}


def test_a_plan_that_drops_nothing_does_not_speak_of_it(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", {SHARD: {"w": torch.ones(2)}}, {})
    main(tmp_path / "in", tmp_path / "out", dry_run=True)
    assert "ropped" not in capsys.readouterr().out


def test_formats_are_named_in_the_plan(tmp_path, capsys):
    names = ["a.weight", "b.weight", "c.weight", "d.weight", "kept.weight"]
    tensors = {name: finite_codes(256, 256) for name in names}
    scales = {"a": (1,), "b": (256, 1), "c": (1, 256), "d": (256, 8)}
    tensors |= {f"{name}.weight_scale": torch.ones(shape) for name, shape in scales.items()}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, {})
    main(tmp_path / "in", tmp_path / "out", dry_run=True)
    printed, warnings = capsys.readouterr()
    for block in ("tensor", "row", "column", "1x32 block"):
        assert f"1 weight to dequantize: E4M3, F32 scale per {block}\n" in printed
    assert "Warning: Missing scale_inv tensor for kept.weight" in warnings


@pytest.mark.parametrize("kind, name, said", [
    ("gpt_oss", "mlp.experts.0.up_proj", True),
    ("mixtral", "block_sparse_moe.experts.0.up_proj", True),
    ("mixtral", "block_sparse_moe.experts.0.w1", False),
    ("qwen3_moe", "mlp.experts.0.up_proj", False),
])
def test_experts_that_loaders_may_not_find_are_mentioned(tmp_path, capsys, kind, name, said):
    # vllm-project/llm-compressor takes the fused experts of these models apart
    tensors = {f"model.{name}.weight": finite_codes(4, 4), f"model.{name}.weight_scale": rand(1)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, {"model_type": kind})
    main(tmp_path / "in", tmp_path / "out")
    printed = capsys.readouterr().out
    assert (f"Experts are stored one by one (model.{name}.weight)" in printed) == said
