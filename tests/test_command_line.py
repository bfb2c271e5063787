"""The program as a user meets it: what it prints, its exit status, what it leaves behind."""

import builtins
import errno
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints as c
import fp8_cast_bf16
from checkpoints import INDEX, ONE, ROOT, SHARD
from fp8_cast_bf16 import FORMATS, UsageError, cli, main

SCRIPT = [sys.executable, ROOT / "fp8_cast_bf16.py"]
COMPLETE = "Converted: the output is complete"
KEPT = "2 weights are still FP8: the output will not load correctly; see --missing-scale"


@pytest.fixture
def source(tmp_path):
    # The scales make plausible weights, about which nothing is warned.
    tensors = {"w": c.finite_codes(300, 300), "w_scale_inv": torch.rand(3, 3) * 0.001}
    return c.write_checkpoint(
        tmp_path / "in", {SHARD: tensors | {"n": torch.ones(3)}}, {"torch_dtype": "x"})


@pytest.fixture
def expected(source):
    """The files of a whole conversion of the source."""
    main(source, source.parent / "expected")
    return c.contents(source.parent / "expected")


@pytest.fixture
def many_windows(monkeypatch):
    monkeypatch.setattr(fp8_cast_bf16, "WINDOW", 1 << 14)


def out_of(source: Path) -> dict[str, bytes]:
    """Return the files of the output, or nothing if there is none."""
    return c.contents(source.parent / "out")


# --- what is printed ---


def test_a_conversion_prints_the_plan_first_and_the_outcome_last(source, capsys):
    main(source, source.parent / "out", device="cpu", workers=1)
    printed = capsys.readouterr().out
    first, *_, space, device, wrote, last = printed.splitlines()
    assert first == "Input: 1 shard, 3 tensors, 90.0kB"
    assert space.startswith("Space: ")
    assert device == "Device: cpu, 1 worker"
    assert re.fullmatch(r"Wrote 1 shard, 180kB in \d+\.\d s, \d+\.\d\d GB/s", wrote)
    assert last == COMPLETE
    assert not re.search(r"\b1 (workers|shards|tensors|weights|scales)\b", printed)


def test_warnings_go_to_stderr_and_weights_that_were_kept_are_the_last_line(tmp_path, capsys):
    tensors = {"w": c.finite_codes(99, 99), "w_scale_inv": torch.full((1, 1), 1e9)}
    bare = {name: c.finite_codes(2, 2, seed=seed) for seed, name in enumerate("uv")}
    tensors |= bare
    c.write_checkpoint(tmp_path / "in", {SHARD: tensors}, index=False)
    warned = ""
    for _ in range(2):
        assert cli(c.arguments(tmp_path / "in")) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == KEPT and "Warning" not in printed.out
        warned += printed.err
    for name in bare:
        assert f"Warning: Missing scale_inv tensor for {name}, skipping conversion\n" in warned
        c.assert_same_bits(load_file(tmp_path / "out" / SHARD)[name], bare[name])
    assert "root mean square" in warned


@pytest.mark.parametrize("encoding, shown", [("utf-8", r"é\x1b[31m\nred"),
                                             ("ascii", r"\xe9\x1b[31m\nred")])
def test_names_are_shown_as_the_terminal_can_and_never_control_it(
    tmp_path, monkeypatch, encoding, shown
):
    name = "é\x1b[31m\nred"
    c.write_checkpoint(tmp_path / "in", {SHARD: {name: c.finite_codes(2, 2)}})
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert cli(c.arguments(tmp_path / "in")) == 0
    said = streams[1].buffer.getvalue().decode(encoding)
    assert f"tensor for {shown}, skipping" in said and "\x1b" not in said
    assert name in load_file(tmp_path / "out" / SHARD)


def test_version_and_help_are_printed(capsys):
    shown = {"--version": fp8_cast_bf16.VERSION, "--help": "--input-fp8-hf-path IN"}
    for option, said in shown.items():
        with pytest.raises(SystemExit) as caught:
            cli([option])
        assert caught.value.code == 0
        assert said in capsys.readouterr().out


def table_line(row) -> str:
    """Return the line of a row of FORMATS in the README's table."""
    def names(text):
        shown = dict.fromkeys(text.replace("{}", "X").replace("*", "N").split())
        return " or ".join(f"`{name}`" for name in shown)

    fp8 = row.containers == {"F8_E4M3", "F8_E5M2"}
    methods = ", ".join(sorted(row.methods - {""})) or "none"
    under = " ".join(row.requires) if row.requires else "any" if fp8 else methods
    scales = ", ".join(filter(None, (names(row.scale), names(row.global_scale))))
    containers = "F8" if fp8 else "/".join(sorted(row.containers))
    return f"| {row.title} | {containers} {names(row.weight)} | {scales} | {under} |"


def test_the_readme_holds_the_table_of_formats():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| format | weight |"):].split("\n\n")[0].splitlines()
    assert table[2:-1] == [table_line(row) for row in FORMATS]
    assert table[-1].startswith("| plain FP8 cast | F8 `X` |")


# --- wrong usage ---


@pytest.mark.parametrize("more, complaint", [
    (["--device", "nonsense"], "device nonsense: expected auto, cpu, cuda or cuda:N"),
    (["--device", "cuda:x"], "device cuda:x: expected"),
    (["--device", "cuda:99"], "--device cuda:99: "),
    (["--workers", "0"], "workers 0: expected a positive number"),
    (["--workers", "1001"], "workers 1001: expected a positive number, at most 1000"),
    (["--workers", "x"], "invalid int value"),
    (["--missing-scale", "guess"], "invalid choice"),
    (["--nonsense"], "unrecognized arguments"),
    (["--dry-run", "--verify"], "expected one of them"),
    (["--delete-source", "--verify"], "--delete-source: not with --verify"),
    (["--output-bf16-hf-path="], "the path of the input or of the output is empty"),
])
def test_wrong_usage_exits_2_and_writes_nothing(source, capsys, more, complaint):
    before = c.contents(source)
    with pytest.raises(SystemExit) as caught:
        cli(c.arguments(source, *more))
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (source.parent / "out").exists() and c.contents(source) == before


@pytest.mark.parametrize("out", ["in", "in/out", ".", "link", "link/deeper"])
def test_input_and_output_must_be_apart(source, tmp_path, out):
    (tmp_path / "link").symlink_to("in")
    before = c.contents(tmp_path)
    with pytest.raises(UsageError, match="the output must not lie in the input, nor the input in"):
        main(source, tmp_path / out)
    assert c.contents(tmp_path) == before


def test_a_home_folder_in_an_option_is_expanded(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli(["--input-fp8-hf-path=~/in", "--output-bf16-hf-path=~/out",
                "--report=~/r.json"]) == 0
    assert SHARD in out_of(source)
    assert (tmp_path / "r.json").is_file()


# --- what fails ---


@pytest.mark.parametrize("error, said", [
    (OSError(errno.ENOSPC, "No space left on device"), ".tmp: No space left on device"),
    (MemoryError(), "error: out of memory; try --workers 1"),
    (MemoryError("no memory"), "error: out of memory: no memory; try --workers 1"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "error: CUDA out of memory."),
    (RuntimeError("GPU\nis gone"), "error: GPU")])
def test_an_error_of_a_worker_exits_1_and_leaves_no_shard(
    source, capsys, monkeypatch, error, said
):
    fsync = os.fsync

    def fail(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith(".tmp"):
            raise error
        fsync(number)

    monkeypatch.setattr(os, "fsync", fail)
    assert c.fails(capsys, source).endswith(said)
    assert out_of(source) == {}


@pytest.mark.parametrize("while_writing", [False, True])
@pytest.mark.parametrize("said", ["Input/output error", "the file system is not ready"])
def test_a_read_that_fails_or_would_block_exits_1_and_names_the_file(
    source, capsys, monkeypatch, while_writing, said
):
    """Some network file systems have no data yet, which must not be taken for the end."""

    class Failing(io.FileIO):
        def readinto(self, view):
            if said == "Input/output error":
                raise OSError(errno.EIO, said)

    def failing(path, mode="r", buffering=-1, *more, **options):
        if path == source / SHARD and (
                not while_writing or list(source.parent.glob("out/*.tmp"))):
            return io.BufferedReader(Failing(path)) if buffering else Failing(path)
        return real(path, mode, buffering, *more, **options)

    real = builtins.open
    monkeypatch.setattr(builtins, "open", failing)
    last = c.fails(capsys, source)
    assert last.startswith(f"error: {source / SHARD}: ") and last.endswith(said)
    assert (source.parent / "out").exists() == while_writing
    assert out_of(source) == {}


def test_an_interrupted_run_leaves_nothing_half_done(tmp_path):
    c.write_raw(tmp_path / "in" / SHARD, {
        "s.weight": ("F8_E4M3", [1 << 17, 1 << 13]), "s.weight_scale_inv": ("F32", [1 << 10, 64])})
    # A shell starts what runs in the background with SIGINT ignored, and so these tests' children.
    process = subprocess.Popen([*SCRIPT, *c.arguments(tmp_path / "in")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not list(tmp_path.glob("out/*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.endswith("interrupted; the same command continues\n") and "Traceback" not in error
    assert out_of(tmp_path / "in") == {}


def test_where_no_thread_may_be_started_the_run_says_so(source, monkeypatch, capsys):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert "can't start new thread; try --workers 1" in c.fails(capsys, source)
    assert out_of(source) == {}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_does_not_work_is_left_alone_or_refused(source, capsys, monkeypatch, device):
    to = torch.Tensor.to

    def broken(tensor, *where, **options):
        if "cuda" in str(where):
            raise RuntimeError("no kernel image is available\nlong story")
        return to(tensor, *where, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", broken)
    if device == "auto":
        main(source, source.parent / "out")
        assert ("Warning: the CUDA device does not work, so the CPU does its work: no kernel image "
                "is available\n") in capsys.readouterr().err
    else:
        with pytest.raises(UsageError, match="--device cuda: no kernel image is available; use"):
            main(source, source.parent / "out", device=device)
        assert not (source.parent / "out").exists()


# --- imports ---

TORCH = {"torch.py": "__version__ = '2.7.0'"}
IMPORTS = [  # Files beside the script, by their names; what the last line says.
    ({"torch.py": "__version__ = '2.6.0+cu124'"}, "torch is 2.6.0+cu124; this needs 2.7 or newer: "
                                                  "pip install -r requirements.txt"),
    (TORCH | {"safetensors.py": "raise ImportError('No module named safetensors')"},
     "No module named safetensors"),
    *((TORCH | others, "needs its own kernel.py beside it: keep the two files in a folder of their "
       "own") for others in (
           {}, {"kernel.py": "import no_triton_here\n"}, {"kernel.py": "act_quant = None\n"})),
]


@pytest.mark.parametrize("beside, said", IMPORTS)
def test_what_cannot_be_imported_is_an_import_error_that_says_what_to_do(tmp_path, beside, said):
    shutil.copy(ROOT / "fp8_cast_bf16.py", tmp_path)
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run([sys.executable, "-B", "-c", "import fp8_cast_bf16"], cwd=tmp_path,
                          capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ") and said in last


def test_the_kernel_is_found_by_python_with_a_safe_path(tmp_path):
    done = c.python("-P", *SCRIPT[1:], "--version", cwd=tmp_path)
    assert done.stdout == f"{fp8_cast_bf16.VERSION}\n"


def test_the_demo_needs_neither_triton_nor_numpy_and_leaves_python_as_it_was(tmp_path):
    code = (
        "import os, runpy, sys, threading, torch\n"
        "sys.modules['triton'] = sys.modules['numpy'] = None\n"
        "before = torch.get_num_threads(), sys.path[:], sys.stdout\n"
        "sys.path.append(sys.argv[1]); import fp8_cast_bf16; sys.path.pop()\n"
        "assert (torch.get_num_threads(), sys.path, sys.stdout) == before\n"
        "assert not os.listdir(); sys.argv[:] = ['', 'in', '--size', '1M', '--shards', '2']\n"
        "tests = os.path.dirname(fp8_cast_bf16.__file__) + '/tests'\n"
        "runpy.run_path(tests + '/make_checkpoint.py', run_name='__main__')\n"
        "fp8_cast_bf16.convert('in', 'out', device='cpu')\n"
        "seen, count = [], torch.get_num_threads\n"
        "thread = threading.Thread(target=lambda: seen.append(count()))\n"
        "thread.start(); thread.join(); assert [*seen, count()] == [before[0]] * 2\n")
    done = c.python("-B", "-c", code, ROOT, cwd=tmp_path)
    assert "umPy" not in done.stderr and "Warning" not in done.stderr
    given, got = (c.load_checkpoint(tmp_path / name) for name in ("in", "out"))
    assert given["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] % 128
    scales = {name: given.pop(f"{name}_scale_inv", None) for name in [*got]}
    c.assert_same_tensors(got, {
        name: tensor if scales[name] is None else c.dequantized(tensor, scales[name])
        for name, tensor in given.items()})


# --- where it prints to ---


def stream(kind: str):
    """Return a stream that takes nothing, or nothing more; or none."""
    if kind in ("absent", "full"):
        return open("/dev/full", "w") if kind == "full" else None
    ours, theirs = os.pipe() if kind == "broken" else pty.openpty()
    file = open(theirs, "w")
    if kind == "closed":
        file.close()
    elif kind == "stopped":
        os.set_blocking(theirs, False)
        with suppress(BlockingIOError):
            while True:
                os.write(theirs, b"x" * 1000)
    else:
        os.close(ours)
    return file


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of closing them.
@pytest.mark.parametrize("kind", ["full", "closed", "absent", "broken", "gone", "stopped"])
def test_streams_that_take_nothing_change_no_outcome_and_do_not_hang(
    source, expected, many_windows, monkeypatch, kind
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream(kind))
    for name in ("first", "second"):
        assert cli(c.arguments(source, out=source.parent / name)) == 0
        assert c.contents(source.parent / name) == expected
    (source.parent / "first" / SHARD).unlink()
    assert cli(c.arguments(source, "--verify", out=source.parent / "first")) == 1
    (source / SHARD).write_bytes(b"x")
    assert cli(c.arguments(source)) == 1
    assert not (source.parent / "out").exists()


def test_a_terminal_that_goes_during_a_run_neither_ends_nor_hangs_it(
    source, many_windows, monkeypatch
):
    ours, theirs = pty.openpty()
    fsync, ends = os.fsync, [ours]

    def hang_up(number):
        while ends:
            os.close(ends.pop())
        fsync(number)

    monkeypatch.setattr(os, "fsync", hang_up)
    monkeypatch.setattr(sys, "stderr", open(theirs, "w"))
    assert cli(c.arguments(source)) == 0
    assert SHARD in out_of(source) and not ends


@pytest.mark.parametrize("streams", ["0<&- 1>&- 2>&-", "2>&-", ">/dev/full 2>&1"])
def test_the_exit_status_tells_the_outcome_whatever_the_shell_does_with_streams(
    source, expected, streams
):
    def status(*more):
        command = ["sh", "-c", f'"$@" {streams}', "sh", *SCRIPT, *c.arguments(source, *more)]
        return subprocess.run(command, capture_output=True).returncode

    assert status() == 0
    assert out_of(source) == expected
    if "0<&-" in streams:
        assert status("--workers", "0") == 2
        (source / SHARD).write_bytes(b"x")
        assert status() == 1


def test_in_a_log_the_bar_is_lines(source, many_windows, capsys):
    main(source, source.parent / "out")
    printed = capsys.readouterr().err
    assert "\r" not in printed and printed.endswith("\n")
    for line in printed.splitlines():
        assert re.fullmatch(r"writing: +\d+%\|.*\| [\d.]+k?/180k \[\d\d:\d\d<.*B/s\]", line), line
    assert "writing: 100%" in line


@pytest.mark.parametrize("columns", [60, 80])
def test_on_a_terminal_the_bar_fits_its_width_and_shows_rate_and_time_left(
    source, monkeypatch, columns
):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 25, columns, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        main(source, source.parent / "out")
    monkeypatch.undo()
    seen = b""
    with suppress(OSError):  # It ends when all has been read, because the other side is closed.
        while True:
            seen += os.read(ours, 4096)
    os.close(ours)
    lines = [line for line in re.split(r"[\r\n]+", seen.decode()) if line.strip()]
    assert len(lines) > 1 and seen.count(b"\n") == 1
    assert max(map(len, lines)) <= columns
    assert re.search(r"writing: 100%\|.*\| 180k/180k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", lines[-1])


# --- the report ---


def report_of(source: Path, *more: str, status: int = 0) -> dict:
    """Run with --report; return the report."""
    path = source.parent / "report.json"
    assert cli(c.arguments(source, "--report", str(path), *more)) == status
    return c.read_json(path)


def test_the_report_holds_what_was_done(tmp_path):
    shards, _ = c.several_kinds()
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shards[ONE] |= {"n.weight": nan, "n.weight_scale_inv": torch.ones(1, 1), "kept": nan.clone()}
    source = c.write_checkpoint(tmp_path / "in", shards, c.CONFIG)
    (source / "x.gguf").write_text("x")
    report = report_of(source, "--device", "cpu", "--workers", "2")
    wanted = {"fp8_path": str(source), "bf16_path": str(tmp_path / "out"), "device": "cpu",
              "workers": "2", "missing_scale": "keep", "dry_run": "False"}
    assert wanted.items() <= report["options"].items()
    assert (report["version"], report["torch"]) == (fp8_cast_bf16.VERSION, torch.__version__)
    assert (report["status"], report["nonfinite"]) == ("complete", ["n.weight"])
    assert (report["kept_in_fp8"], report["files_left_out"]) == (["kept"], ["x.gguf"])
    assert (report["input"]["tensors"], report["output"]["tensors"]) == (12, 8)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report["bytes_written"] == report["output"]["bytes"] == written
    assert (sum(report["dequantized"].values()), report["copied"]) == (4, 4)
    assert sum(report["dropped"].values()) == 4
    assert report["seconds"] > 0 and "error" not in report
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", report["date"])


def test_the_report_says_how_a_run_ended_whatever_happens(source):
    for more, status in (["--dry-run"], "planned"), ([], "complete"), (["--verify"], "verified"):
        assert report_of(source, *more)["status"] == status
    (source / "config.json").write_text("{")
    report = report_of(source, status=1)
    assert report["status"] == "failed" and f"{source / 'config.json'}: " in report["error"]


def test_a_report_goes_into_devices_pipes_and_links(source, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/old.json").write_text("old" * 10_000)
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}.json")
        main(source, tmp_path / "out", report=tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert c.read_json(tmp_path / f"there/{name}.json")["status"] == "complete"
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        main(source, tmp_path / "out", report=tmp_path / "pipe")
        assert json.loads(reader.stdout.read())["status"] == "complete"
    main(source, tmp_path / "out", report="/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_report_that_cannot_be_written_is_named(source, capsys):
    assert cli(c.arguments(source, "--report", "/dev/full")) == 1
    assert capsys.readouterr().err.endswith("error: /dev/full: No space left on device\n")


def test_a_report_to_stdout_comes_after_what_is_printed(source, capfd):
    """There it is a file, which must not be overwritten."""
    assert cli(c.arguments(source, "--report", "/dev/stdout")) == 0
    printed = capfd.readouterr().out
    text, report = printed[: printed.index("\n{")], printed[printed.index("\n{"):]
    assert json.loads(report)["status"] == "complete"
    assert "Input: 1 shard" in text and text.endswith(COMPLETE)


@pytest.mark.parametrize("place", [
    "in", "in/r.json", "in/deeper/r.json", "out/config.json", f"out/{SHARD}", "out/x.safetensors",
    f"out/{INDEX}", "to in/r.json", "to out/config.json"])
def test_a_report_in_the_input_or_under_a_planned_name_is_wrong_usage(source, tmp_path, place):
    report = tmp_path / place
    if place.startswith("to "):
        report = tmp_path / "link"
        report.symlink_to(place.removeprefix("to "))
    before = c.contents(tmp_path)
    with pytest.raises(UsageError, match="the input or the output has its files there"):
        main(source, tmp_path / "out", report=report)
    assert c.contents(tmp_path) == before


def test_a_report_that_cannot_be_opened_ends_the_run_before_anything_is_written(source, capsys):
    folder = source.parent / "folder"
    folder.mkdir()
    assert c.fails(capsys, source, "--report", str(folder)) == f"error: {folder}: Is a directory"
    assert not (source.parent / "out").exists()
