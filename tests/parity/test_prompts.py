"""Where prompts come from."""

from pathlib import Path

import pytest

from isomoe.errors import ConfigError
from isomoe.parity.prompts import (
    ANSWER_TOKENS,
    DEFAULT_COUNT,
    from_file,
    questions,
    random_ids,
    shipped,
)
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint

TOKENIZER = Tokenizer(bundled_checkpoint())
HELD_OUT = bundled_checkpoint() / "heldout.jsonl"


def test_questions_of_a_checkpoint_are_chosen_the_same_way_each_time() -> None:
    first = questions(HELD_OUT, TOKENIZER.encode, DEFAULT_COUNT)
    assert first == questions(HELD_OUT, TOKENIZER.encode, DEFAULT_COUNT)
    assert len({prompt.token_ids for prompt in first.prompts}) == DEFAULT_COUNT
    prompt = first.prompts[0]
    assert prompt.text is not None
    assert prompt.text.startswith("Question: ")
    assert TOKENIZER.decode(list(prompt.token_ids or ())) == prompt.text


def test_a_held_out_set_with_short_answers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    with pytest.raises(ConfigError, match=f"0 answers have {ANSWER_TOKENS[0]} to"):
        questions(file, TOKENIZER.encode, 1)


def test_the_shipped_texts_have_languages_code_mathematics_and_long_context() -> None:
    found = shipped(1000).prompts
    kinds = {prompt.kind for prompt in found}
    assert {"english", "german", "chinese", "arabic", "code", "maths", "long"} <= kinds
    assert len({prompt.text for prompt in found}) == len(found) >= 80
    longest = max(len(prompt.text or "") for prompt in found)
    assert longest > 5_000
    first = {prompt.kind for prompt in shipped(12).prompts}
    assert first == kinds, "every kind in turn, so that a few prompts are of all kinds"


def test_a_file_may_mix_texts_and_objects(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text(
        'Mia has 2.\n\n{"prompt": "Ben has 3.", "kind": "story"}\n{"question": "How many?"}\n'
    )
    found = from_file(str(file))
    texts = [prompt.text for prompt in found.prompts]
    assert texts == ["Mia has 2.", "Ben has 3.", "Question: How many?\nAnswer:"]
    assert found.prompts[1].kind == "story"
    assert all(prompt.token_ids is None for prompt in found.prompts)
    encoded = found.encoded(TOKENIZER.encode).prompts
    assert [TOKENIZER.decode(list(prompt.token_ids or ())) for prompt in encoded] == texts
    assert len(from_file(str(file), 2).prompts) == 2


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
        from_file(str(file))


def test_random_prompts_depend_on_the_seed_alone() -> None:
    first = random_ids(5, 131, 7)
    assert first == random_ids(5, 131, 7)
    assert first.prompts != random_ids(5, 131, 8).prompts
    tokens = [token for prompt in first.prompts for token in prompt.token_ids or ()]
    assert all(0 <= token < 131 for token in tokens)
    with pytest.raises(ConfigError, match="--random-prompts 0"):
        random_ids(0, 131, 7)


def test_a_file_of_another_editor_has_the_same_lines(tmp_path: Path) -> None:
    """A byte order mark is no text, and only a line end ends a line."""
    file = tmp_path / "prompts"
    file.write_bytes('\ufeff{"prompt": "a"}\r\none\u2028two\n'.encode())
    assert [prompt.text for prompt in from_file(str(file)).prompts] == ["a", "one\u2028two"]


@pytest.mark.parametrize("line", ["no json", "[]", "7", '{"question": "a"}', '{"answer": ["b"]}'])
def test_a_held_out_set_of_another_form_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "heldout.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"heldout.jsonl, line 2: is no object with the texts"):
        questions(file, TOKENIZER.encode, 1)
