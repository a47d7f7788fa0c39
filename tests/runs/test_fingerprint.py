"""The fingerprint: follows imports, ignores words, notices code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.runs import code_fingerprint, combined, fingerprint
from lib.runs.fingerprint import (
    changed,
    changed_since,
    fingerprint_as_loaded,
    refuse_other_code,
    source_hash,
)

PLAIN = "def area(r):\n    return 3 * r\n"


def hash_of(tmp_path, text):
    path = tmp_path / "module.py"
    path.write_text(text + "\n" * len(list(tmp_path.iterdir())))
    return source_hash(path)


@pytest.mark.parametrize(
    "text",
    [
        '"""Module."""\n\n\ndef area(r):\n    """Of a circle."""\n    return 3 * r\n',
        "# why\ndef area(r):  # how\n    return (3 *\n            r)\n",
        'def area(r):\n    return 3 * r\n\n\n"""A note."""\n',
    ],
)
def test_comments_docstrings_and_layout_do_not_count(tmp_path, text):
    assert hash_of(tmp_path, text) == hash_of(tmp_path, PLAIN)


@pytest.mark.parametrize(
    "text",
    [
        "def area(r):\n    return 4 * r\n",
        "def area(r):\n    return 3.0 * r\n",
        "def area(r):\n    return r * 3\n",
        "def area(r, n=1):\n    return 3 * r\n",
        PLAIN + "area(1)\n",
        "def area(r):\n    return '3' * r\n",
    ],
)
def test_code_counts(tmp_path, text):
    assert hash_of(tmp_path, text) != hash_of(tmp_path, PLAIN)


def test_a_hash_does_not_depend_on_the_version_of_python(tmp_path):
    body = "return f'{a!r:>{b}} ' 'x', [*a], {**b}"
    text = f"class A:\n    @property\n    def f(a, *, b=None):\n        {body}\n"
    # made by Python 3.11; 3.12.1 splits the texts of an f-string, 3.12 adds fields, 3.13 omits some
    assert hash_of(tmp_path, text) == "1e687d3114f69b65"


def test_imports_are_followed_inside_lib_and_packages_count(repository):
    repository.write("lib/deep/__init__.py", "")
    repository.write(
        "lib/deep/one.py", "import numpy\nfrom . import two\nfrom ..helper import LIMIT\n"
    )
    repository.write("lib/deep/two.py", "def f():\n    import lib.core as core\n    return core\n")
    assert list(code_fingerprint("lib.deep.one")) == [
        "lib/__init__.py",
        "lib/core.py",
        "lib/deep/__init__.py",
        "lib/deep/one.py",
        "lib/deep/two.py",
        "lib/helper.py",
    ]


def test_an_edit_is_named_and_an_unused_module_is_not_watched(repository):
    before = code_fingerprint("lib.core")
    repository.write("lib/other.py", "UNUSED = 2\n")
    assert changed_since(before) == []
    repository.write("lib/helper.py", "LIMIT = 40\n")
    assert changed_since(before) == ["lib/helper.py"]
    assert changed(before, code_fingerprint("lib.core")) == ["lib/helper.py"]
    assert combined(before) != combined(code_fingerprint("lib.core"))
    (repository.root / "lib/helper.py").unlink()
    assert changed_since(before) == ["lib/helper.py"]


def test_a_process_that_loaded_older_code_is_refused(repository):
    loaded = fingerprint_as_loaded("lib.core")
    repository.write("lib/core.py", "def double(x):\n    return 3 * x\n")
    refuse_other_code(loaded)  # a computation under way goes on with what it loaded
    with pytest.raises(RuntimeError, match=r"lib/core.py changed .* restart"):
        fingerprint_as_loaded("lib.core")


EDITED = """
import pathlib, sys
from lib.runs.fingerprint import fingerprint_as_loaded
import lib.core
path = pathlib.Path(lib.core.__file__)
path.write_text(path.read_text().replace(*sys.argv[1:]))
import lib.other
print(list(fingerprint_as_loaded("lib.core")))
"""


@pytest.mark.parametrize(
    ("change", "refused"),
    [(("2", "3"), True), (("return", "# twice\n    return"), False), (("", ""), False)],
)
def test_an_edit_between_import_and_first_computation_is_refused(repository, change, refused):
    """As in a notebook that is open while `lib` is edited; a clone of a moment ago is fine."""
    repository.write("lib/runs/__init__.py", "")
    repository.write("lib/runs/fingerprint.py", Path(fingerprint.__file__).read_text())
    (repository.root / "lib/.#core.py").symlink_to("nowhere")  # an editor's
    command = [sys.executable, "-c", EDITED, *change]
    done = subprocess.run(command, cwd=repository.root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(repository.root)})  # fmt: skip
    assert ("lib/core.py changed since this process loaded it" in done.stderr) is refused
    assert ("'lib/core.py', 'lib/helper.py'" in done.stdout) is not refused


def test_an_unknown_module_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="'lib.nowhere' is no module of lib"):
        code_fingerprint("lib.nowhere")
