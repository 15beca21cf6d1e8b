"""Random prompts, and what transformers' own greedy generate makes of them."""

from functools import cache

import torch
from tiny_models import tiny_model

PROMPT_LENGTHS = (11, 3, 17, 6)


def prompts(vocab_size: int, lengths=PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def plain_generate(model, prompt: list[int], num_tokens: int, **options) -> list[int]:
    """The oracle: transformers' greedy generate on one prompt alone."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@cache
def tokens_of_generate(family: str, vocab_size: int, num_tokens: int, lengths: tuple[int, ...] = PROMPT_LENGTHS):
    """What generate makes of `prompts` with a tiny model that nobody else has touched; for reading only."""
    model = tiny_model(family)
    return [plain_generate(model, prompt, num_tokens) for prompt in prompts(vocab_size, lengths)]
