"""vLLM in a process of its own, in its own environment: starts it, asks it, ends it. Knows no adapter."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).with_name("vllm_engine.py")


@dataclass(frozen=True)
class Served:
    """What one call gave.

    Attributes:
        tokens: new ones, of each prompt.
        cpu_seconds: of the engine's process, all threads together.
        num_drafts: rounds that verified a draft, over all prompts.
        accepted_by_position: drafted tokens that were accepted, by position; empty where nothing is drafted.
    """

    tokens: list[list[int]]
    cpu_seconds: float
    num_drafts: int
    accepted_by_position: list[int]

    @property
    def num_new_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_cpu_second(self) -> float:
        """Of all prompts."""
        return self.num_new_tokens / self.cpu_seconds

    @property
    def acceptance_length(self) -> float:
        """As vLLM counts it, its exact first token and the bonus token included; 1 where nothing is drafted."""
        return 1 + sum(self.accepted_by_position) / self.num_drafts if self.num_drafts else 1.0

    @property
    def rates(self) -> list[float]:
        """Of acceptance, by position."""
        return [number / self.num_drafts for number in self.accepted_by_position]


class VllmProcess:
    """Runs from `with` to its end.

    Attributes:
        version: of vLLM.
        own_parameters: numbers that the draft holds and the target does not.
        target_parameters: numbers of the target.
    """

    def __init__(self, python: str | Path, asked: Mapping[str, Any], *, threads: int = 1):
        """Nothing is started yet.

        Args:
            python: of the environment that holds vLLM.
            asked: the first line that vllm_engine.py reads.
            threads: of torch.
        """
        self._python, self._asked, self._threads = str(python), asked, threads

    def __enter__(self) -> "VllmProcess":
        """Starts it.

        Raises:
            ValueError: with the last line that it wrote, if it ends before it can be asked.
        """
        self._log = tempfile.TemporaryFile("w+")
        self._process = None
        try:
            # its own programs first, nothing of this checkout on the path but what is installed there
            kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
            programs = os.pathsep.join([str(Path(self._python).parent), os.environ.get("PATH", "")])
            self._process = subprocess.Popen(
                [self._python, "-P", str(ENGINE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=kept | {"PATH": programs, "OMP_NUM_THREADS": str(self._threads)},
                text=True,
            )
            about = self._ask(self._asked)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise ValueError(f"vllm: expected a python, found {self._python} ({error.strerror})") from None
            raise
        self.version, self.own_parameters = about["version"], about["own_parameters"]
        self.target_parameters = about["target_parameters"]
        return self

    def __exit__(self, *error: object) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def decode(self, prompts: list[list[int]], max_new_tokens: int, law: Mapping[str, Any] | None = None) -> Served:
        """Greedy continuations of so many tokens each, EOS ignored; prompts are token ids.

        Args:
            prompts: of each sequence.
            max_new_tokens: of each.
            law: more of vLLM's SamplingParams, such as penalties.
        """
        found = self._ask({"prompts": prompts, "max_new_tokens": max_new_tokens, "law": dict(law or {})})
        counted = found["counted"]
        by_position = counted.get("num_accepted_tokens_per_pos", [])
        return Served(found["tokens"], found["cpu_seconds"], counted.get("num_drafts", 0), by_position)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(dict(question)), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._log.seek(0)
        # pydantic ends with the address of a page, and says what was wrong before it
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        said = [line for line in lines if "For further information" not in line] or ["nothing"]
        raise ValueError(f"vllm: expected an engine that answers, found exit code {code}: {said[-1].strip()[:300]}")
