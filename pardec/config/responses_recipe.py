"""The recipe of `train/generate_responses.py`: which prompts the base continues, how, and where its responses go."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pardec.config.adapter_recipe import RowsConfig
from pardec.config.recipe_files import Section
from pardec.data.responses.prompt_mix import Kind, PromptSource
from pardec.decoding.sampling import make_warpers
from pardec.errors import shown


class SourceSection(Section):
    """One source of chat prompts.

    Attributes:
        kind: `questions` of a JSONL file; `code`, requests about functions of installed Python sources; `passages`,
            requests about pieces of text.
        path: the file of questions; `python-packages` or `python-stdlib` for code; these, whose documentation is
            meant, a text file or a folder of them for passages.
        weight: its share of the responses, of the sum of all weights; 0 leaves it out.
        key: of the questions in their rows; default the first of `prompt`, `question`, `instruction`, `text`,
            `messages` and `conversations` that a row has.
    """

    kind: Kind
    path: str
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    key: str | None = None

    @model_validator(mode="after")
    def _only_questions_have_a_key(self) -> "SourceSection":
        if self.key is not None and self.kind != "questions":
            raise ValueError(f"data.mix: expected a key for questions only, found {shown(self.key)} for {self.kind}")
        return self

    def source(self) -> PromptSource:
        """The same as the room of data takes it."""
        return PromptSource(self.kind, self.path, self.weight, self.key)


class PromptsConfig(RowsConfig):
    """Where prompts come from: `path`, of which pieces are continued, or `mix`, of which chat prompts are drawn.

    Attributes:
        path: as of other data; with format, subset and split.
        mix: sources of chat prompts, rendered by the base's chat template.
        follow_ups: share of the prompts of a mix behind whose answer the user says something more, which is answered
            too: both answers are in the row, and learned.
    """

    path: str | None = None  # type: ignore[assignment]
    mix: list[SourceSection] | None = Field(default=None, min_length=1)
    follow_ups: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _is_of_one_form(self) -> "PromptsConfig":
        given = [key for key in ("path", "mix") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"data: expected either path or mix, found {' and '.join(given) or 'neither'}")
        if self.path is not None and self.follow_ups:
            raise ValueError(f"data.follow_ups: expected data.mix beside it, found path {shown(self.path)}")
        if self.mix is not None and not any(source.weight for source in self.mix):
            raise ValueError("data.mix: expected at least one weight above 0, found none")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_form(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # what was written beside responses before there were mixes still belongs to the same recipe
        own = RowsConfig.model_fields if self.mix is None else ("mix", "follow_ups")
        return {key: value for key, value in dump(self).items() if key in own}

    @property
    def name(self) -> str:
        """As messages say where prompts come from."""
        return self.path or "data.mix"


class ResponsesRecipe(Section):
    """Everything that a run is told.

    Attributes:
        base: folder or hub name of the model; `tiny-python` is the packaged one.
        output: JSONL file that the responses are appended to; what is known of it goes beside it, into
            `<output>.json`.
        data: where prompts come from, without what is held out: of a `path`, texts give pieces, conversations what
            stands before their first answer, rows with a loss_mask what stands before their first token to learn.
        adapter: directory of an adapter of this base that drafts; the law of the responses is the same. Default
            none: plain decoding, which is faster where a batch keeps the device busy, as on a CPU.
        num_responses: rows of the file.
        prompt_tokens: of a prompt that is a piece of text; of one of a mix at most.
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
    data: PromptsConfig
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
