"""What the tests of programs that train share."""

from pathlib import Path

import pytest
from adapter_runs import WHOLE, brief, train
from data_samples import code_text


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    """The run of the fixture `whole`, made before, is one with everything."""
    brief(monkeypatch)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A small text; shared, so whoever changes it changes it back."""
    path = tmp_path_factory.mktemp("data") / "code.txt"
    path.write_text(code_text(900))
    return path


@pytest.fixture(scope="session")
def whole(text_file, tmp_path_factory) -> Path:
    """The folder that a run which is not cut off leaves."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    ended = train(output, text_file, *WHOLE)
    assert ended.code == 0, ended.err[-2000:]
    return output
