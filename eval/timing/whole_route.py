"""The engine's attention without its parts of the keys, so that the choice between the two can be measured again."""

from functools import partial

from pardec.decoding.rows import RowForward
from pardec.target.attention import AttentionRoute, grouped_attention, register_route

ROUTE = "pardec_whole"

register_route(ROUTE, partial(grouped_attention, in_parts=False))


class WholeForward(RowForward):
    """The engine's forward with this route in place of its own; its masks are the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_group is not None:
            self._route = AttentionRoute(self.target.base, ROUTE)
