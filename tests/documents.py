"""The documents of the repository taken apart: headings, links, shell commands.

A shell command is a line of a fenced ``bash`` block; lines that end with a backslash go on, and
`&&` joins commands. A comment `# exit code N` says which code a command ends with.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(?P<ticks>```+)(?P<kind>\w*)\n(?P<body>.*?)^(?P=ticks)$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PROGRAM = "sd35bench"


@dataclass(frozen=True, slots=True)
class Shell:
    """One command of a document: where it stands, its words, the exit code that it says."""

    page: str
    words: tuple[str, ...]
    code: int

    @property
    def program(self) -> str:
        """The command's name, without a folder before it."""
        return Path(self.words[0]).name

    @property
    def text(self) -> str:
        """The command, as a test's name."""
        return f"{self.page}: {' '.join(self.words)}"


def pages() -> list[Path]:
    """All documents that people read, README first."""
    beside = ("README.md", "CONTRIBUTING.md", "results/README.md", "kernels/README.md")
    found = [ROOT / name for name in (*beside, "sd35bench/nano/README.md")]
    return [*found, *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    """Bodies of a page's fenced blocks of one kind."""
    found = _FENCE.finditer(page.read_text())
    return [match["body"] for match in found if match["kind"] == kind]


def prose(page: Path) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return _LINK.findall(_FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: headings, as GitHub and MkDocs spell them."""
    lines = _FENCE.sub("", page.read_text()).splitlines()
    heads = [line.lstrip("#").strip() for line in lines if re.match(r"#{1,6} ", line)]
    return {_slug(head) for head in heads}


def _slug(head: str) -> str:
    plain = re.sub(r"\]\([^)]*\)", "", head).lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain)).strip("-")


def commands(page: Path) -> Iterator[Shell]:
    """Every command of a page's shell blocks, in order."""
    name = page.relative_to(ROOT).as_posix()
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            code = re.search(r"# exit code (\d)", line)
            ended = 0 if code is None else int(code[1])
            for words in _split(line):
                yield Shell(name, tuple(words), ended)


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line; what follows a pipe, `||` or a redirection is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    words: list[str] = []
    skipping = False
    for word in lexer:
        if word in ("&&", ";"):
            if words:
                yield words
            words, skipping = [], False
        elif word in ("|", "||", ">", ">>"):
            skipping = True
        elif not skipping:
            words.append(word)
    if words:
        yield words


def spans(page: Path) -> list[list[str]]:
    """Code spans within sentences that are commands of ours: their words."""
    text = _FENCE.sub("", page.read_text())
    found = (_split(span) for span in re.findall(r"`(sd35bench [a-z][^`]*)`", text))
    return [words for split in found for words in split if len(words) > 1]
