"""The OpenAI API: models, completions and chat completions, with vLLM's extras."""

from isomoe.server.openai.router import openai_router

__all__ = ["openai_router"]
