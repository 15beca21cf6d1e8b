"""How a decoding step attends: grouped query heads over the key/value heads as they lie in the cache.

With an explicit mask transformers' sdpa repeats the keys and values for every query head of a group, which reads and
writes the whole context several times over. Here the query heads of a group become further rows of one attention, so
nothing is repeated; where that leaves a GPU idle, by parts of the keys (`split_keys`). The route is on a model only
while a step runs.
Legend: B batch, H key/value heads, G query heads for each of them, R rows, S slots.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from pardec.target.forward import config_value
from pardec.target.split_keys import attention_by_parts, hidden_score, num_parts, worth_splitting

ROUTE = "pardec_grouped"
STOCK = "sdpa"
_FIELD = "_attn_implementation_internal"  # behind `config._attn_implementation`
_lock = threading.RLock()
_num_open: Counter[int] = Counter()  # by id of the configuration: steps that run on it now


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    in_parts: bool = True,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a step in transformers' attention interface; any other call is passed on to its sdpa.

    A step is told by its mask, which `group_rows` has made G R rows tall. It goes by parts of the keys where the device
    has use for them and the mask is for all heads, which a mask that was not made for parts hardly ever is.

    Args:
        module: the attention layer.
        query: shape [B, H G, R, D].
        key: shape [B, H, S, D].
        value: shape [B, H, S, D'].
        attention_mask: additive, shape [B, 1, G R, S], or [B, H, G R, S] and finite.
        dropout: 0 in a frozen model.
        scaling: of the scores.
        in_parts: False never splits keys.
        kwargs: what transformers passes to every attention function.
    """
    (B, num_heads, R, D), H = query.shape, key.shape[1]
    rows_of_step = R * (num_heads // H)
    if attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.shape[2] != rows_of_step:
        stock = AttentionInterface._global_mapping[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if _here.calls is not None:
        _here.calls.append(module)
    rows = query.reshape(B, H, -1, D)  # heads of a group lie side by side
    mask = attention_mask.to(query.dtype)
    n = num_parts(rows, key, value) if in_parts and mask.shape[1] == H else 1
    if n > 1:
        out = attention_by_parts(rows, key, value, mask, n=n, scaling=scaling)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    out = out.unflatten(2, (-1, R)).permute(0, 3, 1, 2, 4)  # [B, R, H, G, D'], in whatever strides the kernel chose
    if n > 1:
        out = out.to(query.dtype, memory_format=torch.contiguous_format)  # by one kernel
    return out.reshape(B, R, num_heads, -1), None


def register_route(name: str, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """Makes an attention function known to transformers by a name that `AttentionRoute` can put on a model."""
    AttentionInterface.register(name, attention)
    # other threads that run the base while a step does must get the masks of sdpa
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])


register_route(ROUTE, grouped_attention)


class _Calls(threading.local):
    calls: list[torch.nn.Module] | None = None


_here = _Calls()


@contextmanager
def grouped_attention_calls() -> Iterator[list[torch.nn.Module]]:
    """Collects the layers that attend through the route in this thread."""
    _here.calls = calls = []
    try:
        yield calls
    finally:
        _here.calls = None


def group_rows(
    mask: Tensor | Mapping[str, Tensor], group: int, dtype: torch.dtype, num_kv_heads: int | None = None
) -> Tensor | dict[str, Tensor]:
    """Masks of a step as the route takes them: additive, with the rows of a group of query heads stacked.

    Args:
        mask: bool, shape [B, 1, R, S], or one for each kind of layer.
        group: G.
        dtype: of the queries.
        num_kv_heads: H where keys may be split, as `split_heads` says, for a finite mask of all heads; None for -inf
            and one head.

    Returns:
        shape [B, 1, G R, S], or [B, H, G R, S]; row g R + r is row r.
    """
    if isinstance(mask, Mapping):
        return {kind: _grouped(one, group, dtype, num_kv_heads) for kind, one in mask.items()}
    return _grouped(mask, group, dtype, num_kv_heads)


def _grouped(mask: Tensor, group: int, dtype: torch.dtype, num_kv_heads: int | None) -> Tensor:
    # made additive once for all layers: attention kernels would turn a boolean mask into this in every layer
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    additive = torch.where(mask, zero, float("-inf") if num_kv_heads is None else hidden_score(dtype))
    # heads of one sequence are a view; those of several a copy, lest every layer makes one: parts need sequences and
    # heads one stride apart
    copies = 1 if num_kv_heads is None or mask.shape[0] == 1 else num_kv_heads
    additive = additive.repeat(1, copies, group, 1) if copies * group > 1 else additive
    return additive if num_kv_heads is None else additive.expand(-1, num_kv_heads, -1, -1)


class AttentionRoute:
    """Context in which the layers of a model with sdpa attention take a route; the model is as it was afterwards.

    Contexts may overlap, in threads too: what is not meant for a route it passes on to sdpa.
    """

    def __init__(self, base: PreTrainedModel, route: str = ROUTE):
        self._route = route
        # past the configuration's own setter, which takes longer than a layer of a small model
        self._fields = vars(base.config.get_text_config(decoder=True))
        self._key = id(self._fields)

    def __enter__(self) -> None:
        with _lock:
            _num_open[self._key] += 1
            self._fields[_FIELD] = self._route

    def __exit__(self, *error: object) -> None:
        with _lock:
            _num_open[self._key] -= 1
            if not _num_open[self._key]:
                self._fields[_FIELD] = STOCK


def query_group(base: PreTrainedModel) -> int:
    """G of a model whose configuration names its head counts; 1 where they differ between layers or are not named."""
    heads, kv_heads = _head_counts(base)
    return 1 if heads is None or kv_heads is None or heads % kv_heads else heads // kv_heads


def split_heads(base: PreTrainedModel, device: torch.device) -> int | None:
    """H where steps on this device may split keys; None where they may not, or no one number is named."""
    return _head_counts(base)[1] if worth_splitting(device) else None


def _head_counts(base: PreTrainedModel) -> tuple[int | None, int | None]:
    """Query heads and key/value heads, as many where only the first are named."""
    config = base.config.get_text_config(decoder=True)
    heads, kv_heads = config_value(config, "num_attention_heads"), config_value(config, "num_key_value_heads")
    heads = heads if isinstance(heads, int) else None
    kv_heads = heads if kv_heads is None else kv_heads
    return heads, kv_heads if isinstance(kv_heads, int) else None
