"""What a server says of its pages and requests."""

import time
from typing import Any, Protocol

import httpx2


class HasUrl(Protocol):
    url: str


def info(server: HasUrl) -> dict[str, Any]:
    answer = httpx2.get(f"{server.url}/get_server_info", timeout=10)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait_idle(server: HasUrl, within_seconds: float) -> list[dict[str, int]]:
    """Each group's pages, once no request is left; fails if that takes too long.

    A client that goes away is noticed a moment later, so this can take a step or two.
    """
    deadline = time.monotonic() + within_seconds
    while True:
        state = info(server)
        groups: list[dict[str, int]] = state["internal_states"]
        if not state["waiting"] and not any(group["running"] for group in groups):
            break
        assert time.monotonic() < deadline, f"after {within_seconds} s: {state['waiting']} {groups}"
        time.sleep(0.02)
    for group in groups:
        assert group["used_pages"] == 0, groups
        assert group["free_pages"] + group["cached_pages"] == group["total_pages"], groups
    return groups


def flush(server: HasUrl) -> list[dict[str, int]]:
    """Each group's pages without any prefix."""
    answer = httpx2.post(f"{server.url}/flush_cache", timeout=10)
    assert answer.status_code == 200, answer.text
    groups = wait_idle(server, 0)
    for group in groups:
        assert group["free_pages"] == group["total_pages"], groups
    return groups
