"""A fleet on this machine: a tracker, servers, and what happens when something goes away."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
import pytest
from tuning_run import SPEC, WORKLOAD
from tvm import IRModule, tirx

from deft_tvm.build import tasks_for
from deft_tvm.cli import main
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import TuningError
from deft_tvm.manifest import installed_versions
from deft_tvm.schedules import tiles_of
from deft_tvm.tuning import fleet as fleets
from deft_tvm.tuning.fleet import Fleet
from deft_tvm.tuning.messages import Answer, Outcome, Profiled
from deft_tvm.tuning.probe import write_profile
from deft_tvm.tuning.space import Space
from deft_tvm.tuning.subject import subjects
from deft_tvm.tuning.tracker import (
    Address,
    check_tracker,
    free_servers,
    serve_command,
    tune_command,
)

T = TypeVar("T")

DEVICE = DeviceProfile.detect()
KEY = "twins"
PATIENCE = 60.0
"""Seconds in which everything here ends; a process takes a few to start."""

TASKS = {task.name: task for task in tasks_for(SPEC, DEVICE)}
TILES = tiles_of(TASKS.values())
SUBJECT = subjects(SPEC, WORKLOAD, TILES, DEVICE)[0]
SPACE = Space(SUBJECT, TASKS[SUBJECT.kernel])


def candidate(number: int) -> IRModule:
    return SPACE.candidate(number).sch.mod


def calling(function: str, *arguments: int) -> IRModule:
    """A candidate that does nothing but call a function of the C library."""
    ((name, kernel),) = candidate(SPACE.start).functions_items()
    call = tirx.call_extern("int32", function, *arguments)
    return IRModule({name: kernel.with_body(tirx.Evaluate(call))})


def soon(call: Callable[[], T]) -> Future[T]:
    """The result of `call`, on a thread that does not keep the tests from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def measured(fleet: Fleet, *modules: IRModule) -> list[Outcome]:
    """What comes of all at once."""
    ran = [soon(lambda m=module: fleet.time([m], SUBJECT, 0.1)[0]) for module in modules]
    return [future.result(PATIENCE) for future in ran]


def statuses(fleet: Fleet, *modules: IRModule) -> list[str]:
    return [outcome.status for outcome in measured(fleet, *modules)]


def by_status(outcome: Outcome) -> str:
    return outcome.status


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@dataclass
class Running:
    """A process of its own group, and a file of what it says."""

    process: subprocess.Popen
    said: Path

    @classmethod
    def start(cls, said: Path, *command: str, **environment: str) -> Running:
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        with said.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=file,
                env=os.environ | environment | {"PYTHONPATH": paths},
                start_new_session=True,
            )
        return cls(process, said)

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def sessions(self) -> int:
        return self.said.read_text().count("start serving")

    def kill_group(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is written; the machine's profile is there and need not be measured."""
    made = tmp_path_factory.mktemp("fleet")
    write_profile(DEVICE, made)
    return made


@pytest.fixture(scope="module")
def tracker(folder: Path) -> Iterator[Address]:
    port = free_port()
    ports = ("--port", str(port), "--port-end", str(port + 1))
    command = ("-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1", *ports)
    running = Running.start(folder / "tracker", *command)
    until(lambda: "bind to" in running.said.read_text())
    yield Address("127.0.0.1", port)
    running.kill_group()


@pytest.fixture(scope="module")
def servers(folder: Path, tracker: Address) -> Iterator[list[Running]]:
    """Two servers of `KEY`."""
    program = ("-c", "from deft_tvm.cli import main; main()", "serve-device")
    options = ("--tracker", str(tracker), "--key", KEY)
    running = [
        Running.start(
            folder / f"server{i}",
            *(*program, *options, "--port", str(free_port())),
            DEFT_TVM_LOGS=str(folder),
        )
        for i in range(2)
    ]
    until(lambda: all("bind to" in server.said.read_text() for server in running))
    until(lambda: free_servers(tracker, KEY) == 2)
    yield running
    for server in running:
        server.kill_group()


@pytest.fixture(scope="module")
def fleet(tracker: Address, servers: list[Running]) -> Iterator[Fleet]:
    made = Fleet(str(tracker), KEY, start_seconds=30, run_limit=6)
    yield made
    made.close()


# Refusals


@pytest.mark.parametrize("text", ["", "9190", "host:", "host:port", "host:0", "host:70000"])
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(TuningError, match=f"tracker is '{text}'; expected HOST:PORT, as in 127"):
        Fleet(text, KEY)


def test_a_tracker_that_is_not_there_is_refused() -> None:
    port = free_port()
    with pytest.raises(
        TuningError, match=rf"no tracker answers at 127.0.0.1:{port}.*start one with `python -m tvm"
    ):
        soon(lambda: Fleet(f"127.0.0.1:{port}", KEY)).result(PATIENCE)


@pytest.mark.parametrize("port", [9190, 9198, 9199, 9391, 65535])
def test_the_tracker_that_is_told_to_be_started_listens_where_it_is_asked(
    tmp_path: Path, port: int
) -> None:
    address = Address("127.0.0.1", port)
    try:
        socket.create_server(address).close()
    except OSError:
        pytest.skip(f"port {port} is taken")
    with pytest.raises(TuningError) as refused:
        check_tracker(address)
    python, *command = shlex.split(str(refused.value).split("`")[1])
    assert python == "python"
    running = Running.start(tmp_path / "said", *command)
    try:
        until(lambda: "bind to" in running.said.read_text())
        assert f"bind to {address}" in running.said.read_text()
        until(lambda: answers(address))
    finally:
        running.kill_group()


def answers(address: Address) -> bool:
    try:
        check_tracker(address)
    except TuningError:
        return False
    return True


def test_what_is_told_to_be_typed_is_one_argument_each() -> None:
    address = Address("127.0.0.1", 9391)
    for command in (serve_command, tune_command):
        assert shlex.split(command(address, "my epyc"))[-3:] == [str(address), "--key", "my epyc"]


def test_something_else_that_listens_is_no_tracker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fleet = soon(lambda: Fleet(f"127.0.0.1:{port}", KEY))
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 400")
        with pytest.raises(TuningError, match="what listens there is no tracker"):
            fleet.result(PATIENCE)


def test_a_key_without_servers_is_refused_with_those_that_have_some(
    tracker: Address, servers: list[Running]
) -> None:
    sentence = rf"no server of key 'other' at {tracker}; expected one of \({KEY}\): start one .*"
    with pytest.raises(
        TuningError, match=sentence + f"deft-tvm serve-device --tracker {tracker} --key other"
    ):
        soon(lambda: Fleet(str(tracker), "other")).result(PATIENCE)


def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *answers: Answer) -> Future[Fleet]:
    """A fleet of servers that tell these profiles."""
    key = tmp_path / "answers"
    key.write_bytes(b"\n".join(map(msgspec.json.encode, answers)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setattr(fleets, "REMOTE", "fake_remote")
    monkeypatch.setattr(fleets, "free_servers", lambda *_: len(answers))
    return soon(lambda: Fleet("127.0.0.1:9190", str(key)))


def test_all_servers_of_a_key_have_the_same_device(monkeypatch, tmp_path) -> None:
    profiles = [
        Profiled(DeviceProfile.nominal(cores=cores), installed_versions()) for cores in (2, 4)
    ]
    with pytest.raises(TuningError, match=r"have different devices: generic-.*c and generic-.*c;"):
        planted(monkeypatch, tmp_path, *profiles).result(PATIENCE)


def test_a_server_with_another_compiler_is_not_taken(monkeypatch, tmp_path) -> None:
    right, wrong = (
        Profiled(DEVICE, installed_versions() | {"tvm": version})
        for version in (installed_versions()["tvm"], "0.1")
    )
    with pytest.raises(TuningError, match=r"has tvm 0\.1; expected 0\.\d+.* as here"):
        planted(monkeypatch, tmp_path, wrong).result(PATIENCE)
    fleet = planted(monkeypatch, tmp_path, wrong, right).result(PATIENCE)
    assert fleet.width == 1
    fleet.close()


# The command


def test_a_server_that_others_can_reach_is_warned_of(monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deft_tvm.tuning.serving.serve", interrupted)
    monkeypatch.setattr("deft_tvm.tuning.serving.device_here", lambda: DEVICE)
    monkeypatch.setattr("deft_tvm.tuning.tracker.check_tracker", lambda _: None)
    said = {}
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(SystemExit) as end:
            main(["serve-device", "--host", host, "--port", "9091"])
        assert end.value.code == 0
        said[host] = capsys.readouterr()
    assert "WARNING" not in said["127.0.0.1"].err
    assert "Whoever can connect to 0.0.0.0:9091 can run code" in said["0.0.0.0"].err
    assert "ssh -N -R 9190:127.0.0.1:9190 -L 9091:127.0.0.1:9091" in said["0.0.0.0"].err
    for printed in said.values():
        assert f"deft-tvm tune --rpc 127.0.0.1:9190 --key {DEVICE.slug}" in printed.out


# Candidates


def test_candidates_run_on_all_servers_at_once(fleet: Fleet, servers: list[Running]) -> None:
    assert fleet.width == 2 and fleet.device == DEVICE
    outcomes = measured(fleet, *map(candidate, range(3)))
    assert [outcome.status for outcome in outcomes] == ["ok"] * 3
    assert all(len(outcome.latency_us) >= 6 for outcome in outcomes)
    assert [server.sessions for server in servers] == [1, 1]


def test_a_crash_says_something_of_the_candidate_and_costs_no_session(
    fleet: Fleet, servers: list[Running]
) -> None:
    crashed, after, beside = measured(fleet, calling("abort"), candidate(0), candidate(1))
    assert crashed.status == "runtime" and "SIGABRT" in crashed.error
    assert (after.status, beside.status) == ("ok", "ok")
    assert [server.sessions for server in servers] == [1, 1]


def test_a_hang_and_a_session_that_is_killed_cost_a_session_each(
    fleet: Fleet, servers: list[Running]
) -> None:
    hanging = [soon(lambda: fleet.time([calling("pause")], SUBJECT, 0.1)) for _ in range(2)]
    time.sleep(1)
    (session,) = psutil.Process(servers[0].process.pid).children()
    session.kill()
    lost, late = sorted((future.result(PATIENCE)[0] for future in hanging), key=by_status)
    assert lost.status == "lost" and "the session with a server of key" in lost.error
    assert late.status == "timeout" and "no answer within 6 s" in late.error
    assert "a session ended" in servers[0].said.read_text()
    # Both sleep for a second, so that each has a server of its own.
    assert statuses(fleet, calling("sleep", 1), calling("sleep", 1)) == ["wrong", "wrong"]
    assert [server.sessions for server in servers] == [2, 2]


def test_what_is_left_goes_on_until_nothing_is(fleet: Fleet, servers: list[Running]) -> None:
    """One server is killed with a candidate on it, then the other is terminated."""
    first, second = servers
    for place in fleet._places:
        place._worker.start_seconds = 15
    processes = first.descendants
    slept = [soon(lambda: fleet.time([calling("sleep", 2)], SUBJECT, 0.1)) for _ in range(2)]
    time.sleep(1)
    first.process.kill()  # alone: what it has started ends by itself
    first.process.wait()
    ended = sorted((future.result(PATIENCE)[0] for future in slept), key=by_status)
    assert [outcome.status for outcome in ended] == ["lost", "wrong"]
    assert statuses(fleet, *map(candidate, range(3))) == ["ok"] * 3

    processes += second.descendants
    second.process.terminate()
    assert second.process.wait(PATIENCE) == 0 and "stopped" in second.said.read_text()
    assert psutil.wait_procs(processes, PATIENCE)[1] == []
    assert statuses(fleet, candidate(0)) == ["lost"]
    gone = rf"no server of key '{KEY}' at .* is left \(.*\); start one .* tune again: all finished"
    with pytest.raises(TuningError, match=gone):
        statuses(fleet, candidate(0))
    assert fleet.width == 0
