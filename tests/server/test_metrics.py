"""What `/metrics` counts, against what clients were told; and the dashboard that shows it."""

import json
import re
from collections import Counter as Tally
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
from idle import flush, info, wait_idle
from prometheus_client.parser import text_string_to_metric_families

from servers import Server

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
IDLE_SECONDS = 5.0

Labels = frozenset[tuple[str, str]]


def scrape(server: Server) -> dict[str, dict[Labels, float]]:
    """Every sample, by name and labels."""
    answer = httpx2.get(f"{server.url}/metrics", timeout=30)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[Labels, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation, family.name
        found[family.name]  # a metric may have no sample yet
        for sample in family.samples:
            found[sample.name][frozenset(sample.labels.items())] = sample.value
    return found


class Since:
    """What an idle server has counted since this was made."""

    def __init__(self, server: Server) -> None:
        wait_idle(server, IDLE_SECONDS)
        self._server = server
        self._before = scrape(server)

    def __call__(self, name: str, **labels: str) -> float:
        key = frozenset(labels.items())
        now = scrape(self._server)[f"isomoe_{name}"][key]
        return now - self._before[f"isomoe_{name}"].get(key, 0.0)


def by_rank(server: Server, name: str) -> dict[str, float]:
    """A gauge of each attention-DP rank."""
    samples = scrape(server)[f"isomoe_{name}"]
    return {dict(labels)["dp_rank"]: value for labels, value in samples.items()}


def generate(server: Server, status: int = 200, **body: Any) -> Any:
    answer = httpx2.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_counts_agree_with_what_clients_were_told(server: Server) -> None:
    wait_idle(server, IDLE_SECONDS)
    flush(server)
    since = Since(server)
    lengths = [1, 4, 9]
    metas = [
        generate(
            server,
            input_ids=[9] * 40,
            sampling_params={"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
        )["meta_info"]
        for length in lengths
    ]
    assert since("prompt_tokens_total") == 3 * 40
    assert since("generation_tokens_total") == sum(lengths)
    cached = sum(meta["cached_tokens"] for meta in metas)
    assert since("cached_prompt_tokens_total") == cached == 2 * 32  # pages of 16
    assert since("requests_total", outcome="length") == 3
    assert since("time_to_first_token_seconds_count") == 3
    assert since("e2e_request_latency_seconds_count") == 3
    assert since("inter_token_latency_seconds_count") == sum(length - 1 for length in lengths)
    # Each step but a prompt's last has brought a token.
    assert since("step_time_seconds_count") == sum(lengths)
    assert since("step_rows_total", dp_rank="0") == 3 * 40 - cached + sum(
        length - 1 for length in lengths
    )


def test_times_add_up(server: Server) -> None:
    since = Since(server)
    meta = generate(server, text="1", sampling_params={"max_new_tokens": 50, "ignore_eos": True})[
        "meta_info"
    ]
    first, between, whole = (
        since(f"{name}_seconds_sum")
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    )
    assert first > 0
    # After the last token there is nothing left but to say that it was the last.
    assert first + between == pytest.approx(whole, rel=0.05)
    assert whole <= meta["e2e_latency"]
    assert 0 < since("step_time_seconds_sum") <= whole


def test_outcomes_and_statuses_are_counted_apart(server: Server) -> None:
    since = Since(server)
    generate(
        server, text="1", sampling_params={"max_new_tokens": 3, "stop_token_ids": [*range(640)]}
    )
    generate(server, 400, text="1", sampling_params={"max_new_tokens": -1})
    httpx2.get(f"{server.url}/nowhere")
    body = {"text": "1", "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    with httpx2.stream("POST", f"{server.url}/generate", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_idle(server, IDLE_SECONDS)
    assert since("requests_total", outcome="stop") == 1
    assert since("requests_total", outcome="abort") == 1
    assert since("http_responses_total", status="400") == 1
    assert since("http_responses_total", status="404") == 1
    assert since("http_responses_total", status="499") == 1
    assert since("time_to_first_token_seconds_count") == 2


def test_every_rank_has_its_gauges_which_follow_its_requests(dp_server: Server) -> None:
    flush(dp_server)
    assert by_rank(dp_server, "running_requests") == {"0": 0, "1": 0}
    body = {
        "text": ["1", "2", "3", "4"],
        "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
        "stream": True,
    }
    with httpx2.stream("POST", f"{dp_server.url}/generate", json=body, timeout=30) as answer:
        lines = answer.iter_lines()  # kept, since the stream is closed with it
        begun: set[int] = set()
        while len(begun) < 4:
            if line := next(lines):
                begun.add(json.loads(line.removeprefix("data: "))["index"])
        assert by_rank(dp_server, "running_requests") == {"0": 2, "1": 2}
        assert all(pages >= 2 for pages in by_rank(dp_server, "kv_used_pages").values())
        assert scrape(dp_server)["isomoe_waiting_requests"] == {frozenset(): 0}
    groups = wait_idle(dp_server, IDLE_SECONDS)
    assert by_rank(dp_server, "running_requests") == {"0": 0, "1": 0}
    for name in ("used_pages", "cached_pages", "total_pages"):
        told = {str(rank): group[name] for rank, group in enumerate(groups)}
        assert by_rank(dp_server, f"kv_{name}") == told


def collectives(server: Server) -> Tally[tuple[str, str]]:
    """Rows so far, by operation and axes."""
    samples = scrape(server)["isomoe_collective_rows_total"]
    by_name = {(dict(key)["op"], dict(key)["axis"]): int(rows) for key, rows in samples.items()}
    return Tally(by_name)


def test_rows_of_each_collective_are_those_of_the_plan(dp_server: Server) -> None:
    before = collectives(dp_server)
    generate(dp_server, text="1", sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    grown = collectives(dp_server) - before
    planned = [
        Tally(
            (move["op"], ",".join(map(str, move["axes"])))
            for part in (*regime["settles"], *regime["deliveries"], *regime["inner"])
            for move in part["moves"]
            if move["op"] != "slice"
        )
        for regime in info(dp_server)["plan"]["regimes"]
    ]
    assert {op for op, _ in grown} >= {"all_gather", "reduce_scatter"}
    # Four steps of one row, so that all of them go by the same part of the plan.
    assert grown in [{key: 4 * count for key, count in each.items()} for each in planned]


def test_one_rank_has_no_collectives(server: Server) -> None:
    generate(server, text="1", sampling_params={"max_new_tokens": 4})
    assert not collectives(server)


def queries() -> list[str]:
    """Those of the dashboard's panels."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_shown(dp_server: Server) -> None:
    generate(dp_server, text="1", sampling_params={"max_new_tokens": 2})
    samples = {name for name, values in scrape(dp_server).items() if values}
    asked = {name for query in queries() for name in re.findall(r"isomoe_\w+", query)}
    assert asked <= samples
    exposed = {
        re.sub("_(bucket|count|sum)$", "", name)
        for name in samples
        if not name.endswith("_created")
    }
    assert exposed == {re.sub("_bucket$", "", name) for name in asked}


def test_every_panel_asks_the_chosen_data_source_and_lies_beside_the_others() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    (source, *_) = dashboard["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for asker in (panel, *panel["targets"]):
            assert asker["datasource"] == {"type": "prometheus", "uid": f"${{{source['name']}}}"}
        place = panel["gridPos"]
        own = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & own, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_quantiles_are_taken_over_buckets_by_le() -> None:
    quantiles = [query for query in queries() if "histogram_quantile" in query]
    assert len(quantiles) == 4 * 3
    for query in quantiles:
        assert re.fullmatch(
            r"histogram_quantile\(0\.\d+, sum by \(le\) \(rate\(isomoe_\w+_seconds_bucket"
            r"\{[^}]*\}\[\$__rate_interval\]\)\)\)",
            query,
        ), query
