"""A model that is a rule, behind the forms of SGLang and vLLM; right in every detail."""

from typing import Any

from reply_server import NOT_FOUND, Answer, Question

MODEL = "rule-7b"
VOCAB = 300


def logprob(ids: list[int], token_id: int) -> float:
    """Of a token after these: a rule, no model."""
    return -0.5 - ((sum(ids) + token_id) % 97) / 40


def next_id(ids: list[int]) -> int:
    return (sum(ids) * 31 + len(ids)) % VOCAB


def spell(token_id: int) -> str:
    return f" w{token_id}"


def continued(ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(next_id([*ids, *found]))
    return found


def encode(text: str) -> list[int]:
    return [ord(each) % VOCAB for each in text]


def sglang(question: Question) -> Answer:
    """`/generate` and the pages beside it."""
    if question.path == "/get_server_info":
        return Answer(document={"version": "0.5.16", "tp_size": 2, "api_key": "sk-of-the-server"})
    if question.path == "/v1/models":
        return Answer(document={"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    if question.path != "/generate":
        return NOT_FOUND
    return Answer(document=sglang_reply(question.body))


def sglang_reply(body: dict[str, Any]) -> dict[str, Any]:
    ids = body["input_ids"] if "input_ids" in body else encode(body["text"])
    top = body.get("top_logprobs_num", 0)
    spells = body.get("return_text_in_logprobs")

    def entry(before: list[int], token_id: int) -> list[Any]:
        return [logprob(before, token_id), token_id, spell(token_id) if spells else None]

    def candidates(before: list[int], token_id: int) -> list[Any]:
        return [entry(before, token_id + step) for step in range(top)]

    output = continued(ids, body["sampling_params"]["max_new_tokens"])
    whole = [*ids, *output]
    start = body["logprob_start_len"] if body["logprob_start_len"] >= 0 else len(ids) - 1
    scored = range(start + 1, len(ids))
    decoded = range(len(ids), len(whole))
    meta = {
        "id": "0b5d",
        "finish_reason": {"type": "length", "length": len(output)},
        "prompt_tokens": len(ids),
        "completion_tokens": len(output),
        "cached_tokens": 0,
        "weight_version": "default",
        "input_token_logprobs": [
            [None, ids[start], None],
            *(entry(whole[:at], whole[at]) for at in scored),
        ],
        "output_token_logprobs": [entry(whole[:at], whole[at]) for at in decoded],
    }
    if top:
        meta["input_top_logprobs"] = [None, *(candidates(whole[:at], whole[at]) for at in scored)]
        meta["output_top_logprobs"] = [candidates(whole[:at], whole[at]) for at in decoded]
    return {"text": "".join(map(spell, output)), "output_ids": output, "meta_info": meta}


def vllm(question: Question) -> Answer:
    """`/v1/completions` with vLLM's extras, and the pages beside it."""
    if question.path == "/version":
        return Answer(document={"version": "0.25.0"})
    if question.path == "/v1/models":
        listed = [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 4096}]
        return Answer(document={"object": "list", "data": listed})
    if question.path == "/tokenize":
        ids = encode(question.body["prompt"])
        return Answer(document={"count": len(ids), "max_model_len": 4096, "tokens": ids})
    if question.path != "/v1/completions":
        return NOT_FOUND
    return Answer(document=vllm_reply(question.body))


def vllm_reply(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    ids = encode(prompt) if isinstance(prompt, str) else prompt
    output = continued(ids, body["max_tokens"])
    whole = [*ids, *output]
    choice: dict[str, Any] = {
        "index": 0,
        "text": "".join(map(spell, output)),
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": output if body.get("return_token_ids") else None,
        "prompt_logprobs": None,
    }
    if body.get("logprobs") is not None:
        as_ids = body.get("return_tokens_as_token_ids")
        shown = [f"token_id:{one}" if as_ids else spell(one) for one in output]
        values = [logprob(whole[:at], whole[at]) for at in range(len(ids), len(whole))]
        choice["logprobs"] = {
            "tokens": shown,
            "token_logprobs": values,
            "top_logprobs": [{text: value} for text, value in zip(shown, values, strict=True)],
            "text_offset": [0] * len(output),
        }
    if body.get("prompt_logprobs") is not None:
        choice["prompt_logprobs"] = [
            None,
            *(
                {
                    str(ids[at]): {
                        "logprob": logprob(ids[:at], ids[at]),
                        "rank": 3,
                        "decoded_token": spell(ids[at]),
                    }
                }
                for at in range(1, len(ids))
            ),
        ]
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": MODEL,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(ids),
            "completion_tokens": len(output),
            "total_tokens": len(whole),
        },
    }
