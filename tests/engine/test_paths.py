"""The ways between attention and experts on real processes: none of them changes an answer.

The bundled checkpoint in fp32 over Gloo, against one rank.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_llm import same

from isomoe.blocks import SparseMoe
from isomoe.cli.main import main
from isomoe.config import EngineConfig
from isomoe.engine import LLM, RequestOutput, SamplingParams
from isomoe.engine.laid_out import laid_out
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.processes import ProcessExecutor
from isomoe.engine.step import Step
from isomoe.errors import ConfigError, EngineDeadError, IsomoeError
from isomoe.layout import Chain, Parallelism
from isomoe.models import CausalLM
from isomoe.stream import ResidualStream
from isomoe.weights import bundled_checkpoint

EXPERTS, TOP_K, LAYERS, TOKENS = 16, 4, 4, 24
PARAMS = SamplingParams(
    max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1
)
GROUPS = {"tp_size": 2, "attn_dp_size": 2, "ep_size": 2}
A2A = {"moe_a2a_backend": "torch"}
REDUNDANT = {"ep_num_redundant_experts": 2}
FORMATS = ("none", "fp8", "nvfp4")

Load = list[list[int]]


def engine(**settings: Any) -> LLM:
    return LLM(device="cpu", dtype="float32", **settings)


def prompts() -> list[str]:
    lines = (bundled_checkpoint() / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines[:8]]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[RequestOutput]]:
    """What one rank gives with each format."""
    found = {}
    for form in FORMATS:
        with engine(moe_wire_format=form) as llm:
            found[form] = llm.generate(prompts(), PARAMS)
    return found


@pytest.fixture(scope="module")
def chosen(expected: dict[str, list[RequestOutput]]) -> Load:
    """How often each expert is chosen, by transformers.

    Of each prompt and what it is answered, but for the last token, which is not computed.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled_checkpoint(), dtype=torch.float32)
    counts = np.zeros((LAYERS, EXPERTS), dtype=int)
    for output in expected["none"]:
        ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids[:-1]]])
        with torch.inference_mode():
            logits = model(ids, output_router_logits=True).router_logits
        assert len(logits) == LAYERS
        for layer, rows in enumerate(logits):
            best = rows.view(-1, EXPERTS).topk(TOP_K).indices
            counts[layer] += np.bincount(best.flatten().numpy(), minlength=EXPERTS)
    found: Load = counts.tolist()
    return found


def computed(outputs: Sequence[RequestOutput]) -> int:
    """Tokens that are rows of a step: all but the last of each answer."""
    return sum(len(one.prompt_token_ids) + TOKENS - 1 for one in outputs)


def by_rank(llm: LLM) -> list[list[set[int]]]:
    """The experts that each rank has served, layer by layer."""
    return [
        [{expert for expert, count in enumerate(load[layer]) if count} for layer in range(LAYERS)]
        for load in llm.core.executor.expert_load()
    ]


def test_one_rank_counts_what_transformers_chooses(
    expected: dict[str, list[RequestOutput]], chosen: Load
) -> None:
    with engine(record_expert_load=True) as llm:
        assert llm.expert_load() == [[0] * EXPERTS] * LAYERS
        same(llm.generate(prompts(), PARAMS), expected["none"])
        assert llm.expert_load() == chosen
        llm.generate(prompts(), PARAMS)
        assert llm.expert_load() == [[2 * count for count in layer] for layer in chosen]
    assert [sum(layer) for layer in chosen] == [computed(expected["none"]) * TOP_K] * LAYERS
    assert min(map(min, chosen)) != max(map(max, chosen))


SLOW = pytest.mark.slow
LAYOUTS = [
    pytest.param(GROUPS | A2A | REDUNDANT, id="tp2,dp2,ep2,a2a,red2"),
    pytest.param(GROUPS, id="tp2,dp2,ep2", marks=SLOW),
    pytest.param(GROUPS | A2A, id="tp2,dp2,ep2,a2a", marks=SLOW),
    pytest.param(GROUPS | REDUNDANT, id="tp2,dp2,ep2,red2", marks=SLOW),
    pytest.param(GROUPS | {"moe_a2a_backend": "auto"}, id="tp2,dp2,ep2,a2aauto", marks=SLOW),
    pytest.param({"tp_size": 2, "ep_size": 2}, id="tp2,ep2", marks=SLOW),
    pytest.param({"tp_size": 4, "attn_dp_size": 2, "ep_size": 4} | A2A, id="tp4,dp2,ep4,a2a"),
    pytest.param(
        {"tp_size": 4, "attn_dp_size": 2, "ep_size": 2} | A2A | {"ep_num_redundant_experts": 6},
        id="tp4,dp2,ep2,a2a,red6",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_and_counts_what_one_rank_does(
    layout: dict[str, Any], expected: dict[str, list[RequestOutput]], chosen: Load
) -> None:
    with engine(record_expert_load=True, **layout) as llm:
        same(llm.generate(prompts(), PARAMS), expected["none"])
        assert llm.expert_load() == chosen
        # One request leaves the other attention group without rows.
        same(llm.generate(prompts()[3:4], PARAMS), expected["none"][3:4])


def test_the_load_can_be_read_while_a_step_is_under_way(
    expected: dict[str, list[RequestOutput]], chosen: Load
) -> None:
    """It counts, and its answer, which may come first, is not lost."""
    with engine(record_expert_load=True, **GROUPS) as llm:
        core = llm.core
        read, launch = core.expert_load, core.executor.launch
        loads: list[Load] = []

        def launch_and_read(step: Step) -> None:
            launch(step)
            loads.append(read())

        core.executor.launch = launch_and_read  # type: ignore[method-assign]
        same(llm.generate(prompts(), PARAMS), expected["none"])
        sums = [sum(layer) for load in loads for layer in load]
        assert sums == sorted(sums)
        assert sums[0] > 0
        assert loads[-1] == read() == chosen
    with pytest.raises(EngineDeadError, match="was shut down"):
        read()


FORMATTED = [
    pytest.param("fp8", GROUPS, id="tp2,dp2,ep2,fp8"),
    pytest.param("nvfp4", GROUPS, id="tp2,dp2,ep2,nvfp4"),
    pytest.param("fp8", GROUPS | A2A, id="tp2,dp2,ep2,a2a,fp8", marks=SLOW),
    pytest.param("nvfp4", GROUPS | A2A | REDUNDANT, id="tp2,dp2,ep2,a2a,nvfp4,red2", marks=SLOW),
    pytest.param(
        "nvfp4",
        {"tp_size": 4, "attn_dp_size": 2, "ep_size": 4},
        id="tp4,dp2,ep4,nvfp4",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("form", "layout"), FORMATTED)
def test_a_format_gives_the_same_tokens_on_any_layout(
    form: str, layout: dict[str, Any], expected: dict[str, list[RequestOutput]]
) -> None:
    with engine(moe_wire_format=form, **layout) as llm:
        got = llm.generate(prompts(), PARAMS)
    assert [one.token_ids for one in got] == [one.token_ids for one in expected[form]]


def test_each_format_rounds_on_one_rank_too(expected: dict[str, list[RequestOutput]]) -> None:
    """Else that they agree on all layouts would say nothing."""
    first = {form: prompt_logprobs(outputs[0]) for form, outputs in expected.items()}
    near = np.abs(first["fp8"] - first["none"]).max()
    far = np.abs(first["nvfp4"] - first["none"]).max()
    assert 1e-3 < near < far


def prompt_logprobs(output: RequestOutput) -> Any:
    assert output.prompt_logprobs is not None
    return np.array([one.logprob for one in output.prompt_logprobs if one is not None])


def permuted(extra: int) -> Load:
    """A place for each expert, another one in each layer, and further copies among them."""
    random = np.random.default_rng(7)
    return [
        random.permutation([*range(EXPERTS), *random.integers(0, EXPERTS, extra)]).tolist()
        for _ in range(LAYERS)
    ]


@pytest.mark.parametrize(
    ("layout", "extra"),
    [(GROUPS, 0), pytest.param(GROUPS | A2A | REDUNDANT, 2, marks=SLOW)],
    ids=["map", "map with copies"],
)
def test_a_file_says_which_rank_holds_which_expert(
    layout: dict[str, Any],
    extra: int,
    tmp_path: Path,
    expected: dict[str, list[RequestOutput]],
    chosen: Load,
) -> None:
    rows = permuted(extra)
    file = tmp_path / "location.json"
    file.write_text(json.dumps({"physical_to_logical_map": rows}))
    slots = (EXPERTS + extra) // 2
    with engine(record_expert_load=True, init_expert_location=str(file), **layout) as llm:
        same(llm.generate(prompts(), PARAMS), expected["none"])
        assert llm.expert_load() == chosen
        for rank, served in enumerate(by_rank(llm)):
            for layer, experts in enumerate(served):
                held = rows[layer][rank * slots : (rank + 1) * slots]
                assert experts == {one for one in held if chosen[layer][one]}


def test_what_generate_counts_places_the_experts(
    tmp_path: Path, expected: dict[str, list[RequestOutput]], chosen: Load
) -> None:
    file = tmp_path / "load.json"
    words = ["--device", "cpu", "--dtype", "float32", "--ignore-eos", "--expert-load", str(file)]
    for prompt in prompts():
        words += ["--prompt", prompt]
    assert main(["generate", *words, "--max-tokens", str(TOKENS)]) == 0
    assert json.loads(file.read_text()) == {"logical_count": chosen}
    settings = GROUPS | A2A | REDUNDANT
    with engine(record_expert_load=True, init_expert_location=str(file), **settings) as llm:
        same(llm.generate(prompts(), PARAMS), expected["none"])
        assert llm.expert_load() == chosen
        loads = llm.core.executor.expert_load()
    busiest = [max(sum(load[layer]) for load in loads) for layer in range(LAYERS)]
    in_order = [max(sum(layer[:8]), sum(layer[8:])) for layer in chosen]
    assert sum(busiest) < sum(in_order), "no better than in order"


def held(file: Path, layout: Parallelism, rank: int) -> Load:
    """The experts of a rank, in the order of its slots."""
    config = EngineConfig(
        device="cpu",  # type: ignore[arg-type]
        dtype="float32",  # type: ignore[arg-type]
        parallelism=layout,
        init_expert_location=str(file),
    )
    model = laid_out(config, ModelInfo.of(config), rank)
    blocks = [block for block in model.blocks() if isinstance(block, SparseMoe)]
    assert all(block.experts.held == block.ownership.held for block in blocks)
    return [list(block.ownership.held) for block in blocks]


def test_a_location_without_load_shares_the_slots_out_in_order(tmp_path: Path) -> None:
    rows = permuted(4)
    file = tmp_path / "location.json"
    file.write_text(json.dumps({"physical_to_logical_map": rows}))
    layout = Parallelism(tp_size=4, ep_size=2, ep_num_redundant_experts=4)
    for rank in range(4):  # two ranks share each expert's columns
        slots = slice(rank // 2 * 10, rank // 2 * 10 + 10)
        assert held(file, layout, rank) == [row[slots] for row in rows]


def never_started(*args: object, **more: object) -> None:
    raise AssertionError("a worker was started")


@pytest.fixture
def _no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProcessExecutor, "__init__", never_started)


def plan_file(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Path:
    assert main(["plan", "--json", "--device", "cpu", *words]) == 0
    file = folder / "plan.json"
    file.write_text(capsys.readouterr().out)
    return file


LAYOUT_FLAGS = ("--tp", "2", "--attn-dp-size", "2", "--ep", "2")


class Noting:
    """An instrument: notes what settles the experts on each rank."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def in_chain(self, chain: Chain) -> Chain:
        return chain

    def in_model(self, model: CausalLM) -> None:
        pass

    def in_stream(self, stream: ResidualStream) -> None:
        found = [
            [str(move.op) for move in settle.route.moves]
            for read in stream.plan.reads
            for settle in read.settles
            if settle.producers[0].endswith("mlp.experts")
        ]
        (self._folder / f"rank{stream.comm.seat.rank}").write_text(json.dumps(found))


def test_a_pinned_plan_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: dict[str, list[RequestOutput]]
) -> None:
    """Also one that is not the cheapest."""
    file = plan_file(tmp_path, capsys, *LAYOUT_FLAGS)
    document = json.loads(file.read_text())
    summed = {"op": "all_reduce", "axes": [0], "from": "P", "to": "R"}
    cut = {"op": "slice", "axes": [0], "from": "R", "to": "S"}
    for regime in document["regimes"]:
        for settle in regime["settles"]:
            if settle["producers"][0].endswith("mlp.experts"):
                assert [move["op"] for move in settle["moves"]] == ["reduce_scatter"]
                settle["moves"] = [summed, cut]
    file.write_text(json.dumps(document))
    noting = f"test_paths:Noting={tmp_path}"
    with engine(plan=str(file), instrument=noting, **GROUPS) as llm:
        same(llm.generate(prompts(), PARAMS), expected["none"])
    for rank in range(2):
        noted = json.loads((tmp_path / f"rank{rank}").read_text())
        assert noted == [["all_reduce", "slice"]] * LAYERS


@pytest.mark.usefixtures("_no_workers")
def test_a_plan_of_another_layout_is_refused_before_any_worker_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plan_file(tmp_path, capsys, *LAYOUT_FLAGS)
    with pytest.raises(IsomoeError, match="layout is 'tp2,dp2,ep2', not tp2,ep2 as here") as told:
        engine(plan=str(file), tp_size=2, ep_size=2)
    assert "\n" not in str(told.value)
    words = ["--device", "cpu", "--tp", "2", "--prompt", "1"]
    assert main(["generate", *words, "--plan", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"{file}: plan: layout is 'tp2,dp2,ep2', not tp2 as here" in printed.err


@pytest.mark.usefixtures("_no_workers")
@pytest.mark.parametrize(
    ("document", "settings", "message"),
    [
        ({"physical_to_logical_map": [[0] * 16] * 4}, GROUPS, "15 are not among the 16 physical"),
        ({"physical_to_logical_map": [list(range(16))] * 3}, GROUPS, "none for layer 3"),
        ({"physical_to_logical_map": [list(range(16))] * 5}, GROUPS, "has 5 rows; the model has 4"),
        ({"logical_count": [[1] * 15] * 4}, GROUPS, "has 15 counts"),
        ({"logical_count": [[1] * 16] * 4}, {"tp_size": 2}, "--ep-size above 1"),
        ("{", GROUPS, "not readable as JSON"),
        (None, GROUPS, "not readable as JSON"),
    ],
)
def test_a_location_that_does_not_fit_is_refused_before_any_worker_starts(
    tmp_path: Path, document: object, settings: dict[str, Any], message: str
) -> None:
    file = tmp_path / "location.json"
    if document is not None:
        file.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ConfigError, match=message) as told:
        engine(init_expert_location=str(file), **settings)
    assert "\n" not in str(told.value)


@pytest.fixture
def _two_gpus_with_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("isomoe.comm.deepep.find_spec", lambda name: True)


LOW = {"deepep_mode": "low_latency"}
SMALL_STEPS = {"max_running_requests": 64, "max_prefill_tokens": 64}


@pytest.mark.usefixtures("_no_workers", "_two_gpus_with_deep_ep")
@pytest.mark.parametrize(
    ("hidden_size", "settings", "message"),
    [
        (256, {"dtype": "float32"}, "--dtype float32 with --moe-a2a-backend deepep"),
        (256, {"moe_wire_format": "fp8"}, "rows of 256 bytes are no whole units of 512"),
        (256, {"tp_size": 4}, "each of the 4 ranks needs a GPU of its own"),
        (256, LOW, "a hidden size of 256 is none of 2048"),
        (2048, LOW, "a step of 16640 rows a rank, and at most 128 can be; auto or normal"),
        (2048, LOW | SMALL_STEPS | {"max_prefill_tokens": 65}, "a step of 129 rows a rank"),
    ],
)
def test_what_deepep_cannot_do_is_refused_before_any_worker_starts(
    tmp_path: Path, hidden_size: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        deepep_engine(tmp_path, hidden_size, **settings)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("_no_workers", "_two_gpus_with_deep_ep")
@pytest.mark.parametrize(
    ("hidden_size", "settings"), [(256, {}), (2048, LOW | SMALL_STEPS)], ids=["auto", "low latency"]
)
def test_what_deepep_can_do_is_not_refused(
    tmp_path: Path, hidden_size: int, settings: dict[str, Any]
) -> None:
    with pytest.raises(AssertionError, match="a worker was started"):
        deepep_engine(tmp_path, hidden_size, **settings)


def deepep_engine(folder: Path, hidden_size: int, **settings: Any) -> LLM:
    config = json.loads((bundled_checkpoint() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": hidden_size}))
    usual = {"device": "cuda", "dtype": "bfloat16", "moe_a2a_backend": "deepep"} | GROUPS
    return LLM(str(folder), load_format="dummy", **(usual | settings))  # type: ignore[arg-type]


def test_a_load_that_is_not_recorded_cannot_be_asked_for() -> None:
    with engine() as llm, pytest.raises(ConfigError, match="record_expert_load=True does it"):
        llm.expert_load()
