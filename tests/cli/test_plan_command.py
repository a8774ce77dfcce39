"""`isomoe plan` as a script sees it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isomoe.cli.main import main

CONFIGS = Path(__file__).parents[2] / "src" / "isomoe" / "models" / "configs"


Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Runs `isomoe plan ...`: exit code, what went to stdout and to stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(["plan", *words])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, errors = capsys.readouterr()
        return code, out, errors

    return run


def document(plan: Plan, *words: str) -> Any:
    code, out, errors = plan(*words, "--json")
    assert (code, errors) == (0, "")
    return json.loads(out)


def test_the_report_s_layout_gathers_for_the_experts_and_reduce_scatters_from_them(
    plan: Plan,
) -> None:
    shown = document(
        plan, "--tp", "2", "--dp", "2", "--enable-dp-attention", "--ep", "2", "--rows", "4096"
    )
    assert shown["world"] == 2
    assert shown["mesh"]["axes"] == [2]
    assert (shown["mesh"]["attn_dp"], shown["mesh"]["attn_tp"]) == ([0], [])
    (equal,) = [regime for regime in shown["regimes"] if regime["equal"]]
    experts = [s for s in equal["settles"] if s["producers"][0].endswith("mlp.experts")]
    assert experts
    for settle in experts:
        move = {"op": "reduce_scatter", "axes": [0], "from": "P", "to": "S"}
        assert (settle["gives"], settle["moves"]) == ("P", [move])


def test_a_lone_config_and_a_thousand_ranks_will_do(plan: Plan) -> None:
    config = str(CONFIGS / "qwen3-235b-a22b.json")
    shown = document(
        plan, "--model-path", config, "--tp", "1024", "--attn-dp-size", "64", "--ep", "128"
    )
    assert shown["world"] == 1024
    assert shown["mesh"]["axes"] == [64, 2, 2, 4]


def test_the_table_names_blocks_moves_and_what_they_beat(plan: Plan) -> None:
    code, out, _ = plan("--tp", "4", "--attn-dp-size", "2", "--rows", "4096")
    assert code == 0
    assert "mlp.experts x" in out
    assert "instead of" in out


GROUPS = ("--tp", "4", "--attn-dp-size", "2", "--ep", "4")


def test_explain_prints_what_lost_and_by_how_much(plan: Plan) -> None:
    code, out, errors = plan(*GROUPS, "--rows", "512", "--explain")
    assert (code, errors) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines.count("instead us lost by") == 2  # of the equal steps, and of the ragged ones
    assert any(re.match(r"residual S[SR] everywhere [\d,]+ [\d.,]+ us [\d.]+%$", x) for x in lines)
    assert "lost by" not in plan(*GROUPS, "--rows", "512")[1]


def test_explain_adds_the_alternatives_of_each_regime(plan: Plan) -> None:
    shown = document(plan, *GROUPS, "--explain")
    for regime in shown["regimes"]:
        others = regime["alternatives"]
        assert others
        costs = [other["predicted_us"] for other in others]
        assert costs == sorted(costs)
        for other in others:
            assert set(other) == {"what", "predicted_us", "lost_by_us"}
            lost_by = other["predicted_us"] - regime["predicted_us"]
            assert other["lost_by_us"] == pytest.approx(lost_by, abs=2e-3)  # both are rounded
            assert other["lost_by_us"] >= 0
    assert "alternatives" not in document(plan, *GROUPS)["regimes"][0]


def test_one_rank_has_no_alternatives(plan: Plan) -> None:
    code, out, _ = plan("--explain", "--rows", "8")
    assert code == 0
    assert "lost by" not in out
    assert [r["alternatives"] for r in document(plan, "--explain", "--rows", "8")["regimes"]] == [
        []
    ]


def without_beaten(shown: Any) -> Any:
    """All but what each route beat, which is no part of a pinned plan."""
    if isinstance(shown, dict):
        return {
            k: without_beaten(v) for k, v in shown.items() if k not in ("beats", "alternatives")
        }
    return list(map(without_beaten, shown)) if isinstance(shown, list) else shown


def test_a_plan_that_was_printed_is_followed(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown = document(plan, *GROUPS, "--explain")
    file.write_text(json.dumps(shown))
    assert document(plan, *GROUPS, "--plan", str(file)) == without_beaten(shown)
    code, out, errors = plan(*GROUPS, "--plan", str(file))
    assert (code, errors) == (0, "")
    assert "mlp.experts x" in out


def test_a_pinned_plan_need_not_be_the_cheapest(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shown = document(plan, *GROUPS)
    few, *_, many = (regime for regime in shown["regimes"] if regime["equal"])
    assert few["settles"] != many["settles"]
    # Steps of few rows do as those of many.
    moved = ("residual", "settles", "deliveries", "inner")
    few.update({key: many[key] for key in moved})
    file.write_text(json.dumps(shown))
    first = document(plan, *GROUPS, "--plan", str(file), "--explain")["regimes"][0]
    cheapest = first["alternatives"][0]
    assert cheapest["what"] == "the cheapest"
    assert cheapest["lost_by_us"] < 0


@pytest.mark.parametrize(
    ("edit", "words", "said"),
    [
        (None, GROUPS, "no such file"),
        (lambda d: None, ("--tp", "4"), "plan: layout is 'tp4,dp2,ep4', not tp4 as here"),
        (lambda d: d.pop("mesh"), GROUPS, "plan: 'mesh' is missing"),
        (
            lambda d: d["regimes"][0]["settles"].pop(),
            GROUPS,
            "equal-8: model.norm: nothing settles",
        ),
        (lambda d: None, (*GROUPS, "--rows", "8"), "--rows 8: the regimes are those of --plan"),
    ],
)
def test_a_file_without_a_right_plan_is_one_line_and_exit_code_two(
    plan: Plan, tmp_path: Path, edit: Callable[[Any], None] | None, words: Any, said: str
) -> None:
    file = tmp_path / "plan.json"
    if edit is not None:
        shown = document(plan, *GROUPS)
        edit(shown)
        file.write_text(json.dumps(shown))
    code, out, errors = plan(*words, "--plan", str(file))
    assert (code, out) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1


V3_EXPERTS = 58 * 256 * 3 * 7168 * 2048


@pytest.mark.parametrize(
    ("name", "words", "weights", "kv", "state"),
    [
        # 46,702,792,704 parameters; 32 layers of 8 KV heads of 128 dims
        ("mixtral-8x7b", (), 2 * 46_702_792_704, 32 * 2 * 8 * 128 * 2, 0),
        # 4 KV heads, which ranks beyond the fourth hold copies of
        ("qwen3-30b-a3b", ("--tp", "4"), None, 48 * 2 * 1 * 128 * 2, 0),
        ("qwen3-30b-a3b", ("--tp", "8"), None, 48 * 2 * 1 * 128 * 2, 0),
        # latents are on every rank; 671 B parameters, the routers' in fp32, the experts' in FP8
        (
            "deepseek-v3",
            (),
            2 * (671_026_404_352 + 58 * 256 * 7168 - V3_EXPERTS)
            + 58 * 256 * 4
            + V3_EXPERTS
            + 4 * V3_EXPERTS // 128**2,
            61 * (512 + 64) * 2,
            0,
        ),
        # of 20 layers, 4 of softmax attention with 4 KV heads and 16 linear ones with 16 heads
        ("ring-mini-linear-2.0", ("--tp", "2"), None, 4 * 2 * 2 * 128 * 2, 16 * 8 * 128 * 128 * 4),
    ],
)
def test_memory_of_a_rank_is_that_of_the_published_shapes(
    plan: Plan, name: str, words: tuple[str, ...], weights: int | None, kv: int, state: int
) -> None:
    shown = document(plan, "--model-path", str(CONFIGS / f"{name}.json"), "--rows", "1", *words)
    memory = shown["memory"]
    assert memory["dtype"] == "bfloat16"
    assert weights in (None, memory["weight_bytes"])
    assert (memory["kv_bytes_per_token"], memory["state_bytes_per_request"]) == (kv, state)


def test_a_rank_keeps_a_sixteenth_of_the_experts_and_all_of_the_attention(plan: Plan) -> None:
    words = ("--model-path", str(CONFIGS / "deepseek-v3.json"), "--rows", "1")
    one = document(plan, *words)["memory"]
    split = ("--tp", "16", "--attn-dp-size", "16", "--ep", "16")
    many = document(plan, *words, *split)["memory"]
    experts = V3_EXPERTS + 4 * V3_EXPERTS // 128**2
    assert one["weight_bytes"] - experts < 16 * (many["weight_bytes"] - experts // 16)
    assert experts // 16 < many["weight_bytes"] < experts // 16 + (one["weight_bytes"] - experts)
    assert many["kv_bytes_per_token"] == one["kv_bytes_per_token"]
    code, out, _ = plan(*words, *split)
    assert code == 0
    assert "70.3 kB of KV cache a token (bfloat16, experts in FP8)" in out


def test_experts_in_fp8_are_a_gpus(plan: Plan) -> None:
    words = ("--model-path", str(CONFIGS / "deepseek-v3.json"), "--rows", "1")
    kept = document(plan, *words)["memory"]
    dequantised = document(plan, *words, "--device", "cpu")["memory"]
    assert (kept["fp8_experts"], dequantised["fp8_experts"]) == (True, False)
    saved = V3_EXPERTS - 4 * V3_EXPERTS // 128**2
    assert dequantised["weight_bytes"] - kept["weight_bytes"] == saved


@pytest.mark.parametrize(
    "kept", [{"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [48, 48]}]
)
def test_how_weights_are_kept_is_no_matter_to_a_plan(
    kept: dict[str, object], plan: Plan, tmp_path: Path
) -> None:
    config = json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": kept}))
    memory = document(plan, "--model-path", str(tmp_path), "--rows", "1")["memory"]
    assert memory["fp8_experts"] is False


def test_memory_is_in_the_dtype_of_the_config(plan: Plan, tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "mixtral-8x7b.json").read_text())
    found = []
    for name in ("bfloat16", "float32", "no such"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": name}))
        found.append(plan("--model-path", str(tmp_path), "--rows", "1", "--json"))
    half, full = (json.loads(out)["memory"] for _, out, _ in found[:2])
    assert full["weight_bytes"] == 2 * half["weight_bytes"]
    code, _, errors = found[2]
    assert code == 2
    assert "dtype 'no such'" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp", "6"), "6 does not divide 8 attention heads; what would work: --tp-size 4 or 8"),
        (("--tp", "4", "--ep", "3"), "--ep-size 3 does not divide --tp-size 4; 1, 2, 4 would"),
        (("--tp", "4", "--attn-dp-size", "3"), "--attn-dp-size 3 does not divide --tp-size 4"),
        (("--tp", "2048"), "--tp-size 2048: must be from 1 to 1024"),
        (("--model-path", "/no/such"), "no such folder"),
        (("--dp", "2"), "counts replicas"),
        (("--rows", "0"), "--rows 0: must be at least 1"),
    ],
)
def test_wrong_sizes_are_one_line_and_exit_code_two(
    plan: Plan, words: tuple[str, ...], said: str
) -> None:
    code, out, errors = plan(*words)
    assert (code, out) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1


def test_an_unknown_architecture_lists_the_known_ones(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    code, _, errors = plan("--model-path", str(tmp_path))
    assert code == 2
    assert "known: Qwen2MoeForCausalLM, Qwen3MoeForCausalLM" in errors
