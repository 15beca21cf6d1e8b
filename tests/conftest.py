"""Shared fixtures: the packaged base, its tokenizer, tiny random models; nothing here touches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pardec.base import load_base, load_tokenizer


@pytest.fixture(scope="session")
def tiny_base():
    """The packaged model in float32; shared, so tests must leave it as they found it."""
    return load_base("tiny-python", device="cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """The packaged model's tokenizer; shared, so tests must leave it as they found it."""
    return load_tokenizer("tiny-python")


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
