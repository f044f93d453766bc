"""What the documentation says about the code: every block runs or is parsed, every link and option is there."""

import argparse
import ast
import configparser
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import acd_logits
from acd_logits import ACDLogitsProcessor
from acd_logits.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
WRITTEN = [page for page in ROOT.glob("docs/**/*.md") if page.name not in ("report.md", "families.md")]  # by hand
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    return [match[2] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match[1] in languages]


def examples(page):
    """Each Python block of a page, and the output that stands behind it, if any."""
    found = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    for block, behind in zip(found, [*found[1:], None], strict=True):
        if block[1] == "python":
            yield block[2], behind[2] if behind and behind[1] == "text" else None


# -- code ---------------------------------------------------------------------------------------------------------


PYTHON = [
    pytest.param(code, id=f"{name(page)}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_compile_and_import_what_is_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.real_model
def test_readme_example_in_an_empty_folder(tmp_path):
    """With `README_PYTHON`, in another environment, where a wheel is installed (make dist)."""
    (code, printed), *_ = examples(ROOT / "README.md")
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    python, environment = sys.executable, dict(os.environ)
    if "README_PYTHON" in environment:
        python = environment["README_PYTHON"]
        environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [python, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == printed.strip()


@pytest.mark.real_model
@pytest.mark.parametrize("page", ["quickstart.md", "explaining.md"])
def test_pages_print_what_they_say(page):
    namespace = {}
    for code, printed in examples(ROOT / "docs" / page):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, page, "exec"), namespace)
        assert output.getvalue().strip() == (printed or "").strip()


# -- commands -----------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a command once its arguments are parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Run a command up to its argument parser; returns the parser. A usage error raises SystemExit."""

    def run(command, *argv):
        parse_args = argparse.ArgumentParser.parse_args

        def stop(parser, args=None, namespace=None):
            parse_args(parser, args, namespace)
            raise Parsed(parser)

        with monkeypatch.context() as patch, pytest.raises(Parsed) as stopped:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [str(command), *argv])
            command(list(argv)) if callable(command) else runpy.run_path(str(command), run_name="__main__")
        return stopped.value.args[0]

    return run


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.partition(" > ")[0], comments=True)
                if words:
                    yield pytest.param(words, id=f"{name(page)}: {' '.join(words)[:60]}")


def make_targets():
    return re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_accepted(words, parse):
    while "=" in words[0] and words[0].partition("=")[0].isidentifier():
        words = words[1:]
    program, *arguments = words
    scripts = [word for word in words if word.endswith(".py") and not word.startswith("tests/")]
    if program == "acd-logits":
        parse(main, *arguments)
    elif scripts and program in ("python", "accelerate"):
        assert (ROOT / scripts[0]).is_file()
        parse(ROOT / scripts[0], *words[words.index(scripts[0]) + 1 :])
    elif program == "make":
        assert arguments[0] in make_targets()
    elif program == "inspect":
        (entry,) = importlib.metadata.entry_points(group="inspect_ai", name="acd_logits")
        assert callable(getattr(entry.load(), arguments[1].removeprefix("acd_logits/")))
    elif program.endswith("python") and arguments[0] == "-m":
        assert arguments[1].startswith("vllm.") or importlib.util.find_spec(arguments[1])
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("tests/"))
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        named = {extra for word in words for extra in re.findall(r"^\.\[(.+)\]$", word)}
        assert {extra for some in named for extra in some.split(",")} <= set(setup["options.extras_require"])
    else:
        assert program in ("hf", "vllm", "curl", "export", ".venv/bin/pre-commit")


def test_a_wrong_option_is_noticed(parse):
    with pytest.raises(SystemExit):
        parse(main, "generate", "--no_such_option", "1")
    with pytest.raises(SystemExit):
        parse(ROOT / "scripts/train.py", "--no_such_option", "1")


# -- API reference ------------------------------------------------------------------------------------------------


def documented_objects():
    for page in ROOT.glob("docs/api/*.md"):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^::: (\S+)\n((?:    .*\n)*)", text + "\n", re.MULTILINE):
            members = re.search(r"members: \[(.*)\]", match[2])
            yield pytest.param(match[1], members[1].split(", ") if members else [], id=match[1])


@pytest.mark.parametrize(("path", "members"), list(documented_objects()))
def test_api_pages_name_what_is_there(path, members):
    """A strict build does not notice a member that has moved away: it leaves it out."""
    if path.startswith("acd_logits.vllm.") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    found = pkgutil.resolve_name(path)
    assert [member for member in members if not hasattr(found, member)] == []


# -- options ------------------------------------------------------------------------------------------------------


def section(heading):
    """The text of options.md below a heading."""
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def documented(heading, names):
    text = section(heading)
    return [name for name in names if not re.search(rf"`{re.escape(name)}[` ]", text)]


def test_options_of_the_processor():
    parameters = list(inspect.signature(ACDLogitsProcessor).parameters)
    assert documented("The processor", parameters[2:]) == []  # behind the model and the pair


COMMANDS = ["generate", "chat", "explain", "demo", "anchors", "evaluate", "push", "export", "export-vllm", "serve"]


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_commands(command, parse):
    parser = parse(main, "generate", "a prompt")
    (choices,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    assert {*COMMANDS, "train", "distil"} == set(choices)
    heading = "generate, chat and explain" if command in ("generate", "chat", "explain") else command
    options = [option for action in choices[command]._actions for option in action.option_strings]
    missing = documented(f"acd-logits {heading}", [option for option in options if option not in ("-h", "--help")])
    assert missing == []
    shown = set(re.findall(r"^\|[^|]*?`(--\w+)", section(f"acd-logits {heading}"), re.MULTILINE))
    assert command in ("generate", "chat", "explain") or shown <= set(options)


def test_options_of_training():
    from acd_logits.training import OPOArguments, OPOTrainingArguments

    names = [field.name for field in dataclasses.fields(OPOArguments)]
    names += [name for name in vars(OPOTrainingArguments)["__annotations__"] if not name.startswith("_")]
    assert documented("acd-logits train", [f"--{name}" for name in names]) == []


def test_options_of_distillation():
    from acd_logits.training.distil import DistilArguments, DistilTrainingArguments

    names = [field.name for field in dataclasses.fields(DistilArguments)]
    names += [name for name in vars(DistilTrainingArguments)["__annotations__"] if not name.startswith("_")]
    assert documented("acd-logits distil", [f"--{name}" for name in names]) == []


# -- links, limits ------------------------------------------------------------------------------------------------


def anchors(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("prompts/**/*.md")], ids=name)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and "docs/api" not in path.as_posix():  # those come from docstrings: the strict build sees to them
            assert anchor in anchors(path), link


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_pages_say_what_the_reader_can_do_after_them(page):
    first = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert first.startswith("After this page you")


def test_pages_are_in_the_navigation():
    config = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    missing = [name(page) for page in WRITTEN if page.relative_to(ROOT / "docs").as_posix() not in config]
    assert missing == []


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == acd_logits.__version__
