"""Text in pieces is the text in one piece, for tokenizers that take spaces out again as well."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pardec.decoding.output import TextStream

WORDS = ["it", "do", "n't", "'", "s", "m", "'s", "'m", "'ve", "'re", ".", "!", "?", ",", "x", "[UNK]"]


def word_tokenizer(**options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **options)


@pytest.mark.parametrize("cleans_up", [True, False])
def test_pieces_join_to_the_whole_text(cleans_up):
    tokenizer = word_tokenizer(clean_up_tokenization_spaces=cleans_up)
    source = random.Random(0)
    for _ in range(300):
        ids = [source.randrange(len(WORDS)) for _ in range(source.randint(1, 20))]
        stream, pieces, start = TextStream(tokenizer), [], 0
        while start < len(ids):
            end = start + source.randint(1, 3)
            pieces.append(stream.put(ids[start:end], last=end >= len(ids)))
            start = end
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_only_what_a_later_token_may_still_change_is_held_back():
    cleaning = TextStream(word_tokenizer(clean_up_tokenization_spaces=True))
    assert [cleaning.put([id], last=False) for id in (0, 1, 2, 14)] == ["", "it", "", " don't"]
    plain = TextStream(word_tokenizer(clean_up_tokenization_spaces=False))
    assert [plain.put([id], last=False) for id in (0, 1)] == ["it", " do"]


def test_a_tokenizer_that_only_says_that_it_cleans_up_holds_nothing_back(tokenizer, monkeypatch):
    """Many of the BPE kind say so, and transformers does not do it for them."""
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", True)
    stream = TextStream(tokenizer)
    assert "".join(stream.put([id], last=False) for id in tokenizer("def f(x):").input_ids) == "def f(x):"


@pytest.mark.parametrize(
    "tokens",
    [
        ["▁hi", "<0x0A>", "<0xF0>", "<0x9F>"],
        ["▁hi", "<0x0A>", "<0xF0>", "▁a"],
        ["▁hi", "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>", "▁a"],
        ["▁hi", "<0x0A>", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁a"],
    ],
    ids=" ".join,
)
def test_bytes_that_a_tokenizer_falls_back_to_are_read_together(tokens):
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hi", "▁a"]
    bpe = models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], byte_fallback=True, unk_token="<unk>")
    own = Tokenizer(bpe)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    ids, stream = [vocabulary.index(token) for token in tokens], TextStream(tokenizer)
    pieces = [stream.put([token], last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[0] == "hi"
