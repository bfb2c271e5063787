"""Reading a checkpoint: its shards, headers, index and configs, and which of them count.

What cannot be converted is refused with one message that names the file, and nothing is written.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub._local_folder import get_local_download_paths
from safetensors.torch import save_file

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    INDEX,
    ONE,
    ROOT,
    SHARD,
    SPECIAL,
    TENSORS,
    TWO,
    arguments,
    assert_folder_refused,
    assert_holds,
    assert_same_bits,
    contents,
    convert,
    dequantized,
    edit_json,
    finite_codes,
    load_checkpoint,
    method,
    nvfp4,
    one_weight,
    several_kinds,
    special_file,
    write_checkpoint,
    write_json,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, cli, main, make_plan
from fp8_cast_bf16 import load_checkpoint as load_headers


@pytest.fixture
def source(tmp_path):
    weight = {"w": finite_codes(4, 4)}
    return write_checkpoint(tmp_path / "in", {ONE: weight, TWO: {"w_scale_inv": torch.ones(1)}})


# --- which files belong ---


def test_index_decides_which_shards_count(tmp_path):
    shards, expected = several_kinds()
    write_checkpoint(tmp_path / "in", shards)
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "in/consolidated.safetensors")
    main(tmp_path / "in", tmp_path / "out")
    assert set(load_checkpoint(tmp_path / "out")) == {*expected[ONE], *expected[TWO]}
    assert not (tmp_path / "out/consolidated.safetensors").exists()


def test_without_index_the_single_file_counts(tmp_path):
    write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(2)}}, index=False)
    save_file({"x": torch.zeros(3)}, tmp_path / "in/consolidated.safetensors")
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_checkpoint(tmp_path / "out")["x"], torch.ones(2))
    assert not (tmp_path / "out" / INDEX).exists()


def test_without_index_all_files_count(tmp_path):
    shards, expected = several_kinds()
    shards = {"b.safetensors": shards[ONE], "a.safetensors": shards[TWO]}
    assert set(convert(tmp_path, shards, index=False)) == {*expected[ONE], *expected[TWO]}


def test_hub_cache_snapshot_of_links_is_ordinary_input(tmp_path):
    shards, _ = several_kinds()
    plain = write_checkpoint(tmp_path / "in", shards, {"torch_dtype": "float16"})
    (plain / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    main(plain, tmp_path / "out")
    main(snapshot, tmp_path / "from-cache")
    assert contents(tmp_path / "from-cache") == contents(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "from-cache").iterdir())


def test_missing_folder(source):
    assert_folder_refused(source.parent / "nowhere", "nowhere: no such folder")


def test_folder_without_shards(source):
    for path in source.iterdir():
        path.unlink()
    assert_folder_refused(source, "holds no *.safetensors")


def test_gguf_and_bin_checkpoints_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        main(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "in") == {"pytorch_model.bin": b"x"}


def test_checkpoint_of_scales_alone_is_refused(source):
    (source / INDEX).unlink()
    (source / ONE).unlink()
    (source / TWO).rename(source / SHARD)
    assert_folder_refused(source, "holds no tensors")


def test_missing_shard_is_named(source):
    (source / TWO).unlink()
    assert_folder_refused(source, TWO, "incomplete")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_a_shard_that_is_no_file_is_refused(folder, secret, capsys, kind):
    special_file(folder / "in" / SHARD, kind, secret)
    assert cli(arguments(folder / "in")) == 1
    assert capsys.readouterr().err.startswith(f"error: {folder / 'in' / SHARD}: no such file")


# --- downloads that are not whole ---


def numbered(total: str, *numbers: str) -> dict:
    return {f"model-{number}-of-{total}.safetensors": {f"w{number}": torch.ones(2)}
            for number in numbers}


@pytest.mark.parametrize("index", [False, True])
def test_two_of_eight_shards_are_refused_by_the_names_of_the_missing(tmp_path, index):
    source, numbers = tmp_path / "in", [f"0000{number}" for number in range(1, 9)]
    write_checkpoint(source, numbered("00008", *numbers), CONFIG, index)
    names = [f"model-{number}-of-00008.safetensors" for number in numbers[2:]]
    for name in names:
        (source / name).unlink()
    assert_folder_refused(source, "6 of 8 shards are missing", *names[:5], "incomplete")


def test_an_index_decides_which_shards_a_pruned_checkpoint_has(tmp_path):
    shards = numbered("000163", "00001", "00042")
    convert(tmp_path, shards, {name: t for shard in shards.values() for name, t in shard.items()})


def test_a_shard_that_only_its_number_tells_of_is_named(tmp_path):
    source = write_checkpoint(tmp_path / "in", numbered("00003", "00001", "00003"), CONFIG, False)
    assert_folder_refused(source, "1 of 3 shards is missing", "model-00002-of-00003.safetensors")


def test_one_of_163_shards_with_deepseeks_wide_total_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", numbered("000163", "00001"), CONFIG, False)
    assert_folder_refused(source, "162 of 163 shards are missing", "model-00002-of-000163.safet")


def test_all_shards_with_deepseeks_wide_total_convert(tmp_path):
    convert(tmp_path, numbered("000002", "00001", "00002"), config={}, index=False)


def test_shards_that_are_numbered_from_0_convert(tmp_path):
    convert(tmp_path, numbered("00002", "00000", "00001"), config={}, index=False)


def test_a_missing_shard_among_those_numbered_from_0_is_named(tmp_path):
    source = write_checkpoint(tmp_path / "in", numbered("00003", "00000", "00001"), {}, False)
    error = assert_folder_refused(source, "model-00002-of-00003.safetensors")
    assert "model-00003-of" not in error


def test_a_partial_download_in_a_folder_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    write_checkpoint(source / "draft", numbered("00002", "00001"), CONFIG, index=False)
    assert_folder_refused(source, "draft", "model-00002-of-00002.safetensors")


def test_another_series_beside_does_not_make_up_for_a_missing_shard(tmp_path):
    other = {f"other-0000{i}-of-00002.safetensors": {f"o{i}": torch.ones(1)} for i in (1, 2)}
    write_checkpoint(tmp_path / "in", numbered("00002", "00001") | other, CONFIG, index=False)
    assert_folder_refused(tmp_path / "in", "1 of 2 shards is missing", "model-00002-of-00002")


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload", ".incomplete"])
def test_a_shard_with_a_mark_of_an_unfinished_download_beside_it_is_refused(source, ending, index):
    if not index:
        (source / INDEX).unlink()
    (source / (TWO + ending)).write_text("")
    assert_folder_refused(source, f"{source / TWO}: its download is not finished", ending)


@pytest.mark.parametrize("place", [".", "draft"])
def test_a_shard_that_the_hubs_client_has_not_finished_is_refused(tmp_path, place):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, CONFIG, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b")[0]}, CONFIG, index=False)
    paths = get_local_download_paths(source, (Path(place) / SHARD).as_posix())
    mark = paths.incomplete_path("0123456789abcdef" * 4)
    assert mark.suffix == ".incomplete"
    mark.write_text("")
    assert_folder_refused(source, f"{source / place / SHARD}: its download is not", mark.name)


def test_what_the_hubs_client_leaves_of_other_files_does_not_matter(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    get_local_download_paths(source, "x.gguf").incomplete_path("0" * 64).write_text("")
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, "config.json"}


def test_an_adapter_whose_download_is_not_finished_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG)
    save_file({"lora_A": torch.zeros(3)}, source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors.aria2").write_text("")
    assert_folder_refused(source, "adapter_model.safetensors: its download is not finished")


def test_a_checkpoint_without_a_config_is_warned_about(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, index=False)
    main(tmp_path / "in", tmp_path / "out")
    printed = capsys.readouterr()
    assert f"Warning: {tmp_path / 'in'}: has no config.json" in printed.err
    assert "config.json" not in printed.out


def test_a_hub_id_is_answered_by_the_command_that_downloads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = ["--input-fp8-hf-path", "deepseek-ai/DeepSeek-V3.1", "--output-bf16-hf-path", "out"]
    assert cli(folders) == 1
    hint = "download it first: hf download deepseek-ai/DeepSeek-V3.1 --local-dir IN"
    assert hint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_no_hub_id_gets_no_command_to_download_it(tmp_path):
    assert "hf download" not in assert_folder_refused(tmp_path / "a/b", "no such folder")


def test_the_cache_folder_of_a_repository_is_answered_by_its_snapshots(tmp_path):
    folder = tmp_path / "models--a--b"
    write_checkpoint(folder / "snapshots/0123", {SHARD: one_weight()[0]}, CONFIG)
    assert_folder_refused(folder, "models--a--b: is the cache", "give its snapshots/")


POINTER = (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\n"
           b"size 4294967296\n")


def test_a_git_lfs_pointer_is_answered_by_git_lfs_pull(source):
    (source / ONE).write_bytes(POINTER)
    assert_folder_refused(source, f"{source / ONE}: is a git-lfs pointer", "run `git lfs pull`")


@pytest.mark.parametrize("name", ["tokenizer.json", INDEX, "config.json"])
def test_a_side_file_that_is_a_git_lfs_pointer_is_refused(source, name):
    (source / name).write_bytes(POINTER)
    assert_folder_refused(source, f"{source / name}: is a git-lfs pointer", "run `git lfs pull`")


# --- links ---


def linked(folder: Path, blobs: Path, digits: str) -> Path:
    """Return a checkpoint of which every file is a link into a folder of blobs."""
    given = write_checkpoint(folder / "given", {SHARD: one_weight()[0]}, CONFIG)
    (given / "tokenizer.json").write_text("{}")
    blobs.mkdir(parents=True)
    (folder / "in").mkdir()
    for number, path in enumerate(sorted(given.iterdir())):
        blob = blobs / f"{number:x}{digits[1:]}"
        path.rename(blob)
        (folder / "in" / path.name).symlink_to(blob)
    return folder / "in"


@pytest.mark.parametrize("digits", ["a" * 40, "0123456789abcdef" * 4])
@pytest.mark.parametrize("place", ["mnt/blobs", "in/../cache/model/blobs"])
def test_links_to_blobs_named_by_their_hash_count_wherever_they_are(tmp_path, place, digits):
    (tmp_path / "cache").mkdir()
    (tmp_path / "mnt").mkdir()
    source = linked(tmp_path, tmp_path / place.removeprefix("in/../"), digits)
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, INDEX, "config.json", "tokenizer.json"}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("digits", ["a" * 39, "a" * 41, "A" * 40, "g" * 40, "a" * 63])
def test_links_to_blobs_of_other_names_are_refused(tmp_path, digits):
    assert_folder_refused(linked(tmp_path, tmp_path / "mnt/blobs", digits), "cp -L")


def test_a_blob_is_a_file_right_in_the_folder_of_blobs(tmp_path):
    source = linked(tmp_path, tmp_path / "mnt/blobs" / ("a" * 40), "b" * 40)
    assert_folder_refused(source, "cp -L")


def test_a_side_file_that_is_a_link_elsewhere_is_refused_with_the_remedy(source, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    target = str(tmp_path / "tokenizer.json")
    assert_folder_refused(source, f"tokenizer.json: is a link to {target}", "outside", "cp -L")


def test_a_side_file_that_is_a_link_to_nothing_says_that_its_target_is_not_there(source):
    (source / "tokenizer.json").symlink_to("/mnt/nowhere/tokenizer.json")
    assert_folder_refused(source, "tokenizer.json: is a link to /mnt/nowhere/", "not there")


def test_a_config_of_a_folder_may_be_a_link_to_another_folder_of_the_input(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, CONFIG, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b")[0]}, index=False)
    (source / "draft/config.json").symlink_to("../config.json")
    main(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/draft/config.json").read_text()) == {}


# --- what lies around ---


@pytest.mark.parametrize("place", [".", "draft"])
def test_what_macos_leaves_beside_shards_is_ignored(tmp_path, capsys, place):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG)
    write_checkpoint(source / "draft", {SHARD: one_weight("b")[0]}, CONFIG)
    for name in (SHARD, INDEX, "config.json"):
        (source / place / f"._{name}").write_bytes(b"\0\5\26\7")
    (source / place / ".DS_Store").write_bytes(b"\0")
    main(source, tmp_path / "out")
    files = {SHARD, INDEX, "config.json"}
    assert {*contents(tmp_path / "out")} == files | {f"draft/{name}" for name in files}
    assert "._" not in capsys.readouterr().out


def test_lost_and_found_is_named_and_skipped(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG)
    (source / "lost+found").mkdir()
    (source / "lost+found/#1").write_text("x")
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, INDEX, "config.json"}
    assert "Not copied: lost+found\n" in capsys.readouterr().out


# --- folders: each that holds safetensors files is a checkpoint of its own ---


def test_a_draft_model_in_a_folder_is_converted_by_its_own_config(tmp_path):
    draft, expected = one_weight("b", 1)
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(3)}}, {"root": 1})
    write_checkpoint(source / "dspark", {SHARD: draft}, {"draft": 1, **CONFIG})
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / SHARD, {"x": torch.ones(3)})
    assert_holds(tmp_path / "out/dspark" / SHARD, expected)
    assert json.loads((tmp_path / "out/dspark/config.json").read_text()) == {"draft": 1}
    index = json.loads((tmp_path / "out/dspark" / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(expected), SHARD)


def pipeline(folder: Path) -> tuple[Path, dict, dict]:
    """Write a pipeline as diffusers does; return it, and what its two parts must become."""
    write_json(folder / "model_index.json", {"_class_name": "X", "transformer": ["diffusers", "X"]})
    write_json(folder / "scheduler/scheduler_config.json", {"a": 1})
    given, transformer = one_weight("proj", 1)
    shard = "diffusion_pytorch_model.safetensors"
    write_checkpoint(folder / "transformer", {shard: given}, CONFIG, index=False)
    encoder = {"shared.weight": torch.ones(5)}
    write_checkpoint(folder / "text_encoder", {SHARD: encoder}, {"encoder": 1}, index=False)
    return folder, transformer, encoder


def test_the_parts_of_a_pipeline_are_converted_each_in_its_folder(tmp_path):
    source, transformer, encoder = pipeline(tmp_path / "in")
    main(source, tmp_path / "out")
    shard = "transformer/diffusion_pytorch_model.safetensors"
    assert_holds(tmp_path / "out" / shard, transformer)
    assert_holds(tmp_path / "out/text_encoder" / SHARD, encoder)
    found = contents(tmp_path / "out")
    assert {*found} == {*contents(source)}
    assert json.loads(found["transformer/config.json"]) == {}
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert found[name] == (source / name).read_bytes()


def test_a_pipeline_is_not_warned_about_for_its_root_without_a_config(tmp_path, capsys):
    main(pipeline(tmp_path / "in")[0], tmp_path / "out")
    assert "has no config" not in capsys.readouterr().err


def test_the_dense_layer_of_a_sentence_transformer_is_converted(tmp_path):
    root, expected = one_weight("encoder", 1)
    source = write_checkpoint(tmp_path / "in", {SHARD: root}, CONFIG, index=False)
    write_json(source / "modules.json", {"0": "", "2": "2_Dense"})
    write_json(source / "config_sentence_transformers.json", {"prompts": {}})
    dense = {"linear.weight": torch.rand(4, 3), "linear.bias": torch.rand(4)}
    write_checkpoint(source / "2_Dense", {SHARD: dense}, {"in_features": 3}, index=False)
    write_json(source / "1_Pooling/config.json", {"pooling": 1})
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / SHARD, expected)
    assert_holds(tmp_path / "out/2_Dense" / SHARD, dense)
    assert {*contents(tmp_path / "out")} == {*contents(source)}


def test_fp8_in_a_folder_without_a_config_is_converted(tmp_path):
    dense, expected = one_weight("linear")
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(2)}}, {}, index=False)
    write_checkpoint(source / "2_Dense", {SHARD: dense}, index=False)
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out/2_Dense" / SHARD, expected)


def test_the_method_of_the_root_does_not_count_in_a_folder(tmp_path):
    int8 = {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4, 1)}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    source = write_checkpoint(tmp_path / "in", {SHARD: int8}, config, index=False)
    other = {f"other.{name}": tensor.clone() for name, tensor in int8.items()}
    write_checkpoint(source / "draft", {SHARD: other}, {"draft": 1}, index=False)
    assert_folder_refused(source, f"{source / 'draft' / SHARD}", "move draft out of")
    write_checkpoint(source / "draft", {SHARD: other}, config, index=False)
    main(source, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out/draft")["other.w.weight"].dtype == torch.bfloat16


def test_folders_in_folders_are_checkpoints_too(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(2)}}, {}, index=False)
    deep, expected = one_weight("deep")
    write_checkpoint(source / "a/b", {SHARD: deep}, CONFIG, index=False)
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out/a/b" / SHARD, expected)


@pytest.mark.parametrize("name", ["original", "fp8", "nvfp4"])
def test_the_same_weights_in_a_folder_are_left_out_by_name(tmp_path, capsys, name):
    given, expected = one_weight()
    source = write_checkpoint(tmp_path / "in", {SHARD: given}, CONFIG, index=False)
    write_checkpoint(source / name, {SHARD: one_weight(seed=1)[0]}, CONFIG, index=False)
    (source / name / "tokenizer.json").write_text("{}")
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / SHARD, expected)
    assert {*contents(tmp_path / "out")} == {SHARD, "config.json"}
    assert f"Not copied: {name}\n" in capsys.readouterr().out


def test_the_same_weights_in_another_format_in_a_folder_are_left_out_by_name(tmp_path, capsys):
    """Their names differ: each weight is codes and two scales there."""
    given = {}
    for i in range(4):
        given[f"l{i}.weight"] = finite_codes(30, 80)
        given[f"l{i}.weight_scale_inv"] = torch.ones(1, 1)
    source = write_checkpoint(tmp_path / "in", {SHARD: given | {"norm": torch.ones(3)}}, CONFIG)
    codes, scale, _ = nvfp4(3.0, divide=True)
    other = {"norm": torch.ones(3)}
    for i in range(4):
        other |= {f"l{i}.weight_packed": codes.clone(), f"l{i}.weight_scale": scale.clone(),
                  f"l{i}.weight_global_scale": torch.tensor([3.0])}
    write_checkpoint(source / "nvfp4", {SHARD: other}, method("compressed-tensors"))
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, INDEX, "config.json"}
    assert "Not copied: nvfp4\n" in capsys.readouterr().out


def test_a_folder_with_another_set_of_the_weights_may_be_broken(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    (source / "original").mkdir()
    (source / "original/model-00001-of-00009.safetensors").write_bytes(b"x")
    main(source, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {SHARD, "config.json"}


def test_a_draft_of_the_same_architecture_with_other_shapes_is_converted(tmp_path):
    """As a small model of the same depth, whose tensors have the same names."""
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG, index=False)
    small = {"w.weight": finite_codes(20, 8), "w.weight_scale_inv": torch.full((1, 1), 0.01),
             "norm.w": torch.ones(2)}
    write_checkpoint(source / "draft", {SHARD: small}, CONFIG, index=False)
    main(source, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out/draft")["w.weight"].shape == (20, 8)


def test_a_pipeline_in_a_hub_cache_is_converted(tmp_path):
    given, transformer, encoder = pipeline(tmp_path / "plain")
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/0", "blobs"))
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(contents(given).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    main(snapshot, tmp_path / "out")
    main(given, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert_holds(tmp_path / "out/text_encoder" / SHARD, encoder)
    assert len(transformer) == 2


def test_a_folder_that_the_rules_refuse_ends_the_run_and_may_be_moved(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(3)}}, {}, index=False)
    bad = {"b.weight": torch.ones(4, 4, dtype=torch.uint8), "b.weight_scale": torch.ones(4, 1)}
    write_checkpoint(source / "draft", {SHARD: bad}, {}, index=False)
    shard = source / "draft" / SHARD
    assert_folder_refused(source, f"{shard}: b.weight", f"move draft out of {source}")


@pytest.mark.parametrize("problem", ["cut", "index", "twice", "missing", "config"])
def test_a_folder_that_cannot_be_read_ends_the_run_and_may_be_moved(tmp_path, problem):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(3)}}, {}, index=False)
    draft = write_checkpoint(source / "draft", {SHARD: one_weight()[0]}, CONFIG)
    if problem == "cut":
        os.truncate(draft / SHARD, (draft / SHARD).stat().st_size - 1)
    elif problem == "index":
        (draft / INDEX).write_text("{}")
    elif problem == "twice":
        (draft / INDEX).unlink()
        shutil.copy(draft / SHARD, draft / "other.safetensors")
    elif problem == "missing":
        (draft / SHARD).unlink()
    else:
        (draft / "config.json").write_text("{")
    assert_folder_refused(source, str(draft), f"move draft out of {source}")


def test_an_index_may_name_shards_in_folders(tmp_path):
    shards, expected = several_kinds()
    names = {ONE: "model.layers.0/layer.safetensors", TWO: "model.layers.1/layer.safetensors"}
    source = tmp_path / "in"
    for shard, name in names.items():
        (source / name).parent.mkdir(parents=True)
        save_file(shards[shard], source / name)
    weight_map = {tensor: names[shard] for shard in shards for tensor in shards[shard]}
    write_json(source / INDEX, {"weight_map": weight_map})
    write_json(source / "config.json", CONFIG)
    main(source, tmp_path / "out")
    for shard, name in names.items():
        assert_holds(tmp_path / "out" / name, expected[shard])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {t: names[s] for s in expected for t in expected[s]}
    assert {*contents(tmp_path / "out")} == {*names.values(), INDEX, "config.json"}
    main(source, tmp_path / "out", verify=True)


def test_a_file_that_an_index_leaves_out_of_a_folder_is_planned_once(tmp_path):
    source, name = tmp_path / "in", "layers/a.safetensors"
    given, expected = one_weight("a")
    (source / "layers").mkdir(parents=True)
    save_file(given, source / name)
    save_file({f"x{i}": torch.ones(1) for i in range(9)}, source / SHARD)
    save_file({"extra": torch.ones(1)}, source / "layers/extra.safetensors")
    weight_map = dict.fromkeys(given, name) | {f"x{i}": SHARD for i in range(9)}
    write_json(source / INDEX, {"weight_map": weight_map})
    names = [shard.name for shard in make_plan(source).shards]
    assert sorted(names) == sorted({*names})
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / name, expected)


def test_the_index_of_a_variant_is_rebuilt(tmp_path):
    given, expected = one_weight()
    name, index = "model.fp8-00001-of-00001.safetensors", "model.safetensors.index.fp8.json"
    source = write_checkpoint(tmp_path / "in", {name: given}, CONFIG, index=False)
    write_json(source / index, {"metadata": {}, "weight_map": dict.fromkeys(given, name)})
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / name, expected)
    rebuilt = json.loads((tmp_path / "out" / index).read_text())
    assert rebuilt["weight_map"] == dict.fromkeys(sorted(expected), name)
    assert rebuilt["metadata"]["total_size"] == 130 * 40 * 2 + 12
    assert {*contents(tmp_path / "out")} == {name, index, "config.json"}
    main(source, tmp_path / "out", verify=True)


# --- weights beside indexed shards ---


def test_an_adapter_beside_indexed_shards_is_copied(tmp_path):
    given, expected = one_weight()
    source = write_checkpoint(tmp_path / "in", {SHARD: given}, CONFIG)
    adapter = {"lora_A.weight": torch.rand(3, 4), "lora_B.weight": torch.rand(4, 3)}
    save_file(adapter, source / "adapter_model.safetensors")
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out" / SHARD, expected)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(expected), SHARD)
    main(source, tmp_path / "out", verify=True)


def test_an_adapter_in_a_folder_with_an_index_is_copied(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(2)}}, {}, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight()[0]}, CONFIG)
    save_file({"lora_A": torch.rand(3)}, source / "draft/adapter_model.safetensors")
    main(source, tmp_path / "out")
    name = "draft/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", ["mtp-00001-of-00002", "model-00003-of-00004", "model-mtp"])
def test_a_plain_shard_that_the_index_omits_is_copied(tmp_path, name):
    given, expected = one_weight()
    source = write_checkpoint(tmp_path / "in", {"model-00001-of-00001.safetensors": given}, CONFIG)
    mtp = torch.rand(3)
    save_file({"mtp.weight": mtp}, source / f"{name}.safetensors")
    main(source, tmp_path / "out")
    assert_holds(tmp_path / "out/model-00001-of-00001.safetensors", expected)
    assert_holds(tmp_path / f"out/{name}.safetensors", {"mtp.weight": mtp})


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["other", "mtp-00001-of-00002"])
def test_an_fp8_file_beside_indexed_shards_is_refused(tmp_path, scaled, name):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG)
    tensors = one_weight("other")[0]
    if not scaled:
        del tensors["other.weight_scale_inv"]
    save_file(tensors, source / f"{name}.safetensors")
    assert_folder_refused(source, f"{source}/{name}.safetensors: is not named by {INDEX}",
                          "quantized", f"move it out of {source}")


def test_a_file_that_repeats_a_tensor_of_indexed_shards_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight()[0]}, CONFIG)
    save_file({"norm.w": torch.ones(3), "x": torch.ones(1)}, source / "other.safetensors")
    assert_folder_refused(source, "other.safetensors: is not named by", "repeats norm.w", "move it")


# --- headers ---


def test_headers_are_read_where_files_cannot_be_mapped(tmp_path):
    """As on some network file systems, and under a limit of the address space."""
    write_raw(tmp_path / "in" / SHARD, {"w.weight": ("F8_E4M3", [1 << 18, 1 << 18])})
    limit = 32 << 30
    done = subprocess.run(
        [sys.executable, ROOT / "fp8_cast_bf16.py", *arguments(tmp_path / "in", "--dry-run")],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert "Input: 1 shard, 1 tensor, 68.7GB" in done.stdout
    assert "map" not in done.stderr and "allocate" not in done.stderr


def test_a_read_of_a_header_that_would_block_is_reported(source, capsys, monkeypatch):
    """Buffered reads return nothing then, which must not be taken for the end."""
    class Blocking:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, size=-1):
            return None

    monkeypatch.setattr(
        fp8_cast_bf16, "open",
        lambda path, mode="r", *more, **options: Blocking(path, mode)
        if Path(path) == source / ONE else open(path, mode, *more, **options), raising=False)
    assert cli(arguments(source)) == 1
    assert f"error: {source / ONE}: " in capsys.readouterr().err
    assert not (source.parent / "out").exists()



def test_truncated_shard_is_named(source):
    path = source / ONE
    path.write_bytes(path.read_bytes()[:-1])
    assert_folder_refused(source, ONE, "not a whole safetensors file")


def test_shard_with_bytes_too_many_is_named(source):
    with open(source / ONE, "ab") as file:
        file.write(b"x")
    assert_folder_refused(source, ONE, "not a whole safetensors file")


def test_shard_that_is_something_else_is_named(source):
    (source / ONE).write_text("<html>please log in</html>")
    assert_folder_refused(source, ONE, "not a whole safetensors file")


def test_shard_larger_than_memory_is_read(tmp_path):
    size, path = 1 << 40, tmp_path / SHARD
    # a sparse file: torch refuses to map it, its header is good all the same
    write_raw(path, {"x": ("U8", [size])})
    assert load_headers(tmp_path).tensors["x"].shape == (size,)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_headers(tmp_path)


# --- the index ---


def test_tensor_that_only_the_index_knows_is_named(source):
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"gone.weight": TWO}))
    assert_folder_refused(source, TWO, "gone.weight is not there")


@pytest.mark.parametrize(
    "entry", ["../x.safetensors", "/x.safetensors", "a/b", "", "..", 3, "a\\b.safetensors", "w.st"]
)
def test_index_entry_that_is_no_plain_file_name_is_refused(source, entry):
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"w": entry}))
    assert_folder_refused(source, INDEX, "puts w into", "expected a *.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100000, '{"weight_map": []}', "{}", "\xff"])
def test_index_that_is_no_index_is_refused(source, text):
    (source / INDEX).write_text(text, encoding="latin-1")
    assert_folder_refused(source, INDEX)


def test_name_in_two_files_without_an_index_is_refused(source):
    (source / INDEX).unlink()
    save_file({"w": torch.ones(1)}, source / TWO)
    assert_folder_refused(source, TWO, "w stands in", ONE)


def test_name_in_two_files_is_decided_by_the_index(source):
    save_file({"w": torch.zeros(1), "w_scale_inv": torch.ones(1)}, source / TWO)
    assert load_headers(source).tensors["w"].path.name == ONE
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"w": TWO}))
    assert load_headers(source).tensors["w"].path.name == TWO


def test_name_in_three_files_is_decided_by_the_index(tmp_path):
    shards = {f"{i}.safetensors": {"w": torch.full((1,), i)} for i in range(3)}
    write_checkpoint(tmp_path / "in", shards)
    assert load_headers(tmp_path / "in").tensors["w"].path.name == "2.safetensors"


def test_name_in_two_files_of_which_the_index_names_neither_is_refused(tmp_path):
    shards = {f"{i}.safetensors": {"w": torch.ones(1), f"k{i}": torch.ones(1)} for i in range(2)}
    write_checkpoint(tmp_path / "in", {**shards, "c.safetensors": {"x": torch.ones(1)}})
    c = {"w": "c.safetensors"}
    edit_json(tmp_path / "in" / INDEX, lambda index: index["weight_map"].update(c))
    assert_folder_refused(tmp_path / "in", "w stands in 0.safetensors too")


def twice(tensor, other, name="w.weight_scale_inv"):
    """Return two shards of which each has a tensor of this name, and what comes out of them."""
    codes, scale = finite_codes(130, 40), torch.full((2, 1), 0.001)
    one, two = {"w.weight": codes, "w.weight_scale_inv": scale}, {"norm": torch.ones(3)}
    expected = {"w.weight": dequantized(codes, scale), "norm": torch.ones(3)}
    return {"a.safetensors": one | {name: tensor}, "b.safetensors": two | {name: other}}, expected


@pytest.mark.parametrize(
    "name, tensor", [("w.weight_scale_inv", torch.full((2, 1), 0.001)),
                     ("w.input_scale", torch.ones(())), ("w.k_scale", torch.ones(1))])
def test_equal_scales_in_two_shards_are_one(tmp_path, name, tensor):
    # Tencent/AngelSlim stores the scales of its diffusion models so.
    shards, expected = twice(tensor, tensor.clone(), name)
    convert(tmp_path, shards, expected, CONFIG, index=False)
    with pytest.raises(CheckpointError, match=rf"{name} has to be read to plan"):
        main(tmp_path / "in", tmp_path / "other", delete_source=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("other", [torch.full((2, 1), 0.002), torch.full((2, 1), 0.001).bfloat16(),
                                   torch.full((1, 2), 0.001)])
def test_different_scales_in_two_shards_are_refused(tmp_path, other):
    shards, _ = twice(torch.full((2, 1), 0.001), other)
    source = write_checkpoint(tmp_path / "in", shards, CONFIG, index=False)
    assert_folder_refused(source, "b.safetensors: w.weight_scale_inv stands in a.safetensors too")


def test_equal_scales_that_are_too_large_to_read_for_planning_are_refused(tmp_path):
    rows = (16 << 20) // 4 + 1
    for name, tensors in {"a": {"w": ("F8_E4M3", [rows, 1])}, "b": {}}.items():
        scale = {"w_scale_inv": ("F32", [rows, 1])}
        write_raw(tmp_path / f"in/{name}.safetensors", {**tensors, **scale})
    assert_folder_refused(tmp_path / "in", "b.safetensors: w_scale_inv stands in a.safetensors too")


def test_equal_parameters_in_two_shards_are_refused(tmp_path):
    shards, _ = twice(torch.ones(4), torch.ones(4), "w.bias")
    source = write_checkpoint(tmp_path / "in", shards, CONFIG, index=False)
    assert_folder_refused(source, "b.safetensors: w.bias stands in a.safetensors too")


# --- configs ---


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_no_object_is_refused(source, text):
    (source / "config.json").write_text(text, encoding="latin-1")
    assert_folder_refused(source, "config.json")


@pytest.mark.parametrize("text", ["[]", '[{"dtype": "float16"}]', "3", "null"])
def test_a_list_that_is_called_like_a_config_is_copied(source, text):
    (source / "config_list.json").write_text(text)
    main(source, source.parent / "out")
    assert (source.parent / "out/config_list.json").read_text() == text


@pytest.mark.parametrize("text", ["{", "\xff", '{"a": 1, "a": 2}'])
def test_a_config_that_is_not_valid_is_refused_under_any_name(source, text):
    (source / "config_1m.json").write_text(text, encoding="latin-1")
    assert_folder_refused(source, "config_1m.json: not valid JSON")


@pytest.mark.parametrize("name", ["config.json", "config_1m.json", "params.json"])
def test_a_config_that_needs_no_edit_is_copied_byte_for_byte(source, name):
    text = '{"dtype":"bfloat16",\r\n\t"é": 1.50, "vision_config": {"dtype": "float32"} }'
    (source / name).write_bytes(text.encode())
    main(source, source.parent / "out")
    assert (source.parent / "out" / name).read_bytes() == text.encode()
    main(source, source.parent / "out", verify=True)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "place, given, dtype",
    [
        ([], "float16", "bfloat16"),
        (["text_config"], "float32", "bfloat16"),
        (["thinker_config", "text_config"], "float16", "bfloat16"),
        (["vision_config"], "float32", "float32"),
        (["vision_config", "text_config"], "float16", "float16"),
        (["thinker_config", "audio_config"], "float16", "float16"),
        (["rope_scaling"], "index", "index"),
        (["vision_config"], "float8_e4m3fn", "bfloat16"),
        (["vision_config"], "torch.float8_e5m2", "bfloat16"),
        (["a", "b"], "int8", "bfloat16"),
    ],
)
def test_dtype_becomes_bfloat16_for_text_and_where_it_names_a_quantized_one(
    source, key, place, given, dtype
):
    config, expected = {key: given}, {key: dtype}
    for part in reversed(place):
        config, expected = {part: config}, {part: expected}
    write_json(source / "config.json", config | CONFIG)
    main(source, source.parent / "out")
    assert json.loads((source.parent / "out/config.json").read_text()) == expected


def test_dangling_links_are_not_taken_for_absence(source):
    for name in ("config.json", INDEX):
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to("gone")
        with pytest.raises(CheckpointError, match=f"{name}: is not a regular file of the check"):
            main(source, source.parent / "out")
        assert not (source.parent / "out").exists()


@pytest.mark.parametrize("kind", [*SPECIAL, "folder"])
@pytest.mark.parametrize("name", ["config.json", "params.json", "hf_quant_config.json", INDEX])
def test_a_config_that_is_no_file_of_the_checkpoint_is_refused(folder, secret, capsys, name, kind):
    write_checkpoint(folder / "in", {SHARD: TENSORS}, index=False)
    special_file(folder / "in" / name, kind, secret)
    assert cli(arguments(folder / "in")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / 'in' / name}: is not a regular file of the check")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("depth", [10, 900, 200_000])
def test_config_of_any_depth_is_converted_whole_or_refused_before_writing(source, depth):
    # how deep is too deep differs between versions of Python
    (source / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    try:
        main(source, source.parent / "out")
    except CheckpointError as error:
        assert depth > 10
        assert "too deep" in str(error) or "not valid JSON" in str(error)
        assert not (source.parent / "out").exists()
    else:
        assert depth < 200_000
        assert (source.parent / "out/config.json").read_text().count("{") == depth


def test_a_number_that_python_cannot_hold_is_refused(source):
    (source / "config.json").write_text('{"rope": {"theta": 1e400}}')
    assert_folder_refused(source, "config.json", "1e400 is too large a number")
