"""What a client is told when its request is not done: a status, a sentence, perhaps headers."""

from collections.abc import Mapping

from sd35bench.errors import SD35BenchError

__all__ = ["Refusal"]


class Refusal(SD35BenchError):
    """A request that is not done; the answer is ``{"error": message}`` with `status`."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """`message` goes to the client: it names field, value and remedy, and no secret."""
        super().__init__(message)
        self.status = status
        self.headers = {} if headers is None else dict(headers)
