"""Lightning attention on a GPU against the recurrence, token by token in float64."""

import pytest
import torch
from torch import Tensor

import gpu_interpreter  # noqa: F401
from gpu_support import DEVICE, relative_error
from isomoe.kernels import PagedRows
from isomoe.kernels.gpu import lightning_attention

SLOTS = 7


def rows_of(decodes: list[tuple[int, int]], prefills: list[tuple[int, int, int]]) -> PagedRows:
    """decodes: (slot, position), slot -1 for padding; prefills: (slot, new rows, keys); and one row
    of padding behind all."""
    slots, positions, starts = [], [], [len(decodes)]
    for slot, position in decodes:
        slots.append(slot)
        positions.append(position)
    for slot, new, keys in prefills:
        slots += [slot] * new
        positions += range(keys - new, keys)
        starts.append(len(slots))
    return PagedRows(
        table_rows=torch.tensor([*slots, -1], dtype=torch.int32, device=DEVICE),
        positions=torch.tensor([*positions, 3], dtype=torch.int32, device=DEVICE),
        block_tables=torch.zeros(SLOTS, 1, dtype=torch.int32, device=DEVICE),
        page_size=4,
        num_decodes=len(decodes),
        max_context=100,
        prefill_lens=tuple((new, keys) for _, new, keys in prefills),
        prefill_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE) if prefills else None,
    )


def reference(q: Tensor, k: Tensor, v: Tensor, states: Tensor, decay: Tensor, rows: PagedRows):
    out, states = torch.zeros_like(q), states.clone()
    places = zip(rows.table_rows.tolist(), rows.positions.tolist(), strict=True)
    for row, (slot, position) in enumerate(places):
        if slot < 0:
            continue
        if position == 0:
            states[slot] = 0
        states[slot] *= torch.exp(-decay)[:, None, None]
        states[slot] += k[row][:, :, None] * v[row][:, None, :]
        out[row] = torch.einsum("nd,nde->ne", q[row], states[slot]) * q.shape[-1] ** -0.5
    return out, states


@pytest.mark.parametrize(
    ("decodes", "prefills"),
    [
        ([(3, 9)], []),
        ([(5, 0), (-1, 0), (2, 17)], []),
        ([], [(1, 40, 40), (4, 16, 50), (0, 5, 6)]),
        ([(6, 3), (-1, 2)], [(2, 17, 17), (3, 2, 90)]),
    ],
)
@pytest.mark.parametrize(("heads", "dim"), [(3, 8), (2, 40)])
def test_it_is_the_recurrence(
    decodes: list[tuple[int, int]], prefills: list[tuple[int, int, int]], heads: int, dim: int
) -> None:
    torch.manual_seed(dim)
    rows = rows_of(decodes, prefills)
    count = len(rows.table_rows)
    qkv = torch.randn(count, 3 * heads, dim, dtype=torch.float64)
    states = torch.randn(SLOTS, heads, dim, dim, dtype=torch.float64)
    decay = torch.linspace(0.01, 1.2, heads, dtype=torch.float64)
    expected, after = reference(*qkv.chunk(3, 1), states, decay, rows)
    # What a state held before its request's first row does not matter.
    begun = {slot for slot, position in decodes if slot >= 0 and not position}
    begun |= {slot for slot, new, keys in prefills if new == keys}
    states[list(begun)] = float("nan")
    held = states.float().to(DEVICE)
    parts = qkv.float().to(DEVICE).chunk(3, 1)
    out = lightning_attention(*parts, held, decay.float().to(DEVICE), rows)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(held, after) < 1e-5
    untouched = sorted(set(range(SLOTS)) - set(rows.table_rows.tolist()))
    assert torch.equal(held.cpu()[untouched], states.float()[untouched])
