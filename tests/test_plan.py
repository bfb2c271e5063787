"""The plan: what every byte of the output will be, and what --dry-run tells of it."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import fp8_cast_bf16
from checkpoints import KEY, SHARD
from fp8_cast_bf16 import cli, main
from make_checkpoint import deepseek_v3_tensors, make_layout

# --- the output: order, header, metadata ---


def test_tensors_of_every_dtype_and_shape_are_laid_out_as_the_reference_writer_does(
        tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    names = ["bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "float32",
             "complex64", "float64", "int64", "uint32", "uint64"]
    tensors = {"": torch.ones(3)}  # A name may be empty.
    for number, name in enumerate(names):
        dtype = getattr(torch, name)
        for kind, shape in enumerate([(5003,), (1, 5003, 1), (0, 4), ()]):
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = (torch.arange(size, dtype=torch.int32) % 2).to(torch.uint8)
            tensors[f"z{number}.{kind}"] = raw.view(dtype).view(shape)
    tensors["kept"] = checkpoints.finite_codes(3, 3)
    tensors["cast.weight"] = codes = checkpoints.finite_codes(3, 3)
    expected = {**tensors, "cast.weight": checkpoints.dequantized(codes, torch.ones(1, 1))}
    tensors["cast.weight_scale_inv"] = torch.ones(())
    checkpoints.convert(tmp_path, {SHARD: tensors}, index=False, workers=2)
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    checkpoints.assert_laid_out_as(tmp_path / "expected", tmp_path / "out" / SHARD)


COMFYUI = {"_quantization_metadata": '{"layers": {"l": {"format": "float8_e4m3fn"}}}'}
# pytorch/ao torchao/prototype/safetensors/safetensors_support.py, flatten_tensor_state_dict: an
# entry for each tensor, and a list of them.
TORCHAO = {"l.weight": '{"_type": "Float8Tensor", "_data": {}}', "l.bias": '{"_type": "Tensor"}',
           "tensor_names": '["l.weight", "l.bias"]'}


@pytest.mark.parametrize("metadata, weight, config", [
    ({}, "l.weight", {}), (COMFYUI, "l.weight", {}),
    (TORCHAO, "l._weight_qdata", checkpoints.method("torchao"))])
def test_metadata_of_a_shard_is_kept_but_for_what_describes_codes(
    tmp_path, metadata, weight, config
):
    scale = "l._weight_scale" if metadata is TORCHAO else "l.weight_scale"
    tensors = {weight: checkpoints.finite_codes(50, 60), scale: checkpoints.rand(50, 1)}
    source = checkpoints.write_checkpoint(tmp_path / "in", {}, config, index=False)
    save_file(tensors, source / SHARD, metadata={"format": "np", "origin": "here", **metadata})
    main(source, tmp_path / "out")
    found = checkpoints.metadata_of(tmp_path / "out" / SHARD)
    assert re.fullmatch("[0-9a-f]{16}", found.pop(KEY))
    assert found == {"format": "pt", "origin": "here"}
    assert {*load_file(tmp_path / "out" / SHARD)} == {"l.weight"}


# --- FP8 weights without a scale ---


def test_a_weight_without_a_scale_can_be_cast(tmp_path, capsys):
    codes = checkpoints.every_code(16, 16, torch.float8_e5m2)
    expected = {"w": checkpoints.dequantized(codes, torch.ones(1, 1))}
    checkpoints.convert(tmp_path, {SHARD: {"w": codes}}, expected, missing_scale="cast")
    printed = capsys.readouterr().out
    assert "FP8 weights without a scale, cast with scale 1: w\n" in printed
    assert "still FP8" not in printed


# --- the plan as a whole ---


def test_the_plan_of_deepseek_v3_has_the_known_counts(tmp_path, monkeypatch):
    """The figures of the release: 163 shards, 46,183 tensors, 45,808 of them dequantized."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: checkpoints.Usage(2**44, 0, 2**44))
    make_layout(tmp_path / "in", list(deepseek_v3_tensors()), 163)
    main(tmp_path / "in", tmp_path / "out", dry_run=True, report=tmp_path / "report.json")
    report = checkpoints.read_json(tmp_path / "report.json")
    assert (report["input"]["shards"], report["input"]["tensors"]) == (163, 46_183 + 45_808)
    assert (report["output"]["shards"], report["output"]["tensors"]) == (163, 46_183)
    assert report["dequantized"] == {"E4M3, F32 scale per 128x128 block": 45_808}
    assert (report["copied"], report["dropped"]) == (375, {"weight_scale_inv": 45_808})
    values = 2 * (684_489_845_504 + 59 * 256)  # The router biases are F32.
    assert values < report["output"]["bytes"] < values + 10_000_000  # There are headers, too.


def test_a_dry_run_prints_the_plan_and_creates_nothing(source, capsys):
    before = checkpoints.contents(source.parent)
    assert cli(checkpoints.arguments(source, "--dry-run")) == 0
    assert checkpoints.contents(source.parent) == before
    assert not (source.parent / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "Input: 2 shards, 9 tensors, 162kB",
        "Output: 2 shards, 6 tensors, 325kB",
        "  3 weights to dequantize: E4M3, F32 scale per 128x128 block",
        "  3 tensors to copy",
        "Dropped: 2 weight_scale_inv, 1 up_proj_scale_inv",
    ]
    assert re.fullmatch(r"Space: 3\d\dkB to write, [\d.]+.B free", lines[5])
    assert len(lines) == 6


def test_formats_are_named_in_the_plan(tmp_path, capsys):
    scales = {"a": (1,), "b": (256, 1), "c": (1, 256), "d": (256, 8)}
    tensors = {f"{name}.weight": checkpoints.finite_codes(256, 256) for name in scales}
    tensors |= {f"{name}.weight_scale": torch.ones(shape) for name, shape in scales.items()}
    checkpoints.write_checkpoint(tmp_path / "in", {SHARD: tensors}, {})
    main(tmp_path / "in", tmp_path / "out", dry_run=True)
    printed = capsys.readouterr().out
    for block in ("tensor", "row", "column", "1x32 block"):
        assert f"  1 weight to dequantize: E4M3, F32 scale per {block}\n" in printed
