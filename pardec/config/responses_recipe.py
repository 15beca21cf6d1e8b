"""The recipe of `train/generate_responses.py`: which prompts the base continues, how, and where its responses go."""

from typing import Literal

from pydantic import Field, model_validator

from pardec.config.adapter_recipe import RowsConfig
from pardec.config.recipe_files import Section
from pardec.decoding.sampling import make_warpers
from pardec.errors import shown


class ResponsesRecipe(Section):
    """Everything that a run is told.

    Attributes:
        base: folder or hub name of the model; `tiny-python` is the packaged one.
        output: JSONL file that the responses are appended to; what is known of it goes beside it, into
            `<output>.json`.
        data: where prompts come from, without what is held out: texts give pieces, conversations what stands before
            their first answer, rows with a loss_mask what stands before their first token to learn.
        adapter: directory of an adapter of this base that drafts; the law of the responses is the same. Default
            none: plain decoding, which is faster where a batch keeps the device busy, as on a CPU.
        num_responses: rows of the file.
        prompt_tokens: of a prompt that is a piece of text.
        max_new_tokens: limit of a response; an EOS token ends it earlier, and belongs to it.
        temperature: at which responses are sampled; 0 is greedy for all of them.
        top_k: keep the k likeliest tokens; null keeps all.
        top_p: keep the likeliest tokens that sum to p.
        min_p: keep tokens at least min_p times as likely as the likeliest.
        greedy_fraction: so large a share of the prompts is continued greedily, the rest sampled: the two differ, and
            an adapter that serves both learns from both.
        batch_size: responses that are generated together, and appended together.
        seed: of the prompts and of what is sampled.
        dtype: default float32 on a CPU, the checkpoint's own on CUDA.
    """

    base: str
    output: str
    data: RowsConfig
    adapter: str | None = None
    num_responses: int = Field(default=8192, ge=1)
    prompt_tokens: int = Field(default=128, ge=1)
    max_new_tokens: int = Field(default=160, ge=1)
    temperature: float = 0.8
    top_k: int | None = 10
    top_p: float | None = None
    min_p: float | None = None
    greedy_fraction: float = Field(default=0.0, ge=0, le=1)
    batch_size: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "ResponsesRecipe":
        make_warpers(self.temperature, self.top_k, self.top_p, self.min_p)
        return self

    @model_validator(mode="after")
    def _training_reads_it(self) -> "ResponsesRecipe":
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"output: expected a path that ends in .jsonl, found {shown(self.output)}")
        return self

    @property
    def share_of_greedy(self) -> float:
        """Of all responses."""
        return 1.0 if self.temperature == 0 else self.greedy_fraction
