"""The engine as the HTTP front end sees it: requests in, deltas out, nothing that blocks.

Three threads beside the engine's own process:
    the event loop      owns all that is here, and is the only one that sends
    the receiver        decodes what the engine answers, turns tokens to text, and wakes the loop
    a small pool        tokenizes, renders chat templates and checks requests
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from threading import Event, Thread
from typing import Any, Self, TypeVar

from isomoe.engine import FinishReason, Request, SamplingParams, Update
from isomoe.engine.executor import Progress
from isomoe.engine.intake import Intake
from isomoe.engine.model_info import ModelInfo
from isomoe.engine.outputs import Delta
from isomoe.engine.reply import Reply
from isomoe.errors import ConfigError, EngineDeadError, IsomoeError, RequestError
from isomoe.models import family_of
from isomoe.server.config import SamplingDefaults, ServerConfig
from isomoe.server.engine_link import LOOK_MS, EngineLink
from isomoe.server.messages import (
    CacheFlushed,
    Cancel,
    EngineState,
    ExpertLoad,
    FlushCache,
    FromEngine,
    GetExpertLoad,
    GetState,
    Ready,
    StartExpertRecord,
    StepResult,
    StepStats,
    StopExpertRecord,
    Submit,
    ToEngine,
)
from isomoe.server.metrics import FinishedRequest, Metrics
from isomoe.server.open_request import OpenRequest
from isomoe.server.request_log import current_line
from isomoe.tokenizer import Tokenizer

_POOL_THREADS = 2
_CHECKED_ON_LOOP = 1024
"""Token ids of a prompt that take less time to check than to hand to the pool."""
_WORKERS_FIRST_SECONDS = 5.0
"""The engine's own watchdog comes first: it knows which worker hangs."""
_log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
T = TypeVar("T")


class AsyncEngine:
    """An engine in a process of its own.

    `start` runs it; then `attach` it to the event loop that will use it, once.

    Attributes:
        dead: why the engine is gone; None while it lives.
        died: set with it.
    """

    def __init__(
        self,
        config: ServerConfig,
        info: ModelInfo,
        tokenizer: Tokenizer,
        link: EngineLink,
        ready: Ready,
    ) -> None:
        self.config = config
        self.info = info
        self.plan = ready.plan
        self.limits = ready.limits
        self.worker_pids = ready.worker_pids
        self.metrics = Metrics()
        self.tokenizer = tokenizer
        self.dead: str | None = None
        self.died = asyncio.Event()
        self._link = link
        self._intake = Intake(info, ready.limits, self.tokenizer, config.engine.random_seed)
        self._capacity = config.max_queued_requests + (
            config.engine.max_running_requests * ready.limits.attn_dp_size
        )
        self._open: dict[int, OpenRequest] = {}
        self._in_queue = 0
        self._refuses: str | None = None
        self._token_texts: dict[int, str] = {}
        self._asked: defaultdict[type, deque[asyncio.Future[Any]]] = defaultdict(deque)
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "tokenizer")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = Event()
        self._receiver = Thread(target=self._receive, name="receiver", daemon=True)

    @classmethod
    def start(cls, config: ServerConfig, progress: Progress | None = None) -> Self:
        """Starts the engine process and waits until it has its weights.

        Raises:
            ConfigError: if the settings fit neither one another nor the model.
            CheckpointError: if the checkpoint cannot be read.
            EngineDeadError: if the process ended for another reason.
        """
        info = ModelInfo.of(config.engine)
        tokenizer = Tokenizer(info.folder, config.chat_template)
        if tokenizer.exists:
            # What is wrong with it is said before any weight is read.
            tokenizer.stream()
            tokenizer.longest_token  # noqa: B018
        elif config.chat_template is not None:
            raise ConfigError(f"--chat-template: {info.folder} has no tokenizer to use it")
        link = EngineLink()
        try:
            return cls(config, info, tokenizer, link, link.launch(config.engine, progress))
        except BaseException:
            link.shutdown()
            raise

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used."""
        return self.tokenizer.exists

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of `SamplingParams` for requests that leave them open."""
        by_model = self.config.sampling_defaults is SamplingDefaults.MODEL
        return self.info.sampling_defaults if by_model else {}

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.config.served_model_name is not None:
            return self.config.served_model_name
        path = self.config.engine.model_path
        return self.info.folder.name if path is None else path.rstrip("/")

    @property
    def pid(self) -> int:
        """Of the engine process."""
        return self._link.pid

    @property
    def num_open(self) -> int:
        """Requests under way."""
        return len(self._open)

    def attach(self) -> None:
        """Begins to serve the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._receiver.start()

    def shutdown(self) -> None:
        """Ends the engine process. May be called twice."""
        self._stopping.set()
        if self._receiver.is_alive():
            self._receiver.join()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._link.shutdown()

    async def warm_up(self) -> None:
        """Has every attention-DP group answer, with a grammar where there can be one.

        The first use of a worker's tokenizer takes a second or more, within a step.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        if self.has_tokenizer:
            try:
                await self._answer_once(replace(params, regex="a"))
            except RequestError as error:
                _log.warning("requests with a grammar will be refused: %s", error)
                await self._answer_once(params)
        else:
            await self._answer_once(params)
        self.metrics = Metrics()
        if self.config.engine.record_expert_load:
            await self.start_expert_record()

    async def _answer_once(self, params: SamplingParams) -> None:
        """One request for each attention-DP group; they go to the least loaded."""
        prompt = [min(self.info.eos_token_ids, default=0)]
        requests = [await self.submit(prompt, params) for _ in range(self.limits.attn_dp_size)]
        for request in requests:
            await request.result()

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text.

        Raises:
            RequestError: if it cannot fit the context.
        """
        return await self._in_queue_for_pool(lambda: self._intake.encode(text, add_special_tokens))

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Raises RequestError if a prompt of ids can be no request's."""
        self._intake.check_prompt(token_ids)

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Raises:
            RequestError: if they are not of the vocabulary.
        """
        self._intake.check_ids("the token ids", token_ids)
        return await self._in_pool(lambda: self.tokenizer.decode(token_ids, skip_special_tokens))

    async def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as a text of its own, special ones too."""
        known = self._token_texts
        missing = {token for token in token_ids if token not in known}
        if missing:
            texts = await self._in_pool(lambda: [self.tokenizer.token(token) for token in missing])
            known.update(zip(missing, texts, strict=True))
        return [known[token] for token in token_ids]

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> str:
        """Messages as the text that asks for the assistant's answer.

        Args:
            settings: of the template.

        Raises:
            RequestError: if there is no template, or it refuses the messages.
        """
        return await self._in_queue_for_pool(
            lambda: self.tokenizer.chat(messages, tools, **settings)
        )

    async def submit(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> OpenRequest:
        """Begins a request.

        Raises:
            RequestError: if it cannot be served: 400, or 429 if the queue is full.
            EngineDeadError: if the engine is gone.
        """
        self._check_alive()
        self._check_capacity()
        text = prompt if isinstance(prompt, str) else None
        if text is None and len(prompt) <= _CHECKED_ON_LOOP and not params.has_grammar:
            request = self._request(prompt, params)
        else:
            request = await self._in_queue_for_pool(lambda: self._request(prompt, params))
        self._check_alive()
        if self._refuses is not None:
            raise RequestError(self._refuses, 503)
        line = current_line()
        own_id = f"{'req' if line is None else line.request_id}-{request.request_id}"
        opened = OpenRequest(
            request_id or own_id,
            request,
            text,
            Reply(request, self.tokenizer),
            self._cancel,
        )
        self._open[request.request_id] = opened
        limit = self.config.request_timeout_seconds
        if limit is not None:
            assert self._loop is not None
            spent = 0.0 if line is None else time.monotonic() - line.start
            opened.timer = self._loop.call_later(max(0.0, limit - spent), self._time_out, opened)
        self._send(Submit(request))
        return opened

    def abort(self, request_id: str | None = None) -> int:
        """Ends open requests early, all of them without an id; returns how many."""
        chosen = [one for one in self._open.values() if request_id in (None, one.request_id)]
        for one in chosen:
            one.add(Delta(finish_reason=FinishReason.ABORT), self.metrics)
            self._drop(one, str(FinishReason.ABORT))
        self._send_cancel(chosen)
        return len(chosen)

    def end_all(self, reason: str) -> None:
        """Ends every open request with a 503 that says why, and refuses all others."""
        self._refuses = reason
        chosen = list(self._open.values())
        for one in chosen:
            self._drop(one, "error", RequestError(reason, 503))
        self._send_cancel(chosen)

    async def flush_cache(self) -> bool:
        """Forgets all cached prefixes; False, and nothing done, while requests are about."""
        return (await self._ask(FlushCache(), CacheFlushed)).done

    async def state(self) -> EngineState:
        """The engine between two steps."""
        return await self._ask(GetState(), EngineState)

    async def start_expert_record(self) -> None:
        """Records the experts' load from now on; what was recorded before is forgotten.

        Raises:
            RequestError: if this server does not record it.
        """
        await self._ask_of_experts(StartExpertRecord())

    async def stop_expert_record(self) -> None:
        """Ends the record, which can still be asked for.

        Raises:
            RequestError: if this server does not record it.
        """
        await self._ask_of_experts(StopExpertRecord())

    async def expert_load(self) -> list[list[int]]:
        """How often each expert was chosen in the record: [layers][E].

        Raises:
            RequestError: if this server does not record it.
        """
        return await self._ask_of_experts(GetExpertLoad())

    async def _ask_of_experts(self, question: ToEngine) -> list[list[int]]:
        hf_config = self.info.hf_config
        if not family_of(hf_config).has_sparse(hf_config):
            raise RequestError("the model has no routed experts whose load could be recorded")
        if not self.config.engine.record_expert_load:
            raise RequestError(
                "the experts' load is not recorded; isomoe serve --record-expert-load does it"
            )
        return (await self._ask(question, ExpertLoad)).counts

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self._intake.encode(prompt) if isinstance(prompt, str) else prompt
        return self._intake.request(ids, params)

    def _check_capacity(self) -> None:
        if len(self._open) + self._in_queue >= self._capacity:
            raise RequestError(
                f"{self._capacity} requests are running or waiting, which is the most that "
                "--max-running-requests and --max-queued-requests allow; try again later",
                429,
            )

    async def _in_pool(self, work: Callable[[], T]) -> T:
        assert self._loop is not None
        return await self._loop.run_in_executor(self._pool, work)

    async def _in_queue_for_pool(self, work: Callable[[], T]) -> T:
        """For what comes before a request: while it waits, it counts as a waiting one."""
        self._check_capacity()
        self._in_queue += 1
        try:
            return await self._in_pool(work)
        finally:
            self._in_queue -= 1

    async def _ask(self, question: ToEngine, kind: type[T]) -> T:
        """The answer, of its kind; those of a kind come in the order of their questions."""
        self._check_alive()
        assert self._loop is not None
        asker: asyncio.Future[T] = self._loop.create_future()
        self._asked[kind].append(asker)
        self._send(question)
        limit = self.config.engine.watchdog_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                return await asker
        except TimeoutError:
            raise RequestError(f"the engine does not answer within {limit:g} s", 503) from None

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def _send(self, message: ToEngine) -> None:
        if self.dead is None:
            self._link.send(message)

    def _send_cancel(self, requests: Sequence[OpenRequest]) -> None:
        if requests:
            self._send(Cancel([one.request.request_id for one in requests]))

    def _cancel(self, opened: OpenRequest) -> None:
        if opened.request.request_id in self._open:
            self._drop(opened, str(FinishReason.ABORT))
            self._send_cancel([opened])

    def _time_out(self, opened: OpenRequest) -> None:
        if opened.request.request_id in self._open:
            limit = self.config.request_timeout_seconds
            self._drop(opened, "error", RequestError(f"not finished within {limit:g} s", 504))
            self._send_cancel([opened])

    def _drop(self, opened: OpenRequest, outcome: str, error: IsomoeError | None = None) -> None:
        """Takes a request that has ended off the list."""
        del self._open[opened.request.request_id]
        opened.end(error)
        times = opened.times
        assert times.end is not None
        first = None if times.first_token is None else times.first_token - times.arrival
        finished = FinishedRequest(
            prompt_tokens=len(opened.prompt_token_ids),
            output_tokens=opened.output_tokens,
            cached_tokens=opened.cached_tokens,
            time_to_first_token=first,
            end_to_end=times.end - times.arrival,
            outcome=outcome,
        )
        self.metrics.on_request(finished)
        if opened.line is not None:
            opened.line.add(finished)

    def _receive(self) -> None:
        """The receiver thread."""
        limit = self.config.engine.watchdog_timeout_seconds + _WORKERS_FIRST_SECONDS
        heard = time.monotonic()
        try:
            while not self._stopping.is_set():
                message = self._link.receive(LOOK_MS)
                if message is not None or not self._open:
                    heard = time.monotonic()
                elif time.monotonic() - heard > limit:
                    self._link.kill()
                    raise EngineDeadError(
                        f"the engine process ({self.pid}) brought nothing for {limit:g} s"
                    )
                match message:
                    case None:
                        continue
                    case StepResult(updates=updates, stats=stats):
                        brought = []
                        for update in updates:
                            opened = self._open.get(update.request_id)
                            if opened is not None and opened.reply.finish_reason is None:
                                goes_on = update.finish_reason is None
                                brought.append((opened, _taken(opened, update), goes_on))
                        self._on_loop(lambda b=brought, s=stats: self._deliver(b, s))  # type: ignore[misc]
                    case _:
                        self._on_loop(lambda m=message: self._answer(m))  # type: ignore[misc]
        except EngineDeadError as error:
            reason = str(error)
        except BaseException as error:  # tokenizers' panics are no Exception
            reason = f"the receiver failed: {type(error).__name__}: {error}"
        else:
            return
        self._on_loop(lambda: self._die(reason))

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def _deliver(
        self, brought: Sequence[tuple[OpenRequest, Delta | None, bool]], stats: StepStats
    ) -> None:
        """What a step brought: (request, delta, whether the engine would go on with it)."""
        self.metrics.on_step(stats)
        stopped = []
        for opened, delta, goes_on in brought:
            if opened.request.request_id not in self._open:  # closed meanwhile
                continue
            if delta is None:
                error = RequestError("the output cannot be turned into text; the log has it", 500)
                self._drop(opened, "error", error)
            else:
                opened.add(delta, self.metrics)
                if delta.finish_reason is None:
                    continue
                self._drop(opened, str(delta.finish_reason))
            if goes_on:
                stopped.append(opened)
        self._send_cancel(stopped)

    def _answer(self, message: FromEngine) -> None:
        askers = self._asked[type(message)]
        assert askers, f"the engine sent {message}"
        asker = askers.popleft()
        if not asker.done():
            asker.set_result(message)

    def _die(self, reason: str) -> None:
        self.dead = reason
        error = EngineDeadError(reason)
        for opened in list(self._open.values()):
            self._drop(opened, "error", error)
        for asker in chain.from_iterable(self._asked.values()):
            if not asker.done():
                asker.set_exception(error)
        self.died.set()


def _taken(opened: OpenRequest, update: Update) -> Delta | None:
    """What is new; None if the tokenizer fails, which is the end of this request alone."""
    try:
        return opened.reply.take(update)
    except BaseException:
        _log.exception("%s: tokens %s", opened.request_id, update.token_ids)
        return None
