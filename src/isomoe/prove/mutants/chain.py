"""Mutants of what blocks declare: placements that are not those of what they take or give."""

from collections.abc import Callable
from dataclasses import replace

from isomoe.layout import BlockSpec, Chain, Letter, Variant, row_sharded
from isomoe.prove.mutants.base import ATTENTION, EXPERTS, SHARED, Mutant, Needs


def _redeclared(kind: str, change: Callable[[Variant], Variant]) -> Callable[[Chain], Chain]:
    """Changes the declared placements of every block of a kind."""

    def block(spec: BlockSpec) -> BlockSpec:
        if spec.kind != kind:
            return spec
        return replace(spec, variants=tuple(change(variant) for variant in spec.variants))

    def in_chain(chain: Chain) -> Chain:
        reads = tuple(
            replace(read, consumers=tuple(block(spec) for spec in read.consumers))
            for read in chain.reads
        )
        return replace(chain, reads=reads)

    return in_chain


def _needs_partial(variant: Variant) -> Variant:
    assert variant.needs is not None
    return Variant(variant.needs.put(Letter.P, variant.gives.where(Letter.P)), variant.gives)


def _gives_replicated(variant: Variant) -> Variant:
    return Variant(variant.needs, variant.gives.put(Letter.R, variant.gives.where(Letter.P)))


def _on_own_rows(variant: Variant) -> Variant:
    own = row_sharded(len(variant.gives), len(variant.gives))
    return Variant(own, own)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="partial-declared-replicated",
        code="M03",
        what="the experts declare that they give R, and give addends",
        block=EXPERTS,
        in_chain=_redeclared(EXPERTS, _gives_replicated),
    ),
    Mutant(
        name="attention-declared-replicated",
        code="M03",
        what="attention declares that it gives R, and gives addends",
        block=ATTENTION,
        in_chain=_redeclared(ATTENTION, _gives_replicated),
    ),
    Mutant(
        name="unreduced-shared-expert",
        code="M08",
        what="a shared expert's addend joins after the sum of the routed experts",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_chain=_redeclared(SHARED, _gives_replicated),
    ),
    Mutant(
        name="sharded-shared-expert-on-own-rows",
        code="M08",
        what="a shared expert of which each rank holds a part takes rows that no other rank has",
        block=SHARED,
        needs=Needs.SHARED,
        model="qwen2-57b-a14b",
        in_chain=_redeclared(SHARED, _on_own_rows),
    ),
    Mutant(
        name="norm-on-partial",
        code="M10",
        what="the experts are fed from a norm over partial sums",
        block=EXPERTS,
        in_chain=_redeclared(EXPERTS, _needs_partial),
    ),
)
