"""Reading a checkpoint: its shards, headers, index and configs, and which of them count.

What cannot be converted is refused with one message that names the file, and nothing is written.
"""

import itertools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints as c
from checkpoints import CONFIG, INDEX, ONE, SHARD, TWO
from fp8_cast_bf16 import cli, main

POINTER = (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\n"
           b"size 4294967296\n")


SHARDS = {ONE: {"w": c.finite_codes(4, 4)}, TWO: {"w_scale_inv": torch.ones(1)}}


@pytest.fixture
def source(tmp_path):
    return c.write_checkpoint(tmp_path / "in", SHARDS)


@pytest.fixture
def single(tmp_path):
    """A checkpoint of one shard, without an index."""
    shards = {SHARD: c.one_weight()[0]}
    return c.write_checkpoint(tmp_path / "in", shards, CONFIG, index=False)


def converted(source: Path) -> Path:
    """Convert a checkpoint and verify it; return the output."""
    out = source.parent / "out"
    main(source, out)
    main(source, out, verify=True)
    return out


def files(folder: Path) -> set[str]:
    return {*c.contents(folder)}


def put(name: str, content: bytes | str):
    """Return a function that writes a file into a folder."""
    data = content if isinstance(content, bytes) else content.encode("latin-1")
    return lambda folder: (folder / name).write_bytes(data)


def drop(*names: str):
    """Return a function that removes files from a folder."""
    return lambda folder: [(folder / name).unlink() for name in names]


def map_to(tensor: str, shard: object):
    """Return a function that changes in which shard an index finds a tensor."""
    return lambda folder: c.edit_json(
        folder / INDEX, lambda index: index["weight_map"].update({tensor: shard}))


# --- what is refused ---

NOT_WHOLE, UNFINISHED = "not a whole safetensors file", "its download is not finished, as IN/"
REFUSED = [  # What is done to the two shards and their index; the file that is named; why.
    (drop(ONE, TWO, INDEX), "", "holds no *.safetensors with tensors"),
    (lambda folder: [drop(ONE, INDEX)(folder), (folder / TWO).rename(folder / SHARD)], "",
     "holds scales only"),
    (drop(TWO), TWO, "no such file; the download is incomplete"),
    *((lambda folder, more=more: os.truncate(folder / ONE, (folder / ONE).stat().st_size + more),
       ONE, NOT_WHOLE) for more in (-1, 1)),
    (put(ONE, "<html>please log in</html>"), ONE, NOT_WHOLE),
    (put(TWO + ".aria2", ""), TWO, f"{UNFINISHED}{TWO}.aria2"),
    (lambda folder: [shutil.copy(folder / TWO, folder / "x.safetensors"),
                     put("x.safetensors.aria2", "")(folder)], "x.safetensors", UNFINISHED),
    (map_to("gone.weight", TWO), TWO, f"gone.weight is not there; {INDEX} names it"),
    *((put(name, POINTER), name, "is a git-lfs pointer, not the file; run `git lfs pull`")
      for name in (ONE, "tokenizer.json", INDEX, "config.json")),
    *((map_to("w", entry), INDEX, f"puts w into {entry!r}; expected a *.safetensors file")
      for entry in ("../x.safetensors", "a/../../x.safetensors", "/x.safetensors",
                    "a\\b.safetensors", "\0.safetensors", "a/b", "w.st", "", "..", 3)),
    *((put(INDEX, text), INDEX, "has no weight_map") for text in ("{}", '{"weight_map": []}')),
    *((put(name, text), name, "not valid JSON") for name in ("config.json", "config_1m.json")
      for text in ("{", "\xff")),
]


@pytest.mark.parametrize("place, change, name, complaint", [
    *((".", *row) for row in REFUSED), *(("draft", *row) for row in REFUSED[2:])])
def test_a_broken_checkpoint_is_refused_by_the_name_of_the_file(
    source, place, change, name, complaint
):
    folder = c.write_checkpoint(source / place, SHARDS)
    change(folder)
    complaint = complaint.replace("IN", str(folder))
    c.assert_folder_refused(source, f"{folder / name}: {complaint}")


def test_a_folder_that_is_no_checkpoint_is_answered_by_where_one_is(tmp_path):
    c.assert_folder_refused(tmp_path / "deepseek-ai", "deepseek-ai: no such folder",
                            "hf download ID --local-dir IN")
    c.write_checkpoint(tmp_path / "models--a--b/snapshots/0123", {SHARD: c.one_weight()[0]})
    c.assert_folder_refused(tmp_path / "models--a--b", "models--a--b: is the cache",
                            "snapshots/HASH")


@pytest.mark.parametrize("name, kind", [
    (name, kind) for kind in ("pipe", "socket", "device", "folder")
    for name in (SHARD, "config.json", "params.json", "hf_quant_config.json", INDEX)])
def test_what_is_no_file_of_the_checkpoint_is_refused(folder, name, kind):
    shards = {} if name == SHARD else {SHARD: c.TENSORS}
    c.write_checkpoint(folder / "in", shards, index=False)
    c.special_file(folder / "in" / name, kind)
    said = c.assert_folder_refused(folder / "in", f"{folder / 'in' / name}: ")
    assert ("no such file" if name == SHARD else "put the file") in said


# --- which shards belong ---


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("place", ["consolidated.safetensors", *(
    f"{name}/model-00001-of-00009.safetensors"
    for name in ("original", "consolidated-2", "lost+found"))])
def test_other_weights_may_be_broken_and_are_left_out_by_name(tmp_path, capsys, index, place):
    given, expected = c.one_weight()
    source = c.write_checkpoint(tmp_path / "in", {SHARD: given}, CONFIG, index)
    (source / place).parent.mkdir(exist_ok=True)
    put(place, b"x")(source)
    if "/" in place:
        (source / place).with_name("tokenizer.json").write_text("{}")
    c.assert_holds(converted(source) / SHARD, expected)
    assert files(tmp_path / "out") == {SHARD, "config.json"} | ({INDEX} if index else set())
    assert f"Not copied: {place.partition('/')[0]}\n" in capsys.readouterr().out


def numbered(total: str, *numbers: str, series: str = "model") -> dict:
    return {f"{series}-{number}-of-{total}.safetensors": {f"{series}{number}": torch.ones(2)}
            for number in numbers}


@pytest.mark.parametrize("shards, index", [
    (numbered("000002", "00001", "00002"), False),  # DeepSeek's totals have six digits.
    (numbered("00002", "00000", "00001"), False),
    (numbered("000163", "00001", "00042"), True),  # Pruned: the index decides which there are.
])
def test_a_whole_series_of_shards_is_converted(tmp_path, shards, index):
    expected = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    c.convert(tmp_path, shards, expected, {}, index=index)


@pytest.mark.parametrize("shards, counts", [
    (numbered("00003", "00001", "00003"), "2 of 3"),
    (numbered("00003", "00000", "00001"), "2 of 3"),
    (numbered("000163", "00001"), "1 of 163"),
    (numbered("00002", "00001") | numbered("00002", "00001", "00002", series="other"), "1 of 2"),
])
@pytest.mark.parametrize("place", [".", "draft"])
def test_without_an_index_numbers_tell_that_shards_are_missing(single, shards, counts, place):
    c.write_checkpoint(single / place, shards, index=False)
    c.assert_folder_refused(
        single, f"{single / place}: has {counts} shards model-*-of-", "incomplete")


@pytest.mark.parametrize("index, path", [
    *((INDEX, f"{path}.safetensors")
      for path in ("model.layers.0/layer", "./model.layers.0/layer", "a/../b/c")),
    ("model.safetensors.index.fp8.json", "model.fp8-00001-of-00001.safetensors")])
def test_an_index_may_be_of_a_variant_and_name_shards_in_folders(tmp_path, index, path):
    given, expected = c.one_weight()
    source, name = tmp_path / "in", os.path.normpath(path)
    c.write_checkpoint((source / name).parent, {Path(name).name: given}, index=False)
    c.write_json(source / index, {"weight_map": dict.fromkeys(given, path)})
    save_file({"x": torch.ones(1)}, source / Path(name).with_name("extra.safetensors"))
    out = converted(source)
    c.assert_holds(out / name, expected)
    assert c.read_json(out / index) == {
        "weight_map": dict.fromkeys(sorted(expected), name),
        "metadata": {"total_size": 130 * 40 * 2 + 12}}
    assert files(out) == files(source)  # The extra shard is copied.


@pytest.mark.parametrize("name, index", [
    ("adapter_model", True), ("adapter_model", False), ("mtp-00001-of-00002", True),
    ("model-00003-of-00004", True), ("model-mtp", True)])
@pytest.mark.parametrize("place", [".", "draft"])
def test_plain_weights_that_no_index_names_are_copied(tmp_path, name, index, place):
    given, expected = c.one_weight()
    source, name = tmp_path / "in", f"{name}.safetensors"
    c.write_checkpoint(source, {SHARD: {"x": torch.ones(2)}}, {}, index)
    c.write_checkpoint(source / place, {SHARD: given}, CONFIG, index)
    save_file({"lora_A.weight": torch.rand(3, 4)}, source / place / name)
    out = converted(source)
    c.assert_holds(out / place / SHARD, expected)
    assert (out / place / name).read_bytes() == (source / place / name).read_bytes()
    assert files(out) == files(source)  # No index is made where there was none.
    assert not index or name not in (out / place / INDEX).read_text()


@pytest.mark.parametrize("tensors, why", [
    (c.one_weight("other")[0], "holds quantized weights"),
    ({"other": c.finite_codes(4, 4)}, "holds quantized weights"),
    ({"norm.w": torch.ones(3), "x": torch.ones(1)}, "repeats norm.w"),
])
def test_other_weights_that_no_index_names_are_refused(tmp_path, tensors, why):
    source = c.write_checkpoint(tmp_path / "in", {SHARD: c.one_weight()[0]}, CONFIG)
    save_file(tensors, source / "other.safetensors")
    c.assert_folder_refused(
        source, f"{source}/other.safetensors: is not named by {INDEX} and {why}", "move it")


def test_headers_are_read_where_files_cannot_be_mapped(tmp_path):
    """As on some network file systems, and under a limit of the address space."""
    c.write_raw(tmp_path / "in" / SHARD, {"w": ("F8_E4M3", [1 << 20, 1 << 20])})
    command = [sys.executable, c.ROOT / "fp8_cast_bf16.py", *c.arguments(tmp_path / "in")]
    done = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30)))
    assert "Input: 1 shard, 1 tensor, 1.10TB" in done.stdout
    assert "map" not in done.stderr and "allocate" not in done.stderr


def test_a_shard_whose_name_is_not_utf_8_is_refused_with_the_remedy(tmp_path):
    name = "bad\udcff.safetensors"
    c.write_checkpoint(tmp_path / "in", {SHARD: c.one_weight()[0]}, index=False)
    os.rename(tmp_path / "in" / SHARD, tmp_path / "in" / name)
    c.assert_folder_refused(tmp_path / "in", f"{name}: its name is not UTF-8", "rename it")


# --- tensors that stand in several shards ---


@pytest.mark.parametrize("counts, complaint", [
    (ONE, None), (TWO, None),
    ("", f"{TWO}: w stands in {ONE} too and no index says which counts"),
    (SHARD, f"{SHARD}: w is not there; {INDEX} names it"),
])
def test_of_two_tensors_with_one_name_an_index_decides(tmp_path, counts, complaint):
    shards = {ONE: {"w": torch.ones(1), "a": torch.ones(1)},
              TWO: {"w": torch.zeros(1), "b": torch.ones(1)}, SHARD: {"x": torch.ones(1)}}
    source = c.write_checkpoint(tmp_path / "in", shards, index=bool(counts))
    if counts:
        map_to("w", counts)(source)
    if complaint:
        c.assert_folder_refused(source, complaint)
        return
    out = converted(source)
    del shards[TWO if counts == ONE else ONE]["w"]
    for name, tensors in shards.items():
        c.assert_holds(out / name, tensors)


def twice(tmp_path, name, tensor, other) -> Path:
    """Write two shards of which each has a tensor of this name."""
    given = c.one_weight()[0]
    shards = {"a.safetensors": given | {name: tensor},
              "b.safetensors": {"x": torch.ones(3), name: other}}
    return c.write_checkpoint(tmp_path / "in", shards, CONFIG, index=False)


SCALE = torch.full((2, 1), 0.001)


@pytest.mark.parametrize("name, tensor", [
    ("w.weight_scale_inv", SCALE), ("w.input_scale", torch.ones(())), ("w.k_scale", torch.ones(1))])
def test_equal_scales_in_two_shards_are_one(tmp_path, name, tensor):
    # Tencent/AngelSlim stores the scales of its diffusion models so.
    found = c.load_checkpoint(converted(twice(tmp_path, name, tensor, tensor.clone())))
    c.assert_same_tensors(found, c.one_weight()[1] | {"x": torch.ones(3)})


@pytest.mark.parametrize("name, tensor, other", [
    *(("w.weight_scale_inv", SCALE, other) for other in (2 * SCALE, SCALE.bfloat16(), SCALE.T)),
    ("w.bias", torch.ones(4), torch.ones(4)),
])
def test_other_tensors_in_two_shards_are_refused(tmp_path, name, tensor, other):
    source = twice(tmp_path, name, tensor, other.contiguous())
    c.assert_folder_refused(source, f"b.safetensors: {name} stands in a.safetensors too")


def test_equal_scales_that_are_too_large_to_read_for_planning_are_refused(tmp_path):
    rows = (16 << 20) // 4 + 1
    for name, tensors in {"a": {"w": ("F8_E4M3", [rows, 1])}, "b": {}}.items():
        scale = {"w_scale_inv": ("F32", [rows, 1])}
        c.write_raw(tmp_path / f"in/{name}.safetensors", {**tensors, **scale})
    c.assert_folder_refused(tmp_path / "in", "a.safetensors: w_scale_inv has 16777220 by")


# --- links: one rule for files and folders ---


@pytest.mark.parametrize("digits", ["a" * 40, "0123456789abcdef" * 4])
def test_a_snapshot_of_links_into_blobs_is_ordinary_input(tmp_path, digits):
    given = c.write_checkpoint(tmp_path / "in", {SHARD: c.one_weight()[0]}, CONFIG)
    c.write_checkpoint(given / "draft", {SHARD: c.one_weight("b")[0]}, CONFIG)
    (given / "tokenizer.json").write_text("{}")
    snapshot, blobs = tmp_path / "mnt/snapshots/0", tmp_path / "mnt/blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(c.contents(given).items()):
        blob, place = blobs / f"{number}{digits[1:]}", snapshot / name
        blob.write_bytes(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blob, place.parent))
    main(snapshot, tmp_path / "from-links")
    assert c.contents(tmp_path / "from-links") == c.contents(converted(given))
    assert not any(path.is_symlink() for path in (tmp_path / "from-links").rglob("*"))


def test_links_to_places_inside_are_followed_or_named_and_shards_may_be_anywhere(single, capsys):
    given, expected = c.one_weight("b")
    c.write_checkpoint(single / "draft", {SHARD: given}, index=False)
    (single / "draft" / SHARD).rename(single.parent / "elsewhere")
    (single / "draft" / SHARD).symlink_to("../../elsewhere")
    (single / "draft/config.json").symlink_to("../config.json")
    (single / "again").symlink_to("draft")
    out = converted(single)
    c.assert_holds(out / "draft" / SHARD, expected)
    assert c.read_json(out / "draft/config.json") == {}
    assert files(out) == {SHARD, "config.json", f"draft/{SHARD}", "draft/config.json"}
    assert "Not copied: again\n" in capsys.readouterr().out


LINKED = ["tokenizer.json", "config.json", "params.json", "hf_quant_config.json", INDEX, "draft"]
TARGETS = [
    "../secret", "../blobs", "/mnt/nowhere", "/dev/zero", "gone", "itself", ".git/secret", *(
        f"../blobs/{name}" for name in ("a" * 39, "a" * 41, "A" * 40, "g" * 40, "a" * 63)),
    f"../blobs/{'a' * 40}/{'b' * 40}"]


@pytest.mark.parametrize("place, target", [
    *itertools.product(LINKED, TARGETS), ("sub/tokenizer.json", "../../secret")])
def test_links_out_of_the_checkpoint_are_refused_with_the_remedy(single, place, target):
    (single / place).parent.mkdir(exist_ok=True)
    target = Path(place).name if target == "itself" else target
    path = (single / place).parent / target
    if "secret" in target or "blobs" in target:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if place == "draft" or path.name == "blobs" else path.write_text("{}")
    (single / place).unlink(missing_ok=True)
    (single / place).symlink_to(target)
    c.assert_folder_refused(
        single, f"{single / place}: is a link to {target}, which is missing or outside of the "
        "checkpoint; put the file itself there (cp -L)")


# --- folders: each that holds shards is a checkpoint of its own ---


def test_the_parts_of_a_pipeline_are_converted_each_in_its_folder_by_its_own_config(tmp_path):
    """As diffusers stores them, or sentence-transformers: the root may hold no shards."""
    source, shard = tmp_path / "in", "diffusion_pytorch_model.safetensors"
    c.write_json(source / "model_index.json", {"transformer": ["diffusers", "X"]})
    c.write_json(source / "scheduler/scheduler_config.json", {"a": 1})
    given, transformer = c.one_weight("proj", 1)
    c.write_checkpoint(source / "a/transformer", {shard: given}, {"b": 1, **CONFIG}, index=False)
    dense, expected = c.one_weight("linear")
    c.write_checkpoint(source / "2_Dense", {SHARD: dense})
    out = converted(source)
    c.assert_holds(out / "a/transformer" / shard, transformer)
    c.assert_holds(out / "2_Dense" / SHARD, expected)
    found = c.contents(out)
    assert {*found} == files(source)
    assert c.read_json(out / "a/transformer/config.json") == {"b": 1}
    weight_map = c.read_json(out / "2_Dense" / INDEX)["weight_map"]
    assert weight_map == dict.fromkeys(sorted(expected), SHARD)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert found[name] == (source / name).read_bytes()


def test_the_method_of_the_root_does_not_count_in_a_folder(tmp_path):
    int8 = {"w.weight": torch.ones(4, 4, dtype=torch.int8), "w.weight_scale": torch.ones(4, 1)}
    config = c.method("compressed-tensors")
    source = c.write_checkpoint(tmp_path / "in", {SHARD: int8}, config, index=False)
    c.write_checkpoint(source / "draft", {SHARD: int8}, {"draft": 1}, index=False)
    c.assert_folder_refused(source, f"{source / 'draft' / SHARD}: w.weight")
    c.write_json(source / "draft/config.json", config)
    out = converted(source)
    assert load_file(out / "draft" / SHARD)["w.weight"].dtype == torch.bfloat16


# --- configs ---


@pytest.mark.parametrize("name, text", [
    *(("config_list.json", text) for text in ("[]", '[{"dtype": "float16"}]', "3", "null")),
    *((name, '{"dtype":"bfloat16",\r\n\t"é": 1.50, "vision_config": {"dtype": "float32"} }')
      for name in ("config.json", "config_1m.json", "params.json")),
])
def test_a_config_that_needs_no_edit_and_a_list_are_copied_byte_for_byte(source, name, text):
    (source / name).write_bytes(text.encode())
    assert (converted(source) / name).read_bytes() == text.encode()


def test_of_a_key_that_stands_twice_the_last_counts_as_in_transformers(source):
    (source / "config.json").write_text('{"a": 1, "dtype": "float16", "a": 2}')
    assert c.read_json(converted(source) / "config.json") == {"a": 2, "dtype": "bfloat16"}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("place, given, dtype", [  # Where in the config; before; after.
    ("", "float16", "bfloat16"), ("text_config", "float32", "bfloat16"),
    ("thinker_config text_config", "float16", "bfloat16"), ("vision_config", "float32", "float32"),
    ("vision_config text_config", "float16", "float16"), ("rope_scaling", "index", "index"),
    ("thinker_config audio_config", "float16", "float16"), ("a b", "int8", "bfloat16"),
    *(("vision_config", name, "bfloat16") for name in ("float8_e4m3fn", "torch.float8_e5m2")),
])
def test_dtype_becomes_bfloat16_for_text_and_where_it_names_a_quantized_one(
    source, key, place, given, dtype
):
    config, expected = {key: given}, {key: dtype}
    for part in reversed(place.split()):
        config, expected = {part: config}, {part: expected}
    c.write_json(source / "config.json", config | CONFIG)
    assert c.read_json(converted(source) / "config.json") == expected


@pytest.mark.parametrize("depth", [10, 900])
def test_a_deep_config_is_kept_whole_or_refused_by_name(source, capsys, depth):
    # How deep is too deep differs between versions of Python.
    (source / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    out = source.parent / "out"
    if cli(c.arguments(source)) == 0:
        assert (out / "config.json").read_text().count("{") == depth
    else:
        assert depth > 10 and not out.exists()
        assert capsys.readouterr().err.startswith(f"error: {source / 'config.json'}: ")
