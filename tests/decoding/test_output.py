"""Text in pieces is the text in one piece, for tokenizers that take spaces out again as well."""

import random

import pytest
from tokenizers import Tokenizer
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
