"""Truth about the truth: coverage of every interval that a verdict rests on, A/A alarms, power.

    python -m tests.validity                    every table of docs/validity.md's upper part
    python -m tests.validity shares --seed 7    one of them, from a fresh seed
    python -m tests.validity page [TABLE ...]   measure them and put them into the page

Truth is known by construction (values are drawn from it) or by brute force (all of nano's values
on a grid are kept). All repetitions of a cell are columns of one call to the gate's own functions.
"""

import argparse

from tests.validity.page import markdown, tables, write

SEED = 20261123


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.validity", description=__doc__, formatter_class=form
    )
    known = tables(SEED)
    parser.add_argument("table", nargs="*", help=f"page, {', '.join(known)}; default: every table")
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    into_page = given.table[:1] == ["page"]
    names = given.table[1:] if into_page else given.table
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown table {unknown[0]!r}; known: {', '.join(known)}")
    names = names if names else list(known)
    if into_page:
        write(names, given.seed)
        return
    for name in names:
        print(f"\n## {name}, seed {given.seed}\n", flush=True)
        for line in markdown(tables(given.seed)[name]()):
            print(line, flush=True)


if __name__ == "__main__":
    main()
