"""Checkpoints that cannot be converted: one message that names the file, nothing written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import INDEX, assert_same_bits, finite_codes, write_checkpoint
from fp8_cast_bf16 import CheckpointError, load_checkpoint, main

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path):
    weight = {"w": finite_codes(4, 4)}
    return write_checkpoint(tmp_path / "in", {ONE: weight, TWO: {"w_scale_inv": torch.ones(1)}})


def assert_refused(source, *complaints):
    out = source.parent / "out"
    with pytest.raises(CheckpointError) as caught:
        main(source, out)
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert not out.exists()


def edit_index(source, change):
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))


def test_missing_folder(source):
    assert_refused(source.parent / "nowhere", "nowhere: no such folder")


def test_folder_without_shards(source):
    for path in source.iterdir():
        path.unlink()
    assert_refused(source, "holds no *.safetensors")


def test_missing_shard_is_named(source):
    (source / TWO).unlink()
    assert_refused(source, TWO, "incomplete")


def test_truncated_shard_is_named(source):
    path = source / ONE
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(source, ONE, "not a whole safetensors file")


def test_shard_with_bytes_too_many_is_named(source):
    with open(source / ONE, "ab") as file:
        file.write(b"x")
    assert_refused(source, ONE, "not a whole safetensors file")


def test_shard_that_is_something_else_is_named(source):
    (source / ONE).write_text("<html>please log in</html>")
    assert_refused(source, ONE, "not a whole safetensors file")


def test_tensor_that_only_the_index_knows_is_named(source):
    edit_index(source, lambda index: index["weight_map"].update({"gone.weight": TWO}))
    assert_refused(source, TWO, "gone.weight is not there")


@pytest.mark.parametrize(
    "entry", ["../x.safetensors", "/x.safetensors", "a/b", "", "..", 3, "a\\b.safetensors", "w.st"]
)
def test_index_entry_that_is_no_plain_file_name_is_refused(source, entry):
    edit_index(source, lambda index: index["weight_map"].update({"w": entry}))
    assert_refused(source, INDEX, "puts w into", "expected a *.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100000, '{"weight_map": []}', "{}", "\xff"])
def test_index_that_is_no_index_is_refused(source, text):
    (source / INDEX).write_text(text, encoding="latin-1")
    assert_refused(source, INDEX)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_no_object_is_refused(source, text):
    (source / "config.json").write_text(text, encoding="latin-1")
    assert_refused(source, "config.json")


def test_name_in_two_files_without_an_index_is_refused(source):
    (source / INDEX).unlink()
    save_file({"w": torch.ones(1)}, source / TWO)
    assert_refused(source, TWO, "w stands in", ONE)


def test_name_in_two_files_is_decided_by_the_index(source):
    save_file({"w": torch.zeros(1), "w_scale_inv": torch.ones(1)}, source / TWO)
    assert load_checkpoint(source).tensors["w"].path.name == ONE
    edit_index(source, lambda index: index["weight_map"].update({"w": TWO}))
    assert load_checkpoint(source).tensors["w"].path.name == TWO


def test_name_in_three_files_is_decided_by_the_index(tmp_path):
    shards = {f"{i}.safetensors": {"w": torch.full((1,), i)} for i in range(3)}
    write_checkpoint(tmp_path / "in", shards)
    assert load_checkpoint(tmp_path / "in").tensors["w"].path.name == "2.safetensors"


def test_name_in_two_files_of_which_the_index_names_neither_is_refused(tmp_path):
    shards = {f"{i}.safetensors": {"w": torch.ones(1), f"k{i}": torch.ones(1)} for i in range(2)}
    write_checkpoint(tmp_path / "in", {**shards, "c.safetensors": {"x": torch.ones(1)}})
    edit_index(tmp_path / "in", lambda index: index["weight_map"].update({"w": "c.safetensors"}))
    assert_refused(tmp_path / "in", "w stands in 0.safetensors too")


def test_dangling_links_are_not_taken_for_absence(source):
    for name in ("config.json", INDEX):
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to("gone")
        with pytest.raises(CheckpointError, match=f"{name}: is no file of the checkpoint"):
            main(source, source.parent / "out")
        assert not (source.parent / "out").exists()


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_scale_of_a_weight_that_no_format_knows_is_refused(tmp_path, dtype):
    tensors = {"w": torch.ones(2, 2, dtype=dtype), "w_scale_inv": torch.ones(1)}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors})
    assert_refused(tmp_path / "in", "beside w_scale_inv", "in no format known here")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.bool])
def test_what_never_holds_codes_is_copied_and_the_scale_beside_it_is_named(tmp_path, dtype, capsys):
    tensors = {"w": torch.ones(2, 2, dtype=dtype), "w_scale_inv": torch.ones(1)}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors})
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_file(tmp_path / "out/model.safetensors")["w"], tensors["w"])
    assert "Dropped scales of no weight: w_scale_inv\n" in capsys.readouterr().out


def test_an_exponent_that_is_the_scale_of_no_weight_is_refused(tmp_path):
    tensors = {"norm.weight": torch.ones(4), "norm.scale": torch.ones(4).to(torch.float8_e8m0fnu)}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors})
    assert_refused(tmp_path / "in", "norm.scale is F8_E8M0", "the scale of no known weight")


def test_checkpoint_of_scales_alone_is_refused(source):
    (source / INDEX).unlink()
    (source / ONE).unlink()
    assert_refused(source, "holds no tensors")


def test_shard_larger_than_memory_is_read(tmp_path):
    size = 1 << 40  # a sparse file: torch refuses to map it, its header is good all the same
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert load_checkpoint(tmp_path).tensors["x"].shape == (size,)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(8 + len(header) + size - 1)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(tmp_path)


def test_a_number_that_python_cannot_hold_is_refused(source):
    (source / "config.json").write_text('{"rope": {"theta": 1e400}}')
    assert_refused(source, "config.json", "1e400 is too large a number")
