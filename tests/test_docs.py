"""Every block of code of the documentation runs and prints what stands below it; links and names lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import spartan
import spartan_kernels
from tests import pages
from tests.pages import PAGES, ROOT, Block

TRAINERS = ("transformers", "accelerate", "lightning", "peft")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> list[Block]:
    return pages.blocks(page.read_text(encoding="utf-8"))


SCRIPTS = [(page, block) for page in PAGES for block in code_of(page) if block.script]
STORIES = [page for page in PAGES if any(not block.script for block in code_of(page))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", STORIES, ids=name_of)
def test_the_code_of_a_page_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order and in one namespace, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in code_of(page):
        if block.script:
            continue
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        assert pages.matches(printed, block.printed or ""), f"{name_of(page)}:{block.line} printed\n{printed}"


@pytest.mark.parametrize(("page", "block"), SCRIPTS, ids=[b.script[1] if b.script else "" for _, b in SCRIPTS])
def test_scripts_print_what_the_page_says(page: Path, block: Block, tmp_path: Path) -> None:
    for package in TRAINERS:
        if re.search(rf"^(import|from) {package}\b", block.code, re.M) and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: the extra `integrations`")
    if "torch.distributed" in block.code and not dist.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    assert block.printed is not None, f"{name_of(page)}:{block.line} must show what the script prints"
    printed = pages.run_script(block, tmp_path)
    assert pages.matches(printed, block.printed), f"{name_of(page)}:{block.line} printed\n{printed}"


def test_other_output_is_seen() -> None:
    assert pages.matches("0.901 of 3\n", "0.90... of 3\n")
    assert not pages.matches("0.911 of 3\n", "0.90... of 3\n")
    assert not pages.matches("0.901 of 3\nmore\n", "0.90... of 3\n")


@pytest.mark.parametrize("text", ["```text\n1\n```\n", "```python\nprint(1)\n```\n\nWords.\n\n```text\n1\n```\n"])
def test_text_that_no_code_prints_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must stand right below"):
        pages.blocks(text)


def test_code_that_nobody_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'pycon'"):
        pages.blocks("```pycon\n>>> 1\n```\n")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page.read_text(encoding="utf-8")):
        place, _, section = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        if section:
            assert section in pages.sections(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    lengths = [len(sentence.split()) for sentence in pages.sentences(page.read_text(encoding="utf-8"))]
    assert sum(lengths) <= 25 * len(lengths), f"{sum(lengths) / len(lengths):.1f} words a sentence"


def test_public_names_are_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)}
    assert {*spartan.__all__, *spartan.layers.__all__, *spartan_kernels.__all__} - {"__version__"} <= documented


def test_methods_are_in_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    methods = {name for name in spartan.__all__ if issubclass(type(getattr(spartan, name)), type)}
    methods = {name for name in methods if issubclass(getattr(spartan, name), spartan.methods.Method)}
    assert methods <= set(re.findall(r"^\| \[?`(\w+)`", text, re.M))


def test_docstrings_become_markup() -> None:
    pytest.importorskip("sphinx", reason="the extra `docs`")
    pytest.importorskip("latex2mathml", reason="the extra `docs`")
    spec = importlib.util.spec_from_file_location("site_extensions", ROOT / "docs" / "site_extensions.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    assert site.escaped("|x| * y_ and `|a|_`") == r"\|x\| \* y\_ and `|a|_`"
    lines = ["Sum.", "", "    a * b", "", "Then *args.", "", "Args:", "    x: |x|."]
    assert site.as_markup(lines) == [
        *("Sum.", "", "::", "", "    a * b", ""),
        *(r"Then \*args.", "", "Args:", r"    x: \|x\|."),
    ]
