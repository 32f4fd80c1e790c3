"""Says what is wrong with a data file: which line of it, and the way out."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_BEGINNINGS = {
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
_MARK = b"\xef\xbb\xbf"
"""the byte order mark that some editors put before UTF-8"""


def check_file(path: Path, option: str) -> None:
    """ValueError for a file that is empty, cannot be read, or is of another kind than its name says."""
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise ValueError(f"--{option} {path}: it cannot be read ({error.strerror})") from error
    if not begin.removeprefix(_MARK).strip():
        raise ValueError(f"--{option} {path}: the file is empty; give one with a row or more")
    kind = next((kind for mark, kind in _BEGINNINGS.items() if begin.startswith(mark)), None)
    if kind is not None and path.suffix != ".parquet":
        raise ValueError(f"--{option} {path}: the file is {kind}")
    if path.suffix == ".csv":
        _check_header(path, begin, option)
    if FILE_FORMATS.get(path.suffix) == "json" and not _is_utf8(path):  # Arrow takes any bytes, and fails later
        raise ValueError(f"--{option} {path}{_wrong_in_lines(path)}")


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _check_header(path: Path, begin: bytes, option: str) -> None:
    """ValueError for a header that names a column twice: the reader would rename the second one."""
    first = begin.removeprefix(_MARK).decode("utf-8", "replace").splitlines()[0]
    names = next(csv.reader([first]), [])
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"--{option} {path}, line 1: the header has the column '{twice}' twice; rename one")


@contextmanager
def told(option: str, paths: Sequence[str | Path], sure: bool = True) -> Iterator[None]:
    """Say in an error of the libraries that read `paths` which file and which line it is about.

    sure: an error is about them even where nothing wrong is found in them.
    """
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        ours = library in ("datasets", "pyarrow", "pandas") or isinstance(error, StopIteration | UnicodeDecodeError)
        files = list(_files(paths))
        if not ours and not (files and isinstance(error, ValueError) and "corresponds to no data" in str(error)):
            raise
        found = next((f"{path}{wrong}" for path in files if (wrong := _wrong_in(path))), None)
        if found is None and not sure:
            raise
        if found is None and not files and Path(paths[0]).is_dir():
            found = f"{paths[0]}: the folder has no rows in files of {', '.join(FILE_FORMATS)}; give another"
        elif found is None:
            found = f"{', '.join(map(str, paths))}: it cannot be read ({_root(error)})"
        raise ValueError(f"--{option} {found}") from error


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The data files that stand at these places."""
    for path in map(Path, paths):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in found if one.suffix in FILE_FORMATS and one.is_file())


def _root(error: BaseException) -> str:
    """The first line of what an error was raised from."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _wrong_in(path: Path) -> str | None:
    """What is wrong with the file, with its line; None where nothing is found."""
    try:
        check_file(path, "data")
        if path.suffix == ".parquet":
            return _wrong_in_parquet(path)
        return _wrong_in_csv(path) if path.suffix == ".csv" else _wrong_in_lines(path)
    except ValueError as error:
        return str(error).removeprefix(f"--data {path}")


def _wrong_in_parquet(path: Path) -> str | None:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except (ArrowException, OSError) as error:
        return f": it is no whole Parquet file ({_root(error)}); write or download it again"
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    return None if twice is None else f": it has the column '{twice}' twice; rename one"


def _wrong_in_csv(path: Path) -> str | None:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        count = 0
        try:
            for row in rows:
                count += 1
                if len(row) > len(header):
                    return (
                        f", line {rows.line_num}: it has {len(row)} fields and the header {len(header)}; put quotes "
                        "around a text that holds a comma"
                    )
        except csv.Error as error:
            return f", line {rows.line_num}: {error}"
    return None if count else ": it has a header and no rows; give rows, or the ending of what it is"


def _wrong_in_lines(path: Path) -> str | None:
    """The first line that is damaged, or that is no JSON object where the file's name says so."""
    as_json = FILE_FORMATS[path.suffix] == "json"
    if as_json and _is_one_value(path):
        return _wrong_in_value(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            wrong = _wrong_in_line(line.removeprefix(_MARK) if number == 1 else line, as_json)
            if wrong:
                return f", line {number}: {wrong}"
    return None


def _is_one_value(path: Path) -> bool:
    """Whether the file is a JSON list, or an object over several lines."""
    with path.open("rb") as file:
        first = next((line.strip() for line in file if line.strip(_MARK + b" \t\r\n")), b"").removeprefix(_MARK)
    return path.suffix == ".json" and (first.startswith(b"[") or first == b"{")


def _wrong_in_value(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return f", line {error.lineno}: it is not JSON ({error.msg}); correct it, or write the file again"
    except (ValueError, RecursionError) as error:
        return f": {_cause(error)}"
    return None


def _wrong_in_line(line: bytes, as_json: bool) -> str | None:
    if b"\0" in line:
        return "it has a NUL byte, as a file has that was damaged or cut off; remove the line, or write the file again"
    try:
        text = line.decode("utf-8")
        if not as_json or not text.strip():
            return None
        value = json.loads(text, object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte {line[error.start]:#04x} at place {error.start}); save the file as UTF-8"
    except UnicodeEncodeError:
        return "it has half a character (a lone surrogate, \\ud800 to \\udfff); repair or remove the line"
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            return f"the last line is cut off ({error.msg}); remove it, or write the file again"
        return f"it is not JSON ({error.msg} at character {error.colno}); correct or remove the line"
    except (ValueError, RecursionError) as error:
        return _cause(error)
    return None if isinstance(value, dict) else "it is no JSON object with columns; correct or remove the line"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"it has the key '{twice}' twice in one object; rename or remove one")
    return made


def _cause(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply; remove the line"
    return str(error)
