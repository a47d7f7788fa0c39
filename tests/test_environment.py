"""pyproject.toml, requirements.lock and environment.yml agree, and name what the code imports.

environment.yml (conda, Binder) is compared here, not executed.
"""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["optional-dependencies"].items()
    if name != "all"
}
EVERYTHING = BASE + [requirement for extra in EXTRAS.values() for requirement in extra]
# What a hosted notebook brings, oldest first: installing the book there must upgrade none of it.
HOSTED = {"numpy": ("1.26.4", "2.0.2"), "pandas": ("2.2.2",), "torch": ("2.6.0", "2.8.0")}


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def locked() -> dict[str, Version]:
    pairs = (line.split("==") for line in lock_lines())
    return {canonicalize_name(name): Version(text) for name, text in pairs}


def environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def environment_pip() -> list[str]:
    return next(entry["pip"] for entry in environment() if isinstance(entry, dict))


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(r.name) for r in requirements}


def test_lock_holds_only_exact_public_versions():
    """No local version (+cpu), hash, address or range: it installs on any machine."""
    exact = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*")
    assert [line for line in lock_lines() if not exact.fullmatch(line)] == []
    assert len(locked()) == len(lock_lines()) > 100


@pytest.mark.parametrize("requirement", EVERYTHING, ids=str)
def test_lock_satisfies_pyproject(requirement):
    assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_environment_yml_asks_for_what_pyproject_asks_for():
    pinned, *asked = environment_pip()
    assert pinned == "-c requirements.lock"
    assert set(map(Requirement, asked)) == set(BASE + EXTRAS["book"] + EXTRAS["llm"])


def test_environment_yml_packages_are_locked():
    for requirement in map(Requirement, environment_pip()[1:]):
        assert requirement.specifier.contains(locked()[canonicalize_name(requirement.name)])


def test_python_versions_agree():
    python = next(e for e in environment() if isinstance(e, str) and e.startswith("python="))
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert allowed.contains(python.removeprefix("python="))
    assert {"3.11", "3.12"} <= {v for v in ("3.10", "3.11", "3.12") if allowed.contains(v)}
    assert not allowed.contains("3.10")


def test_jupyter_book_stays_below_2():
    asked = [*EXTRAS["book"], *map(Requirement, environment_pip()[1:])]
    caps = [r.specifier for r in asked if r.name == "jupyter-book"]
    assert len(caps) == 2
    assert not any(cap.contains("2.0.0") for cap in caps)


@pytest.mark.parametrize("name", HOSTED)
def test_install_upgrades_nothing_of_a_hosted_notebook(name):
    specifier = next(r.specifier for r in BASE if r.name == name)
    assert all(specifier.contains(present) for present in HOSTED[name])


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != ROOT / ".venv", reason="not the environment that make sets up"
)
def test_installed_versions_are_the_locked_ones():
    installed = {name: Version(Version(version(name)).public) for name in locked()}
    assert installed == locked()


def imported(folder: str, but: str = "-") -> set[str]:
    """Distributions that the folder's modules import, the standard library and our own left out.

    Modules below `but` are left out.
    """
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        if path.is_relative_to(ROOT / but):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    own = {"lib", "benchmarks", "tests", "build", "conftest"}
    third_party = modules - sys.stdlib_module_names - own
    known = packages_distributions()
    return {canonicalize_name(known.get(module, [module])[0]) for module in third_party}


@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("lib", BASE),
        ("lib/lm", BASE + EXTRAS["llm"]),
        ("book", BASE + EXTRAS["book"]),
        ("benchmarks", EVERYTHING),
        ("tests", EVERYTHING),
    ],
    ids=["lib", "lib/lm", "book", "benchmarks", "tests"],
)
def test_imports_are_declared(folder, declared):
    """What `lib` imports comes with a plain install, but for its language models; those, tests and
    benchmarks may need the extras."""
    found = imported(folder, but="lib/lm" if folder == "lib" else "-")
    # come with ipykernel, jupyter-book and transformers
    transitive = {"huggingface-hub", "ipython", "sphinx-external-toc", "tokenizers"}
    assert found
    assert found - names(declared) - transitive == set()


def test_code_is_clean():
    command = [sys.executable, "-m", "ruff", "check", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_version_and_authors_are_said_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] == PROJECT["version"] == headings[0]
    assert citation["authors"] == PROJECT["authors"] == [{"name": config["author"]}]
    assert citation["title"] == config["title"]
    assert citation["license"] == PROJECT["license"]["text"] == "Apache-2.0"
