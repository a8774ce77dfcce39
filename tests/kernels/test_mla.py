"""Latent attention against a float64 loop that expands every key and value."""

import pytest
import torch
from torch import Tensor

from isomoe.kernels import AttentionBatch, Heads, Span, latent_attention, write_kv

HEADS, LATENT, PLAIN, TURNED, VALUE = 3, 12, 6, 4, 5
SCALE = 0.37
PAGE = 4
UP = torch.randn(HEADS, PLAIN + VALUE, LATENT, generator=torch.Generator().manual_seed(7))


class Requests:
    """Requests whose tokens' latents are cached up to some step."""

    def __init__(self, lens: list[int], dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.tokens = [torch.randn(n, LATENT + TURNED).to(dtype) for n in lens]
        self.queries = [torch.randn(n, HEADS, PLAIN + TURNED).to(dtype) for n in lens]
        self.up = (UP / LATENT**0.5).to(dtype)
        most = max(-(-n // PAGE) for n in lens)
        self.tables = torch.randperm(most * len(lens)).view(len(lens), most)
        self.cache = torch.full((most * len(lens), PAGE, LATENT + TURNED), 1000.0, dtype=dtype)

    def step(self, spans: dict[int, tuple[int, int]], span: Span, padding: int = 0) -> Tensor:
        """Tokens [start, stop) of some requests."""
        taken = list(spans)
        batch = AttentionBatch(
            query_lens=tuple(stop - start for start, stop in spans.values()),
            context_lens=tuple(stop for _, stop in spans.values()),
            block_tables=self.tables[taken],
            page_size=PAGE,
        )
        q = torch.cat([self.queries[r][slice(*spans[r])] for r in taken])
        new = torch.cat([self.tokens[r][slice(*spans[r])] for r in taken])
        q = torch.cat((q, torch.full_like(q[:1], 9.0).expand(padding, -1, -1)))
        new = torch.cat((new, torch.full_like(new[:1], 777.0).expand(padding, -1)))
        write_kv(new.unsqueeze(1), None, self.cache, batch)
        return latent_attention(q, self.cache, batch, self.up, heads(span))

    def expected(self, request: int, place: int, span: Span) -> Tensor:
        """[heads, v] of one token."""
        first = 0 if span.window is None else max(0, place + 1 - span.window)
        seen = self.tokens[request][first : place + 1].double()
        out = torch.zeros(HEADS, VALUE, dtype=torch.float64)
        for head in range(HEADS):
            key_up, value_up = self.up[head].double().split((PLAIN, VALUE))
            keys = torch.cat((seen[:, :LATENT] @ key_up.T, seen[:, LATENT:]), 1)
            scores = keys @ self.queries[request][place, head].double() * SCALE
            out[head] = torch.softmax(scores, 0) @ (seen[:, :LATENT] @ value_up.T)
        return out


def heads(span: Span) -> Heads:
    return Heads(query=HEADS, kv=HEADS, qk_dim=PLAIN + TURNED, v_dim=VALUE, scale=SCALE, span=span)


@pytest.mark.parametrize("span", [Span(), Span(window=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_pieces_and_decodes_are_the_reference(dtype: torch.dtype, span: Span) -> None:
    requests = Requests([9, 6, 13], dtype)
    steps = (
        {0: (0, 9), 1: (0, 1)},  # a whole prompt, and one token
        {1: (1, 5), 2: (0, 8)},  # a piece behind cached tokens
        {1: (5, 6), 2: (8, 9)},  # decodes of unlike length
        {2: (9, 13)},
    )
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    for spans in steps:
        out = requests.step(spans, span, padding=2)
        assert out.dtype == dtype
        right = [
            requests.expected(request, place, span)
            for request, (start, stop) in spans.items()
            for place in range(start, stop)
        ]
        torch.testing.assert_close(
            out[:-2].double(), torch.stack(right), rtol=tolerance, atol=tolerance
        )
        assert torch.equal(out[-2:], torch.zeros_like(out[-2:]))


def test_absorbed_decoding_is_the_expanded_prompt() -> None:
    whole, pieces = Requests([11]), Requests([11])
    expected = whole.step({0: (0, 11)}, Span())
    out = torch.cat([pieces.step({0: (place, place + 1)}, Span()) for place in range(11)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.cache, pieces.cache)
