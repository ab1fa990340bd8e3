"""A variant of a user's own: the example of docs/own_adapter.md, made known as the page says."""

import re
from pathlib import Path

import pytest

from effitrain.adapters.variants import OWN

PAGE = Path(__file__).parents[2] / "docs" / "own_adapter.md"


@pytest.fixture(scope="session")
def example() -> str:
    """The source of ``gated.py``, as the page has it."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.fixture
def own_folder(example, tmp_path, monkeypatch) -> Path:
    """The folder that the environment names, with that file in it."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "gated.py").write_text(example, encoding="utf-8")
    monkeypatch.setenv(OWN, str(folder))
    return folder
