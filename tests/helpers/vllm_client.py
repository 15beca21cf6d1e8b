"""A server started by a command line as a user types it, and a client of its OpenAI-compatible interface."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

PATIENCE = 300  # seconds for a server to start on a busy machine


class Server:
    """Runs from `with` to its end."""

    def __init__(self, command: str, environment: dict[str, str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = f"{command} --host 127.0.0.1 --port {self.port}"
        self.environment = environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

    def __enter__(self) -> "Server":
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            self.command, shell=True, stdout=self.log, stderr=self.log, env=self.environment, start_new_session=True
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self._get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        said = self.said()
        self.__exit__()
        raise AssertionError(f"expected a server, found none: {said[-4000:]}")

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()

    def said(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read()

    def stream(self, **asked: Any) -> list[str]:
        """Texts of a completion as they come."""
        body = json.dumps(asked | {"stream": True}).encode()
        request = urllib.request.Request(self._url("/v1/completions"), body, {"Content-Type": "application/json"})
        chunks = []
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if text and text != "[DONE]":
                    chunks += [choice["text"] for choice in json.loads(text)["choices"]]
        return chunks

    def counter(self, name: str) -> float:
        """A counter of its metrics."""
        lines = [line for line in self._get("/metrics").splitlines() if line.startswith(f"vllm:{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self._url(path), timeout=10) as answer:
            return answer.read().decode()

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"
