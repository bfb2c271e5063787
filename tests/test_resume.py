"""A second run: what an earlier one left is kept if it is right, and only then."""

import json
import os
import re
import shutil

import pytest
import torch

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    FP8_CONFIG,
    INDEX,
    KEY,
    ONE,
    SHARD,
    TWO,
    arguments,
    assert_holds,
    contents,
    finite_codes,
    metadata_of,
    one_weight,
    several_kinds,
    stamps,
    write_checkpoint,
)
from fp8_cast_bf16 import cli, main
from make_checkpoint import make_checkpoint


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


def test_a_resumed_run_of_many_shards_makes_what_is_missing(tmp_path):
    make_checkpoint(tmp_path / "in", 10**6, 5)
    main(tmp_path / "in", tmp_path / "out")
    expected = contents(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for shard in shards[1::2]:
        shard.unlink()
    main(tmp_path / "in", tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == expected


def test_shards_of_another_checkpoint_with_the_same_headers_are_replaced(source, out, tmp_path):
    write_checkpoint(tmp_path / "other", several_kinds(seed=1)[0], CONFIG)
    shutil.copy(source / "tokenizer.json", tmp_path / "other")
    main(tmp_path / "other", tmp_path / "expected")
    assert (out / ONE).stat().st_size == (tmp_path / "expected" / ONE).stat().st_size
    main(tmp_path / "other", out)
    assert contents(out) == contents(tmp_path / "expected")


def data_place(tensor, where):
    """Return a byte of a tensor on disk that lies in its first, middle or last page."""
    return {"first": tensor.start, "middle": (tensor.start + tensor.stop) // 2 + 7,
            "last": tensor.stop - 1}[where]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_an_input_of_which_any_one_tensor_was_retrained_differs(source, out, capsys, where):
    plan = fp8_cast_bf16.make_plan(source)
    tensors = {t.name: (shard.name, t) for shard in plan.shards for step in shard.steps
               for t in (step.source, step.quantization and step.quantization.scale) if t}
    assert len(tensors) == 9
    for shard, tensor in tensors.values():
        place = min(data_place(tensor, where), tensor.stop - 1)
        with open(tensor.path, "r+b") as file:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ 1]))
        before = stamps(out)
        capsys.readouterr()
        main(source, out)
        assert f"To be replaced (made from another input, or read differently): {shard}\n" in (
            capsys.readouterr().out)
        main(source, out, verify=True)
        other = ({ONE, TWO} - {shard}).pop()
        assert stamps(out)[other] == before[other]
        assert stamps(out)[shard] != before[shard]


def test_the_fingerprint_takes_three_whole_pages_of_a_tensor(tmp_path):
    """A fine-tune may leave 98% of the codes as they were."""
    codes = finite_codes(400, 400)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(4, 4)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, CONFIG)

    def fingerprint():
        (shard,) = fp8_cast_bf16.make_plan(tmp_path / "in").shards
        worker = fp8_cast_bf16.Worker(torch.device("cpu"), 0)
        found = fp8_cast_bf16.fingerprint_of(shard, worker)
        worker.close()
        return found

    whole, size = fingerprint(), 160_000
    for place in (0, 4095, size // 2, size // 2 + 4095, size - 4096, size - 1):
        changed = codes.view(torch.uint8).clone()
        changed.view(-1)[place] ^= 1
        tuned = tensors | {"a.weight": changed.view(codes.dtype)}
        write_checkpoint(tmp_path / "in", {SHARD: tuned}, CONFIG)
        assert fingerprint() != whole, place
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, CONFIG)
    assert fingerprint() == whole


def test_a_shards_metadata_is_the_inputs_and_format_and_the_fingerprint(source, out):
    header = metadata_of(out / ONE)
    assert {*header} == {"format", KEY}
    assert header["format"] == "pt"
    assert re.fullmatch("[0-9a-f]{16}", header[KEY])
    assert header[KEY] != metadata_of(out / TWO)[KEY]
    assert header[KEY] != "0" * 16


def reading_change(config, change):
    config = json.loads(json.dumps(config))
    config["quantization_config"] |= change
    return config


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"weight_block_size": [128, 64]}, ["a", "b"]),
        ({"weight_scale_semantics": "inverse"}, ["a", "b"]),
        ({"ignored_layers": ["lm_head"]}, []),
    ],
)
def test_another_reading_of_the_same_data_rewrites_every_affected_shard(
    tmp_path, capsys, change, affected
):
    """Only config.json is edited. Two scales for 100 columns fit blocks of 64 and of 96."""
    shards = {}
    for shard, name in ((ONE, "a"), (TWO, "b")):
        shards[shard] = {f"{name}.weight": finite_codes(100, 100),
                         f"{name}.weight_scale_inv": torch.rand(1, 2) + 0.5}
    three = "model-00003.safetensors"
    shards[three] = {"norm.weight": torch.ones(9)}
    config = {"quantization_config": {**FP8_CONFIG, "weight_block_size": [128, 96]}}
    write_checkpoint(tmp_path / "in", shards, config)
    main(tmp_path / "in", tmp_path / "out")
    before = stamps(tmp_path / "out")
    write_checkpoint(tmp_path / "in", shards, reading_change(config, change))
    main(tmp_path / "in", tmp_path / "out")
    names = {"a": ONE, "b": TWO}
    after = stamps(tmp_path / "out")
    assert {shard for shard in shards if before[shard] != after[shard]} == {
        names[name] for name in affected
    }
    main(tmp_path / "in", tmp_path / "out", verify=True)
    main(tmp_path / "in", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_another_treatment_of_missing_scales_rewrites_the_shard(tmp_path):
    shards = {ONE: {"a.weight": finite_codes(9, 9)}, TWO: {"norm.weight": torch.ones(9)}}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    for choice in ("keep", "cast", "keep"):
        main(tmp_path / "in", tmp_path / "out", missing_scale=choice)
        main(tmp_path / "in", tmp_path / choice, missing_scale=choice)
        assert contents(tmp_path / "out") == contents(tmp_path / choice)


@pytest.mark.parametrize("newer", [ONE, TWO])
def test_an_input_newer_than_an_accepted_output_is_named_with_verify(source, out, capsys, newer):
    main(source, out)
    assert "newer" not in capsys.readouterr().out
    later = (out / newer).stat().st_mtime + 10
    os.utime(source / newer, (later, later))
    before = stamps(out)
    main(source, out)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("Input files newer")]
    assert line == f"Input files newer than their output: {newer}; run --verify to be sure"
    assert stamps(out) == before


def test_a_newer_shard_of_scales_only_is_named(tmp_path, capsys):
    shards = {ONE: {"a.weight": finite_codes(9, 9)}, TWO: {"a.weight_scale_inv": torch.ones(1, 1)}}
    source, out = write_checkpoint(tmp_path / "in", shards, CONFIG), tmp_path / "out"
    main(source, out)
    later = (out / ONE).stat().st_mtime + 10
    os.utime(source / TWO, (later, later))
    main(source, out)
    assert f"Input files newer than their output: {TWO}; run --verify" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["cut", "longer", "header"])
def test_a_shard_of_ours_that_is_not_as_planned_is_replaced_and_named(source, out, change, capsys):
    expected = contents(out)
    path, whole = out / ONE, expected[ONE]
    changed = {"cut": whole[:-1], "longer": whole + b"x", "header": whole.replace(b'"pt"', b'"np"')}
    path.write_bytes(changed[change])
    assert path.read_bytes() != whole
    capsys.readouterr()
    main(source, out)
    printed = capsys.readouterr().out
    assert f"To be replaced (made from another input, or read differently): {ONE}\n" in printed
    assert contents(out) == expected


def test_a_resumed_runs_summary_counts_what_it_wrote_and_what_was_there(source, out, capsys):
    (out / TWO).unlink()
    size = (out / ONE).stat().st_size
    capsys.readouterr()
    main(source, out)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Converted 2 shards (1 was there already), 6 tensors: ")
    assert f" {fp8_cast_bf16.sized((out / TWO).stat().st_size)} written in " in last
    assert (out / TWO).stat().st_size != size
    assert ", limited by " in last


def test_a_run_that_wrote_no_shard_is_not_limited_by_anything(source, out, capsys):
    (out / "config.json").unlink()
    capsys.readouterr()
    main(source, out)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Converted 2 shards (2 were there already), 6 tensors: ")
    assert "limited by" not in last


@pytest.mark.parametrize("before, status", [(None, "converted"), (ONE, "converted"),
                                            ("config.json", "converted"), ("nothing", "complete")])
def test_the_reports_status_says_what_became_of_the_output(source, tmp_path, before, status):
    if before:
        main(source, tmp_path / "out")
        (tmp_path / "out" / before).unlink(missing_ok=True)
    main(source, tmp_path / "out", report=tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["status"] == status
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", report["date"])
    assert report["versions"]["fp8_cast_bf16"] == fp8_cast_bf16.VERSION


def test_a_dry_run_of_a_missing_output_is_not_reported_as_complete(source, tmp_path):
    main(source, tmp_path / "out", dry_run=True, report=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "planned"


# --- folders ---


@pytest.fixture
def several(tmp_path):
    """A checkpoint with a draft model and its tokenizer in a folder, and what is made of it."""
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, CONFIG, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b", 1)[0]}, CONFIG, index=False)
    (source / "draft/tokenizer.json").write_text("{}")
    main(source, tmp_path / "out")
    return source


def test_a_complete_output_with_folders_is_left_as_it_is(several, tmp_path, capsys):
    before = stamps(tmp_path / "out"), stamps(tmp_path / "out/draft")
    capsys.readouterr()
    main(several, tmp_path / "out")
    assert capsys.readouterr().out.endswith("Nothing to do: the output is complete\n")
    assert (stamps(tmp_path / "out"), stamps(tmp_path / "out/draft")) == before


@pytest.mark.parametrize("gone", [SHARD, f"draft/{SHARD}", "draft/config.json", "config.json",
                                  "draft/tokenizer.json", "draft"])
def test_what_is_missing_in_a_folder_is_made_and_the_rest_kept(several, tmp_path, gone):
    out = tmp_path / "out"
    expected, kept = contents(out), (out / SHARD).stat().st_ino
    shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    main(several, out)
    assert contents(out) == expected
    assert gone == SHARD or (out / SHARD).stat().st_ino == kept
    main(several, out, verify=True)


def test_an_output_without_a_folders_config_is_not_complete(several, tmp_path, capsys):
    (tmp_path / "out/draft/config.json").unlink()
    main(several, tmp_path / "out", report=tmp_path / "r.json", dry_run=True)
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "planned"


def test_another_draft_replaces_the_shard_in_its_folder_only(several, tmp_path, capsys):
    kept = (tmp_path / "out" / SHARD).stat().st_ino
    write_checkpoint(several / "draft", {SHARD: one_weight("b", 5)[0]}, CONFIG, index=False)
    capsys.readouterr()
    main(several, tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"read differently): draft/{SHARD}\n" in printed
    assert (tmp_path / "out" / SHARD).stat().st_ino == kept
    assert_holds(tmp_path / "out/draft" / SHARD, one_weight("b", 5)[1])


def test_leftovers_of_a_killed_run_in_a_folder_are_removed(several, tmp_path):
    expected = contents(tmp_path / "out")
    for name in (f"{SHARD}.{'0' * 16}.tmp", "config.json.fp8_cast_bf16.tmp"):
        (tmp_path / "out/draft" / name).write_text("half")
    main(several, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_a_dry_run_with_folders_writes_nothing(several, tmp_path, capsys):
    shutil.rmtree(tmp_path / "out")
    before = contents(tmp_path)
    capsys.readouterr()
    main(several, tmp_path / "out", dry_run=True)
    assert "Input: 2 shards, 6 tensors, " in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_weights_of_one_name_in_two_folders_are_both_listed(tmp_path, capsys):
    kept = {"w.weight": finite_codes(4, 4), **{f"x{i}": torch.ones(1) for i in range(9)}}
    source = write_checkpoint(tmp_path / "in", {SHARD: kept}, {}, index=False)
    draft = {"w.weight": finite_codes(4, 4), "y": torch.ones(1)}
    write_checkpoint(source / "draft", {SHARD: draft}, {}, index=False)
    main(source, tmp_path / "out", report=tmp_path / "r.json")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("2 weights are still FP8: ")
    assert len(json.loads((tmp_path / "r.json").read_text())["kept_in_fp8"]) == 2


def test_leftovers_of_a_killed_run_are_removed(source, out):
    expected = contents(out)
    for name in (f"{ONE}.{'0' * 16}", f"{INDEX}.fp8_cast_bf16", "config.json.fp8_cast_bf16",
                 "tokenizer.json.fp8_cast_bf16", "probe123.fp8_cast_bf16"):
        (out / f"{name}.tmp").write_text("half")
    main(source, out)
    assert contents(out) == expected
