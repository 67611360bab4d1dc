"""Real English text that every Python brings along: the language reference that `help()` shows, and the documentation of its library."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitnet.errors import BadInput

__all__ = ["documents", "fingerprint", "paragraphs"]

_SKIPPED = frozenset(
    {
        "__pycache__",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_LEAST = 80  # characters: shorter paragraphs are headings and lists
_PROSE = 0.94  # of a paragraph's characters are letters, spaces, commas and full stops; less is code, grammar or a table
_NO_PROSE = ("-", "*", "+", "=", "|", ">", "$", "..")


def documents(characters: int) -> list[str]:
    """Each topic of the reference, then each module of the library, as its paragraphs of prose, until there are so many characters; no paragraph twice. Always
    the same for one Python."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: list[str] = []
    for document in _texts(topics):
        fresh = [paragraph for text in document for paragraph in paragraphs(text) if paragraph not in seen]
        if fresh:
            fresh = list(dict.fromkeys(fresh))
            seen.update(fresh)
            found.append("\n\n".join(fresh))
            characters -= len(found[-1])
        if characters <= 0:
            break
    if not found:
        raise BadInput(
            "this Python brings no documentation to train on", remedy="run the demo with a Python that has its standard library's source"
        )
    return found


def fingerprint(texts: Sequence[str]) -> str:
    """Which texts these are."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a documentation text that are prose, each on one line."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = block.splitlines()
        if any(line.startswith((" ", "\t", *_NO_PROSE)) for line in lines):
            continue
        paragraph = " ".join(block.split())
        if len(paragraph) < _LEAST or paragraph[-1] not in ".!?" or not paragraph[0].isupper():
            continue
        if sum(letter.isalpha() or letter in " ,." for letter in paragraph) >= _PROSE * len(paragraph):
            yield paragraph


def _texts(topics: dict[str, str]) -> Iterator[list[str]]:
    for name in sorted(topics):
        yield [topics[name]]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(library).parts):
            yield _docstrings(path)


def _docstrings(path: Path) -> list[str]:
    try:
        with tokenize.open(path) as source:
            tree = ast.parse(source.read())
    except (SyntaxError, UnicodeDecodeError, OSError):
        return []  # not Python of this version
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, documented) and (text := ast.get_docstring(node))]
