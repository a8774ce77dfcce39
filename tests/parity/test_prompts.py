"""Where prompts come from."""

from pathlib import Path

import pytest

from isomoe.errors import ConfigError
from isomoe.parity.prompts import ANSWER_TOKENS, SHIPPED, from_file, random_ids, shipped
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint

TOKENIZER = Tokenizer(bundled_checkpoint())
HELD_OUT = bundled_checkpoint() / "heldout.jsonl"


def test_shipped_questions_are_chosen_the_same_way_each_time() -> None:
    first = shipped(HELD_OUT, TOKENIZER)
    assert first == shipped(HELD_OUT, TOKENIZER)
    assert len(set(first.token_ids)) == SHIPPED
    text = TOKENIZER.decode(first.token_ids[0])
    assert text.startswith("Question: ")
    assert text.endswith("\nAnswer:")


def test_a_held_out_set_with_short_answers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(ConfigError, match=f"0 answers have {ANSWER_TOKENS[0]} to"):
        shipped(file, TOKENIZER)


def test_a_file_may_mix_texts_and_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('Mia has 2.\n\n{"prompt": "Ben has 3."}\n{"question": "How many?"}\n')
    prompts = from_file(str(file), TOKENIZER)
    texts = [TOKENIZER.decode(ids) for ids in prompts.token_ids]
    assert texts == ["Mia has 2.", "Ben has 3.", "Question: How many?\nAnswer:"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "no line that is not blank"),
        ('{"text": "a"}', 'line 1: has neither "prompt" nor "question"'),
        ('ok\n{"prompt": 3}', "line 2: 'prompt' must be a text"),
        ("{", "line 1: not readable as JSON"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "prompts"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        from_file(str(file), TOKENIZER)


def test_random_prompts_depend_on_the_seed_alone() -> None:
    first = random_ids(5, 131, 7)
    assert first == random_ids(5, 131, 7)
    assert first.token_ids != random_ids(5, 131, 8).token_ids
    assert all(0 <= token < 131 for ids in first.token_ids for token in ids)
    with pytest.raises(ConfigError, match="--random-prompts 0"):
        random_ids(0, 131, 7)
