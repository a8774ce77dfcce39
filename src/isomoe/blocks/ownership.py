"""Which copy of an expert serves a row, and in which slot of this rank it is.

T: rows   K: experts a row   E: experts of the model
"""

from functools import cached_property

import torch
from torch import Tensor

from isomoe.layout import ExpertMap


class Ownership:
    """The physical experts that a rank holds, of those of all ranks.

    Args:
        location: which of the model's experts each physical one is a copy of.
        first, stop: this rank's run of them.
    """

    def __init__(self, location: ExpertMap, first: int, stop: int) -> None:
        self.location = location
        self.first = first
        self.stop = stop
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @cached_property
    def held(self) -> tuple[int, ...]:
        """The model's expert in each slot of this rank."""
        return self.location.physical_to_logical[self.first : self.stop]

    def copies_for(self, ids: Tensor, first_row: int) -> Tensor:
        """The copies that serve rows: the row's number takes turns among an expert's copies.

        ids: [T, K] experts of the model, -1 for none -> [T, K] physical experts.

        Args:
            first_row: the number of the first row among all rows of the step.
        """
        if self.location.is_identity:
            return ids
        copies, counts = self._table(ids.device)
        rows = torch.arange(first_row, first_row + len(ids), device=ids.device).unsqueeze(1)
        known = ids.long().clamp(min=0)
        served = copies[known, rows % counts[known]]
        return torch.where(ids < 0, -1, served).to(ids.dtype)

    def slots(self, physical: Tensor) -> Tensor:
        """[T, K] physical experts -> slots of this rank; -1 for those of others, and for none."""
        if self.first == 0 and self.stop == self.location.num_physical:
            return physical
        here = (physical >= self.first) & (physical < self.stop)
        return torch.where(here, physical - self.first, -1)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[E, most copies] the copies of each expert, and [E] how many there are."""
        if device not in self._tables:
            copies = self.location.copies
            most = max(map(len, copies))
            padded = [[*some, *some[:1] * (most - len(some))] for some in copies]
            counts = torch.tensor([len(some) for some in copies], device=device)
            self._tables[device] = torch.tensor(padded, device=device), counts
        return self._tables[device]
