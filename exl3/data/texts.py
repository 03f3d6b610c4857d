"""Documents from the user's file (.txt, .jsonl or .parquet) or from a dataset by its name."""

import json
from pathlib import Path

from exl3.errors import UserError

TEXT_KEYS = ("text", "content")  # first choices among keys and columns, in this order


def read_texts(path: str | Path) -> list[str]:
    """The documents of a file in its order, empty ones left out; never an empty list.

    .txt is one document, .jsonl one a line, .parquet one a row. Raises UserError for a file that
    is missing, empty, broken or of another kind.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        accepted = ", ".join(READERS)
        raise UserError(f"{path}: cannot read this kind of file; give one of {accepted}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    # JSON escapes can spell half a surrogate pair, which no tokenizer takes.
    texts = [text.encode("utf-8", "replace").decode() for text in reader(path) if text.strip()]
    if not texts:
        raise UserError(f"{path}: the file holds no text; give one that does.")
    return texts


def _decoded(path: Path) -> str:
    """Content of a UTF-8 file, without the byte order mark some editors put in front."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the file: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8."
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: a binary file (it holds NUL bytes); give a file of text.")
    return text


def _read_txt(path: Path) -> list[str]:
    return [_decoded(path)]


def _read_jsonl(path: Path) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [_json_text(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _json_text(line: str, where: str) -> str:
    """The document of one line: "text", else "content", else the longest string."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{where}: not valid JSON ({reason}); write one object a line.") from error
    if isinstance(value, str):
        return value
    strings = {}
    if isinstance(value, dict):
        strings = {key: item for key, item in value.items() if isinstance(item, str)}
    if not strings:
        raise UserError(f'{where}: no text here; write an object with the key "text" on each line.')
    key = next((key for key in TEXT_KEYS if key in strings), None)
    return strings[key] if key else max(strings.values(), key=len)


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            column = _text_column(file.schema_arrow, path)
            texts = file.read(columns=[column]).column(column).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}).") from error
    return [text for text in texts if text is not None]


def _text_column(schema, path: Path) -> str:
    """Name of the column "text", else "content", else the first one of strings."""
    strings = [field.name for field in schema if str(field.type) in STRING_TYPES]
    if not strings:
        names = ", ".join(schema.names) or "none"
        raise UserError(
            f'{path}: no column of strings (columns: {names}); name the documents\' column "text".'
        )
    return next((name for name in TEXT_KEYS if name in strings), strings[0])


STRING_TYPES = ("string", "large_string", "string_view")

READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def read_dataset(name: str, split: str, column: str | None) -> list[str]:
    """The documents of a dataset, NAME or NAME:CONFIG of a hub or a local folder.

    column: the column of texts, by default "text", "content", or the first of strings.
    Raises UserError for what cannot be loaded (which includes any dataset while offline).
    """
    import datasets  # here: it takes seconds

    repository, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # a hub's answers, and a stranger's files: anything may come
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{name}: there is no such file, and no dataset of that name could be loaded "
            f"(split {split}: {reason}); offline, give a .txt, .jsonl or .parquet file."
        ) from error
    strings = [n for n, f in data.features.items() if getattr(f, "dtype", None) == "string"]
    found = column or next((n for n in (*TEXT_KEYS, *strings) if n in strings), None)
    if found not in strings:
        raise UserError(
            f"{name}: {found or 'a column of texts'} is not there; its columns of strings are "
            f"{', '.join(strings) or 'none'}; choose one of them."
        )
    texts = [text.encode("utf-8", "replace").decode() for text in data[found] if text.strip()]
    if not texts:
        raise UserError(f"{name}: column {found} of split {split} holds no text.")
    return texts
