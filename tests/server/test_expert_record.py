"""The record of the experts' load, on real servers: the bundled checkpoint in fp32."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from idle import wait_idle

from isomoe import LLM, SamplingParams
from isomoe.server.expert_record import ExpertRecord
from isomoe.weights import bundled_checkpoint
from servers import Server, running

EXPERTS, TOP_K, LAYERS, TOKENS = 16, 4, 4, 12
PROMPTS = [
    json.loads(line)["question"]
    for line in (bundled_checkpoint() / "heldout.jsonl").read_text().splitlines()[:4]
]
# Whoever finds a prefix in the cache computes fewer rows.
ENGINE = {"device": "cpu", "dtype": "float32", "disable_radix_cache": True}
FLAGS = ("--record-expert-load", "--device", "cpu", "--dtype", "float32", "--disable-radix-cache")
LAYOUT = ("--tp", "2", "--attn-dp-size", "2", "--ep", "2", "--ep-num-redundant-experts", "2")
WORDS = ("start", "stop", "dump")

Load = list[list[int]]


@pytest.fixture(scope="module")
def counted() -> list[Load]:
    """What `LLM` counts of each prompt."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    found: list[Load] = []
    before = [[0] * EXPERTS] * LAYERS
    with LLM(record_expert_load=True, **ENGINE) as llm:  # type: ignore[arg-type]
        for prompt in PROMPTS:
            llm.generate(prompt, params)
            now = llm.expert_load()
            found.append(combined(now, before, -1))
            before = now
    assert len({str(load) for load in found}) == len(PROMPTS)
    return found


def combined(a: Load, b: Load, sign: int = 1) -> Load:
    return [
        [x + sign * y for x, y in zip(layer, other, strict=True)]
        for layer, other in zip(a, b, strict=True)
    ]


def ask(server: Server, prompts: list[str]) -> None:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    body = {"text": prompts, "sampling_params": sampling}
    answer = httpx2.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def record(server: Server, word: str, method: str = "POST") -> httpx2.Response:
    url = f"{server.url}/{word}_expert_distribution_record"
    return httpx2.request(method, url, timeout=60)


def switch(server: Server, word: str, method: str = "POST") -> None:
    answer = record(server, word, method)
    assert answer.status_code == 200, answer.text
    assert answer.text == f"{word.capitalize()} recording the expert distribution.\n"


def dump(server: Server, method: str = "POST") -> Load:
    answer = record(server, "dump", method)
    assert answer.status_code == 200, answer.text
    document: dict[str, Load] = answer.json()
    assert list(document) == ["logical_count"]
    return document["logical_count"]


def check_whole_record(server: Server, counted: list[Load]) -> None:
    """From a server that has served nobody."""
    nothing = [[0] * EXPERTS] * LAYERS
    first, *others = counted
    assert dump(server) == nothing, "what warmed the server up counts"
    ask(server, PROMPTS)
    total = first
    for one in others:
        total = combined(total, one)
    assert dump(server) == dump(server, "GET") == total
    ask(server, PROMPTS[:1])
    assert dump(server) == combined(total, first)
    switch(server, "start")
    assert dump(server) == nothing
    ask(server, PROMPTS[1:2])
    switch(server, "stop")
    ask(server, PROMPTS[2:])
    switch(server, "stop", "GET")  # a second time changes nothing
    assert dump(server) == counted[1]
    switch(server, "start", "GET")
    ask(server, PROMPTS[2:3])
    assert dump(server) == counted[2]


def test_a_servers_record_is_what_the_engine_counts_and_places_the_experts_of_the_next(
    counted: list[Load], tmp_path: Path
) -> None:
    file = tmp_path / "load.json"
    with running(*FLAGS) as server:
        check_whole_record(server, counted)
        check_while_a_request_runs(server)
        file.write_bytes(record(server, "dump").content)
    with running(*FLAGS, *LAYOUT, "--init-expert-location", str(file)) as server:
        check_whole_record(server, counted)
        check_while_a_request_runs(server)


def check_while_a_request_runs(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 900, "ignore_eos": True}
    body: dict[str, Any] = {"text": PROMPTS[0], "sampling_params": sampling, "stream": True}
    with httpx2.stream("POST", f"{server.url}/generate", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        switch(server, "start")
        early = dump(server)
        for _ in range(20):
            next(lines)
        switch(server, "stop")
        late = dump(server)
        more = [sum(layer) for layer in combined(late, early, -1)]
        assert more == more[:1] * LAYERS
        assert more[0] > 0
        assert more[0] % TOP_K == 0
        for _ in range(20):
            next(lines)
        assert dump(server) == late
    wait_idle(server, 5.0)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_flag_there_is_no_record(server: Server, word: str, method: str) -> None:
    answer = record(server, word, method)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "the experts' load is not recorded; isomoe serve --record-expert-load does it"
    )


def test_a_model_without_experts_has_no_record(tmp_path: Path) -> None:
    config = json.loads((bundled_checkpoint() / "config.json").read_text())
    config["mlp_only_layers"] = list(range(LAYERS))
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--model-path", str(tmp_path), "--load-format", "dummy", "--device", "cpu")
    with running(*words) as server:
        for word in WORDS:
            answer = record(server, word)
            assert answer.status_code == 400
            assert "the model has no routed experts" in answer.json()["error"]["message"]


class Counter:
    """One expert, chosen ever more often."""

    def __init__(self) -> None:
        self.count = 0

    def read(self) -> Load:
        return [[self.count], []]


def test_a_record_spans_from_start_to_stop() -> None:
    counter = Counter()
    one = ExpertRecord(counter.read)
    counter.count = 3
    assert one.load() == [[3], []]
    one.start()
    counter.count = 10
    assert one.load() == [[7], []]
    one.stop()
    counter.count = 20
    one.stop()
    assert one.load() == one.load() == [[7], []]
    one.start()
    assert one.load() == [[0], []]
    counter.count = 21
    one.start()  # forgets what was not stopped
    counter.count = 25
    assert one.load() == [[4], []]


def test_a_record_that_nobody_started_can_be_stopped() -> None:
    counter = Counter()
    one = ExpertRecord(counter.read)
    counter.count = 2
    one.stop()
    counter.count = 5
    assert one.load() == [[2], []]
