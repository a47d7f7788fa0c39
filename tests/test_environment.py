"""pyproject.toml, requirements.lock and environment.yml agree, and name what the code imports.

environment.yml (conda, Binder) is compared here, not executed. The Makefile sets up `.venv` with a
Python that it looks for, and mends one that was interrupted.
"""

import ast
import os
import re
import shutil
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
    """The tested one is said by the lock, which environment.yml takes; the others by README."""
    python = next(e for e in environment() if isinstance(e, str) and e.startswith("python="))
    tested, also = re.search(
        r"\(Python (\S+); they resolve on (\S+) too\)", (ROOT / "requirements.lock").read_text()
    ).groups()
    assert python == f"python={tested}"
    makefile = (ROOT / "Makefile").read_text()
    taken = re.search(r"^PYTHONS := (.*)$", makefile, flags=re.MULTILINE)[1].split()
    assert sorted(taken) == [tested, also]
    assert f"no Python >= {tested}" in makefile
    assert f"Python {tested} or {also} (tested on {tested})" in (ROOT / "README.md").read_text()
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if " :: 3." in c]
    assert named == [tested, also]
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert [v for v in ("3.10", tested, also) if allowed.contains(v)] == [tested, also]
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == "py" + tested.replace(".", "")


# The Makefile's set-up, with programs that only pretend to be Python


PRETENDER = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
case "$0 $*" in
  *"-m venv --clear .venv") [ -z "$NO_VENV" ] || {{ mkdir -p .venv/bin && exit 1; }}
    mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *" -c "*) [ "$(basename "$0")" = {answers} ] ;;
esac
"""


@pytest.fixture
def setting_up(tmp_path):
    """make env in a folder of its own: (answering Python, arguments, ...) -> status, stderr, calls.

    Of the programs on the path, only the one that answers has a version that is taken.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements.lock").touch()

    def make(answers: str, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            (programs / name).write_text(PRETENDER.format(answers=answers))
            (programs / name).chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        kept.pop("PYTHON", None)
        kept["PATH"] = f"{programs}:{kept['PATH']}"
        done = subprocess.run(["make", "env", *arguments], cwd=tmp_path, env=kept | variables,
                              capture_output=True, text=True)  # fmt: skip
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done.returncode, done.stderr, [x for x in lines if " -c " not in x]

    return make


VENV = "-m venv --clear .venv"
INSTALL = "python -m pip install --quiet -r requirements.lock -e .[all]"


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3"])
def test_make_takes_the_first_python_that_is_supported(setting_up, name):
    status, _, calls = setting_up(name)
    assert (status, calls) == (0, [f"{name} {VENV}", INSTALL])


def test_make_takes_the_python_it_is_given(setting_up):
    status, _, calls = setting_up("python3.12", "PYTHON=python3.13")
    assert (status, calls) == (0, [f"python3.13 {VENV}", INSTALL])


def test_make_without_a_supported_python_says_what_to_do(setting_up):
    status, said, calls = setting_up("python3.10")
    assert status and calls == []
    assert "no Python >= 3.11" in said and "PYTHON=" in said and "python3-venv" in said


def test_make_mends_an_environment_without_pip(setting_up, tmp_path):
    """As `python -m venv` leaves one when the packages for it are missing."""
    left = tmp_path / ".venv" / "bin" / "python"
    left.parent.mkdir(parents=True)
    left.write_text("#!/bin/sh\nexit 1\n")
    left.chmod(0o755)
    status, _, calls = setting_up("python3.11")
    assert (status, calls) == (0, [f"python3.11 {VENV}", INSTALL])


def test_make_keeps_an_environment_with_pip(setting_up, tmp_path):
    setting_up("python3.11")
    (tmp_path / ".venv" / ".ready").unlink()
    status, _, calls = setting_up("no Python at all")
    assert (status, calls) == (0, ["python -m pip --version", INSTALL])


def test_make_leaves_no_half_environment_behind(setting_up, tmp_path):
    status, said, _ = setting_up("python3.11", NO_VENV="1")
    assert status and "apt install python3-venv" in said
    assert not (tmp_path / ".venv").exists()
    assert setting_up("python3.11")[0] == 0


@pytest.mark.parametrize(("words", "status", "said"), [
    (("help", "PROFIL=smoke"), 0, "note: PROFIL is none of this Makefile's: "),
    (("help", "PROFILE=smoke", "JOBS=2"), 0, "make help "),
    (("book", "CHAPTER=on_policy"), 2, "error: make book runs every chapter; one alone: "),
])  # fmt: skip
def test_a_variable_that_make_would_pass_over_is_said(tmp_path, words, status, said):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "requirements.lock", ".venv/.ready"):
        (tmp_path / name).touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *words], cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.returncode == status and (done.stdout + done.stderr).startswith(said)


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
    transitive = {"huggingface-hub", "ipython", "sphinx-external-toc", "tokenizers", "traitlets"}
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


def test_the_paper_is_cited_as_in_the_book():
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    entry = (ROOT / "book" / "references.bib").read_text().partition("@inproceedings{taj")[2]
    url = re.search(r"url *= \{(.*?)\}", entry)[1]
    assert paper["url"] == url and url in (ROOT / "README.md").read_text()
    assert [a["family-names"] for a in paper["authors"]] == re.findall(
        r"(\w+), \w+", re.search(r"author *= \{(.*?)\}", entry)[1]
    )
