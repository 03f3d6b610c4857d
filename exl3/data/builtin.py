"""Text that every machine with Python has: its documentation and its standard library.

Files are read as text and parsed, never imported. They come in the order of a hash of their
names, so that any first part is a fair sample of the whole, the same in every process. Another
Python version has other files, and so other text.
"""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from exl3.errors import UserError

# Tests, other people's packages, and tables that only look like code.
SKIPPED_FOLDERS = frozenset(
    "test tests idlelib lib2to3 site-packages dist-packages __pycache__ lib-dynload encodings "
    "pydoc_data".split()
)
# Written by whoever built or packaged this Python: they hold its paths.
SKIPPED_FILES = ("_sysconfig", "sitecustomize", "usercustomize")

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def builtin_texts(kind: str | None = None) -> Iterator[tuple[str, str]]:
    """Pairs of a kind, "prose" or "code", and a document: all prose first, then all code.

    With a kind only that one, or the other where this Python lacks it. Read and parsed as far as
    they are taken. Raises UserError if there is no text at all.
    """
    kinds = {"prose": prose_texts, "code": code_texts}
    if kind is not None:
        kinds = {kind: kinds[kind]}
    texts = ((name, text) for name, read in kinds.items() for text in read())
    first = next(texts, None)
    if first is not None:
        return chain([first], texts)
    if kind is not None:
        return builtin_texts()
    raise UserError(
        f"{library_folder()}: this Python comes without the sources of its library, which are the "
        "built-in text; pass a file of text with -c FILE."
    )


def prose_texts() -> Iterator[str]:
    """Documentation topics, then the docstrings of each module of the library as one document."""
    yield from _topics(library_folder() / "pydoc_data" / "topics.py")
    yield from filter(None, map(_docstrings, code_texts()))


def code_texts() -> Iterator[str]:
    """Sources of the standard library, one file a document."""
    return filter(str.strip, map(_read, _sources(library_folder())))


def library_folder() -> Path:
    """Where this Python keeps its standard library, also from within a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def _sources(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES)
        ]
    return sorted(found, key=lambda path: _hash(path.relative_to(root).as_posix()))


def _topics(path: Path) -> list[str]:
    """Texts of `topics = {name: text}` in a Python file; none if it is missing or different."""
    for node in _parsed(_read(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() for name in sorted(topics, key=_hash)]
    return []


def _docstrings(source: str) -> str:
    """Docstrings of a module, its classes and its functions, with blank lines between them."""
    nodes = ast.walk(_parsed(source))
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED))
    return "\n\n".join(filter(None, texts))


def _parsed(source: str) -> ast.Module:
    """The syntax tree; an empty one for what this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the sources' own style
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.parse("")


def _read(path: Path) -> str:
    """Content of a UTF-8 file; nothing where it is missing or in another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
