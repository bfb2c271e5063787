"""The program as a user meets it: what it prints, its exit status, what it leaves behind."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch

import fp8_cast_bf16
import kernel
from checkpoints import (
    CONFIG,
    ONE,
    ROOT,
    SHARD,
    TWO,
    arguments,
    assert_same_bits,
    contents,
    finite_codes,
    load_checkpoint,
    several_kinds,
    write_checkpoint,
    write_raw,
)
from fp8_cast_bf16 import UsageError, cli, main
from make_checkpoint import make_checkpoint

SCRIPT = [sys.executable, ROOT / "fp8_cast_bf16.py"]


@pytest.fixture
def source(tmp_path):
    scale = torch.rand(3, 3) * 0.001  # of plausible weights, about which nothing is warned
    tensors = {"w": finite_codes(300, 300), "w_scale_inv": scale, "n": torch.ones(3)}
    return write_checkpoint(tmp_path / "in", {SHARD: tensors}, {"torch_dtype": "x"})


def test_a_conversion_prints_the_device_first_and_the_sum_last(source):
    done = subprocess.run([*SCRIPT, *arguments(source)], capture_output=True, text=True)
    assert done.returncode == 0
    version, first, *_, last = done.stdout.splitlines()
    assert version == f"fp8_cast_bf16 {fp8_cast_bf16.VERSION}"
    assert first.startswith("Device: ")
    assert re.fullmatch(
        r"Converted 1 shard, 2 tensors: 1 dequantized, 1 copied, 1 scale dropped; 180kB written "
        r"in \d+\.\d s, \d+\.\d\d GB/s, limited by (reading|decoding|writing)",
        last,
    )


def test_device_cpu_can_be_asked_for(source, capsys):
    assert cli(arguments(source, "--device", "cpu", "--workers", "2")) == 0
    assert capsys.readouterr().out.startswith("Device: cpu (as asked), 2 workers\n")


def test_device_auto_says_why(source, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli(arguments(source)) == 0
    assert capsys.readouterr().out.startswith("Device: cpu (torch sees no CUDA device), ")


def test_cuda_device_that_does_not_work_is_not_taken(monkeypatch):
    def broken(codes, scales):
        raise ImportError("No module named 'triton'\nlong story")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr("kernel.weight_dequant", broken)
    why = "the CUDA device does not work: No module named 'triton'"
    assert fp8_cast_bf16.pick_device("auto") == (torch.device("cpu"), why)
    with pytest.raises(UsageError, match="No module named 'triton'; use --device"):
        fp8_cast_bf16.pick_device("cuda")


def test_help_and_readme_hold_the_same_table_of_formats(capsys):
    with pytest.raises(SystemExit):
        cli(["--help"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table == fp8_cast_bf16.formats_table().splitlines()
    assert len(table) == 2 + len(fp8_cast_bf16.FORMATS) + 1
    assert "\n".join(table) in (ROOT / "README.md").read_text()


def test_wrong_arguments_from_python_are_named(source):
    for wrong in ({"device": "banana"}, {"workers": -1}, {"missing_scale": "skip"}):
        with pytest.raises(UsageError, match=str(*wrong.values())):
            main(source, source.parent / "out", **wrong)
    assert not (source.parent / "out").exists()


def test_a_gpu_that_runs_out_of_memory_exits_1(source, capsys, monkeypatch):
    real, out = kernel.dequantize, source.parent / "out"

    def fail(*operands):
        if list(out.glob("*.tmp")):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return real(*operands)

    monkeypatch.setattr("kernel.dequantize", fail)
    assert cli(arguments(source)) == 1
    assert capsys.readouterr().err == "error: CUDA out of memory.\n"
    assert out.exists() and contents(out) == {}


def test_names_print_on_a_terminal_that_knows_ascii_only(tmp_path):
    write_checkpoint(tmp_path / "in", {SHARD: {"wé": finite_codes(2, 2)}})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*SCRIPT, *arguments(tmp_path / "in")]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert rb"tensor for w\xe9, skipping" in done.stderr


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["--device", "tpu"], "--device tpu: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "--device cuda:x: expected"),
        (["--workers", "0"], "--workers 0: expected a positive number"),
        (["--workers", "x"], "invalid int value"),
        (["--missing-scale", "guess"], "invalid choice"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(source, capsys, more, complaint):
    with pytest.raises(SystemExit) as caught:
        cli(arguments(source, *more))
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (source.parent / "out").exists()


def test_output_inside_input_is_wrong_usage(source, capsys):
    with pytest.raises(SystemExit) as caught:
        cli(arguments(source, out=source / "out"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "the output must not lie in the input, nor the input in the output" in error
    assert not (source / "out").exists()


@pytest.mark.parametrize("out", ["in", "in/out", ".", "link", "link/deeper"])
def test_input_and_output_must_be_apart(tmp_path, out):
    write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="the output must not lie in the input"):
        main(tmp_path / "in", tmp_path / out)
    assert contents(tmp_path) == before


def test_input_reached_by_another_name_is_still_the_input(tmp_path, monkeypatch):
    """As through a bind mount, or on a file system that does not tell upper from lower case."""
    write_checkpoint(tmp_path / "in", {SHARD: {"x": torch.ones(1)}})
    write_checkpoint(tmp_path / "IN", {SHARD: {"x": torch.ones(1)}})
    same = type(tmp_path).samefile
    names = {tmp_path / "in", tmp_path / "IN"}
    monkeypatch.setattr(
        type(tmp_path), "samefile", lambda a, b: {a, b} == names or same(a, b)
    )
    with pytest.raises(UsageError, match="the output must not lie in the input"):
        main(tmp_path / "in", tmp_path / "IN")


@pytest.mark.parametrize("place", ["in/r.json", "out/r.json", "gone/r.json", "in"])
def test_a_report_that_cannot_be_written_is_wrong_usage(source, place):
    with pytest.raises(UsageError, match="--report"):
        main(source, source.parent / "out", report=source.parent / place)
    assert not (source.parent / "out").exists()


def test_the_report_holds_what_was_done(tmp_path):
    shards, _ = several_kinds()
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8)
    mixed = nan.clone()
    mixed[0] = 0x81
    nan, mixed, kept = (codes.view(torch.float8_e4m3fn) for codes in (nan, mixed, nan.clone()))
    shards[ONE] |= {"n.weight": nan, "n.weight_scale_inv": torch.ones(1, 1), "kept": kept}
    shards[TWO] |= {"i.weight": mixed, "i.weight_scale_inv": torch.full((1, 1), torch.inf)}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    main(tmp_path / "in", tmp_path / "out", report=tmp_path / "r.json", device="cpu", workers=2)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"] == {
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "workers": 2,
        "missing_scale": "keep",
        "dry_run": False,
        "verify": False,
        "report": str(tmp_path / "r.json"),
        "ranks": [0, 1, 0, 1],
    }
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "safetensors", "tqdm"} < {*report["versions"]}
    assert report["NaN"] == {"n.weight": 16, "i.weight": 12}
    assert report["infinite"] == {"i.weight": 4}
    assert report["kept_in_fp8"] == {"kept": "no scale"}
    assert report["input"]["tensors"] == 14
    assert report["output"]["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    assert report["bytes_written"] == report["output"]["bytes"]
    assert sum(report["dequantized"].values()) == 5
    assert (report["copied"], report["dropped"]) == (4, 5)
    assert {*report["seconds"]} == {"reading", "decoding", "writing", "syncing", "total"}
    assert all(seconds > 0 for seconds in report["seconds"].values())


def test_a_broken_checkpoint_exits_1_with_one_line_on_stderr(source):
    (source / "model.safetensors").write_bytes(b"x")
    done = subprocess.run([*SCRIPT, *arguments(source)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr
    assert not (source.parent / "out").exists()


def test_an_output_path_that_is_a_file_exits_1(source, capsys):
    (source.parent / "out").write_text("mine")
    assert cli(arguments(source)) == 1
    out = source.parent / "out"
    assert capsys.readouterr().err.startswith(f"error: {out}: is not a writable directory")
    assert out.read_text() == "mine"


def test_control_characters_in_names_are_not_printed_raw(tmp_path, capsys):
    name = "w\x1b[31m\nred"
    write_checkpoint(tmp_path / "in", {SHARD: {name: finite_codes(2, 2)}})
    assert cli(arguments(tmp_path / "in")) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"w\x1b[31m\nred" in printed
    assert name in load_checkpoint(tmp_path / "out")


def test_a_failing_write_exits_1_names_the_file_and_leaves_no_shard(source, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space")))
    assert cli(arguments(source)) == 1
    assert "No space" in capsys.readouterr().err
    assert contents(source.parent / "out") == {}


@pytest.mark.parametrize("when", ["before the output is touched", "while a shard is written"])
def test_a_read_error_exits_1_and_names_the_file(source, capsys, monkeypatch, when):
    out = source.parent / "out"

    class Failing(io.FileIO):
        def seek(self, position):
            if when.startswith("before") or list(out.glob("*.tmp")):
                raise OSError(5, "Input/output error")
            return super().seek(position)

    real = fp8_cast_bf16.open_raw
    monkeypatch.setattr(
        fp8_cast_bf16, "open_raw",
        lambda path, mode, *flags: Failing(path) if mode == "rb" else real(path, mode, *flags),
    )
    assert cli(arguments(source)) == 1
    error = capsys.readouterr().err
    assert error == f"error: {source / 'model.safetensors'}: Input/output error\n"
    assert out.exists() == when.startswith("while")
    assert contents(out) == {}


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_half_done(tmp_path, number, status):
    tensors = {"s.weight": ("F8_E4M3", [1 << 17, 1 << 13])}
    tensors["s.weight_scale_inv"] = ("F32", [1 << 10, 1 << 6])
    write_raw(tmp_path / "in/model.safetensors", tensors)
    # A shell starts what runs in the background with SIGINT ignored, and so these tests' children.
    process = subprocess.Popen([*SCRIPT, *arguments(tmp_path / "in")], stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.glob("out/*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == status
    assert error.endswith("interrupted: the output is not complete\n")
    assert contents(tmp_path / "out") == {}


def test_cpu_path_needs_neither_triton_nor_numpy(source):
    code = (
        "import sys; sys.modules['triton'] = sys.modules['numpy'] = None; "
        "import fp8_cast_bf16; sys.exit(fp8_cast_bf16.cli(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments(source, "--device", "cpu")]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert done.stderr == b""
    assert load_checkpoint(source.parent / "out")["w"].dtype == torch.bfloat16


def test_importing_has_no_side_effect(tmp_path):
    code = (
        "import torch; threads = torch.get_num_threads(); import fp8_cast_bf16, sys; "
        "assert torch.get_num_threads() == threads and 'triton' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    assert contents(tmp_path) == {}


def test_conversion_from_python_leaves_the_threads_of_torch_as_they_were(source):
    before = torch.get_num_threads()
    main(str(source), str(source.parent / "out"))
    assert torch.get_num_threads() == before


def test_progress_goes_to_a_terminal_only(source):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))
    process = subprocess.Popen([*SCRIPT, *arguments(source)], stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait() == 0
    assert b"writing: 100%" in seen
    assert b"B/s]" in seen


def test_the_demo_is_made_without_numpy(tmp_path):
    code = (
        "import runpy, sys; sys.modules['numpy'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    maker = ROOT / "tests/make_checkpoint.py"
    command = [sys.executable, "-c", code, maker, tmp_path / "demo", "--size", "1M"]
    assert subprocess.run(command, check=True, capture_output=True).stderr == b""
    assert len(load_checkpoint(tmp_path / "demo")) > 40


def test_the_demo_checkpoint_converts_with_ragged_blocks(tmp_path):
    make_checkpoint(tmp_path / "in", 10**6, 2)
    assert cli(arguments(tmp_path / "in")) == 0
    got, given = load_checkpoint(tmp_path / "out"), load_checkpoint(tmp_path / "in")
    ragged = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert given[ragged].shape[0] % 128
    assert got[ragged].dtype == torch.bfloat16
    for name, tensor in got.items():
        if given[name].dtype != torch.float8_e4m3fn:
            assert_same_bits(tensor, given[name])
