"""`isomoe models`, and docs/models.md beside the data that both show."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from isomoe.cli.main import main
from isomoe.cli.models import print_table, shown_delta
from isomoe.models import FAMILIES, catalogue
from models import record
from models.test_families import CASES


@pytest.fixture(scope="module")
def rows() -> dict[str, catalogue.Row]:
    """By the first architecture."""
    return {row.architectures[0]: row for row in catalogue.rows(catalogue.read_measured())}


def test_every_class_of_the_registry_is_measured_and_proven(rows: dict[str, catalogue.Row]) -> None:
    assert len(rows) == len(FAMILIES)
    assert set(catalogue.read_measured()) == set(rows), "run make models"
    for name, row in rows.items():
        assert row.delta is not None, f"{name}: run make models"
        assert 0 < row.delta < 1e-4, name
        assert row.max_ranks == 64, f"{name}: run make models"


def test_what_was_measured_is_what_there_is(rows: dict[str, catalogue.Row]) -> None:
    """Configs that ship and oracles may have changed since."""
    for name, values in catalogue.read_measured().items():
        assert values["configs"] == sorted(rows[name].configs), f"{name}: run make models"
    measured = {(row.family, oracle) for row in rows.values() for oracle in row.oracles}
    assert measured == {(case.family, case.oracle) for case in CASES}, "run make models"


@pytest.mark.slow
def test_the_layouts_proven_are_those_that_there_are() -> None:
    values = catalogue.read_measured()
    for family in FAMILIES:
        known = values[family.architectures[0]]
        assert record.count(family, known["max_ranks"]) == known["layouts_proven"], family


def test_the_page_is_what_the_data_gives(rows: dict[str, catalogue.Row]) -> None:
    text = record.PAGE.read_text(encoding="utf-8")
    assert record.page(text, list(rows.values())) == text, "run make models"


@pytest.mark.parametrize(
    ("name", "attention", "router"),
    [
        ("MixtralForCausalLM", "GQA", "softmax, renormalised"),
        ("DeepseekV2ForCausalLM", "MLA", "softmax; some: groups"),
        (
            "GptOssForCausalLM",
            "GQA, bias, sinks; some: sliding window",
            "softmax, bias, renormalised",
        ),
        (
            "BailingMoeLinearV2ForCausalLM",
            "lightning + GQA, QK norm, partial rope",
            "sigmoid, correction bias, groups, renormalised",
        ),
        ("Qwen2MoeForCausalLM", "MHA + GQA, bias", "softmax"),
    ],
)
def test_kinds_come_from_the_blocks(
    rows: dict[str, catalogue.Row], name: str, attention: str, router: str
) -> None:
    assert (rows[name].attention, rows[name].router) == (attention, router)


def test_the_document_has_a_row_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    found = {row["architectures"][0]: row for row in json.loads(out)}
    assert set(found) == {family.architectures[0] for family in FAMILIES}
    mixtral = found["MixtralForCausalLM"]
    assert mixtral["family"] == "mixtral"
    assert mixtral["oracles"] == ["transformers MixtralForCausalLM"]
    assert mixtral["configs"] == ["mixtral-8x7b"]


def test_the_table_names_families_oracles_and_figures(
    rows: dict[str, catalogue.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    out, _ = capsys.readouterr()
    mixtral = rows["MixtralForCausalLM"]
    for text in (*{row.family for row in rows.values()}, *rows, shown_delta(mixtral)):
        assert text in out


def test_a_family_without_figures_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, Any] = catalogue.read_measured()
    del known["MixtralForCausalLM"]
    print_table(catalogue.rows(known))
    out, errors = capsys.readouterr()
    assert "not measured" in out
    assert "not proven" in out
    assert errors.count("\n") == 1
    assert "MixtralForCausalLM" in errors
    assert "make models" in errors


def test_transformers_is_not_imported() -> None:
    code = (
        "import sys; from isomoe.cli.main import main; main(['models']); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def python_blocks() -> Iterator[str]:
    page = record.PAGE.with_name("adding-a-model.md").read_text(encoding="utf-8")
    for block in page.split("```python\n")[1:]:
        yield block.partition("```")[0]


def test_the_guide_quotes_the_real_files() -> None:
    root = record.PAGE.parents[1]
    files = ("src/isomoe/models/mixtral.py", "src/isomoe/models/minimax_m2.py")
    texts = [(root / file).read_text() for file in (*files, "tests/families/mixtral.py")]
    blocks = list(python_blocks())
    assert len(blocks) == 5
    for block in blocks:
        assert any(block in text for text in texts), block
