"""The images of a report: all of them as links, or a choice small enough to travel inside it.

Inside a file a pair (same prompt, seed, init image) enters with all its settings or not at all, so
that any two settings can be laid side by side; prompts are dealt level by level, two seeds each
before a third. The best and the worst images of the chosen settings are added. The page gets
columns of numbers in place of objects: 100,000 images are 2 MB, and a filter is one loop.
"""

import base64
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd35bench import words
from sd35bench.analysis.grouping import PairKey, PairNumbers, tasks
from sd35bench.analysis.scores import Found, ScoreIndex
from sd35bench.analysis.table import GUARD
from sd35bench.errors import StoreError
from sd35bench.fields import CURVES, label
from sd35bench.pictures import PIXEL_ART_PX, webp_uri
from sd35bench.prompts import encoder_fields
from sd35bench.report.leaderboard import primary_metric
from sd35bench.report.rows import Row, lower_is_better, metric_label, metric_rank, setting_text
from sd35bench.study.columns import Some, is_text, numbers, pick, ref_codes, texts
from sd35bench.study.store import Study
from sd35bench.types import Record, Status, Task

MAX_TILES = 960
MAX_BYTES = 12_000_000
"""Cap on the encoded images, in characters of base64; the whole report stays below 20 MB."""
MAX_LINKED = 200_000
"""Images that a page with links lists, 70 characters each; its further pages hold all."""
_LONGEST_PX = 256
_SEEDS_FIRST = 2
_MIN_PAIRS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a wall must show: row ids that are never left out, and pairs of row ids to compare.

    `beside` is chosen row id → the row that it is held against. `link`: images are files beside
    the page instead of a part of it. `share`: as many studies share the room.
    """

    rows: Sequence[str] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    link: bool = False
    share: int = 1


@dataclass(frozen=True, slots=True)
class Cells:
    """Which image each setting has of each pair, as columns [n] in the order of pairs, then rows.

    `starts` [P + 1] says where each pair's cells begin; `row` is the place of the setting among
    `ids`, `number` the record's among the setting's own.
    """

    pairs: list[PairKey]
    ids: list[str]
    starts: NDArray[np.int64]
    row: NDArray[np.int64]
    number: NDArray[np.int64]

    def of(self, pair: int) -> dict[str, int]:
        """Row id → which of its records."""
        part = slice(self.starts[pair], self.starts[pair + 1])
        places = zip(self.row[part].tolist(), self.number[part].tolist(), strict=True)
        return {self.ids[row]: number for row, number in places}

    def sizes(self) -> NDArray[np.int64]:
        """How many settings have each pair: [P]."""
        return np.diff(self.starts)

    def taken(self, columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """A field of each cell's record, of the field of each setting's records."""
        lengths = np.array([0, *map(len, columns)], np.int64)
        edges = np.cumsum(lengths)
        everything = np.concatenate(columns) if columns else np.empty(0, object)
        return everything[edges[self.row] + self.number]


def build_wall(
    study: Study,
    rows: Sequence[Row],
    matched: Mapping[str, Some],
    wanted: Wanted,
    extra: Sequence[str],
) -> dict[str, Any]:
    """Choose the images of a report and return them by tiles, with what was left out.

    `extra` are the setting fields beyond steps, cfg and strength that vary and belong in names.
    """
    shown = list(rows) if wanted.link else _choose_rows(rows, wanted.rows)
    cells = cells_of(shown, matched)
    wall = _Wall(study, matched, wanted.link, wanted.share)
    sizes = cells.sizes().tolist()
    for count, pair in enumerate(choose_pairs(cells, matched)):
        if count and wall.is_full(sizes[pair]):
            break
        wall.add_pair(pair, cells.of(pair))
    _add_extremes(wall, wanted, cells)
    lower = wall.add_scores()
    counts = np.bincount(cells.row, minlength=len(shown)).tolist()
    ids = {r.id for r in shown}
    others = [r for r in rows if r.id not in ids]
    refer(wall.prompts)
    return {
        "settings": [_setting(r, extra) for r in shown],
        "fields": _fields(shown, extra),
        "prompts": wall.prompts,
        "tiles": wall.tiles,
        "images": wall.images,
        "base": LINKED if wanted.link else "",
        "lower": lower,
        "note": _note(wall, rows, shown, cells),
        "counts": {r.id: count for r, count in zip(shown, counts, strict=True) if count},
        "left_out": sum(counts) - len(wall.tiles) + sum(r.n for r in others),
    }


LINKED = "../images/"
"""Where a linked page finds the study's images."""


def _add_extremes(wall: "_Wall", wanted: Wanted, cells: Cells) -> None:
    """Add the best and the worst images of the chosen settings, beside what those are held against.

    They are few, and the first that a person asks for.
    """
    of_cells = np.repeat(np.arange(len(cells.pairs)), cells.sizes())
    for row_id in dict.fromkeys(i for i in wanted.rows if i in cells.ids and i in wall.matched):
        mine = np.flatnonzero(cells.row == cells.ids.index(row_id))
        ranked = _ranked(wall.index, pick(wall.matched[row_id], cells.number[mine]))
        for place in dict.fromkeys((*ranked[:EXTREMES], *ranked[-EXTREMES:])):
            pair = int(of_cells[mine[place]])
            by_row = cells.of(pair)
            ids = {row_id, wanted.beside.get(row_id, row_id)} & by_row.keys()
            wall.add_pair(pair, {i: by_row[i] for i in sorted(ids)})


EXTREMES = 2
"""Best and worst images that stand beside an answer."""


def _ranked(index: ScoreIndex, records: Some) -> list[int]:
    """Records from the best to the worst by the first metric, in reading order, that has any."""
    for metric in _metrics(index):
        found = index.found(metric, records)
        judged = np.flatnonzero(found.valued)
        if len(judged):
            values = found.values[judged] * (1.0 if lower_is_better(metric) else -1.0)
            keys = texts(pick(records, judged), "key").tolist()
            ranked = sorted(zip(values.tolist(), keys, judged.tolist(), strict=True))
            return [place for _, _, place in ranked]
    return []


def _metrics(index: ScoreIndex) -> list[str]:
    """What an image is judged by, in reading order."""
    return sorted((name for name in index if name != GUARD), key=metric_rank)


def choose_pairs(cells: Cells, matched: Mapping[str, Some]) -> list[int]:
    """All pairs in the order in which they enter the wall: balanced by task and level, seeded."""
    groups: dict[tuple[Any, ...], dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    kinds = _kinds(cells, matched)
    for place in sorted(range(len(cells.pairs)), key=lambda i: repr(cells.pairs[i])):
        pair = cells.pairs[place]
        groups[kinds[place]][pair[0], pair[1], pair[5]].append(place)
    queues = []
    for group in sorted(groups, key=repr):
        prompts = sorted(
            groups[group].values(), key=lambda own: repr([cells.pairs[i] for i in own])
        )
        random.Random(f"wall {group}").shuffle(prompts)
        first = [p for seeds in prompts for p in seeds[:_SEEDS_FIRST]]
        queues.append(first + [p for seeds in prompts for p in seeds[_SEEDS_FIRST:]])
    return _round_robin(queues, _SEEDS_FIRST)


def _kinds(cells: Cells, matched: Mapping[str, Some]) -> list[tuple[Any, str]]:
    """Task and level of each pair, as the first of its settings has them."""
    parts = [matched.get(row_id, []) for row_id in cells.ids]
    found = []
    for read in (tasks, lambda records: ref_codes(records, "level")):
        columns = (values[codes] for codes, values in map(read, parts))
        found.append(cells.taken([*columns])[cells.starts[:-1]].tolist())
    return [(Task(task), level or "") for task, level in zip(*found, strict=True)]


def _round_robin(queues: Sequence[list[int]], hand: int) -> list[int]:
    """Deal `hand` items from each queue in turn until all are empty."""
    dealt: list[int] = []
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


def cells_of(rows: Sequence[Row], matched: Mapping[str, Some]) -> Cells:
    """Of several records of a pair, the one that quality was read from."""
    parts = [matched.get(row.id, []) for row in rows]
    numbered = PairNumbers()
    codes = [numbered.of(part) for part in parts]
    keys = numbered.keys
    found = [_chosen(*each) for each in zip(rows, parts, codes, strict=True)]
    row = np.repeat(np.arange(len(rows)), np.array([len(number) for number in found], np.int64))
    number = np.concatenate([*found, np.empty(0, np.int64)])
    pair = np.concatenate([c[n] for c, n in zip(codes, found, strict=True)] or [number])
    used = np.flatnonzero(np.bincount(pair, minlength=len(keys)))
    order = np.argsort(pair, kind="stable")
    counts = np.bincount(pair, minlength=len(keys))[used]
    return Cells(
        pairs=[keys[i] for i in used.tolist()],
        ids=[r.id for r in rows],
        starts=np.concatenate([[0], np.cumsum(counts)]),
        row=row[order],
        number=number[order],
    )


def _chosen(row: Row, records: Some, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the record that stands for each pair: the last scored, else the first."""
    scored = is_text(records, "status", Status.OK)
    scored &= numbers(records, "batch_size") == (row.quality_batch_size or -1)
    judged = np.flatnonzero(scored)[::-1]
    pairs, found = np.unique(codes, return_index=True)
    better, last = np.unique(codes[judged], return_index=True)
    found[np.searchsorted(pairs, better)] = judged[last]
    return found


@dataclass
class _Wall:
    """What has been put up so far."""

    study: Study
    matched: Mapping[str, Some]
    link: bool
    share: int
    tiles: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    size: int = 0
    pairs: set[int] = field(default_factory=set)
    _prompt_ids: dict[Any, int] = field(default_factory=dict)
    _image_ids: dict[str, int | None] = field(default_factory=dict)
    _columns: dict[str, tuple[NDArray[Any], ...]] = field(default_factory=dict)
    _up: set[tuple[int, str]] = field(default_factory=set)
    _numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the scores, and list the files to link to."""
        self.index = ScoreIndex(self.study.scores())
        self._files = self.study.stored_names("images") if self.link else {}

    def is_full(self, more: int) -> bool:
        """Whether `more` tiles would be too many."""
        tiles = (MAX_LINKED if self.link else MAX_TILES) // self.share
        size = self.size > MAX_BYTES // self.share and not self.link
        return len(self.tiles) + more > tiles or size

    def of(self, row_id: str) -> tuple[NDArray[Any], ...]:
        """Image, status and error of a row's records."""
        if row_id not in self._columns:
            names = ("image", "status", "error")
            self._columns[row_id] = tuple(texts(self.matched[row_id], name) for name in names)
        return self._columns[row_id]

    def first(self, by_row: Mapping[str, int]) -> Record:
        """A whole record of a pair; what its others ask for is the same but for the setting."""
        row_id, number = next(iter(by_row.items()))
        return self.matched[row_id][number]

    def add_pair(self, pair: int, by_row: Mapping[str, int]) -> None:
        """Add a pair in these settings, but for those in which it is there."""
        new = {i: n for i, n in by_row.items() if (pair, i) not in self._up}
        if not new:
            return
        self.pairs.add(pair)
        self._up |= {(pair, row_id) for row_id in new}
        record = self.first(new)
        prompt, request = self._prompt(record), record.trial.request
        for row_id, number in new.items():
            image, status, error = (column[number] for column in self.of(row_id))
            tile = {
                "setting": row_id,
                "prompt": prompt,
                "seed": str(request.seed),  # JavaScript has whole numbers up to 2^53 only
                "width": request.width,
                "height": request.height,
                "image": self._image(image, is_init=False),
                "scores": [],
                "parts": [],
            }
            if status != Status.OK:
                why = error or "no message"
                tile["error"] = f"{Status(status).value}: {why}"[:300]
            self.tiles.append(tile)
            self._numbers.append(number)

    def add_scores(self) -> list[str]:
        """Give every tile its scores; returns the labels of those of which less is better."""
        names = _metrics(self.index)
        places: dict[str, list[int]] = defaultdict(list)
        for place, tile in enumerate(self.tiles):
            places[tile["setting"]].append(place)
        for name in names:
            for row_id, mine in places.items():
                which = np.array([self._numbers[place] for place in mine], np.int64)
                self._add(name, mine, self.index.found(name, pick(self.matched[row_id], which)))
        return [metric_label(name) for name in sorted(names) if lower_is_better(name)]

    def _add(self, metric: str, places: Sequence[int], found: Found) -> None:
        label, codes = metric_label(metric), found.codes.tolist()
        parts = {code: _parts(found.details[code]) for code in {*codes} - {-1}}
        for place, code, value in zip(places, codes, found.values.tolist(), strict=True):
            if code >= 0:
                self.tiles[place]["parts"] += parts[code]
                if value == value:
                    self.tiles[place]["scores"].append([label, round(value, 3)])

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
            uri = self._linked(digest, is_init) if self.link else self._encoded(digest, is_init)
            self._image_ids[digest] = None if uri is None else len(self.images)
            if uri is not None:
                self.images.append(uri)
                self.size += len(uri)
        return self._image_ids[digest]

    def _encoded(self, digest: str, is_init: bool) -> str | None:
        try:
            read = self.study.read_init_file if is_init else self.study.read_image_file
            return encode_thumbnail(read(digest))
        except (OSError, StoreError):
            return None

    def _linked(self, digest: str, is_init: bool) -> str | None:
        """A file's name, of an init image with its folders; browsers know a format by its bytes."""
        if not is_init:
            return self._files.get(digest)
        path = self.study.find_stored("inits", digest)
        return f"../inits/{path.parent.name}/{path.name}" if path.is_file() else None


def encode_thumbnail(data: bytes) -> str:
    """Data URI of an image file: lossless WEBP up to 128 px, else at most 256 px, quality 82.

    Decoding and encoding again leaves nothing of the file but pixels.
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    if max(image.size) <= PIXEL_ART_PX:
        return webp_uri(image)
    image.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    return webp_uri(image, quality=82, method=4)


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
    """A setting for the page; `latency` in seconds, `quality` by the first metric."""
    metric = primary_metric([row])
    return {
        "id": row.id,
        "name": row.name(extra),
        "task": row.task,
        "latency": None if row.latency is None else row.latency.value,
        "quality": None if metric is None else row.value(metric),
        "metric": "" if metric is None else metric_label(metric),
    }


def _fields(rows: Sequence[Row], extra: Sequence[str]) -> list[dict[str, Any]]:
    """The fields that tell settings apart: each value once, in order, and each setting's place."""
    found = []
    for name in dict.fromkeys(("task", *CURVES, *extra)):
        values = [r.task if name == "task" else r.setting.get(name) for r in rows]
        said = {setting_text(v): v for v in values if v is not None}
        is_number = all(isinstance(v, int | float) for v in said.values())
        order = sorted(said, key=said.__getitem__ if is_number else str)
        places = {text: i for i, text in enumerate(order)}
        if len(order) > 1 or name in ("steps", "cfg"):
            at = [-1 if v is None else places[setting_text(v)] for v in values]
            found.append({"name": name, "label": label(name), "values": order, "at": at})
    return found


def join_walls(
    walls: Sequence[Mapping[str, Any]], rows: Sequence[Row], extra: Sequence[str]
) -> dict[str, Any]:
    """One wall of several studies' walls; what asks for the same is one prompt."""
    shown = {s["id"] for wall in walls for s in wall["settings"]}
    images: list[str] = []
    prompts: list[dict[str, Any]] = []
    known: dict[str, int] = {}
    tiles: list[dict[str, Any]] = []
    for wall in walls:
        start = len(images)
        images += wall["images"]
        places = []
        for prompt in wall["prompts"]:
            init = None if prompt["init"] is None else prompt["init"] + start
            init_image = None if init is None else images[init]
            parts = (prompt["text"], prompt["negative"], init_image, prompt.get("own"))
            place = known.setdefault(repr(parts), len(prompts))
            if place == len(prompts):
                prompts.append({**prompt, "init": init})
            places.append(place)
        for tile in wall["tiles"]:
            image = None if tile["image"] is None else tile["image"] + start
            tiles.append({**tile, "prompt": places[tile["prompt"]], "image": image})
    refer(prompts)
    return {
        "settings": [s for wall in walls for s in wall["settings"]],
        "fields": _fields([r for r in rows if r.id in shown], extra),
        "prompts": prompts,
        "tiles": tiles,
        "images": images,
        "base": "",
        "lower": list(dict.fromkeys(name for wall in walls for name in wall["lower"])),
        "note": " ".join(wall["note"] for wall in walls),
        "counts": {row_id: n for wall in walls for row_id, n in wall["counts"].items()},
        "left_out": 0,  # the note says it; each study's own report has a way to the rest
    }


def refer(prompts: Sequence[dict[str, Any]]) -> None:
    """Name each prompt in addresses: by its id, and its number where others have that id."""
    ids = Counter(prompt["id"] for prompt in prompts)
    for i, prompt in enumerate(prompts):
        prompt["ref"] = prompt["id"] if ids[prompt["id"]] == 1 else f"{prompt['id']}~{i}"


def pack_wall(wall: Mapping[str, Any]) -> dict[str, Any]:
    """The wall as the page reads it: tiles as columns of 32 bits, base64, little-endian."""
    tiles = wall["tiles"]
    settings = {s["id"]: i for i, s in enumerate(wall["settings"])}
    seeds = sorted({t["seed"] for t in tiles}, key=int)
    seed_ids = {seed: i for i, seed in enumerate(seeds)}
    sizes = sorted({(t["width"], t["height"]) for t in tiles})
    size_ids = {size: i for i, size in enumerate(sizes)}
    parts: dict[str, int] = {}
    columns = {
        "setting": [settings[t["setting"]] for t in tiles],
        "prompt": [t["prompt"] for t in tiles],
        "seed": [seed_ids[t["seed"]] for t in tiles],
        "size": [size_ids[t["width"], t["height"]] for t in tiles],
        "image": [-1 if t["image"] is None else t["image"] for t in tiles],
        "parts": [parts.setdefault(_parts_text(t["parts"]), len(parts)) for t in tiles],
    }
    names = list(dict.fromkeys(name for t in tiles for name, _ in t["scores"]))
    scores = [dict(t["scores"]) for t in tiles]
    kept = ("settings", "fields", "prompts", "images", "base", "lower", "note")
    return {
        **{name: wall[name] for name in kept},
        "seeds": seeds,
        "sizes": sizes,
        "columns": {name: _base64(values, "<i4") for name, values in columns.items()},
        "scores": [[n, _base64([s.get(n, np.nan) for s in scores], "<f4")] for n in names],
        "parts": [json.loads(text) for text in parts],
        "errors": {i: t["error"] for i, t in enumerate(tiles) if "error" in t},
    }


def _parts_text(parts: list[Any]) -> str:
    return json.dumps(parts) if parts else "[]"  # most tiles have none


def _base64(values: Sequence[float], kind: str) -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


def _note(wall: _Wall, rows: Sequence[Row], shown: Sequence[Row], cells: Cells) -> str:
    """What is on the wall and what was left out."""
    text = f"{words.count(len(wall.tiles))} images of {len(wall.pairs)} prompt–seed pairs"
    if len(wall.pairs) < len(cells.pairs):
        text += (
            f", a seeded choice balanced over difficulty, out of {words.count(len(cells.row))}"
            f" images of {words.count(len(cells.pairs))} pairs"
        )
    if len(shown) < len(rows):
        text += (
            f"; {len(rows) - len(shown)} of {len(rows)} settings left out to keep the file small"
        )
    return text + "."
