"""Which code made a result: hashes of the syntax trees of the `lib` modules that a run executes."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds `lib`
PACKAGE = "lib"

# Sources as this process found them when it imported this module: what it runs, whatever becomes of
# the files. Those of modules that it imports later may be newer, which is then refused as well.
_first_seen: dict[Path, str] = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / PACKAGE).rglob("*.py")
    if path.is_file()
}


def code_fingerprint(*module_names: str) -> dict[str, str]:
    """Path (from the root, "lib/losses.py") -> hash, for the modules and all they import in `lib`.

    Imports are found statically, wherever in a module they stand. A hash is that of the syntax
    tree without comments, docstrings and line numbers, so reformatting or explaining leaves it be,
    and it does not depend on the version of Python. Raises ModuleNotFoundError for a name that is
    no module of `lib`.
    """
    paths: dict[str, Path] = {}
    todo = list(module_names)
    while todo:
        name = todo.pop()
        if name in paths:
            continue
        paths[name] = _path(name)
        todo += _imports(name, paths[name])
        if "." in name:
            todo.append(name.rpartition(".")[0])  # importing a module executes its packages
    found = {path.relative_to(ROOT).as_posix(): source_hash(path) for path in paths.values()}
    return dict(sorted(found.items()))


def combined(fingerprint: Mapping[str, str]) -> str:
    """One hash for a whole fingerprint (16 hex characters)."""
    return hashlib.sha256(json.dumps(sorted(fingerprint.items())).encode()).hexdigest()[:16]


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Paths whose code differs between two fingerprints, sorted."""
    return sorted(path for path in {*then, *now} if then.get(path) != now.get(path))


def changed_since(then: Mapping[str, str]) -> list[str]:
    """Paths of a recorded fingerprint whose code is no longer what it was, sorted."""
    now = {path: source_hash(ROOT / path) for path in then if (ROOT / path).exists()}
    return changed(then, now)


def fingerprint_as_loaded(*module_names: str) -> dict[str, str]:
    """`code_fingerprint`, refused when a file changed after this process started with it.

    The process still runs what it loaded then, so the files no longer name the code that runs.
    """
    now = code_fingerprint(*module_names)
    refuse_other_code(now)
    return now


def refuse_other_code(code: Mapping[str, str]) -> None:
    """RuntimeError unless the code of this process is `code`.

    An edit during a computation does not disturb it: what it loaded still is `code`.
    """
    other = [path for path, hashed in code.items() if _seen(ROOT / path) != hashed]
    if other:
        raise RuntimeError(
            f"{', '.join(other)} changed since this process loaded it: restart the process (the "
            "kernel, in a notebook), so that results are computed by the code that they name"
        )


def _seen(path: Path) -> str:
    if path not in _first_seen:
        _first_seen[path] = path.read_text(encoding="utf-8")
    return _parsed_source(path, _first_seen[path])[1]


def source_hash(path: Path) -> str:
    """Hash (16 hex characters) of one module's syntax tree; see `code_fingerprint`."""
    return _parsed(path)[1]


def _parsed(path: Path) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    """Imports and hash of a module, parsed again only when its time or size changed."""
    stat = path.stat()
    return _parsed_at(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=512)
def _parsed_at(
    path: Path, mtime_ns: int, size: int
) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    return _parsed_source(path, path.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=512)
def _parsed_source(path: Path, source: str) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    tree = ast.parse(source, filename=str(path))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return imports, hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()[:16]


def _plain(node: object) -> object:
    """A syntax tree as JSON values. Empty fields are left out: versions of Python add new ones."""
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", _parts(node)]
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node)}
        return [type(node).__name__, {k: v for k, v in fields.items() if v not in (None, [])}]
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_bare_string(item)]
    if node is None:
        return None
    return f"{type(node).__name__} {node!r}"  # 1, 1.0 and True differ


def _parts(node: ast.JoinedStr) -> list[object]:
    """The parts of an f-string, neighbouring texts joined: versions of Python split them apart."""
    parts: list[object] = []
    for value in node.values:
        text = value.value if isinstance(value, ast.Constant) else None
        if text is None:
            parts.append(_plain(value))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
    return parts


def _is_bare_string(node: object) -> bool:
    """A docstring, or a string that stands alone as a comment does."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _candidates(name: str) -> tuple[Path, Path]:
    base = ROOT.joinpath(*name.split("."))
    return base / "__init__.py", base.with_name(f"{base.name}.py")


def _exists(name: str) -> bool:
    in_package = name == PACKAGE or name.startswith(f"{PACKAGE}.")
    return in_package and any(path.is_file() for path in _candidates(name))


def _path(name: str) -> Path:
    if not _exists(name):
        raise ModuleNotFoundError(f"{name!r} is no module of {PACKAGE} (in {ROOT})", name=name)
    return next(path for path in _candidates(name) if path.is_file())


def _imports(name: str, path: Path) -> list[str]:
    """The `lib` modules that one module imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[str] = []
    for node in _parsed(path)[0]:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            source = _absolute(node, package)
            # `from lib import losses` imports a module, `from lib.losses import dpo` a function
            found += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return [module for module in dict.fromkeys(found) if _exists(module)]


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    parents = parents[: len(parents) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])
