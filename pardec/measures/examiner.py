"""Measures what is learned so far while it is trained, with the real decoder, and leaves the best of it in a folder.

All processes of a run measure: each its share of the prompts, or, where the base is sharded over them and none can run
it alone, all the same ones. Knows the training module and the recipe; no optimiser and no steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference, HeadShape
from pardec.adapters.files import save_adapter
from pardec.arguments import known_dtype
from pardec.config.adapter_recipe import Recipe
from pardec.measures.acceptance import BATCH_SIZE
from pardec.measures.floor import measure_floor
from pardec.measures.held_out import HeldOut, measure_held_out
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel
from pardec.target.fingerprint import Fingerprint
from pardec.training.curve import redraw_curve
from pardec.training.module import MaskTokenTrainer
from pardec.training.running.agreement import failing_together
from pardec.training.running.processes import made_by
from pardec.training.warm_start import learned_adapter


@dataclass(frozen=True)
class Examiner:
    """Measures an adapter in training.

    Attributes:
        recipe: of the run.
        accelerator: of the run, whose trackers are told.
        module: what is trained.
        peft_model: PEFT's view of the base, None without a LoRA.
        identity: of the base.
        origin: what is told of the adapter that the run began with.
        tokenizer: of the base.
        prompts: held out.
        minutes: of processor time since the run began, asked for when an adapter is written.
    """

    recipe: Recipe
    accelerator: Accelerator
    module: MaskTokenTrainer
    peft_model: Any
    identity: Fingerprint
    origin: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    minutes: Callable[[], float]

    def measure(self, step: int, best: float) -> float:
        """Acceptance after `step` steps, sampled and greedy; returns the better of it, sampled, and `best`.

        To be called by all processes, which all get the same. An adapter that is better is saved.
        """
        self.module.forget_prefix()
        output, settings, share = Path(self.recipe.output_dir), self.recipe.eval, self._share()
        model = SelfSpeculativeModel(self.module.target.base, self.tokenizer, self.adapter(step, {}))
        batch_size = settings.batch_size or min(BATCH_SIZE, -(-len(self.prompts) // share.of))
        shared: dict[str, Any] = {"seed": self.recipe.train.seed, "batch_size": batch_size, "share": share}
        floor = None
        if step == 0 and settings.top_k is not None:  # of the base alone
            floor = measure_floor(model, self.prompts, temperature=settings.temperature, top_k=settings.top_k, **shared)
        found = measure_held_out(
            model,
            self.prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            **shared,
        )
        clear_device_cache(garbage_collection=True)  # the decoder's graphs and caches are for the next steps to use
        measured = {"split": "validation", **found.to_dict()}
        length = measured["sampled"]["mean_acceptance_length"]
        with failing_together(self.accelerator):
            self._tell(step, floor, found)
            if length > best and self.accelerator.is_main_process:
                save_adapter(self.adapter(step, measured), output)
        return max(best, length)

    def _tell(self, step: int, floor: dict[str, float] | None, found: HeldOut) -> None:
        """Logs what was found, draws it, and says it in a line."""
        output = Path(self.recipe.output_dir)
        if floor is not None:
            self.accelerator.log(floor, step=step)
        self.accelerator.log(found.to_log(), step=step)
        if self.accelerator.is_main_process:
            redraw_curve(output / "metrics.jsonl", output / "training.png")
            tqdm.write(
                f"step {step}: mean acceptance length {found.sampled.mean_acceptance_length:.3f} sampled, "
                f"{found.greedy.mean_acceptance_length:.3f} greedy (validation, bonus token included)"
            )

    def _share(self) -> Share:
        accelerator = self.accelerator
        if accelerator.num_processes == 1 or self.recipe.train.shard_base:
            return ALL_OF_IT
        return Share(accelerator.process_index, accelerator.num_processes, gather_object)

    def adapter(self, step: int, measured: dict[str, Any]) -> Adapter:
        """A copy of what is learned so far, with its provenance."""
        what, base = self.recipe.adapter, self.module.target.base
        metadata = AdapterMetadata(
            num_speculative_tokens=what.num_speculative_tokens,
            mask_sharing=what.mask_sharing,
            draft_input=what.draft_input,
            head=None if what.head is None else HeadShape(width=what.head.width, shortlist=what.head.shortlist),
            base=BaseReference(name=self.recipe.base, revision=getattr(base.config, "_commit_hash", None)),
            fingerprint=self.identity,
            training={
                "recipe": self.recipe.model_dump(),
                **self.origin,
                **made_by(self.accelerator),
                "step": step,
                "cpu_minutes": round(self.minutes(), 2),
            },
            measured=measured,
        )
        return learned_adapter(self.module, self.peft_model, metadata).rounded(known_dtype(what.dtype))
