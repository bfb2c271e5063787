"""One conversion by several processes, as torchrun starts them, on one machine or two.

Ranks share nothing but the output folder. What torchrun does is tested with torchrun; what ranks do
when they meet in a folder, with processes that have its variables.
"""

import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoints as c
from agent import SCRIPT, Job, rank, torchrun
from checkpoints import CONFIG, INDEX, SHARD, contents
from fp8_cast_bf16 import cli, main

RANKS = "fp8_cast_bf16.ranks"
BUSY = "another run is writing there"
A, B, C = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of three shards, of which rank 1 of two makes B; and beside it, what one process
    makes of it, and what a job that was killed has left.
    """
    folder, shards = tmp_path_factory.mktemp("made"), {}
    for seed, name in enumerate([A, B, C]):
        shards[name] = {f"{seed}.weight": c.finite_codes(260, 200, seed=seed),
                        f"{seed}.weight_scale_inv": torch.full((3, 2), 0.001)}
    c.write_checkpoint(folder / "in", shards, CONFIG)
    (folder / "in/tokenizer.json").write_text("{}")
    main(folder / "in", folder / "expected")
    [killed] = run(folder, only=[0], disturb="each_window(lambda number: number == 20 and die())")
    assert killed.poll() == -9
    (folder / "out").rename(folder / "killed")
    return folder


@pytest.fixture
def folder(tmp_path, made):
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def arguments(folder: Path) -> list[str]:
    report = f"{folder}/report.json"
    return c.arguments(folder / "in", "--device", "cpu", "--workers", "2", "--report", report)


def start(folder: Path, *options: str, count: int = 2, only=None, disturb: str = "") -> list[Job]:
    """Start ranks of a job, or only some of them."""
    command = [*arguments(folder), *options]
    return [Job(rank, number, count, disturb, command) for number in only or range(count)]


def run(folder: Path, *options: str, **more) -> list[Job]:
    return [job.wait() for job in start(folder, *options, **more)]


def launch(folder: Path, *launcher: str, disturb: str = "", count: int = 2) -> Job:
    """Start torchrun, with two ranks if not told otherwise."""
    (folder / "convert.py").write_text(SCRIPT.format(disturb=disturb))
    program = [] if "--no-python" in launcher else [str(folder / "convert.py")]
    return Job(torchrun, "--nproc-per-node", str(count), *launcher, *program, *arguments(folder))


def assert_done(folder: Path, *jobs: Job) -> None:
    """See that all have succeeded, and that the output is what one process makes."""
    for job in jobs:
        assert job.poll() == 0, job.err
    assert contents(folder / "out") == contents(folder / "expected")


def assert_unfinished(folder: Path, *jobs: Job) -> None:
    """See that all have failed, that the output does not look complete, that what has its name is
    whole, and that the next job completes it.
    """
    assert {job.poll() for job in jobs} == {1}
    left, expected = contents(folder / "out"), contents(folder / "expected")
    assert not {INDEX, "config.json"} & {*left}
    for name, data in left.items():
        assert name.endswith((".tmp", ".lock", RANKS)) or expected[name] == data
    assert_done(folder, *run(folder))


def await_temporary(folder: Path, jobs: list[Job], count: int) -> None:
    """Return when so many shards are being written."""
    while len([*folder.glob("out/*.safetensors.*.tmp")]) < count:
        assert all(job.poll() is None for job in jobs), jobs[-1].err
        time.sleep(0.01)


def reports(folder: Path) -> list[dict]:
    """Return the reports of the ranks, by their numbers."""
    paths = sorted(folder.glob("report*"), key=lambda path: path.stem[6:])
    assert [path.name for path in paths] == [
        f"report{f'.rank{number}' * bool(number)}.json" for number in range(len(paths))]
    return [c.read_json(path) for path in paths]


# --- what torchrun does ---


def by_a_shell(folder):
    wrapper = folder / "wrapper.sh"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} {folder}/convert.py "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    return [launch(folder, "--no-python", str(wrapper))]


def on_two_machines(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    agents = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-id",
              "job", "--local-addr", "127.0.0.1", "--rdzv-conf"]
    return [launch(folder, *agents, f"is_host={host}", count=1) for host in (1, 0)]


@pytest.mark.parametrize("begin", [lambda folder: [launch(folder)], by_a_shell, on_two_machines])
def test_torchrun_makes_what_one_process_makes_and_each_rank_its_share(folder, begin):
    jobs = [job.wait() for job in begin(folder)]
    assert_done(folder, *jobs)
    assert sum(job.out.count("Converted: ") for job in jobs) == 1
    assert [report["bytes_written"] for report in reports(folder)] == [
        sum((folder / "out" / name).stat().st_size for name in names) for names in ([A, C], [B])]


def test_a_python_program_that_a_rank_starts_is_no_rank_nor_is_a_call(folder):
    """As a training job that converts a checkpoint by a command, or itself."""
    disturb = (
        "import subprocess, fp8_cast_bf16 as f\n"
        "arguments[3] += str(rank)\n"
        "arguments[-1] += str(rank)\n"
        "assert subprocess.run([sys.executable, f.__file__, *arguments]).returncode == 0\n"
        "f.main(arguments[1], arguments[3] + 'called')\n"
        "sys.exit()")
    job = launch(folder, disturb=disturb).wait()
    assert job.poll() == 0, job.err
    for out in ("out0", "out1", "out0called", "out1called"):
        assert contents(folder / out) == contents(folder / "expected")


def test_with_restarts_the_launcher_goes_on_after_a_killed_rank(folder):
    disturb = "each_window(lambda number: number == 20 and rank == 1 and attempt == 0 and die())"
    job = launch(folder, "--max-restarts", "1", disturb=disturb).wait()
    assert_done(folder, job)
    assert "exitcode: -9" in job.err


def test_a_rank_that_fails_ends_the_job_with_its_message_and_another_goes_on(folder):
    disturb = ("def fail(number):\n"
               "    if number == 20 and rank == 1: raise OSError(5, 'the disk is gone')\n"
               "each_window(fail)")
    job = launch(folder, disturb=disturb).wait()
    assert re.search(r"error: .*\.tmp: the disk is gone\n", job.err)
    assert_unfinished(folder, job)


def test_a_job_of_which_the_agent_was_killed_can_be_started_again(folder):
    """Its ranks live on, and keep others out until they are done."""
    job = launch(folder, disturb="each_window(lambda number: time.sleep(0.05))")
    await_temporary(folder, [job], 2)
    job.kill()
    assert job.wait().poll() == -9
    while (zero := run(folder, only=[0])[0]).poll():
        assert BUSY in zero.err
    assert_done(folder, *run(folder))


# --- what ranks do in a folder ---


@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_number_of_ranks_makes_the_same_bytes_and_a_second_run_nothing(folder, count):
    assert_done(folder, *run(folder, count=count))
    sizes = [report.get("bytes_written", 0) for report in reports(folder)]
    assert len([size for size in sizes if size]) == min(count, 3)
    assert sum(sizes) == sum(path.stat().st_size for path in folder.glob("out/*.safetensors"))
    again = run(folder, count=count)
    assert_done(folder, *again)
    assert again[0].out.endswith("Nothing to do: the output is complete\n")
    assert not any("bytes_written" in report for report in reports(folder))


def test_ranks_make_and_verify_the_folders_of_a_checkpoint_as_one_process_does(folder):
    c.write_checkpoint(folder / "in/draft", {SHARD: c.one_weight()[0]}, CONFIG, index=False)
    shutil.rmtree(folder / "expected")
    main(folder / "in", folder / "expected")
    assert_done(folder, *run(folder))
    for missing in (f"draft/{SHARD}", B):
        (folder / "out" / missing).unlink()
        assert_done(folder, *run(folder))
    assert_done(folder, *run(folder, "--verify"))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("missing", [[], [INDEX], [A], [B], [A, B, C, INDEX]])
def test_ranks_that_come_at_different_times_make_what_is_missing(folder, missing, late):
    (folder / "expected").rename(folder / "out")
    shutil.copytree(folder / "out", folder / "expected")
    for name in missing:
        (folder / "out" / name).unlink()
    assert_done(folder, *run(folder, disturb=f"time.sleep(rank == {late})"))


@pytest.mark.parametrize("late", [0, 1, None])
@pytest.mark.parametrize("stale", [False, True])
def test_what_a_killed_job_left_does_not_mislead(folder, stale, late):
    """Its digest, which may be the same, and its temporary files, which may be in use at once."""
    (folder / "killed").rename(folder / "out")
    assert [*folder.glob("out/*.tmp")]
    if stale:
        (folder / "out" / RANKS).write_text("0123456789abcdef")
    count = 1 if late is None else 2  # One process alone removes what ranks have left.
    assert_done(folder, *run(folder, disturb=f"time.sleep(rank == {late})", count=count))


def test_a_rank_may_make_its_shard_while_rank_0_looks_at_the_output(folder):
    """With the digest of a killed job there, others need not wait for rank 0."""
    (folder / "killed").rename(folder / "out")
    for path in (*folder.glob("out/*.tmp"), folder / "out" / B):
        path.unlink(missing_ok=True)
    disturb = ("if rank == 0:\n"
               "    await_files({out!r}, {shard!r} + '*')\n"  # Unfinished, or finished already.
               "    real = shutil.disk_usage\n"
               "    shutil.disk_usage = lambda path: await_files({out!r}, {shard!r}) or real(path)")
    out = str(folder / "out")
    assert_done(folder, *run(folder, disturb=disturb.format(out=out, shard=B)))


@pytest.mark.parametrize("act, said", [
    ("Path({out!r}).write_text('mine')", "{out}: has appeared while this run was writing it"),
    ("os.utime({source!r})", "{source}: has changed while it was read")])
def test_a_file_of_somebody_else_and_an_input_that_changes_end_the_job(folder, act, said):
    """The file is kept, and no shard of the input published."""
    out, names = folder / "out" / B, {"out": f"{folder}/out/{B}", "source": f"{folder}/in/{B}"}
    disturb = f"hurry(); each_window(lambda number: rank and {act.format(**names)})"
    zero, one = run(folder, disturb=disturb)
    assert said.format(**names) in one.err
    assert contents(folder / "out").get(B) == (b"mine" if "mine" in act else None)
    out.unlink(missing_ok=True)
    assert_unfinished(folder, zero, one)


def test_what_is_in_the_way_ends_the_job_before_anything_is_written(folder):
    (folder / "out").mkdir()
    (folder / "out/other.safetensors").write_text("mine")
    zero, one = run(folder, disturb="hurry()")
    assert zero.poll() == one.poll() == 1
    assert "other.safetensors: is not what this input gives" in zero.err
    assert contents(folder / "out") == {"other.safetensors": b"mine"}


@pytest.mark.parametrize("other", ["values", "names"])
def test_a_rank_with_another_plan_is_refused_with_both_digests(folder, other):
    shutil.copytree(folder / "in", folder / "other/in")
    for path in [*folder.glob("other/in/model*")]:
        if other == "values" and path.suffix == ".safetensors":
            header, data = c.split(path)
            path.write_bytes(header + bytes(byte ^ 1 for byte in data))
        elif other == "names":
            path.write_bytes(path.read_bytes().replace(b"1.weight", b"9.weight"))
    disturb = f"hurry(); arguments[1] = rank * {str(folder / 'other/in')!r} or arguments[1]"
    zero, one = run(folder, disturb=disturb)
    found = re.search(r"rank 1 has the plan ([0-9a-f]{16}), rank 0 has ([0-9a-f]{16})", one.err)
    assert found[1] != found[2] == (folder / "out" / RANKS).read_text()
    assert_unfinished(folder, zero, one)


@pytest.mark.parametrize("number, said", [
    (0, f"/out/{B}: one of 1 shards of other ranks that have stopped"),
    (1, "/out: rank 0 has not prepared it; start the same command again")])
def test_a_rank_gives_up_when_another_does_nothing_for_long(folder, number, said):
    [job] = run(folder, only=[number], disturb="hurry()")
    assert f"{folder}{said}" in job.err
    assert (folder / "out").exists() == (number == 0)
    assert_unfinished(folder, job)


@pytest.mark.parametrize("torchrun", [True, False])
def test_what_is_started_twice_by_mistake_is_refused_and_does_not_disturb(folder, torchrun):
    """By torchrun, or by mpirun, whose variables say nothing to this program."""
    count = 2 if torchrun else 1
    waits = f"each_window(lambda number: number == 20 and await_files({str(folder)!r}, 'go')); "
    waits += "" if torchrun else "del os.environ['TORCHELASTIC_RUN_ID']"
    first = start(folder, count=count, disturb=waits)
    await_temporary(folder, first, count)
    [second] = run(folder, count=count, only=[0], disturb=waits)
    assert second.poll() == 1
    told = f"{BUSY}; let it end. Started several times? Start it once, or with torchrun"
    assert told in second.err
    assert all(job.poll() is None for job in first)
    (folder / "go").touch()
    assert_done(folder, *[job.wait() for job in first])


@pytest.mark.parametrize("value", [None, "", "one"])
def test_half_an_environment_of_torchrun_makes_no_rank(folder, monkeypatch, value):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("RANK") if value is None else monkeypatch.setenv("RANK", value)
    assert cli(arguments(folder)) == 0
    assert_done(folder)


# --- what ranks say ---


def test_a_dry_run_by_ranks_prints_one_plan_and_writes_nothing(folder):
    zero, one = run(folder, "--dry-run")
    assert zero.poll() == one.poll() == 0
    assert (zero.out.count("Input: 3 shards"), one.out) == (1, "")
    assert not (folder / "out").exists()


def test_each_rank_tells_the_differences_of_its_share_and_rank_0_the_rest(folder):
    shutil.copytree(folder / "expected", folder / "out")
    good = run(folder, "--verify")
    assert_done(folder, *good)
    assert good[0].out.endswith("Verified 2 tensors, the share of rank 0: no differences\n")
    for name in (A, B):
        path = folder / "out" / name
        path.write_bytes(path.read_bytes()[:-2] + b"ab")
    (folder / "out/hf_quant_config.json").write_text("{}")
    bad = run(folder, "--verify")
    shares = [[f"{folder}/out/hf_quant_config.json", f"{folder}/out/{A}"], [f"{folder}/out/{B}"]]
    for job, report, paths in zip(bad, reports(folder), shares, strict=True):
        lines = sorted(line for line in job.err.splitlines() if line.startswith(f"{folder}/out/"))
        assert [line.split(":")[0] for line in lines] == paths
        assert sorted(report["differences"]) == lines
        assert (job.poll(), report["status"]) == (1, "failed")


def test_each_rank_tells_the_nan_of_its_share_and_what_all_know_is_told_once(tmp_path):
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shards = {shard: {f"{name}.weight": nan, f"{name}.weight_scale_inv": torch.ones(1, 1),
                      f"bare.{name}.weight": c.finite_codes(4, 4)}
              for shard, name in ((A, "a"), (B, "b"), (C, "c"))}
    c.write_checkpoint(tmp_path / "in", shards, CONFIG)
    jobs = run(tmp_path)
    found = [["a.weight", "c.weight"], ["b.weight"]]
    assert [report["nonfinite"] for report in reports(tmp_path)] == found
    for job, names in zip(jobs, found, strict=True):
        assert job.poll() == 0
        assert f"Warning: NaN or infinite values in {', '.join(names)}\n" in job.err
    missing = "Warning: Missing scale_inv tensor for bare.b.weight, skipping conversion"
    assert [job.err.count(missing) for job in jobs] == [1, 0]


def test_the_reports_of_all_ranks_may_lie_in_the_output(folder):
    disturb = f"rank or await_files({str(folder)!r}, 'out/report.rank1.json')"
    jobs = run(folder, "--report", f"{folder}/out/report.json", disturb=disturb)
    for path in folder.glob("out/report*"):
        assert c.read_json(path)["status"] == "complete"
        path.unlink()
    assert_done(folder, *jobs)
