"""The bytes of a shard: the same from any window, number of workers and device."""


import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import fp8_cast_bf16
from checkpoints import ONE, SHARD
from fp8_cast_bf16 import main
from make_checkpoint import make_checkpoint


@pytest.mark.parametrize("window", [4096, 3 * 4096, 16 << 20])
@pytest.mark.parametrize("workers", [1, 5])
def test_shards_hold_byte_for_byte_what_the_reference_writer_writes(
    tmp_path, monkeypatch, window, workers
):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
    shards, expected = checkpoints.several_kinds()
    # Tensors may begin anywhere on a page.
    expected[ONE]["odd"] = shards[ONE]["odd"] = torch.arange(5003, dtype=torch.uint8)
    expected[ONE]["true"] = shards[ONE]["true"] = torch.arange(7001) % 3 == 0
    checkpoints.convert(tmp_path, shards, workers=workers)
    for name, tensors in expected.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        checkpoints.assert_laid_out_as(tmp_path / name, tmp_path / "out" / name)


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path):
    # 1 GiB in, 2 GiB out
    tensors = {"s.weight": ("F8_E4M3", [1 << 17, 1 << 13])}
    tensors["s.weight_scale_inv"] = ("F32", [1 << 10, 1 << 6])
    checkpoints.write_raw(tmp_path / "in" / SHARD, tensors)
    imported, peak = checkpoints.peak_memory(tmp_path / "in", "--workers", "4")
    size = (tmp_path / "out" / SHARD).stat().st_size
    (tmp_path / "out" / SHARD).unlink()
    assert size > 2 << 30
    assert peak - imported < 200 * 10**6
    if torch.version.cuda is None:  # Importing a CUDA build takes over 500 MB by itself.
        assert peak < 600 * 10**6


@pytest.mark.gpu
def test_gpu_and_cpu_write_the_same_bytes(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "in", 10**8, 2)
    main(tmp_path / "in", tmp_path / "cpu", device="cpu")
    for window in (16 << 20, 12 << 12):
        monkeypatch.setattr(fp8_cast_bf16, "WINDOW", window)
        main(tmp_path / "in", tmp_path / str(window), device="cuda")
        assert checkpoints.contents(tmp_path / str(window)) == checkpoints.contents(
            tmp_path / "cpu")
