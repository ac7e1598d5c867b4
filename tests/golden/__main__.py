"""Golden files: `python -m tests.golden` compares, `--write` makes them anew, `--keep DIR` keeps.

`--write` is for changes of the output that are meant; look at `git diff tests/golden` afterwards.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import outputs
from tests.golden.compared import EXPECTED, differences, write


def main() -> int:
    """Compare or write; the exit code is 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {EXPECTED.name}/ anew")
    parser.add_argument("--keep", metavar="DIR", help="write what came into a folder of your own")
    found = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = outputs(Path(folder).resolve())
    if found.keep:
        write(made, Path(found.keep))
    if found.write:
        write(made, EXPECTED)
        return 0
    text = differences(made)
    print(text or f"{len(made)} outputs are as they were")
    return 1 if text else 0


if __name__ == "__main__":
    sys.exit(main())
