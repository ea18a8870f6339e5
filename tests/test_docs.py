"""The documentation: its quotes are the source, its links lead somewhere, its commands parse, and every option is used."""

import argparse
import ast
import contextlib
import importlib
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "tiny" / "README.md",
    ROOT / "samples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)  # comment above, language, text
SCRIPTS = ("cache", "train", "restore", "degrade", "align", "evaluate", "tiny.pretrain")


def blocks(language):
    """[(page, comment, text)] of all code blocks of a language."""
    found = [(page, *match) for page in PAGES for match in BLOCK.findall(page.read_text())]
    return [(page, comment, text) for page, comment, kind, text in found if kind == language]


def commands():
    """[(page, comment, words)] of each command of a Python script in a bash block; continued lines are one."""
    found = []
    for page, comment, text in blocks("bash"):
        text = re.sub(r'python -c "(.*?)"|<<\'END\'\n.*?\nEND', "", text.replace("\\\n", " "), flags=re.DOTALL)
        for variable, first in re.findall(r"^for (\w+) in (\S+) .*; do$", text, re.MULTILINE):
            text = text.replace(f"${variable}", first)  # a loop's first round
        for line in text.splitlines():
            words = [w for w in shlex.split(line, comments=True) if w != "time"]
            if words[:1] in (["python"], ["torchrun"]):
                found.append((page, comment, words))
    return found


def script(words):
    """The module that a command runs and its arguments; (None, []) for what is none of SCRIPTS."""
    for i, word in enumerate(words):
        if word.removesuffix(".py") in SCRIPTS:
            return word.removesuffix(".py"), words[i + 1 :]
    return None, []


# --- quotes


def source(file, name):
    """The lines of a function or method, Class.method, without its docstring."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node):
        first = node.body[0]
        del lines[first.lineno - node.lineno : first.end_lineno - node.lineno + 1]
    return lines


def is_quote(text, lines):
    """Whether text is a run of these lines, but for the indentation of all of them."""
    n = len(text.splitlines())
    runs = (textwrap.dedent("\n".join(lines[i : i + n])) for i in range(len(lines) - n + 1))
    return text.rstrip("\n") in runs


@pytest.mark.parametrize(("page", "origin", "text"), [pytest.param(*b, id=b[1]) for b in blocks("python")])
def test_a_quote_is_what_the_source_says(page, origin, text):
    file, name = origin.split(": ")
    assert is_quote(text, source(file, name)), f"{page.name} quotes {origin} in words that are not there"
    assert len(text.splitlines()) <= 12


def test_a_quote_that_has_drifted_is_none():
    lines = source("sgcl.py", "perturb")
    assert is_quote("return t * x_hat + (1 - t) * source\n", lines) and is_quote("\n".join(lines), lines)
    assert not is_quote("return t * x_hat + (1 - t) * eps\n", lines) and not is_quote(lines[0] + "\n" + lines[2], lines)


# --- links


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        to = page.parent / path if path else page
        if not target.startswith("http"):
            assert to.exists() and (not anchor or anchor in anchors(to)), f"{page.name}: {target}"


# --- commands


def test_every_command_parses(capsys):
    known = [(page, words, *script(words)) for page, _, words in commands()]
    assert {name for *_, name, _ in known} >= set(SCRIPTS)  # so that the pages are read at all
    for page, words, name, args in known:
        if name:
            try:
                importlib.import_module(name).parse_args(args)
            except SystemExit:
                pytest.fail(f"{page.name}: {' '.join(words)}\n{capsys.readouterr().err}")


def options(name, monkeypatch):
    """{subcommand or "": [the names of each option]} of a script."""
    made, init = [], argparse.ArgumentParser.__init__
    with monkeypatch.context() as m, contextlib.suppress(SystemExit):
        m.setattr(
            argparse.ArgumentParser, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0]
        )
        importlib.import_module(name).parse_args(["-h"])
    subs = [p for p in made if p.prog != made[0].prog]
    parsers = {p.prog.split()[-1]: p for p in subs} if subs else {"": made[0]}
    return {sub: [a.option_strings for a in p._actions if a.option_strings] for sub, p in parsers.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_used_by_a_command(name, monkeypatch, capsys):
    used = [args for _, _, words in commands() for found, args in [script(words)] if found == name]
    for sub, known in options(name, monkeypatch).items():
        given = {word for args in used if not sub or args[:1] == [sub] for word in args}
        unused = [names for names in known if "-h" not in names and not given & set(names)]
        assert not unused, f"{name} {sub}"


def test_the_marks_of_blocks_are_those_of_checked_md():
    for page, mark, _ in blocks("bash"):
        assert re.fullmatch(r"|ci:\w+|quick|not run: .+", mark), f"{page.name}: {mark}"


def test_the_quick_commands_run(request, tmp_path):
    if not request.config.getoption("--commands"):
        pytest.skip("the quick commands of the documentation take a minute or two: pytest --commands")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("nets", "evaluation", "plumbing", "tiny", "samples", "docs"):
            (tmp_path / path.name).symlink_to(path)  # what they write lies beside
    for _, mark, text in blocks("bash"):
        if mark == "quick":
            subprocess.run(["bash", "-exo", "pipefail", "-c", text], cwd=tmp_path, check=True)
