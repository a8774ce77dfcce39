"""What a mutant is: a known defect, planted on purpose."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum

from isomoe.blocks import Block, GatedMLP, RowLinear, SparseMoe, WideNormAttention
from isomoe.layout import Chain
from isomoe.models import CausalLM
from isomoe.stream import ResidualStream

EMBEDDING, ATTENTION, EXPERTS = "embedding", "attention", "experts"
DENSE, SHARED, LM_HEAD = "dense FFN", "shared expert", "lm_head"
"""Kinds of blocks, as `BlockSpec.kind` has them."""

WAITS = "makes ranks wait for one another for ever (`isomoe prove --mutant` runs it)"


def _has_output_bias(block: Block) -> bool:
    leaves = (leaf for leaf in block.leaves() if isinstance(leaf, RowLinear))
    return block.spec.kind == ATTENTION and any(leaf.has_bias for leaf in leaves)


class Needs(Enum):
    """What a model must have for a mutant to be expressible in it."""

    NOTHING = "nothing in particular"
    DENSE = "a dense FFN"
    SHARED = "a shared expert"
    OUTPUT_BIAS = "a bias on attention's output projection"
    EXPERT_BIAS = "biases of the experts"
    WIDE_NORM = "a QK norm over all heads"
    SEVERAL_EXPERTS = "several experts a token"

    def is_in(self, block: Block) -> bool:
        """Whether a block is, or has, that part."""
        match self:
            case Needs.NOTHING:
                return True
            case Needs.DENSE | Needs.SHARED:
                kind = DENSE if self is Needs.DENSE else SHARED
                return isinstance(block, GatedMLP) and block.spec.kind == kind
            case Needs.OUTPUT_BIAS:
                return _has_output_bias(block)
            case Needs.EXPERT_BIAS:
                return isinstance(block, SparseMoe) and block.experts.names.has_bias
            case Needs.WIDE_NORM:
                return isinstance(block, WideNormAttention)
            case Needs.SEVERAL_EXPERTS:
                return isinstance(block, SparseMoe) and block.routing.top_k > 1


class When(StrEnum):
    """The steps in which a mutant acts: a comparison that has none of them cannot see it."""

    ALWAYS = "every step"
    EQUAL = "steps of equal attention-DP groups"
    UNEQUAL = "steps of unequal attention-DP groups"
    SMALL = "steps of at most 8 rows"
    LARGE = "steps of more than 8 rows"
    ONE_GROUP = "steps in which one attention-DP group alone has rows"
    SOME_ROWS = "steps in which not all rows get logits"
    PADDED = "steps with padding rows"


def _chain_as_it_is(chain: Chain) -> Chain:
    return chain


def _model_as_it_is(model: CausalLM) -> None:
    """Changes nothing."""


def _stream_as_it_is(stream: ResidualStream) -> None:
    """Changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A defect. It changes what a model declares, a rank's model, or its stream; never the oracle.

    Attributes:
        name: as typed.
        code: the mutation operator of docs/mutants.md.
        what: one line for `--list-mutants`.
        block: the kind of block whose contribution is the first to be wrong on `layout`.
        needs: the part that a model must have.
        model: of the models that ship, one that has it; `miniature` makes it small.
        layout: the shorthand of a layout on which it acts in that model's miniature.
        when: the steps in which it acts.
        engine_refusal: why the real engine cannot run it, or None.
        in_chain: changes what the model declares, before it is planned.
        in_model: changes one rank's model when it is built, before it has weights.
        in_stream: changes one rank's stream before a step.
    """

    name: str
    code: str
    what: str
    block: str
    needs: Needs = Needs.NOTHING
    model: str = "arith-moe"
    layout: str = "tp4,dp2,ep2"
    when: When = When.ALWAYS
    engine_refusal: str | None = None
    in_chain: Callable[[Chain], Chain] = _chain_as_it_is
    in_model: Callable[[CausalLM], None] = _model_as_it_is
    in_stream: Callable[[ResidualStream], None] = _stream_as_it_is

    @property
    def runs_in_engine(self) -> bool:
        """Whether it can be planted in the real engine."""
        return self.engine_refusal is None
