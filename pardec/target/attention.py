"""How a decoding step attends: grouped query heads over the key/value heads as they lie in the cache.

With an explicit mask transformers' sdpa repeats the keys and values for every query head of a group, which reads and
writes the whole context several times over. Here the query heads of a group become further rows of one attention, so
nothing is repeated. The route is on a model only while a step runs.
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
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a step in transformers' attention interface; any other call is passed on to its sdpa.

    A step is told by its mask, which `group_rows` has made G R rows tall.

    Args:
        module: the attention layer.
        query: shape [B, H G, R, D].
        key: shape [B, H, S, D].
        value: shape [B, H, S, D'].
        attention_mask: additive, shape [B, 1, G R, S].
        dropout: 0 in a frozen model.
        scaling: of the scores.
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
    out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    out = out.unflatten(2, (-1, R)).permute(0, 3, 1, 2, 4)  # [B, R, H, G, D'], in whatever strides the kernel chose
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


def group_rows(mask: Tensor | Mapping[str, Tensor], group: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Masks of a step as the route takes them: additive, with the rows of a group of query heads stacked.

    Args:
        mask: bool, shape [B, 1, R, S], or one for each kind of layer.
        group: G.
        dtype: of the queries.

    Returns:
        shape [B, 1, G R, S]; row g R + r is row r.
    """
    if isinstance(mask, Mapping):
        return {kind: _grouped(one, group, dtype) for kind, one in mask.items()}
    return _grouped(mask, group, dtype)


def _grouped(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    # made additive once for all layers: attention kernels would turn a boolean mask into this in every layer
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    additive = torch.where(mask, zero, float("-inf"))
    return additive.repeat(1, 1, group, 1) if group > 1 else additive


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
    config = base.config.get_text_config(decoder=True)
    heads, kv_heads = config_value(config, "num_attention_heads"), config_value(config, "num_key_value_heads")
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return 1
    return heads // kv_heads
