"""What somebody could upload: headers, indexes and configs that lie, and files that are no files.

Whatever it is, it is converted right or refused with exit status 1, one line that names the file,
and nothing written. FP8_CASES in the environment sets how many cases each property tries.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpoints import (
    CONFIG,
    INDEX,
    PEAK,
    ROOT,
    SHARD,
    TENSORS,
    arguments,
    contents,
    finite_codes,
    peak_memory,
    shard_of,
    write_checkpoint,
    write_raw,
)
from fp8_cast_bf16 import cli

cases = settings(
    max_examples=int(os.environ.get("FP8_CASES", 60)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize="FP8_CASES" not in os.environ,
)

# --- strategies ---

integers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30])
)
names = st.one_of(
    st.sampled_from(
        "w.weight w.weight_scale_inv w.weight_scale w.scale w.weight_scale_2 w.weight_global_scale "
        "w.weight_packed w._weight_qdata w.comfy_quant w.g_idx w.weight_zero_point qkv_proj.weight "
        "qkv_proj.weight_scale_inv w.input_scale k_scale w shard_0.weight weight_scale "
        "__metadata__ ../../etc/passwd /w w/../v . .. .weight w..weight".split()
    ),
    st.sampled_from(["", "w\0", "w\nerror: x", "\x1b[2Jw", "\u202ew", "w" * 5000]),
    st.text(max_size=8),
)
scalars = st.one_of(
    st.none(), st.booleans(), integers, st.floats(), names,
    st.sampled_from(["pt", "fp8", "float8_e4m3fn", "128x128", "1x32", "{}", '{"layers": 1}']),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
dtypes = st.sampled_from(
    "F8_E4M3 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ U8 I8 F4 F6_E2M3 F32 BF16 F16 I32 I64 BOOL C64 "
    "F64 X f32".split()
)
shapes = st.lists(integers, max_size=5)
BITS = {"F8": 8, "U8": 8, "I8": 8, "F4": 4, "F6": 6, "F3": 32, "BF": 16, "F1": 16, "I3": 32,
        "I6": 64, "BO": 8, "C6": 64, "F6_": 64}


def numel(shape):
    """Return the product of a shape that may be nonsense, at most what a file may hold here."""
    count = 1
    for size in shape:
        count *= max(0, size)
    return min(count, 4096)


@st.composite
def headers(draw):
    """A header whose tensors mostly lie one after the other, and mostly are what they say."""
    header, offset = {}, 0
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.just({"format": "pt"}), values))
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(dtypes)
        shape = draw(st.one_of(st.lists(st.integers(0, 9), max_size=3), shapes))
        size = numel(shape) * BITS.get(dtype[:2], 8) // 8
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        if draw(st.integers(0, 5)) == 0:
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            entry[key] = draw(st.one_of(values, st.lists(integers, min_size=2, max_size=2)))
        header[name] = draw(values) if draw(st.integers(0, 20)) == 0 else entry
    return header, offset


def quoted(value) -> bytes:
    return json.dumps(value).encode()


def spoil(draw, text: bytes) -> bytes:
    """Change, drop or repeat a piece of a text, or leave it."""
    if draw(st.integers(0, 2)) or not text:
        return text
    at, size = draw(st.integers(0, len(text))), draw(st.integers(0, 30))
    put = draw(st.one_of(st.binary(max_size=5), st.just(text[at : at + size] * 2)))
    return text[:at] + put + text[at + size :]


# --- the property ---


def outcome(folder: Path, capsys) -> int:
    """Convert; check all that holds for any input, and return the exit status."""
    before, out = contents(folder / "in"), folder / "out"
    options = arguments(folder / "in")
    capsys.readouterr()
    status = cli([*options, "--device", "cpu", "--workers", "2"])
    printed = capsys.readouterr()
    assert contents(folder / "in") == before
    for text in (printed.out, printed.err):
        assert all(c.isprintable() or c == "\n" for c in text)
    if status:
        assert status == 1
        *warnings, error = printed.err.splitlines()
        assert error.startswith(f"error: {folder / 'in'}"), printed.err
        assert all(line.startswith("Warning: ") for line in warnings)
        assert len(error) < 9000
        assert not out.exists()
    else:
        assert all(line.startswith("Warning: ") for line in printed.err.splitlines())
        for path in (folder / "in").glob("*.safetensors"):
            with safe_open(path, framework="pt"):  # which accepts what the converter accepts
                pass
        for path in out.glob("*.safetensors"):
            with safe_open(path, framework="pt") as shard:
                assert shard.metadata()["format"] == "pt"
        assert cli([*options, "--verify"]) == 0
    return status


def new_folder():
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "in").mkdir()
    return folder


@given(data=st.data())
@cases
def test_headers(data, capsys):
    with new_folder() as name:
        draw = data.draw
        header, size = draw(headers())
        text = spoil(draw, quoted(header))
        length = draw(st.one_of(st.just(len(text)), st.just(len(text)), integers)) % 2**64
        body = text + bytes(draw(st.one_of(st.just(size), st.just(size), st.integers(0, 99))))
        (Path(name) / "in" / SHARD).write_bytes(length.to_bytes(8, "little") + body)
        outcome(Path(name), capsys)


@given(data=st.data())
@cases
def test_indexes(data, capsys):
    with new_folder() as name:
        draw, shard = data.draw, st.sampled_from([SHARD, SHARD, "b.safetensors", "../in/" + SHARD])
        source = write_checkpoint(Path(name) / "in", {SHARD: TENSORS}, CONFIG)
        weight_map = dict.fromkeys(TENSORS, SHARD)
        for key in draw(st.lists(st.one_of(names, st.sampled_from([*TENSORS])), max_size=2)):
            weight_map[key] = draw(st.one_of(shard, values))
        index = {"metadata": draw(st.one_of(st.just({}), values)), "weight_map": weight_map}
        if draw(st.integers(0, 4)) == 0:
            index = draw(values)
        (source / INDEX).write_bytes(spoil(draw, quoted(index)))
        outcome(Path(name), capsys)


CONFIGS = ["config.json", "params.json", "hf_quant_config.json"]
quantization_keys = st.sampled_from(
    "quantization_config compression_config quant_method weight_block_size block_structure "
    "expert_dtype group_size config_groups transform_config location sparsity_config "
    "sparsity_structure text_config torch_dtype dtype".split()
)


@given(data=st.data())
@cases
def test_configs(data, capsys):
    with new_folder() as name:
        draw = data.draw
        source = write_checkpoint(Path(name) / "in", {SHARD: TENSORS})
        inner = st.dictionaries(quantization_keys | names, values, max_size=5)
        config = draw(st.dictionaries(quantization_keys | names, inner | values, max_size=5))
        for file in draw(st.sets(st.sampled_from(CONFIGS), min_size=1)):
            (source / file).write_bytes(spoil(draw, quoted(config)))
        outcome(Path(name), capsys)


ONE_BYTE = b'"data_offsets":[0,1]'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        shard_of(b""),
        shard_of(b"[]"),
        shard_of(b"{}", length=2**63),
        shard_of(b"{}", length=10**8 + 1),
        shard_of(b"\xff{}"),
        shard_of(b'{"w":' * 10**6),
        shard_of(b'{"w":{"dtype":"U8","shape":' + b"[" * 10**6),
        shard_of(b'{"w":{"dtype":"U8","shape":[1],%b},"w":{"dtype":"U8","shape":[1],%b}}'
                 % (ONE_BYTE, ONE_BYTE), 1),
        shard_of(b'{"w":{"dtype":"Q8","shape":[1],%b}}' % ONE_BYTE, 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[-1],%b}}' % ONE_BYTE, 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[1.0],%b}}' % ONE_BYTE, 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[true],%b}}' % ONE_BYTE, 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[4294967296,4294967296],%b}}' % ONE_BYTE, 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 2),
        shard_of(b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 1),
        shard_of(b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
                 b'"v":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', 3),
        shard_of(b'{"__metadata__":{"format":1},"w":{"dtype":"U8","shape":[1],%b}}' % ONE_BYTE, 1),
    ],
)
def test_headers_that_lie_are_refused(folder, capsys, content):
    (folder / "in" / SHARD).write_bytes(content)
    assert outcome(folder, capsys) == 1


@pytest.mark.parametrize("name", ["config.json", INDEX, "params.json", "hf_quant_config.json"])
@pytest.mark.parametrize(
    "text", [b"[" * 10**6, b'{"a":' * 10**6, b"\xff", b"", b"[]", b'{"a": 1, "a": 2}',
             b'{"b": {"a": 1, "a": 2}}', b'{"a": 1', b"9" * 5000]
)
def test_json_that_is_none_is_refused(folder, capsys, name, text):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    (folder / "in" / name).write_bytes(text)
    assert outcome(folder, capsys) == 1


@pytest.mark.parametrize("name", ["config.json", INDEX, "params.json", "hf_quant_config.json"])
def test_a_config_of_a_gigabyte_is_refused_unread(folder, name):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    with open(folder / "in" / name, "wb") as file:
        file.truncate(10**9)
    limit = 6 << 30  # of address space, of which torch and its threads take most
    code = (
        f"import resource, sys, fp8_cast_bf16; {PEAK}before = peak(); "
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit})); "
        f"assert fp8_cast_bf16.cli(sys.argv[1:]) == 1; assert peak() - before < 50_000"
    )
    command = [sys.executable, "-c", code, *arguments(folder / "in")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"error: {folder / 'in' / name}: has 1000000000 bytes")
    assert not (folder / "out").exists()


def test_names_like_paths_stay_names(folder, capsys):
    scale = torch.full((1, 1), 0.001)
    tensors = {"../../w.weight": finite_codes(4, 4), "../../w.weight_scale_inv": scale}
    tensors |= {"/etc/x": torch.ones(1), "\0": torch.ones(1)}
    write_checkpoint(folder / "in", {SHARD: tensors})
    before = {path for path in folder.rglob("*") if "out" not in path.parts}
    assert outcome(folder, capsys) == 0
    assert {path for path in folder.rglob("*") if "out" not in path.parts} == before
    with safe_open(folder / "out" / SHARD, framework="pt") as shard:
        assert {*shard.keys()} == {"../../w.weight", "/etc/x", "\0"}


@pytest.mark.parametrize("name", ["a/b", "../model", "a\\b", "\0", "/model"])
def test_index_entries_with_paths_are_refused(folder, capsys, name):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    weight_map = dict.fromkeys(TENSORS, f"{name}.safetensors")
    (folder / "in" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert outcome(folder, capsys) == 1


def test_a_hundred_thousand_tiny_tensors_are_converted_in_bounded_memory(folder):
    count = 50_000
    tensors = {f"{i}.weight_scale_inv": ("F32", [1, 1]) for i in range(count)}
    tensors |= {f"{i}.weight": ("F8_E4M3", [1, 1]) for i in range(count)}
    write_raw(folder / "in" / SHARD, tensors)
    before, peak = peak_memory(folder / "in")
    assert peak - before < 300_000 * 1024
    with safe_open(folder / "out" / SHARD, framework="pt") as shard:
        assert len(shard.keys()) == count


def test_a_fused_weight_of_many_rows_is_refused_in_bounded_time(folder, capsys):
    rows = 10**7
    tensors = {"qkv_proj.weight": ("F8_E4M3", [rows, 1])}
    tensors["qkv_proj.weight_scale_inv"] = ("F32", [11, 1])
    write_raw(folder / "in" / SHARD, tensors)
    assert outcome(folder, capsys) == 1


def test_notes_and_zero_points_are_not_read_beyond_a_limit(folder, capsys):
    write_checkpoint(folder / "in", {SHARD: TENSORS}, index=False)
    write_raw(folder / "in/b.safetensors", {"w.comfy_quant": ("U8", [17 << 20])})
    assert outcome(folder, capsys) == 1


def test_names_as_long_as_the_file_system_allows_are_kept(folder, capsys):
    shard = "s" * 243 + ".safetensors"
    write_checkpoint(folder / "in", {shard: TENSORS}, CONFIG)
    (folder / "in" / ("b" * 255)).write_text("b")
    assert outcome(folder, capsys) == 0
    assert {*contents(folder / "out")} == {shard, "b" * 255, "config.json", INDEX}


@pytest.mark.parametrize(
    "entry",
    [
        ["F8_E4M3", [2, 2], [0, 4]],
        {"dtype": {"F8_E4M3": None}, "shape": [4], "data_offsets": [0, 4]},
    ],
)
def test_descriptions_that_only_the_other_parser_knows_are_refused(folder, capsys, entry):
    (folder / "in" / SHARD).write_bytes(shard_of(quoted({"w": entry}), 4))
    assert outcome(folder, capsys) == 1


def test_a_newline_in_a_name_hides_nothing_and_long_names_cost_no_time(folder, capsys):
    for name in ("a.weight\n", "_svdquant_lora_" * 60_000 + "\n"):
        write_raw(folder / "in" / SHARD, {name: ("F8_E4M3FNUZ", [4])})
        assert outcome(folder, capsys) == 1


def test_outputs_that_no_header_can_describe_are_refused(folder, capsys):
    tensors = {"a.weight_packed": ("U8", [0, 2**62]), "a.weight_scale": ("F8_E8M0", [0, 2**58])}
    write_raw(folder / "in" / SHARD, tensors)
    assert outcome(folder, capsys) == 1


def test_a_thousand_block_sizes_are_refused(folder, capsys):
    groups = {str(size): {"group_size": size} for size in range(1, 1000)}
    write_checkpoint(folder / "in", {SHARD: TENSORS}, {"quantization_config": groups})
    assert outcome(folder, capsys) == 1


@pytest.mark.parametrize("shape", [[2, 1 << 26], [1 << 26, 1]])
def test_as_many_scales_as_elements_take_bounded_memory(folder, shape):
    write_raw(folder / "in" / SHARD, {"w": ("F8_E4M3", shape), "w_scale": ("F32", shape)})
    before, peak = peak_memory(folder / "in", "--workers", "2")
    assert peak - before < 200_000 * 1024
