"""README.md and the pages of docs/: their Python code runs, their commands parse, what they name exists."""

from __future__ import annotations

import pkgutil
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
import typer.main

from dat_service.cli.main import app
from dat_service.settings import OTHER_VARIABLES, Settings
from dat_workers.codecs.registry import REGISTRY
from tests.conftest import ROOT
from tests.docs.pages import OTHERS, PAGES, Block, anchors, blocks, commands, links, spans, text_of

PYTHON = [block for page in PAGES for block in blocks(page, "python")]
MOST_NOT_RUN = 0  # blocks marked `not-run`: raise it only for a block that no machine of ours could run
WITH_CODE = ("README.md", "client.md", "codecs.md", "precompute.md", "safety.md", "serving.md", "training.md")

CHANGELOG = Path("CHANGELOG.md")  # names removed commands too

_namespaces: dict[Path, dict[str, Any]] = {}
_finished: set[Block] = set()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_runs(block: Block, ray_url: str) -> None:
    if block.info.startswith("not-run:"):
        pytest.skip(block.info)
    package = block.info.removeprefix("needs=")
    if block.info and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for earlier in blocks(block.page, "python"):  # so that a single block can be selected with -k
        if earlier.line < block.line and not earlier.info and earlier not in _finished:
            _run(earlier, ray_url)
    _run(block, ray_url)


def _run(block: Block, url: str) -> None:
    """Runs a block in the namespace that all blocks of its page share."""
    code = block.code.replace("127.0.0.1:8000", urlsplit(url).netloc)
    compiled = compile("\n" * (block.line - 1) + code, block.page, "exec")
    with warnings.catch_warnings():
        if block.info:
            warnings.simplefilter("ignore")  # Lightning's own imports warn
        exec(compiled, _namespaces.setdefault(block.page, {"__name__": "__main__"}))
    _finished.add(block)


def test_blocks_are_found_and_few_are_not_run() -> None:
    assert {block.page.name for block in PYTHON} >= set(WITH_CODE)
    assert len(PYTHON) >= 20
    not_run = [block for block in PYTHON if block.info and not re.fullmatch(r"needs=\w+", block.info)]
    assert len(not_run) <= MOST_NOT_RUN, [(block.name, block.info) for block in not_run]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        if words[0] == "dat":
            parse(words)
        elif words[0] == "make":
            assert words[1] in targets(), words
        elif words[0] == "python":
            check_script(words)
        else:
            assert words[0] in ("curl", "kill"), f"{words}: add a check for this program"


@pytest.mark.parametrize("page", [*PAGES, *(page for page in OTHERS if page != CHANGELOG)], ids=str)
def test_named_commands_exist(page: Path) -> None:
    for span in spans(page):
        words = span.split()
        if words[0] == "dat" and len(words) > 1:
            find(words)
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in targets(), span
        elif words[0] == "python" and len(words) > 1 and words[1:3] != ["-m", "pytest"]:
            check_script(words)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=str)
def test_links_and_named_files_exist(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert (ROOT / linked).exists(), target
        assert not anchor or anchor in anchors(linked), target
    top = {path.name for path in ROOT.iterdir()}
    for word in " ".join(spans(page)).split():
        if re.fullmatch(r"[\w.-]+(/[\w.*-]*)+", word) and word.partition("/")[0] in top:
            assert list(ROOT.glob(word.rstrip("/"))), word


@pytest.mark.parametrize("page", [*PAGES, *(page for page in OTHERS if page != CHANGELOG)], ids=str)
def test_named_python_objects_exist(page: Path) -> None:
    for span in spans(page):
        found = re.match(r"dat_(client|workers|service)(\.\w+)+", span)
        if found and "lightning" not in span:  # which may not be installed
            pkgutil.resolve_name(found[0])


def test_readme_begins_with_its_picture_and_links_every_page() -> None:
    lines = text_of(PAGES[0]).splitlines()
    assert next(n for n, line in enumerate(lines, 1) if "docs/demo.png" in line) <= 25
    assert {Path(target.partition("#")[0]) for target in links(PAGES[0])} >= set(PAGES[1:])


def test_codecs_lists_every_codec() -> None:
    row = r"^\| `([\w-]+)` \| (\d+) \| (\S+) \| (\S+) \| (\S+)"
    found = {name: facts for name, *facts in re.findall(row, text_of(Path("docs/codecs.md")), re.M)}
    expected = {}
    for name, spec in REGISTRY.items():
        tokens = (spec.codebook_size, spec.latent_dim) if spec.has_tokens else ("–", "–")
        expected[name] = [str(fact) for fact in (spec.factor, *tokens)]
    assert {name: facts[:3] for name, facts in found.items()} == expected


def test_every_slow_test_has_a_make_target() -> None:
    recipes = re.findall(r"-m slow (.*)$", (ROOT / "Makefile").read_text(), re.M)
    paths = [ROOT / path for recipe in recipes for path in recipe.partition("--ignore")[0].split()]
    paths.append(ROOT / "tests/examples")  # make test-examples runs the quick ones too
    mark = re.compile(r"^(pytestmark = |@)pytest\.mark\.slow", re.M)
    slow = [path for path in (ROOT / "tests").rglob("test_*.py") if mark.search(path.read_text())]
    assert len(slow) >= 8
    assert [path for path in slow if not any(path.is_relative_to(folder) for folder in paths)] == []


def test_serving_lists_every_setting() -> None:
    rows = dict(re.findall(r"^\| `DAT_(\w+)` \| (\S+) \|", text_of(Path("docs/serving.md")), re.M))
    defaults = {name.upper(): field.default for name, field in Settings.model_fields.items()}
    expected = {name: "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                for name, value in defaults.items()}  # fmt: skip
    assert rows == expected
    for name in OTHER_VARIABLES:
        assert f"`{name}`" in text_of(Path("docs/serving.md"))


def test_a_wrong_flag_or_verb_is_found() -> None:
    parse(["dat", "serve", "--port", "8000"])
    for wrong in (
        "dat serve --prot 8000",
        "dat serv",
        "dat serve --port many",
        "dat precompute only-one",
        "dat bench",
    ):
        with pytest.raises((typer.BadParameter, AssertionError)):
            parse(wrong.split())
    for wrong in ("python benchmarks/none.py", "python -m benchmarks.none", "python -m benchmarks.service --jsn x"):
        with pytest.raises(AssertionError):
            check_script(wrong.split())


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `dat ...` words name, and its arguments. Fails for verbs and flags that do not exist."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        if rest[0].startswith("-"):
            break
        assert rest[0] in command.commands, f"{' '.join(words)}: no such command"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    for word in rest:
        if re.match(r"--?[a-zA-Z]", word):
            assert word.partition("=")[0] in known, f"{' '.join(words)}: no such flag as {word}"
    return command, rest


def parse(words: list[str]) -> None:
    """Parses `dat ...` without running it. Raises typer.BadParameter where arguments are missing or wrong."""
    command, rest = find(words)
    assert not hasattr(command, "commands"), f"{' '.join(words)}: names a group of commands"
    command.make_context(words[1], list(rest))


def check_script(words: list[str]) -> None:
    """Checks that `python FILE ...` or `python -m MODULE ...` exists and that its parser has the flags."""
    is_module = words[1] == "-m"
    script = ROOT / (words[2].replace(".", "/") if is_module else words[1])
    files = list(script.glob("*.py")) if script.is_dir() else [script.with_suffix(".py")]
    assert all(file.is_file() for file in files), words
    assert not script.is_dir() or (script / "__main__.py") in files, words
    source = "".join(file.read_text() for file in [*files, ROOT / "examples/training/arguments.py"])
    for word in words[3 if is_module else 2 :]:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{words}: no flag {word}"
