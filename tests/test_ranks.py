"""One conversion by several processes, as torchrun starts them, on one machine or two."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints import CONFIG, INDEX, contents, several_kinds, write_checkpoint
from fp8_cast_bf16 import main
from make_checkpoint import make_checkpoint

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SMALL = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import fp8_cast_bf16 as f
f.WINDOW, f.SPAN, f.POLL = 16 << 12, 2, 0.02
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
real, calls = f.render, []

def render(shard, start, stop, worker):
    calls.append((shard.name, start))
    {disturb}
    return real(shard, start, stop, worker)

f.render = render
status = f.cli(sys.argv[1:])
open(os.path.join({folder!r}, f"calls{{attempt}}.{{rank}}"), "w").write(repr(calls))
sys.exit(status)
"""


def script(folder: Path, disturb: str = "pass") -> Path:
    """Write a script that converts in tiny windows and spans, and does something at each."""
    path = folder / "small.py"
    path.write_text(SMALL.format(root=str(ROOT), folder=str(folder), disturb=disturb))
    return path


def run(ranks: int, path: Path, *options: str, launcher=()) -> subprocess.CompletedProcess:
    folder = path.parent
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), *launcher, path]
    command += ["--input-fp8-hf-path", folder / "in", "--output-bf16-hf-path", folder / "out"]
    command += ["--device", "cpu", "--workers", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three shards, and beside it what one process makes of it."""
    make_checkpoint(tmp_path / "in", 10**6, 3)
    (tmp_path / "in/tokenizer.json").write_text("{}")
    main(tmp_path / "in", tmp_path / "expected")
    return tmp_path


def shares(folder: Path, ranks: int, attempt: int = 0) -> list[list]:
    """Return the windows that each rank has rendered."""
    return [eval((folder / f"calls{attempt}.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_makes_the_same_bytes(folder, ranks):
    done = run(ranks, script(folder, "time.sleep(0.005)"), "--report", str(folder / "report.json"))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == contents(folder / "expected")
    windows = [window for share in shares(folder, ranks) for window in share]
    assert len(windows) == len({*windows}) > 200
    assert min(map(len, shares(folder, ranks))) > len(windows) / ranks / 3
    assert done.stdout.count("Converted 3 shards") == 1
    report = json.loads((folder / "report.json").read_text())
    assert report["bytes_written"] == sum(
        path.stat().st_size for path in (folder / "out").glob("*.safetensors")
    )
    again = run(ranks, script(folder))
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("Nothing to do: the output is complete\n")


def test_ranks_share_a_single_file(tmp_path):
    tensors = {name: t for shard in several_kinds()[0].values() for name, t in shard.items()}
    write_checkpoint(tmp_path / "in", {"model.safetensors": tensors}, CONFIG, index=False)
    main(tmp_path / "in", tmp_path / "expected")
    done = run(3, script(tmp_path, "time.sleep(0.1)"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert min(map(len, shares(tmp_path, 3))) > 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_loses_nothing(folder, killed):
    disturb = (
        f"time.sleep(0.005)\n    if len(calls) >= 30 and rank == {killed} and attempt == 0: "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run(2, script(folder, disturb))
    assert done.returncode == 1
    left = contents(folder / "out")
    assert not {INDEX, "config.json"} & {*left}
    expected = contents(folder / "expected")
    assert all(expected[name] == data for name, data in left.items() if not name.endswith(".tmp"))
    done = run(2, script(folder))
    assert done.returncode == 0, done.stderr
    assert contents(folder / "out") == expected


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
    assert "holds other.safetensors, which this checkpoint has not" in done.stderr
    assert contents(folder / "out") == {"other.safetensors": b"mine"}


def test_a_rank_with_another_input_is_refused(folder):
    shutil.copytree(folder / "in", folder / "other")
    for path in [*(folder / "other").glob("*.safetensors"), folder / "other" / INDEX]:
        path.write_bytes(path.read_bytes().replace(b"0.mlp.gate.w", b"0.mlp.gate.v"))
    path = script(folder)
    other = "sys.argv = [a + '/../other' * (rank and a.endswith('/in')) for a in sys.argv]"
    path.write_text(path.read_text().replace("status =", f"{other}\nstatus ="))
    done = run(2, path)
    assert done.returncode == 1
    assert "rank 1 finds a checkpoint there with the plan" in done.stderr
    assert not (folder / "out").exists() or contents(folder / "out") == {}


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
    for shard in (folder / "out").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-2] + b"ab")
    done = run(2, path, "--verify")
    assert done.returncode == 1
    assert done.stdout.count(": element [") == 3
    assert "is not what the input gives, in 3 places" in done.stderr


def agents(path: Path, hosts: list[tuple[list[str], str]]) -> list[subprocess.Popen]:
    """Run a torchrun agent with two ranks on each host: a prefix of its command, its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, processes = path.parent, []
    for prefix, address in hosts:
        command = [*prefix, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend"]
        command += ["c10d", "--rdzv-endpoint", f"{hosts[0][1]}:{port}", "--rdzv-id", "job"]
        command += ["--local-addr", address, "--rdzv-conf", f"is_host={int(not processes)}"]
        command += [path, "--input-fp8-hf-path", folder / "in", "--output-bf16-hf-path"]
        command += [folder / "out", "--device", "cpu", "--workers", "2"]
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
    assert min(map(len, shares(folder, 4))) > 10


@pytest.fixture
def namespaces():
    """Two network namespaces that see each other alone, as two hosts."""
    names, veths = (f"fp8a{os.getpid()}", f"fp8b{os.getpid()}"), ("fp8veth0", "fp8veth1")
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


def test_an_interrupted_job_can_go_on(folder):
    path = script(folder, "time.sleep(0.02)")
    command = [*TORCHRUN, "--nproc-per-node", "2", path, "--input-fp8-hf-path", folder / "in"]
    command += ["--output-bf16-hf-path", folder / "out", "--device", "cpu", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("out/*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not {INDEX, "config.json"} & {*contents(folder / "out")}
    assert run(2, script(folder)).returncode == 0
    assert contents(folder / "out") == contents(folder / "expected")
