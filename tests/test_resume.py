"""Preflight and resume: what an earlier run left is kept if it is right, and only then."""

import fcntl
import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    INDEX,
    ONE,
    TWO,
    contents,
    finite_codes,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, UsageError, cli, main
from kernel import Grid
from make_checkpoint import make_checkpoint

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path):
    folder = write_checkpoint(tmp_path / "in", several_kinds()[0], CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def out(source, tmp_path):
    """The output of a whole conversion."""
    main(source, tmp_path / "out")
    return tmp_path / "out"


def arguments(source, *more):
    out = source.parent / "out"
    return ["--input-fp8-hf-path", str(source), "--output-bf16-hf-path", str(out), *more]


def stamps(folder):
    """Return what changes when a file is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_complete_output_is_left_as_it_is(source, out, capsys):
    before = stamps(out)
    assert cli(arguments(source)) == 0
    assert capsys.readouterr().out.endswith("Nothing to do: the output is complete\n")
    assert stamps(out) == before


def test_shards_that_are_there_are_kept_and_others_made(source, out, capsys):
    expected, before = contents(out), stamps(out)
    (out / TWO).unlink()
    (out / INDEX).unlink()
    capsys.readouterr()
    main(source, out)
    assert "Already there: 1 of 2 shards" in capsys.readouterr().out
    assert contents(out) == expected
    assert stamps(out)[ONE] == before[ONE]


def test_shards_of_another_checkpoint_with_the_same_headers_are_replaced(source, out, tmp_path):
    write_checkpoint(tmp_path / "other", several_kinds(seed=1)[0], CONFIG)
    shutil.copy(source / "tokenizer.json", tmp_path / "other")
    main(tmp_path / "other", tmp_path / "expected")
    assert (out / ONE).stat().st_size == (tmp_path / "expected" / ONE).stat().st_size
    main(tmp_path / "other", out)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_shard_is_replaced_if_any_tensor_begins_or_ends_otherwise(source, out):
    expected = contents(out)
    plan = fp8_cast_bf16.make_plan(fp8_cast_bf16.load_checkpoint(source))
    for shard in plan.shards:
        for step in shard.steps:
            for place in {step.start, step.stop - 1}:
                with open(out / shard.name, "r+b") as file:
                    file.seek(place)
                    file.write(bytes([expected[shard.name][place] ^ 1]))
                main(source, out)
                assert contents(out) == expected


@pytest.mark.parametrize("per_byte", [1, 2])
@pytest.mark.parametrize(
    "grid",
    [(1, 2, 1, 2, 1), (300, 70, 128, 32, 300), (60, 40, 16, 16, 20), (9, 14, 2, 4, 9),
     (33, 50, 33, 50, 33), (5, 2000, 1, 2000, 5), (12, 50, 12, 2, 12), (1, 10**9 + 2, 1, 32, 1)],
)
def test_samples_hold_both_ends_and_have_one_scale_each(grid, per_byte):
    grid = Grid(*grid)
    pieces = fp8_cast_bf16.samples(grid, per_byte)
    assert pieces[0][0] == 0
    assert sum(pieces[-1][:2]) == grid.rows * grid.cols
    assert len(pieces) == min(4, grid.rows * grid.cols // per_byte)
    for first, count, scale, part in pieces:
        assert first % per_byte == count % per_byte == 0
        for element in range(first, first + count):
            row, _, col, _ = grid.scale_region(element, element + 1)
            assert row * grid.scale_shape[1] + col == scale
            assert element // grid.cols // grid.part == part


@pytest.mark.parametrize("change", ["cut", "longer", "header", "link", "empty"])
def test_a_shard_that_is_not_as_planned_is_replaced(source, out, change, tmp_path):
    expected = contents(out)
    path, whole = out / ONE, expected[ONE]
    if change == "link":
        shutil.move(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        changed = {"cut": whole[:-1], "longer": whole + b"x", "empty": b""}
        path.write_bytes(changed.get(change, whole.replace(b'"pt"', b'"np"')))
    main(source, out)
    assert contents(out) == expected
    assert not path.is_symlink()


def test_leftovers_of_a_killed_run_are_removed(source, out):
    expected = contents(out)
    for name in (ONE, INDEX, "config.json", "tokenizer.json", "fp8_cast_bf16"):
        (out / f"{name}.tmp").write_text("half")
    main(source, out)
    assert contents(out) == expected


def test_files_beside_the_shards_are_made_right_again(source, out):
    expected = contents(out)
    (out / "config.json").write_text('{"quantization_config": {}}')
    (out / "tokenizer.json").write_text("[]")
    (out / "hf_quant_config.json").write_text("{}")
    main(source, out)
    assert contents(out) == expected


def test_a_folder_in_the_place_of_a_shard_is_an_error_with_its_name(source, capsys):
    (source.parent / "out" / ONE).mkdir(parents=True)
    assert cli(arguments(source)) == 1
    assert ONE in capsys.readouterr().err


def test_a_second_run_on_the_same_output_is_refused(source, capsys):
    out = source.parent / "out"
    out.mkdir()
    number = os.open(out, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        assert cli(arguments(source)) == 1
        assert "another run is writing there" in capsys.readouterr().err
        assert contents(out) == {}
    finally:
        os.close(number)
    assert cli(arguments(source)) == 0


def test_too_little_space_is_said_before_anything_is_written(source, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**5))
    for more in ([], ["--dry-run"]):
        assert cli(arguments(source, *more)) == 1
        assert "too little space" in capsys.readouterr().err
        assert not (source.parent / "out").exists()


def test_what_is_there_already_needs_no_space(source, out, monkeypatch):
    expected = contents(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**5))
    main(source, out)
    (out / TWO).rename(out / f"{TWO}.tmp")  # its space is free again with the leftover gone
    main(source, out)
    assert contents(out) == expected
    (out / TWO).unlink()
    with pytest.raises(CheckpointError, match=r"too little space"):
        main(source, out)


def test_a_folder_that_may_not_be_written_to_is_refused(source, monkeypatch, capsys):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and real(path, mode))
    assert cli(arguments(source, "--dry-run")) == 1
    assert f"{source.parent}: is no folder that may be written to" in capsys.readouterr().err


def test_a_disk_that_fills_up_ends_the_run_and_space_lets_it_go_on(source, monkeypatch, capsys):
    out = source.parent / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", out]).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
            assert cli(arguments(source)) == 1
        error = capsys.readouterr().err
        assert "No space left on device" in error
        assert f"{TWO}.tmp" in error or f"{ONE}.tmp" in error
        assert not {INDEX, "config.json"} & {*contents(out)}
        assert not [name for name in contents(out) if name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=3m", out], check=True)
        main(source, out)
        main(source, source.parent / "expected")
        assert contents(out) == contents(source.parent / "expected")
    finally:
        subprocess.run(["umount", out], check=True)


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
        "  3 tensors to copy, 3 scales to drop",
        lines[5],
    ]
    assert lines[5].startswith("Space: 344kB to write, ")
    assert lines[5].endswith(" free; memory: 3 workers, at most 50.3MB each")
    assert len(lines) == 6


def test_formats_are_named_in_the_plan(tmp_path, capsys):
    names = ["a.weight", "b.weight", "c.weight", "d.weight", "kept.weight"]
    tensors = {name: finite_codes(256, 256) for name in names}
    scales = {"a": (1,), "b": (256, 1), "c": (1, 256), "d": (256, 8)}
    tensors |= {f"{name}.weight_scale": torch.ones(shape) for name, shape in scales.items()}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, {})
    main(tmp_path / "in", tmp_path / "out", dry_run=True)
    printed = capsys.readouterr().out
    for block in ("tensor", "row", "column", "1x32 block"):
        assert f"1 weights to dequantize: E4M3, F32 scale per {block}\n" in printed
    assert "Warning: Missing scale_inv tensor for kept.weight" in printed


def test_the_report_holds_what_was_done(tmp_path):
    shards, _ = several_kinds()
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8)
    mixed = nan.clone()
    mixed[0] = 0x81
    nan, mixed, kept = (codes.view(torch.float8_e4m3fn) for codes in (nan, mixed, nan.clone()))
    shards[ONE] |= {"n.weight": nan, "n.weight_scale_inv": torch.ones(1, 1), "kept": kept}
    shards[TWO] |= {"i.weight": mixed, "i.weight_scale_inv": torch.full((1, 1), torch.inf)}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    main(tmp_path / "in", tmp_path / "out", report=tmp_path / "r.json", device="cpu", workers=2)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"] == {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "workers": 2,
        "missing_scale": "keep",
        "dry_run": False,
        "verify": False,
    }
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "safetensors", "tqdm"} < {*report["versions"]}
    assert report["NaN"] == {"n.weight": 16, "i.weight": 12}
    assert report["infinite"] == {"i.weight": 4}
    assert report["kept_in_fp8"] == {"kept": "no scale"}
    assert report["input"]["tensors"] == 14
    assert report["output"]["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    assert report["bytes_written"] == report["output"]["bytes"]
    assert sum(report["dequantized"].values()) == 5
    assert (report["copied"], report["dropped"]) == (4, 5)
    assert {*report["seconds"]} == {"reading", "decoding", "writing", "syncing", "total"}
    assert all(seconds > 0 for seconds in report["seconds"].values())


@pytest.mark.parametrize("place", ["in/r.json", "out/r.json", "gone/r.json", "in"])
def test_a_report_that_cannot_be_written_is_wrong_usage(source, place):
    with pytest.raises(UsageError, match="--report"):
        main(source, source.parent / "out", report=source.parent / place)
    assert not (source.parent / "out").exists()


def test_a_resumed_run_of_many_shards_makes_what_is_missing(tmp_path):
    make_checkpoint(tmp_path / "in", 10**6, 5)
    main(tmp_path / "in", tmp_path / "out")
    expected = contents(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for shard in shards[1::2]:
        shard.unlink()
    main(tmp_path / "in", tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == expected
