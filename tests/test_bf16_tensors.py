"""bf16_tensors: the tensors of the converted checkpoint without its files.

That they are those of the files, in the same order, is compared for every format by
checkpoints.convert, through which the tests of formats go.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DeepseekV3Config, DeepseekV3ForCausalLM

import fp8_cast_bf16
from checkpoints import (
    CONFIG,
    FP8_CONFIG,
    INDEX,
    ONE,
    PACKED,
    PEAK,
    ROOT,
    SHARD,
    TENSORS,
    TWO,
    assert_same_bits,
    assert_yields,
    dequantized,
    edit_json,
    every_code,
    finite_codes,
    fp4_values,
    method,
    one_weight,
    packed,
    several_kinds,
    stored,
    write_checkpoint,
    write_json,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, UsageError, bf16_tensors, main
from make_checkpoint import quantize_per_block

# The codes of these tests are random, and so larger than weights are.
pytestmark = pytest.mark.filterwarnings("ignore:.*root mean square")
CUT = 8 * 4096  # A window smaller than most tensors of several_kinds.


def assert_yields_its_output(source, **options):
    out = source.parent / "out"
    main(source, out, missing_scale=options.get("missing_scale", "keep"))
    assert_yields(source, out, **options)


def header_end(path):
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def empty(path):
    """Cut a shard behind its header, as --delete-source does."""
    os.truncate(path, header_end(path))


@pytest.fixture
def reads(monkeypatch):
    """The ranges of bytes that workers have read, as (file name, start, stop)."""
    ranges, read = [], fp8_cast_bf16.Worker.read

    def spy(worker, path, start, into):
        ranges.append((path.name, start, start + len(into)))
        return read(worker, path, start, into)

    monkeypatch.setattr(fp8_cast_bf16.Worker, "read", spy)
    return ranges


@pytest.fixture
def threads():
    """The threads that were there before; see that no other is left afterwards."""
    before = {*threading.enumerate()}
    yield before
    assert {*threading.enumerate()} == before


@pytest.fixture
def three_threads():
    """torch computes with three threads, here and in threads to come."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_of_another_thread():
    """Return how many threads torch computes with in a new thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(torch.get_num_threads).result()


def open_files(source):
    """Return the files of a checkpoint that this process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # The listing itself is closed by now.
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(f"{source}/")]


# --- the same tensors as in the files ---


@pytest.mark.parametrize("window", [4096, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("workers", [1, 3])
def test_any_window_and_number_of_workers_gives_the_tensors_of_the_files(
    source, monkeypatch, window, workers
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    assert_yields_its_output(source, workers=workers)


def test_values_are_the_codes_times_their_scales(source):
    expected = {name: tensor for shard in several_kinds()[1].values()
                for name, tensor in shard.items()}
    got = dict(bf16_tensors(source))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor)


def test_more_workers_than_windows_are_no_harm(source):
    assert_yields_its_output(source, workers=40)


@pytest.mark.parametrize("window", [4096, 16 << 20])
def test_copied_tensors_of_every_dtype_and_shape(tmp_path, monkeypatch, window):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    names = ["uint64", "int64", "float64", "complex64", "float32", "uint32", "int32", "bfloat16",
             "float16", "uint16", "int16", "int8", "uint8", "bool"]
    tensors = {}
    for name in names:
        dtype = getattr(torch, name)
        ones = torch.arange(5003 * dtype.itemsize, dtype=torch.int32).to(torch.uint8) % 2
        for kind, shape in (("vector", (5003,)), ("stack", (1, 5003, 1)), ("empty", (0, 4))):
            raw = ones if kind != "empty" else ones[:0]
            tensors[f"{kind}.{name}"] = raw.clone().view(dtype).view(shape)
        tensors[f"scalar.{name}"] = ones[: dtype.itemsize].clone().view(dtype).view(())
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors})
    assert_yields_its_output(source, workers=2)


def test_no_dtype_of_an_output_lacks_a_name_in_torch(tmp_path):
    for dtype, bits in fp8_cast_bf16.DTYPE_BITS.items():
        folder = tmp_path / dtype
        folder.mkdir()
        header = f'{{"t":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{bits}]}}}}'.encode()
        shard = len(header).to_bytes(8, "little") + header + bytes(bits)
        (folder / SHARD).write_bytes(shard)
        try:
            plan = fp8_cast_bf16.make_plan(folder)
        except CheckpointError as error:
            assert "looks quantized" in str(error)
            continue
        assert next(plan.steps).output.dtype in fp8_cast_bf16.TORCH_NAMES
        [(name, tensor)] = bf16_tensors(folder, missing_scale="keep", workers=1)
        assert (name, tensor.shape, tensor.nbytes) == ("t", (8,), bits)


def test_two_codes_in_a_byte_are_as_many_elements(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    codes, scale = packed(70, 64), torch.full((70, 4), 125, dtype=torch.uint8)
    raw = {"e.weight": ("F4", [70, 128], codes), "e.scale": ("F8_E8M0", [70, 4], scale)}
    write_raw(tmp_path / "in" / SHARD, raw)
    write_json(tmp_path / "in/config.json", CONFIG)
    [(name, tensor)] = bf16_tensors(tmp_path / "in", workers=2)
    assert name == "e.weight"
    assert_same_bits(tensor, dequantized(fp4_values(codes), torch.full((70, 4), 0.25), (1, 32)))


def test_shards_are_taken_in_the_order_of_their_names(tmp_path):
    names = [f"model-{number:05}-of-00012.safetensors" for number in range(1, 13)]
    shards = {name: {f"t{11 - number}": torch.ones(1)} for number, name in enumerate(names)}
    source = write_checkpoint(tmp_path / "in", shards)
    names = [name for name, _ in bf16_tensors(source)]
    assert names == [f"t{number}" for number in range(11, -1, -1)]


def test_thousands_of_tiny_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.int16) for i in range(3000)}
    got = dict(bf16_tensors(write_checkpoint(tmp_path / "in", {SHARD: tensors}), workers=2))
    assert len(got) == 3000
    assert all(got[f"t{i}"].tolist() == [i] * 3 for i in range(3000))


# --- what a tensor owns, and what is in memory ---


def test_each_tensor_owns_its_memory_and_no_more(source):
    found = dict(bf16_tensors(source, workers=2))
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.is_contiguous()
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)


def test_what_is_done_to_a_tensor_changes_no_other(source, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", CUT)
    expected = dict(bf16_tensors(source))
    for name, tensor in bf16_tensors(source, workers=2):
        assert_same_bits(tensor, expected[name])
        tensor.zero_()


def test_a_tensor_that_the_consumer_drops_is_gone_before_the_next_takes_memory(
    source, monkeypatch
):
    alive, make = [], torch.empty

    def watched(*shape, **options):
        assert not [tensor for tensor in alive if tensor() is not None]
        return make(*shape, **options)

    for _, tensor in bf16_tensors(source, workers=1):
        alive.append(weakref.ref(tensor.untyped_storage()))
        monkeypatch.setattr(torch, "empty", watched)
        del tensor
    assert len(alive) == 6


def test_memory_is_bounded_by_one_tensor_and_the_windows(tmp_path):
    tensors, size = {}, 2 * 8192 * 8192  # 134 MB in BF16, each of 4
    for number in range(4):
        tensors[f"{number}.weight"] = ("F8_E4M3", [8192, 8192])
        tensors[f"{number}.weight_scale_inv"] = ("F32", [64, 64])
    write_raw(tmp_path / "in" / SHARD, tensors)
    code = (
        f"import sys, fp8_cast_bf16; {PEAK}before = peak()\n"
        "for name, tensor in fp8_cast_bf16.bf16_tensors(sys.argv[1], workers=2): del tensor\n"
        "print(name, 1024 * (peak() - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "in"], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    name, taken = done.stdout.split()
    assert name == "3.weight"
    assert size < int(taken) < size + 100 * 10**6  # 2 windows of 16 MiB, codes, the rest


def test_no_more_is_read_ahead_than_a_window_for_each_worker(source, monkeypatch, reads):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    monkeypatch.setattr(fp8_cast_bf16, "find_implausible", lambda steps: [])
    rendered, render = [], fp8_cast_bf16.render
    monkeypatch.setattr(
        fp8_cast_bf16, "render", lambda *window: rendered.append(window[2:4]) or render(*window)
    )
    tensors = bf16_tensors(source, workers=3)
    _, first = next(tensors)
    time.sleep(0.1)
    assert len(rendered) <= first.nbytes // 4096 + 1 + 3
    tensors.close()


# --- names ---


@pytest.mark.parametrize(
    "names",
    [["b.weight", "bias"], {"bias", "b.weight"}, ("bias", "b.weight", "bias"),
     lambda name: name[0] == "b", (name for name in ("b.weight", "bias"))],
    ids=["list", "set", "twice", "predicate", "generator"],
)
def test_names_choose_tensors_in_the_order_of_the_files(source, names):
    assert [name for name, _ in bf16_tensors(source, names=names)] == ["bias", "b.weight"]


@pytest.mark.parametrize("window", [4096, 16 << 20])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_chosen_tensors_are_the_same_as_among_all(source, monkeypatch, window, step):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    everything = dict(bf16_tensors(source))
    for first in range(step):
        names = [*everything][first::step]
        got = dict(bf16_tensors(source, names=names, workers=2))
        assert [*got] == names
        for name, tensor in got.items():
            assert_same_bits(tensor, everything[name])


def test_a_window_never_reaches_into_another_shard(tmp_path):
    shards = {ONE: {"a": torch.full((16,), 1.0), "b": torch.full((16,), 2.0)},
              TWO: {"c": torch.full((16,), 3.0), "d": torch.full((16,), 4.0)}}
    source = write_checkpoint(tmp_path / "in", shards)  # d begins at the byte where a ends.
    got = [(name, tensor.unique().tolist())
           for name, tensor in bf16_tensors(source, names=["a", "d"])]
    assert got == [("a", [1.0]), ("d", [4.0])]


def test_nothing_is_read_but_what_the_names_need(source, reads):
    wanted = {"b.weight", "b.weight_scale_inv", "bias"}
    allowed = []
    for shard in (ONE, TWO):
        _, tensors = fp8_cast_bf16.read_header(source / shard)
        allowed += [(shard, tensor.start, tensor.stop) for tensor in tensors
                    if tensor.name in wanted]
    assert len([*bf16_tensors(source, names=["b.weight", "bias"], workers=2)]) == 2
    assert reads
    for shard, start, stop in reads:
        assert any(shard == name and begin <= start and stop <= end for name, begin, end in allowed)


def test_no_names_give_no_tensors_and_read_nothing(source, reads):
    assert [*bf16_tensors(source, names=[])] == []
    assert [*bf16_tensors(source, names=lambda name: False)] == []
    assert not reads


def test_a_tensor_without_a_name_is_yielded(tmp_path):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"": torch.ones(3), "a": torch.ones(2)}})
    assert_yields_its_output(source)
    assert [name for name, _ in bf16_tensors(source, names=[""])] == [""]


def test_a_single_name_may_be_given_as_it_is(source):
    assert [name for name, _ in bf16_tensors(source, names="table")] == ["table"]


@pytest.mark.parametrize("name", ["nothing", "b.weight_scale_inv"])
def test_an_unknown_name_is_a_key_error_before_anything_is_read(source, reads, name):
    with pytest.raises(KeyError, match=f"holds no tensor {name}"):
        next(bf16_tensors(source, names=["bias", name]))
    assert not reads


# --- refusals and warnings ---


@pytest.mark.parametrize("missing_scale", ["keep", "cast"])
def test_missing_scale_says_what_to_do_with_a_weight_that_has_none(tmp_path, missing_scale):
    tensors = {"bare.weight": finite_codes(9, 64), **TENSORS}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors})
    assert_yields_its_output(source, missing_scale=missing_scale)
    kept = dict(bf16_tensors(source, missing_scale=missing_scale))["bare.weight"].dtype
    assert kept == {"keep": torch.float8_e4m3fn, "cast": torch.bfloat16}[missing_scale]


def test_a_missing_scale_is_an_error_unless_missing_scale_says_otherwise(tmp_path, reads):
    source = write_checkpoint(tmp_path / "in", {SHARD: {"bare.weight": finite_codes(9, 64)}})
    with pytest.raises(CheckpointError, match=r"bare.weight has no scale.*keep leaves them FP8"):
        next(bf16_tensors(source))
    assert not reads


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"missing_scale": "maybe"}, UsageError, "expected keep, cast, error"),
        ({"workers": 0}, UsageError, "expected a positive number"),
        ({"workers": -1}, UsageError, "expected a positive number"),
        ({"device": "cuda:99"}, UsageError, "torch sees . CUDA devices"),
        ({"device": "nonsense"}, RuntimeError, "nonsense"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_read(
    source, reads, options, error, message
):
    with pytest.raises(error, match=message):
        next(bf16_tensors(source, **options))
    assert not reads


def test_an_empty_path_is_refused():
    with pytest.raises(UsageError, match="is empty"):
        next(bf16_tensors(""))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        next(bf16_tensors(tmp_path / "nowhere"))


def spoil_grid(source):
    tensors = load_file(source / ONE) | {"b.weight_scale_inv": torch.rand(7, 5)}
    save_file(tensors, source / ONE)


def spoil_format(source):
    tensors = load_file(source / ONE) | {"strange.weight_scale_inv": torch.ones(1)}
    tensors["strange.weight"] = torch.ones(2, 2, dtype=torch.int32)
    save_file(tensors, source / ONE)
    (source / INDEX).unlink()


def spoil_download(source):
    (source / TWO).unlink()


@pytest.mark.parametrize("spoil", [spoil_grid, spoil_format, spoil_download])
def test_what_the_conversion_refuses_is_refused_in_the_same_words(source, tmp_path, reads, spoil):
    spoil(source)
    with pytest.raises(CheckpointError) as converting:
        main(source, tmp_path / "out", missing_scale="error")
    with pytest.raises(CheckpointError) as yielding:
        next(bf16_tensors(source))
    assert str(yielding.value) == str(converting.value)
    assert not reads


@pytest.mark.parametrize("shard, name", [(ONE, "bias"), (TWO, "table"), (TWO, "a.weight")])
def test_a_tensor_of_an_emptied_shard_is_an_error_that_names_the_shard(source, reads, shard, name):
    empty(source / shard)
    with pytest.raises(CheckpointError, match=rf"{shard}: has been emptied.* {name}"):
        next(bf16_tensors(source, names=[name]))
    assert not reads


def test_what_needs_no_emptied_shard_is_still_yielded(source):
    expected = dict(bf16_tensors(source))
    empty(source / TWO)
    [(name, tensor)] = bf16_tensors(source, names=["bias"])
    assert name == "bias"
    assert_same_bits(tensor, expected["bias"])


def implausible(tmp_path):
    """Write a checkpoint of which one weight is as small as if its scale were inverse."""
    tensors = {**TENSORS, "x.weight": finite_codes(40, 64, dtype=torch.float8_e5m2),
               "x.weight_scale_inv": torch.full((1, 1), 1e-12)}
    return write_checkpoint(tmp_path / "in", {SHARD: tensors})


def test_implausible_weights_are_warned_of_at_the_line_of_the_caller(tmp_path):
    with pytest.warns(UserWarning, match=r"x\.weight and others have a root mean") as caught:
        assert len([*bf16_tensors(implausible(tmp_path))]) == 4
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_wanted_are_not_warned_of(tmp_path):
    assert len([*bf16_tensors(implausible(tmp_path), names=["v.weight", "norm"])]) == 2


def test_nan_and_infinite_values_are_warned_of_at_the_end(tmp_path):
    codes = every_code(128, 256, torch.float8_e5m2)
    tensors = {"w": codes, "w_scale_inv": torch.full((1, 2), 1e-4), "y": torch.ones(3)}
    yielded = bf16_tensors(write_checkpoint(tmp_path / "in", {SHARD: tensors}))
    with pytest.warns(UserWarning, match="root mean square"):
        assert next(yielded)[0] == "y"
    assert next(yielded)[0] == "w"
    with pytest.warns(UserWarning) as caught, pytest.raises(StopIteration):
        next(yielded)
    messages = [str(warning.message) for warning in caught]
    assert messages == ["NaN values in w", "infinite values in w"]


# --- closed early ---


def closed_by_break(tensors):
    for _ in tensors:
        break
    del tensors


def closed_by_close(tensors):
    next(tensors)
    tensors.close()
    assert [*tensors] == []


def closed_by_an_exception(tensors):
    with pytest.raises(ZeroDivisionError):
        for _ in tensors:
            raise ZeroDivisionError


def closed_by_throw(tensors):
    next(tensors)
    with pytest.raises(KeyboardInterrupt):
        tensors.throw(KeyboardInterrupt)


def closed_by_the_end(tensors):
    assert len([*tensors]) == 6


def closed_before_it_began(tensors):
    tensors.close()


CLOSINGS = [closed_by_break, closed_by_close, closed_by_an_exception, closed_by_throw,
            closed_by_the_end, closed_before_it_began]


@pytest.mark.parametrize("close", CLOSINGS)
def test_no_thread_and_no_file_is_left(source, monkeypatch, threads, close):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    close(bf16_tensors(source, workers=3))
    assert not open_files(source)


def test_a_generator_that_is_dropped_leaves_no_thread_and_no_file(source, monkeypatch, threads):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    tensors = bf16_tensors(source, workers=3)
    next(tensors)
    assert {*threading.enumerate()} != threads
    assert open_files(source)
    del tensors
    assert not open_files(source)


def test_an_error_in_a_worker_reaches_the_consumer_and_leaves_nothing(source, monkeypatch, threads):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    monkeypatch.setattr(fp8_cast_bf16, "find_implausible", lambda steps: [])
    expected, size = dict(bf16_tensors(source)), (source / TWO).stat().st_size
    tensors, got = bf16_tensors(source, workers=3), {}
    got.update([next(tensors)])
    os.truncate(source / TWO, size - 5001)
    with pytest.raises(CheckpointError, match=f"{TWO}: ends at byte {size - 5001}"):
        got.update(tensors)
    assert 1 <= len(got) < len(expected)
    for name, tensor in got.items():
        assert_same_bits(tensor, expected[name])
    assert not open_files(source)


@pytest.mark.parametrize("close", CLOSINGS)
def test_torch_has_as_many_threads_as_before(source, monkeypatch, three_threads, close):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    close(bf16_tensors(source, workers=2))
    assert (torch.get_num_threads(), threads_of_another_thread()) == (3, 3)


def test_torch_has_as_many_threads_as_before_after_an_error(source, monkeypatch, three_threads):
    monkeypatch.setattr(fp8_cast_bf16, "render", lambda *window: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(bf16_tensors(source, workers=2))
    assert (torch.get_num_threads(), threads_of_another_thread()) == (3, 3)


def test_the_consumer_computes_with_its_own_number_of_threads(source, monkeypatch, three_threads):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)
    assert {torch.get_num_threads() for _ in bf16_tensors(source, workers=2)} == {3}


def test_threads_that_the_consumer_starts_meanwhile_have_as_many(source, three_threads):
    assert {threads_of_another_thread() for _ in bf16_tensors(source, workers=1)} == {3}


@pytest.fixture
def no_tables(monkeypatch):
    """Number formats whose tables of values are still to be made."""
    formats = {name: dataclasses.replace(number_format)
               for name, number_format in fp8_cast_bf16.kernel.FORMATS.items()}
    monkeypatch.setattr(fp8_cast_bf16.kernel, "FORMATS", formats)


def test_the_caller_s_default_device_and_dtype_change_nothing(tmp_path, no_tables):
    tensors = {"p.weight": packed(4, 64), "p.weight_scale": torch.full((4, 4), 120, dtype=PACKED),
               "w.weight": finite_codes(4, 64), "w.weight_scale": torch.full((4, 1), 0.01)}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors}, method("quark"), index=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = [*bf16_tensors(source)]
            assert torch.ones(1).is_meta
            main(source, tmp_path / "out")
            main(source, tmp_path / "out", verify=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [name for name, _ in got] == [name for name, _ in stored(tmp_path / "out")]
    for name, expected in (("p.weight", fp4_values(tensors["p.weight"]) * 2.0**-7),
                           ("w.weight", tensors["w.weight"].float() * 0.01)):
        assert_same_bits(dict(got)[name], expected.bfloat16())


def test_two_at_once_do_not_mix(source, monkeypatch, threads):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", CUT)
    expected = dict(bf16_tensors(source))
    pairs = zip(bf16_tensors(source, workers=2), bf16_tensors(source, workers=3), strict=True)
    for one, two in pairs:
        for name, tensor in (one, two):
            assert_same_bits(tensor, expected[name])


# --- folders ---


def test_a_part_in_a_folder_is_not_mixed_in(source):
    write_checkpoint(source / "draft", {SHARD: one_weight("d")[0]}, CONFIG, index=False)
    names = [name for name, _ in bf16_tensors(source)]
    assert len(names) == 6
    assert not [name for name in names if "d." in name.removesuffix("embed.")]
    assert dict(bf16_tensors(source / "draft")).keys() == {"d.weight", "norm.d"}


@pytest.mark.parametrize("names", [None, ["w.weight"]])
def test_a_pipeline_is_refused_with_the_folders_of_its_parts(tmp_path, names):
    for part in ("text_encoder", "transformer"):
        write_checkpoint(tmp_path / "in" / part, {SHARD: one_weight(part)[0]}, index=False)
    with pytest.raises(CheckpointError, match=r"folders only.*: text_encoder, transformer"):
        next(bf16_tensors(tmp_path / "in", names=names))
    assert {name for name, _ in bf16_tensors(tmp_path / "in/transformer")} == {
        "transformer.weight", "norm.transformer"}


def test_shards_that_the_index_names_in_folders_are_the_checkpoint_s_own(tmp_path):
    shards = {"a/model.safetensors": one_weight("a")[0], "b/model.safetensors": one_weight("b")[0]}
    for folder in "ab":
        (tmp_path / "in" / folder).mkdir(parents=True)
    source = write_checkpoint(tmp_path / "in", shards)
    got = [*bf16_tensors(source, workers=2)]
    assert [name for name, _ in got] == ["norm.a", "a.weight", "norm.b", "b.weight"]
    expected = one_weight("a")[1] | one_weight("b")[1]
    for name, tensor in got:
        assert_same_bits(tensor, expected[name])


# --- devices, and a framework ---


def test_cuda_means_the_current_device_as_in_torch(source, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(fp8_cast_bf16, "pick_device",
                        lambda *device: asked.append(device) or (torch.device("cpu"), ""))
    next(bf16_tensors(source, "cuda"))
    next(bf16_tensors(source, torch.device("cuda", 2)))
    assert asked == [("cuda", 5), ("cuda:2", 5)]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [4096, 16 << 20])
def test_a_gpu_gives_the_same_bytes_in_its_own_memory(source, monkeypatch, window):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    expected = dict(bf16_tensors(source))
    got = dict(bf16_tensors(source, device="cuda", workers=3))
    assert [*got] == [*expected]
    for name, tensor in got.items():
        assert tensor.device == torch.device("cuda", torch.cuda.current_device())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert_same_bits(tensor.cpu(), expected[name])


def small_deepseek(folder):
    """Write a small DeepSeek-V3 with FP8 weights, in as many shards as it takes."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=300, hidden_size=160, intermediate_size=200, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
        moe_intermediate_size=144, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=96, kv_lora_rank=140,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    model = DeepseekV3ForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="1MB")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_per_block(tensors[name].float())
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / INDEX).unlink()  # It names no scales.
    edit_json(folder / "config.json", lambda value: value.update(quantization_config=FP8_CONFIG))


def test_transformers_fills_a_deepseek_v3_that_computes_what_the_converted_one_does(tmp_path):
    IN, OUT = tmp_path / "in", tmp_path / "out"
    small_deepseek(IN)
    main(IN, OUT)

    config = AutoConfig.from_pretrained(IN)
    del config.quantization_config
    model = DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, dtype="bfloat16", state_dict=dict(bf16_tensors(IN)))

    converted, info = DeepseekV3ForCausalLM.from_pretrained(OUT, output_loading_info=True)
    assert not any(info.values()), info
    assert len([*OUT.glob("*.safetensors")]) > 1
    expected = converted.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name])
    tokens = torch.arange(24).view(2, 12) * 7 % 300
    with torch.no_grad():
        logits = model(tokens).logits
        assert_same_bits(logits, converted(tokens).logits)
    assert logits.std() > 0
