"""Hosted services beside this machine: where a call's seconds go, and what it costs.

Read from the `remote` part of a `show` document's rows. Parts of a latency are means here, so that
they add up; the medians are in the document. Without a hosted row there is nothing to say.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd35bench import words
from sd35bench.fields import field_words
from sd35bench.report.bars import Stack, plot_calls
from sd35bench.report.blocks import block, figures, title_columns
from sd35bench.report.render import Cell, Column, Figure, Table, estimate_cell
from sd35bench.report.rows import CURVES, Row, has_far, usd_text
from sd35bench.words import MISSING, Estimate

_MOST_BARS = 24
_MOST_SENTENCES = 4
_SECONDS = (
    ("total", "total"),
    ("predict", "inference"),
    ("queue", "queue"),
    ("network", "network"),
    ("submit", "submit"),
    ("download", "download"),
    ("poll_bound", "late by ≤"),
    ("other", "not told apart"),
)


@dataclass(frozen=True, slots=True)
class _Hosted:
    """A row with what is known of its calls."""

    row: Row
    remote: Mapping[str, Any]

    def mean(self, part: str) -> Estimate:
        """Mean seconds of a part of the lone calls."""
        found = (self.remote.get("parts") or {}).get(part) or {}
        low, high = found.get("mean_ci95") or (None, None)
        return Estimate(value=found.get("mean"), low=low, high=high, n=found.get("n"))


def _hosted(rows: Sequence[Row]) -> list[_Hosted]:
    return [_Hosted(r, r.remote) for r in rows if r.remote is not None]


def network_note(rows: Sequence[Row]) -> str:
    """A line for below the settings, where a hosted row is held against one of this machine."""
    if has_far(rows):
        return "× eager of a hosted service: its time includes queue and network."
    return ""


# Tables ---------------------------------------------------------------------------------------


def hosted_blocks(rows: Sequence[Row]) -> list[Table]:
    """Seconds of lone calls by part, then throughput and money."""
    found = _hosted(rows)
    if not found:
        return []
    names = title_columns([h.row for h in found])
    blocks = [_money_block(found, names)]
    if any(h.mean("total").value is not None for h in found):
        blocks.insert(0, _seconds_block(found, names))
    return blocks


def _seconds_block(found: Sequence[_Hosted], names: Sequence[Column]) -> Table:
    parts = [(k, t) for k, t in _SECONDS if any(_is_told(h, k) for h in found)]
    return block(
        "Hosted calls made alone, seconds",
        names,
        [
            figures("n", (str(h.remote["single_stream_n"]) for h in found)),
            figures("inference share", map(_share_cell, found)),
            *(figures(title, (estimate_cell(h.mean(key)) for h in found)) for key, title in parts),
        ],
        "Means over calls that had no other of this run beside them. Inference: what the"
        " service says it computed; queue: what it took beyond that; network: submit and download."
        " Late by: the end was seen by polling, so total is at most this much too long; where the"
        " service itself tells its queue, that wait is not told apart.",
    )


def _is_told(hosted: _Hosted, part: str) -> bool:
    mean, total = hosted.mean(part).value, hosted.mean("total").value
    if mean is None or part != "other":
        return mean is not None
    return total is not None and mean > 0.01 * total


def _share_cell(hosted: _Hosted) -> Cell:
    share = hosted.remote.get("inference_share")
    if share is None:
        return Cell(text=MISSING)
    ends = [words.number(100 * end, 0) for end in share.get("ci95") or ()]
    return Cell(text=words.percent(share["value"]), beside=words.bracketed(*ends) if ends else "")


def _money_block(found: Sequence[_Hosted], names: Sequence[Column]) -> Table:
    shared = any((h.remote.get("throughput") or {}).get("settings", 1) > 1 for h in found)
    titles = (
        *("images/min", "images", "in flight", "polls/image", "USD/image", "reported"),
        *("USD/1,000", "USD in all", "found again", "ambiguous"),
    )
    rows = [_money_cells(h) for h in found]
    return block(
        "Hosted calls: throughput and price",
        names,
        [figures(title, (row[i] for row in rows)) for i, title in enumerate(titles)],
        " ".join(
            [
                "Images/min: images over the wall time in which calls ran beside others, waits for"
                " rate limits included"
                + ("; settings that ran together share the figure." if shared else "."),
                "Reported: how many prices the service named; the others are its listed price."
                " USD in all: of the calls whose price is known. Ambiguous: may have been billed;"
                " run again to look for them.",
                *_unsent(found),
            ]
        ),
    )


def _money_cells(hosted: _Hosted) -> tuple[Cell | str, ...]:
    remote, usd = hosted.remote, hosted.row.usd_per_image
    rate = remote.get("throughput") or {}
    cost = remote["cost_usd"]
    more = f" + {cost['unknown']} unknown" if cost["unknown"] else ""
    stake = f" ({words.usd(cost['at_stake'])})" if cost["at_stake"] else ""
    value = None if usd is None else usd.value
    return (
        estimate_cell(words.read_estimate(rate, "images_per_min")),
        words.plain(rate.get("n")),
        words.plain(rate.get("in_flight", remote["in_flight"])),
        words.number((remote["polls_per_image"] or {}).get("value"), 1),
        usd_text(hosted.row),
        f"{cost['reported']} of {cost['n']}" if cost["n"] else MISSING,
        words.usd(None if value is None else 1000 * value),
        words.usd(cost["total"]) + more,
        str(remote["resumed_n"]),
        str(remote["ambiguous"]) + stake,
    )


def _unsent(found: Sequence[_Hosted]) -> list[str]:
    """One sentence per service on the fields of a request that it is never sent."""
    services: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for hosted in found:
        name, unsent = hosted.row.text("backend"), tuple(hosted.remote["unsent"])
        if unsent and name not in services[unsent]:
            services[unsent].append(name)
    return [
        f"{' and '.join(names)} cannot be sent {', '.join(unsent)}: the service uses its own."
        for unsent, names in services.items()
    ]


# Charts ---------------------------------------------------------------------------------------


def hosted_figures(rows: Sequence[Row]) -> list[Figure]:
    """Each hosted setting's seconds by part, over the same setting's total on this machine."""
    bars: list[Stack] = []
    shown = [h for h in _hosted(rows) if h.mean("total").value is not None]
    members = [r for h in shown for r in (h.row, *_same_request(h.row, rows))]
    for hosted in shown:
        bars.append(_call_bar(hosted, members))
        bars += [
            Stack(label=_label(r, members), parts={"local": r.latency_s["mean"]})
            for r in _same_request(hosted.row, rows)
        ]
    if not bars:
        return []
    figure = plot_calls(bars[:_MOST_BARS])
    left = len(bars) - _MOST_BARS
    if left > 0:
        figure = replace(figure, note=f"{figure.note} {left} more bars are left out.")
    return [figure]


def _same_request(row: Row, rows: Sequence[Row]) -> list[Row]:
    """Timed rows of this machine that were asked for the same."""
    own = ("backend", "threads", "weights", "weights_digest", "environment_id")

    def asked(other: Row) -> list[tuple[str, str]]:
        return [(k, repr(v)) for k, v in other.setting.items() if k not in own]

    return [
        r for r in rows if r.remote is None and r.latency is not None and asked(r) == asked(row)
    ]


def _call_bar(hosted: _Hosted, members: Sequence[Row]) -> Stack:
    parts = {p: hosted.mean(p).value for p in ("submit", "queue", "predict", "download", "other")}
    return Stack(
        label=_label(hosted.row, members),
        parts={name: s for name, s in parts.items() if s is not None and s > 0},
        late_by_s=hosted.mean("poll_bound").value,
        strong=True,
    )


def _label(row: Row, members: Sequence[Row]) -> str:
    """The backend, and what differs between the bars."""

    def differs(name: str, among: Sequence[Row]) -> bool:
        return len({repr(r.setting.get(name)) for r in among}) > 1

    said = [row.text("backend")]
    said += [row.text("model")] if differs("model", members) else []
    for name in CURVES[:2]:
        if differs(name, members) and not row.unsent(name):
            said.append(field_words(name, row.setting[name]))
    if differs("prompt_strength", members) and row.prompt_strength is not None:
        said.append(field_words("prompt_strength", row.prompt_strength))
    if differs("width", members) or differs("height", members):
        said.append(f"{row.text('width')}×{row.text('height')}")
    if row.tells("threads") and differs("threads", [r for r in members if r.tells("threads")]):
        said.append(f"{row.text('threads')} threads")
    return " · ".join(said)


# Words ----------------------------------------------------------------------------------------


def hosted_sentences(document: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What a person wants to know first, of up to four hosted settings: (setting, text)."""
    found = _hosted(rows)
    reference = (document.get("drift") or {}).get("reference") or {}
    against = str(reference.get("backend") or "the reference")
    members = [h.row for h in found]
    said = [
        (f"{_label(h.row, members)}: ", " ".join(_sentences(h, rows, against)))
        for h in found[:_MOST_SENTENCES]
    ]
    if len(found) > _MOST_SENTENCES:
        said.append(("", f"{len(found) - _MOST_SENTENCES} more are in the tables below."))
    return said


def _sentences(hosted: _Hosted, rows: Sequence[Row], against: str) -> list[str]:
    said = [_time_words(hosted)]
    late = hosted.mean("poll_bound").value
    if late is not None:
        said.append(f"Polling saw the end up to {words.seconds(late)} late.")
    local = _same_request(hosted.row, rows)
    if local:
        means = [f"{r.text('backend')} {words.seconds(r.latency_s['mean'])}" for r in local[:3]]
        said.append(f"This machine takes, on average: {', '.join(means)}.")
    usd = hosted.row.usd_per_image
    if usd is not None and usd.value is not None:
        said.append(
            f"An image costs {words.usd(usd.value)}, a thousand {words.usd(1000 * usd.value)};"
            " what one made here costs is not known."
        )
    if hosted.row.identical_pairs:
        said.append(
            f"Its images are {against}'s in every pixel: the drift is exactly zero"
            f" (n = {hosted.row.identical_pairs} pairs)."
        )
    return said


def _time_words(hosted: _Hosted) -> str:
    """How long a lone call took, and what of."""
    total = hosted.mean("total")
    if total.value is None:
        return "no call ran alone, so there is no latency."
    share = hosted.remote.get("inference_share")
    kinds = [("predict", "inference"), ("queue", "queue"), ("network", "network")]
    kinds += [("other", "not told apart")] if _is_told(hosted, "other") else []
    parts = [(word, hosted.mean(key).value) for key, word in kinds]
    told = [f"{words.seconds(seconds)} {word}" for word, seconds in parts if seconds is not None]
    if share is not None:
        told[0] += f" ({words.percent(share['value'])})"
    tail = f": {', '.join(told)}" if told else ""
    return f"an image takes {words.latency(total)} on average (n = {total.n}){tail}."
