"""The engine: scheduler, KV cache, sampler, workers, and `LLM` to drive them offline."""

from isomoe.engine.core import EngineCore
from isomoe.engine.instrument import Instrument
from isomoe.engine.llm import LLM
from isomoe.engine.outputs import Delta, FinishReason, RequestOutput, TokenLogprob, Update
from isomoe.engine.sampling_params import SamplingParams
from isomoe.engine.step import Request

__all__ = [
    "LLM",
    "Delta",
    "EngineCore",
    "FinishReason",
    "Instrument",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
    "Update",
]
