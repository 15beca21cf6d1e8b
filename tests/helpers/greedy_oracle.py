"""Random prompts, and what transformers' own greedy generate makes of them."""

import torch

PROMPT_LENGTHS = (11, 3, 17, 6)


def prompts(vocab_size: int, lengths=PROMPT_LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def plain_generate(model, prompt: list[int], num_tokens: int, **options) -> list[int]:
    """The oracle: transformers' greedy generate on one prompt alone."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()
