"""Shared fixtures: the packaged base, its tokenizer, tiny random models; nothing here touches the network."""

import copy
import gc
import itertools
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# models are tiny, processes share the processors, and sums depend on the number of threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import setuptools  # noqa: F401 - brings its own distutils, before inductor imports Python's to look for a compiler
import torch
from data_samples import CHAT_TEMPLATE, source_names
from hub_server import Hub
from huggingface_hub import constants
from tiny_models import make_adapter
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import save_adapter
from pardec.data import shards
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import fingerprint

HERE = Path(__file__).parent
FIRST = ("eval", "train", "trees", "tuning")
# what a shell starts in the background ignores Ctrl-C, and so would the programs that tests stop by it
signal.signal(signal.SIGINT, signal.default_int_handler)
# so that an assertion of a helper that fails shows its values
pytest.register_assert_rewrite("adapter_samples", "programs", "recorded_steps", "sampling_oracle")


@pytest.fixture(scope="session")
def tiny_base():
    """The packaged model in float32; shared, so tests must leave it as they found it."""
    return load_base("tiny-python", device="cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """The packaged model's tokenizer; shared, so tests must leave it as they found it."""
    return load_tokenizer("tiny-python")


@pytest.fixture(scope="session")
def packaged_adapter(tiny_base, tokenizer):
    """Factory of adapters of random numbers for the packaged model."""

    def make(num_speculative_tokens: int = 2, **parts) -> Adapter:
        adapter = make_adapter(tiny_base, num_speculative_tokens, **parts)
        adapter.metadata.base.name = "tiny-python"
        adapter.metadata.fingerprint = fingerprint(tiny_base, tokenizer)
        return adapter

    return make


@pytest.fixture(scope="session")
def adapters(packaged_adapter, tmp_path_factory) -> Path:
    """Folder of two adapters of the packaged model, `embeddings` and `lora`, K = 2; shared, so for reading only."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(packaged_adapter(), folder / "embeddings")
    save_adapter(packaged_adapter(lora_rank=2), folder / "lora")
    return folder


@pytest.fixture(scope="session")
def make_llama():
    """Factory of tiny random Llamas, the same weights for the same seed."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **config) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 0,
            # large enough that attention and logits are far from uniform
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
        return model.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture
def chat_tokenizer(tokenizer):
    """The packaged model's tokenizer with a chat template; changing it is safe."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT_TEMPLATE
    return chat


@pytest.fixture
def bos_tokenizer(chat_tokenizer):
    """One that puts BOS in front of every text itself, as those of many families do; changing it is safe."""
    bos = chat_tokenizer.bos_token
    front = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, chat_tokenizer.bos_token_id)])
    chat_tokenizer.backend_tokenizer.post_processor = front
    return chat_tokenizer


@pytest.fixture
def source_folder(tmp_path):
    """Modules of every split, and what must be left out."""
    folder = tmp_path / "lib"
    for name in source_names():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {name}\n" + "x = 1\n" * 40)
    for left_out in ("encodings/e.py", "site-packages/s.py", "a/__pycache__/c.py", "b/site-packages/p/q.py"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_text("# left out\n" + "x = 1\n" * 40)
    (folder / "tiny.py").write_text("x" * 199)
    (folder / "huge.py").write_text("x" * 400_001)
    (folder / "notes.txt").write_text("x" * 300)
    (folder / "folder.py").mkdir()
    return folder


_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _own_shards(tmp_path_factory, monkeypatch):
    """Tokenised data of a test are its own, in a folder that is made where there are any: most tests have none."""
    own = tmp_path_factory.getbasetemp() / "shards" / str(next(_NUMBERS))
    monkeypatch.setattr(shards, "cache_folder", lambda: own)


@pytest.fixture
def synced(monkeypatch):
    """Inodes that a save has asked to be on the disk for good; waiting for it would take most of the time."""
    inodes = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: inodes.add(os.fstat(descriptor).st_ino))
    return inodes


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, which huggingface_hub talks to, with an empty cache and without a token."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS, which is plain HTTP
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of its retries
    server.start()
    yield server
    server.stop()


def pytest_collection_modifyitems(items):
    """Rooms whose files take longest begin, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: HERE not in item.path.parents or item.path.relative_to(HERE).parts[0] not in FIRST)


def pytest_collection_finish():
    """What has been imported stays: collections need not look through it again and again, nor after 700 objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)  # a tenth of the time goes into collections otherwise
