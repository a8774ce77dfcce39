"""Two runs side by side, on runs made by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from isomoe.errors import ConfigError
from isomoe.parity.compare import Summary, common_prefix, compare, divergence
from isomoe.parity.run import Candidate, Place, Prompt, Run, Text
from isomoe.parity.words import in_words

OTHER = 99
"""A token that is every place's second candidate."""


def place(token: int, logprob: float = -0.5, second: float = -1.5) -> Place:
    top = (Candidate(token, None, logprob), Candidate(OTHER, None, second))
    return Place(Candidate(token, None, logprob), top, 1)


def output(*tokens: int, logprob: float = -0.5, second: float = -1.5) -> Text:
    return tuple(place(token, logprob, second) for token in tokens)


def run(*outputs: Text, scores: tuple[Text, ...] | None = None) -> Run:
    return Run(name="run", dialect="made", outputs=outputs, scores=scores or outputs)


BASE = run(output(1, 2, 3), output(4, 5))


@pytest.mark.parametrize(
    ("ones", "others", "shared"),
    [((1, 2, 3), (1, 2, 3), 3), ((1, 2, 3), (1, 9, 3), 1), ((1,), (2,), 0), ((1, 2), (1, 2, 3), 2)],
)
def test_common_prefix_ends_at_the_first_difference(
    ones: tuple[int, ...], others: tuple[int, ...], shared: int
) -> None:
    assert common_prefix(output(*ones), output(*others)) == shared


def test_texts_stand_for_ids_where_one_side_tells_none() -> None:
    def texts(*words: str) -> Text:
        return tuple(Place(Candidate(None, word, -0.5)) for word in words)

    both = tuple(Place(Candidate(n, word, -0.5)) for n, word in enumerate(("a", "b")))
    assert common_prefix(texts("a", "b"), both) == 2
    assert common_prefix(texts("a", "c"), both) == 1
    assert common_prefix(texts("a"), output(1)) == 0, "an id is no text"


def test_the_same_bits_are_identical_and_all_tokens_are_counted() -> None:
    found = compare(BASE, BASE)
    assert found.is_identical
    assert found.forced is not None
    assert (found.free.tokens, found.forced.tokens, found.common_tokens) == (5, 5, 5)
    assert (found.same_prompts, found.top1, found.kl) == (2, 1.0, 0.0)


def test_a_last_bit_is_no_identity() -> None:
    off = math.nextafter(-0.5, 0.0)
    scores = ((*output(1), place(2, off), *output(3)), output(4, 5))
    found = compare(BASE, run(*BASE.outputs, scores=scores))
    assert not found.is_identical
    assert found.forced is not None
    assert found.forced.most > 0.0
    assert found.free.most == 0.0


def test_a_run_without_scores_is_never_identical() -> None:
    found = compare(BASE, replace(BASE, scores=None))
    assert (found.forced, found.is_identical, found.free.most) == (None, False, 0.0)


def test_the_summary_is_over_tokens_not_over_prompts() -> None:
    scores = (output(1, 2, 3), (*output(4), place(5, -0.55)))
    found = compare(BASE, run(*BASE.outputs, scores=scores)).forced
    assert found is not None
    assert found.mean == pytest.approx(0.05 / 5)
    assert found.bias == pytest.approx(-0.05 / 5)
    assert (found.median, found.most) == (0.0, pytest.approx(0.05))


def test_where_two_outputs_part_both_candidates_come_with_both_logprobs() -> None:
    theirs = run((*output(1), place(OTHER, -0.4, -0.4), *output(7)), output(4, 5), scores=None)
    theirs = replace(
        theirs,
        outputs=(
            (*output(1), Place(Candidate(OTHER, None, -0.4), (Candidate(2, None, -0.6),))),
            output(4, 5),
        ),
        scores=BASE.scores,
    )
    found = compare(BASE, theirs)
    parting = found.prompts[0].first_difference
    assert parting is not None
    assert parting.baseline is not None
    assert parting.other is not None
    assert (parting.place, parting.baseline.token_id, parting.other.token_id) == (1, 2, OTHER)
    assert (parting.baseline_of_other, parting.other_of_baseline) == (-1.5, -0.6)
    assert found.common_tokens == 1 + 2


def test_an_output_that_ends_early_parts_at_its_end() -> None:
    parting = compare(BASE, run(output(1, 2), output(4, 5), scores=BASE.scores)).prompts[0]
    assert parting.first_difference is not None
    assert (parting.first_difference.place, parting.first_difference.other) == (2, None)


def test_kl_is_that_of_the_candidates_with_the_rest_as_one_more() -> None:
    def spread(*probabilities: float) -> Place:
        top = tuple(Candidate(n, None, math.log(p)) for n, p in enumerate(probabilities))
        return Place(top[0], top, 1)

    ours, theirs = spread(0.5, 0.3), spread(0.4, 0.35)
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.35) + 0.2 * math.log(0.2 / 0.25)
    assert divergence(ours, theirs) == pytest.approx(expected)
    assert divergence(ours, Place(ours.token)) is None


def test_a_token_beyond_the_candidates_is_not_ranked_first() -> None:
    hidden = Place(Candidate(1, None, -9.0), (Candidate(OTHER, None, -0.1),))
    scores = ((hidden, *output(2, 3)), output(4, 5))
    found = compare(BASE, run(*BASE.outputs, scores=scores))
    assert found.top1 == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("ours", "theirs", "fault"),
    [
        (run(), run(), "run: nothing to compare"),
        (BASE, run(BASE.outputs[0]), "run: outputs of 1 of 2 prompts"),
        (
            BASE,
            replace(BASE, name="short", scores=BASE.outputs[:1]),
            "short: scores of 1 of 2 prompts",
        ),
        (
            BASE,
            run(*BASE.outputs, scores=(output(1, 2), output(4, 5))),
            "run: prompt 0: 2 of 3 tokens scored",
        ),
        (
            BASE,
            run(*BASE.outputs, scores=(output(1, 2, 8), output(4, 5))),
            "run: prompt 0: scored other tokens than the baseline's",
        ),
        (run(()), run(()), "run: prompt 0: no output token"),
        (BASE, Run(name="dead", dialect="made", error="dead: rank 1 was killed"), "dead: rank 1"),
    ],
)
def test_a_gap_is_a_fault_and_nothing_is_concluded(ours: Run, theirs: Run, fault: str) -> None:
    found = compare(ours, theirs)
    assert found.fault is not None
    assert found.fault.startswith(fault)
    assert found.prompts == ()
    assert not found.is_identical


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_summary_of_what_is_not_finite_is_no_number(wrong: float) -> None:
    assert math.isnan(Summary.of([0.1, wrong]).mean)
    assert math.isnan(Summary.of([]).most)


def test_a_run_comes_back_from_its_file_with_every_bit(tmp_path: Path) -> None:
    odd = Run(
        name="http://host",
        dialect="sglang",
        facts={"version": "1"},
        prompts=(Prompt((1, 2), "grüße\n", "german"), Prompt(None, "x"), Prompt((7,))),
        outputs=(output(1, 2, logprob=-1 / 3), (Place(Candidate(None, "é", math.nan)),), ()),
        scores=(output(1, 2, logprob=-2 / 3),),
        again={"alone": (output(1, 2),)},
        notes=("a note",),
        error="host: broke off",
    )
    file = tmp_path / "run.json"
    odd.save(file)
    found = Run.load(file)
    # NaN is unlike itself, so that place is compared by its text.
    assert found.outputs[1][0].token.text == "é"
    assert math.isnan(found.outputs[1][0].logprob)
    assert replace(found, outputs=()) == replace(odd, outputs=())
    assert found.outputs[0] == odd.outputs[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "format is None"),
        ('{"format": "other/1"}', "format is 'other/1'"),
        ("{", "not readable as JSON"),
        ('{"format": "isomoe-parity-run/1", "name": "a"}', "not a whole run"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Run.load(file)


def test_runs_of_texts_alone_are_compared_word_by_word() -> None:
    whole = run((Place(Candidate(None, "one two", math.nan)),))
    names = {1: "one", 2: " two", 3: " three"}
    ours = in_words(run(output(1, 2, 3)), lambda ids: "".join(names[token] for token in ids))
    found = compare(ours, in_words(whole, None))
    assert (found.common_tokens, found.free.tokens, found.forced) == (2, 0, None)
