"""A step's rows as the GPU's attention takes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedRows:
    """One attention-DP group's rows in a step: first those of decodes, then those of prefills.

    Attributes:
        table_rows: [T] int32, each row's row of `block_tables`, and the slot of its request's
            states; -1 is padding, which writes nothing and gives zeros.
        positions: [T] int32, each row's position in its request; it sees keys 0 to there.
        block_tables: [requests, pages] int32, page ids.
        page_size: tokens of a page.
        num_decodes: rows of requests that have one row each, padding included.
        max_context: no decode row sees more keys.
        prefill_lens: (new rows, keys of the last of them) of each prefill, in row order.
        prefill_starts: [prefills + 1] int32, where each begins among all rows; None without any.
    """

    table_rows: Tensor
    positions: Tensor
    block_tables: Tensor
    page_size: int
    num_decodes: int
    max_context: int
    prefill_lens: tuple[tuple[int, int], ...] = ()
    prefill_starts: Tensor | None = None
