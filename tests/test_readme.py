"""The README's code, as a reader would paste it: all blocks in order, one session."""

import re

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)\)")


def python_blocks(text):
    """Code blocks, each behind as many empty lines as make its line numbers right."""
    return [
        "\n" * text[: match.start(1)].count("\n") + match[1]
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.filterwarnings("ignore:calibrate keeps the network's own probabilities")
def test_the_code_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README.read_text())
    assert blocks
    session = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, README, "exec"), session)


def test_a_failing_block_is_reported_by_its_line_in_the_readme():
    (block,) = python_blocks(
        "one\n\n```sh\nmake\n```\n\n```python\nx = 1\n1 / 0\n```\n"
    )
    with pytest.raises(ZeroDivisionError) as error:
        exec(compile(block, "README.md", "exec"), {})
    assert error.traceback[-1].lineno + 1 == 9


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_repository_lead_somewhere(page):
    targets = LINK.findall((ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
