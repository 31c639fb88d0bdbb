"""Which pages of the cache are whose: rows take pages as they grow, and share those that begin alike.

Known to the host alone. A page that is full and computed is published under what it holds and what comes before it,
compared token by token, so that nothing but an equal beginning is ever found. Published pages that no row has any
more stay until their room is wanted, the ones used longest ago first.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Sequence

# What a page holds: what came before it, or the kind of row at the first page, and its tokens.
Key = tuple[Hashable, tuple[int, ...]]


@dataclasses.dataclass(eq=False)
class Content:
    """A published page, as a node of the tree of all beginnings; equal to itself only."""

    page: int
    key: Key


class Pages:
    """`count` pages of `size` tokens each, by number from 0."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._unused = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._contents: dict[int, Content] = {}
        self._nodes: dict[Key, Content] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # published pages of no row, longest unused first

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._unused) + len(self._kept)

    def take(self, count: int) -> list[int]:
        """Fresh pages for a row. The caller has looked at `free`."""
        taken = [self._unused.pop() if self._unused else self._evict() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def match(self, kind: Hashable, tokens: Sequence[int]) -> tuple[list[int], Hashable]:
        """The published pages that begin `tokens`, held for the caller; and the node of the last, or the kind.

        Args:
          kind: rows share pages only within a kind: their keys at a position are computed alike.
          tokens: of a row.
        """
        found: list[int] = []
        node: Hashable = kind
        for start in range(0, len(tokens) - self.size + 1, self.size):
            content = self._nodes.get((node, tuple(tokens[start : start + self.size])))
            if content is None:
                break
            found.append(content.page)
            node = content
        for page in found:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return found, node

    def publish(self, node: Hashable, page: int, tokens: Sequence[int]) -> Hashable:
        """Lets other rows find a page with `tokens` behind `node`; the node of these.

        Where a page of the same content is known already that one stays. Behind a node that has been forgotten nobody
        finds anything.
        """
        key = node, tuple(tokens)
        content = self._nodes.get(key)
        if content is None:
            content = self._nodes[key] = self._contents[page] = Content(page, key)
        return content

    def release(self, pages: Sequence[int]) -> None:
        """Gives back the pages of a row; of a beginning, what comes later is forgotten first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._contents:
                self._kept[page] = None
            else:
                self._unused.append(page)

    def forget(self) -> None:
        """Publishes nothing any more: what the pages hold was computed with other weights."""
        self._unused += self._kept
        self._kept.clear()
        self._contents.clear()
        self._nodes.clear()

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._nodes[self._contents.pop(page).key]
        return page
