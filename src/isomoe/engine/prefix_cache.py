"""Prefixes whose keys and values are still in the KV cache, for requests that begin alike."""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from isomoe.engine.kv_cache import PagePool


class Node:
    """One page of tokens that follows the pages of its ancestors.

    Attributes:
        key: the page's tokens, as many as a page holds.
        page: where their keys and values lie.
        refs: requests that use it. Who uses a node uses all its ancestors.
        last_used: counts up with every release.
    """

    __slots__ = ("children", "key", "last_used", "page", "parent", "refs")

    def __init__(self, key: tuple[int, ...], page: int, parent: "Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.refs = 0
        self.last_used = 0


class PrefixCache:
    """A radix tree whose digits are pages of tokens, over the pages of one attention-DP group.

    Pages of nodes that no request uses are free on demand: `allocate` takes them back, least
    recently used leaf first.

    Args:
        page_size: tokens of a page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.num_nodes = 0
        self.num_unused = 0
        self._root = Node((), -1, None)
        self._clock = 0
        # (last_used, number, node); an entry counts while the node is an unused leaf of that age.
        self._leaves: list[tuple[int, int, Node]] = []

    @property
    def num_available(self) -> int:
        """Pages that can be had now."""
        return self.pool.num_free + self.num_unused

    def match(self, tokens: Sequence[int], most: int) -> list[Node]:
        """The longest known prefix of `tokens`, page by page, within its first `most` tokens.

        Changes nothing. The nodes are safe until the next `allocate`, unless acquired.
        """
        size = self.page_size
        found: list[Node] = []
        node = self._root
        for begin in range(0, most - size + 1, size):
            child = node.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def acquire(self, nodes: Sequence[Node]) -> None:
        """Marks a path, from the root on, as used by one more request."""
        for node in nodes:
            if not node.refs:
                self.num_unused -= 1
            node.refs += 1

    def release(self, nodes: Sequence[Node]) -> None:
        """Takes back one `acquire` or `extend` of each node of a path."""
        self._clock += 1
        for node in nodes:
            node.refs -= 1
            node.last_used = self._clock
            if not node.refs:
                self.num_unused += 1
        if nodes and not nodes[-1].refs and not nodes[-1].children:
            self._offer(nodes[-1])

    def extend(self, path: Sequence[Node], tokens: Sequence[int], page: int) -> Node:
        """The node of one more page of `tokens` after `path`, acquired for the caller.

        If it is new, the tree owns `page` from here on. If it was there, it has a page of its own
        with the same content, and the caller keeps `page`.
        """
        parent = path[-1] if path else self._root
        begin = len(path) * self.page_size
        key = tuple(tokens[begin : begin + self.page_size])
        assert len(key) == self.page_size
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, page, parent)
            self.num_nodes += 1
            self.num_unused += 1
        self.acquire((node,))
        return node

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, which must be available."""
        missing = count - self.pool.num_free
        if missing > 0:
            self._evict(missing)
        return self.pool.allocate(count)

    def clear(self) -> None:
        """Forgets every prefix that no request uses."""
        self._evict(self.num_unused)

    def pages(self) -> list[int]:
        """The pages of all nodes."""
        found, todo = [], [self._root]
        while todo:
            node = todo.pop()
            found += [child.page for child in node.children.values()]
            todo += node.children.values()
        return found

    def _offer(self, leaf: Node) -> None:
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = [entry for entry in self._leaves if _is_unused_leaf(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (leaf.last_used, leaf.page, leaf))

    def _evict(self, count: int) -> None:
        while count:
            entry = heappop(self._leaves)
            node = entry[2]
            if not _is_unused_leaf(entry):
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            node.parent = None
            self.num_nodes -= 1
            self.num_unused -= 1
            self.pool.release([node.page])
            count -= 1
            if parent is not self._root and not parent.refs and not parent.children:
                self._offer(parent)


def _is_unused_leaf(entry: tuple[int, int, Node]) -> bool:
    last_used, _, node = entry
    return (
        node.parent is not None
        and not node.refs
        and not node.children
        and node.last_used == last_used
    )
