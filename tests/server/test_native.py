"""SGLang's own endpoints, on real servers."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from idle import flush, info, wait_idle

from isomoe import __version__
from isomoe.eval.tasks import Arith, read_problems
from isomoe.tokenizer import Tokenizer
from isomoe.weights import bundled_checkpoint
from servers import Server

PROMPTS = [Arith().prompt(one) for one in read_problems(bundled_checkpoint() / "heldout.jsonl")[:3]]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
LONG = {"max_new_tokens": 900, "ignore_eos": True}
IDLE_SECONDS = 5.0

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_checkpoint())


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as one:
        yield one


def ask(client: httpx2.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks_of(answer: httpx2.Response) -> Iterator[Answer]:
    """A stream's chunks; fails if it does not end as streams do."""
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
    for line in lines:
        if line == "[DONE]":
            break
        yield json.loads(line)
    else:
        pytest.fail("the stream ended without [DONE]")
    assert not list(lines)


def stream(client: httpx2.Client, **body: Any) -> list[Answer]:
    with client.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        return list(chunks_of(answer))


def test_a_text_is_answered_with_text_ids_and_meta_info(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    found = ask(client, "/generate", text=PROMPTS[0], rid="mine", sampling_params=GREEDY)
    assert found.keys() == {"text", "output_ids", "meta_info"}
    assert found["text"] == tokenizer.decode(found["output_ids"])
    meta = found["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert 0 <= meta.pop("cached_tokens") < meta["prompt_tokens"]  # others may have asked it, too
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 12},
        "prompt_tokens": len(tokenizer.encode(PROMPTS[0])),
        "completion_tokens": 12,
    }


def test_token_ids_are_answered_as_their_text_is(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    ids = list(tokenizer.encode(PROMPTS[1]))
    by_ids = ask(client, "/generate", input_ids=ids, sampling_params=GREEDY)
    by_text = ask(client, "/generate", text=PROMPTS[1], sampling_params=GREEDY)
    assert by_ids["output_ids"] == by_text["output_ids"]
    (in_batch,) = ask(client, "/generate", input_ids=[ids], sampling_params=GREEDY)
    assert in_batch["output_ids"] == by_text["output_ids"]


def test_a_batch_is_answered_in_order_each_prompt_by_its_own_parameters(
    client: httpx2.Client,
) -> None:
    alone = [ask(client, "/generate", text=text, sampling_params=GREEDY) for text in PROMPTS]
    lengths = [12, 3, 1]
    batch = ask(
        client,
        "/generate",
        text=PROMPTS,
        rid=["a", "b", "c"],
        sampling_params=[{**GREEDY, "max_new_tokens": length} for length in lengths],
        return_logprob=[False, True, False],
    )
    assert [one["meta_info"]["id"] for one in batch] == ["a", "b", "c"]
    assert ["output_token_logprobs" in one["meta_info"] for one in batch] == [False, True, False]
    for one, single, length in zip(batch, alone, lengths, strict=True):
        assert one["output_ids"] == single["output_ids"][:length]


def test_two_ranks_answer_a_batch_as_one_does(client: httpx2.Client, dp_server: Server) -> None:
    one = ask(client, "/generate", text=PROMPTS, sampling_params=GREEDY)
    with httpx2.Client(base_url=dp_server.url, timeout=60) as other:
        two = ask(other, "/generate", text=PROMPTS, sampling_params=GREEDY)
    assert [each["text"] for each in two] == [each["text"] for each in one]


def test_each_chunk_of_a_stream_holds_all_that_came_before(client: httpx2.Client) -> None:
    whole = ask(client, "/generate", text=PROMPTS[0], sampling_params=GREEDY)
    chunks = stream(client, text=PROMPTS[0], rid="s", sampling_params=GREEDY)
    for before, after in pairwise(chunks):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert len(after["output_ids"]) > len(before["output_ids"])
        assert before["meta_info"]["finish_reason"] is None
        assert before["meta_info"]["completion_tokens"] == len(before["output_ids"])
    assert len(chunks) > 1
    last = chunks[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert {chunk["meta_info"]["id"] for chunk in chunks} == {"s"}
    assert not any("index" in chunk for chunk in chunks)


def test_a_streamed_batch_tells_its_outputs_apart_by_their_index(client: httpx2.Client) -> None:
    whole = ask(client, "/generate", text=PROMPTS, sampling_params=GREEDY)
    last: dict[int, Answer] = {}
    for chunk in stream(client, text=PROMPTS, sampling_params=GREEDY):
        last[chunk["index"]] = chunk
    assert [last[index]["text"] for index in range(len(PROMPTS))] == [one["text"] for one in whole]
    assert all(one["meta_info"]["finish_reason"] for one in last.values())


def test_n_outputs_of_a_prompt_are_a_list_numbered_over_the_request(client: httpx2.Client) -> None:
    sampling = {"n": 3, "temperature": 1, "max_new_tokens": 20, "sampling_seed": 7}
    found = ask(client, "/generate", text=PROMPTS[0], rid="r", sampling_params=sampling)
    assert [one["meta_info"]["id"] for one in found] == ["r_0", "r_1", "r_2"]
    chunks = stream(client, text=PROMPTS[0], sampling_params=sampling)
    assert {chunk["index"] for chunk in chunks} == {0, 1, 2}


def test_a_stop_text_ends_the_output_before_it(client: httpx2.Client) -> None:
    whole = ask(client, "/generate", text=PROMPTS[0], sampling_params=GREEDY)["text"]
    stop = whole[4:7]
    found = ask(
        client, "/generate", text=PROMPTS[0], sampling_params={**GREEDY, "stop": ["@@", stop]}
    )
    assert found["text"] == whole[: whole.index(stop)]
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_stop_token_ends_the_output_and_is_told(client: httpx2.Client) -> None:
    ids = ask(client, "/generate", text=PROMPTS[0], sampling_params=GREEDY)["output_ids"]
    stop = ids[5]
    found = ask(
        client, "/generate", text=PROMPTS[0], sampling_params={**GREEDY, "stop_token_ids": [stop]}
    )
    assert found["output_ids"] == ids[: ids.index(stop) + 1]
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_models_own_end_token_ends_a_solution_and_is_told(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    body = {"text": PROMPTS[0], "sampling_params": {"temperature": 0, "max_new_tokens": 200}}
    found = ask(client, "/generate", **body)
    assert found["meta_info"]["finish_reason"] == {
        "type": "stop",
        "matched": tokenizer.eos_token_id,
    }
    assert found["output_ids"][-1] == tokenizer.eos_token_id
    assert Arith().is_right(
        read_problems(bundled_checkpoint() / "heldout.jsonl")[0], found["text"]
    ) == (True, True)


def test_logprobs_of_the_output_alone_come_with_the_prompts_last_token(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    body = {"text": PROMPTS[0], "sampling_params": GREEDY}
    assert "output_token_logprobs" not in ask(client, "/generate", **body)["meta_info"]
    found = ask(client, "/generate", **body, return_logprob=True)
    meta = found["meta_info"]
    assert meta["input_token_logprobs"] == [[None, tokenizer.encode(PROMPTS[0])[-1], None]]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == found["output_ids"]
    assert all(logprob <= 0 for logprob, _, _ in meta["output_token_logprobs"])
    assert "output_top_logprobs" not in meta


def test_logprobs_of_the_prompt_start_where_they_are_asked_for(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    ids = list(tokenizer.encode(PROMPTS[0]))

    def scored(start: int) -> list[list[Any]]:
        found = ask(
            client,
            "/generate",
            text=PROMPTS[0],
            sampling_params=GREEDY,
            return_logprob=True,
            logprob_start_len=start,
        )
        rows: list[list[Any]] = found["meta_info"]["input_token_logprobs"]
        return rows

    whole = scored(0)
    assert [token for _, token, _ in whole] == ids
    assert whole[0][0] is None
    assert all(logprob <= 0 for logprob, _, _ in whole[1:])
    later = scored(5)
    assert later[0] == [None, ids[5], None]
    assert [token for _, token, _ in later] == ids[5:]
    assert later[1:] == whole[6:]
    assert scored(len(ids) - 1) == [[None, ids[-1], None]]


def test_top_logprobs_are_the_best_first_and_spelt_if_asked_for(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    body: dict[str, Any] = {
        "text": PROMPTS[0],
        "sampling_params": GREEDY,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
        "return_text_in_logprobs": True,
    }
    found = ask(client, "/generate", **body)
    meta = found["meta_info"]
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"]) == meta["prompt_tokens"]
    assert len(meta["output_top_logprobs"]) == meta["completion_tokens"]
    for tops in (*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"]):
        logprobs = [logprob for logprob, _, _ in tops]
        assert len(tops) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert all(text == tokenizer.token(token) for _, token, text in tops)
    # Greedy: what was chosen is the best there was.
    for own, tops in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert own[0] == tops[0][0]
    assert "".join(text for _, _, text in meta["output_token_logprobs"]) == found["text"]
    streamed = stream(client, **body)[-1]["meta_info"]
    for name in ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs"):
        assert len(streamed[name]) == len(meta[name])


def test_a_prompt_that_was_seen_is_found_in_the_cache(
    client: httpx2.Client, server: Server
) -> None:
    wait_idle(server, IDLE_SECONDS)
    flush(server)
    ids = [9] * 40
    counts = [
        ask(client, "/generate", input_ids=ids, sampling_params=GREEDY)["meta_info"][
            "cached_tokens"
        ]
        for _ in range(2)
    ]
    assert counts == [0, 32]  # of pages of 16
    (group,) = info(server)["internal_states"]
    assert group["cached_pages"] > 0
    answer = client.post("/flush_cache")
    assert (answer.status_code, answer.text) == (200, "Cache flushed.\n")
    (group,) = info(server)["internal_states"]
    assert group["cached_pages"] == 0


def test_a_running_stream_is_aborted_by_its_id_and_keeps_what_it_has(
    client: httpx2.Client, server: Server
) -> None:
    body = {"text": PROMPTS[0], "rid": "long", "sampling_params": LONG, "stream": True}
    with client.stream("POST", "/generate", json=body) as answer:
        chunks = chunks_of(answer)
        first = next(chunks)
        busy = httpx2.post(f"{server.url}/flush_cache")
        assert busy.status_code == 400
        assert "requests are running" in busy.json()["error"]["message"]
        other = httpx2.post(f"{server.url}/abort_request", json={"rid": "other"})
        assert (other.status_code, other.json()) == (200, {"aborted": 0})
        aborted = httpx2.post(f"{server.url}/abort_request", json={"rid": "long"})
        assert (aborted.status_code, aborted.json()) == (200, {"aborted": 1})
        *_, last = chunks
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["text"].startswith(first["text"])
    assert 0 < last["meta_info"]["completion_tokens"] < LONG["max_new_tokens"]
    wait_idle(server, IDLE_SECONDS)


def test_all_requests_are_aborted_at_once(client: httpx2.Client, server: Server) -> None:
    body = {"text": PROMPTS, "sampling_params": LONG, "stream": True}
    with client.stream("POST", "/generate", json=body) as answer:
        chunks = chunks_of(answer)
        next(chunks)
        aborted = httpx2.post(f"{server.url}/abort_request", json={"abort_all": True})
        assert aborted.json() == {"aborted": len(PROMPTS)}
        ends = [one for one in chunks if one["meta_info"]["finish_reason"] is not None]
    assert sorted(one["index"] for one in ends) == [0, 1, 2]
    assert {one["meta_info"]["finish_reason"]["type"] for one in ends} == {"abort"}


def test_health_and_the_probe_that_generates_answer_idle_and_busy(
    client: httpx2.Client, server: Server
) -> None:
    def probes() -> list[int]:
        paths = ("/health", "/ping", "/health_generate")
        return [httpx2.get(f"{server.url}{path}", timeout=30).status_code for path in paths]

    assert probes() == [200, 200, 200]
    body = {"text": PROMPTS[0], "sampling_params": LONG, "stream": True}
    with client.stream("POST", "/generate", json=body) as answer:
        chunks = chunks_of(answer)  # kept, since the stream is closed with it
        next(chunks)
        assert probes() == [200, 200, 200]
        assert info(server)["internal_states"][0]["running"] == 1
    wait_idle(server, IDLE_SECONDS)


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_the_model_is_described(client: httpx2.Client, path: str) -> None:
    found = client.get(path).json()
    assert found["model_path"] == found["tokenizer_path"] == str(bundled_checkpoint())
    assert found["served_model_name"] == "arith-moe"
    assert found["is_generation"] is True
    assert found["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (found["context_length"], found["vocab_size"]) == (1024, 640)


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
def test_the_server_tells_its_settings_its_plan_and_its_pages(dp_server: Server, path: str) -> None:
    found = httpx2.get(f"{dp_server.url}{path}", timeout=30).json()
    assert (found["tp_size"], found["attn_dp_size"], found["ep_size"]) == (2, 2, 2)
    assert found["layout"] == found["plan"]["layout"] == "tp2,dp2,ep2"
    assert found["plan"]["regimes"]
    assert found["version"] == __version__
    assert found["max_total_num_tokens"] == 262144
    assert len(found["internal_states"]) == 2
    for group in found["internal_states"]:
        assert group["total_pages"] * found["page_size"] == found["max_total_num_tokens"]
    assert "api_key" not in found


def test_text_is_tokenized_and_back(client: httpx2.Client, tokenizer: Tokenizer) -> None:
    text = "Mia has 3 apples, é and 7 pears."
    ids = list(tokenizer.encode(text))
    found = ask(client, "/tokenize", prompt=text)
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 1024}
    assert ask(client, "/tokenize", text=text) == found
    back = ask(client, "/detokenize", tokens=ids)
    assert back == {"prompt": text, "text": text}
    several = ask(client, "/tokenize", prompt=[text, "5"])
    assert several["count"] == [len(ids), 1]
    texts = ask(client, "/detokenize", tokens=several["tokens"])
    assert texts["text"] == [text, "5"]


def test_tokens_are_spelt_and_special_ones_left_out_unless_asked_for(
    client: httpx2.Client, tokenizer: Tokenizer
) -> None:
    found = ask(client, "/tokenize", prompt="<|im_end|>Mia", return_token_strs=True)
    assert found["token_strs"][0] == "<|im_end|>"
    assert "".join(found["token_strs"]) == "<|im_end|>Mia"
    assert ask(client, "/detokenize", tokens=found["tokens"])["text"] == "Mia"
    kept = ask(client, "/detokenize", tokens=found["tokens"], skip_special_tokens=False)
    assert kept["text"] == "<|im_end|>Mia"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/generate", {}, "exactly one of them"),
        ("/generate", {"text": "1", "input_ids": [1]}, "exactly one of them"),
        ("/generate", {"text": []}, "no prompt in the list"),
        ("/generate", {"text": ""}, "empty"),
        ("/generate", {"input_ids": [640]}, "640"),
        ("/generate", {"input_ids": [True]}, "input_ids"),
        ("/generate", {"input_ids": [9] * 1025}, "1024"),
        ("/generate", {"text": ["1", "2"], "rid": ["a"]}, "rid: has 1 entries for 2 prompts"),
        ("/generate", {"text": "1", "sampling_params": {"temperature": -1}}, "temperature -1"),
        ("/generate", {"text": "1", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ("/generate", {"text": "1", "sampling_params": {"ebnf": "x"}}, "ebnf: is not supported"),
        ("/generate", {"text": "1", "image_data": "x"}, "image_data: is not supported"),
        (
            "/generate",
            {"text": "1", "return_logprob": True, "logprob_start_len": 9},
            "logprob_start_len 9: must be below the prompt's 1 tokens",
        ),
        ("/generate", {"text": ["1"] * 1025}, "1025 outputs"),
        ("/abort_request", {}, "rid: name the request"),
        ("/tokenize", {}, "prompt: a text"),
        ("/tokenize", {"prompt": ["1"] * 1025}, "1025 texts"),
        ("/detokenize", {"tokens": [640]}, "640; the vocabulary is 0 to 639"),
        ("/detokenize", {"tokens": [-1]}, "-1; the vocabulary"),
        ("/detokenize", {}, "tokens"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_what_is_wrong_is_said_in_one_line(
    client: httpx2.Client, path: str, body: Answer, said: str, streams: bool
) -> None:
    answer = client.post(path, json={**body, "stream": streams})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_are_told(client: httpx2.Client) -> None:
    unknown = client.post("/generated", json={})
    assert unknown.status_code == 404
    assert unknown.json()["error"] == {
        "message": "POST /generated: there is no such endpoint",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }
    wrong = client.get("/generate")
    assert wrong.status_code == 405
    assert "POST" in wrong.headers["allow"]
    assert wrong.json()["error"]["message"] == "GET /generate: the method is not allowed"
