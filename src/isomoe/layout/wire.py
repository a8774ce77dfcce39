"""What travels of a row on its way to routed experts: its hidden state, and what it chose."""

from dataclasses import dataclass
from enum import StrEnum
from math import comb

FP8_RUN = 128
"""Columns that share a scale in `WireFormat.FP8`."""
NVFP4_RUN = 16
"""Columns that share a scale in `WireFormat.NVFP4`."""
_CHOICE_BYTES = 8
"""A chosen expert's number (int32) and weight (fp32)."""


class WireFormat(StrEnum):
    """How hidden states travel to routed experts."""

    NONE = "none"
    """In the stream's dtype."""
    FP8 = "fp8"
    """E4M3, with an fp32 scale for each run of 128 columns (DeepSeek-V3, 2024)."""
    NVFP4 = "nvfp4"
    """E2M1, with an E4M3 scale for each run of 16 columns and an fp32 scale for the row."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A row as it goes to routed experts: all that they need, under one row map.

    Attributes:
        format: of its hidden state.
        top_k: experts that it chose.
        groups: equal ones that neighbouring experts form,
        kept: and among the experts of how many of them it chose.
    """

    format: WireFormat
    top_k: int
    groups: int = 1
    kept: int = 1

    def row_bytes(self, row_values: int, wire_bytes: int) -> float:
        """Bytes of one row.

        Args:
            row_values: the hidden size.
            wire_bytes: of one value in the stream's dtype.
        """
        match self.format:
            case WireFormat.NONE:
                hidden = row_values * wire_bytes
            case WireFormat.FP8:
                hidden = row_values + 4 * -(-row_values // FP8_RUN)
            case WireFormat.NVFP4:
                hidden = row_values // 2 + row_values // NVFP4_RUN + 4
        return hidden + self.top_k * _CHOICE_BYTES

    def destinations(self, members: int) -> float:
        """Other ranks of a group that a row goes to on average, if it chooses evenly.

        A row goes once to each rank that has any of its experts. It keeps any groups of experts
        alike, and chooses among theirs independently; where ranks and groups cut one another, as if
        all were kept.
        """
        whole, rest = divmod(self.groups, members)
        if self.groups == 1 or (rest and members % self.groups):
            passed_by = (1 - 1 / members) ** self.top_k
        elif rest == 0:  # a rank has some groups whole
            passed_by = sum(
                comb(whole, here)
                * comb(self.groups - whole, self.kept - here)
                / comb(self.groups, self.kept)
                * (1 - here / self.kept) ** self.top_k
                for here in range(min(whole, self.kept) + 1)
            )
        else:  # or a part of one
            part = self.groups / members / self.kept
            kept = self.kept / self.groups
            passed_by = 1 - kept + kept * (1 - part) ** self.top_k
        return (members - 1) * (1 - passed_by)
