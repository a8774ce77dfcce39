"""How much one call may ask for. More is refused in one line, before it costs anything."""

from isomoe.engine import SamplingParams
from isomoe.errors import RequestError

MAX_N = 128
"""The most outputs of one prompt."""
MAX_CHOICES = 1024
"""The most outputs of one call, and texts to tokenize."""
MAX_STOP = 128
"""The most stop texts: each is sought in the output after every token."""
MAX_STOP_TOKENS = 4096
"""The most stop tokens."""
MAX_BIASES = 4096
"""The most tokens with a bias."""
MAX_DETOKENIZED = 1_000_000
"""The most token ids to turn into text."""
MAX_SCORED = 4_000_000
"""The most log-probabilities of one call: tokens times candidates. Each takes some 100 bytes."""
MAX_STREAMED_SCORED = 65_536
"""The same where every chunk brings those of the prompt again."""


def num_scored(prompt_tokens: int, params: SamplingParams, context_length: int) -> int:
    """The most log-probabilities that a request may bring: tokens times candidates."""
    count = 0
    if params.prompt_logprobs is not None:
        scored = max(0, prompt_tokens - params.prompt_logprobs_start)
        count += scored * (params.prompt_logprobs + 1)
    if params.logprobs is not None:
        count += min(params.max_tokens, context_length - prompt_tokens) * (params.logprobs + 1)
    return count


def check_scored(count: int, most: int = MAX_SCORED) -> None:
    """Raises RequestError if a call asks for more log-probabilities than can be kept."""
    if count > most:
        raise RequestError(
            f"up to {count} log-probabilities are asked for (tokens times candidates), the most of "
            f"such a call is {most}; ask for fewer candidates, or send several requests"
        )
