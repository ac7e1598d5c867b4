"""The text of `sd35bench run --help`, made from the table of fields and the YAML files."""

import textwrap
from pathlib import Path

from sd35bench.config.fields import FIELDS, Field
from sd35bench.config.files import GROUPS, choices

__all__ = ["run_help"]

HEAD = """sd35bench run: make images, time them, keep them in a study

Usage: sd35bench run [FLAGS] NAME=VALUE ...

Examples:
  sd35bench run steps=28 cfg=4 prompts.limit=4
      one setting of the embedded model, four prompts
  sd35bench run -m steps=4,16,28 cfg=1,4,7 seed=0,1 prompts.limit=16 study=grid
      a grid; the model is loaded once
  sd35bench run -m prompt_strength=0.3,0.6,0.9 prompts.task=edit study=edits
      image-to-image on the embedded model's edit pairs
  sd35bench run -m backend=eager,eager-bf16 batch_size=16 study=backends
      one load per backend
  sd35bench run model=sd35-medium model.path=models/sd35-medium prompts=file prompts.path=my.csv
      a real checkpoint and your own prompts
  sd35bench run model=sd35-medium backend=eachlabs prompts.limit=20 remote.max_cost_usd=1
      a hosted service, with a budget; the key comes from EACHLABS_API_KEY
  sd35bench run experiment=demo --dry-run
      what a stored sweep would do and take

The same command again makes only what is missing; failed images are tried again.

Flags:
  -m               sweep: comma lists become a grid (anywhere on the line)
  --dry-run        print trials, time, disk and money; write and load nothing
  --json           one JSON document on stdout, everything else on stderr
  --config-dir DIR a folder with YAML files of your own (DIR/model/mine.yaml ...)
  --yes            agree to spend money, where a backend costs any
  --help           this text
"""
TAIL = """Values with commas, colons or quotes go in quotes: 'negative_prompt="blurry, dark"'
Exit codes: 0 done, 2 wrong input, 3 interrupted, paused or some images failed (run again), 4
other.
"""
WIDTH = 24
COLUMNS = 98


def run_help(extra: Path | None = None) -> str:
    """All override names with type, range and default, and every group's choices."""
    parts = [HEAD, "Groups:"]
    for group in GROUPS:
        if group in ("metric", "profile"):
            continue
        parts.append(_wrapped(group + "=", ", ".join(choices(group, extra))))
    parts.append("  (defaults: model=nano backend=eager, and the model's own prompts)\n")
    parts.append("For each image (all of these can be swept with -m):")
    parts += [_line(field) for field in FIELDS.values() if field.axis]
    parts.append("\nFor the run:")
    parts += [_line(field) for field in FIELDS.values() if not field.axis]
    parts.append(f"  {'backend.OPTION=':<{WIDTH}}the backend's own: see configs/backend/\n")
    parts.append(TAIL)
    return "\n".join(parts)


def _line(field: Field) -> str:
    allowed = _wrapped("", f"{field.takes.allowed}; default: {field.default}")
    return f"{_wrapped(field.name + '=', field.means)}\n{allowed}"


def _wrapped(head: str, text: str) -> str:
    """`head`, and `text` in a column beside it; below it where `head` is too long."""
    margin = " " * (WIDTH + 2)
    body = textwrap.fill(
        text, COLUMNS, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    first = f"  {head:<{WIDTH}}"
    return f"{first}\n{body}" if len(first) > len(margin) else first + body.removeprefix(margin)
