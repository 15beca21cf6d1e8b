"""How much memory training takes at least, to be said before anything is allocated."""

from pardec.target.forward import TargetModel, text_config


def adapter_bytes(target: TargetModel, law_rows: int, mask_rows: int, num_learned: int) -> int:
    """What a process holds for a forward of an adapter's training, beside the weights.

    Args:
        target: the frozen model.
        law_rows: mask rows of all anchors, whose target's law is kept.
        mask_rows: those of them that run together.
        num_learned: numbers that are learned.
    """
    # the law about three times while it is made; logits of those of a forward about six times in float32 with their
    # gradients
    logits = (3 * law_rows + 6 * mask_rows) * target.vocab_size * 4
    hidden = getattr(text_config(target.base), "hidden_size", target.embedding_dim)
    # numbers in float32, gradients and the two moments of AdamW
    return logits + mask_rows * target.num_layers * hidden * 24 * 4 + num_learned * 4 * 4


def pretraining_bytes(num_parameters: int, num_rows: int, vocab_size: int) -> int:
    """What a process holds for weights, optimisers and the logits of a forward's rows."""
    # float32 weights, gradients and at most two moments; logits in float32 with their softmax and gradient
    return num_parameters * 4 * 4 + num_rows * vocab_size * 4 * 3
