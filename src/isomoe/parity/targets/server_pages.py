"""What a server says of itself, as far as its numbers may depend on it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from isomoe.parity.targets.base import TargetError
from isomoe.parity.targets.http_client import JsonClient

_MODELS = "/v1/models"
_OF_MODEL = ("max_model_len", "owned_by", "root")
_OF_SERVER = (
    "version",
    "model_path",
    "layout",
    "tp_size",
    "dp_size",
    "attn_dp_size",
    "ep_size",
    "pp_size",
    "enable_dp_attention",
    "enable_dp_lm_head",
    "moe_dense_tp_size",
    "moe_a2a_backend",
    "moe_wire_format",
    "ep_num_redundant_experts",
    "moe_runner_backend",
    "attention_backend",
    "sampling_backend",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "device",
    "chunked_prefill_size",
    "disable_radix_cache",
    "disable_cuda_graph",
    "disable_overlap_schedule",
    "enable_deterministic_inference",
    "random_seed",
)
"""Of all settings that a server tells these and no others: there are keys among them."""


class ServerPages(NamedTuple):
    """What it says.

    Attributes:
        models: that it lists.
        facts: versions and settings.
    """

    models: tuple[str, ...]
    facts: Mapping[str, Any]


async def read_pages(client: JsonClient, model: str | None) -> ServerPages:
    """Reads a server's pages, those of vLLM and SGLang among them, as far as it has them.

    Args:
        model: whose facts are wanted; None takes the first that is listed.

    Raises:
        TargetError: if it cannot be reached, or does not answer.
    """
    listed = _objects(_at(await client.page(_MODELS), "data"))
    wanted = (each for each in listed if model is None or each.get("id") == model)
    facts = _chosen(next(wanted, None), _OF_MODEL)
    version = _at(await _optional(client, "/version"), "version")
    if isinstance(version, str):
        facts["version"] = version
    for path in ("/server_info", "/get_server_info"):
        if found := _chosen(await _optional(client, path), _OF_SERVER):
            facts |= found
            break
    return ServerPages(models=_names(listed), facts=facts)


async def listed_models(client: JsonClient) -> tuple[str, ...] | None:
    """The models that a server lists now; None if it does not tell."""
    page = await _optional(client, _MODELS)
    return None if page is None else _names(_objects(_at(page, "data")))


async def _optional(client: JsonClient, path: str) -> Any:
    """A page that a server may well hang on."""
    try:
        return await client.page(path)
    except TargetError:
        return None


def _names(listed: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(each["id"] for each in listed if isinstance(each.get("id"), str))


def _at(document: Any, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _chosen(document: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(document, dict):
        return {}
    plain = str | int | float | bool
    return {name: document[name] for name in names if isinstance(document.get(name), plain)}
