"""bf16_tensors: the tensors of the converted checkpoint without its files.

That they are those of the files, in the same order, is compared for every format by
checkpoints.convert, through which the tests of formats go.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import fp8_cast_bf16
from checkpoints import CONFIG, ONE, ROOT, SHARD, TWO, assert_same_bits, write_checkpoint
from fp8_cast_bf16 import CheckpointError, UsageError, bf16_tensors, main

# The codes of these tests are random, and so larger than weights are.
pytestmark = pytest.mark.filterwarnings("ignore:.*root mean square")
ORDER = ["bias", "a.weight", "norm.weight", "table", "b.weight", "experts.up_proj"]


def names_of(*operands, **options):
    return [name for name, _ in bf16_tensors(*operands, **options)]


@pytest.fixture
def tiny(monkeypatch):
    """Windows smaller than most tensors."""
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 4096)


@pytest.fixture
def threads():
    """Let torch compute with three threads, here and in threads to come; see that it does after,
    and that no thread is left that was not there before.
    """
    count, before = torch.get_num_threads(), {*threading.enumerate()}
    torch.set_num_threads(3)
    yield
    assert {*threading.enumerate()} == before
    assert (torch.get_num_threads(), threads_of_another_thread()) == (3, 3)
    torch.set_num_threads(count)


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


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


# --- the same tensors as in the files ---


@pytest.mark.parametrize("window", [4096, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("workers", [1, 3, 40])
def test_any_window_and_number_of_workers_gives_the_tensors_of_the_files(
        source, out, monkeypatch, window, workers):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    checkpoints.assert_yields(source, out, workers=workers)


def test_thousands_of_tiny_tensors(tmp_path, tiny):
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.int16) for i in range(3000)}
    got = dict(bf16_tensors(write_checkpoint(tmp_path / "in", {SHARD: tensors}), workers=2))
    checkpoints.assert_same_tensors(got, tensors)


# --- what a tensor owns, and what is in memory ---


def test_each_tensor_owns_its_memory_and_no_more_and_frees_it_when_dropped(source, tiny):
    expected = dict(bf16_tensors(source))
    for tensor in expected.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.is_contiguous()
    assert len({tensor.data_ptr() for tensor in expected.values()}) == 6
    for name, tensor in bf16_tensors(source, workers=1):
        assert_same_bits(tensor, expected[name])
        tensor.zero_()  # This changes no other.
        memory = weakref.ref(tensor.untyped_storage())
        del tensor
        assert memory() is None


def test_memory_is_bounded_by_one_tensor_and_the_windows(tmp_path):
    tensors, size = {}, 2 * 8192 * 8192  # 134 MB in BF16, each of 4
    for number in range(4):
        tensors[f"{number}.weight"] = ("F8_E4M3", [8192, 8192])
        tensors[f"{number}.weight_scale_inv"] = ("F32", [64, 64])
    checkpoints.write_raw(tmp_path / "in" / SHARD, tensors)
    code = (
        f"import sys, fp8_cast_bf16; {checkpoints.PEAK}before = peak()\n"
        "for name, tensor in fp8_cast_bf16.bf16_tensors(sys.argv[1], workers=2): del tensor\n"
        "print(name, 1024 * (peak() - before))")
    name, taken = checkpoints.python("-c", code, tmp_path / "in").stdout.split()
    assert name == "3.weight"
    assert size < int(taken) < size + 64 * 10**6  # No windows: codes, float32 values, the rest.


# --- names ---


@pytest.mark.parametrize("names", [
    ["b.weight", "bias"], {"bias", "b.weight"}, ("bias", "b.weight", "bias"), "table",
    lambda name: name[0] == "b", (name for name in ("b.weight", "bias"))],
    ids=["list", "set", "twice", "a single one", "predicate", "generator"])
def test_names_choose_tensors_in_the_order_of_the_files(source, names):
    assert names_of(source, names=names) == (
        ["table"] if names == "table" else ["bias", "b.weight"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_chosen_tensors_are_the_same_as_among_all(source, tiny, step):
    everything = dict(bf16_tensors(source))
    assert [*everything] == ORDER
    for first in range(step):
        got = dict(bf16_tensors(source, names=ORDER[first::step], workers=2))
        assert [*got] == ORDER[first::step]
        checkpoints.assert_same_tensors(got, {name: everything[name] for name in got})


def test_shards_come_in_the_order_of_their_names_and_do_not_reach_into_each_other(tmp_path):
    shards = {ONE: {"c": torch.full((16,), 1.0), "d": torch.full((16,), 2.0)},
              TWO: {"a": torch.full((16,), 3.0), "b": torch.full((16,), 4.0)}}
    source = write_checkpoint(tmp_path / "in", shards)  # b begins at the byte where c ends.
    assert names_of(source) == ["c", "d", "a", "b"]
    got = [(name, tensor.unique().tolist())
           for name, tensor in bf16_tensors(source, names=["b", "c"])]
    assert got == [("c", [1.0]), ("b", [4.0])]


@pytest.mark.parametrize("names", [[], lambda name: False, ["norm"], ["small.weight"]])
def test_nothing_is_read_but_what_the_names_need(tmp_path, names):
    tensors = {"norm": ("F32", [3]), "large.weight": ("F8_E4M3", [4096, 8192]),
               "large.weight_scale": ("F32", [4096, 1]), "small.weight": ("F8_E4M3", [4, 4]),
               "small.weight_scale": ("F32", [4, 1])}
    checkpoints.write_raw(tmp_path / "in" / SHARD, tensors)
    before = bytes_read()
    assert names_of(tmp_path / "in", names=names) == ([] if callable(names) else names)
    assert bytes_read() - before < 1 << 20


# --- refusals and warnings ---


def test_a_missing_scale_is_an_error_only_where_the_weight_is_wanted(tmp_path):
    tensors = {"bare.weight": checkpoints.finite_codes(9, 64), **checkpoints.TENSORS}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors})
    for names in (None, ["bare.weight"]):
        with pytest.raises(CheckpointError, match=r"bare.weight has no scale.*keep leaves them"):
            next(bf16_tensors(source, names=names))
    assert names_of(source, names=["w.weight", "norm"])


@pytest.mark.parametrize("options, error, message", [
    ({"missing_scale": "maybe"}, UsageError, "expected keep, cast, error"),
    ({"workers": 0}, UsageError, "expected a positive number"),
    ({"workers": -1}, UsageError, "expected a positive number"),
    ({"device": "cuda:99"}, UsageError, "cuda:99.*use --device cpu"),
    ({"device": "meta"}, UsageError, "device meta: expected cpu or cuda"),
    ({"device": "nonsense"}, RuntimeError, "nonsense"),
    ({"names": ["bias", "nothing"]}, KeyError, "holds no tensor nothing"),
    ({"names": ["b.weight_scale_inv"]}, KeyError, "holds no tensor b.weight_scale_inv"),
])
def test_options_that_cannot_be_meant_are_refused(source, options, error, message):
    with pytest.raises(error, match=message):
        next(bf16_tensors(source, **options))


STRANGE = {"s.weight": torch.ones(2, 2, dtype=torch.int32), "s.weight_scale_inv": torch.ones(1)}


@pytest.mark.parametrize("spoil", [
    lambda source: save_file(
        load_file(source / ONE) | {"b.weight_scale_inv": torch.rand(7, 5)}, source / ONE),
    lambda source: write_checkpoint(source, {ONE: load_file(source / ONE) | STRANGE,
                                             TWO: load_file(source / TWO)}),
    lambda source: (source / TWO).unlink(), shutil.rmtree],
    ids=["grid", "format", "shard", "folder"])
def test_what_the_conversion_refuses_is_refused_in_the_same_words_whatever_is_wanted(
        source, tmp_path, spoil):
    spoil(source)
    with pytest.raises(CheckpointError) as converting:
        main(source, tmp_path / "out", missing_scale="error")
    for names in (None, ["bias"]):
        with pytest.raises(CheckpointError) as yielding:
            next(bf16_tensors(source, names=names))
        assert str(yielding.value) == str(converting.value)


def test_of_an_emptied_shard_nothing_is_yielded_but_what_does_not_need_it(source, tmp_path):
    expected = dict(bf16_tensors(source))
    shutil.copy2(source / ONE, tmp_path / ONE)
    main(source, tmp_path / "out", delete_source=True)
    shutil.copy2(tmp_path / ONE, source / ONE)
    for name, tensor in bf16_tensors(source, names=["bias", "norm.weight"]):
        assert_same_bits(tensor, expected[name])
    for names, name, shard in ((["table"], "table", TWO), (["b.weight"], "b.weight", TWO),
                               (["a.weight"], "a.weight", ONE), (None, "a.weight", ONE)):
        with pytest.raises(CheckpointError, match=(
                f"{TWO}: has been emptied by --delete-source.* {name} from {shard}")):
            next(bf16_tensors(source, names=names))


def test_implausible_weights_that_are_wanted_are_warned_of_at_the_line_of_the_caller(tmp_path):
    """As small as if the scale were inverse."""
    codes = checkpoints.finite_codes(40, 64, dtype=torch.float8_e5m2)
    tensors = {**checkpoints.TENSORS, "x.weight": codes,
               "x.weight_scale_inv": torch.full((1, 1), 1e-12)}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors})
    with pytest.warns(UserWarning, match=r"x\.weight has a root mean square") as caught:
        assert len([*bf16_tensors(source)]) == 4
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings(action="error"):
        assert names_of(source, names=["v.weight", "norm"])


def test_nan_and_infinite_values_are_warned_of_at_the_end(tmp_path):
    codes = checkpoints.every_code(128, 256, torch.float8_e5m2)
    tensors = {"w": codes, "w_scale_inv": torch.full((1, 2), 1e-4), "y": torch.ones(3)}
    yielded = bf16_tensors(write_checkpoint(tmp_path / "in", {SHARD: tensors}))
    assert [next(yielded)[0], next(yielded)[0]] == ["y", "w"]
    with pytest.warns(UserWarning) as caught, pytest.raises(StopIteration):
        next(yielded)
    assert [str(warning.message) for warning in caught] == ["NaN or infinite values in w"]


@pytest.mark.parametrize("change", [
    lambda path: os.utime(path, ns=(time.time_ns(), 0)), os.unlink,
    lambda path: os.truncate(path, path.stat().st_size - 5001)], ids=["touched", "gone", "shorter"])
def test_an_input_that_changes_is_an_error(source, tiny, threads, change):
    expected, tensors, got = dict(bf16_tensors(source)), bf16_tensors(source, workers=3), {}
    got.update([next(tensors)])
    change(source / TWO)
    with pytest.raises(CheckpointError, match=f"{TWO}: has changed while it was read"):
        got.update(tensors)
    assert {*got} < {*ORDER}
    checkpoints.assert_same_tensors(got, {name: expected[name] for name in got})
    assert not open_files(source)


# --- threads, processes, closing early ---


def closed_by_close(tensors):
    before = threading.active_count()
    next(tensors)
    assert threading.active_count() > before
    tensors.close()
    assert [*tensors] == []


def closed_by_throw(tensors):
    next(tensors)
    with pytest.raises(KeyboardInterrupt):
        tensors.throw(KeyboardInterrupt)


@pytest.mark.parametrize("close", [
    next,  # The generator is dropped then, as after a break.
    closed_by_close, closed_by_throw,
    list,  # It comes to its end.
    lambda tensors: tensors.close()])  # It has not begun.
def test_no_thread_and_no_file_is_left_and_torch_has_its_threads(
        source, tiny, threads, close):
    close(bf16_tensors(source, workers=3))
    assert not open_files(source)


def least_tasks():
    """Return how many threads the process has, without those that are about to be gone."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/task")))
        time.sleep(0.01)
    return min(counts)


def test_the_caller_s_threads_compute_with_all_of_torch_s_and_workers_alone(source, threads):
    torch.rand(1 << 20).sum()  # From now on, this thread has its helpers.
    before = least_tasks()
    for _ in bf16_tensors(source, workers=1):
        assert least_tasks() == before + 1
        assert open_files(source)
        assert torch.get_num_threads() == 3
    for _ in range(30):
        next(tensors := bf16_tensors(source, workers=20))
        assert threads_of_another_thread() == 3
        tensors.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="must become a user that has no other process")
@pytest.mark.parametrize("call", ["len([*f.bf16_tensors('in', workers=30)]) == 6",
                                  "f.main('in', 'out', workers=30) is None"])
def test_under_a_limit_of_threads_fewer_are_taken(folder, call):
    write_checkpoint(folder / "in", checkpoints.several_kinds()[0], CONFIG)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)
    code = (
        f"import os, resource, sys; sys.path.insert(0, {str(ROOT)!r}); import fp8_cast_bf16 as f\n"
        "f.WINDOW = 4096\n"
        "f.main('in', 'out', dry_run=True); [*f.bf16_tensors('in')]\n"  # Imports what it needs.
        "os.setuid(100_000 + os.getpid())\n"
        "limit = len(os.listdir('/proc/self/task')) + 4\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))\n"
        f"assert {call}\n")
    checkpoints.python("-c", code, cwd=folder)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_is_continued_in_a_forked_process_is_an_error_there_and_goes_on_here(source, tiny):
    tensors = bf16_tensors(source, workers=2)
    got = [next(tensors)[0]]
    if not (child := os.fork()):
        signal.alarm(30)  # Ends this process if it hangs.
        try:
            next(tensors)
        except RuntimeError as error:
            os._exit(40 + ("cannot go on in a forked process" in str(error)))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41
    assert got + [name for name, _ in tensors] == ORDER


def test_the_caller_s_default_device_and_dtype_and_mode_change_nothing(tmp_path):
    codes, values = checkpoints.packed(4, 64), checkpoints.finite_codes(4, 64)
    tensors = {"p.weight": codes, "p.weight_scale": torch.full((4, 4), 120, dtype=torch.uint8),
               "w.weight": values, "w.weight_scale": torch.full((4, 1), 0.01)}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors}, checkpoints.method("quark"), False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            got = dict(bf16_tensors(source))
            assert torch.ones(1).is_meta
            main(source, tmp_path / "out")
            main(source, tmp_path / "out", verify=True)
    finally:
        torch.set_default_dtype(torch.float32)
    checkpoints.assert_same_tensors(got, {
        "p.weight": (checkpoints.fp4_values(codes) * 2.0**-7).bfloat16(),
        "w.weight": (values.float() * 0.01).bfloat16()})


def test_two_at_once_do_not_mix(source, tiny, threads):
    expected = dict(bf16_tensors(source))
    for pair in zip(*(bf16_tensors(source, workers=n) for n in (2, 3)), strict=True):
        for name, tensor in pair:
            assert_same_bits(tensor, expected[name])


# --- folders ---


def test_folders_belong_to_a_checkpoint_where_its_index_names_them_and_not_otherwise(tmp_path):
    (given, expected), (more, also) = (checkpoints.one_weight(stem) for stem in "ab")
    for folder in "ab":
        (tmp_path / "in" / folder).mkdir(parents=True)
    source = write_checkpoint(tmp_path / "in", {f"a/{SHARD}": given, f"b/{SHARD}": more})
    draft = {SHARD: checkpoints.one_weight("d")[0]}
    write_checkpoint(source / "draft", draft, CONFIG, index=False)
    got = dict(bf16_tensors(source, workers=2))
    assert [*got] == ["norm.a", "a.weight", "norm.b", "b.weight"]
    checkpoints.assert_same_tensors(got, expected | also)
    assert {*names_of(source / "draft")} == {"d.weight", "norm.d"}


@pytest.mark.parametrize("names", [None, ["w.weight"]])
def test_a_pipeline_is_refused_with_the_folder_of_a_part(tmp_path, names):
    for part in ("text_encoder", "transformer"):
        tensors = {SHARD: checkpoints.one_weight(part)[0]}
        write_checkpoint(tmp_path / "in" / part, tensors, index=False)
    with pytest.raises(CheckpointError, match=r"folders only.* such as .*/in/(text_enc|transf)"):
        next(bf16_tensors(tmp_path / "in", names=names))


# --- devices ---


@pytest.mark.gpu
@pytest.mark.parametrize("window", [4096, 16 << 20])
def test_a_gpu_gives_the_same_bytes_in_its_own_memory(source, monkeypatch, window):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    expected = dict(bf16_tensors(source))
    with torch.inference_mode():
        got = dict(bf16_tensors(source, device="cuda", workers=3))
    assert [*got] == [*expected]
    for name, tensor in got.items():
        assert tensor.device == torch.device("cuda", torch.cuda.current_device())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert_same_bits(tensor.cpu(), expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True])
def test_a_tensor_may_be_dropped_while_a_gpu_still_reads_it(tmp_path, side):
    tensors = {str(i): torch.full((1 << 20,), i, dtype=torch.int16) for i in range(40)}
    source = write_checkpoint(tmp_path / "in", {SHARD: tensors})
    copies = {}
    with torch.cuda.stream(torch.cuda.Stream() if side else None):
        for name, tensor in bf16_tensors(source, device="cuda", workers=4):
            torch.cuda._sleep(10**7)
            copies[name] = tensor.clone()
    torch.cuda.synchronize()
    for name, tensor in copies.items():
        assert_same_bits(tensor.cpu(), tensors[name])
