"""The mixture of real documents and procedural arithmetic as token ids, and its validation split.

Each document is BOS, the meta line (app. A.3 of the report), a newline, the text, EOS. Which documents there
are is decided in `sources` and `arithmetic`; the files are written by `prepare`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from step35.data import arithmetic
from step35.data.document import Document
from step35.data.tokenizer import Tokenizer

Progress = Callable[[str, float, float, str], None]
"""Called with the step's name, the work done, the work in all, and a key figure as text."""

BATCH_CHARS = 400_000
"""Characters encoded between two progress calls: some tenths of a second."""


@dataclass(frozen=True)
class EncodedDocument:
    """One document's token ids, uint32, its kind, and how many of its first tokens are BOS and meta line."""

    ids: np.ndarray[Any, Any]
    kind: str
    meta_tokens: int = 0


def full_text(document: Document) -> str:
    """Return what is tokenised: the meta line, then the text."""
    return f"{document.meta}\n{document.text}"


def arithmetic_documents(seed: int) -> Iterator[Document]:
    """Yield procedural documents without end."""
    index = 0
    while True:
        text = arithmetic.document(index, seed=seed)
        yield Document(text, "arithmetic", "english", "mathematics", "procedural")
        index += 1


def encode_mixture(
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    arithmetic_share: float,
    seed: int,
    progress: Progress,
) -> list[EncodedDocument]:
    """Encode all documents, then as much arithmetic as makes `arithmetic_share` (below 1) of all tokens."""
    encoded: list[EncodedDocument] = []
    tokens = done_chars = 0
    total_chars = sum(len(document.text) for document in documents)
    for batch in in_batches(iter(documents), BATCH_CHARS):
        new = encode_documents(tokenizer, batch)
        encoded += new
        tokens += sum(document.ids.size for document in new)
        done_chars += sum(len(document.text) for document in batch)
        progress("tokenise", done_chars, total_chars, f"{tokens / 1e6:.2f}M tokens")

    wanted = int(tokens * arithmetic_share / (1 - arithmetic_share))
    supply = arithmetic_documents(seed)
    made = 0
    while made < wanted:
        # A character is at most a token or so: batches of the missing size approach the goal from below.
        new = encode_documents(tokenizer, next(in_batches(supply, min(BATCH_CHARS, wanted - made))))
        encoded += new
        made += sum(document.ids.size for document in new)
        progress("arithmetic", min(made, wanted), wanted, f"{made / 1e6:.2f}M tokens")
    return encoded


def choose_validation(encoded: Sequence[EncodedDocument], order: np.ndarray[Any, Any], val_tokens: int) -> set[int]:
    """Return the numbers of the documents to hold back, in `order`: of each kind its share of `val_tokens`.

    A document that occurs twice stays in training, and so does one that alone would fill a quarter of its
    kind's share. At most a tenth of the corpus is held back.
    """
    copies = Counter(document.ids.tobytes() for document in encoded)
    tokens: Counter[str] = Counter()
    for document in encoded:
        tokens[document.kind] += document.ids.size
    share = min(val_tokens / max(1, tokens.total()), 0.1)
    left = {kind: share * count for kind, count in tokens.items()}
    longest = {kind: budget / 4 for kind, budget in left.items()}
    chosen: set[int] = set()
    for number in order:
        document = encoded[number]
        fits = left[document.kind] > 0 and document.ids.size <= longest[document.kind]
        if fits and copies[document.ids.tobytes()] == 1:
            chosen.add(int(number))
            left[document.kind] -= document.ids.size
    return chosen


def in_batches(documents: Iterator[Document], most_chars: int) -> Iterator[list[Document]]:
    """Group documents until each group holds `most_chars` characters; the last may hold fewer."""
    while first := next(documents, None):
        batch, characters = [first], len(full_text(first))
        while characters < most_chars and (document := next(documents, None)):
            batch.append(document)
            characters += len(full_text(document))
        yield batch


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[EncodedDocument]:
    """Encode documents; what looks like a control token in a text stays text."""
    backend = tokenizer.backend
    # A corpus that quotes "<|im_end|>" must not gain control tokens from it.
    backend.encode_special_tokens = True
    try:
        # Lone surrogates (JSON may hold them) count as "?", as in `Tokenizer.encode`.
        texts = [full_text(document).encode(errors="replace").decode() for document in documents]
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = False
    first, last = tokenizer.bos_id, tokenizer.eos_ids[0]
    return [
        EncodedDocument(
            np.array([first, *encoding.ids, last], dtype=np.uint32),
            document.kind,
            # BOS, and all up to the token that holds the meta line's newline.
            meta_tokens=1 + int(encoding.char_to_token(len(document.meta)) or 0) + 1,
        )
        for encoding, document in zip(encodings, documents, strict=True)
    ]
