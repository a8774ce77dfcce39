"""One request's answer as it comes: tokens to text, and stop texts."""

from isomoe.engine.outputs import Delta, FinishReason, RequestOutput, TokenLogprob, Update
from isomoe.engine.step import Request
from isomoe.tokenizer import TextStream, Tokenizer


class Reply:
    """Turns what steps bring one request into deltas.

    Text is cut before the stop text or the stop token that ends it.

    Attributes:
        finish_reason: None while it goes on. A stop text ends the reply before the engine knows:
            who runs the engine must remove the request then.
        stop_reason: as in `Delta`.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.params = request.params
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        decodes = self.params.detokenize and tokenizer.exists
        self._stream: TextStream | None = tokenizer.stream() if decodes else None
        self._num_tokens = 0
        self._held = ""

    def take(self, update: Update) -> Delta:
        """What is new. Of several tokens those behind a stop text are dropped."""
        text, count = "", 0
        new = update.token_ids
        if not new:
            self.finish_reason = update.finish_reason
        for count, token in enumerate(new, start=1):
            if count == len(new):
                self.finish_reason = update.finish_reason
            self._num_tokens += 1
            if self.finish_reason is FinishReason.STOP and token in self.params.stop_token_ids:
                self.stop_reason = token
            if self._stream is not None:
                text += self._decode(token, self._stream)
            if self.finish_reason is not None:
                break
        return Delta(
            text=text,
            token_ids=new[:count],
            logprobs=update.logprobs[:count],
            prompt_logprobs=update.prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cached_tokens=update.cached_tokens,
        )

    def _decode(self, token: int, stream: TextStream) -> str:
        """The text that a token makes ready."""
        params = self.params
        if self.finish_reason is FinishReason.STOP:
            text = self._held + stream.end()
        else:
            text = self._held + stream.add(token)
            if self.finish_reason is not None:
                text += stream.end()
        self._held = ""
        if not params.stop or self._num_tokens < params.min_tokens:
            return text
        found = [(text.find(stop), stop) for stop in params.stop]
        at, stop = min([one for one in found if one[0] >= 0], default=(-1, ""))
        if at >= 0:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop
            return text[:at]
        if self.finish_reason is None:
            held = max(overlap(text, stop) for stop in params.stop)
            if held:
                text, self._held = text[:-held], text[-held:]
        return text


class Transcript:
    """The deltas of one request, put together.

    Args:
        prompt: its text, where it came as text.
    """

    def __init__(self, request: Request, prompt: str | None = None) -> None:
        self.request = request
        self.prompt = prompt
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._cached_tokens = 0
        self._last = Delta()

    def add(self, delta: Delta) -> None:
        """Takes the next one."""
        self._text.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._prompt_logprobs += delta.prompt_logprobs
        self._cached_tokens += delta.cached_tokens
        self._last = delta

    def output(self) -> RequestOutput:
        """The whole, once the last delta is in."""
        params = self.request.params
        assert self._last.finish_reason is not None
        scored: tuple[TokenLogprob | None, ...] | None = None
        if params.prompt_logprobs is not None:
            first = () if params.prompt_logprobs_start else (None,)
            scored = (*first, *self._prompt_logprobs)
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self._last.finish_reason,
            stop_reason=self._last.stop_reason,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=scored,
            cached_tokens=self._cached_tokens,
        )


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the first of `stop`, which is not in it."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
