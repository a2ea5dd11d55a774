"""The README and the other pages: their snippets run, their commands and files exist, their table is the registry's."""

import re
import shlex
from pathlib import Path

import pytest

from dinat_triton.cli import parse
from dinat_triton.commands import models

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<needs><!-- needs .* -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """Its code in a language, and whether it needs something that a test does not have."""
    found = BLOCK.finditer(page.read_text())
    return [(m["text"], m["needs"] is not None) for m in found if m["language"] == language]


def commands(page: Path) -> list[str]:
    lines = "".join(text for text, _ in blocks(page, "")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(("dinat-triton ", "make ", "bench/"))]


@pytest.fixture
def _restored():
    """Snippets may repair transformers for good."""
    yield
    from dinat_triton.integrations.transformers import disable

    disable()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": page.stem}
    for text, needs_more in blocks(page, "python"):
        # Weights come from the network.
        code = compile(text.replace(", pretrained=True)", ")"), str(page), "exec")
        if not needs_more:
            exec(code, scope)


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_commands_exist(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "dinat-triton":
        assert callable(parse(arguments).run)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert (ROOT / program).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_tables_of_models_are_the_registry() -> None:
    rows = list(models.published())
    assert models.as_markdown(rows) in (ROOT / "docs/models.md").read_text()
    tables = (ROOT / "README.md").read_text()
    for row in rows:
        name = row[0].partition(".")[0]
        if f"\n| {name} |" in tables and row[5]:
            assert f"\n| {' | '.join((name, *row[1:]))} |" in tables
