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
import threading
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
        r"Converted 1 shard, 2 tensors: 1 dequantized, 1 copied, 1 dropped; 180kB written "
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
        "delete_source": False,
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
    assert (report["copied"], sum(report["dropped"].values())) == (4, 5)
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


# --- before torch is there ---


def fake_torch(folder, text="raise AssertionError('torch was imported')"):
    """Write a torch that does something else when it is imported; return its environment."""
    (folder / "fake").mkdir()
    (folder / "fake/torch.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder / "fake"), "PYTHONDONTWRITEBYTECODE": "1"}


def run(source, *more, command=SCRIPT, **options):
    given = [*command, *arguments(source, *more)]
    return subprocess.run(given, capture_output=True, text=True, **options)


def test_help_and_version_need_no_torch(tmp_path):
    environment = fake_torch(tmp_path)
    for flag, said in (("-h", "--input-fp8-hf-path IN"), ("--help", "DeepSeek-V3"),
                       ("--version", fp8_cast_bf16.VERSION)):
        done = subprocess.run([*SCRIPT, flag], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


@pytest.mark.parametrize("more, complaint", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--workers", "x"], "invalid int value"),
    (["--workers", "0"], "--workers 0: expected a positive number"),
    (["--missing-scale", "guess"], "invalid choice"),
    (["--device", "tpu"], "--device tpu: expected"),
    (["--dry-run", "--verify"], "--dry-run and --verify: expected one of them"),
])
def test_wrong_flags_need_no_torch(source, tmp_path, more, complaint):
    done = run(source, *more, env=fake_torch(tmp_path))
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_first_line_is_printed_before_torch_is_imported(source, tmp_path):
    text = "import os, sys; os.write(1, b'TORCH'); sys.exit(3)"
    done = run(source, env=fake_torch(tmp_path, text))
    assert done.returncode == 3
    assert done.stdout == f"fp8_cast_bf16 {fp8_cast_bf16.VERSION}\nTORCH"


NEEDED = "needs torch>=2.7, safetensors>=0.6.1, tqdm: pip install -r requirements.txt"


@pytest.mark.parametrize("text, said", [
    ("__version__ = '2.6.0+cu124'", "torch is 2.6.0+cu124"),
    ("__version__ = '1.13.1'", "torch is 1.13.1"),
    ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
])
def test_a_torch_that_is_too_old_or_missing_is_answered_by_what_is_needed(
    source, tmp_path, text, said
):
    done = run(source, env=fake_torch(tmp_path, text))
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].endswith(f"{said}; {NEEDED}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_safetensors_that_is_too_old_is_answered_by_what_is_needed(source, tmp_path):
    (tmp_path / "safetensors.py").write_text(
        "__version__, SafetensorError, safe_open = '0.5.3', Exception, None")
    done = run(source, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"safetensors is 0.5.3; {NEEDED}")
    assert not (tmp_path / "out").exists()


def test_a_torch_whose_libraries_are_missing_is_answered_in_one_line(source, tmp_path):
    text = "raise OSError('libtorch_cpu.so: cannot open shared object file')"
    done = run(source, env=fake_torch(tmp_path, text))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "libtorch_cpu.so" in done.stderr


def test_a_safe_path_of_python_does_not_hide_the_kernel(source):
    done = run(source, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(source.parent / "out")["w"].dtype == torch.bfloat16


# --- where it prints to ---


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_neither_break_a_run_nor_get_into_its_files(source, closed):
    main(source, source.parent / "expected")
    command = ["sh", "-c", f'"$@" {closed}', "sh", *SCRIPT]
    done = run(source, "--workers", "2", command=command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert contents(source.parent / "out") == contents(source.parent / "expected")


def test_a_closed_stderr_does_not_hide_that_a_checkpoint_is_refused(source):
    (source / SHARD).write_bytes(b"x")
    done = run(source, command=["sh", "-c", '"$@" 2>&-', "sh", *SCRIPT])
    assert done.returncode == 1
    assert not (source.parent / "out").exists()


def test_a_reader_of_stdout_that_goes_away_does_not_break_a_run(source):
    process = subprocess.Popen([*SCRIPT, *arguments(source)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert "Traceback" not in error
    assert process.wait() == 0, error
    assert SHARD in contents(source.parent / "out")


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_limit_of_threads_leaves_fewer_workers(source, monkeypatch, allowed):
    main(source, source.parent / "expected")
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 1 << 14)
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(fp8_cast_bf16, "find_implausible", lambda plan: [])
    monkeypatch.setattr(threading.Thread, "start", limited)
    main(source, source.parent / "out", workers=4)
    assert contents(source.parent / "out") == contents(source.parent / "expected")


def test_a_thread_that_cannot_be_started_at_all_is_said_with_workers(source, monkeypatch, capsys):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert cli(arguments(source)) == 1
    error = capsys.readouterr().err
    assert "can't start new thread" in error and "--workers" in error


def test_a_stdout_without_an_encoding_is_printed_to(tmp_path, monkeypatch):
    class Bare:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    write_checkpoint(tmp_path / "in", {SHARD: {"wé": finite_codes(2, 2)}})
    bare = Bare()
    monkeypatch.setattr(sys, "stdout", bare)
    assert cli(arguments(tmp_path / "in")) == 0
    assert "Device: " in bare.text
    assert "\n  wé\n" in bare.text


def test_warnings_go_to_stderr(tmp_path, capsys):
    tensors = {"w": finite_codes(99, 99), "w_scale_inv": torch.full((1, 1), 1e9)}
    write_checkpoint(tmp_path / "in", {SHARD: tensors | {"v": finite_codes(2, 2)}}, index=False)
    assert cli(arguments(tmp_path / "in")) == 0
    printed = capsys.readouterr()
    assert "Warning" not in printed.out
    for said in ("Missing scale_inv tensor for v", "has no config.json", "root mean square"):
        assert said in printed.err


def test_a_hangup_ends_a_run_like_a_termination(tmp_path):
    assert stopped(tmp_path, signal.SIGHUP, ()) == 129
    assert contents(tmp_path / "out") == {}


def test_a_hangup_that_is_ignored_does_not_end_a_run(tmp_path):
    assert stopped(tmp_path, signal.SIGHUP, ["nohup"]) == 0
    assert SHARD in contents(tmp_path / "out")


def stopped(folder, number, prefix):
    """Send a signal to a run that writes; return its exit status."""
    size = 1 << 14 if prefix else 1 << 17
    write_raw(folder / "in" / SHARD, {"s.weight": ("F8_E4M3", [size, 1 << 13]),
                                      "s.weight_scale_inv": ("F32", [size >> 7, 1 << 6])})
    command = [*prefix, *SCRIPT, *arguments(folder / "in")]
    # These tests may run under nohup, whose children ignore the signal.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    while not list(folder.glob("out/*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def shown_on_terminal(command, columns):
    """Run a command with stderr on a terminal; return what was shown there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, columns, 0, 0))
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, cwd=ROOT)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait() == 0
    return seen.decode()


def on_terminal(source, columns):
    """Convert in small windows with stderr on a terminal; return a line from the middle."""
    code = ("import sys, time, fp8_cast_bf16 as f; f.WINDOW = 1 << 13; real = f.render\n"
            "f.render = lambda *given: (time.sleep(0.05), real(*given))[1]\n"
            "sys.exit(f.cli(sys.argv[1:]))")
    command = [sys.executable, "-c", code, *arguments(source, "--workers", "1")]
    seen = shown_on_terminal(command, columns)
    lines = [line for line in re.split(r"[\r\n]+", seen) if "writing" in line]
    assert max(map(len, lines)) <= columns
    return lines[len(lines) // 2]


def test_the_bar_shows_rate_and_time_left_at_80_columns(source):
    line = on_terminal(source, 80)
    assert re.search(r"\d%\|.*\| *[\d.]+k?B?/[\d.]+kB? \[\d\d:\d\d<\d\d:\d\d, ", line), line
    assert re.search(r"[\d.]+k?B/s", line), line


def test_the_bar_shows_percent_and_time_left_at_60_columns(source):
    line = on_terminal(source, 60)
    assert re.search(r"\d+%", line), line
    assert re.search(r"<\d\d:\d\d", line), line


def test_a_run_that_is_not_on_a_terminal_shows_life(source, capsys, monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "TELL", -1)
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 1 << 14)
    main(source, source.parent / "out", workers=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("writing: ")]
    assert len(lines) > 3
    assert re.fullmatch(r"writing: \d+% of [\d.]+kB in \d+ s, 0/1 shards", lines[0])


def test_one_of_a_kind_is_spoken_of_in_the_singular(source, capsys):
    assert cli(arguments(source, "--workers", "1")) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"\b1 (workers|shards|tensors|weights|scales)\b", printed), printed


# --- the report ---


def test_a_report_to_a_device_does_not_replace_it(source):
    before = os.stat("/dev/null")
    assert cli(arguments(source, "--report", "/dev/null")) == 0
    assert (os.stat("/dev/null").st_ino, os.stat("/dev/null").st_rdev) == (
        before.st_ino, before.st_rdev)


def test_a_report_of_an_earlier_run_does_not_stay_when_a_run_fails(source, tmp_path):
    report = tmp_path / "report.json"
    report.write_text('{"status": "converted"}')
    (source / "config.json").write_text("{")
    assert cli(arguments(source, "--report", str(report))) == 1
    assert not report.exists()


def test_a_report_to_a_pipe_is_written_into_it(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert cli(arguments(source, "--report", str(tmp_path / "pipe"))) == 0
        assert json.loads(reader.stdout.read())["status"] == "converted"
    assert (tmp_path / "pipe").is_fifo()


def test_a_report_to_a_link_is_written_where_it_leads(source, tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}.json")
    (tmp_path / "there/old.json").write_text("old")
    for name in ("old", "new"):
        assert cli(arguments(source, "--report", str(tmp_path / name))) == 0
        assert (tmp_path / name).is_symlink()
        assert json.loads((tmp_path / f"there/{name}.json").read_text())["options"]


def test_a_report_to_a_folder_that_links_into_the_output_is_wrong_usage(source, tmp_path):
    (tmp_path / "link").symlink_to("out/r.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="outside of input and output"):
        main(source, tmp_path / "out", report=tmp_path / "link")
    assert contents(tmp_path / "out") == {}


def test_a_report_to_stdout_goes_into_a_pipe(source):
    done = run(source, "--report", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    report = done.stdout[done.stdout.index("{"):done.stdout.rindex("}") + 1]
    assert json.loads(report)["status"] == "converted"
    assert "Device: " in done.stdout and "Converted 1 shard" in done.stdout


def test_a_report_to_stdout_does_not_replace_the_file_that_it_goes_to(source, tmp_path):
    with open(tmp_path / "log", "w") as log:
        command = [*SCRIPT, *arguments(source, "--report", "/dev/stdout")]
        assert subprocess.run(command, stdout=log).returncode == 0
    text = (tmp_path / "log").read_text()
    assert "Device: " in text and "Converted 1 shard" in text
    assert json.loads(text[text.index("{"):text.rindex("}") + 1])["status"] == "converted"


def test_a_report_to_a_pipe_without_a_reader_does_not_convert_first(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = [*SCRIPT, *arguments(source, "--report", str(tmp_path / "pipe"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline()
        time.sleep(1)
        assert process.poll() is None and not (tmp_path / "out").exists()
        (tmp_path / "pipe").read_text()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_home_folder_in_an_option_is_expanded(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli(["--input-fp8-hf-path=~/in", "--output-bf16-hf-path=~/out",
                "--report=~/r.json"]) == 0
    assert SHARD in contents(tmp_path / "out")
    assert (tmp_path / "r.json").is_file()


# --- its last line ---


def test_weights_that_were_kept_are_the_last_line_and_no_failure(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", {SHARD: {"v": finite_codes(2, 2), "w": finite_codes(2, 2)}})
    for _ in range(2):
        assert cli(arguments(tmp_path / "in")) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == ("2 weights are still FP8: the output will not load correctly; see "
                        "--missing-scale")


@pytest.mark.parametrize("choice, said", [("keep", True), ("cast", False)])
def test_the_last_line_speaks_of_one_kept_weight_only_if_it_was_kept(
    tmp_path, capsys, choice, said
):
    write_checkpoint(tmp_path / "in", {SHARD: {"w": finite_codes(2, 2)}})
    assert cli(arguments(tmp_path / "in", "--missing-scale", choice)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("1 weight is still FP8: the output will not load") == said


def test_an_input_without_quantized_weights_is_said_to_be_copied(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", {SHARD: {"w": torch.ones(9).bfloat16()}}, {})
    assert cli(arguments(tmp_path / "in")) == 0
    assert "o quantized weights: this is a plain copy\n" in capsys.readouterr().out


def test_an_input_with_quantized_weights_is_not_said_to_be_copied(source, capsys):
    assert cli(arguments(source)) == 0
    assert "plain copy" not in capsys.readouterr().out


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
    seen = shown_on_terminal([*SCRIPT, *arguments(source)], 80)
    assert "writing: 100%" in seen
    assert "B/s]" in seen


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
