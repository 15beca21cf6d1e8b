"""The recipe of `train/train_adapter.py`: base, data, what is learned, how, and how it is measured meanwhile."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from pardec.config.recipe_files import Section
from pardec.config.train_section import TrainConfig, default_anchors
from pardec.decoding.sampling import LEAST_TEMPERATURE
from pardec.errors import shown
from pardec.layout import MAX_SPECULATIVE_TOKENS, blocks_by_depth
from pardec.training.module import Drafter
from pardec.training.objective import Objective


class RowsConfig(Section):
    """Where data come from.

    Attributes:
        path: file, folder or hub dataset; `python-stdlib` is the source of the running interpreter's
            library, `python-packages` that of the packages installed for it.
        format: `auto` goes by suffix; `text`, `jsonl`, or `hub` for anything that `datasets` loads.
        subset: configuration of a hub dataset.
        split: of a hub dataset.
    """

    path: str
    format: Literal["auto", "text", "jsonl", "hub"] = "auto"
    subset: str | None = None
    split: str = "train"


class DataConfig(RowsConfig):
    """What is trained on.

    Attributes:
        max_length: tokens of a training sequence.
        min_kept_share: data are refused if something is learned of a smaller share of the rows, as where prompts are
            longer than max_length.
        validation_path: file or folder of held-out data that checkpoints are chosen by, or one of the two names
            above; default a held-out part of `path`.
        test_path: likewise, of data that is reported.
        streamed: a hub dataset is read as training comes to it, and not downloaded before; needs a validation_path.
        cache: folder where tokenised data are kept; default `tokenised` in the user's cache.
    """

    max_length: int = Field(default=512, ge=8)
    min_kept_share: float = Field(default=0.5, ge=0, le=1)
    validation_path: str | None = None
    test_path: str | None = None
    streamed: bool = False
    cache: str | None = None


class LoraSection(Section):
    """The gated LoRA.

    Attributes:
        r: rank.
        alpha: the LoRA acts as alpha / r times B A.
        target_modules: names of modules, or `all-linear`.
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    target_modules: str | list[str] = "all-linear"


class HeadSection(Section):
    """The sampler head.

    Attributes:
        width: of its hidden layer.
        shortlist: tokens of each mask row that it scores when decoding.
        joint: its loss trains mask embeddings and LoRA too; otherwise they learn what they learn without a head.
    """

    width: int = Field(default=512, ge=1)
    shortlist: int = Field(default=64, ge=1)
    joint: bool = False


class AdapterConfig(Section):
    """What is learned.

    Attributes:
        num_speculative_tokens: K.
        mask_sharing: one embedding per position, or one for all.
        mask_initialisation: where mask embeddings start: at the `mean` of all input embeddings, or each at that of
            a `random_token`.
        draft_input: what stands at mask rows: `mask_embeddings`, or `uniform_noise`, embeddings of random tokens, as
            SGLang's UNO serves a LoRA.
        lora: a LoRA that is active at mask rows only; default none.
        head: a sampler head, which lets each draft know the token before it; default none.
        start_from: folder of an adapter of the same base and shape whose parts this one starts with, a LoRA cut to
            fewer layers and a lower rank where this one has them; default none.
        transfer: it may be of another base of the same shape, such as the one that this base was tuned from.
        dtype: of the numbers in the adapter's files, as which they are measured too; bfloat16 halves the files.
    """

    num_speculative_tokens: int = Field(default=4, ge=1, le=MAX_SPECULATIVE_TOKENS)
    mask_sharing: Literal["distinct", "shared"] = "distinct"
    mask_initialisation: Literal["mean", "random_token"] = "mean"
    draft_input: Literal["mask_embeddings", "uniform_noise"] = "mask_embeddings"
    lora: LoraSection | None = None
    head: HeadSection | None = None
    start_from: str | None = None
    transfer: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def drafter(self) -> Drafter:
        """The same as the training module takes it."""
        return Drafter(
            self.num_speculative_tokens,
            mask_sharing=self.mask_sharing,
            draft_input=self.draft_input,
            initialisation=self.mask_initialisation,
            has_lora=self.lora is not None,
            head_width=0 if self.head is None else self.head.width,
            joint_head=self.head is not None and self.head.joint,
        )


class EvalConfig(Section):
    """How acceptance is measured during training, with the real decoder, sampled and greedy.

    Attributes:
        every: steps between measurements; the last step is always measured.
        num_prompts: validation prompts.
        batch_size: prompts decoded together, shared out over the processes; default a process's share, 16 at most.
            Sampled figures of the same adapter are the same by any number of processes only if this is.
        max_new_tokens: per prompt.
        temperature: of the sampled measurement, which chooses the best adapter.
        top_k: likewise.
    """

    every: int = Field(default=100, ge=1)
    num_prompts: int = Field(default=16, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.8, ge=LEAST_TEMPERATURE, lt=math.inf)
    top_k: int | None = Field(default=10, ge=1)


# of train, what says when something is written and to whom, and how the same step is shared out
_ONLY_TOLD = ("checkpoint_every", "checkpoint_keep", "log_every", "trackers")
_SPLITS = ("batch_size", "gradient_accumulation_steps", "shard_base")


class Recipe(Section):
    """Everything that a training run is told.

    Attributes:
        base: folder or hub name of the frozen model; `tiny-python` is the packaged one.
        output_dir: where the adapter is left.
    """

    base: str
    output_dir: str
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _weights_fit(self) -> "Recipe":
        weights, K = self.train.position_weights, self.adapter.num_speculative_tokens
        if isinstance(weights, list) and len(weights) != K:
            raise ValueError(f"train.position_weights: expected {K} numbers, found {len(weights)}")
        try:
            values = self.position_weights()
        except OverflowError:
            values = [math.inf]
        numbers = [1.0] if isinstance(values, str) else values
        if not all(math.isfinite(value) and value >= 0 for value in numbers) or max(numbers) == 0:
            raise ValueError(
                f"train.position_weights: expected finite numbers >= 0, one of them above 0, found {shown(weights)}"
            )
        self.objective()
        return self

    @model_validator(mode="after")
    def _anchors_fit(self) -> "Recipe":
        most, found = self.data.max_length, self.anchors()
        if found > most:
            raise ValueError(f"train.anchors_per_sequence: expected at most data.max_length, {most}, found {found}")
        return self

    @model_validator(mode="after")
    def _growth_fits(self) -> "Recipe":
        growth, K = self.train.grow_speculative_tokens or [], self.adapter.num_speculative_tokens
        if growth and (growth != sorted(set(growth)) or growth[-1] != K):
            raise ValueError(
                f"train.grow_speculative_tokens: expected numbers that rise to K, here {K}, found {shown(growth)}"
            )
        return self

    @model_validator(mode="after")
    def _noise_fits(self) -> "Recipe":
        adapter = self.adapter
        if adapter.draft_input != "uniform_noise":
            return self
        if adapter.lora is None:
            raise ValueError("adapter.draft_input: expected a LoRA beside uniform_noise, which learns nothing itself")
        if adapter.head is not None:
            raise ValueError(
                "adapter.draft_input: expected no sampler head beside uniform_noise, whose engines know none"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> "Recipe":
        adapter, frozen = self.adapter, set(self.train.frozen)
        if adapter.transfer and adapter.start_from is None:
            raise ValueError("adapter.transfer: expected adapter.start_from, what is moved here, found none")
        if frozen and adapter.start_from is None:
            raise ValueError("train.frozen: expected adapter.start_from, which frozen parts are taken from, found none")
        parts = {"mask_embeddings": adapter.draft_input == "mask_embeddings"}
        parts |= {"lora": adapter.lora is not None, "head": adapter.head is not None}
        if not {part for part, is_there in parts.items() if is_there} - frozen:
            raise ValueError(f"train.frozen: expected a part that is learned, found all frozen: {sorted(frozen)}")
        return self

    def of_checkpoints(self) -> dict[str, Any]:
        """The parts that what is learned depends on; the examples of a step are another matter than who runs which."""
        parts = self.model_dump(include={"base", "data", "adapter", "train"})
        # `transfer` only allows what `start_from` says
        unasked = (
            ("data", "min_kept_share"),
            ("data", "cache"),
            ("adapter", "dtype"),
            ("adapter", "transfer"),
            *(("train", key) for key in _ONLY_TOLD + _SPLITS),
        )
        for section, key in unasked:
            del parts[section][key]
        parts["train"]["anchors_per_sequence"] = self.anchors()
        return parts

    def anchors(self) -> int:
        """Blocks of mask tokens per sequence."""
        return self.train.anchors_per_sequence or default_anchors(self.data.max_length)

    def position_weights(self) -> list[float] | str:
        """One weight per position, K numbers, or the name of a rule."""
        weights = self.train.position_weights
        if isinstance(weights, list | str):
            return weights
        return [weights**j for j in range(self.adapter.num_speculative_tokens)]

    def objective(self) -> Objective:
        """What drafts are trained for."""
        train = self.train
        return Objective(train.objective, self.position_weights(), train.temperature, train.top_k)

    def anchors_to_try(self) -> list[int]:
        """Anchors of a forward: as many as the recipe asks for, then ever fewer, down to one."""
        most = self.anchors()
        asked = min(self.train.anchors_per_forward or most, most)
        return [asked] + [one for one in range(asked - 1, 0, -1) if one == 1 or one % 8 == 0 or one < 8]

    def mask_rows(self, num_anchors: int, max_depth: int | None = None) -> int:
        """Mask rows of a forward with so many anchors per sequence, and so many mask tokens of a block; default K."""
        K, keep = max_depth or self.adapter.num_speculative_tokens, self.train.keep
        return self.train.batch_size * sum(blocks_by_depth(num_anchors, K, keep.ratio, keep.floor))
