"""--verify: what it accepts, what it finds, and that doing what it says mends an output."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints as c
import fp8_cast_bf16
from checkpoints import FP8_CONFIG, INDEX, ONE, SHARD, TWO
from fp8_cast_bf16 import CheckpointError, cli, main


@pytest.fixture
def source(tmp_path):
    """An FP8 checkpoint, which has been converted beside it."""
    shards = c.several_kinds()[0]
    shards[ONE] |= {"nan.weight": c.every_code(40, 40), "nan.weight_scale_inv": torch.ones(1, 1)}
    config = {"torch_dtype": "bfloat16", "hidden_size": 7, "quantization_config": FP8_CONFIG}
    c.write_checkpoint(tmp_path / "in", shards, config)
    main(tmp_path / "in", tmp_path / "out")
    return tmp_path / "in"


def verified(source, capsys, out=None):
    """Verify; return the lines about differences, without the output's folder, and the last one."""
    out = out or source.parent / "out"
    before = c.snapshot(source.parent)
    capsys.readouterr()
    status, printed = cli(c.arguments(source, "--verify", out=out)), capsys.readouterr()
    assert c.snapshot(source.parent) == before
    if status == 0:
        last = printed.out.splitlines()[-1]
        assert re.fullmatch(r"Verified \d+ tensors?: no differences", last)
        return [], last
    *lines, last = printed.err.splitlines()
    found = [line for line in lines if line.startswith(str(out))]
    assert last.startswith(f"error: {out}: differs from what the input gives in {len(found)} place")
    for path in {line.partition(": ")[0] for line in found}:  # A line begins with its file.
        assert (f"delete {path}" in last) == (out / path).exists()
    return [line.removeprefix(f"{out}/") for line in found], last


def differences(source, capsys, out=None):
    return verified(source, capsys, out)[0]


def rewrite(out, change, name=ONE):
    """Let `change` edit the tensors of an output shard."""
    tensors = load_file(out / name)
    change(tensors)
    save_file(tensors, out / name, metadata={"format": "pt"})


# --- values ---


@pytest.mark.parametrize("place", [0, 129 * 300 + 255, 130 * 300 - 1])
def test_one_wrong_bit_in_a_weight_is_found_and_both_values_are_named(
        source, out, capsys, monkeypatch, place):
    def flip(tensors):
        tensors["a.weight"].view(torch.int16).view(-1)[place] ^= 1

    right = load_file(out / ONE)["a.weight"].flatten()[place].item()
    rewrite(out, flip)
    wrong = load_file(out / ONE)["a.weight"].flatten()[place].item()
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    assert differences(source, capsys) == [
        f"{ONE}: a.weight: element [{place // 300}, {place % 300}] is {wrong}, expected {right}"]


def test_the_first_of_many_differences_in_each_tensor_is_named(source, out, capsys, monkeypatch):
    def change(tensors):
        tensors["experts.up_proj"][1:, 7:, 9:] = 7
        tensors["b.weight"][5:, 6:] = torch.nan

    rewrite(out, change, TWO)
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    one, two = sorted(differences(source, capsys))
    assert one.startswith(f"{TWO}: b.weight: element [5, 6] is nan, expected ")
    assert two.startswith(f"{TWO}: experts.up_proj: element [1, 7, 9] is 7.0, expected ")


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
    torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64])
def test_a_copied_tensor_is_compared_bit_for_bit_nan_too(tmp_path, capsys, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    tensors = {"a": torch.zeros(3, 5, 7, size, dtype=torch.uint8).view(dtype)[..., 0].clone(),
               "nan": torch.full((9,), 0x7FC0).short().view(torch.bfloat16),
               "scalar": torch.ones(()), "empty": torch.ones(0, 3), "z": torch.ones(9)}
    source = c.write_checkpoint(tmp_path / "in", {SHARD: tensors}, {}, index=False)
    main(source, tmp_path / "out")

    def change(tensors):
        flat = tensors["a"].flatten().view(torch.uint8).view(-1, size)
        flat[[59, 60, 104], -1] = 1
        tensors["a"] = flat.flatten().view(dtype).view(3, 5, 7)
        tensors["nan"].view(torch.int16)[3:] = -1
        tensors["scalar"] = torch.zeros(())

    rewrite(tmp_path / "out", change, SHARD)
    assert sorted(differences(source, capsys)) == [
        f"{SHARD}: a: element [1, 3, 3] is 0x1{'00' * (size - 1)}, expected 0x0",
        f"{SHARD}: nan: element [3] is 0xffff, expected 0x7fc0",
        f"{SHARD}: scalar: element [] is 0x0, expected 0x3f800000"]


# --- outputs of others ---


def test_order_padding_payloads_of_nan_and_sharding_are_free(source, out, capsys):
    tensors = c.load_checkpoint(out)
    nan = tensors["nan.weight"].isnan()
    assert nan.any()
    tensors["nan.weight"].view(torch.int16)[nan] = -0x003F  # 0xFFC1, another NaN
    metadata = c.read_json(out / INDEX)["metadata"]
    for path in out.glob("*.safetensors"):
        path.unlink()
    names = sorted(tensors, reverse=True)
    shards = {f"s{i}.safetensors": {name: tensors[name]} for i, name in enumerate(names)}
    c.write_checkpoint(out, shards)
    c.edit_json(out / INDEX, lambda index: index.update(metadata=metadata))
    c.edit_json(out / "config.json", lambda config: config.update(
        dtype=config.pop("torch_dtype"), transformers_version="4.57.1"))
    header, data = c.split(out / "s0.safetensors")
    (out / "s0.safetensors").write_bytes(c.shard_of(header[8:] + b" " * 512) + data)
    assert verified(source, capsys) == ([], "Verified 7 tensors: no differences")


def test_a_whole_checkpoint_in_one_file_without_an_index_lacks_only_that(source, capsys):
    theirs = source.parent / "theirs"
    theirs.mkdir()
    save_file(c.load_checkpoint(source.parent / "out"), theirs / SHARD)
    shutil.copy(source.parent / "out/config.json", theirs)
    assert differences(source, capsys, theirs) == [f"{INDEX}: is missing"]


def test_the_ancestors_output_differs_in_its_config_and_index_only(source, out, capsys):
    """Its script casts, pops the scales and copies the config as it is."""
    theirs = source.parent / "theirs"
    shards = {name: load_file(out / name) for name in (ONE, TWO)}
    c.write_checkpoint(theirs, shards, c.read_json(source / "config.json"))
    lines = differences(source, capsys, theirs)
    assert sorted(line.partition(" is ")[0] for line in lines) == [
        "config.json: quantization_config.fmt",
        "config.json: quantization_config.quant_method",
        "config.json: quantization_config.weight_block_size", f"{INDEX}: metadata.total_size"]


# --- names, dtypes, shapes, index and configs ---


def test_missing_extra_and_changed_tensors_are_named(source, out, capsys):
    def change(tensors):
        tensors["a.weight"] = tensors["a.weight"].float()
        tensors["b.weight_scale_inv"] = torch.ones(3, 2)
        tensors["bias"] = tensors["bias"].view(3, 1).clone()
        del tensors["norm.weight"]
        tensors["table"] = load_file(out / TWO)["table"]

    rewrite(out, change)
    c.edit_json(out / INDEX, lambda index: index["weight_map"].pop("norm.weight"))
    lines = differences(source, capsys)
    assert sorted(lines[:5]) == [
        f"{ONE}: a.weight is F32 [130, 300], expected BF16 [130, 300]",
        f"{ONE}: b.weight_scale_inv is F32 [3, 2], expected none",
        f"{ONE}: bias is F32 [3, 1], expected F32 [3]",
        f"{ONE}: norm.weight is missing, expected BF16 [77]",
        f"{TWO}: table stands in {out / ONE} too"]
    assert all(line.startswith(f"{INDEX}: ") for line in lines[5:])
    assert f'{INDEX}: weight_map.b.weight_scale_inv is missing, expected "{ONE}"' in lines


def test_what_is_wrong_with_index_and_config_is_named_and_hides_nothing(source, out, capsys):
    def change_index(index):
        index["metadata"]["total_size"] = 1
        index["weight_map"] |= {"bias": TWO, "gone": "gone.safetensors"}

    def change_config(config):
        config |= {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float16"}
        del config["hidden_size"]

    size = sum(tensor.nbytes for tensor in c.load_checkpoint(out).values())
    c.edit_json(out / INDEX, change_index)
    c.edit_json(out / "config.json", change_config)
    (out / "hf_quant_config.json").write_text("{}")
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    element, *lines = sorted(differences(source, capsys), key=lambda line: ": element" not in line)
    assert element.startswith(f"{ONE}: bias: element [0] is 0x0, expected 0x")
    assert sorted(lines) == [
        'config.json: dtype is "float16", expected "bfloat16"',
        "config.json: hidden_size is missing, expected 7",
        'config.json: quantization_config.quant_method is "fp8", expected none',
        "hf_quant_config.json: only a quantized checkpoint has this",
        f"{INDEX}: metadata.total_size is 1, expected {size}",
        f'{INDEX}: weight_map.bias is "{TWO}", expected "{ONE}"',
        f'{INDEX}: weight_map.gone is "gone.safetensors", expected none']


def test_missing_files_are_named_and_hide_nothing(source, out, capsys):
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    for name in (INDEX, "config.json", TWO):
        (out / name).unlink()
    *lines, last = differences(source, capsys)
    assert {f"{INDEX}: is missing", "config.json: is missing"} < {*lines}
    assert {line.partition(" is missing, expected ")[0] for line in lines if TWO in line} == {
        f"{TWO}: {name}" for name in ("b.weight", "experts.up_proj", "table")}
    assert last.startswith(f"{ONE}: bias: element [0] is 0x0")
    assert len(lines) == 5


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", [INDEX, "config.json", TWO])
def test_what_is_no_file_is_named_and_never_read(source, out, capsys, kind, name):
    (out / name).unlink()
    c.special_file(out / name, kind)
    assert f"{name}: is not a regular file" in differences(source, capsys)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": "x"}',
                                   '{"weight_map": {"a.weight": 7}}', "[]", "", "{", "[" * 99999])
def test_an_index_that_is_none_hides_nothing(source, out, capsys, index):
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    (out / INDEX).write_text(index)
    lines = differences(source, capsys)
    assert lines[-1].startswith(f"{ONE}: bias: element [0] is 0x0")
    assert len(lines) > 1
    assert all(line.startswith(f"{INDEX}: ") for line in lines[:-1])


def test_an_output_that_is_not_there_is_an_error_with_its_name(source):
    with pytest.raises(CheckpointError, match=f"{source.parent / 'none'}: no such folder"):
        main(source, source.parent / "none", verify=True)


# --- following the last line mends the output ---


DAMAGES = [(path, how) for path in (ONE, f"draft/{SHARD}")
           for how in ("a bit", "cut", "zeros", "text", "refused", "missing", "fewer")]
DAMAGES += [(path, how) for path in (INDEX, "config.json", "draft/config.json")
            for how in ("values", "cut", "missing")]
DAMAGES += [(path, "other values")
            for path in ("hf_quant_config.json", "draft/quantize_config.json")]


@pytest.mark.parametrize("damages", [
    *([each] for each in DAMAGES), [(ONE, "a bit"), (TWO, "missing"), ("config.json", "values")]])
def test_an_output_is_mended_by_doing_what_the_last_line_says(source, out, capsys, damages):
    draft = {SHARD: c.one_weight("d")[0]}
    c.write_checkpoint(source / "draft", draft, {}, index=False)
    main(source, out)
    expected = c.contents(out)
    for path, how in damages:
        c.spoil(out / path, how)
    lines, last = verified(source, capsys)
    assert {line.partition(": ")[0] for line in lines} >= {path for path, _ in damages}
    found = re.search(r"; (?:(delete .*) and )?run the same command without --verify$", last)
    for step in found[1].split(", ") if found[1] else []:
        (out / step.removeprefix("delete ")).unlink()
    assert cli(c.arguments(source)) == 0
    assert c.contents(out) == expected
    assert differences(source, capsys) == []
