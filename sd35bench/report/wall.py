"""The image wall: a seeded, balanced choice of pairs, small enough to travel inside the report.

A pair (same prompt, seed, init image) enters with all its settings or not at all, so that any two
settings can be laid side by side. Prompts are dealt level by level, two seeds each before a third.
"""

import base64
import io
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sd35bench import words
from sd35bench.analysis.settings import PairKey, pair_keys
from sd35bench.analysis.table import GUARD
from sd35bench.columns import Scores, Some, numbers, texts
from sd35bench.errors import StoreError
from sd35bench.prompts import encoder_fields
from sd35bench.report.rows import Row, metric_label, metric_rank
from sd35bench.store import Study
from sd35bench.types import Record, Status

MAX_TILES = 480
MAX_BYTES = 3_000_000
"""Cap on the encoded images, in characters of base64; the whole report stays below 5 MB."""
_LONGEST_PX = 256
_PIXEL_ART_PX = 128
_SEEDS_FIRST = 2
_MIN_PAIRS = 4


def build_wall(
    study: Study,
    rows: Sequence[Row],
    matched: Mapping[str, Some],
    preferred: Sequence[str],
    extra: Sequence[str],
) -> dict[str, Any]:
    """JSON-ready wall of `study`; `preferred` row ids are never left out.

    `extra` are the setting fields beyond steps, cfg and strength that vary and belong in names.
    """
    shown = _choose_rows(rows, preferred)
    cells = _cells(shown, matched)
    wall = _Wall(study)
    firsts = {pair: dict([next(iter(_whole(by_row, matched)))]) for pair, by_row in cells.items()}
    pairs = choose_pairs(firsts)
    for count, pair in enumerate(pairs):
        if count and wall.is_full(len(cells[pair])):
            break
        wall.add_pair(dict(_whole(cells[pair], matched)))
    wall.add_scores()
    return {
        "settings": [_setting(r, extra) for r in shown],
        "prompts": wall.prompts,
        "tiles": wall.tiles,
        "images": wall.images,
        "note": _note(wall, rows, shown, cells, pairs),
    }


def choose_pairs(cells: Mapping[PairKey, Mapping[str, Record]]) -> list[PairKey]:
    """All pairs in the order in which they enter the wall: balanced by task and level, seeded."""
    groups: dict[tuple[Any, ...], dict[Any, list[PairKey]]] = defaultdict(lambda: defaultdict(list))
    for pair in sorted(cells, key=repr):
        record = next(iter(cells[pair].values()))
        level = record.trial.prompt.level or ""
        groups[record.trial.request.task, level][pair[0], pair[1], pair[5]].append(pair)
    queues = []
    for group in sorted(groups, key=repr):
        prompts = sorted(groups[group].values(), key=repr)
        random.Random(f"wall {group}").shuffle(prompts)
        first = [p for seeds in prompts for p in seeds[:_SEEDS_FIRST]]
        queues.append(first + [p for seeds in prompts for p in seeds[_SEEDS_FIRST:]])
    return _round_robin(queues, _SEEDS_FIRST)


def _round_robin(queues: Sequence[list[PairKey]], hand: int) -> list[PairKey]:
    """Deal `hand` items from each queue in turn until all are empty."""
    dealt: list[PairKey] = []
    for start in range(0, max((len(q) for q in queues), default=0), hand):
        for queue in queues:
            dealt += queue[start : start + hand]
    return dealt


def _choose_rows(rows: Sequence[Row], preferred: Sequence[str]) -> list[Row]:
    limit = MAX_TILES // _MIN_PAIRS
    if len(rows) <= limit:
        return list(rows)
    others = [r.id for r in rows if r.id not in preferred]
    drawn = random.Random("rows").sample(others, max(0, limit - len(preferred)))
    keep = {*preferred, *drawn}
    return [r for r in rows if r.id in keep]


def _cells(rows: Sequence[Row], matched: Mapping[str, Some]) -> dict[PairKey, dict[str, int]]:
    """Pair → row id → which of its records: the one that quality was read from, of several."""
    cells: dict[PairKey, dict[str, int]] = defaultdict(dict)
    for row in rows:
        records = matched.get(row.id, [])
        scored = texts(records, "status") == Status.OK
        if row.quality_batch_size is not None:
            scored &= numbers(records, "batch_size") == row.quality_batch_size
        else:
            scored[:] = False
        found = zip(pair_keys(records), scored.tolist(), strict=True)
        for number, (pair, is_scored) in enumerate(found):
            if is_scored or row.id not in cells[pair]:
                cells[pair][row.id] = number
    return dict(cells)


def _whole(by_row: Mapping[str, int], matched: Mapping[str, Some]) -> Iterator[tuple[str, Record]]:
    return ((row_id, matched[row_id][number]) for row_id, number in by_row.items())


@dataclass
class _Wall:
    """What has been put up so far."""

    study: Study
    tiles: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    size: int = 0
    pairs: int = 0
    _prompt_ids: dict[Any, int] = field(default_factory=dict)
    _image_ids: dict[str, int] = field(default_factory=dict)

    def is_full(self, more: int) -> bool:
        """Whether so many tiles more are too many."""
        return len(self.tiles) + more > MAX_TILES or self.size > MAX_BYTES

    def add_pair(self, by_row: Mapping[str, Record]) -> None:
        """Add a pair in all its settings."""
        self.pairs += 1
        for row_id, record in by_row.items():
            self.tiles.append(self._tile(row_id, record))

    def add_scores(self) -> None:
        """Give every tile its scores."""
        known = _scores_by_key(self.study, {tile["key"] for tile in self.tiles})
        for tile in self.tiles:
            tile |= known.get(tile["key"], {"scores": [], "parts": []})

    def _tile(self, row_id: str, record: Record) -> dict[str, Any]:
        request = record.trial.request
        tile = {
            "setting": row_id,
            "prompt": self._prompt(record),
            "seed": str(request.seed),  # JavaScript has whole numbers up to 2^53 only
            "width": request.width,
            "height": request.height,
            "image": self._image(record.image, is_init=False),
            "key": record.trial.key,
            "scores": [],
            "parts": [],
        }
        if record.status is not Status.OK:
            tile["error"] = f"{record.status.value}: {record.error or 'no message'}"[:300]
        return tile

    def _prompt(self, record: Record) -> int:
        request, ref = record.trial.request, record.trial.prompt
        own = encoder_fields(request) | {n: ", ".join(v) for n, v in ref.tags.items()}
        identity = (request.prompt, request.negative_prompt, request.init_image, *own.items())
        if identity not in self._prompt_ids:
            self._prompt_ids[identity] = len(self.prompts)
            self.prompts.append(
                {
                    "id": ref.id,
                    "text": request.prompt,
                    "negative": request.negative_prompt,
                    "level": ref.level,
                    "init": self._image(request.init_image, is_init=True),
                    "init_prompt": ref.init_prompt,
                    **({"own": own} if own else {}),
                }
            )
        return self._prompt_ids[identity]

    def _image(self, digest: str | None, *, is_init: bool) -> int | None:
        if digest is None:
            return None
        if digest not in self._image_ids:
            try:
                read = self.study.read_init_file if is_init else self.study.read_image_file
                uri = encode_thumbnail(read(digest))
            except (OSError, StoreError):
                return None
            self._image_ids[digest] = len(self.images)
            self.images.append(uri)
            self.size += len(uri)
        return self._image_ids[digest]


def encode_thumbnail(data: bytes) -> str:
    """Data URI of an image file: lossless WEBP up to 128 px, else at most 256 px, quality 82.

    Decoding and encoding again leaves nothing of the file but pixels.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) <= _PIXEL_ART_PX:
        image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
    else:
        image.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scores_by_key(study: Study, keys: set[str]) -> dict[str, dict[str, Any]]:
    """Trial key → per-image scores [(label, value)] and what the verifier saw [(part, holds)]."""
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"scores": [], "parts": []})
    scores = study.scores()
    some = scores.of_keys(keys) if isinstance(scores, Scores) else scores
    for score in sorted(some, key=lambda s: metric_rank(s.metric)):
        if score.metric == GUARD or score.key not in keys:
            continue
        if score.value is not None:
            found[score.key]["scores"].append([metric_label(score.metric), round(score.value, 3)])
        found[score.key]["parts"] += _parts(score.detail)
    return dict(found)


def _parts(detail: Mapping[str, Any]) -> list[list[Any]]:
    """Named parts of a score's detail: [name, holds], or [name with its share, None]."""
    parts: list[list[Any]] = []
    for group, members in detail.items():
        if not isinstance(members, dict):
            continue
        prefix = "" if group == "parts" else f"{group}: "
        for name, held in members.items():
            if isinstance(held, bool):
                parts.append([f"{prefix}{name}", held])
            elif isinstance(held, float):
                parts.append([f"{prefix}{name} {words.number(held, 2)}", None])
    return parts


def _setting(row: Row, extra: Sequence[str]) -> dict[str, Any]:
    return {"id": row.id, "name": row.name(extra), "task": row.task}


def _note(
    wall: _Wall,
    rows: Sequence[Row],
    shown: Sequence[Row],
    cells: Mapping[PairKey, Mapping[str, int]],
    pairs: Sequence[PairKey],
) -> str:
    """What is on the wall and what was left out."""
    total = sum(len(by_row) for by_row in cells.values())
    text = f"{len(wall.tiles)} images of {wall.pairs} prompt–seed pairs"
    if wall.pairs < len(pairs):
        text += (
            f", a seeded choice balanced over difficulty, out of {total} images of"
            f" {len(pairs)} pairs"
        )
    if len(shown) < len(rows):
        text += (
            f"; {len(rows) - len(shown)} of {len(rows)} settings left out to keep the file small"
        )
    return text + "."
