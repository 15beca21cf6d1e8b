"""Several processes that work together, forked from one that has imported what they need, which takes seconds."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import Ended, run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train_adapter", "pardec.measures.examiner", "launched"])
_SECONDS = 300  # after which processes that wait for each other are given up


class Launched:
    """Processes as torchrun starts them, each of which runs the same function."""

    def __init__(self, count: int, function: Callable[..., Any], *arguments: object, local: int | None = None):
        """Starts `count` of them, `local` on each machine, default all on one; `function` is one of a module."""
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local or count, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = free_port()
        self.processes, self._ends = [], []
        for rank in range(count):
            end, childs_end = _CONTEXT.Pipe(duplex=False)
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank % (local or count)} if count > 1 else {}
            child = _CONTEXT.Process(target=_run, args=(childs_end, environment, function, arguments), daemon=True)
            child.start()
            childs_end.close()
            self.processes.append(child)
            self._ends.append(end)

    def results(self) -> list[Any]:
        """What the function returned in each; fails where one has ended without, or an hour glass has run out."""
        found = []
        try:
            for rank, end in enumerate(self._ends):
                if not end.poll(_SECONDS):
                    pytest.fail(f"process {rank}: expected a result within {_SECONDS} seconds, found none")
                found.append(end.recv())
        except EOFError:
            pytest.fail(f"process {rank}: expected a result, found that it has ended")
        finally:
            self.kill()
        return found

    def codes(self) -> list[int | None]:
        """How each ended of those that end without a result: its exit code, or less than 0 the signal that it got."""
        for process in self.processes:
            process.join(_SECONDS)
        return [process.exitcode for process in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one of them."""
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """Ends them all, at whatever they are, and waits until they are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _run(end, environment: dict[str, object], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures would take most of the time
    end.send(function(*arguments))


def program(name: str, *arguments: str) -> Ended:
    """Runs the program of that name in `train/`, as `programs.run` does."""
    return run(importlib.import_module(name).main, *arguments)


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
