"""--verify: what it accepts, what it finds, and that it shares no decoding with the converter."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fp8_cast_bf16
import kernel
from checkpoints import (
    FP8_CONFIG,
    INDEX,
    ONE,
    SHARD,
    TWO,
    arguments,
    contents,
    edit_json,
    every_code,
    load_checkpoint,
    method,
    nvfp4,
    one_weight,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, cli, main


@pytest.fixture
def folders(tmp_path):
    """An FP8 checkpoint and its converted output."""
    shards = several_kinds()[0]
    shards[ONE] |= {"nan.weight": every_code(40, 40), "nan.weight_scale_inv": torch.ones(1, 1)}
    config = {"torch_dtype": "bfloat16", "hidden_size": 7, "quantization_config": FP8_CONFIG}
    write_checkpoint(tmp_path / "in", shards, config)
    main(tmp_path / "in", tmp_path / "out")
    return tmp_path / "in", tmp_path / "out"


def differences(folders, capsys):
    """Verify; return the lines that name differences, having checked the exit status."""
    source, out = folders
    before = contents(source.parent)
    capsys.readouterr()
    status = cli(arguments(source, "--verify", out=out))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    plan = [i for i, line in enumerate(lines) if re.search("to copy$|^Dropped: ", line)]
    at = plan[-1] + 1
    assert contents(source.parent) == before
    if status == 0:
        assert lines[at].startswith("Verified 7 tensors: no differences; ")
        return []
    assert status == 1
    (error,) = (line for line in printed.err.splitlines() if not line.startswith("Warning: "))
    assert error.startswith(f"error: {out}: differs from what the input gives in {len(lines) - at} "
                            f"place{'s' * (len(lines) - at > 1)}; ")
    shards = {line.partition(": ")[0] for line in lines[at:] if ": element " in line}
    assert "delete " in error or not shards
    assert all(shard in error for shard in shards)
    return [re.sub(r"^\S+\.safetensors: (?=.*: element )", "", line) for line in lines[at:]]


def rewrite(out, change, name=ONE):
    """Let `change` edit the tensors of an output shard."""
    tensors = load_file(out / name)
    change(tensors)
    save_file(tensors, out / name, metadata={"format": "pt"})


def test_an_output_of_ours_is_as_it_should_be(folders, capsys):
    assert differences(folders, capsys) == []


@pytest.mark.parametrize("place", [0, 129 * 300 + 255, 130 * 300 - 1])
def test_one_wrong_bit_in_a_weight_is_found_and_both_values_are_named(folders, capsys, place):
    def flip(tensors):
        tensors["a.weight"].view(torch.int16).view(-1)[place] ^= 1

    right = load_file(folders[1] / ONE)["a.weight"].flatten()[place].item()
    rewrite(folders[1], flip)
    wrong = load_file(folders[1] / ONE)["a.weight"].flatten()[place].item()
    assert differences(folders, capsys) == [
        f"a.weight: element [{place // 300}, {place % 300}] is {wrong}, expected {right}"
    ]


def test_the_first_of_many_differences_is_named(folders, capsys, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "REFERENCE_PIECE", 500)

    def negate(tensors):
        tensors["experts.up_proj"][1:, 7:, 9:] = 7

    rewrite(folders[1], negate, TWO)
    (line,) = differences(folders, capsys)
    assert line.startswith("experts.up_proj: element [1, 7, 9] is 7.0, expected ")


def test_one_wrong_bit_in_a_copied_tensor_is_found(folders, capsys):
    rewrite(folders[1], lambda tensors: tensors["table"].add_(2**33), TWO)
    assert differences(folders, capsys) == [
        "table: element [0] is 0x0000000200000000, expected 0x0000000000000000"
    ]


DTYPES = [torch.float64, torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
          torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("piece", [1 << 20, 4, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_differing_element_of_a_copied_tensor_is_named(
    tmp_path, capsys, monkeypatch, dtype, piece
):
    monkeypatch.setattr(fp8_cast_bf16, "REFERENCE_PIECE", piece)
    size = torch.empty(0, dtype=dtype).element_size()
    tensors = {"a": torch.zeros(3, 5, 7, size, dtype=torch.uint8).view(dtype)[..., 0].clone(),
               "scalar": torch.ones(()), "empty": torch.ones(0, 3), "z": torch.ones(9)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, {}, index=False)
    main(tmp_path / "in", tmp_path / "out")

    def change(tensors):
        flat = tensors["a"].flatten().view(torch.uint8).view(-1, size)
        flat[[59, 60, 104], -1] = 1
        tensors["a"] = flat.flatten().view(dtype).view(3, 5, 7)
        tensors["scalar"] = torch.zeros(())

    rewrite(tmp_path / "out", change, SHARD)
    expected = "00" * size
    assert differences((tmp_path / "in", tmp_path / "out"), capsys) == [
        f"a: element [1, 3, 3] is 0x01{expected[2:]}, expected 0x{expected}",
        "scalar: element [] is 0x00000000, expected 0x3f800000",
    ]


def test_order_padding_payloads_and_sharding_are_free(folders, capsys):
    out = folders[1]
    tensors = load_checkpoint(out)
    nan = tensors["nan.weight"].isnan()
    assert nan.any()
    tensors["nan.weight"].view(torch.int16)[nan] = -0x003F  # 0xFFC1, another NaN
    for path in out.glob("*.safetensors"):
        path.unlink()
    names = sorted(tensors, reverse=True)
    shards = {f"s{i}.safetensors": {name: tensors[name]} for i, name in enumerate(names)}
    write_checkpoint(out, shards)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    edit_json(out / INDEX, lambda index: index.update(metadata={"total_size": size, "more": 1}))
    edit_json(out / "config.json", lambda config: config.update(dtype=config.pop("torch_dtype")))
    header = (out / "s0.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    padded = header[8 : 8 + length] + b" " * 512 + header[8 + length :]
    (out / "s0.safetensors").write_bytes((length + 512).to_bytes(8, "little") + padded)
    assert differences(folders, capsys) == []


def test_nan_in_the_place_of_a_number_is_a_difference(folders, capsys):
    rewrite(folders[1], lambda tensors: tensors["a.weight"][5:, 6:].fill_(torch.nan))
    (line,) = differences(folders, capsys)
    assert line.startswith("a.weight: element [5, 6] is nan, expected ")


def test_missing_extra_and_changed_tensors_are_named(folders, capsys):
    def change(tensors):
        tensors["a.weight"] = tensors["a.weight"].float()
        tensors["b.weight_scale_inv"] = torch.ones(3, 2)
        tensors["bias"] = tensors["bias"].view(3, 1).clone()
        del tensors["norm.weight"]

    rewrite(folders[1], change)
    edit_json(folders[1] / INDEX, lambda index: index["weight_map"].pop("norm.weight"))
    assert differences(folders, capsys) == [
        "bias is F32 [3, 1], expected F32 [3]",
        "a.weight is F32 [130, 300], expected BF16 [130, 300]",
        "norm.weight is missing, expected BF16 [77]",
        "b.weight_scale_inv is F32 [3, 2], expected none",
        "{}: metadata.total_size is {}, expected {}".format(INDEX, *total(folders[1])),
        f'{INDEX}: weight_map.b.weight_scale_inv is missing, expected "{ONE}"',
    ]


def total(out):
    """Return the size that the index states and the one that is true."""
    size = sum(t.numel() * t.element_size() for t in load_checkpoint(out).values())
    return json.loads((out / INDEX).read_text())["metadata"]["total_size"], size


def test_what_is_wrong_with_index_and_config_is_named(folders, capsys):
    out = folders[1]

    def change_index(index):
        index["metadata"]["total_size"] = 1
        index["weight_map"]["bias"] = TWO

    def change_config(config):
        config["quantization_config"] = {"quant_method": "fp8"}
        config["torch_dtype"] = "float16"
        del config["hidden_size"]

    edit_json(out / INDEX, change_index)
    edit_json(out / "config.json", change_config)
    assert differences(folders, capsys) == [
        'config.json: dtype is "float16", expected "bfloat16"',
        "config.json: hidden_size is missing, expected 7",
        'config.json: quantization_config.quant_method is "fp8", expected none',
        f"{INDEX}: metadata.total_size is 1, expected {total(out)[1]}",
        f'{INDEX}: weight_map.bias is "{TWO}", expected "{ONE}"',
    ]
    (out / INDEX).unlink()
    (out / "config.json").unlink()
    assert differences(folders, capsys) == [f"{INDEX} is missing", "config.json is missing"]


def test_a_stale_index_hides_no_other_difference(folders, capsys):
    out = folders[1]
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    edit_json(out / INDEX, lambda index: index["weight_map"].update(
        {"gone": "gone.safetensors", "a.weight_scale_inv": ONE}))
    edit_json(out / "config.json", lambda config: config.update(hidden_size=8))
    lines = differences(folders, capsys)
    assert lines[:3] == [
        "config.json: hidden_size is 8, expected 7",
        f'{INDEX}: weight_map.gone is "gone.safetensors", expected none',
        f'{INDEX}: weight_map.a.weight_scale_inv is "{ONE}", expected none',
    ]
    assert lines[3].startswith("bias: element [0] is 0x00000000, expected ")
    assert len(lines) == 4


def test_a_missing_shard_hides_no_other_difference(folders, capsys):
    out = folders[1]
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    size = sum(t.numel() * t.element_size() for t in load_checkpoint(out).values())
    (out / TWO).unlink()
    lines = differences(folders, capsys)
    missing = ["b.weight", "experts.up_proj", "table"]
    assert sorted(line.split()[0] for line in lines[:3]) == missing
    assert all(" is missing, expected " in line for line in lines[:3])
    assert lines[3] == f"{INDEX}: metadata.total_size is {size}, expected {total(out)[1]}"
    assert sorted(lines[4:7]) == [f'{INDEX}: weight_map.{name} is "{TWO}", expected none'
                                  for name in missing]
    assert lines[7].startswith("bias: element [0] is 0x00000000, expected ")
    assert len(lines) == 8


@pytest.mark.parametrize("weight_map", [None, [], "x", {}, {"a.weight": 7}])
def test_an_index_without_a_proper_weight_map_hides_nothing(folders, capsys, weight_map):
    out = folders[1]
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    edit_json(out / INDEX, lambda index: index.update(weight_map=weight_map))
    lines = differences(folders, capsys)
    assert [line for line in lines if not line.startswith(INDEX)] == lines[-1:]
    assert lines[-1].startswith("bias: element [0] is 0x00000000, expected ")
    assert len(lines) > 1


def test_an_output_that_is_not_there_or_broken_is_an_error_with_its_name(folders, capsys):
    source, out = folders
    with pytest.raises(CheckpointError, match=f"{source.parent / 'none'}: no such folder"):
        main(source, source.parent / "none", verify=True)
    (out / TWO).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"delete {TWO} and run the same command"):
        main(source, out, verify=True)
    assert f"{TWO}: not a whole safetensors file" in capsys.readouterr().out


# --- what is found is mended by the command that is named ---


def verified(source, capsys):
    """Verify; return the exit status and the last line about it."""
    capsys.readouterr()
    status = cli(arguments(source, "--verify"))
    printed = capsys.readouterr()
    return status, printed.err.splitlines()[-1] if status else printed.out.splitlines()[-1]


def follow(source, line):
    """Do what a message says: delete files, and run the same command again."""
    out = source.parent / "out"
    if found := re.search(r"delete (.*?) and run", line):
        for name in found[1].split(", "):
            (out / name).unlink()
    assert "run the same command" in line
    assert cli(arguments(source)) == 0


def flip(path, at=-1):
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def mend(folders, capsys):
    source = folders[0]
    status, line = verified(source, capsys)
    assert status == 1
    follow(source, line)
    status, line = verified(source, capsys)
    assert (status, line.partition(":")[0]) == (0, "Verified 7 tensors")


@pytest.mark.parametrize("damaged", [[ONE], [TWO], [ONE, TWO]])
def test_damaged_shards_are_mended_by_the_command_that_verify_names(folders, capsys, damaged):
    expected = contents(folders[1])
    for name in damaged:
        flip(folders[1] / name)
    mend(folders, capsys)
    assert contents(folders[1]) == expected


@pytest.mark.parametrize("damaged", [INDEX, "config.json"])
def test_damaged_texts_are_mended_by_the_command_that_verify_names(folders, capsys, damaged):
    expected = contents(folders[1])
    edit_json(folders[1] / damaged, lambda value: value.update(weight_map={}, dtype="float16"))
    mend(folders, capsys)
    assert contents(folders[1]) == expected


def test_damage_of_all_shards_and_the_config_is_mended_by_the_command_that_verify_names(
    folders, capsys
):
    expected = contents(folders[1])
    for name in (ONE, TWO):
        flip(folders[1] / name)
    edit_json(folders[1] / "config.json", lambda config: config.update(dtype="float16"))
    mend(folders, capsys)
    assert contents(folders[1]) == expected


@pytest.mark.parametrize("how", ["cut", "no header", "gone"])
def test_a_shard_that_is_not_whole_is_mended_by_the_command_that_verify_names(
    folders, capsys, how
):
    path, expected = folders[1] / ONE, contents(folders[1])
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(expected[ONE][:-1] if how == "cut" else bytes(len(expected[ONE])))
    mend(folders, capsys)
    assert contents(folders[1]) == expected


def test_a_tensor_that_is_missing_in_a_shard_is_mended_by_the_command_that_verify_names(
    folders, capsys
):
    expected = contents(folders[1])
    rewrite(folders[1], lambda tensors: tensors.pop("bias"))
    mend(folders, capsys)
    assert contents(folders[1]) == expected


def test_a_damaged_shard_of_a_folder_is_mended_by_the_command_that_verify_names(
    tmp_path, capsys
):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, {}, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b")[0]}, {}, index=False)
    main(source, tmp_path / "out")
    expected = contents(tmp_path / "out")
    flip(tmp_path / "out/draft" / SHARD)
    status, line = verified(source, capsys)
    assert status == 1
    assert f"delete draft/{SHARD} and run the same command" in line
    follow(source, line)
    assert verified(source, capsys)[0] == 0
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("gone", ["draft", f"draft/{SHARD}", "draft/config.json"])
def test_what_is_missing_in_a_folder_is_found_and_named_with_it(tmp_path, capsys, gone):
    source = write_checkpoint(tmp_path / "in", {SHARD: one_weight("a")[0]}, {}, index=False)
    write_checkpoint(source / "draft", {SHARD: one_weight("b")[0]}, {}, index=False)
    main(source, tmp_path / "out")
    path = tmp_path / "out" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    assert cli(arguments(source, "--verify")) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " is missing" in line]
    assert lines
    assert all(line.startswith("draft/") for line in lines)
    main(source, tmp_path / "out")
    main(source, tmp_path / "out", verify=True)


def test_a_hundred_differences_are_said_in_20_lines_and_all_stand_in_the_report(
    tmp_path, capsys
):
    tensors = {f"t{i:03}": torch.zeros(4) for i in range(100)}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors}, {}, index=False)
    main(source, tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: [t.fill_(1) for t in tensors.values()], SHARD)
    before = contents(tmp_path)
    capsys.readouterr()
    assert cli(arguments(source, "--verify", "--report", str(tmp_path / "r.json"))) == 1
    printed = capsys.readouterr()
    assert len((printed.out + printed.err).splitlines()) <= 20
    assert "in 100 places" in printed.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["differences"]) == 100
    assert (report["status"], report["damaged_shards"]) == ("different", [SHARD])
    (tmp_path / "r.json").unlink()
    assert contents(tmp_path) == before


def test_verifying_does_not_speak_of_a_device_that_was_asked_for(folders, capsys):
    capsys.readouterr()
    assert cli(arguments(folders[0], "--verify")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Verifying on the CPU, ")
    assert "as asked" not in printed


def test_verifying_shares_no_decoding_with_converting(folders, capsys, monkeypatch):
    def fail(*operands, **options):
        raise AssertionError("the converter's decoding was used")

    for name in ("dequantize", "widen_scales", "_apply_scales", "_dequantize_cpu",
                 "_dequantize_triton", "weight_dequant"):
        monkeypatch.setattr(kernel, name, fail)
    for name in ("render", "render_weight", "read_codes", "read_scales"):
        monkeypatch.setattr(fp8_cast_bf16, name, fail)
    for name in ("constants", "values"):
        monkeypatch.setattr(kernel.NumberFormat, name, property(fail))
    # A sample of the values is decoded as in a conversion, but to warn, not to compare.
    monkeypatch.setattr(fp8_cast_bf16, "find_implausible", lambda plan: [])
    assert differences(folders, capsys) == []


FP8_WEIGHTS = {"a.weight", "b.weight", "experts.up_proj", "nan.weight"}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"nonfinite": 0x80}, {"nan.weight"}),  # NaN taken for numbers
        ({"exponent_bits": 5, "mantissa_bits": 2}, FP8_WEIGHTS),
        ("too_small", FP8_WEIGHTS),
        ("widen_scales", FP8_WEIGHTS),
        ("_apply_scales", FP8_WEIGHTS - {"nan.weight"}),  # which has one scale only
    ],
)
def test_an_error_in_the_kernel_would_be_found(folders, capsys, monkeypatch, change, wrong):
    source = folders[0]
    with monkeypatch.context() as patch:
        if isinstance(change, dict):
            patch.setitem(kernel.FORMATS, "E4M3",
                          dataclasses.replace(kernel.FORMATS["E4M3"], **change))
        elif change == "too_small":
            right = kernel.NumberFormat.too_small
            patch.setattr(kernel.NumberFormat, change, lambda *given: 2 * right(*given))
        elif change == "widen_scales":
            widen = kernel.widen_scales
            patch.setattr(kernel, change, lambda *given: widen(*given) * 1.01)
        else:
            scale = kernel._apply_scales
            patch.setattr(kernel, change, lambda values, scales, *given:
                          scale(values, scales[:1, :1].expand_as(scales).contiguous(), *given))
        main(source, source.parent / "wrong")
    found = differences((source, source.parent / "wrong"), capsys)
    assert {line.partition(":")[0] for line in found} == wrong


@pytest.mark.parametrize("change", ["order of codes", "global scale"])
def test_an_error_with_packed_codes_would_be_found(tmp_path, monkeypatch, change):
    codes, scale, _ = nvfp4(3.0, divide=True)
    tensors = {"a.weight_packed": codes, "a.weight_scale": scale,
               "a.weight_global_scale": torch.tensor([3.0])}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors}, method("compressed-tensors"))
    main(source, tmp_path / "out")
    main(source, tmp_path / "out", verify=True)
    with monkeypatch.context() as patch:
        if change == "order of codes":
            right = kernel.dequantize
            patch.setattr(kernel, "dequantize", lambda codes, *given:
                          right((codes >> 4) | (codes << 4), *given))
        else:
            read = fp8_cast_bf16.read_scales
            patch.setattr(fp8_cast_bf16, "read_scales", lambda *given: read(*given) * 9)
        main(source, tmp_path / "wrong")
    with pytest.raises(CheckpointError, match=r"in 1 place; delete \S+ and run the same command"):
        main(source, tmp_path / "wrong", verify=True)


def test_the_ancestors_output_differs_in_its_config_and_index_only(folders, capsys):
    """Its script loads whole shards, casts, pops the scales and copies the config as it is."""
    source = folders[0]
    theirs = source.parent / "theirs"
    scales = {name: t for name, t in load_checkpoint(source).items() if "scale" in name}
    shards = {}
    for shard in (ONE, TWO):
        shards[shard] = {}
        for name, tensor in load_file(source / shard).items():
            scale = scales.get(name + "_scale_inv", scales.get(name.replace(".", "_") + "_scale"))
            if scale is not None:
                wide = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
                wide = wide[..., : tensor.shape[-2], : tensor.shape[-1]]
                shards[shard][name] = (tensor.float() * wide).bfloat16()
            elif name not in scales:
                shards[shard][name] = tensor
    write_checkpoint(theirs, shards, json.loads((source / "config.json").read_text()))
    lines = differences((source, theirs), capsys)
    assert [line.partition(" is ")[0] for line in lines] == [
        "config.json: quantization_config.quant_method",
        "config.json: quantization_config.fmt",
        "config.json: quantization_config.weight_block_size",
        f"{INDEX}: metadata.total_size",
    ]


def test_differences_stand_in_the_report(folders, tmp_path):
    source, out = folders
    rewrite(out, lambda tensors: tensors["bias"].fill_(0))
    with pytest.raises(CheckpointError, match=r"in 1 place; delete \S+ and run the same command"):
        main(source, out, verify=True, report=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["differences"]) == 1
    assert report["differences"][0].startswith(f"{ONE}: bias: element [0] is 0x0000")
