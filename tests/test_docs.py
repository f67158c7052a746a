"""What the documentation names exists: files, headings, tests; and its sessions run."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ".", "docs", "examples", "bench", "bench/results"
PAGES = {str(p.relative_to(ROOT)): p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.md"))}
SESSION = re.compile(r"^```python\n(>>> .*?)^```", re.MULTILINE | re.DOTALL)
WITH_SESSIONS = [name for name, page in PAGES.items() if SESSION.search(page.read_text(encoding="utf-8"))]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests are not in a checkout")


def links(text):
    """(text, target) of the links of a page, code left out; a target with an address is another's."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\[([^\[\]]*)\]\(([^()\s]+)\)", text)
    return [(name, target) for name, target in found if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """What headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, text):
    """The links of a page that lead nowhere. One named `test_x` leads to a file that has that test."""
    bad = []
    for name, target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            bad.append(target)
            continue
        content = text if file == page else file.read_text(encoding="utf-8") if file.is_file() else ""
        if anchor and anchor not in anchors(content):
            bad.append(target)
        if re.fullmatch(r"`test_\w+`", name) and not re.search(rf"^def {name[1:-1]}\(", content, re.MULTILINE):
            bad.append(f"{name} in {target}")
    return bad


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    assert not broken(PAGES[name], PAGES[name].read_text(encoding="utf-8"))


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for _, target in links(page.read_text(encoding="utf-8")):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file not in seen:
                todo.append(file)
    assert {page for page in PAGES.values() if page.parent.name == "docs"} <= seen


def test_features_name_every_example():
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    named = {Path(target).name for _, target in links(text) if "examples/" in target}
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("text", ["[a](nowhere.md)", "[a](../nowhere/README.md)", "[a](#nothing)", "[a](../../outside)",
                                  "[a](nn.md#nothing)", "[`test_nothing`](../tests/test_docs.py)"])
def test_the_check_sees_a_broken_link(text):
    page = ROOT / "docs" / "features.md"
    good = "# A heading, here\n[a](nn.md) [b](#a-heading-here) [`test_links`](../tests/test_docs.py) [c](https://x.org/y)\n"
    assert broken(page, good) == [] and len(links(good)) == 3
    assert broken(page, good + text) == broken(page, text) != []


@pytest.mark.parametrize("name", WITH_SESSIONS)
def test_sessions(name, monkeypatch):
    """Blocks with prompts, one after the other."""
    monkeypatch.undo()  # results are not NaN before they are written
    names = {}
    for number, block in enumerate(SESSION.findall(PAGES[name].read_text(encoding="utf-8"))):
        test = doctest.DocTestParser().get_doctest(block, names, f"{name}, block {number}", name, 0)
        result = doctest.DocTestRunner().run(test, clear_globs=False)
        names.update(test.globs)
        assert result.attempted and not result.failed


def test_there_are_sessions():
    assert "docs/nn.md" in WITH_SESSIONS
