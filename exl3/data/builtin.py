"""Text that every machine with Python has: its documentation and its standard library.

Files are read as text and parsed, never imported. They come in the order of a hash of their
names, so that any first part is a fair sample of the whole, the same in every process. Another
Python version has other files, and so other text. A tenth of the files is held out: it is for
evaluation and never part of calibration rows.
"""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from exl3.errors import UserError

# Tests, other people's packages, and tables that only look like code.
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"),
    *("__pycache__", "lib-dynload", "encodings", "pydoc_data"),
}
# Written by whoever built or packaged this Python: they hold its paths.
SKIPPED_FILES = ("_sysconfig", "sitecustomize", "usercustomize")

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


HELD_OUT = 10  # one file, or topic, in so many


def builtin_texts(kind: str | None = None, held_out: bool = False) -> Iterator[tuple[str, str]]:
    """Pairs of a kind, "prose" or "code", and a document: all prose first, then all code.

    Either what is held out, or all the rest. With a kind only that one, or the other where this
    Python lacks it. Read and parsed as far as they are taken. Raises UserError if there is no text
    at all.
    """
    kinds = {"prose": prose_texts, "code": code_texts}
    if kind is not None:
        kinds = {kind: kinds[kind]}
    texts = ((name, text) for name, read in kinds.items() for text in read(held_out))
    first = next(texts, None)
    if first is not None:
        return chain([first], texts)
    if kind is not None:
        return builtin_texts(held_out=held_out)
    raise UserError(
        f"{library_folder()}: this Python comes without the sources of its library, which are the "
        "built-in text; pass a file of text with -c FILE."
    )


def prose_texts(held_out: bool = False) -> Iterator[str]:
    """Documentation topics, then the docstrings of each module of the library as one document."""
    yield from _topics(library_folder() / "pydoc_data" / "topics.py", held_out)
    yield from filter(None, map(_docstrings, code_texts(held_out)))


def code_texts(held_out: bool = False) -> Iterator[str]:
    """Sources of the standard library, one file a document."""
    return filter(str.strip, map(_read, _sources(library_folder(), held_out)))


def library_folder() -> Path:
    """Where this Python keeps its standard library, also from within a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def _sources(root: Path, held_out: bool) -> list[Path]:
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path
    return [found[name] for name in _part(found, held_out)]


def _topics(path: Path, held_out: bool) -> list[str]:
    """Texts of `topics = {name: text}` in a Python file; none if it is missing or different."""
    for node in _parsed(_read(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() for name in _part(topics, held_out)]
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


def _part(names: Iterable[str], held_out: bool) -> list[str]:
    """The names that are held out, or the others, in the order of their hashes."""
    return [n for n in sorted(names, key=_hash) if (int(_hash(n), 16) % HELD_OUT == 0) == held_out]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
