"""Judges behind an OpenAI-compatible endpoint: P("yes") to questions about an image.

`vqa` asks VQAScore's one question (Lin et al. 2024, arXiv 2404.01291). `tifa` asks a prompt's own
questions from a file and takes the mean probability of the answers (Soft-TIFA: arXiv 2512.16853).
Probabilities are read from the first token's log probabilities, so an endpoint has to give those.

What a call would cost is counted before the first one, and refused above a limit. Each answer is
kept as it comes, by endpoint, model, question and image, so that nothing is paid for twice.
"""

import base64
import hashlib
import http.client
import io
import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image as Pillow

from sd35bench import words
from sd35bench.errors import ConfigError, MetricError
from sd35bench.loopback import is_loopback
from sd35bench.metrics.base import Image, Value

VQA = 'Does this figure show "{prompt}"? Please answer yes or no.'
KEY_VARIABLE = "OPENAI_API_KEY"
_TIMEOUT_S = 120.0
_MOST_BYTES = 1_000_000
_TOP = 20
_AT_ONCE = 8

Question = tuple[str, str]
"""What is asked, and the answer whose probability counts, in lower case."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(slots=True)
class Endpoint:
    """Asks one model of an endpoint; `usd_per_call` and `max_cost_usd` bound what it may cost."""

    url: str
    model: str
    questions: Mapping[str, Sequence[Question]] | None = None
    usd_per_call: float = 0.0
    max_cost_usd: float = 0.0
    cache: Path | None = None
    spent_usd: float = 0.0
    _kept: dict[str, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def asks(self, prompt: str) -> Sequence[Question]:
        """The questions about an image of this prompt; none where the file has none."""
        if self.questions is None:
            return [(VQA.format(prompt=prompt), "yes")]
        return self.questions.get(prompt, ())

    def prepare(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Refuse a bill above the limit before the first call; `wanted`: (digest, prompt).

        Raises: MetricError.
        """
        calls = sum(
            self._name(digest, question) not in self._known()
            for digest, prompt in wanted
            for question in self.asks(prompt)
        )
        bill = calls * self.usd_per_call
        if self.spent_usd + bill > self.max_cost_usd + 1e-9:
            raise MetricError(
                f"metric.judge.max_cost_usd={self.max_cost_usd:g}: {calls} calls at"
                f" {self.usd_per_call:g} USD would cost {words.bill(bill)}; raise the limit to"
                " agree"
            )

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], digests: Sequence[str]
    ) -> list[Value]:
        """Mean probability of the answers, each in the detail; ``None`` without a question.

        Raises: MetricError.
        """
        asked = [
            (n, digest, question)
            for n, (prompt, digest) in enumerate(zip(prompts, digests, strict=True))
            for question in self.asks(prompt)
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(lambda a: self._answer(images[a[0]], a[1], a[2]), asked))
        by_image: dict[int, list[float]] = {}
        for (n, _, _), probability in zip(asked, found, strict=True):
            by_image.setdefault(n, []).append(probability)
        return [_mean(by_image.get(n, [])) for n in range(len(images))]

    def _answer(self, image: Image, digest: str, question: Question) -> float:
        name = self._name(digest, question)
        with self._lock:
            known = self._known().get(name)
            if known is not None:
                return known
            if self.spent_usd + self.usd_per_call > self.max_cost_usd + 1e-9:
                raise MetricError(
                    f"metric.judge.max_cost_usd={self.max_cost_usd:g}: reached; what was asked is"
                    " kept, raise the limit to go on"
                )
            self.spent_usd += self.usd_per_call
        probability = probability_of(self._ask(image, question[0]), question[1], self.model)
        with self._lock:
            self._known()[name] = probability
            if self.cache is not None:
                line = json.dumps({"name": name, "probability": probability})
                with open(self.cache, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
        return probability

    def _ask(self, image: Image, question: str) -> Any:
        data = io.BytesIO()
        Pillow.fromarray(image).save(data, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY_VARIABLE)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise MetricError(f"judge {self.model}: the answer is longer than 1 MB")
            return json.loads(text)
        except urllib.error.HTTPError as exc:
            raise MetricError(f"judge {self.model}: the endpoint answered {exc.code}") from None
        except (OSError, http.client.HTTPException, ValueError) as exc:
            kind = type(exc).__name__
            raise MetricError(f"judge {self.model}: no usable answer ({kind})") from None

    def _name(self, digest: str, question: Question) -> str:
        parts = (self.url, self.model, *question, digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _known(self) -> dict[str, float]:
        """Answers by name; read from the cache once."""
        if self._kept is None:
            self._kept = {}
            if self.cache is not None and self.cache.is_file():
                for line in self.cache.read_text("utf-8").splitlines():
                    try:
                        entry = json.loads(line)
                        self._kept[entry["name"]] = float(entry["probability"])
                    except (ValueError, KeyError, TypeError):
                        continue  # a line that a crash cut short is asked again
        return self._kept


def probability_of(answer: Any, wanted: str, model: str) -> float:
    """Probability that the first token says `wanted`, over its alternatives' spellings.

    Raises: MetricError where the endpoint gives no log probabilities.
    """
    try:
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(str(t["token"]).strip().strip('."').lower(), float(t["logprob"])) for t in top]
    except (KeyError, IndexError, TypeError, ValueError):
        raise MetricError(
            f"judge {model}: the endpoint gives no top_logprobs, which a soft score needs"
        ) from None
    first = wanted.split()[0]
    total = sum(math.exp(p) for token, p in pairs if token and token == first)
    if not math.isfinite(total):
        raise MetricError(f"judge {model}: log probabilities that are no numbers")
    return min(1.0, total)


def check_url(url: str) -> bool:
    """Whether an endpoint is on this machine. Raises: ConfigError unless it is https or that."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    here = is_loopback(host)
    if parts.username or parts.password:
        raise ConfigError("metric.judge.endpoint: no credentials in the address; see its help")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and here)):
        raise ConfigError(
            f"metric.judge.endpoint={url}: must be https://HOST/v1, or http on this machine"
        )
    return here


def read_questions(path: Path) -> tuple[dict[str, list[Question]], str]:
    """Read ``{"prompt": …, "questions": [[question, answer], …]}`` a line; also the file's digest.

    Raises: ConfigError with the line.
    """
    if not path.is_file():
        raise ConfigError(f"metric.judge.questions={path}: there is no such file")
    data = path.read_bytes()
    found: dict[str, list[Question]] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pairs = [(str(q), str(a).strip().lower()) for q, a in row["questions"]]
            found[str(row["prompt"])] = [(q, a) for q, a in pairs if a]
        except (ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                f'{path}:{number}: expected {{"prompt": TEXT, "questions": [[QUESTION, ANSWER]]}}'
            ) from exc
    return found, hashlib.sha256(data).hexdigest()[:8]


def _mean(probabilities: Sequence[float]) -> Value:
    if not probabilities:
        return Value(None, {"reason": "no question about this prompt"})
    return Value(sum(probabilities) / len(probabilities), {"probabilities": list(probabilities)})
