"""Who sees a mutant before a number is computed: the type check, or the proof."""

from collections.abc import Iterator
from dataclasses import dataclass

from isomoe.errors import ConfigError
from isomoe.layout import Chain, Parallelism
from isomoe.models import HFConfig
from isomoe.prove.campaign import expressible
from isomoe.prove.corpus import Level, operators
from isomoe.prove.finding import Finding
from isomoe.prove.miniature import miniature
from isomoe.prove.mutants import Mutant
from isomoe.prove.mutants.base import LM_HEAD
from isomoe.prove.runner import prove
from isomoe.prove.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What the checks without numbers say of a mutant on one layout of one model.

    Attributes:
        finding: what the type check (level 1) or the proof (level 2) found; None if neither did.
        blocks: the kinds of block whose contribution the finding is about; empty for a refusal,
            and where ranks disagree on a collective.
    """

    mutant: Mutant
    model: str
    layout: str
    finding: Finding | None
    blocks: frozenset[str]

    @property
    def type_check(self) -> bool:
        """Whether it is refused before anything runs."""
        return self.finding is not None and self.finding.level == 1

    @property
    def proof(self) -> bool:
        """Whether the proof finds it."""
        return self.finding is not None and self.finding.level == 2

    @property
    def expected(self) -> tuple[Level, ...]:
        """What sees the mutant's operator, by the corpus's judgement."""
        return operators()[self.mutant.code].levels

    @property
    def refusals(self) -> tuple[str, ...]:
        """Attempts to write the operator down that are refused."""
        return operators()[self.mutant.code].refusals


def levels(
    mutant: Mutant, config: HFConfig | None = None, layout: Parallelism | None = None
) -> Levels:
    """Proves one layout of one model with a mutant planted: a second, or less.

    Args:
        config: the model; that of the mutant by default.
        layout: on which the mutant acts; that of the mutant by default.

    Raises:
        ConfigError: if the model lacks the part that the mutant changes, or cannot be laid out so.
    """
    model = mutant.model if config is None else str(config.get("model_type", "a model"))
    config = miniature(mutant.model) if config is None else config
    layout = layout or Parallelism.parse(mutant.layout)
    if not expressible(mutant.name, [config]):
        raise ConfigError(f"mutant {mutant.name!r}: {model} lacks {mutant.needs.value}")
    subject = Subject.of(model, config, layout)
    found = [finding for _, finding in prove([subject], mutant) if finding is not None]
    return Levels(
        mutant=mutant,
        model=model,
        layout=str(layout),
        finding=found[0] if found else None,
        blocks=frozenset(_blocks(subject.build().chain, found[0]) if found else ()),
    )


def _blocks(chain: Chain, finding: Finding) -> Iterator[str]:
    """The kinds of block that wrote what a finding is about, or took it."""
    writers: tuple[str, ...] = (chain.embedding.kind,)
    for read in chain.reads:
        kinds = tuple(block.kind for block in read.consumers)
        if finding.block == read.name:
            yield from writers
        elif finding.block.endswith(f" behind {read.name}"):
            yield from kinds
        writers = kinds
    if finding.block in (chain.reads[-1].name, LM_HEAD):  # the rows that get logits, or these
        yield LM_HEAD
