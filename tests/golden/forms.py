"""Outputs in a form that is alike on every machine, and reads well where it differs."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIGITS = 7
"""Significant digits of a number in JSON: linear algebra differs in the last ones by machine."""

_DATA = re.compile(r"data:([\w/+.-]+);base64,([A-Za-z0-9+/=]+)")
_BLOCK = re.compile(r"<(style|script)\b([^>]*)>(.*?)</\1>", re.DOTALL)
_SVG = re.compile(r"<svg\b.*?</svg>", re.DOTALL)


def json_text(document: Any) -> str:
    """A document, one value a line, keys sorted, numbers rounded."""
    return json.dumps(_rounded(document), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value


def html_text(page: str) -> str:
    """A page, one tag a line; images, styles, scripts and charts by their hash.

    Of a chart the texts stand beside the hash.
    """
    page = _DATA.sub(lambda m: f"data:{m[1]},{_image_hash(m[2])}", page)
    page = _BLOCK.sub(lambda m: f"<{m[1]}{m[2]}>#{_hash(m[3])}</{m[1]}>", page)
    page = _SVG.sub(_chart, page)
    page = re.sub(r">\s*<", ">\n<", page)
    return "\n".join(line.strip() for line in page.splitlines() if line.strip()) + "\n"


def _chart(match: re.Match[str]) -> str:
    texts = re.findall(r">([^<>]+)<", match[0])
    words = "\n".join(" ".join(t.split()) for t in texts if t.strip())
    return f"<svg>#{_hash(match[0])}\n{words}\n</svg>"


def _image_hash(data: str) -> str:
    """Of the pixels where it is an image, since encoders differ by version."""
    raw = base64.b64decode(data)
    try:
        with Image.open(io.BytesIO(raw)) as image:
            raw = np.asarray(image.convert("RGB")).tobytes()
    except OSError:
        pass
    return _hash_bytes(raw)


def _hash(text: str) -> str:
    return _hash_bytes(text.encode("utf-8", "replace"))


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def neutral(text: str, here: Path, masks: Mapping[str, str]) -> str:
    """Take this run's folder and what `masks` (pattern → word) matches out of a text."""
    text = text.replace(str(here), "<here>")
    for pattern, word in masks.items():
        text = re.sub(pattern, word, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + ("\n" if text else "")
