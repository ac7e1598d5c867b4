"""A recommendation, or the plan of one, for people: `recommended.yaml`, a terminal, Markdown."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sd35bench import plugins, words
from sd35bench.disk import write_atomic
from sd35bench.errors import ConfigError
from sd35bench.fields import CURVES, describe, unusual_words
from sd35bench.recommend.entry import confirmation_text
from sd35bench.report.render import (
    HTML,
    MARKDOWN,
    TERMINAL,
    WRAPPED,
    Code,
    Heading,
    Part,
    Table,
    Text,
    paragraph,
    say,
    text_column,
    text_table,
)
from sd35bench.stats.decision import SAME_COST

FILED_WARNINGS = 20
SHOWN = {TERMINAL: 5, MARKDOWN: 8, HTML: 12}
"""Settings not chosen that a form lists."""
_Entries = list[tuple[str, str, Any]]
"""(profile, task, entry)"""


def write_recommended(study: Any, document: dict[str, Any]) -> Path:
    """Write the study's recommended.yaml, whole or not at all, and return its path.

    It has the answers, one setting a profile and task; the evidence is what `--json` prints.

    Raises: DiskFull, StoreError.
    """
    path = study.path / "recommended.yaml"
    name = document["study"]
    header = f"# sd35bench recommend {name} wrote this; with --json it prints all the evidence.\n"
    text = yaml.dump(
        _answers(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )
    write_atomic(path, (header + text).encode())
    return path


def _answers(document: Mapping[str, Any]) -> dict[str, Any]:
    """What recommended.yaml holds."""
    profiles: dict[str, Any] = {}
    for profile, task, entry in entries_of(document):
        profiles.setdefault(profile, {})[task] = _answer(entry)
    warnings = [*document["warnings"][:FILED_WARNINGS]]
    more = len(document["warnings"]) - len(warnings)
    return {
        "study": document["study"],
        "prompts": _prompts(document),
        "confirmed": document["confirmed"],
        "confirmation": document["confirmation"],
        "warnings": [*warnings, f"and {more} more"] if more else warnings,
        "profiles": profiles,
    }


def _answer(entry: Mapping[str, Any]) -> dict[str, Any]:
    evidence = entry["evidence"]
    if entry["setting"] is None:
        return {"setting": None, "answer": evidence["headline"]}
    quality, latency = evidence["quality"], evidence["latency_s"]
    return {
        "setting": _Flow(entry["setting"]),
        "answer": evidence["headline"],
        "definitive": evidence["definitive"],
        "quality": _Flow({k: quality[k] for k in ("metric", "value", "ci95", "n")}),
        "latency_s": _Flow({k: latency[k] for k in ("p50", "n")}),
        "held_out": confirmation_text(entry["confirmation"]),
        "command": entry["command"],
    }


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _one_line(dumper: yaml.SafeDumper, found: _Flow) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", found, flow_style=True)


_Dumper.add_representer(_Flow, _one_line)


def entries_of(document: Mapping[str, Any]) -> _Entries:
    """Profile, task and entry of every answer of a document."""
    return [
        (profile, task, entry)
        for profile, tasks in document["profiles"].items()
        for task, entry in tasks.items()
        if entry is not None
    ]


def _prompts(document: Mapping[str, Any]) -> str:
    return ", ".join(sorted({f"{p['set']} ({p['split']})" for p in document.get("prompts") or ()}))


# Terminal -------------------------------------------------------------------------------------


def answer_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """What to use, the runner-up and what is not known: at most 25 lines of 80 columns."""
    entries = entries_of(document)
    yield say(("Recommended settings", "bold"), f" from study {document['study']}", wraps=True)
    for task in dict.fromkeys(task for _, task, _ in entries):
        yield from _brief_task(task, [found for found in entries if found[1] == task])
    yield say(f"{words.first_upper(document['confirmation'])}.", wraps=True, gap=True)
    said = [
        f"{len(document[kind])} {kind if len(document[kind]) > 1 else kind.removesuffix('s')}"
        for kind in ("warnings", "notes")
        if document[kind]
    ]
    more = f"Why, {' and '.join([*said, 'other settings'])}: --why"
    yield say(f"{more}. To copy: --snippet command, diffusers or api.", wraps=True)


def _brief_task(task: str, entries: _Entries) -> Iterator[Part]:
    """Profiles with one answer share its line; the runner-up is of the last that has one."""
    found: dict[str, list[str]] = defaultdict(list)
    for profile, _, entry in entries:
        found[entry["evidence"]["headline"]].append(profile)
    names = [", ".join(profiles) for profiles in found.values()]
    yield say((task, "bold"), gap=True)
    answers = (text_column("", names, style="bold"), text_column("", found))
    yield Table(columns=answers, layouts=WRAPPED, frame="bare")
    others = [o for _, _, entry in reversed(entries) for o in entry.get("alternatives") or ()]
    if not others:
        return
    other, timed = others[0], entries[-1][2]["evidence"].get("speed_basis") == "latency_s"
    speed = f", {words.digits(other['speed'])} s" if timed and other["speed"] is not None else ""
    name = describe(other["setting"])
    figures = f"{_figure(other['quality'])}{speed}"
    yield say(f"runner-up: {name} ({figures}): {other['why_not']}", wraps=True)


SNIPPETS = ("command", "diffusers", "api")


def snippets(document: Mapping[str, Any], kind: str) -> str:
    """The choices as text to copy: a command, Python for diffusers, or the API's body.

    Several have a comment line each that says whose they are.

    Raises: ConfigError where a choice has none.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for profile, task, entry in entries_of(document):
        text, why_not = _snippet(entry, kind)
        if text is None:
            raise ConfigError(f"--snippet={kind}: {profile}, {task}: {why_not}")
        texts[text].append(f"{profile}, {task}")
    if len(texts) == 1:
        return next(iter(texts))
    return "\n\n".join(f"# {'; '.join(names)}\n{text}" for text, names in texts.items())


def _snippet(entry: Mapping[str, Any], kind: str) -> tuple[str | None, str]:
    if entry["setting"] is None:
        return None, entry["evidence"]["headline"]
    if kind == "command":
        return entry["command"], ""
    if kind == "diffusers":
        return entry["snippet"], "diffusers' own pipeline cannot make this setting"
    return body_text(entry["api"]), entry["api"]["why_not"]


def body_text(api: Mapping[str, Any]) -> str | None:
    """The create's JSON; ``None`` where the protocol cannot ask for the setting."""
    body = api["body"]
    return None if body is None else json.dumps(body, indent=2, ensure_ascii=False)


def evidence_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """The answers first, then per setting the evidence and how to reproduce it."""
    entries = entries_of(document)
    yield say(("Recommended settings", "bold"), f" from study {document['study']}\n", wraps=True)
    answers = (
        text_column("", (profile for profile, _, _ in entries), style="bold"),
        text_column("", (task for _, task, _ in entries)),
        text_column("", (entry["evidence"]["headline"] for _, _, entry in entries)),
    )
    yield Table(columns=answers, layouts=WRAPPED, frame="bare")
    yield say(f"Chosen on prompts: {_prompts(document)}.", gap=True)
    yield say(f"{words.first_upper(document['confirmation'])}.")
    images = document["confirm"]["images"]
    if images:
        confirm = plugins.command(f"recommend {document['study']} --confirm")
        yield say(f"{images} held-out images would confirm it: {confirm}")
    for kind in ("notes", "warnings"):
        for text in document[kind]:
            yield say((kind.removesuffix("s"), "yellow"), f" {text}", wraps=True)
    groups: dict[Any, _Entries] = defaultdict(list)
    for found in entries:
        if found[2]["setting"] is not None:
            groups[found[1], found[2]["setting_id"]].append(found)
    for group in groups.values():
        yield from _setting(group)


def _setting(group: _Entries) -> Iterator[Part]:
    """One setting: which profiles chose it and why, the others, command and snippet."""
    _, task, entry = group[-1]
    evidence = entry["evidence"]
    yield Heading(f"{' and '.join(profile for profile, _, _ in group)}, {task}", 3)
    for profile, _, each in group:
        yield say(f"{profile}: {each['evidence']['reason']}.", wraps=True)
    yield say(f"{compared(evidence)}.{_failures(evidence)}", wraps=True)
    yield say(front_sentence(evidence))
    confirmed: dict[str, list[str]] = defaultdict(list)
    for profile, _, each in group:
        confirmed[confirmation_text(each["confirmation"])].append(profile)
    for text, names in confirmed.items():
        yield say(f"{' and '.join(names)}: {text}.")
    more = [each["evidence"]["more_images"] for _, _, each in group]
    for text in dict.fromkeys(f"{words.first_upper(m['text'])}." for m in more if m is not None):
        yield say(text)
    others = len(entry["alternatives"])
    if others:
        yield _others(entry, TERMINAL)
        if others > SHOWN[TERMINAL]:
            yield say(f"… and {others - SHOWN[TERMINAL]} more: --json has all")
        yield say((front_note(evidence), "dim"))
    if (defaults := default_table(entry, TERMINAL)) is not None:
        yield defaults
    for default in entry["named_defaults"]:
        if default["command"] is not None:
            yield say((f"add {default['name']}:", "dim"), f" {default['command']}")
    yield say(("$", "dim"), f" {entry['command']}", gap=True)
    if entry["snippet"] is not None:
        yield Code(entry["snippet"])
    api = entry["api"]
    body = json.dumps(api["body"], ensure_ascii=False)
    text = (
        f"No API body: {api['why_not']}." if api["body"] is None else f"POST /v1/prediction {body}"
    )
    yield say(text, gap=True)


def confirming_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """The commands that make the held-out images that are not there, one a line."""
    confirm = document["confirm"]
    if not confirm["commands"]:
        yield say(f"{words.first_upper(document['confirmation'])}.")
        yield say("no held-out image is missing", wraps=True)
        return
    images = confirm["images"]
    yield say(f"{images} held-out images are missing; these commands make them:", wraps=True)
    for run in confirm["commands"]:
        yield say(run["command"])


# Markdown -------------------------------------------------------------------------------------

_ANSWERS = ("profile", "task", "setting", "quality", "latency p50", "margin", "held-out prompts")


def paper_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A `recommend` document for Markdown, commands and API bodies included."""
    entries = entries_of(document)
    yield Heading(f"Recommended settings from study {document['study']}")
    yield Table(columns=text_table(_ANSWERS, (_answer_row(*e) for e in entries)))
    yield paragraph(
        f"Chosen on prompts: {_prompts(document)}.",
        (f" {words.first_upper(document['confirmation'])}.", "raw"),
        " Brackets are 95 % intervals, clustered by prompt.",
    )
    for kind in ("Note", "Warning"):
        for text in document[f"{kind.lower()}s"]:
            yield paragraph(f"{kind}: {text}.")
    for profile, task, entry in entries:
        if entry["setting"] is not None:
            yield from _section(profile, task, entry)


def _answer_row(profile: str, task: str, entry: Mapping[str, Any]) -> list[str]:
    evidence = entry["evidence"]
    if entry["setting"] is None:
        return [profile, task, f"none: {evidence['reason']}", "", "", "", ""]
    quality, p50 = evidence["quality"], evidence["latency_s"]["p50"]
    named = evidence["reference"]
    reference = f"{named}: {describe(evidence['best'])}" if named == "best" else named
    return [
        profile,
        task,
        describe(entry["setting"]),
        f"{quality['metric']} {_figure(quality)} (n={quality['n']})",
        "" if p50 is None else f"{words.digits(p50)} s (n={evidence['latency_s']['n']})",
        f"{words.plain(evidence['margin'])} against {reference}",
        confirmation_text(entry["confirmation"]),
    ]


def _section(profile: str, task: str, entry: Mapping[str, Any]) -> Iterator[Part]:
    evidence = entry["evidence"]
    yield Heading(f"{words.first_upper(profile)}, {task}", 3)
    said = (f"{compared(evidence)}.{_failures(evidence)}", front_sentence(evidence))
    yield paragraph((f"{words.first_upper(evidence['reason'])}. {' '.join(said)}", "raw"))
    if evidence["more_images"] is not None:
        yield paragraph((f"{words.first_upper(evidence['more_images']['text'])}.", "raw"))
    if (defaults := default_table(entry, MARKDOWN)) is not None:
        yield defaults
    others = len(entry["alternatives"])
    if others:
        yield _others(entry, MARKDOWN)
        yield paragraph((f"{words.first_upper(front_note(evidence))}.", "raw"))
    if others > SHOWN[MARKDOWN]:
        yield paragraph(f"{others - SHOWN[MARKDOWN]} more are in the JSON document (--json).")
    adding = [
        f"# adds the default of {d['name']} to the study\n{d['command']}"
        for d in entry["named_defaults"]
        if d["command"] is not None
    ]
    yield Code("\n".join([entry["command"], *adding]), "sh")
    if entry["snippet"] is not None:
        yield Code(entry["snippet"], "python")
    body, why_not = body_text(entry["api"]), (f"No API body: {entry['api']['why_not']}.", "raw")
    yield paragraph(why_not) if body is None else Code(body, "json")


# Words and tables that the forms share --------------------------------------------------------


def _figure(entry: Mapping[str, Any] | None, sign: str = "") -> str:
    """A value with its 95 % interval; empty where there is none."""
    return "" if entry is None else words.estimate(words.read_estimate(entry), 2, sign)


def compared(evidence: Mapping[str, Any]) -> str:
    """How much the choice was made from."""
    return (
        f"{words.plural(evidence['settings_compared'], 'setting')} compared on the same"
        f" {words.plural(evidence['n_pairs'], 'image')} of"
        f" {words.plural(evidence['n_prompts'], 'prompt')}"
    )


def _failures(evidence: Mapping[str, Any]) -> str:
    """How many of the choice's trials failed, as one more sentence; empty where none did."""
    failed = evidence["failed"]
    if not failed:
        return ""
    return f" {failed} of its {evidence['n_trials']} trials failed, which count as 0."


def front_cell(entry: Mapping[str, Any]) -> str:
    """Its probability of being dominated, and whether it is on the front; empty if not compared."""
    if entry["on_front"] is None:
        return ""
    share = entry["p_dominated"]
    said = "" if share is None else words.share(share)
    return f"{said} (front)".strip() if entry["on_front"] else said


def front_sentence(evidence: Mapping[str, Any]) -> str:
    """Where the choice lies beside the front."""
    where = "on" if evidence["on_front"] else "not on"
    share = evidence["p_dominated"]
    sure = "" if share is None else f"; dominated in {words.share(share)} of resamples"
    return f"The choice is {where} the Pareto front of quality and {_cost_word(evidence)}{sure}."


def front_note(evidence: Mapping[str, Any]) -> str:
    """What the column about the front means."""
    return (
        "dominated: in how many of"
        f" {evidence['resamples']} resamples of the prompts another setting is no worse and no"
        " slower, and better in one of the two; front: in what was measured, none is."
        f" {words.percent(SAME_COST)} of {_cost_word(evidence)} is no difference"
    )


def _cost_word(evidence: Mapping[str, Any]) -> str:
    return "latency" if evidence["speed_basis"] == "latency_s" else "evaluations"


def _others(entry: Mapping[str, Any], form: str) -> Table:
    """The settings not chosen, best first."""
    others, chosen = entry["alternatives"][: SHOWN[form]], entry["setting"]
    timed = entry["evidence"]["speed_basis"] == "latency_s"
    tests = [o["non_inferiority"] for o in others]
    on_screen = form == TERMINAL
    columns = (
        text_column(
            "not chosen" if on_screen else "setting",
            (describe(o["setting"], [chosen]) for o in others),
        ),
        text_column("quality", (_figure(o["quality"]) for o in others)),
        text_column(
            "minus the best" if on_screen else "minus the reference",
            (_figure(o["difference_from_best"], "+") for o in others),
        ),
        text_column(
            "p50 s" if timed else "evaluations",
            ("" if o["speed"] is None else words.digits(o["speed"]) for o in others),
            forms=(TERMINAL,),
        ),
        text_column(
            "p (adjusted)",
            ("" if t is None else words.digits(t["p_adjusted"], 2) for t in tests),
            forms=(MARKDOWN,),
        ),
        text_column("dominated", map(front_cell, others)),
        text_column("why not", (o["why_not"] for o in others)),
    )
    return Table(columns=columns, layouts=WRAPPED, frame="padded", forms=(form,))


_DEFAULTS = {
    TERMINAL: ("named default", "its quality", "choice minus it", "the choice is"),
    MARKDOWN: ("default", "quality", "choice minus it", "the choice is"),
    HTML: ("default of", "its quality", "this minus it", "this setting is"),
}


def default_table(entry: Mapping[str, Any], form: str) -> Table | None:
    """The named defaults beside the choice."""
    defaults = entry["named_defaults"]
    if not defaults:
        return None
    name, quality, difference, verdict = _DEFAULTS[form]
    titles = (name, "setting", quality, difference, "takes", verdict)
    numeric = titles[2:5] if form == HTML else ()
    columns = text_table(titles, map(_default_row, defaults), numeric)
    return Table(columns=columns, layouts=WRAPPED, frame="padded", forms=(form,))


def _default_row(default: Mapping[str, Any]) -> list[str]:
    """Name, setting, quality, the choice minus it, speed, verdict."""
    said = unusual_words(default, (*CURVES, "sampler"))
    name = ", ".join([*said, *(["skip-layer guidance"] if default["skip_layer_guidance"] else [])])
    verdict = default["verdict"]
    if default["status"] == "not in the study":
        verdict = "not in the study"
    elif default["on"] is not None:
        verdict = f"{verdict} (on {default['on']})"
    ratio = default["speed_ratio"]
    speed = "" if ratio is None else f"{words.number(ratio['value'], 2)}x as long"
    quality, difference = _figure(default["quality"]), _figure(default["difference"], "+")
    return [default["name"], name, quality, difference, speed, verdict]


# A plan of how many images would decide ------------------------------------------------------


_PLAN = (
    "profile",
    "task",
    "margin",
    "contenders",
    "prompts x images of each",
    "more images",
    "timed",
    "time",
    "USD",
)


def plan_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A `recommend --plan` document, commands included."""
    entries = entries_of(document)
    rows = [_plan_row(*e) for e in entries]
    hosted = any(row[-1] for row in rows)
    width = len(_PLAN) if hosted else len(_PLAN) - 1
    columns = text_table(_PLAN[:width], (row[:width] for row in rows))
    yield Text(
        ((f"How many images would decide, with study {document['study']} as pilot", "strong"),)
    )
    yield Table(columns=columns, layouts=WRAPPED, frame="padded")
    said = (
        "With them a cheaper setting that is truly equal is shown to be within the margin with a"
        f" probability of {words.percent(document['power'])} (one-sided"
        f" {words.percent(document['level'])}), and latencies that differ by"
        f" {words.percent(document['speed_margin'])} are told apart. One that is truly"
        " worse by half of the margin takes four times as many."
    )
    yield Text((said,), wraps=True)
    for profile, task, entry in entries:
        notes = (f"{profile} ({task}): {note}." for note in _plan_notes(entry))
        yield from (Text((note,), wraps=True, gap=True) for note in notes)
    commands = [c["command"] for _, _, e in entries for c in e["contenders"] if c["more_images"]]
    unique = list(dict.fromkeys(c for c in commands if c is not None))
    if unique:
        yield Code("\n".join(unique), "sh", forms=(TERMINAL, MARKDOWN))


def _plan_row(profile: str, task: str, entry: Mapping[str, Any]) -> list[str]:
    prompts, timed = entry["prompts"], entry["timed"]
    usd = entry["usd"]
    price = entry["usd_per_image"]
    return [
        profile,
        task,
        words.plain(entry["margin"]),
        f"{len(entry['contenders'])} of {entry['pilot']['settings']}",
        "" if prompts is None else f"{prompts} x {entry['images_per_prompt']}",
        "" if entry["more_images"] is None else str(entry["more_images"]),
        _timed(timed),
        "" if entry["seconds"] is None else words.seconds(entry["seconds"]),
        "" if usd is None else f"{words.usd(usd)} ({words.usd(price)} an image)",
    ]


def _timed(timed: Mapping[str, Any] | None) -> str:
    if timed is None:
        return ""
    if timed["images"] is None:
        return "no practicable number"
    starts = "1 start" if timed["starts"] == 1 else f"{timed['starts']} starts"
    return f"{timed['images']} x {starts}"


def _plan_notes(entry: Mapping[str, Any]) -> Iterator[str]:
    """The part of an entry that its row does not say."""
    if entry["why"] is not None:
        yield entry["why"]
    if entry["settled"]:
        named = [describe(s) for s in entry["settled"]]
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        yield f"shown to be beyond the margin already, and given no more images: {shown}"
    timed = entry["timed"]
    if timed is not None and timed["one_start"] and entry["usd"] is None:
        yield (
            "timed within one start only; how far starts differ is not in this pilot, a pilot with"
            " starts=2 would say"
        )
