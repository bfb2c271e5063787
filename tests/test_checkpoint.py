"""Reading a checkpoint: its shards, headers, index and configs, and which of them count.

What cannot be converted is refused with one message that names the file, and nothing is written.
"""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import (
    INDEX,
    ONE,
    SHARD,
    SPECIAL,
    TENSORS,
    TWO,
    arguments,
    assert_folder_refused,
    assert_same_bits,
    contents,
    convert,
    edit_json,
    finite_codes,
    load_checkpoint,
    several_kinds,
    special_file,
    write_checkpoint,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, cli, main
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


# --- headers ---


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


# --- configs ---


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_no_object_is_refused(source, text):
    (source / "config.json").write_text(text, encoding="latin-1")
    assert_folder_refused(source, "config.json")


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
