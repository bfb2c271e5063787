"""What somebody could upload: headers, indexes and configs that lie, and files that are no files.

Whatever it is, it is converted right or refused with exit status 1, one line that names the file,
and nothing written. FP8_CASES in the environment sets how many cases each property tries.
"""

import json
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import checkpoints as c
from checkpoints import CONFIG, INDEX, SHARD, TENSORS, shard_of, write_checkpoint, write_raw
from fp8_cast_bf16 import cli

cases = settings(
    max_examples=int(os.environ.get("FP8_CASES", 60)), deadline=None, database=None,
    suppress_health_check=list(HealthCheck), derandomize="FP8_CASES" not in os.environ)

# --- strategies ---

integers = st.integers(-3, 70) | st.sampled_from(
    [2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30])
names = st.text(max_size=8) | st.sampled_from(
    "w.weight w.weight_scale_inv w.weight_scale w.scale w.weight_scale_2 w.weight_global_scale "
    "w.weight_packed w._weight_qdata w.comfy_quant w.g_idx w.weight_zero_point qkv_proj.weight "
    "qkv_proj.weight_scale_inv w.input_scale k_scale w shard_0.weight weight_scale "
    "__metadata__ ../../etc/passwd /w w/../v . .. .weight w..weight".split()
) | st.sampled_from(["", "w\0", "w\nerror: x", "\x1b[2Jw", "\u202ew", "w" * 5000])
words = st.sampled_from(["pt", "fp8", "float8_e4m3fn", "128x128", "1x32", "{}", '{"layers": 1}'])
scalars = st.none() | st.booleans() | integers | st.floats() | names | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    names, inner, max_size=4), max_leaves=12)
dtypes = st.sampled_from(
    "F8_E4M3 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ U8 I8 F4 F6_E2M3 F32 BF16 F16 I32 I64 BOOL C64 "
    "F64 X f32".split())
shapes = st.lists(integers, max_size=5)
BITS = c.BITS | {"F16": 16, "I32": 32, "I64": 64, "C64": 64, "F64": 64}


@st.composite
def headers(draw):
    """A header whose tensors mostly lie one after the other, and mostly are what they say."""
    header, offset = {}, 0
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.just({"format": "pt"}), values))
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype = draw(dtypes)
        shape = draw(st.one_of(st.lists(st.integers(0, 9), max_size=3), shapes))
        # At most what a file may hold here.
        size = min(math.prod(max(0, side) for side in shape), 4096) * BITS.get(dtype, 8) // 8
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
        if draw(st.integers(0, 5)) == 0:
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            entry[key] = draw(st.one_of(values, st.lists(integers, min_size=2, max_size=2)))
        header[name] = draw(values) if draw(st.integers(0, 20)) == 0 else entry
    return header, offset


def spoiled(draw, value) -> bytes:
    """Return a value as JSON, of which a piece may be changed, dropped or repeated."""
    text = json.dumps(value).encode()
    if draw(st.integers(0, 2)):
        return text
    at, size = draw(st.integers(0, len(text))), draw(st.integers(0, 30))
    put = draw(st.one_of(st.binary(max_size=5), st.just(text[at : at + size] * 2)))
    return text[:at] + put + text[at + size :]


# --- the property ---


def outcome(folder: Path, capsys, complaint: str = "") -> int:
    """Convert; check all that holds for any input, and return the exit status."""
    before, out = c.contents(folder / "in"), folder / "out"
    options = c.arguments(folder / "in")
    capsys.readouterr()
    status = cli([*options, "--device", "cpu", "--workers", "2"])
    printed = capsys.readouterr()
    assert c.contents(folder / "in") == before
    for text in (printed.out, printed.err):
        assert all(char.isprintable() or char == "\n" for char in text)
    if status:
        assert (status, printed.out) == (1, "")
        *warnings, error = printed.err.splitlines()
        assert error.startswith(f"error: {folder / 'in'}"), printed.err
        assert all(line.startswith("Warning: ") for line in warnings)
        assert complaint in error and len(error) < 9000
        assert not out.exists()
    else:
        lines = printed.err.splitlines()
        assert all(line.startswith(("Warning: ", "writing: ")) for line in lines)
        for path in (folder / "in").glob("*.safetensors"):
            with safe_open(path, framework="pt"):  # which accepts what the converter accepts
                pass
        for path in out.glob("*.safetensors"):
            with safe_open(path, framework="pt") as shard:
                assert shard.metadata()["format"] == "pt"
        assert cli([*options, "--verify"]) == 0
    return status


@contextmanager
def new_input(capsys):
    """Give the input folder of a case of a property, and check what comes of what is put there."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "in").mkdir()
        yield Path(name) / "in"
        outcome(Path(name), capsys)


@given(data=st.data())
@cases
def test_headers(data, capsys):
    with new_input(capsys) as source:
        draw = data.draw
        header, size = draw(headers())
        text = spoiled(draw, header)
        length = draw(st.one_of(st.just(len(text)), st.just(len(text)), integers)) % 2**64
        body = text + bytes(draw(st.one_of(st.just(size), st.just(size), st.integers(0, 99))))
        (source / SHARD).write_bytes(length.to_bytes(8, "little") + body)


@given(data=st.data())
@cases
def test_indexes(data, capsys):
    with new_input(capsys) as source:
        draw, shard = data.draw, st.sampled_from([SHARD, SHARD, "b.safetensors", "../in/" + SHARD])
        write_checkpoint(source, {SHARD: TENSORS}, CONFIG)
        weight_map = dict.fromkeys(TENSORS, SHARD)
        for key in draw(st.lists(st.one_of(names, st.sampled_from([*TENSORS])), max_size=2)):
            weight_map[key] = draw(st.one_of(shard, values))
        index = {"metadata": draw(st.one_of(st.just({}), values)), "weight_map": weight_map}
        if draw(st.integers(0, 4)) == 0:
            index = draw(values)
        (source / INDEX).write_bytes(spoiled(draw, index))


CONFIGS = ["config.json", "params.json", "hf_quant_config.json"]
keys = names | st.sampled_from(
    "quantization_config compression_config quant_method weight_block_size block_structure "
    "expert_dtype group_size config_groups transform_config location sparsity_config "
    "sparsity_structure text_config torch_dtype dtype".split())


@given(data=st.data())
@cases
def test_configs(data, capsys):
    with new_input(capsys) as source:
        write_checkpoint(source, {SHARD: TENSORS})
        inner = st.dictionaries(keys, values, max_size=5)
        config = data.draw(st.dictionaries(keys, inner | values, max_size=5))
        for file in data.draw(st.sets(st.sampled_from(CONFIGS), min_size=1)):
            (source / file).write_bytes(spoiled(data.draw, config))


# --- what is refused ---


def entry(dtype=b'"U8"', shape=b"[1]", offsets=b"[0,1]", name=b'"w"'):
    return b'%b:{"dtype":%b,"shape":%b,"data_offsets":%b}' % (name, dtype, shape, offsets)


LIES = [  # Each about a tensor of one byte, and how many bytes follow the header.
    ({"dtype": b'"Q8"'}, 1), ({"shape": b"[-1]"}, 1), ({"shape": b"[1.0]"}, 1),
    ({"shape": b"[true]"}, 1), ({"shape": b"[4294967296,4294967296]"}, 1),
    ({"offsets": b"[1,0]"}, 1), ({"offsets": b"[1,2]"}, 2),
    ({"shape": b"[2]", "offsets": b"[0,2]"}, 1),
    # What only the parser of safetensors would take.
    ({"dtype": b'{"F8_E4M3":null}', "shape": b"[4]", "offsets": b"[0,4]"}, 4),
]


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, shard_of(b""), shard_of(b"[]"), shard_of(b"\xff{}"),
    shard_of(b"{}", length=2**63), shard_of(b"{}", length=10**8 + 1),
    shard_of(b'{"w":' * 10**6), shard_of(b'{"w":{"dtype":"U8","shape":' + b"[" * 10**6),
    shard_of(b"{%b,%b}" % (entry(shape=b"[2]", offsets=b"[0,2]"),
                           entry(shape=b"[2]", offsets=b"[1,3]", name=b'"v"')), 3),
    shard_of(b'{"__metadata__":{"format":1},%b}' % entry(), 1),
    shard_of(b'{"w":["F8_E4M3",[2,2],[0,4]]}', 4),  # The parser of safetensors would take it.
    *(shard_of(b"{%b}" % entry(**lie), size) for lie, size in LIES),
])
def test_headers_that_lie_are_refused(folder, capsys, content):
    (folder / "in" / SHARD).write_bytes(content)
    assert outcome(folder, capsys) == 1


JSON_FILES = [*CONFIGS, INDEX]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", [
    b"[" * 10**6, b'{"a":' * 10**6, b"\xff", b"", b"[]", b"3", b"{", b'{"a": 1', b"9" * 5000])
def test_json_that_is_none_is_refused(folder, capsys, name, text):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    (folder / "in" / name).write_bytes(text)
    assert outcome(folder, capsys, f"{folder / 'in' / name}: not valid JSON") == 1


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_config_of_a_gigabyte_is_refused_unread(folder, name):
    write_checkpoint(folder / "in", {SHARD: TENSORS})
    with open(folder / "in" / name, "wb") as file:
        file.truncate(10**9)
    code = (f"import sys, fp8_cast_bf16; {c.PEAK}before = peak(); "
            "assert fp8_cast_bf16.cli(sys.argv[1:]) == 1; assert peak() - before < 50_000")
    done = c.python("-c", code, *c.arguments(folder / "in"))
    assert done.stderr.startswith(f"error: {folder / 'in' / name}: has 1000000000 bytes")
    assert not (folder / "out").exists()


SIZES = {"quantization_config": {str(size): {"group_size": size} for size in range(1, 1000)}}


@pytest.mark.parametrize("complaint, tensors, config", [
    # A fused weight of many rows, whose parts could be sought for ever.
    ("no block size fits", {"qkv_proj.weight": ("F8_E4M3", [10**7, 1]),
                            "qkv_proj.weight_scale_inv": ("F32", [11, 1])}, {}),
    # A note that is too long to be read.
    ("expected at most 16777216", {"w.comfy_quant": ("U8", [17 << 20])}, {}),
    # A newline hides nothing in a name, and a name as long as a book is refused.
    ("looks quantized", {"a.weight\n": ("F8_E4M3FNUZ", [4])}, {}),
    ("a tensor's name has 900001 characters",
     {"_svdquant_lora_" * 60_000 + "\n": ("F8_E4M3FNUZ", [4])}, {}),
    ("no block size fits", {"w": ("F8_E4M3", [130, 40]), "w_scale_inv": ("F32", [2, 1])}, SIZES),
], ids=range(5))
def test_tensors_and_configs_that_ask_for_too_much_are_refused(
    folder, capsys, complaint, tensors, config
):
    write_raw(folder / "in" / SHARD, tensors)
    c.write_json(folder / "in/config.json", config)
    assert outcome(folder, capsys, complaint) == 1


# --- what is converted ---


def test_names_like_paths_stay_names(folder, capsys):
    scale = torch.full((1, 1), 0.001)
    tensors = {"../../w.weight": c.finite_codes(4, 4), "../../w.weight_scale_inv": scale}
    tensors |= {"/etc/x": torch.ones(1), "\0": torch.ones(1)}
    write_checkpoint(folder / "in", {SHARD: tensors})
    before = {path for path in folder.rglob("*") if "out" not in path.parts}
    assert outcome(folder, capsys) == 0
    assert {path for path in folder.rglob("*") if "out" not in path.parts} == before
    with safe_open(folder / "out" / SHARD, framework="pt") as shard:
        assert {*shard.keys()} == {"../../w.weight", "/etc/x", "\0"}


def test_names_as_long_as_the_file_system_allows_are_kept(folder, capsys):
    shard = "s" * 243 + ".safetensors"
    write_checkpoint(folder / "in", {shard: TENSORS}, CONFIG)
    (folder / "in" / ("b" * 255)).write_text("b")
    assert outcome(folder, capsys) == 0
    assert {*c.contents(folder / "out")} == {shard, "b" * 255, "config.json", INDEX}


TINY = {f"{i}.weight{end}": (dtype, [1, 1]) for i in range(50_000)
        for end, dtype in (("_scale_inv", "F32"), ("", "F8_E4M3"))}


@pytest.mark.parametrize("tensors, kilobytes", [
    (TINY, 300_000), *(({"w": ("F8_E4M3", shape), "w_scale": ("F32", shape)}, 200_000)
                       for shape in ([2, 1 << 26], [1 << 26, 1]))], ids=["tiny", "wide", "tall"])
def test_as_many_scales_as_elements_take_bounded_memory(folder, tensors, kilobytes):
    write_raw(folder / "in" / SHARD, tensors)
    before, peak = c.peak_memory(folder / "in", "--workers", "2")
    assert peak - before < kilobytes * 1024
    with safe_open(folder / "out" / SHARD, framework="pt") as shard:
        assert len(shard.keys()) == len(tensors) // 2
