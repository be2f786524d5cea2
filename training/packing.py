"""First-fit into two capacities: documents, never cut, into packs of tokens and patches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from idefics2_fast.training.planning import Document

# With capacities in the corpus's own proportion, tokens and patches would run out alike often. Tokens are to run out first: attention's
# shapes follow them, and patches are filled to about 1 / PATCH_SLACK.
PATCH_SLACK = 1.05


@dataclass
class Pack:
    """Documents that become one batch.

    Attributes:
        positions: of the documents' samples in the stream.
        documents: in the order of the positions.
    """

    positions: list[int] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    tokens: int = 0
    patches: int = 0

    def add(self, position: int, document: Document) -> None:
        self.positions.append(position)
        self.documents.append(document)
        self.tokens += document.n_tokens
        self.patches += document.n_patches


class Packer:
    """Packs documents as they come. Each goes to the first open pack with room for its tokens and for its patches.

    When no pack has room and `max_open` are open, the oldest is closed: it was offered the most documents, so it is the fullest as a rule,
    and no document waits long.

    Args:
        tokens, patches: capacities; no document may be larger.
        max_open: how many packs are open at most.
    """

    def __init__(self, tokens: int, patches: int, max_open: int = 16) -> None:
        self.tokens, self.patches, self.max_open = tokens, patches, max_open
        self.open: list[Pack] = []

    def add(self, position: int, document: Document) -> Pack | None:
        """Takes a document; gives the pack that it closed, if it closed one."""
        assert document.n_tokens <= self.tokens
        assert document.n_patches <= self.patches
        for pack in self.open:
            if pack.tokens + document.n_tokens <= self.tokens and pack.patches + document.n_patches <= self.patches:
                pack.add(position, document)
                return None
        closed = self.open.pop(0) if len(self.open) == self.max_open else None
        self.open.append(Pack())
        self.open[-1].add(position, document)
        return closed


def balanced_patches(documents: Iterable[Document], tokens: int) -> int:
    """The capacity in patches that goes with one in tokens, from some documents of the corpus.

    One capacity alone binds if the other is too large, and then the other's fill says nothing. Here the two are in the corpus's proportion,
    and the largest of the documents fits.
    """
    documents = list(documents)
    per_token = sum(document.n_patches for document in documents) / sum(document.n_tokens for document in documents)
    return max(round(PATCH_SLACK * per_token * tokens), *(document.n_patches for document in documents), 1)
