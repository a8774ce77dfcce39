"""What a load generator must know of a server before it starts: its model, and what it takes."""

from dataclasses import dataclass
from http import HTTPStatus

from isomoe.bench.client import Endpoint, OpenAIClient
from isomoe.bench.workload import BenchRequest, Prompt
from isomoe.errors import ConfigError
from isomoe.http import HttpClient, Response, ResponseError

_VOCAB_PAGES = ("/get_server_info", "/get_model_info", "/v1/models")
_LEAST_VOCAB = 256
"""Token ids below it are in every vocabulary, as far as we know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that has answered one request.

    Attributes:
        client: asks it.
        vocab_size: random prompts are token ids below it; None if they must be text.
        notes: what was not as hoped, a sentence each.
    """

    client: OpenAIClient
    vocab_size: int | None
    notes: tuple[str, ...] = ()


async def find_target(
    http: HttpClient,
    *,
    endpoint: Endpoint,
    model: str | None,
    vocab_size: int | None,
    sample: Prompt | None,
    ignore_eos: bool,
    timeout_seconds: float,
) -> Target:
    """Learns what a server serves and which prompts it takes, by asking for one token.

    Args:
        model: None takes the first that the server lists.
        vocab_size: None asks the server's own pages.
        sample: a prompt that it must take, where prompts are given.

    Raises:
        ConfigError: if it cannot be reached, names no model or refuses.
    """
    pages = await _models_page(http)
    client = OpenAIClient(
        http=http,
        endpoint=endpoint,
        model=model or _first_model(http, pages),
        ignore_eos=ignore_eos,
        timeout_seconds=timeout_seconds,
    )
    if sample is not None:
        await _check(client, sample)
    if endpoint is Endpoint.CHAT:
        return Target(client=client, vocab_size=None)
    notes = []
    size = vocab_size or await _served_vocab_size(http)
    if size is None:
        size = _LEAST_VOCAB
        notes.append(f"the server does not say its vocabulary's size: token ids are below {size}")
    refusal = await _refusal(client, (size - 1,))
    if refusal is None:
        return Target(client=client, vocab_size=size, notes=tuple(notes))
    if vocab_size is not None:
        raise ConfigError(f"--vocab-size {vocab_size}: token id {size - 1} is refused ({refusal})")
    await _check(client, "the")
    note = f"the server refuses token ids ({refusal}): prompts are words"
    return Target(client=client, vocab_size=None, notes=(note,))


async def _models_page(http: HttpClient) -> Response:
    try:
        return await http.get("/v1/models")
    except (OSError, ResponseError) as error:
        raise ConfigError(
            f"--url {http.url}: not reachable ({error}); `isomoe serve` starts a server, "
            "and --launch does both"
        ) from None


def _first_model(http: HttpClient, page: Response) -> str:
    if page.status != HTTPStatus.OK:
        raise ConfigError(f"--url {http.url}: /v1/models says {page.problem}")
    match page.json():
        case {"data": [{"id": str(name)}, *_]}:
            return name
    raise ConfigError(f"--url {http.url}: /v1/models names no model; --model NAME would")


async def _served_vocab_size(http: HttpClient) -> int | None:
    """`vocab_size`, wherever it stands in the pages on which servers describe themselves."""
    for path in _VOCAB_PAGES:
        try:
            page = await http.get(path)
        except (OSError, ResponseError):
            continue
        found = _find(page.json(), "vocab_size")
        if page.status == HTTPStatus.OK and isinstance(found, int) and found > 0:
            return found
    return None


def _find(document: object, key: str) -> object:
    """The value of the first `key` in a JSON document, at any depth; None if there is none."""
    if isinstance(document, dict):
        if document.get(key) is not None:
            return document[key]
        document = list(document.values())
    if isinstance(document, list):
        for part in document:
            found = _find(part, key)
            if found is not None:
                return found
    return None


async def _refusal(client: OpenAIClient, prompt: Prompt) -> str | None:
    """Why a prompt is not answered; None if it is."""
    return (await client.measure(BenchRequest(prompt=prompt, max_tokens=1))).error


async def _check(client: OpenAIClient, prompt: Prompt) -> None:
    refusal = await _refusal(client, prompt)
    if refusal is not None:
        raise ConfigError(f"--url {client.http.url}: a request for one token failed ({refusal})")
