"""docs/security.md names a test for each line, and each of them exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_line_of_the_table_names_a_test_that_exists():
    lines = (ROOT / "docs/security.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        found = NAMED.findall(row)
        assert found or row.startswith("| you, "), row
        for file, name in found:
            assert f"def {name}(" in (ROOT / file).read_text(), row
