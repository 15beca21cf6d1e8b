"""Rows and files for the tests of data."""

import itertools
import json

import numpy as np

from pardec.data.python_sources import TEST, TRAIN, VALIDATION, split_of
from pardec.data.tokenising import Document

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


CHAT = [
    {"role": "user", "content": "Say hi"},
    {"role": "assistant", "content": "hi there!"},
    {"role": "user", "content": "And bye"},
    {"role": "assistant", "content": "bye"},
]


_FUNCTIONS = "def first(x):\n    return x + 1\n\n\ndef second(x):\n    return x + 2\n\n\ndef first(x):\n    return"
# texts that repeat themselves, of several lengths
REPEATING = (_FUNCTIONS, "x = 1\n" * 9, _FUNCTIONS[20:])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(ids):
    """A document of which every token counts."""
    return Document(np.array(ids, dtype=np.int32))


def masked(ids, mask):
    """A document of which those tokens count whose mask is 1."""
    return Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


def code_text(num_functions: int) -> str:
    """Python text of functions that differ in a number."""
    return "".join(f"def f_{i}(x):\n    return x + {i}\n\n\n" for i in range(num_functions))


def source_names():
    """60 modules of the training split and 3 of each other, in two folders."""
    wanted, names = {TRAIN: 60, VALIDATION: 3, TEST: 3}, []
    for number in itertools.count():
        name = f"{('a', 'b/deep')[number % 2]}/m{number}.py"
        if wanted[split_of(name)]:
            wanted[split_of(name)] -= 1
            names.append(name)
        if not any(wanted.values()):
            return names
