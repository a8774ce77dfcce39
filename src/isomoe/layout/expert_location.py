"""Where the experts of each layer are, read from a file in SGLang's two forms."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from isomoe.errors import ConfigError
from isomoe.layout.balance import balanced
from isomoe.layout.expert_map import ExpertMap, slots_per_rank

_REDUNDANT, _LOCATION = "--ep-num-redundant-experts", "--init-expert-location"
_MAP, _COUNT = "physical_to_logical_map", "logical_count"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLocation:
    """The placements of all layers, from a file.

    Row i is decoder layer i of the model. Rows of layers without experts are not looked at, and
    may be empty.

    Attributes:
        file: where the rows were read.
        num_redundant: copies beyond the first that each layer has.
        ranks: EP ranks.
        rows: [layers][P] logical experts, or [layers][E] loads if `are_loads`.
        are_loads: whether the placements are yet to be worked out, from loads.
    """

    file: Path
    num_redundant: int
    ranks: int
    rows: tuple[tuple[int, ...], ...]
    are_loads: bool

    @classmethod
    def load(cls, file: Path, num_redundant: int, ranks: int) -> "ExpertLocation":
        """Reads one of the two forms that SGLang's `--init-expert-location FILE.json` has.

        They are {"physical_to_logical_map": [layers][P]} and {"logical_count": [layers][E]}, the
        tokens that each expert got; or [times][layers][E] of them, which are summed.

        Raises:
            ConfigError: if it is not readable as JSON, or has neither form.
        """
        where = f"{_LOCATION} {file}"
        try:
            document: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not readable as JSON ({error})") from None
        forms = [form for form in (_MAP, _COUNT) if isinstance(document, dict) and form in document]
        if len(forms) != 1:
            raise ConfigError(f"{where}: must be an object with either {_MAP} or {_COUNT}")
        form, found = forms[0], document[forms[0]]
        if form == _COUNT and _is_over_time(found):
            times = [_matrix(one, f"{where}: {form}[{t}]") for t, one in enumerate(found)]
            rows = _summed(times, f"{where}: {form}")
        else:
            rows = _matrix(found, f"{where}: {form}")
        return cls(
            file=file,
            num_redundant=num_redundant,
            ranks=ranks,
            rows=rows,
            are_loads=form == _COUNT,
        )

    @property
    def num_layers(self) -> int:
        """Rows of the file: one for each decoder layer, with experts or without."""
        return len(self.rows)

    def for_layer(self, index: int, num_experts: int) -> ExpertMap:
        """The placement of decoder layer `index`, which has `num_experts` experts.

        Raises:
            ConfigError: if the file has no such layer or one of another size, or if the copies do
                not split evenly over the EP ranks.
        """
        where = f"{_LOCATION} {self.file}"
        if not 0 <= index < self.num_layers:
            raise ConfigError(
                f"{where}: has {self.num_layers} rows, none for layer {index}; "
                "every decoder layer needs one, also those without experts"
            )
        row, where = self.rows[index], f"{where}: layer {index}"
        slots_per_rank(num_experts, self.num_redundant, self.ranks)
        if self.are_loads:
            if len(row) != num_experts:
                raise ConfigError(
                    f"{where} has {len(row)} counts; the model has {num_experts} experts there, "
                    "and needs as many"
                )
            return balanced(row, self.num_redundant, self.ranks)
        if len(row) != num_experts + self.num_redundant:
            fits = len(row) - num_experts
            raise ConfigError(
                f"{where} has {len(row)} physical experts; the model's {num_experts} and "
                f"{_REDUNDANT} {self.num_redundant} need {num_experts + self.num_redundant}"
                + (f" ({_REDUNDANT} {fits} would fit)" if fits >= 0 else "")
            )
        try:
            return ExpertMap(row, num_experts)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _is_over_time(found: Any) -> bool:
    """Whether it is a list of matrices; rows of a single matrix may be empty."""
    outer = found if isinstance(found, list) else []
    return any(isinstance(x, list) for row in outer if isinstance(row, list) for x in row)


def _matrix(found: Any, what: str) -> tuple[tuple[int, ...], ...]:
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{what} is {short(found)}, not a list with a row for each layer")
    for layer, row in enumerate(found):
        if not isinstance(row, list):
            raise ConfigError(f"{what}: layer {layer} is {short(row)}, not a list of numbers")
        for place, number in enumerate(row):
            if type(number) is not int or number < 0:
                raise ConfigError(
                    f"{what}: layer {layer} has {short(number)} at {place}; "
                    "it must be a whole number, 0 or more"
                )
    return tuple(map(tuple, found))


def _summed(times: list[tuple[tuple[int, ...], ...]], what: str) -> tuple[tuple[int, ...], ...]:
    """Of matrices of one shape, their sum."""
    shape = _shape(times[0])
    for time, matrix in enumerate(times):
        if _shape(matrix) != shape:
            raise ConfigError(
                f"{what}[{time}] and {what}[0] have other numbers of layers or experts; "
                "they are summed, and need the same"
            )
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*times, strict=True))


def _shape(matrix: Iterable[tuple[int, ...]]) -> list[int]:
    return [len(row) for row in matrix]
