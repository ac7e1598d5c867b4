"""The page's part on brute-forced truth: the grid, `tune` against it, `recommend` against it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.validity_runs.truth import STAND_INS

__all__ = [
    "blind_table",
    "choice_section",
    "choice_table",
    "grid_section",
    "grid_table",
    "search_section",
    "search_table",
    "table",
]

FIGURE = "figures/tune_regret.svg"
_MOST_NAMED = 3


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grid_table(rows: Mapping[str, Any]) -> str:
    """Mean quality and median seconds of every setting: steps down, cfg across."""
    found = {(s["steps"], s["cfg"]): s for s in rows["truth"]["settings"]}
    steps, cfgs = (sorted({key[i] for key in found}) for i in (0, 1))
    head = ["steps", *(f"cfg {cfg:g}" for cfg in cfgs)]
    cells = [[str(n), *(_cell(found.get((n, cfg))) for cfg in cfgs)] for n in steps]
    return table(head, cells)


def _cell(setting: Mapping[str, Any] | None) -> str:
    return "–" if setting is None else f"{setting['value']:.3f}, {setting['p50_s']:.2f} s"


def blind_table(rows: Mapping[str, Any]) -> str:
    """What each profile's best is, and what is lost without looking."""
    head = ["profile", "margin", "true best", "within the margin", "fastest of them", "at random"]
    return table(
        [*head, *STAND_INS],
        [_blind_row(name, held) for name, held in rows["truth"]["profiles"].items()],
    )


def _blind_row(name: str, held: Mapping[str, Any]) -> list[str]:
    blind = held["blind"]
    drawn = blind["at random"]
    lost = f"loses {drawn['regret']:.3f}; {drawn['within']:.0%} are within"
    named = [_default_cell(blind.get(default)) for default in STAND_INS]
    best = f"{held['best']}: {held['best_value']:.3f}"
    return [
        name,
        f"{held['margin']:g}",
        best,
        f"{held['good']} settings",
        held["fastest"],
        lost,
        *named,
    ]


def _default_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    if not found["allowed"]:
        return f"{found['setting']}: over the latency limit"
    return f"{found['setting']}: loses {found['regret']:.3f}, {found['slower']:.1f} x as slow"


def search_table(rows: Mapping[str, Any]) -> str:
    """How ten searches per profile ended, on all prompts and on halves."""
    head = ["profile", "margin", "within the margin", "mean regret", "regret beyond", "slower"]
    ends = ["images of the grid's", "chosen", "half, against the other half"]
    return table([*head, *ends], [_search_row(name, row) for name, row in rows.items()])


def _search_row(name: str, row: Mapping[str, Any]) -> list[str]:
    held, half, times = row["all"], row["half"], row["searches"]
    shares = [100 * run["share"] for run in held["runs"]]
    return [
        name,
        f"{row['margin']:g}",
        f"**{round(held['within'] * times)} of {times}**",
        *_lost(held),
        f"{min(shares):.1f} to {max(shares):.1f} %",
        _chosen(held),
        f"{round(half['within'] * times)} of {times}, mean regret {_number(half['mean_regret'])}",
    ]


def choice_table(rows: Mapping[str, Any]) -> str:
    """How small budgets chose, by profile, most prompts last."""
    head = ["prompts", "profile", "margin", "within the margin", "mean regret", "regret beyond"]
    ends = ["slower", "no choice", "definitive", "chosen", "on prompts it did not see"]
    found = sorted(rows.values(), key=lambda row: row["budget"])
    return table(
        [*head, *ends],
        [_choice_row(row, name) for row in found for name in row["profiles"]],
    )


def _choice_row(row: Mapping[str, Any], name: str) -> list[str]:
    held = row["profiles"][name]
    seen, unseen = held["all"], held["unseen"]
    return [
        str(row["budget"]),
        name,
        f"{held['margin']:g}",
        f"**{seen['within']:.0%}**",
        *_lost(seen),
        str(seen["none"]),
        _definitive(held),
        _chosen(seen),
        f"{unseen['within']:.0%}, mean regret {_number(unseen['mean_regret'])}",
    ]


def _definitive(held: Mapping[str, Any]) -> str:
    """How many choices were said to be shown, and how many of these lose more than the margin."""
    shown, wrong = held["definitive"], held["definitive_beyond"]
    return f"{shown}, {wrong} beyond the margin" if shown else "0"


def _lost(held: Mapping[str, Any]) -> list[str]:
    """Mean regret, the regrets beyond the margin, and how slow the choices are."""
    missed = held["missed"]
    beyond = "–" if not missed else f"{missed[0]:.3f} to {missed[-1]:.3f} ({len(missed)} times)"
    slower = "–" if held["slower"] is None else f"x {held['slower']:.2f}"
    return [_number(held["mean_regret"]), beyond, slower]


def _chosen(held: Mapping[str, Any]) -> str:
    found = list(held["chosen"].items())
    named = ", ".join(f"{title} ({times})" for title, times in found[:_MOST_NAMED])
    more = len(found) - _MOST_NAMED
    return named if more <= 0 else f"{named}, {more} others"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def grid_section(rows: Mapping[str, Any], made: str) -> str:
    """The truth itself, with its own error."""
    found = rows["truth"]
    ends = ", ".join(f"{p['half_width']:.3f} ({n})" for n, p in found["profiles"].items())
    places = found["images"]
    return (
        f"**Brute-forced truth on nano:** {len(found['settings'])} settings on the same"
        f" {found['prompts']} prompts, one seed each, every image made alone; mean"
        f" {found['metric'].replace('_', ' ')} and median latency."
        " `python -m tests.validity_runs grid` makes such a grid (6,400 images by `backend=core`,"
        " two workers of one core), and what follows only reads it. Its own error: a regret is"
        f" known to within ± {ends}, the median half width of 95 % intervals, so a margin of 0.02"
        " is finer than this truth.\n\n"
        f"{grid_table(rows)}\n\n{blind_table(rows)}\n\n*Slower*, here and below: the median"
        " latency over that of the fastest setting truly within the margin; `preview` wants the"
        " best within a latency limit, not the fastest.\n\n"
        f"Images made by {', '.join(places.get('backend', ['eager']))} at commit"
        f" {', '.join(c[:10] for c in places['commit'])}, torch"
        f" {', '.join(places['torch'])}. {made}"
    )


def search_section(rows: Mapping[str, Any], made: str) -> str:
    """`tune` against the grid, with the figure."""
    any_row = next(iter(rows.values()))
    last = any_row["first"] + any_row["searches"] - 1
    return (
        f"**`tune` against it:** {any_row['searches']} searches per profile (seeds"
        f" {any_row['first']} to {last}), each free to use at most 40 % of the grid's images"
        " (`python -m tests.validity_runs tune`). On the prompts that it searched, a search shares"
        " their luck with the truth; so each is repeated on a random half of the prompts and held"
        " against the other half, whose best of 25 noisy means is too good instead.\n\n"
        f"{search_table(rows)}\n\n![Regret over the share of the grid's images]({FIGURE})\n\n"
        "Marks that would lie on each other are set apart upwards.\n\n"
        f"{made}"
    )


def choice_section(rows: Mapping[str, Any], made: str) -> str:
    """`recommend` from small budgets against the grid."""
    any_row = next(iter(rows.values()))
    held = [profile for row in rows.values() for profile in row["profiles"].values()]
    asked = any_row["repetitions"] * len(held)
    shown, wrong = (sum(h[k] for h in held) for k in ("definitive", "definitive_beyond"))
    return (
        f"**Recommendations:** `recommend` on few random prompts of the grid, all"
        f" {any_row['settings']} settings, {any_row['repetitions']} times"
        " (`python -m tests.validity_runs recommend`). *Definitive*: how many answers said that"
        " they are shown; the others say `provisional`. The last column holds the same choices"
        " against the prompts that each of them did not see.\n\n"
        f"{choice_table(rows)}\n\nIn all {shown} of {asked} answers were definitive; {wrong} of"
        f" these lose more than their margin.\n\n{made}"
    )
