"""Families through the engine, against their oracles."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from families.case import Case, Oracle
from families.reference_block_diffusion import decode, sdar_sequential
from isomoe.engine import LLM, SamplingParams
from isomoe.engine.sampling_params import DenoisingStrategy
from isomoe.models import BlockDiffusion

LENGTHS = (21, 1, 10)
"""Of prompts: with small prefill chunks some decode beside pieces of others."""
_NEW = 6


def family_cases() -> list[Case]:
    """Those of every module beside this one."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"families.{file.stem}") for file in files]
    return [case for module in modules for case in getattr(module, "CASES", ())]


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random tokens."""
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, 130, (length,), generator=draw).tolist() for length in lengths]


def check_answers(
    engine: LLM,
    oracle: Oracle,
    most: float,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = _NEW,
) -> None:
    """Asserts that every logprob of greedy answers, and of their prompts, is within `most` nats of
    the oracle's, and that no token is likelier than the chosen one by more than that."""
    diffusion = engine.core.info.diffusion
    if diffusion is not None:
        _check_blocks(engine, oracle, most, diffusion)
        return
    params = SamplingParams(
        max_tokens=new_tokens, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    asked = prompts(lengths)
    for prompt, output in zip(asked, engine.generate(asked, params), strict=True):
        assert len(output.token_ids) == new_tokens
        expected = oracle(torch.tensor([*prompt, *output.token_ids[:-1]])).log_softmax(-1)
        found = [*(output.prompt_logprobs or ()), *(output.logprobs or ())]
        found = [token for token in found if token is not None]
        for row, token in zip(expected, found, strict=True):
            assert abs(float(row[token.token_id]) - token.logprob) < most
        for row, chosen in zip(expected[len(prompt) - 1 :], output.token_ids, strict=True):
            assert float(row.max() - row[chosen]) < most


def _check_blocks(engine: LLM, oracle: Oracle, most: float, diffusion: BlockDiffusion) -> None:
    """The same of a model that fills in blocks: token by token from left to right."""
    size = diffusion.block_size
    params = SamplingParams(
        max_tokens=_NEW,
        temperature=0.0,
        ignore_eos=True,
        logprobs=0,
        denoising_strategy=DenoisingStrategy.SEQUENTIAL,
    )
    for prompt, output in zip(prompts(), engine.generate(prompts(), params), strict=True):
        expected = decode(
            oracle,
            prompt,
            sdar_sequential(size, size),
            block=size,
            mask_id=diffusion.mask_token_id,
            new_tokens=_NEW,
        )
        assert list(output.token_ids) == expected.ids
        for token, logprob in zip(output.logprobs or (), expected.logprobs, strict=True):
            assert abs(token.logprob - logprob) < most
