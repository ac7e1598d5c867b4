"""`sd35bench completion SHELL`: what a shell completes, made from the parsers and the fields.

Verbs, flags with their values, names of fields with theirs, and the studies of the results folder,
which are looked up when a key is pressed.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from sd35bench.cli.output import Answer, write_line
from sd35bench.cli.parser import CONFIG_DIR, PLUGIN_DIR, RESULTS_DIR, Command, Flag, Given, flags_of
from sd35bench.config.files import GROUPS, choices, config_dir
from sd35bench.errors import ConfigError, nearest

_STUDIES = ("STUDY", "BASELINE", "CANDIDATE")
_FOLDERS = (RESULTS_DIR.name, CONFIG_DIR.name, PLUGIN_DIR.name)
_RUN_WORDS = ("prompt", "from", "profile", "margin", "power")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """One verb: its flags, the names of its settings, its fixed words, whether it takes studies."""

    verb: str
    means: str
    flags: tuple[Flag, ...]
    names: tuple[str, ...]
    words: tuple[str, ...]
    studies: bool


def complete(given: Given) -> Answer:
    """Print a shell's script. Raises: ConfigError for a shell that has none."""
    shell = given.words[0]
    if shell not in SCRIPTS:
        raise ConfigError(f"{shell!r}: give one of {', '.join(SCRIPTS)}{nearest(shell, SCRIPTS)}")
    text = SCRIPTS[shell](list(completed()), values())
    if not given.as_json:
        write_line(text)
    return Answer(document={"shell": shell, "script": text})


def completed() -> Iterator[Completed]:
    """Every verb as its parser has it."""
    from sd35bench.cli import VERBS

    for verb, (module, means) in VERBS.items():
        command: Command = import_module(f"sd35bench.cli.{module}").COMMANDS[verb]
        words = [word.strip("[] .") for word in command.words]
        yield Completed(
            verb=verb,
            means=means,
            flags=flags_of(command),
            names=tuple(_names(verb)) if command.settings else (),
            words=tuple(choice for word in words if word.islower() for choice in word.split("|")),
            studies=any(word.split()[0] in _STUDIES for word in words),
        )


def _names(verb: str) -> Iterable[str]:
    """Names of a verb's ``NAME=VALUE`` arguments."""
    from sd35bench.cli.reference import OPTIONS
    from sd35bench.config.models import FIELDS
    from sd35bench.config.serve import SERVE_FIELDS
    from sd35bench.config.tune import OWN

    run = (*(g for g in GROUPS if g not in ("metric", "profile")), *FIELDS)
    found = {
        "run": (*run, *_RUN_WORDS),
        "tune": (*run, "prompt", *OWN),
        "serve": ("model", "backend", *SERVE_FIELDS),
        "export": (*run, "output"),
        "reference": OPTIONS,
    }
    return dict.fromkeys(found.get(verb, ()))


def values() -> dict[str, tuple[str, ...]]:
    """What can stand after a flag or a name, where that can be listed."""
    from sd35bench.config.models import FIELDS
    from sd35bench.config.serve import SERVE_FIELDS
    from sd35bench.report.recommend import SNIPPETS

    policies = sorted(path.stem for path in (config_dir() / "policy").glob("*.yaml"))
    found = {
        **{name: _listed(field.takes) for name, field in {**SERVE_FIELDS, **FIELDS}.items()},
        **{group: tuple(choices(group)) for group in GROUPS},
        "--metric": tuple(choices("metric")),
        "--policy": tuple(policies),
        "--profile": tuple(choices("profile")),
        "--snippet": tuple(SNIPPETS),
    }
    return {name: listed for name, listed in found.items() if listed}


def _listed(takes: Any) -> tuple[str, ...]:
    if takes is bool:
        return ("true", "false")
    if get_origin(takes) is Literal:
        return tuple(map(str, get_args(takes)))
    inner = get_args(takes)[:1]
    return _listed(inner[0]) if inner and get_origin(takes) is not None else ()


# bash and zsh -------------------------------------------------------------------------------------


def _cases(name: str, lists: Mapping[str, Iterable[str]]) -> str:
    """A shell function that prints the list of its argument, a word a line."""
    lines = [
        f"    {shlex.quote(key)}) printf '%s\\n' {' '.join(map(shlex.quote, words))} ;;"
        for key, words in lists.items()
        if words
    ]
    return "\n".join((f"_sd35bench_{name}() {{", '  case "$1" in', *lines, "  esac", "}"))


def _tables(verbs: list[Completed], listed: dict[str, tuple[str, ...]]) -> str:
    flags = {v.verb: [n for f in v.flags for n in f.names] for v in verbs}
    valued = dict.fromkeys(f.name for v in verbs for f in v.flags if f.value)
    own = {v.verb: [*v.words, *(["STUDIES"] if v.studies else [])] for v in verbs}
    return "\n".join(
        (
            _cases("flags", flags),
            _cases("names", {v.verb: [f"{name}=" for name in v.names] for v in verbs}),
            _cases("words", own),
            _cases("values", listed),
            _cases("valued", {f: ["folder" if f in _FOLDERS else "file"] for f in valued}),
            _SHARED,
        )
    )


_SHARED = r"""_sd35bench_studies() {
  for study in "$1"/*/study.json; do
    [ -f "$study" ] && study=${study%/study.json} && printf '%s\n' "${study##*/}"
  done
}"""

_BASH = r"""
_sd35bench() {
  local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} cur last verb name value head folder=results i
  local -a given
  cur=${line##*[[:space:]]}
  IFS=$' \t' read -ra given <<< "${line%"$cur"}"
  COMPREPLY=()
  if ((${#given[@]} < 2)); then
    COMPREPLY=($(compgen -W "$(_sd35bench_verbs all)" -- "$cur"))
    return
  fi
  verb=${given[1]}
  for ((i = 2; i < ${#given[@]}; i++)); do
    case "${given[i]}" in
      --results-dir=* | results_dir=*) folder=${given[i]#*=} ;;
      --results-dir) folder=${given[i + 1]-results} ;;
    esac
  done
  last=${given[${#given[@]} - 1]}
  if [[ $cur == *=* ]]; then
    name=${cur%%=*} value=${cur#*=}
  elif [[ $last == --* && -n $(_sd35bench_valued "$last") ]]; then
    name=$last value=$cur
  fi
  if [[ -n $name ]]; then
    [[ $value == *,* ]] && head=${value%,*}, value=${value##*,}
    [[ $cur == *=* && $COMP_WORDBREAKS != *=* ]] && head=$name=$head
    if [[ -n $(_sd35bench_values "$name") ]]; then
      COMPREPLY=($(compgen -P "$head" -W "$(_sd35bench_values "$name")" -- "$value"))
    else
      compopt -o filenames 2>/dev/null
      [[ $(_sd35bench_valued "$name") == folder ]] && i=-d || i=-f
      COMPREPLY=($(compgen -P "$head" $i -- "$value"))
    fi
  elif [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$(_sd35bench_flags "$verb")" -- "$cur"))
  else
    local words=$(_sd35bench_words "$verb") names=$(_sd35bench_names "$verb")
    [[ $words == *STUDIES ]] && words=${words%STUDIES}$(_sd35bench_studies "$folder")
    COMPREPLY=($(compgen -W "$words$IFS$names" -- "$cur"))
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
  fi
  return 0
}
complete -o bashdefault -F _sd35bench sd35bench"""

_ZSH = r"""
_sd35bench() {
  local cur=$words[CURRENT] verb=$words[2] last=$words[CURRENT-1] folder=results name="" at
  local -a found
  if ((CURRENT == 2)); then
    found=(${(f)"$(_sd35bench_verbs all)"})
    compadd -a found
    return
  fi
  for ((at = 3; at < CURRENT; at++)); do
    case $words[at] in
      --results-dir=* | results_dir=*) folder=${words[at]#*=} ;;
      --results-dir) folder=$words[at+1] ;;
    esac
  done
  if [[ $cur == *=* ]]; then
    name=${cur%%=*}
  elif [[ $last == --* && -n $(_sd35bench_valued $last) ]]; then
    name=$last
  fi
  if [[ -n $name ]]; then
    found=(${(f)"$(_sd35bench_values $name)"})
    compset -P '*[=,]'
    if (($#found)); then
      compadd -a found
    elif [[ $(_sd35bench_valued $name) == folder ]]; then
      _files -/
    else
      _files
    fi
  elif [[ $cur == -* ]]; then
    found=(${(f)"$(_sd35bench_flags $verb)"})
    compadd -a found
  else
    found=(${(f)"$(_sd35bench_words $verb)"})
    (($found[(Ie)STUDIES])) && found=(${found:#STUDIES} ${(f)"$(_sd35bench_studies $folder)"})
    compadd -a found
    found=(${(f)"$(_sd35bench_names $verb)"})
    compadd -S '' -a found
  fi
}
compdef _sd35bench sd35bench"""


def _of_bourne(shell: str, body: str, verbs: list[Completed], listed: Any) -> str:
    top = {"all": [*(v.verb for v in verbs), "--help", "--version"]}
    head = "#compdef sd35bench\n" if shell == "zsh" else ""
    said = f"# Made by `sd35bench completion {shell}`."
    return f"{head}{said}\n{_cases('verbs', top)}\n{_tables(verbs, listed)}{body}"


# fish ---------------------------------------------------------------------------------------------

_FISH = r"""
function __sd35bench_is
  set -l words (commandline -opc)
  test (count $words) -ge 2; and test $words[2] = $argv[1]
end
function __sd35bench_studies
  set -l folder results
  set -l words (commandline -opc)
  for i in (seq (count $words))
    switch $words[$i]
      case '--results-dir=*' 'results_dir=*'
        set folder (string split -m 1 = -- $words[$i])[2]
      case --results-dir
        test $i -lt (count $words); and set folder $words[(math $i + 1)]
    end
  end
  for f in $folder/*/study.json
    basename (dirname $f)
  end
end
function __sd35bench_values
  set -l cur (commandline -ct)
  string match -q '*=*' -- $cur; or return
  set -l head (string replace -r '[^=,]*$' '' -- $cur)
  set -l values
  switch (string split -m 1 = -- $cur)[1]
"""


def fish(verbs: list[Completed], listed: dict[str, tuple[str, ...]]) -> str:
    """Write the script for fish (3.0 and later)."""
    lines = ["# Made by `sd35bench completion fish`.", _FISH.strip("\n")]
    for name in dict.fromkeys(name for verb in verbs for name in verb.names if name in listed):
        lines += [f"    case {name}", f"      set values {' '.join(map(_fish, listed[name]))}"]
    lines += ["  end", "  set -q values[1]; and printf '%s\\n' $head$values", "end"]
    lines.append("complete -c sd35bench -f")
    first = "complete -c sd35bench -n 'test (count (commandline -opc)) -eq 1'"
    lines += [f"{first} -a {verb.verb} -d {_fish(verb.means)}" for verb in verbs]
    lines += [f"{first} -l help -d 'every verb'", f"{first} -l version"]
    for verb in verbs:
        head = f"complete -c sd35bench -n '__sd35bench_is {verb.verb}'"
        lines += [f"{head} {_fish_flag(flag, listed)}" for flag in verb.flags]
        words = [*verb.words, *(f"{name}=" for name in verb.names)]
        words += ["(__sd35bench_studies)"] if verb.studies else []
        words += ["(__sd35bench_values)"] if verb.names else []
        if words:
            lines.append(f"{head} -a {_fish(' '.join(words))}")
    return "\n".join(lines)


def _fish_flag(flag: Flag, listed: dict[str, tuple[str, ...]]) -> str:
    names = [f"-s {n[1:]}" if len(n) == 2 else f"-l {n[2:]}" for n in flag.names]
    taken = " -r" if flag.value else ""
    if flag.name in listed:
        taken += f" -a {_fish(' '.join(listed[flag.name]))}"
    elif flag.value:
        taken += " -F"
    return f"{' '.join(names)}{taken} -d {_fish(flag.means)}"


def _fish(text: str) -> str:
    """A text in fish's single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: dict[str, Callable[..., str]] = {
    "bash": partial(_of_bourne, "bash", _BASH),  # 3.2 and later
    "zsh": partial(_of_bourne, "zsh", _ZSH),
    "fish": fish,
}

COMMANDS = {
    "completion": Command(
        call=complete,
        words=("SHELL",),
        about="SHELL is bash, zsh or fish. Verbs, flags, fields with their values, and studies.",
        examples="""
source <(sd35bench completion bash)         for this session; in ~/.bashrc for all
sd35bench completion zsh > ~/.zfunc/_sd35bench
sd35bench completion fish > ~/.config/fish/completions/sd35bench.fish
""",
    )
}
