"""The bytes of a shard: the same from any window, number of workers and device."""

import contextlib
import os
import types

import pytest
import torch
from safetensors.torch import save_file

import fp8_cast_bf16
import kernel
from checkpoints import (
    FP8_CONFIG,
    INDEX,
    ONE,
    SHARD,
    TWO,
    assert_laid_out_as,
    assert_same_bits,
    contents,
    convert,
    every_code,
    finite_codes,
    peak_memory,
    several_kinds,
    write_checkpoint,
    write_raw,
)
from fp8_cast_bf16 import CheckpointError, main
from make_checkpoint import make_checkpoint


@pytest.mark.parametrize("window", [4096, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("workers", [1, 5])
def test_shards_hold_byte_for_byte_what_the_reference_writer_writes(
    tmp_path, monkeypatch, window, workers
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    shards, expected = several_kinds()
    convert(tmp_path, shards, workers=workers)
    for name, tensors in expected.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        assert_laid_out_as(tmp_path / name, tmp_path / "out" / name)


def test_tensors_may_begin_anywhere_on_a_page(tmp_path):
    shards, expected = several_kinds()
    expected[ONE]["odd"] = shards[ONE]["odd"] = torch.arange(5003, dtype=torch.uint8)
    expected[ONE]["true"] = shards[ONE]["true"] = torch.arange(7001) % 3 == 0
    got = convert(tmp_path, shards)
    for name, tensor in {**expected[ONE], **expected[TWO]}.items():
        assert_same_bits(got[name], tensor)


def test_empty_tensors_are_kept(tmp_path):
    tensors = {"e": torch.zeros(0, 4), "w": finite_codes(0, 8), "w_scale_inv": torch.zeros(0, 1)}
    tensors["z"] = torch.ones(2)
    got = convert(tmp_path, {SHARD: tensors})
    assert (got["e"].shape, got["w"].shape, got["w"].dtype) == ((0, 4), (0, 8), torch.bfloat16)


def test_thousands_of_tiny_tensors(tmp_path):
    tensors = {f"t{i}": torch.full((3,), i, dtype=torch.int16) for i in range(5000)}
    got = convert(tmp_path, {SHARD: tensors})
    assert len(got) == 5000
    assert all(got[f"t{i}"].tolist() == [i] * 3 for i in range(5000))


def test_nan_codes_are_counted(tmp_path, capsys):
    codes = every_code(128, 256)
    convert(tmp_path, {SHARD: {"w": codes, "w_scale_inv": torch.rand(1, 2)}})
    assert f"{codes.float().isnan().sum()} NaN values" in capsys.readouterr().out


def test_same_bytes_on_a_second_run(tmp_path):
    shards, _ = several_kinds()
    convert(tmp_path, shards, config={"quantization_config": FP8_CONFIG})
    first = contents(tmp_path / "out")
    main(tmp_path / "in", tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == first


@pytest.mark.parametrize("after", ["make_plan", "find_implausible", "fingerprint_of"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path, monkeypatch, after):
    source = write_checkpoint(tmp_path / "in", several_kinds()[0], {"torch_dtype": "x"})
    whole, path = getattr(fp8_cast_bf16, after), source / ONE
    size = path.stat().st_size

    def cut(*operands):
        result = whole(*operands)
        os.truncate(path, size - 5001)
        return result

    monkeypatch.setattr(fp8_cast_bf16, after, cut)
    with pytest.raises(CheckpointError, match=f"{ONE}: ends at byte {size - 5001}"):
        main(source, tmp_path / "out")
    assert not {ONE, INDEX, "config.json"} & {*contents(tmp_path / "out")}


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path):
    # 1 GiB in, 2 GiB out
    tensors = {"s.weight": ("F8_E4M3", [1 << 17, 1 << 13])}
    tensors["s.weight_scale_inv"] = ("F32", [1 << 10, 1 << 6])
    write_raw(tmp_path / "in/model.safetensors", tensors)
    imported, peak = peak_memory(tmp_path / "in", "--workers", "4")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    (tmp_path / "out/model.safetensors").unlink()
    assert size > 2 << 30
    assert peak - imported < 200 * 10**6
    if torch.version.cuda is None:  # to import a CUDA build takes over 500 MB by itself
        assert peak < 600 * 10**6


def test_values_come_back_from_another_device_into_the_window(tmp_path, monkeypatch):
    """The way of the bytes to a GPU and back, with the CPU standing in for it."""
    make_checkpoint(tmp_path / "in", 10**7, 2)
    main(tmp_path / "in", tmp_path / "cpu", device="cpu")
    begin, streams = fp8_cast_bf16.Worker.__init__, []

    def with_stream(worker, *arguments):
        begin(worker, *arguments)
        if len(worker.out):  # The others only read.
            worker.stream = types.SimpleNamespace(device=torch.device("cpu"))

    def use(stream):
        streams.append(stream)
        return contextlib.nullcontext()

    def without_pinning(size, pinned):
        asked.add(pinned)
        return real(size, False)

    real, asked = fp8_cast_bf16.page_aligned, set()
    monkeypatch.setattr(fp8_cast_bf16, "page_aligned", without_pinning)
    monkeypatch.setattr(fp8_cast_bf16.Worker, "__init__", with_stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(kernel, "_dequantize_triton", kernel._dequantize_cpu)
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 5 << 12)
    main(tmp_path / "in", tmp_path / "other", device="cpu", workers=3)
    assert 1 <= len({id(stream) for stream in streams}) <= 3
    assert True in asked
    assert contents(tmp_path / "other") == contents(tmp_path / "cpu")


@pytest.mark.gpu
def test_gpu_and_cpu_write_the_same_bytes(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "in", 10**8, 2)
    main(tmp_path / "in", tmp_path / "cpu", device="cpu")
    for window in (16 << 20, 12 << 12):
        monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
        main(tmp_path / "in", tmp_path / "gpu", device="cuda")
        assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
