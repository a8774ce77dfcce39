"""Leaves that emit provenance: what replaces arithmetic in a proof. All else runs for real."""

from typing import Any, cast

import torch
from torch import Tensor

from isomoe.blocks import (
    ExpertWeights,
    Gated,
    Leaf,
    Linear,
    Lookup,
    LowRankQuery,
    Memory,
    Pack,
    Router,
    RowLinear,
    SigmoidGate,
    SquareSums,
    Unpack,
    WideNormCore,
)
from isomoe.errors import IsomoeError
from isomoe.layout import RegimePlan, WireFormat
from isomoe.models import CausalLM
from isomoe.prove.oracle import Expected, View
from isomoe.prove.provenance import Tickets, logit_factors, router_logits, ticket


class Violation(IsomoeError):
    """A row that is not what it should be, or was counted other than once.

    Attributes:
        where: the norm or block that saw it.
        read: the index of the read at which it was seen, or None.
        rank, row: who saw it, and the row's number over all groups; None if no row is to blame.
        fuses: whether it was behind a fused sum that was made, or declined.
    """

    fuses = True

    def __init__(
        self, where: str, what: str, read: int | None, rank: int | None, row: int | None
    ) -> None:
        super().__init__(f"{where}: {what}")
        self.where, self.what, self.read, self.rank, self.row = where, what, read, rank, row


class Counted(Exception):
    """Ends a counting run: lane 1 of the row in question."""

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(f"{found} of {expected}")
        self.found, self.expected = found, expected


class RankStubs:
    """Replaces the leaves of one rank's model.

    Args:
        model: whose leaves are replaced, at once.
        tickets: of all the cases that will run.
    """

    def __init__(self, model: CausalLM, tickets: Tickets) -> None:
        self.rank = model.seat.rank
        self.tickets = tickets
        self.plan: RegimePlan
        self.expected: Expected
        self.stop_at: tuple[int, int] | None = None
        for read, norm in enumerate(model.norms()):
            norm.forward = self._norm(read, norm.name)  # type: ignore[method-assign]
        for index, layer in enumerate(model.layers):
            for leaf in layer.attn.leaves():
                self._replace(leaf, 2 * index)
            for block in layer.ffn:
                for leaf in block.leaves():
                    self._replace(leaf, 2 * index + 1)
        for leaf in model.embedding.leaves():
            self._replace(leaf, 0)
        head = model.lm_head.project
        head.forward = self._logits(head)  # type: ignore[method-assign]

    def begin(
        self, plan: RegimePlan, expected: Expected, stop_at: tuple[int, int] | None = None
    ) -> None:
        """Turns to another case.

        Args:
            stop_at: (read, row) at which a counting run ends, on this rank.
        """
        self.plan, self.expected, self.stop_at = plan, expected, stop_at

    def _replace(self, leaf: Leaf, read: int) -> None:
        match leaf:
            case Lookup():
                stub = self._lookup(leaf)
            case WideNormCore():
                stub = self._wide_core(leaf, read)
            case Memory():
                stub = self._core(read)
            case SquareSums():
                stub = self._squares(leaf)
            case RowLinear():
                stub = self._row_linear(leaf)
            case SigmoidGate():
                stub = self._gate(leaf)
            case Router():
                stub = self._router(leaf)
            case ExpertWeights():
                stub = self._experts(leaf)
            case Pack():
                stub = self._pack(leaf)
            case Unpack():
                stub = _unpack
            case Linear() | Gated() | LowRankQuery():
                stub = _pass
            case _:
                raise TypeError(f"the proof has no stub for {type(leaf).__name__}")
        leaf.forward = stub  # type: ignore[method-assign]

    def _norm(self, read: int, name: str) -> Any:
        poison = torch.tensor(ticket(f"poison {self.rank} {read}"), dtype=torch.int64)

        def forward(x: Tensor) -> Tensor:
            plan = self.plan.reads[read]
            view = self.expected.view(read, self.rank, plan.residual.row_axes, plan.selects_rows)
            if x.shape != view.rows.shape:
                what = f"{len(x)} rows instead of {len(view.rows)}"
                raise Violation(name, what, read, self.rank, None)
            # A row that this rank does not hold here went wrong on its way to a block.
            stop_read, stop_row = self.stop_at or (None, None)
            if stop_read == read and stop_row in view.numbers:
                place = view.numbers.index(stop_row)
                raise Counted(int(x[place, 1]), int(view.rows[place, 1]))
            self._compare(x, view, name, read)
            tags = view.tags if self.tickets.counting is None else self.tickets.tag(x)
            return tags if view.real is None else torch.where(view.real, tags, poison)

        return forward

    def _compare(self, x: Tensor, view: View, where: str, read: int) -> None:
        if self.tickets.counting is not None or torch.equal(x, view.rows):
            return
        differs = (x != view.rows).any(1, keepdim=True)
        if view.real is not None:
            differs &= view.real
        places = differs.flatten().nonzero()
        if len(places):
            row = view.numbers[int(places[0])]
            raise Violation(where, "not the row it should be", read, self.rank, row)

    def _lookup(self, leaf: Lookup) -> Any:
        table = self.tickets.ids(leaf.part.source.removesuffix(".weight"), leaf.part.size)
        start, stop = leaf.part.start, leaf.part.stop

        def forward(ids: Tensor) -> Tensor:
            mine = (ids >= start) & (ids < stop)
            return table[ids] * mine.unsqueeze(1)

        return forward

    def _core(self, read: int) -> Any:
        def forward(x: Tensor, *others: object) -> Tensor:
            view = self.expected.attention_view(read, self.rank)
            where = f"attention behind {self.plan.reads[read].name}"
            if x.shape != view.rows.shape:
                what = f"{len(x)} rows instead of {len(view.rows)}"
                raise Violation(where, what, read, self.rank, None)
            self._compare(x, view, where, read)
            return x

        return forward

    def _squares(self, leaf: SquareSums) -> Any:
        mine = [self.tickets.columns(p.source, p.start, p.stop) for p in leaf.parts]

        def forward(x: Tensor) -> Tensor:
            return torch.cat([x * part for part in mine], 1)

        return forward

    def _wide_core(self, leaf: WideNormCore, read: int) -> Any:
        """The statistic's parts must sum to that of all heads, whatever has been gathered."""
        attend = self._core(read)
        whole = [self.tickets.columns(part.source, 0, part.size) for part in leaf.parts]

        def forward(x: Tensor, batch: object, parts: Tensor) -> Tensor:
            view = self.expected.attention_view(read, self.rank)
            right = torch.cat([x * part for part in whole], 1)
            found = leaf.totals(parts)
            where = f"QK norm behind {self.plan.reads[read].name}"
            if self.tickets.counting is None and not torch.equal(found, right):
                differs = (found != right).any(1, keepdim=True)
                if view.real is not None:
                    differs &= view.real
                places = differs.flatten().nonzero()
                if len(places):
                    row = view.numbers[int(places[0])]
                    raise Violation(where, "not the statistic of all heads", read, self.rank, row)
            return cast(Tensor, attend(x, batch))

        return forward

    def _row_linear(self, leaf: RowLinear) -> Any:
        source = leaf.parts[0].source
        mine = self.tickets.columns(source, *leaf.columns)
        bias = self.tickets.once(f"{source} bias") if leaf.has_bias and leaf.bias_here else None

        def forward(x: Tensor) -> Tensor:
            return x * mine if bias is None else x * mine + bias

        return forward

    def _gate(self, leaf: SigmoidGate) -> Any:
        gate = self.tickets.once(leaf.parts[0].source)

        def forward(x: Tensor, out: Tensor) -> Tensor:
            return out * self.tickets.tag(x * gate)

        return forward

    def _router(self, leaf: Router) -> Any:
        def forward(x: Tensor) -> Tensor:
            return router_logits(x, leaf.parts[0].source, leaf.out_features)

        return forward

    def _experts(self, leaf: ExpertWeights) -> Any:
        table = self.tickets.experts(leaf.name, leaf.held, leaf.width)
        biases = None
        if leaf.names.has_bias and leaf.bias_here:
            biases = self.tickets.expert_biases(leaf.name, leaf.held)

        def forward(x: Tensor, local_ids: Tensor, weights: Tensor) -> Tensor:
            factors = self.tickets.routing_weight(weights)
            out = x * (table[local_ids] * factors).sum(1)
            return out if biases is None else out + (biases[local_ids] * factors).sum(1)

        return forward

    def _pack(self, leaf: Pack) -> Any:
        """Codes mean nothing without their own row's scales."""

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            if leaf.form is WireFormat.NONE:
                return (x,)
            scales = self.tickets.tag(x)[:, :1]
            return torch.cat((x[:, :1] + scales, x[:, 1:]), 1), scales

        return forward

    def _logits(self, leaf: Linear) -> Any:
        part = leaf.parts[0]
        factors = torch.zeros(part.rows, dtype=torch.int64)
        known = logit_factors(part.size)[part.start : part.stop]
        factors[: len(known)] = known

        def forward(x: Tensor) -> Tensor:
            return x[:, :1] * factors

        return forward


def _unpack(values: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    codes, *scales = values
    if not scales:
        return codes
    return torch.cat((codes[:, :1] - scales[0], codes[:, 1:]), 1)


def _pass(x: Tensor, *others: Tensor) -> Tensor:
    """Provenance goes through: the leaf mixes no rows, and its features are not told apart."""
    return x
