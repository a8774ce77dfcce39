"""Layouts of a model that cover every kind of group."""

from typing import Any

from isomoe.layout import Parallelism
from isomoe.models import layouts

MOST_RANKS = 8


def kinds(family: Any, config: Any, layout: Parallelism) -> set[tuple[str, int]]:
    """Which groups of which size a layout has, and which of them at once."""
    mesh = family.mesh(config, layout)
    names = [name for name in mesh.to_json() if name != "axes"]
    found = {(name, mesh.size_of(getattr(mesh, name))) for name in names}
    for heads in family.kv_heads(config):
        found.add((f"copies of {heads} KV heads", max(1, layout.attn_tp // heads)))
    found.add((f"axes {mesh.axes}", 2))
    return {(name, size) for name, size in found if size > 1}


def sample(family: Any, config: Any) -> list[Parallelism]:
    """Layouts that cover every kind of group at every size: large ones first, greedily."""
    covered: set[tuple[str, int]] = set()
    chosen = [Parallelism()]
    for layout in sorted(layouts(family, config, MOST_RANKS), key=lambda p: -p.tp_size):
        new = kinds(family, config, layout) - covered
        if new:
            covered |= new
            chosen.append(layout)
    return chosen


def few(family: Any, config: Any) -> list[Parallelism]:
    """Layouts that cover every kind of group at some size, those with most kinds first; then one
    whose groups are of other sizes."""
    every = [Parallelism(), *layouts(family, config, MOST_RANKS, min_ranks=6)]
    names = {layout: {name for name, _ in kinds(family, config, layout)} for layout in every}
    chosen, missing = [every[0]], set().union(*names.values())
    missing = {name for name in missing if not name.startswith("axes")}
    while missing:
        best = max(every, key=lambda layout: len(names[layout] & missing))
        missing -= names[best]
        chosen.append(best)
    met = set().union(*(kinds(family, config, layout) for layout in chosen))
    every = list(layouts(family, config, MOST_RANKS, min_ranks=2))
    others = [layout for layout in every if not kinds(family, config, layout) & met]
    if others:
        chosen.append(max(others, key=lambda layout: len(kinds(family, config, layout))))
    return chosen
