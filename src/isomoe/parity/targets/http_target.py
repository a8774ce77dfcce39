"""A server at a URL, whatever its dialect."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from isomoe.errors import ConfigError
from isomoe.parity.run import Composition, Ids, Prompt, Text
from isomoe.parity.targets.base import Progress, Stage, Target
from isomoe.parity.targets.detect import Spoken, detect
from isomoe.parity.targets.dialect import Asked, Request
from isomoe.parity.targets.http_client import HttpSettings, JsonClient, Refused
from isomoe.parity.targets.reading import BadReply, short, understood
from isomoe.parity.targets.server_pages import ServerPages, listed_models, read_pages

T = TypeVar("T")

_ENDS = "outputs end at end tokens: this server cannot be asked to go on after them"


class HttpTarget(Target):
    """A running server. Entering it finds out what it is; nothing of it is started or ended.

    Args:
        url: of its root, with or without `/v1`.
        settings: how it is spoken to.
        stage: shows that it is looked for.

    Raises:
        ConfigError: if `url` is none, or holds credentials.
    """

    def __init__(self, url: str, settings: HttpSettings, stage: Stage) -> None:
        self._client = JsonClient(url, settings)
        self.name = url
        self.dialect = settings.dialect or "http"
        self._settings = settings
        self._stage = stage
        self._model = settings.model
        self._runner: asyncio.Runner | None = None
        self._pages = ServerPages((), {})
        self._spoken: Spoken | None = None
        self._served: Any = None
        self._ids: dict[str, Ids] = {}

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        try:
            with self._stage(f"{self.name}: finding its dialect"):
                self._runner.run(self._start())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            self._runner.run(self._end())
            self._runner.close()
            self._runner = None

    def facts(self) -> Mapping[str, Any]:
        return {"model": self._model or self._served, **self._pages.facts}

    def encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return self._run(self._encode(prompts))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        ignore_eos: bool,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        dialect = self._known().dialect
        asked = Asked(max_tokens, ignore_eos, top)
        if ignore_eos and not dialect.goes_on and _ENDS not in self.notes:
            self.notes += (_ENDS,)

        async def one(index: int) -> Text:
            prompt = prompts[index]
            request = self._request(lambda: dialect.request(self._model, prompt, asked))
            output = await self._ask(
                request, lambda reply: dialect.read(reply, prompt, asked), f"prompt {index}"
            )
            if not output:
                raise self._client.error(f"prompt {index}: there is no output")
            return output

        return self._run(self._all(one, len(prompts), composition, progress))

    def score(
        self,
        prompts: Sequence[Prompt],
        outputs: Sequence[Text],
        *,
        top: int,
        composition: Composition,
        progress: Progress | None = None,
    ) -> list[Text]:
        scorer = self._known().scorer
        if scorer is None:
            raise self._client.error("cannot score given tokens")
        known = self.encode(prompts)

        async def one(index: int) -> Text:
            prompt, output = known[index], outputs[index]
            request = self._request(lambda: scorer.request(self._model, prompt, output, top))
            return await self._ask(
                request, lambda reply: scorer.read(reply, prompt, output, top), f"prompt {index}"
            )

        return self._run(self._all(one, len(prompts), composition, progress))

    async def _start(self) -> None:
        self._pages = await read_pages(self._client, self._model)
        notes = []
        if self._model is None and self._pages.models:
            self._model = self._pages.models[0]
            if len(self._pages.models) > 1:
                notes.append(f"{self._model} is the first of {len(self._pages.models)} models")
        spoken = await detect(self._client, self._model, self._settings.dialect)
        self._spoken = spoken
        self.dialect = spoken.dialect.name
        self.can_score = spoken.scorer is not None
        self.gives_logprobs = spoken.dialect.gives_logprobs
        notes += spoken.dialect.notes
        if not self.can_score and self.gives_logprobs:
            why_not = f" ({spoken.why_not})" if spoken.why_not else ""
            notes.append(f"scores no given tokens{why_not}: only what it decodes is compared")
        self.notes = tuple(notes)

    async def _end(self) -> None:
        self._client.close()
        await asyncio.sleep(0)  # connections close in the next turn of the loop

    async def _encode(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        encoder = self._known().dialect.encoder()
        if encoder is None:
            return list(prompts)
        for index, prompt in enumerate(prompts):
            if prompt.token_ids is None and prompt.text not in self._ids:
                if prompt.text is None:
                    raise ConfigError(f"prompt {index}: has neither a text nor token ids")
                request = encoder.request(self._model, prompt.text)
                self._ids[prompt.text] = await self._ask(request, encoder.read, f"prompt {index}")
        return [
            prompt
            if prompt.token_ids is not None or prompt.text is None
            else prompt._replace(token_ids=self._ids[prompt.text])
            for prompt in prompts
        ]

    async def _ask(self, request: Request, read: Callable[[Any], T], what: str) -> T:
        """One exchange, checked: what came, and that it came from the same model as before."""
        try:
            reply = await self._client.ask(*request)
            found = understood(lambda: read(reply))
        except (Refused, BadReply) as error:
            raise self._client.error(f"{what}: {error}") from None
        served = self._known().dialect.served(reply)
        if served is not None:
            self._served = self._served or served
            if served != self._served:
                raise self._client.error(
                    f"{what}: the model was {short(self._served)} and is {short(served)} now"
                )
        return found

    async def _all(
        self,
        one: Callable[[int], Awaitable[Text]],
        count: int,
        composition: Composition,
        progress: Progress | None,
    ) -> list[Text]:
        """Every prompt's, in their order; as many at once as the composition says."""
        order = list(range(count))
        if composition.backwards:
            order.reverse()
        size = composition.batch or max(1, count)
        free = asyncio.Semaphore(self._settings.max_concurrency)
        found: dict[int, Text] = {}

        async def kept(index: int) -> None:
            async with free:
                found[index] = await one(index)
            if progress is not None:
                progress(len(found), count)

        for start in range(0, count, size):
            try:
                async with asyncio.TaskGroup() as group:
                    for index in order[start : start + size]:
                        group.create_task(kept(index))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        await self._check_listed()
        return [found[index] for index in range(count)]

    async def _check_listed(self) -> None:
        if self._model not in self._pages.models:
            return
        listed = await listed_models(self._client)
        if listed is not None and self._model not in listed:
            raise self._client.error(f"served {short(self._model)}, and lists {short(listed)} now")

    def _request(self, make: Callable[[], Request]) -> Request:
        try:
            return make()
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def _known(self) -> Spoken:
        assert self._spoken is not None, "it is entered first"
        return self._spoken

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._runner is not None, "it is entered first"
        return self._runner.run(work)
