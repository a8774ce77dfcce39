"""How often a rank's experts were chosen: what a placement that balances ranks is made from."""

import torch
from torch import Tensor


class ExpertLoad:
    """Counts of one layer on one rank.

    They are kept where the ids are, so that counting can be captured with a step.

    Args:
        held: the model's expert in each slot of this rank.
        num_experts: E, of the model.
        counts_here: whether this rank counts; of ranks that share experts, one does.
    """

    def __init__(
        self, held: tuple[int, ...], num_experts: int, counts_here: bool, device: torch.device
    ) -> None:
        self._held = held
        self._num_experts = num_experts
        self._counts_here = counts_here
        self._counts = torch.zeros(len(held) + 1, dtype=torch.int64, device=device)

    def add(self, slots: Tensor) -> None:
        """Counts a step. slots: [rows, K], -1 for experts of other ranks."""
        if self._counts_here:
            places = slots.flatten().long() + 1
            self._counts.scatter_add_(0, places, torch.ones_like(places))

    def reset(self) -> None:
        """Starts anew."""
        self._counts.zero_()

    def counts(self) -> list[int]:
        """[E] how often each of the model's experts was served here."""
        total = [0] * self._num_experts
        for expert, count in zip(self._held, self._counts[1:].tolist(), strict=True):
            total[expert] += count
        return total
