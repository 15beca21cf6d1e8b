"""The draft as vLLM runs it: the target's own layers, with mask embeddings, gated LoRA and sampler head of an adapter.

A round of vLLM is two forwards, the target's and this one. Its first drafted token is the target's own next one, so
vLLM drafts one token more than the adapter. Loaded by vLLM alone, which it imports.
Legend: B sequences, N rows of a forward, K mask tokens, H width of a hidden state, V vocabulary.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable

import torch
import vllm
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import ModelRegistry
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from pardec.adapters.adapter import Adapter
from pardec.adapters.files import load_adapter
from pardec.adapters.head import SamplerHead
from pardec.decoding.drafting import draft_in_turn
from pardec.decoding.sampling import TokenLaw
from pardec.vllm_plugin.architectures import ARCHITECTURES
from pardec.vllm_plugin.borrowing import Borrowed, borrow, hollow
from pardec.vllm_plugin.gated_linear import GatedLinear, by_layer, stacked
from pardec.vllm_plugin.mask_rows import MaskRows
from pardec.vllm_plugin.serving import refuse_unserved
from pardec.vllm_plugin.sharing import let_drafts_borrow, version_note

logger = init_logger(f"vllm.{__name__}")  # vLLM shows loggers below its own


class PardecDraftForCausalLM(nn.Module):
    """A draft model whose folder holds an adapter and no weights of a model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Called by vLLM, with the draft's configuration.

        Raises:
            ValueError: for an adapter that cannot be used, or a way of serving that the draft is not made for.
        """
        super().__init__()
        note = version_note(vllm.__version__)
        if note is not None:
            logger.warning(note)
        let_drafts_borrow(DraftModelProposer)
        model_config, device = vllm_config.model_config, vllm_config.device_config.device
        self.config, dtype = model_config.hf_config, model_config.dtype
        adapter = load_adapter(model_config.model)
        refuse_unserved(vllm_config, adapter)
        self.num_drafts = vllm_config.speculative_config.num_speculative_tokens
        self.masks = MaskRows(
            adapter.embeddings_for(self.num_drafts - 1).to(device, dtype).contiguous(),
            mask_id=self.config.mask_token_id,
            max_rows=vllm_config.scheduler_config.max_num_batched_tokens,
        )
        architecture = ARCHITECTURES[self.config.model_type]
        with torch.device("meta"):  # all but attention is put away again, so that it need not have room
            target_class, _ = ModelRegistry.resolve_model_cls([architecture], model_config)
            self.inner = target_class(vllm_config=vllm_config, prefix=prefix)
        self._make_hollow(adapter, device, dtype)
        self.head = _head_of(adapter, device, dtype)
        if self.head is not None and not vllm_config.speculative_config.use_local_argmax_reduction:
            logger.warning("pardec: expected use_local_argmax_reduction true, found false: no sampler head is used")
        self.shortlist = 0 if adapter.metadata.head is None else adapter.metadata.head.shortlist

    def _make_hollow(self, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> None:
        packed = getattr(self.inner, "packed_modules_mapping", {})
        lora = adapter.lora
        pairs = {} if lora is None else by_layer(lora.pairs(), packed)
        sizes = {}
        for name in pairs:
            layer = self.inner.get_submodule(name)
            sizes[name] = (getattr(layer, "output_sizes", None) or [layer.output_size], layer.input_size)
        hollow(self.inner, stays=_is_own, within=list(pairs))
        for name, some in pairs.items():
            assert lora is not None
            parts, width = sizes[name]
            a, b = stacked(name, some, sizes=parts, width=width, scaling=lora.scaling)
            gated = GatedLinear(Borrowed(), a.to(device, dtype), b.to(device, dtype), self.masks.gate)
            self.inner.set_submodule(name, gated)
        for module in self.inner.modules():
            if _is_own(module):
                module._apply(lambda tensor: torch.empty_like(tensor, device=device))  # vLLM fills them

    def borrow_layers(self, target: nn.Module) -> None:
        """Takes all layers of the target but attention, whose keys and values are the draft's own."""
        borrow(self.inner, target, stays=_is_own)
        theirs = {id(parameter) for parameter in target.parameters()}
        own = sum(parameter.numel() for parameter in self.inner.parameters() if id(parameter) not in theirs)
        logger.info("pardec: the draft runs the target's layers; weights of its own: %d", own)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads nothing, as the adapter is there already; the names of all parameters."""
        next(iter(weights), None)  # starts the clock by which vLLM tells how long it took
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Input embeddings of token ids of the vocabulary."""
        return self.inner.embed_input_ids(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, intermediate_tensors=None, inputs_embeds=None) -> Tensor:
        """Hidden states, shape [N, H], of token ids, shape [N], among them the mask token's."""
        embeddings = self.masks.embed(input_ids, self.inner.embed_input_ids)
        return self.inner(None, positions, intermediate_tensors, embeddings)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits, shape [N, V]."""
        return self.inner.compute_logits(hidden_states)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Drafted tokens, shape [B (K + 1)], each known to the next if there is a sampler head.

        Args:
            hidden_states: of the anchor and the mask rows of each sequence, shape [B (K + 1), H].
        """
        logits = self.compute_logits(hidden_states)
        if self.head is None or self.num_drafts == 1:
            return logits.argmax(dim=-1)
        rows = (-1, self.num_drafts, logits.shape[-1])
        logits, hidden = logits.view(rows), hidden_states.view(-1, self.num_drafts, hidden_states.shape[-1])
        exact = logits[:, 0].argmax(dim=-1)
        output = getattr(self.inner, "lm_head", None) or self.inner.model.embed_tokens
        drafts, _ = draft_in_turn(
            self.head,
            TokenLaw(greedy=True),
            logits[:, 1:],
            hidden[:, 1:],
            exact,
            self.embed_input_ids,
            output.weight,
            self.shortlist,
        )
        return torch.cat([exact[:, None], drafts], dim=1).flatten()


def _is_own(module: nn.Module) -> bool:
    return isinstance(module, AttentionLayerBase)


def _head_of(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> SamplerHead | None:
    if adapter.head is None:
        return None
    W, both = adapter.head["inner.weight"].shape
    H = adapter.head["outer.weight"].shape[0]
    with torch.device("meta"):
        head = SamplerHead(H, both - H, W)
    head.load_state_dict(adapter.head, assign=True)
    return head.to(device, dtype).eval().requires_grad_(False)
