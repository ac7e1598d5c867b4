"""What every test shares: which ones are too long for `make check`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = ("backends", "nano", "test_kill.py", "test_notebook.py", "test_cli.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs the embedded model, or many processes: minutes together, so not in check."""
    for item in items:
        if item.path.relative_to(HERE).parts[0] in MODEL:
            item.add_marker(pytest.mark.model)
