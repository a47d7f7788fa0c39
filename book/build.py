"""Run every chapter with papermill, then build the page from the executed notebooks.

    python book/build.py                            what is published -> _build/html
    python book/build.py -p profile smoke           papermill's parameters -> _build/smoke/html
    python book/build.py --check -p profile smoke   count the built site; an empty book fails
    python book/build.py --write-setup              put the setup cell into every chapter

A chapter is run again only when something it was made from has changed: its notebook, `lib`,
`data`, the pinned packages or the parameters. What changed is printed. The page is built without
executing anything, with warnings as errors, and again only when its sources differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import yaml
from bs4 import BeautifulSoup
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
SETUP_CELL = Path("book/assets/setup_cell.py")
# chapters that run or read language models, and need the extra `llm`
LANGUAGE_MODELS = {"length", "own_model", "on_policy_length", "negative_gradient_length",
                   "complementary_length", "full_scale"}  # fmt: skip
SITE_FILES = "book/assets/extra"  # its content lands in the site as it is (html_extra_path)
KNOWN_HOSTS = {"github.com": "github", "gitlab.com": "gitlab", "bitbucket.org": "bitbucket"}
SKIPPED_FOLDERS = {"__pycache__", ".ipynb_checkpoints"}


class BookError(Exception):
    """What a user can mend; printed without a traceback."""


@dataclass(frozen=True)
class Book:
    """The checkout at `root`, built into `out` with papermill `parameters` (name -> text)."""

    root: Path
    out: Path
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def chapters(self) -> list[str]:
        """Chapters in the order of _toc.yml, as document names: "book/on_policy"."""
        return list(parse_toc_yaml(self.root / "_toc.yml"))

    def notebook(self, chapter: str) -> Path:
        return self.root / f"{chapter}.ipynb"

    def executed(self, chapter: str, suffix: str = ".ipynb") -> Path:
        return self.out / "executed" / f"{Path(chapter).name}{suffix}"

    @property
    def figure_data(self) -> Path:
        """Where chapters leave the numbers of their figures, for the page to link to."""
        return self.out / "figure-data"

    def page(self, chapter: str) -> Path:
        return self.out / "html" / f"{chapter}.html"


@dataclass(frozen=True)
class Execution:
    """One finished run of a chapter: `inputs` (name -> digest) decide whether it still holds."""

    inputs: dict[str, str]
    parameters: dict[str, str]
    seconds: float
    finished: str
    cells: int


# Inputs of a chapter


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Files under `folder`, sorted, without caches."""
    found = (p for p in sorted(folder.rglob("*")) if not SKIPPED_FOLDERS & set(p.parts))
    return [p for p in found if p.is_file() and p.suffix != ".pyc"]


def shared_inputs(root: Path) -> dict[str, str]:
    """Digest of each file that any chapter may depend on: `lib`, `data`, the pinned packages."""
    paths = [*files_below(root / "lib"), *files_below(root / "data")]
    lock = root / "requirements.lock"
    paths += [lock] if lock.is_file() else []
    return {p.relative_to(root).as_posix(): digest(p.read_bytes()) for p in paths}


def changes(old: dict[str, str], new: dict[str, str], shown: int = 3) -> str:
    """What differs between two sets of inputs, in words; empty if nothing does."""
    words = [f"{name} removed" for name in sorted(old.keys() - new.keys())]
    words += [f"{name} added" for name in sorted(new.keys() - old.keys())]
    words += [
        f"{name} changed" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]
    ]
    more = [f"and {len(words) - shown} more"] if len(words) > shown else []
    return ", ".join(words[:shown] + more)


def read_execution(book: Book, chapter: str) -> Execution | None:
    """The record of the chapter's last finished run, or None if there is none to trust."""
    try:
        record = Execution(**json.loads(book.executed(chapter, ".json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if book.executed(chapter).is_file() else None


def declared_parameters(notebook: Path) -> set[str]:
    """Names assigned in the cell tagged `parameters`, read with papermill."""
    from papermill import inspect_notebook

    return set(inspect_notebook(str(notebook)))


def recomputes(parameters: dict[str, str]) -> bool:
    return parameters.get("recompute") == "True"


def check_parameters(parameters: dict[str, str]) -> None:
    """Raises: BookError for a value of every chapter's parameters that all of them would refuse."""
    flags = ("True", "False")
    allowed = {"recompute": flags, "plan_only": flags}
    if "profile" in parameters:
        from lib.runs import PROFILES  # with torch and pandas, which take seconds to import

        allowed["profile"] = ("auto", *PROFILES)
    for name in allowed.keys() & parameters.keys():
        if parameters[name] not in allowed[name]:
            given = f"got {parameters[name]!r}"
            raise BookError(f"{name} must be one of {', '.join(allowed[name])}; {given}")


def parameters_of(book: Book) -> dict[str, dict[str, str]]:
    """The parameters that each chapter takes.

    Raises: BookError for one that no chapter declares, or to recompute without a profile.
    """
    if not book.parameters:
        return {chapter: {} for chapter in book.chapters}
    if recomputes(book.parameters) and book.parameters.get("profile", "auto") == "auto":
        raise BookError("recompute needs a profile, such as PROFILE=cpu (-p profile cpu)")
    declared = {chapter: declared_parameters(book.notebook(chapter)) for chapter in book.chapters}
    for name in book.parameters.keys() - set().union(*declared.values()):
        allowed = ", ".join(sorted(set().union(*declared.values())))
        raise BookError(f"no chapter has a parameter {name!r}; there are: {allowed}")
    return {
        chapter: {k: v for k, v in book.parameters.items() if k in names}
        for chapter, names in declared.items()
    }


# Running chapters


def run_chapter(book: Book, chapter: str, parameters: dict[str, str], inputs: dict) -> str:
    """Execute one chapter; return "" or what failed. The record is written only on success."""
    output, record = book.executed(chapter), book.executed(chapter, ".json")
    unfinished = book.executed(chapter, ".running.ipynb")
    for earlier in (record, output, unfinished):  # papermill may fail before it writes anything
        earlier.unlink(missing_ok=True)
    flags = [part for name, value in parameters.items() for part in ("-p", name, value)]
    source = book.notebook(chapter).relative_to(book.root)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(source), str(unfinished)]
    # One thread each: `lib` spreads runs over cores, and results then depend on no core count.
    environment = {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **os.environ}
    environment["PREFBOOK_FIGURE_DATA"] = str(book.figure_data)
    start = time.monotonic()
    done = subprocess.run(
        [*command, *flags],
        cwd=book.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if unfinished.is_file():
        os.replace(unfinished, output)
    if done.returncode:
        return failure(output, done.stderr)
    seconds = round(time.monotonic() - start, 1)
    cells = sum(is_executed(c) for c in nbformat.read(output, as_version=4).cells)
    finished = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    finished_run = Execution(inputs, parameters, seconds, finished, cells)
    record.write_text(json.dumps(asdict(finished_run), indent=1))
    return ""


def failure(executed: Path, stderr: str) -> str:
    """The failing cell and its error; the end of papermill's own message if no cell failed."""
    if executed.is_file():
        code = [c for c in nbformat.read(executed, as_version=4).cells if c.cell_type == "code"]
        for number, cell in enumerate(code, start=1):
            for error in (o for o in cell.outputs if o.output_type == "error"):
                first = next(iter(cell.source.strip().splitlines()), "")
                return f"code cell {number} ({first}): {error.ename}: {error.evalue}"
    return "\n".join(stderr.strip().splitlines()[-5:]) or "papermill failed without a message"


def run_chapters(book: Book, jobs: int = 1) -> list[str]:
    """Run the chapters whose inputs changed; return those that failed."""
    missing = [c for c in book.chapters if not book.notebook(c).is_file()]
    if missing:
        raise BookError(f"_toc.yml names {missing[0]}, but there is no {missing[0]}.ipynb")
    try:
        (book.out / "executed").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BookError(f"{book.out}: {error.strerror}; another folder: --out") from None
    shared, parameters = shared_inputs(book.root), parameters_of(book)

    def visit(chapter: str) -> str:
        name = Path(chapter).name
        notebook = digest(book.notebook(chapter).read_bytes())
        given = {f"parameter {k}": v for k, v in parameters[chapter].items()}
        inputs = {**shared, f"{chapter}.ipynb": notebook, **given}
        last = read_execution(book, chapter)
        reason = changes(last.inputs, inputs) if last else "no finished run yet"
        if recomputes(parameters[chapter]):
            reason = reason or "recompute asked for"
        if not reason:
            say(f"{name}: up to date")
            return ""
        say(f"{name}: running ({reason})")
        problem = run_chapter(book, chapter, parameters[chapter], inputs)
        if problem:
            say(f"{name}: FAILED in {problem}")
            return chapter
        say(f"{name}: done in {read_execution(book, chapter).seconds} s")
        return ""

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return [chapter for chapter in pool.map(visit, book.chapters) if chapter]


def say(line: str) -> None:
    print(line, flush=True)


# The site's sources


def repository_url(config: dict) -> str:
    """The public address in _config.yml, "" if there is none. Raises: BookError for one that is no
    https://HOST/OWNER/NAME."""
    url = (config.get("repository") or {}).get("url") or ""
    address = urlsplit(url)
    named = len(list(filter(None, address.path.split("/")))) == address.path.count("/") == 2
    if url and not (address.scheme == "https" and address.hostname and named):
        raise BookError(f"repository url {url!r} in _config.yml is not https://HOST/OWNER/NAME")
    return url


def launch_settings(url: str) -> dict:
    """Settings of _config.yml for Colab and Binder buttons at the public address `url`.

    Without an address there are none. The theme stops at a host it does not know unless it is told
    the provider, so an unknown one is shown as a GitLab instance; Colab opens GitHub only.
    """
    if not url:
        return {}
    provider = KNOWN_HOSTS.get(urlsplit(url).hostname, "gitlab")
    buttons = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org"}
    if provider == "github":
        buttons["colab_url"] = "https://colab.research.google.com"
    return {
        "launch_buttons": buttons,
        "html": {"use_repository_button": True},
        "sphinx": {"config": {"html_theme_options": {"repository_provider": provider}}},
    }


def merged(base: dict, extra: dict) -> dict:
    """`base` with `extra` laid over it, dictionaries key by key."""
    both = {k: merged(base[k], v) for k, v in extra.items() if isinstance(base.get(k), dict)}
    return {**base, **extra, **both}


def commit_of(root: Path) -> str:
    """Short commit of the checkout, marked if files differ from it; "unknown" without git."""
    git = ["git", "-C", str(root)]
    try:
        command = [
            *git,
            "describe",
            "--always",
            "--abbrev=10",
            "--exclude=*",
            "--dirty=, with changes",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def execution_table(book: Book) -> str:
    """Markdown table for `{{ execution_times }}`: seconds, cells and parameters of each chapter."""
    lines = ["| chapter | code cells | seconds | executed | parameters |", "|---|--:|--:|---|---|"]
    for chapter in book.chapters:
        run = read_execution(book, chapter)
        given = ", ".join(f"{k}={v}" for k, v in run.parameters.items()) if run else ""
        cells = [run.cells, run.seconds, run.finished, given] if run else ["", "", "failed", ""]
        lines.append("| " + " | ".join([f"{{doc}}`/{chapter}`", *map(str, cells)]) + " |")
    return "\n".join(lines)


def site_config(book: Book) -> dict:
    """_config.yml plus what is known only now; the date is put in by `build_html`."""
    config = yaml.safe_load((book.root / "_config.yml").read_text())
    url = repository_url(config)
    config = merged(config, launch_settings(url))
    values = {"execution_times": execution_table(book), "commit": commit_of(book.root)}
    config = merged(config, {"parse": {"myst_substitutions": values}})
    # A page opened from disk may not read the others, so only a hosted search shows their text.
    config["sphinx"]["config"]["html_show_search_summary"] = bool(url)
    return config


def site_sources(book: Book) -> dict[str, bytes]:
    """Every file the page is built from (relative path -> content), but for _config.yml."""
    kept = [p for p in files_below(book.root / "book") if p.suffix not in {".ipynb", ".py"}]
    sources = {p.relative_to(book.root).as_posix(): p.read_bytes() for p in kept}
    sources["_toc.yml"] = (book.root / "_toc.yml").read_bytes()
    for path in files_below(book.figure_data):
        sources[f"{SITE_FILES}/book/figure-data/{path.name}"] = path.read_bytes()
    for chapter in book.chapters:
        path = book.executed(chapter)
        if not path.is_file():
            raise BookError(f"{chapter} has not been executed; run `make book` first")
        sources[f"{chapter}.ipynb"] = one_figure_each(path.read_text()).encode()
    return sources


def one_figure_each(notebook: str) -> str:
    """A notebook whose figure cells hold their image only; a cell of its own follows for the rest.

    MyST-NB makes a figure of *every* output of such a cell, all under one name, so a link below the
    image would be a second figure.
    """
    parsed = nbformat.reads(notebook, as_version=4)
    cells = []
    for cell in parsed.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "figure" in cell.metadata.get("mystnb", {}):
            rest = [o for o in cell.outputs if "image/png" not in o.get("data", {})]
            cell.outputs = [o for o in cell.outputs if o not in rest]
            below = nbformat.v4.new_code_cell("# below", id=f"{cell.id}-rest", outputs=rest,
                                              metadata={"tags": ["remove-input"]})  # fmt: skip
            cells += [below] if rest else []
    parsed.cells = cells
    return nbformat.writes(parsed)


def lay_out(folder: Path, sources: dict[str, bytes]) -> None:
    """Make `folder` hold exactly `sources`; unchanged files keep their time of change."""
    for stale in (p for p in folder.rglob("*") if p.is_file()):
        if stale.relative_to(folder).as_posix() not in sources:
            stale.unlink()
    for name, content in sources.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


# Building and checking the page


def build_html(book: Book) -> bool:
    """Build the page if its sources changed; True if it stands without a warning."""
    config, sources = site_config(book), site_sources(book)
    made_from = yaml.safe_dump(config).encode() + Path(__file__).read_bytes()
    made_from += b"".join(name.encode() + content for name, content in sorted(sources.items()))
    stamp = book.out / "html.digest"
    if stamp.is_file() and stamp.read_text() == digest(made_from):
        say("page: up to date")
        return True
    say("page: building")
    # Sphinx reports a page's warnings only when it reads the page, so after a failed build all are
    # read again: a second run must not turn green by itself.
    clean_before = stamp.is_file()
    stamp.unlink(missing_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    commit = config["parse"]["myst_substitutions"]["commit"]
    footer = f"<p>Built on {date} from commit {commit}; when chapters were executed: Status.</p>"
    config = merged(config, {"html": {"extra_footer": footer}})
    sources["_config.yml"] = yaml.safe_dump(config, allow_unicode=True).encode()
    lay_out(book.out / "source", sources)
    built = sphinx(book, freshly=not clean_before)
    if not built and clean_before:  # a label that moved to another page counts as two until then
        say("page: once more, reading all pages afresh")
        built = sphinx(book, freshly=True)
    if built:
        stamp.write_text(digest(made_from))
    return built


def sphinx(book: Book, freshly: bool) -> bool:
    """jupyter-book's HTML build with warnings as errors, every page tried."""
    from jupyter_book.sphinx import REDIRECT_TEXT, build_sphinx

    source, html = book.out / "source", book.out / "html"
    shutil.rmtree(html, ignore_errors=True)
    toc = source / "_toc.yml"
    status = build_sphinx(
        source,
        html,
        noconfig=True,
        path_config=source / "_config.yml",
        confoverrides={
            "external_toc_path": toc.as_posix(),
            "latex_individualpages": False,
            "nitpicky": True,
        },
        freshenv=freshly,
        warningiserror=True,
        keep_going=True,
        quiet=True,
    )
    if isinstance(status, KeyboardInterrupt):  # which it returns
        raise status
    if html.is_dir():
        (html / "index.html").write_text(
            REDIRECT_TEXT.format(first_page=f"{book.chapters[0]}.html")
        )
    return status == 0


def is_executed(cell) -> bool:
    return cell.cell_type == "code" and cell.execution_count is not None


def figure_cells(notebook) -> int:
    """Figures a chapter promises: cells tagged `figure` or with figure options, and glued ones."""
    count = 0
    for cell in notebook.cells:
        options = cell.metadata.get("mystnb", {})
        tagged = "figure" in cell.metadata.get("tags", []) or "figure" in options
        count += cell.cell_type == "code" and tagged
        count += cell.source.count("{glue:figure}") if cell.cell_type == "markdown" else 0
    return count


def foreign_sources(page: str) -> list[str]:
    """Addresses on other hosts that a browser would load with this HTML page (links are not)."""
    soup = BeautifulSoup(page, "html.parser")
    loaded = [tag["src"] for tag in soup.select("[src]")]
    loaded += [t["href"] for t in soup.select("link[href]") if not {"canonical"} & set(t["rel"])]
    return [a for a in loaded if a.startswith("//") or urlsplit(a).scheme in {"http", "https"}]


def warnings_shown(code: list) -> list[str]:
    """Lines of code cells' outputs that Python's `warnings` printed."""
    text = "\n".join(o.text for c in code for o in c.outputs if o.output_type == "stream")
    return re.findall(r".*\b[A-Z]\w*Warning: .*", text)


def check_chapter(book: Book, chapter: str) -> tuple[int, int, list[str]]:
    """(executed cells, figures on the page, problems) of one built chapter."""
    if not book.page(chapter).is_file():
        return 0, 0, ["page is missing"]
    if not book.executed(chapter).is_file():
        return 0, 0, ["the page is of an earlier build: the chapter's last run wrote nothing"]
    html = book.page(chapter).read_text()
    source = nbformat.read(book.notebook(chapter), as_version=4)
    executed = nbformat.read(book.executed(chapter), as_version=4)
    code = [c for c in executed.cells if c.cell_type == "code" and c.source.strip()]
    soup = BeautifulSoup(html, "html.parser")
    figures = len(soup.select("article img"))
    problems = [f"loads {address} from another host" for address in foreign_sources(html)]
    errors = sum(o.output_type == "error" for c in code for o in c.outputs)
    if errors or soup.select(".traceback"):
        problems.append("an error is on the page")
    problems += [f"a warning is on the page: {line}" for line in warnings_shown(code)]
    if str(book.root) in soup.get_text():
        problems.append(f"the page names {book.root}, a folder of the machine that built it")
    if not code or not all(map(is_executed, code)):
        problems.append(f"{sum(map(is_executed, code))} of {len(code)} code cells were executed")
    links = [a["href"] for a in soup.select("a.figure-data")]
    gone = [link for link in links if not (book.page(chapter).parent / link).is_file()]
    problems += [f"{link} is missing" for link in gone]
    if figures < figure_cells(source):
        problems.append(f"{figures} figures on the page, {figure_cells(source)} promised")
    return sum(map(is_executed, code)), figures, problems


def check(book: Book) -> bool:
    """Count the built site and print it; False if it holds less than its sources promise."""
    results = {chapter: check_chapter(book, chapter) for chapter in book.chapters}
    for chapter, (cells, figures, problems) in results.items():
        verdict = "; ".join(problems) or "ok"
        say(f"{Path(chapter).name}: {cells} executed cells, {figures} figures: {verdict}")
    pages = sum(book.page(c).is_file() for c in results)
    cells, figures = (sum(r[i] for r in results.values()) for i in (0, 1))
    say(f"book: {pages} of {len(results)} pages, {figures} figures, {cells} executed cells")
    if not figures:
        say("book: a book without a figure is not done")
    return bool(figures) and not any(problems for _, _, problems in results.values())


# The setup cell


def setup_cell(root: Path, chapter: str) -> str:
    """The first code cell of a chapter ("book/on_policy"), with the address from _config.yml.

    On a hosted machine it installs the book, with the extra `llm` only where a chapter needs it.
    """
    config = yaml.safe_load((root / "_config.yml").read_text())
    text = (root / SETUP_CELL).read_text().strip()
    if Path(chapter).name not in LANGUAGE_MODELS:
        text = text.replace("[llm]", "").replace(', "trl")', ",)")
    return text.replace("{repository_url}", repository_url(config))


def write_setup(book: Book) -> None:
    """Bring the setup cell of every chapter up to date; a new chapter gets one."""
    for chapter in book.chapters:
        notebook = nbformat.read(book.notebook(chapter), as_version=4)
        at = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code")
        if "remove-cell" not in notebook.cells[at].metadata.get("tags", []):
            cell = nbformat.v4.new_code_cell(metadata={"tags": ["remove-cell"]})
            notebook.cells.insert(at, cell)
        notebook.cells[at].source = setup_cell(book.root, chapter)
        nbformat.write(notebook, book.notebook(chapter))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", type=Path, help="build folder (default: _build[/PROFILE])")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to build")
    parser.add_argument("--jobs", type=positive, default=1, help="chapters at a time (default: 1)")
    parser.add_argument("--check", action="store_true", help="only count the built site")
    parser.add_argument("--write-setup", action="store_true", help="only write the setup cells")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A count of the command line. Raises: ArgumentTypeError for what is not 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if everything asked for stands, else 1; 130 if it was stopped."""
    options = parse(arguments)
    root, parameters = options.root.resolve(), dict(options.p)
    out = options.out or root / "_build" / parameters.get("profile", "")
    book = Book(root, out.resolve(), parameters)
    try:
        if not (root / "_toc.yml").is_file():
            raise BookError(f"{root} is no checkout of a book: it has no _toc.yml")
        check_parameters(parameters)
        if options.write_setup:
            write_setup(book)
            return 0
        if options.check:
            return 0 if check(book) else 1
        failed = run_chapters(book, options.jobs)
        built = build_html(book)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: finished chapters are kept; the same command goes on", file=sys.stderr)
        return 130
    if failed:
        say(
            f"failed chapters: {', '.join(Path(c).name for c in failed)} (the error is on the page)"
        )
    if not built:
        say("page: what is said above is an error, a warning as well")
    if book.page(book.chapters[0]).is_file():
        say(f"page: {(book.out / 'html' / 'index.html').as_uri()}")
    return 1 if failed or not built else 0


if __name__ == "__main__":
    sys.exit(main())
