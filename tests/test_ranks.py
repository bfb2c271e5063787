"""One conversion by several processes, as torchrun starts them, on one machine or two.

Ranks share nothing but the output folder. What torchrun does is tested with torchrun; what ranks do
when they meet in a folder, with threads that are a rank each.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fp8_cast_bf16 as f
from agent import Job
from checkpoints import (
    CONFIG,
    INDEX,
    ONE,
    ROOT,
    TWO,
    arguments,
    contents,
    several_kinds,
    write_checkpoint,
)
from fp8_cast_bf16 import CheckpointError, Ranks, cli, main
from make_checkpoint import make_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
CPU = ["--device", "cpu", "--workers", "2"]
RANKS = "fp8_cast_bf16.ranks"
BUSY = "another run is writing there"
SMALL = """
import os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
import fp8_cast_bf16 as f
f.WINDOW, f.POLL, f.PATIENCE = 16 << 12, 0.02, 2
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
real, calls = f.render, []

def render(shard, header, start, stop, worker):
    calls.append((shard.name, start))
    {disturb}
    return real(shard, header, start, stop, worker)

f.render = render
{instead}
status = f.cli(sys.argv[1:])
open(os.path.join({folder!r}, f"calls{{attempt}}.{{rank}}"), "w").write(repr(calls))
sys.exit(status)
"""


def script(folder: Path, disturb: str = "pass", instead: str = "") -> Path:
    """Write a script that converts in tiny windows, and does something at each, or before all."""
    path = folder / "small.py"
    path.write_text(SMALL.format(root=str(ROOT), folder=str(folder), disturb=disturb,
                                 instead=instead))
    return path


def start(ranks: int, path: Path, *options: str, launcher=()) -> Job:
    command = ["--nproc-per-node", str(ranks), *launcher, str(path)]
    return Job([*command, *arguments(path.parent / "in", *CPU), *options])


def end(job: Job) -> subprocess.CompletedProcess:
    try:
        job.wait(timeout=60)
    except BaseException:
        job.terminate()  # Its agent ends the ranks, too.
        raise
    return subprocess.CompletedProcess((), job.poll(), *job.output)


def run(ranks: int, path: Path, *options: str, launcher=()) -> subprocess.CompletedProcess:
    return end(start(ranks, path, *options, launcher=launcher))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of three shards, and beside it what one process makes of it."""
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder / "in", 10**6, 3)
    (folder / "in/tokenizer.json").write_text("{}")
    main(folder / "in", folder / "expected")
    return folder


@pytest.fixture
def folder(tmp_path, made):
    """A copy of the checkpoint and of what is made of it."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def shares(folder: Path, ranks: int, attempt: int = 0) -> list[list]:
    """Return the windows that each rank has rendered."""
    return [eval((folder / f"calls{attempt}.{rank}").read_text()) for rank in range(ranks)]


def whole_shards(left: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that claim to be whole: all but temporary ones and that of the ranks."""
    return {name: data for name, data in left.items() if not name.endswith((".tmp", RANKS))}


def assert_unfinished(folder: Path) -> None:
    """See that an output does not look complete, and that what has its name is whole."""
    left, expected = contents(folder / "out"), contents(folder / "expected")
    assert not {INDEX, "config.json"} & {*left}
    assert all(expected[name] == data for name, data in whole_shards(left).items())


# --- what torchrun does ---


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_makes_the_same_bytes(folder, ranks):
    done = run(ranks, script(folder, "time.sleep(0.005)"), "--report", str(folder / "report.json"))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")
    windows = [window for share in shares(folder, ranks) for window in share]
    assert len(windows) == len({*windows}) > 200
    assert min(map(len, shares(folder, ranks))) > len(windows) / ranks / 3
    for other in range(ranks):
        names = {name for name, _ in shares(folder, ranks)[other]}
        assert sum(names <= {name for name, _ in share} for share in shares(folder, ranks)) == 1
    assert done.stdout.count("Converted 3 shards") == 1
    reports = [folder / "report.json", *(folder / f"report.rank{i}.json" for i in range(1, ranks))]
    assert sorted(folder.glob("report*")) == sorted(reports)
    written = [json.loads(report.read_text())["bytes_written"] for report in reports]
    assert min(written) > 0
    assert sum(written) == sum(
        path.stat().st_size for path in (folder / "out").glob("*.safetensors")
    )
    again = run(ranks, script(folder))
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("Nothing to do: the output is complete\n")


def test_ranks_make_the_folders_of_a_checkpoint_as_one_process_does(tmp_path):
    make_checkpoint(tmp_path / "in", 10**6, 3)
    write_checkpoint(tmp_path / "in/draft", several_kinds()[0], CONFIG)
    (tmp_path / "in/draft/tokenizer.json").write_text("{}")
    main(tmp_path / "in", tmp_path / "expected")
    done = run(2, script(tmp_path), "--report", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert f"draft/{ONE}" in {name for share in shares(tmp_path, 2) for name, _ in share}
    assert done.stdout.count("Converted 5 shards") == 1
    done = run(2, script(tmp_path), "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verified ") == 1
    (tmp_path / "out/draft" / TWO).unlink()
    done = run(2, script(tmp_path))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_several_processes_without_torchrun_are_told_so(folder):
    environment = {**os.environ, "OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "1"}
    told = folder / "told"
    path = script(folder, f"while not os.path.exists({str(told)!r}): time.sleep(0.01)")
    command = [sys.executable, str(path), *arguments(folder / "in", *CPU)]
    environment |= {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not list(folder.glob("out/*.safetensors.*.tmp")):
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        told.touch()
        assert first.wait() == 0
    assert second.returncode == 1
    assert "Started several times? Start it once, or with torchrun" in second.stderr
    assert contents(folder / "out") == contents(folder / "expected")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_loses_nothing(folder, killed):
    disturb = (
        f"time.sleep(0.005)\n    if len(calls) >= 30 and rank == {killed} and attempt == 0: "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run(2, script(folder, disturb))
    assert done.returncode == 1
    assert_unfinished(folder)
    done = run(2, script(folder))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")


@pytest.mark.parametrize("killed", [0, 1])
def test_with_restarts_the_launcher_goes_on_after_a_killed_rank(folder, killed):
    disturb = (
        f"time.sleep(0.005)\n    if len(calls) >= 60 and rank == {killed} and attempt == 0: "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run(2, script(folder, disturb), launcher=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")
    assert shares(folder, 2, attempt=1)


def test_a_rank_that_fails_ends_the_job_with_its_message(folder):
    disturb = "if rank == 1 and len(calls) > 20: raise RuntimeError('the GPU is gone')"
    done = run(3, script(folder, disturb))
    assert done.returncode == 1
    assert "error: the GPU is gone\n" in done.stderr
    assert not {INDEX, "config.json"} & {*contents(folder / "out")}


def test_what_rank_0_refuses_ends_the_job_before_anything_is_written(folder):
    (folder / "out").mkdir()
    (folder / "out/other.safetensors").write_text("mine")
    done = run(2, script(folder))
    assert done.returncode == 1
    assert "holds other.safetensors, which this checkpoint does not have" in done.stderr
    assert contents(folder / "out") == {"other.safetensors": b"mine"}


def test_a_rank_with_another_input_is_refused_with_both_digests(folder):
    shutil.copytree(folder / "in", folder / "other")
    for path in [*(folder / "other").glob("*.safetensors"), folder / "other" / INDEX]:
        path.write_bytes(path.read_bytes().replace(b"0.mlp.gate.w", b"0.mlp.gate.v"))
    other = "sys.argv = [a + '/../other' * (rank and a.endswith('/in')) for a in sys.argv]"
    done = run(2, script(folder, instead=other))
    assert done.returncode == 1
    found = re.search(r"rank 1 has the plan ([0-9a-f]{16}), rank 0 has ([0-9a-f]{16})", done.stderr)
    assert found[1] != found[2] == (folder / "out" / RANKS).read_text()
    assert_unfinished(folder)
    done = run(2, script(folder))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")


def test_dry_run_and_verify_run_with_ranks(folder):
    path = script(folder)
    done = run(2, path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Input: 3 shards") == 1
    assert not (folder / "out").exists()
    shutil.copytree(folder / "expected", folder / "out")
    done = run(2, path, "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verified ") == 1
    before = contents(folder / "out")
    for name in before:
        if name.endswith(".safetensors"):
            (folder / "out" / name).write_bytes(before[name][:-2] + b"ab")
            done = run(2, path, "--verify")
            assert done.returncode == 1
            assert done.stdout.count(": element [") == 1
            assert "differs from what the input gives in 1 place; delete" in done.stderr
            (folder / "out" / name).write_bytes(before[name])


def agents(path: Path, hosts: list[tuple[list[str], str]]) -> list[subprocess.Popen]:
    """Run a torchrun agent with two ranks on each host: a prefix of its command, its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for prefix, address in hosts:
        command = [*prefix, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend"]
        command += ["c10d", "--rdzv-endpoint", f"{hosts[0][1]}:{port}", "--rdzv-id", "job"]
        command += ["--local-addr", address, "--rdzv-conf", f"is_host={int(not processes)}"]
        command += [path, *arguments(path.parent / "in", *CPU)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE))
    for process in processes:
        process.out, process.err = process.communicate(timeout=60)
    return processes


def test_two_machines_are_two_agents(folder):
    done = agents(script(folder, "time.sleep(0.005)"), [([], "127.0.0.1")] * 2)
    for agent in done:
        assert agent.returncode == 0, agent.err.decode()
    assert contents(folder / "out") == contents(folder / "expected")
    assert sum(b"Converted 3 shards" in agent.out for agent in done) == 1
    assert sorted(len({name for name, _ in share}) for share in shares(folder, 4)) == [0, 1, 1, 1]


@pytest.fixture
def namespaces():
    """Two network namespaces that see each other alone, as two hosts."""
    names = veths = f"fp8a{os.getpid()}", f"fp8b{os.getpid()}"
    commands = [["ip", "netns", "add", name] for name in names]
    commands += [["ip", "link", "add", veths[0], "type", "veth", "peer", "name", veths[1]]]
    for i, (name, veth) in enumerate(zip(names, veths, strict=True)):
        commands += [["ip", "link", "set", veth, "netns", name]]
        inside = ["ip", "-n", name]
        commands += [[*inside, "addr", "add", f"10.77.0.{i + 1}/24", "dev", veth]]
        commands += [[*inside, "link", "set", veth, "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            if not shutil.which("ip") or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("may not make network namespaces")
        yield names
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_network_namespaces_are_two_hosts(folder, namespaces):
    hosts = [(["ip", "netns", "exec", name], f"10.77.0.{i + 1}")
             for i, name in enumerate(namespaces)]
    done = agents(script(folder, "time.sleep(0.005)"), hosts)
    for agent in done:
        assert agent.returncode == 0, agent.err.decode()
    assert contents(folder / "out") == contents(folder / "expected")


def await_temporary(folder: Path, job: Job, count: int = 2) -> None:
    """Return when as many shards as there are ranks are being written."""
    while len(list(folder.glob("out/*.safetensors.*.tmp"))) < count:
        assert job.poll() is None, job.output[1]
        time.sleep(0.01)


def test_an_interrupted_job_can_go_on(folder):
    job = start(2, script(folder, "time.sleep(0.02)"))
    await_temporary(folder, job)
    job.terminate()
    assert end(job).returncode != 0
    assert not {INDEX, "config.json"} & {*contents(folder / "out")}
    done = run(2, script(folder))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")


def test_a_job_whose_agent_was_killed_can_be_started_again(folder):
    """Its ranks may live on, and then keep others out until they are done."""
    job = start(2, script(folder, "time.sleep(0.02)"))
    await_temporary(folder, job)
    job.kill()
    job.wait()
    for _ in range(5):
        done = run(2, script(folder))
        if done.returncode == 0:
            break
        assert BUSY in done.stderr
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")


def test_a_job_that_is_started_twice_by_mistake_is_refused_and_does_not_disturb(folder):
    go = str(folder / "go")
    waits = f"while len(calls) > 20 and not os.path.exists({go!r}): time.sleep(0.01)"
    first = start(2, script(folder, waits))
    await_temporary(folder, first)
    second = run(2, script(folder, "time.sleep(0.1)"))
    assert second.returncode == 1
    assert BUSY in second.stderr
    assert first.poll() is None
    (folder / "go").touch()
    first = end(first)
    assert first.returncode == 0, first.stderr
    assert contents(folder / "out") == contents(folder / "expected")


def test_a_process_that_a_rank_starts_is_no_rank(folder):
    """As a training job that converts a checkpoint by a command."""
    instead = (
        "sys.argv[4] += str(rank)\n"
        "command = [sys.executable, f.__file__, *sys.argv[1:]]\n"
        "done = subprocess.run(command, capture_output=True, text=True)\n"
        "assert done.returncode == 0, done.stderr\n"
        "sys.exit()"
    )
    done = run(2, script(folder, instead=instead))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert contents(folder / f"out{rank}") == contents(folder / "expected")


def test_a_call_from_python_is_no_rank_unless_asked(folder):
    """As a training job that converts a checkpoint itself."""
    instead = "f.main(sys.argv[2], sys.argv[4] + str(rank)); sys.exit()"
    done = run(2, script(folder, instead=instead))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert contents(folder / f"out{rank}") == contents(folder / "expected")


# --- what ranks do in a folder ---


@pytest.fixture
def quick(monkeypatch):
    """Small windows and little patience."""
    monkeypatch.setattr(f, "WINDOW", 16 << 12)
    monkeypatch.setattr(f, "POLL", 0.02)
    monkeypatch.setattr(f, "PATIENCE", 3)
    monkeypatch.setattr(f, "STALLED", 5)
    return monkeypatch


def as_ranks(folder: Path, count: int, inputs: dict | None = None, late: float = 0) -> list:
    """Let threads convert as ranks, of which 0 or (for negative `late`) the others come late.

    Return what each raised.
    """

    def convert(rank: int) -> Exception | None:
        time.sleep(max(0, -late if rank else late))
        source = (inputs or {}).get(rank, folder / "in")
        try:
            f.convert(source, folder / "out", device="cpu", workers=2,
                      ranks=Ranks(rank, count, rank, count), report=folder / "report.json")
        except (CheckpointError, OSError) as error:
            return error
        return None

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(convert, range(count)))


def test_the_division_is_over_all_planned_shards_and_even(folder):
    plan = f.make_plan(folder / "in")
    for count in (1, 2, 3, 5):
        divided = [f.shards_of_rank(plan.shards, rank, count) for rank in range(count)]
        names = [shard.name for mine in divided for shard in mine]
        assert sorted(names) == sorted(shard.name for shard in plan.shards)
        sizes = [sum(shard.size for shard in mine) for mine in divided]
        assert max(sizes) - min(sizes) <= max(shard.size for shard in plan.shards)


@pytest.mark.parametrize("late", [1.0, -1.0])
def test_ranks_without_a_shard_end(tmp_path, quick, late):
    tensors = {name: t for shard in several_kinds()[0].values() for name, t in shard.items()}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG, index=False)
    main(tmp_path / "in", tmp_path / "expected")
    assert as_ranks(tmp_path, 3, late=late) == [None] * 3
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("late", [1.0, -1.0])
@pytest.mark.parametrize("missing", [[], [INDEX], [0], [1], [0, 1, INDEX]])
def test_ranks_that_come_at_different_times_make_what_is_missing(folder, quick, missing, late):
    shutil.copytree(folder / "expected", folder / "out")
    shards = sorted(path.name for path in (folder / "out").glob("*.safetensors"))
    for name in missing:
        (folder / "out" / (name if name == INDEX else shards[name])).unlink()
    assert as_ranks(folder, 2, late=late) == [None, None]
    assert contents(folder / "out") == contents(folder / "expected")


@pytest.mark.parametrize("stale", ["same", "other"])
@pytest.mark.parametrize("late", [0.5, -0.5])
def test_what_an_earlier_job_left_does_not_mislead(folder, quick, stale, late):
    """Its digest, which may be the same, and its temporary files, which may be in use at once."""
    out = folder / "out"
    out.mkdir()
    plan = f.make_plan(folder / "in")
    (out / RANKS).write_text(f.digest_of(plan) if stale == "same" else "0" * 16)
    for shard in plan.shards:
        fingerprint = f.fingerprint_of(shard, f.Worker(torch.device("cpu"), 0))
        for name in (fingerprint, "0" * 16):
            f.temporary(out / shard.name, name).write_text("half")
    assert as_ranks(folder, 2, late=late) == [None, None]
    assert contents(out) == contents(folder / "expected")


def test_a_rank_that_begins_before_rank_0_has_cleaned_up_keeps_its_files(folder, quick):
    """With the digest of a crashed job there, others are at work when rank 0 looks around."""
    out = folder / "out"
    out.mkdir()
    plan = f.make_plan(folder / "in")
    (out / RANKS).write_text(f.digest_of(plan))
    real, begun = f.render, threading.Event()

    def slow(*operands):
        begun.set()
        time.sleep(0.01)
        return real(*operands)

    def after_others(*operands):
        begun.wait(10)
        time.sleep(0.1)
        return inspect(*operands)

    inspect = f.inspect_output
    quick.setattr(f, "STALLED", 20)
    quick.setattr(f, "render", slow)
    quick.setattr(f, "inspect_output", after_others)
    threading.Timer(3, begun.set).start()  # if the others rightly wait
    assert as_ranks(folder, 2) == [None, None]
    assert contents(out) == contents(folder / "expected")


def test_another_job_may_finish_a_shard_that_a_rank_is_writing(folder, quick):
    """Both are rank 1, of a job that was started twice, and write the same bytes."""
    real, calls, overtaken = f.render, [], threading.Event()

    def wait(*operands):
        calls.append(threading.current_thread())
        if len(calls) == 20:
            overtaken.wait(10)
        return real(*operands)

    def rank(number):
        f.convert(folder / "in", folder / "out", device="cpu", workers=1, ranks=Ranks(number, 2))

    quick.setattr(f, "STALLED", 20)
    plan = f.make_plan(folder / "in")
    done = len(f.shards_of_rank(plan.shards, 0, 2))
    with ThreadPoolExecutor(3) as pool:
        rank_0 = pool.submit(rank, 0)
        while len(list(folder.glob("out/*.safetensors"))) < done:
            time.sleep(0.01)
        quick.setattr(f, "render", wait)
        slow = pool.submit(rank, 1)
        while len(calls) < 20:
            time.sleep(0.01)
        pool.submit(rank, 1).result()
        overtaken.set()
        slow.result()
        rank_0.result()
    assert contents(folder / "out") == contents(folder / "expected")


def test_no_rank_replaces_a_shard_that_somebody_else_wrote(folder, quick):
    out = folder / "out"
    out.mkdir()
    plan = f.make_plan(folder / "in")
    (out / RANKS).write_text(f.digest_of(plan))
    for shard in plan.shards:
        (out / shard.name).write_text("mine")
    errors = as_ranks(folder, 2, late=0.5)
    assert all(str(out / "model-0000") in str(error) for error in errors[:1])
    assert {*whole_shards(contents(out)).values()} == {b"mine"}


def test_a_rank_with_an_input_of_other_values_is_refused(folder, quick):
    shutil.copytree(folder / "in", folder / "other")
    for path in (folder / "other").glob("*.safetensors"):
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:size] + bytes(byte ^ 1 for byte in data[size:]))
    _, error = as_ranks(folder, 2, {1: folder / "other"})
    assert re.search("rank 1 has the plan [0-9a-f]{16}, rank 0 has [0-9a-f]{16}", str(error))
    assert_unfinished(folder)


def test_rank_0_gives_up_when_the_others_do_nothing_for_long(folder, quick, capsys):
    with pytest.raises(CheckpointError, match=r"shards? of other ranks ha(ve|s) stopped growing"):
        f.convert(folder / "in", folder / "out", device="cpu", ranks=Ranks(0, 2))
    assert_unfinished(folder)
    assert as_ranks(folder, 2) == [None, None]
    assert contents(folder / "out") == contents(folder / "expected")


def test_a_rank_gives_up_when_rank_0_does_nothing_for_long(folder, quick):
    with pytest.raises(CheckpointError, match="rank 0"):
        f.convert(folder / "in", folder / "out", device="cpu", ranks=Ranks(1, 2))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("value", [None, "", "one"])
def test_half_an_environment_of_torchrun_makes_no_rank(folder, monkeypatch, value):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert cli(arguments(folder / "in", *CPU)) == 0
    assert contents(folder / "out") == contents(folder / "expected")


def test_each_rank_prints_and_reports_the_nan_of_its_own_shards(tmp_path, quick, capsys):
    nan = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    shards = {shard: {f"{name}.weight": nan, f"{name}.weight_scale_inv": torch.ones(1, 1)}
              for shard, name in ((ONE, "a"), (TWO, "b"))}
    write_checkpoint(tmp_path / "in", shards, CONFIG)
    assert as_ranks(tmp_path, 2) == [None, None]
    printed = capsys.readouterr().out
    for rank, name in enumerate("ab"):
        assert printed.count(f"16 NaN values, in {name}.weight\n") == 1
        report = tmp_path / f"report{f'.rank{rank}' * bool(rank)}.json"
        assert json.loads(report.read_text())["NaN"] == {f"{name}.weight": 16}
