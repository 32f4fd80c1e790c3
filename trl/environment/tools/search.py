"""Search in documents by their words (BM25, Robertson and Zaragoza 2009)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trl.import_utils import pip_install


class DocumentSearchTool:
    """Answers a query with the best passages, or with "Nothing found." if none has a word of the query."""

    def __init__(
        self,
        documents: str | Path | Iterable[str | Mapping[str, Any]],
        text_field: str = "text",
        passage_length: int = 600,
        results: int = 1,
        patterns: tuple[str, ...] = ("*.txt", "*.md"),
    ) -> None:
        """
        `documents`: a folder (all its files that match `patterns` are read), texts, or the rows of a data set with the
        text in `text_field`.
        `passage_length`: documents are cut into passages of about this many characters, between words.
        `results`: most passages in an answer, the best first.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(f"DocumentSearchTool needs bm25s: {pip_install('bm25s')}") from error
        for field, value in (("passage_length", passage_length), ("results", results)):
            if value < 1:
                raise ValueError(f"{field}={value}: give 1 or more")
        texts = (
            _folder(Path(documents), patterns) if isinstance(documents, str | Path) else _texts(documents, text_field)
        )
        self.passages = [passage for text in texts for passage in _passages(text, passage_length)]
        if not self.passages:
            raise ValueError("documents: there is no text in them to search")
        self.results = results
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        self._index.index(self._tokens(self.passages), show_progress=False)
        self._words = set(self._index.vocab_dict)

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        tokens: list[list[str]] = self._tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return tokens

    def search(self, query: str, results: int | None = None) -> list[tuple[str, float]]:
        """`(passage, score)` of the best passages that have a word of the query."""
        words = [word for word in self._tokens([query])[0] if word in self._words]
        if not words:
            return []
        wanted = min(results or self.results, len(self.passages))
        found, scores = self._index.retrieve([words], k=wanted, show_progress=False)
        pairs = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.passages[index], score) for index, score in pairs if score > 0]

    def __call__(self, query: str) -> str:
        """The passages, with an empty line between them."""
        return "\n\n".join(passage for passage, _ in self.search(query)) or "Nothing found."


def _folder(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"documents={str(folder)!r}: not a folder; give one, or the texts themselves")
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()})
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _texts(documents: Iterable[str | Mapping[str, Any]], text_field: str) -> list[str]:
    texts = []
    for index, document in enumerate(documents):
        if isinstance(document, str):
            texts.append(document)
        elif text_field in document:
            texts.append(str(document[text_field]))
        else:
            raise ValueError(f"text_field={text_field!r}: not in documents[{index}]; it has {sorted(document)}")
    return texts


def _passages(text: str, length: int) -> list[str]:
    """Passages of the text; each ends with the word at which it reaches `length` characters."""
    passages: list[str] = []
    words: list[str] = []
    size = 0
    for word in text.split():
        words.append(word)
        size += len(word) + 1
        if size > length:
            passages.append(" ".join(words))
            words, size = [], 0
    return passages + ([" ".join(words)] if words else [])
