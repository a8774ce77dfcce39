"""Outputs that satisfy a JSON schema or match a regular expression, through llguidance."""

import json
import logging
import time
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isomoe.engine.sampling_params import SamplingParams
from isomoe.errors import IsomoeError, RequestError
from isomoe.kernels.sampling import pack_bits
from isomoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_LOG = logging.getLogger(__name__)
# Between the parts of JSON: a blank, or a line break with what indents the next line. With free
# white space a weak model may go on for ever.
_WHITESPACE = r" |\r?\n[ \t]{0,32}"
_LONGEST_REASON = 200
# llguidance looks for a string that satisfies all patterns that are joined, in time and memory
# exponential in their number: a few milliseconds for 8, a minute and gigabytes for 20.
_MOST_JOINED_PATTERNS = 8
_JOINING = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
_ANNOTATIONS = frozenset(("$defs", "$schema", "default", "definitions", "description", "title"))
# The worker compiles a grammar between two steps, and everybody's next token waits for it.
_MOST_CPU_SECONDS = 0.5


class GrammarFactory:
    """Makes the matchers of one checkpoint's requests.

    Construction reads nothing; the first grammar imports llguidance and loads the tokenizer.

    Args:
        folder: the checkpoint's.
        vocab_size: columns of the logits.
        eos_token_ids: the tokens that may end an output.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._end_ids = frozenset(token for token in eos_token_ids if token < vocab_size)

    def check(self, params: SamplingParams) -> None:
        """Refuses a schema or regular expression that cannot be used.

        It is compiled for that: mostly a millisecond of computing, up to a few hundred for the
        largest. Safe to call from several threads.

        Raises:
            RequestError: with the compiler's reason in one line; or if llguidance or a tokenizer
                is missing.
        """
        if not params.has_grammar:
            return
        compiler = self._compiler  # read before the clock starts
        start = time.thread_time()
        self._compile(params, compiler)
        seconds = time.thread_time() - start
        if seconds > _MOST_CPU_SECONDS:
            raise RequestError(
                f"json_schema or regex took {seconds:.1f} s to compile, the most is "
                f"{_MOST_CPU_SECONDS} s; a simpler one would do"
            )

    def matcher(self, params: SamplingParams) -> "GrammarMatcher":
        """The matcher of a new output, for `params` that have a grammar.

        Never raises: a grammar that `check` would refuse lets the output end and nothing else.
        """
        try:
            compiled = self._compile(params, self._compiler)
        except IsomoeError as error:
            _LOG.error("an output ends before its time: %s", error)
            compiled = None
        return GrammarMatcher(compiled, self._end_ids, self._end)

    @cached_property
    def _end(self) -> Tensor:
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[sorted(self._end_ids)] = True
        return pack_bits(allowed)

    @cached_property
    def _compiler(self) -> "LLTokenizer":
        """The tokenizer as llguidance has it."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise RequestError(
                "json_schema and regex need the package llguidance: pip install 'isomoe[serve]'"
            ) from None
        hf = Tokenizer(self._folder).hf
        try:
            return from_tokenizer(hf, n_vocab=self._vocab_size, eos_token=sorted(self._end_ids))
        except ValueError as error:
            raise RequestError(
                f"json_schema and regex do not work with {self._folder}: {_reason(str(error))}"
            ) from None

    def _compile(self, params: SamplingParams, compiler: "LLTokenizer") -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        schema, regex = params.json_schema, params.regex
        name = "regex" if schema is None else "json_schema"
        try:
            if schema is not None:
                _check_joins(schema)
                grammar = LLMatcher.grammar_from_json_schema(
                    _object_schema(schema), defaults={"whitespace_pattern": _WHITESPACE}
                )
            else:
                assert regex is not None, "there is no grammar"
                grammar = LLMatcher.grammar_from_regex(regex)
        except ValueError as error:
            raise RequestError(f"{name} cannot be used: {_reason(str(error))}") from None
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(compiler, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # that nothing matches, or too much, may show only now
        if matcher.is_error():
            raise RequestError(f"{name} cannot be used: {_reason(matcher.get_error())}")
        return matcher


class GrammarMatcher:
    """How far one output has come in its grammar.

    Args:
        compiled: None allows the end tokens alone.
        end_ids: the end tokens.
        end: the same as a bitmask, [W] int32.
    """

    def __init__(self, compiled: "LLMatcher | None", end_ids: frozenset[int], end: Tensor) -> None:
        self._compiled = compiled
        self._end_ids = end_ids
        self._end = end

    def advance(self, token_ids: Sequence[int]) -> None:
        """Adds tokens to the output. After an end token the rest does not count."""
        for token in token_ids:
            if self._compiled is None:
                return
            if token in self._end_ids:
                self._compiled = None
            else:
                self._compiled.consume_token(token)

    def allowed(self) -> Tensor:
        """The tokens that may come next, [W] int32.

        The end tokens alone once nothing can follow, or if a limit of llguidance is hit.
        """
        if self._compiled is None:
            return self._end
        bits = self._compiled.compute_bitmask()
        if self._compiled.is_error():
            reason = _reason(self._compiled.get_error())
            _LOG.error("an output ends before its grammar is satisfied: %s", reason)
            self._compiled = None
            return self._end
        mask = torch.frombuffer(bytearray(bits), dtype=torch.int32)
        return mask[: self._end.shape[0]]  # it may have a spare word


def _object_schema(schema: str) -> str:
    """`true` and `false` as objects, the only form that options go with."""
    return f'{{"allOf": [{schema}]}}' if schema.strip() in ("true", "false") else schema


def _check_joins(schema: str) -> None:
    """Refuses what llguidance would work on for too long. It counts roughly, on the safe side."""
    patterns, joins = 0, False
    parts = [json.loads(schema)]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            named = part.get("patternProperties")
            patterns += len(named) if isinstance(named, dict) else 0
            patterns += sum(isinstance(part.get(key), str) for key in ("pattern", "format"))
            joins = joins or _joins(part)
    if joins and patterns > _MOST_JOINED_PATTERNS:
        raise ValueError(
            f"it has {patterns} patterns and formats, the most is {_MOST_JOINED_PATTERNS} in a "
            "schema that joins others (allOf; $ref, anyOf or oneOf beside other keywords)"
        )


def _joins(schema: dict[str, Any]) -> bool:
    """Whether a value has to satisfy two or more of this schema's parts at once."""
    members = schema.get("allOf")
    count = len(members) if isinstance(members, list) else 0
    count += len(schema.keys() & (_JOINING - {"allOf"}))
    return count > 1 or (count == 1 and bool(schema.keys() - _JOINING - _ANNOTATIONS))


def _reason(error: str) -> str:
    """The compiler's reason as one line of bounded length."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    found = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (found or lines or ["no reason is known"])[0][:_LONGEST_REASON]
