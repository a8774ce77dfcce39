"""The ways between attention and experts that a layout is proven on."""

from collections.abc import Iterator
from dataclasses import replace

from isomoe.layout import A2ABackend, Parallelism, WireFormat


def paths(layout: Parallelism) -> Iterator[Parallelism]:
    """A layout with each of the ways that it has, the plain one first.

    Rows are packed alike in every format. The exchange is torch's; DeepEP's own is not proven.
    """
    yield layout
    yield replace(layout, moe_wire_format=WireFormat.FP8)
    if layout.ep_size == 1:
        return
    exchanged = replace(layout, moe_a2a_backend=A2ABackend.TORCH)
    yield replace(layout, moe_a2a_backend=A2ABackend.AUTO)
    yield exchanged
    for one in (layout, replace(exchanged, moe_wire_format=WireFormat.FP8)):
        yield replace(one, ep_num_redundant_experts=layout.ep_size)  # another copy on each rank


def on_path_of(example: Parallelism, layout: Parallelism) -> Iterator[Parallelism]:
    """A layout with the way that another has; nothing where it cannot have it."""
    balanced = layout.ep_size if example.ep_num_redundant_experts else 0
    if layout.ep_size > 1 or not (example.exchanges or balanced):
        yield replace(
            layout,
            moe_a2a_backend=example.moe_a2a_backend,
            moe_wire_format=example.moe_wire_format,
            ep_num_redundant_experts=balanced,
        )
