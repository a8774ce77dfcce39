"""The proof: every layout, regime and case of a model, on simulated ranks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf

from isomoe.errors import PlacementError
from isomoe.layout import (
    BUCKETS,
    MACHINES,
    Chain,
    Choice,
    FusedSums,
    Machine,
    Mesh,
    Planner,
    Rate,
    Regime,
    regimes,
)
from isomoe.prove.cases import cases
from isomoe.prove.cover import Candidate, cover
from isomoe.prove.finding import Finding, Stats
from isomoe.prove.mutants import Mutant
from isomoe.prove.provenance import Tickets
from isomoe.prove.shares import faults_of, share_of
from isomoe.prove.steps import on_ranks_of, told_apart
from isomoe.prove.stubs import Violation
from isomoe.prove.subject import Subject
from isomoe.prove.world import World, found_in


def prove(
    subjects: Iterable[Subject], mutant: Mutant | None = None, fuses_all: bool = False
) -> Iterator[tuple[Stats, Finding | None]]:
    """Proves models in every regime, on layouts of as many ranks in as many attention-DP groups.

    The shares that ranks hold of each block must add up to it. Plans run until each of their
    steps, from one read to the next, has been run: each read checks every row of the residual on
    every rank, so a step that once led from a right residual to a right one does so in every
    plan. With a mutant, which may spoil either, and in some regimes alone, shares and regime count
    as parts of a step.

    Args:
        fuses_all: plan for a machine that fuses whatever it can, too; with a mutant it always is.

    Yields:
        What was checked since the last time, and the violation if there is one.
    """
    proven: set[object] = set()
    structures: set[object] = set()
    known: dict[object, object] = {}
    candidates: dict[frozenset[object], Candidate] = {}
    for subject in subjects:
        stats = Stats(layouts=1)
        models = subject.build(), subject.build(subject.layout.tp_size - 1)
        mesh = models[0].seat.mesh
        shares = {
            block.name: (
                share_of(block),
                share_of(other),
                on_ranks_of(block.spec.variants[0].gives, mesh.axes),
            )
            for block, other in zip(models[0].blocks(), models[1].blocks(), strict=True)
        }
        if mutant is None:
            fault = _check_shares(subject, mesh, shares, proven, stats)
            if fault is not None:
                yield stats, fault
                return
        try:
            chain = models[0].chain if mutant is None else mutant.in_chain(models[0].chain)
            wanted = list(_regimes(chain.mesh, fuses_all or mutant is not None))
            stats.regimes = len(wanted)
            new = mutant is not None or chain.structure not in structures
            for choice in _choices(chain, wanted) if new else ():
                if mutant is not None or not known.keys() >= set(choice.key):
                    told = told_apart(choice.bind(), shares, mutant)
                    known.update(zip(choice.key, told, strict=True))
                steps = frozenset(known[step] for step in choice.key)
                if steps not in candidates:
                    candidates[steps] = Candidate(subject, mesh, choice.bind(), steps)
            structures.add(chain.structure)
        except PlacementError as error:
            yield stats, _refused(subject, error)
            return
        yield stats, None
    yield from _run(list(candidates.values()), mutant)


def _choices(chain: Chain, wanted: list[tuple[Machine, Regime]]) -> Iterator[Choice]:
    """What is planned for a chain on each machine, in each regime."""
    planner = Planner(chain)
    for machine, regime in wanted:
        yield planner.choose(machine, regime)


_FREE = Rate(alpha_us=0.0, bytes_per_us=inf)
FUSES_ALL = replace(
    MACHINES["cuda"],
    name="fuses all",
    fused=FusedSums(whole=_FREE, scattered=_FREE, host_us=0.0, max_bytes=1 << 60),
)
"""A machine on which every sum that can be fused with a norm is."""


def _regimes(mesh: Mesh, fuses_all: bool) -> Iterator[tuple[Machine, Regime]]:
    """What each chain is planned for."""
    for machine in MACHINES.values():
        for regime in regimes(mesh):
            yield machine, regime
    for regime in regimes(mesh, BUCKETS[:1]) if fuses_all else ():
        yield FUSES_ALL, regime


def _run(
    candidates: list[Candidate], mutant: Mutant | None
) -> Iterator[tuple[Stats, Finding | None]]:
    """Runs plans until all their steps have run; with a mutant all of them, as they come."""
    worlds: dict[int, World] = {}
    whole: set[bool] = set()
    for subject, mesh, plan, _ in cover(candidates) if mutant is None else candidates:
        stats = Stats(plans=1)
        if id(subject) not in worlds:
            worlds[id(subject)] = World(subject, mutant, mesh)
        every = list(cases(subject.layout.attn_dp_size, plan.regime.equal))
        # The last case has rows of all kinds; the others need not see every step.
        for case in every[-1:] if plan.regime.equal in whole and mutant is None else every:
            found = worlds[id(subject)].check(plan, case, stats)
            if found is not None:
                yield stats, found
                return
        whole.add(plan.regime.equal)
        yield stats, None


def _check_shares(
    subject: Subject,
    mesh: Mesh,
    shares: Mapping[str, object],
    seen: set[object],
    stats: Stats,
) -> Finding | None:
    """Checks the shares of blocks that are unlike any that were checked on as many ranks."""
    new = {name: share for name, share in shares.items() if share not in seen}
    if not new:
        return None
    tickets = Tickets()
    ranks = [subject.build(rank) for rank in range(mesh.size)]
    for blocks in zip(*(model.blocks() for model in ranks), strict=True):
        name = blocks[0].name
        if name not in new or new[name] in seen:
            continue
        fault = faults_of(mesh, list(blocks), tickets)
        if fault is not None:
            violation = Violation(name, fault, None, None, None)
            return found_in(subject, "", "shares", violation, {})
        stats.shares += 1
        seen.add(new[name])
    return None


def _refused(subject: Subject, error: PlacementError) -> Finding:
    return Finding(
        model=subject.name,
        layout=str(subject.layout),
        level=1,
        regime="",
        case="",
        block="",
        message=str(error),
    )
