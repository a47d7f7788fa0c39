"""The book's build: what is rerun and why, what fails, and a page that needs no network."""

import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import build
import nbformat
import pytest
import yaml

from tests.minibook import FIGURE, write_chapter

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--enable-logging=stderr",
    "--v=0",
]


def run_build(mini: Path, *flags: str) -> SimpleNamespace:
    """Exit status and output of book/build.py on the checkout `mini`."""
    command = [sys.executable, str(ROOT / "book" / "build.py"), "--root", str(mini), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return SimpleNamespace(status=done.returncode, text=done.stdout + done.stderr)


@pytest.fixture(scope="session")
def built(mini_book) -> Path:
    """The small book, executed and built once."""
    result = run_build(mini_book)
    assert result.status == 0, result.text
    return mini_book


@pytest.fixture
def mini(built, tmp_path) -> Path:
    """A built copy that a test may change."""
    return shutil.copytree(built, tmp_path / "mini")


def html_of(mini: Path, chapter: str = "index") -> str:
    return (mini / "_build" / "html" / "book" / f"{chapter}.html").read_text()


# What is rerun, and why


def test_nothing_is_rerun_when_nothing_changed(mini):
    result = run_build(mini)
    assert result.status == 0
    assert result.text.splitlines()[:3] == [
        "index: up to date",
        "status: up to date",
        "page: up to date",
    ]
    assert "_build/html/index.html" in result.text


def test_a_change_of_code_reruns_every_chapter_and_reaches_the_page(mini):
    before = html_of(mini)
    (mini / "lib" / "chapter.py").write_text("VALUE = 2\n")
    result = run_build(mini)
    assert result.text.count("running (lib/chapter.py changed)") == 2
    figures = [set(re.findall(r"_images/\w+\.png", page)) for page in (before, html_of(mini))]
    assert figures[0] and figures[1] and not figures[0] & figures[1]


def test_a_change_of_one_notebook_reruns_it_alone(mini):
    write_chapter(mini / "book" / "index.ipynb", "# Another title", "VALUE = 3", FIGURE)
    result = run_build(mini)
    assert "index: running (book/index.ipynb changed)" in result.text
    assert "status: up to date" in result.text
    assert "Another title" in html_of(mini)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"a": "1"}, {"a": "1"}, ""),
        ({"a": "1"}, {"a": "2"}, "a changed"),
        ({"a": "1", "b": "1"}, {"b": "1", "c": "1"}, "a removed, c added"),
        ({}, dict.fromkeys("abcde", "1"), "a added, b added, c added, and 2 more"),
    ],
)
def test_changes_are_said_in_words(old, new, said):
    assert build.changes(old, new) == said


def test_parameters_reach_the_chapters_and_their_own_folder(mini):
    result = run_build(mini, "-p", "profile", "smoke", "-p", "recompute", "True")
    assert result.status == 0, result.text
    executed = nbformat.read(mini / "_build" / "smoke" / "executed" / "index.ipynb", as_version=4)
    injected = next(
        c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])
    )
    assert injected.source.splitlines()[-2:] == ['profile = "smoke"', "recompute = True"]
    page = (mini / "_build" / "smoke" / "html" / "book" / "status.html").read_text()
    assert "profile=smoke, recompute=True" in page
    book = build.Book(mini, mini / "_build" / "smoke", {"profile": "smoke", "recompute": "True"})
    (mini / "book" / "status.ipynb").unlink()
    with pytest.raises(build.BookError, match="there is no book/status.ipynb"):
        build.run_chapters(book)


def test_an_unknown_parameter_is_refused_before_any_work(mini):
    result = run_build(mini, "-p", "profil", "smoke")
    assert result.status == 1
    assert "parameter 'profil'; there are: plan_only, profile, recompute" in result.text
    assert "running" not in result.text


def test_recomputing_without_a_profile_is_refused_before_any_work(mini):
    """It would mean the whole published grid."""
    for profile in ((), ("-p", "profile", "auto")):
        result = run_build(mini, "-p", "recompute", "True", *profile)
        assert result.status == 1
        assert "error: recompute needs a profile" in result.text
        assert "running" not in result.text


@pytest.mark.parametrize(("flags", "said"), [
    (("-p", "profile", "smok"), "profile must be one of auto, smoke, .*; got 'smok'"),
    (("-p", "profile", ""), "profile must be one of .*; got ''"),
    (("-p", "profile", "smok", "--check"), "got 'smok'"),
    (("-p", "profile", "smoke", "-p", "recompute", "yes"), "one of True, False; got 'yes'"),
    (("-p", "plan_only", "1"), "plan_only must be one of True, False; got '1'"),
    (("--root", str(ROOT / "book")), "book is no checkout of a book: it has no _toc.yml"),
    (("--out", str(ROOT / "_toc.yml" / "below")), "Not a directory; another folder: --out"),
])  # fmt: skip
def test_what_every_chapter_would_refuse_is_said_once(mini_book, capsys, flags, said):
    assert build.main(["--root", str(mini_book), *flags]) == 1
    told = capsys.readouterr()
    assert re.fullmatch(f"error: .*{said}\n", told.err) and not told.out


@pytest.mark.parametrize("jobs", ["0", "-1", "x"])
def test_a_number_of_jobs_that_is_none_is_refused(capsys, jobs):
    with pytest.raises(SystemExit):
        build.main(["--jobs", jobs])
    assert f"{jobs!r} is not a number of at least 1" in capsys.readouterr().err


def test_a_build_that_is_stopped_says_so(mini_book, capsys, monkeypatch):
    monkeypatch.setattr(build, "run_chapter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    out = mini_book / "_build" / "stopped"
    assert build.main(["--root", str(mini_book), "--out", str(out)]) == 130
    assert capsys.readouterr().err.startswith("stopped: finished chapters are kept")


# What fails


def test_a_failing_chapter_is_named_and_the_others_stay(mini):
    bad = ("VALUE = 1", "1 / 0", FIGURE)
    write_chapter(mini / "book" / "index.ipynb", "# Index", *bad)
    result = run_build(mini)
    assert result.status == 1
    assert (
        "index: FAILED in code cell 4 (1 / 0): ZeroDivisionError: division by zero" in result.text
    )
    assert "status: up to date" in result.text
    assert (mini / "_build" / "html" / "book" / "status.html").is_file()
    checked = run_build(mini, "--check")
    assert checked.status == 1
    assert "an error is on the page" in checked.text
    assert "index: running (no finished run yet)" in run_build(mini).text


def test_a_chapter_whose_run_writes_nothing_leaves_nothing_of_an_earlier_one(mini):
    """Papermill stops before it writes where it cannot read the notebook."""
    write_chapter(mini / "book" / "index.ipynb", "# Index", "VALUE = 1", "1 / 0", FIGURE)
    book = build.Book(mini, mini / "_build")
    assert "ZeroDivisionError" in build.run_chapter(book, "book/index", {}, {})
    (mini / "book" / "index.ipynb").write_text("no notebook")
    found = build.run_chapter(book, "book/index", {}, {})
    assert found and "ZeroDivisionError" not in found
    assert not book.executed("book/index").exists()
    with pytest.raises(build.BookError, match="book/index has not been executed"):
        build.site_sources(book)
    write_chapter(mini / "book" / "index.ipynb", "# Index", "VALUE = 1", FIGURE)
    _, _, problems = build.check_chapter(book, "book/index")
    assert problems == ["the page is of an earlier build: the chapter's last run wrote nothing"]


def test_a_warning_fails_the_build_every_time(mini):
    write_chapter(
        mini / "book" / "index.ipynb", "# Index\n\nSee {ref}`nowhere`.", "VALUE = 1", FIGURE
    )
    for _ in range(2):
        result = run_build(mini)
        assert result.status == 1
        assert "nowhere" in result.text


def test_a_label_may_move_to_another_page(mini):
    label = "(here)=\n## A section\n\nSee {ref}`here`.\n"
    for first, second in (("", label), (label, "")):
        write_chapter(mini / "book" / "index.ipynb", f"# Index\n\n{first}", "VALUE = 1", FIGURE)
        write_chapter(mini / "book" / "status.ipynb", f"# Status\n\n{second}", "VALUE = 1", FIGURE)
        result = run_build(mini)
        assert result.status == 0, result.text


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import warnings\nwarnings.warn('too small')", "UserWarning: too small"),
        ("import os\nprint(os.getcwd())", "a folder of the machine that built it"),
    ],
)
def test_what_a_reader_should_not_see_fails_the_count(mini, code, said):
    write_chapter(mini / "book" / "index.ipynb", "# Index", code, "VALUE = 1", FIGURE)
    assert run_build(mini).status == 0
    result = run_build(mini, "--check")
    assert result.status == 1
    assert said in result.text


def test_the_built_site_is_counted(built):
    result = run_build(built, "--check")
    assert result.status == 0, result.text
    assert result.text.splitlines() == [
        "index: 4 executed cells, 1 figures: ok",
        "status: 4 executed cells, 1 figures: ok",
        "book: 2 of 2 pages, 2 figures, 8 executed cells",
    ]


def test_a_promised_figure_that_is_not_drawn_fails_the_count(mini):
    write_chapter(mini / "book" / "index.ipynb", "# Index", "VALUE = 1", "VALUE")
    assert run_build(mini).status == 0
    result = run_build(mini, "--check")
    assert result.status == 1
    assert "0 figures on the page, 1 promised" in result.text


def test_a_page_that_is_not_there_fails_the_count(mini):
    (mini / "_build" / "html" / "book" / "status.html").unlink()
    result = run_build(mini, "--check")
    assert result.status == 1
    assert "book: 1 of 2 pages" in result.text


# Launch buttons


def test_no_address_gives_no_launch_buttons(built):
    assert build.launch_settings("") == {}
    assert not re.search("colab|mybinder|launch-button", html_of(built))


def test_an_address_gives_launch_buttons(mini):
    url = "https://github.com/owner/book"
    config = yaml.safe_load((mini / "_config.yml").read_text())
    config["repository"]["url"] = url
    (mini / "_config.yml").write_text(yaml.safe_dump(config))
    result = run_build(mini)
    assert result.status == 0, result.text
    page = html_of(mini)
    assert "https://colab.research.google.com/github/owner/book/blob/main/book/index.ipynb" in page
    assert re.search(
        r"https://mybinder\.org/v2/gh/owner/book/main\?urlpath=[^\"]*index\.ipynb", page
    )


def test_a_host_that_the_theme_does_not_know_is_given_a_provider():
    settings = build.launch_settings("https://code.example.org/owner/book")
    options = settings["sphinx"]["config"]["html_theme_options"]
    assert options == {"repository_provider": "gitlab"}
    assert "colab_url" not in settings["launch_buttons"]


NO_ADDRESSES = ("github.com/owner/book", "http://github.com/owner/book", "https://github.com/owner",
                "https://github.com//book", "book")  # fmt: skip


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_an_address_that_is_none_is_refused(mini, url):
    text = (mini / "_config.yml").read_text()
    (mini / "_config.yml").write_text(text.replace('url: ""', f'url: "{url}"'))
    before = (mini / "book" / "index.ipynb").read_bytes()
    result = run_build(mini, "--write-setup")
    assert result.status == 1
    said = "in _config.yml is not https://HOST/OWNER/NAME"
    assert result.text == f"error: repository url {url!r} {said}\n"
    assert (mini / "book" / "index.ipynb").read_bytes() == before


@pytest.mark.parametrize("config", [{}, {"repository": None}, {"repository": {"url": None}}])
def test_an_address_that_is_left_out_is_none(config):
    assert build.repository_url(config) == ""


def test_the_setup_cell_carries_the_address(mini):
    text = (mini / "_config.yml").read_text()
    (mini / "_config.yml").write_text(
        text.replace('url: ""', 'url: "https://github.com/owner/book"')
    )
    assert run_build(mini, "--write-setup").status == 0
    notebook = nbformat.read(mini / "book" / "index.ipynb", as_version=4)
    assert 'url = "https://github.com/owner/book" or' in notebook.cells[1].source


def test_a_chapter_without_a_setup_cell_gets_one_and_keeps_its_own(mini):
    path = mini / "book" / "index.ipynb"
    notebook = nbformat.read(path, as_version=4)
    setup = notebook.cells.pop(1)
    nbformat.write(notebook, path)
    assert run_build(mini, "--write-setup").status == 0
    made = nbformat.read(path, as_version=4)
    assert made.cells[1].source == setup.source
    assert made.cells[1].metadata["tags"] == ["remove-cell"]
    assert [c.source for c in made.cells[2:]] == [c.source for c in notebook.cells[1:]]
    assert made.cells[2].metadata == notebook.cells[1].metadata


# No network


def test_pages_load_nothing_from_other_hosts(built):
    pages = list((built / "_build" / "html").rglob("*.html"))
    assert len(pages) >= 4
    assert {p.name: build.foreign_sources(p.read_text()) for p in pages} == {
        p.name: [] for p in pages
    }
    for sheet in (built / "_build" / "html").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s)[\"' ]*(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="http://cdn.example/x.png">',
    ],
)
def test_a_foreign_source_is_found(tag):
    links = '<a href="https://example.org">a link is no source</a><img src="_images/x.png">'
    assert len(build.foreign_sources(f"<html><body>{links}{tag}</body></html>")) == 1


def page_requests(log: Path) -> set[str]:
    """Addresses that a page asked of other hosts; the browser's own have no origin as initiator."""
    events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    asked = {e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"}
    return {url for url in asked if urlsplit(url).hostname not in {None, "127.0.0.1"}}


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing on the console."""


@pytest.fixture
def browse(built, tmp_path):
    """browse(page) -> (DOM after scripts ran, console errors, addresses asked of other hosts)."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: the page is searched for foreign sources only")
    handler = partial(Silent, directory=str(built / "_build" / "html"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def visit(page: str) -> tuple[str, list[str], set[str]]:
        served, opened = f"http://127.0.0.1:{server.server_port}", built / "_build" / "html"
        address = opened.as_uri() if page.startswith("file:") else served
        # The proxy is a closed port: every request that leaves this machine fails.
        flags = ["--proxy-server=http://127.0.0.1:9", f"--user-data-dir={tmp_path / 'profile'}"]
        flags += [f"--log-net-log={tmp_path / 'net.json'}", "--virtual-time-budget=10000"]
        command = [
            CHROMIUM,
            *QUIET,
            *flags,
            "--dump-dom",
            f"{address}/{page.removeprefix('file:')}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        wrong = re.compile("error|uncaught|refused|blocked|fail", re.IGNORECASE)
        return (
            done.stdout,
            list(filter(wrong.search, console)),
            page_requests(tmp_path / "net.json"),
        )

    yield visit
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "page", ["book/index.html", "file:book/index.html"], ids=["served", "opened"]
)
def test_mathematics_and_figures_show_without_a_network(browse, page):
    dom, errors, asked = browse(page)
    assert errors == [] and asked == set()
    assert dom.count("<mjx-container") >= 2
    assert "mjx-c" in dom and re.search(r"<img[^>]+_images/\w+\.png", dom)


@pytest.mark.parametrize("page", ["search.html", "file:search.html"], ids=["served", "opened"])
def test_search_finds_a_word_without_a_network(browse, page):
    dom, errors, asked = browse(f"{page}?q=equation")
    assert errors == [] and asked == set()
    assert "found 1 page" in dom and "book/index.html" in dom


def test_a_request_to_another_host_is_noticed(browse, built):
    """The two tests above can fail: a page that asks for more is seen to."""
    page = built / "_build" / "html" / "foreign.html"
    page.write_text('<img src="http://cdn.example/x.png"><script>undefinedName()</script>')
    try:
        _, errors, asked = browse("foreign.html")
    finally:
        page.unlink()
    assert asked == {"http://cdn.example/x.png"}
    assert any("undefinedName" in error for error in errors)


# README


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_names_files_that_exist():
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:toml|yml|cff|md|lock|csv))`", readme())
    made = (".venv", "_build", "out")
    missing = [n for n in named if not n.startswith(made) and not (ROOT / n).exists()]
    assert len(named) > 10
    assert missing == []


def test_readme_names_commands_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", readme())) <= targets


def printed_commands(text: str) -> list[tuple[str, list[str]]]:
    """(chapter, arguments) of each papermill command with an output that a text prints."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"papermill (book/\w+)\.ipynb \w+\.ipynb([^`\n]*)", text)
    return [(chapter, shlex.split(rest)) for chapter, rest in found]


def passed(arguments: list[str], text: str) -> dict[str, object]:
    """Parameters (name -> value) of -p, -y and -f; a file is the YAML block that `text` shows."""
    given, rest = {}, (flag for flag in arguments if flag != "--log-output")  # it takes no value
    for flag in rest:
        assert flag in {"-p", "-y", "-f"}, flag
        value = next(rest)
        if flag == "-p":
            given[value] = next(rest)
        elif flag == "-y":
            given |= yaml.safe_load(value)
        else:
            given |= yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    return given


def wrong_commands(text: str) -> list[str]:
    """What is wrong with a text's papermill commands: unknown parameters, recompute of nothing."""
    problems = []
    for chapter, arguments in printed_commands(text):
        given = passed(arguments, text)
        declared = build.declared_parameters(ROOT / f"{chapter}.ipynb")
        problems += [f"{chapter} has no {name}" for name in sorted(given.keys() - declared)]
        if given.get("recompute") and "profile" not in given:
            problems.append(f"{chapter}: recompute without a profile")
    return problems


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.ipynb"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_printed_commands_pass_parameters_that_exist(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert len(printed_commands(text)) == len(re.findall(r"papermill book/\w+\.ipynb \w", text))
    assert wrong_commands(text) == []


def test_readme_prints_commands():
    flags = {flag for _, arguments in printed_commands(readme()) for flag in arguments}
    assert {"-p", "-y", "-f"} <= flags


@pytest.mark.parametrize(("command", "problem"), [
    ("-p profil smoke", "has no profil"),
    ('-y "{options: {a: 1}, seed: [1]}"', "has no seed"),
    ("-p profile cpu \\\n    -p prepared x", "has no prepared"),
    ("-f a.yml`\n```yaml\nrate: 1\n```", "has no rate"),
    ("-p recompute True", ": recompute without a profile"),
])  # fmt: skip
def test_a_command_that_fails_is_noticed(command, problem):
    text = f"`papermill book/on_policy.ipynb out.ipynb {command}`"
    assert wrong_commands(text) == [f"book/on_policy{'' if problem[0] == ':' else ' '}{problem}"]


def test_what_stands_below_a_figure_is_no_figure():
    """MyST-NB would give every output of the cell the figure's name and caption."""
    image = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    link = nbformat.v4.new_output("display_data", {"text/markdown": "[numbers](a.csv)"})
    meta = {"mystnb": {"figure": {"name": "fig-a", "caption": "A"}}}
    cell = nbformat.v4.new_code_cell("draw()", outputs=[image, link], metadata=meta)
    other = nbformat.v4.new_code_cell("show()", outputs=[link])
    text = nbformat.writes(nbformat.v4.new_notebook(cells=[cell, other]))
    split = nbformat.reads(build.one_figure_each(text), as_version=4)
    assert [[*(o.data for o in c.outputs)] for c in split.cells] == [
        [image.data], [link.data], [link.data],
    ]  # fmt: skip
    assert ["mystnb" in c.metadata for c in split.cells] == [True, False, False]
    assert build.one_figure_each(text) == build.one_figure_each(text)
