"""The tests that tell a target from the noise floor. Pure.

Each gives the chance that a target which is the same model looks so. They look for different
things: `scale` for deltas that are larger than the floor on the whole, `shift` for deltas that are
no larger but the same for a token wherever it stands, `outliers` for a few tokens in many prompts,
`one_prompt` for one prompt that is wrong from end to end, `partings` for outputs that part where
neither run was near a tie. docs/parity.md has the reasons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from isomoe.parity.compare import Comparison
from isomoe.parity.noise import QUANTUM, Noise, delta_pairs, doubt
from isomoe.parity.run import Candidate, Place
from isomoe.parity.student import exceeds

CLIP = 3.0
"""Deltas beyond so many units count as so many in `shift`: an expert that flips is no shift."""
BLOCK = 4
"""Consecutive tokens of a prompt that count as one in `one_prompt`: they are not independent."""
FEWEST_PROMPTS = 8
"""With fewer, a direction learnt from some prompts says little of the others."""
WHOLE = 2.5
"""How many times the margin one prompt may be: a near tie in routing may turn a whole prompt. And
partings, which are where the noise was large: on random ids, 2.7 to 3.6 times that of a logit."""
SHIFT_MARGIN = 0.1
"""Standard deviations of a prompt. Prompts that are alike are rounded alike, a little."""


class Half(StrEnum):
    """Which of the two comparisons a test looks at."""

    FORCED = "teacher-forced"
    FREE = "free-running"


class Part(StrEnum):
    """Which prompts a test looks at."""

    ALL = "all prompts"
    ALONE = "prompts sent one at a time"


class Kind(StrEnum):
    """What a test looks for."""

    SCALE = "scale"
    SHIFT = "shift"
    OUTLIERS = "outliers"
    ONE_PROMPT = "one prompt"
    PARTINGS = "partings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """What one test found.

    Attributes:
        effect: in the test's own measure: times the floor (scale, one prompt, partings), standard
            deviations of a prompt (shift), prompts (outliers).
        chance: that a target which is the same model looks so in this test.
        says: the finding as a sentence without its end.
    """

    __test__ = False  # not for pytest

    kind: Kind
    half: Half
    effect: float
    chance: float
    says: str
    part: Part = Part.ALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt in one half of a comparison, as far as both runs speak of the same tokens.

    Attributes:
        prompt: its index.
        pairs: the baseline's place and the target's.
        floors: ln of the floor of each place, in nats.
        maxima: the largest |delta| of each source of the floor.
        gap: half of how far the log-odds of the two choices moved where the outputs part.
        logit: ln of the noise of a logit, in nats.
    """

    prompt: int
    pairs: tuple[tuple[Place, Place], ...]
    floors: tuple[float, ...]
    maxima: tuple[float, ...]
    gap: float = 0.0
    logit: float = 0.0

    @property
    def deltas(self) -> list[float]:
        """Signed, in nats."""
        return [their.logprob - our.logprob for our, their in self.pairs]

    @property
    def sizes(self) -> list[float]:
        """ln of |delta| over its floor, for each token."""
        return [
            math.log(abs(delta) + QUANTUM) - floor
            for delta, floor in zip(self.deltas, self.floors, strict=True)
        ]

    @property
    def most(self) -> float:
        """The largest |delta|, or what the parting says."""
        return max(self.gap, max(map(abs, self.deltas), default=0.0))


def samples(comparison: Comparison, noise: Noise, half: Half) -> list[Sample]:
    """One for each prompt that has tokens to compare; a prompt asked twice counts once."""
    ours, theirs = comparison.baseline, comparison.other
    first: dict[object, int] = {}
    found = []
    for index, prompt in enumerate(comparison.prompts):
        key = ours.prompts[index] if index < len(ours.prompts) else index
        if first.setdefault(key, index) != index:
            continue
        gap = 0.0
        if half is Half.FREE:
            our, their = ours.outputs[index], theirs.outputs[index]
            pairs = delta_pairs(our, their)
            place = prompt.common_prefix
            if place < min(len(our), len(their)):
                gap = _gap(our[place], their[place])
        elif ours.scores is not None and theirs.scores is not None:
            pairs = list(zip(ours.scores[index], theirs.scores[index], strict=True))
        else:
            return []
        finite = [
            (pair, floor)
            for pair, floor in zip(pairs, noise.floors[index], strict=False)
            if math.isfinite(pair[0].logprob) and math.isfinite(pair[1].logprob)
        ]
        if finite or gap:
            found.append(
                Sample(
                    prompt=index,
                    pairs=tuple(pair for pair, _ in finite),
                    floors=tuple(floor for _, floor in finite),
                    maxima=noise.maxima[index],
                    gap=gap,
                    logit=noise.logits[index],
                )
            )
    return found


def _gap(ours: Place, theirs: Place) -> float:
    """Half of the nats by which the odds of two choices moved, at least; 0 where it is not known.

    Half, because both log-probabilities move.
    """
    if not _are_comparable(ours.token, theirs.token):
        return 0.0
    found = _lead(ours, theirs.token) + _lead(theirs, ours.token)
    return max(0.0, found / 2) if math.isfinite(found) else 0.0


def _lead(place: Place, rival: Candidate) -> float:
    """By how many nats the token of a place is likelier than another, at least.

    A rival that is not listed is at most as likely as the last one that is, and as all that the
    token leaves.
    """
    known = place.logprob_of(rival)
    if known is None:
        known = math.log(doubt(place) + QUANTUM)
        if place.top:
            known = min(known, place.top[-1].logprob)
    return place.logprob - known


def _are_comparable(one: Candidate, other: Candidate) -> bool:
    """Whether it can be told that these are different tokens: both have an id, or both a text."""
    ids = one.token_id is not None and other.token_id is not None
    return ids or (one.text is not None and other.text is not None)


def scale(found: Sequence[Sample], half: Half, margin: float, part: Part = Part.ALL) -> Test | None:
    """Whether deltas are larger than the floor, token by token."""
    means = [math.fsum(one.sizes) / len(one.sizes) for one in found if one.pairs]
    if not means:
        return None
    times = math.exp(math.fsum(means) / len(means))
    return Test(
        kind=Kind.SCALE,
        half=half,
        effect=times,
        chance=exceeds(means, math.log(margin)),
        says=f"{half} deltas{_of(part)} are {times:.3g} times the noise floor",
        part=part,
    )


def _of(part: Part) -> str:
    return "" if part is Part.ALL else f" of {part}"


def partings(found: Sequence[Sample], half: Half, margin: float) -> Test | None:
    """Whether outputs part where the noise of a logit does not explain it."""
    sizes = [math.log(one.gap + QUANTUM) - one.logit for one in found if one.gap]
    if not sizes:
        return None
    times = math.exp(math.fsum(sizes) / len(sizes))
    return Test(
        kind=Kind.PARTINGS,
        half=half,
        effect=times,
        chance=exceeds(sizes, math.log(WHOLE * margin)),
        says=f"{half} outputs of {len(sizes)} of {len(found)} prompts part where the odds moved by "
        f"{times:.3g} times the noise of a logit",
    )


def one_prompt(found: Sequence[Sample], half: Half, margin: float) -> Test | None:
    """Whether the deltas of one prompt are far larger than the floor, all along it."""
    best: tuple[float, float, int] | None = None
    tried = 0
    for one in found:
        sizes = one.sizes
        blocks = [
            math.fsum(sizes[at : at + BLOCK]) / BLOCK
            for at in range(0, len(sizes) - BLOCK + 1, BLOCK)
        ]
        if len(blocks) < 2:
            continue
        tried += 1
        chance = exceeds(blocks, math.log(WHOLE * margin))
        if best is None or chance < best[0]:
            best = (chance, math.exp(math.fsum(blocks) / len(blocks)), one.prompt)
    if best is None:
        return None
    chance, times, prompt = best
    return Test(
        kind=Kind.ONE_PROMPT,
        half=half,
        effect=times,
        chance=min(1.0, chance * tried),
        says=f"prompt {prompt}: {half} deltas are {times:.3g} times the noise floor all along it",
    )


def outliers(found: Sequence[Sample], half: Half, margin: float) -> Test | None:
    """Whether more prompts have a token further off than chance would leave to the target.

    If the target is one more run of the same model, the largest deltas of all prompts and runs
    are as likely anybody's: all of the k largest are the target's with a chance of (1 / runs)^k.
    """
    own = [most for one in found for most in one.maxima]
    if not own:
        return None
    limit = margin * max(own)
    beyond = sum(one.most > limit for one in found)
    return Test(
        kind=Kind.OUTLIERS,
        half=half,
        effect=float(beyond),
        chance=(len(found) / (len(found) + len(own))) ** beyond,
        says=f"{beyond} of {len(found)} prompts have a {half} token that is more than "
        f"{limit:.2g} nats off, {margin:.2g} times the worst of the noise floor",
    )


def shift(
    found: Sequence[Sample],
    half: Half,
    unit: float,
    margin: float = SHIFT_MARGIN,
    part: Part = Part.ALL,
) -> Test | None:
    """Whether log-probabilities of the same tokens move the same way in prompt after prompt.

    Rounding has next to no memory: what it does to a token in one prompt says little of the next.
    A layer that is off adds the same to the logits of the same tokens. So the direction learnt
    from the prompts so far is tried on the next one, and the steps along it are averaged. Their
    mean is all but 0 for rounding, however large or heavy-tailed it is: no floor is needed.

    Args:
        unit: the typical delta of a candidate, in nats.
        margin: standard deviations that the mean may have.
    """
    moves = shift_moves(found, unit)
    if len(moves) < FEWEST_PROMPTS:
        return None
    Random(0).shuffle(moves)  # prompts of one kind stand side by side
    effect, chance = shift_of(moves, margin)
    return Test(
        kind=Kind.SHIFT,
        half=half,
        effect=effect,
        chance=chance,
        says=f"{half} log-probabilities of the same tokens{_of(part)} move the same way in prompt "
        f"after prompt, by {effect:.2g} standard deviations of a prompt",
        part=part,
    )


Key = int | str
"""A token, by id where there is one."""


Move = dict[Key, tuple[float, int]]
"""How far each token moved over a whole prompt, in units of its noise, and in how many places."""


def shift_moves(found: Sequence[Sample], unit: float) -> list[Move]:
    """What `shift` looks at: one move for each prompt that has tokens."""
    return [_move(one, unit) for one in found if one.pairs]


def shift_of(moves: Sequence[Move], margin: float = SHIFT_MARGIN) -> tuple[float, float]:
    """How far prompts move along the direction of those before them, and the chance of it.

    Returns:
        The mean step in standard deviations, and how likely rounding alone has such a mean.
    """
    steps, least = _steps(moves)
    mean = math.fsum(steps) / len(steps)
    spread = math.sqrt(math.fsum((step - mean) ** 2 for step in steps) / (len(steps) - 1))
    spread = max(spread, least)
    if spread == 0.0:
        return 0.0, 1.0
    return mean / spread, exceeds([step / spread for step in steps], margin, least_spread=1.0)


def _move(one: Sample, unit: float) -> Move:
    """One prompt's.

    The candidates that were not chosen tell far more than the chosen one, whose probability near 1
    hides its logit; where no candidates are known, the chosen ones must do. Lists count as far as
    both go: at the end of the shorter one a candidate is seen only if it moved up.
    """
    found: Move = {}
    for (our, their), floor in zip(one.pairs, one.floors, strict=True):
        length = min(len(our.top), len(their.top))
        listed = Place(their.token, their.top[:length])
        deltas = [
            (_key(candidate), (logprob - candidate.logprob) / unit)
            for candidate in our.top[:length]
            if not candidate.is_token_of(our.token)
            and (logprob := listed.logprob_of(candidate)) is not None
        ]
        if not deltas:
            deltas = [(_key(our.token), (their.logprob - our.logprob) / math.exp(floor))]
        for key, units in deltas:
            if math.isfinite(units):
                total, places = found.get(key, (0.0, 0))
                found[key] = total + max(-CLIP, min(CLIP, units)), places + 1
    return found


def _key(candidate: Candidate) -> Key:
    return candidate.text or "" if candidate.token_id is None else candidate.token_id


def _steps(moves: Sequence[Move]) -> tuple[list[float], float]:
    """Each prompt's move along the direction of those before it, once some have been seen.

    Returns:
        The steps, and their standard deviation if every delta had one unit of noise: what repeats
        below that is the rounding of prompts that are alike, not a defect.
    """
    squares: dict[Key, float] = {}
    for move in moves:
        for key, (units, _) in move.items():
            squares[key] = squares.get(key, 0.0) + units * units
    # Frequent tokens would drown the others; rare ones would add nothing but noise.
    rest = 0.1 * math.fsum(squares.values()) / max(1, len(squares))
    weights = {key: (square + rest) ** -0.25 for key, square in squares.items() if square + rest}
    direction: dict[Key, float] = dict.fromkeys(weights, 0.0)
    steps, least = [], []
    for index, move in enumerate(moves):
        length = math.sqrt(math.fsum(part * part for part in direction.values()))
        known = {key: told for key, told in move.items() if key in weights}
        if index >= max(2, len(moves) // 5) and length > 0.0:
            along = {key: direction[key] * weights[key] / length for key in known}
            steps.append(math.fsum(along[key] * units for key, (units, _) in known.items()))
            least.append(math.fsum(along[key] ** 2 * n for key, (_, n) in known.items()))
        for key, (units, _) in known.items():
            direction[key] += units * weights[key]
    if len(steps) < 2:
        return [0.0, 0.0], 0.0
    return steps, math.sqrt(math.fsum(least) / len(least))


def bias(found: Sequence[Sample]) -> float | None:
    """The mean signed delta in units of the floor; None if there is no token."""
    units = [
        delta / math.exp(floor)
        for one in found
        for delta, floor in zip(one.deltas, one.floors, strict=True)
    ]
    return math.fsum(units) / len(units) if units else None
