"""A prompt set that is made, not read."""

from sd35bench.prompts import PromptItem, PromptSet
from sd35bench.types import PromptRef


class Counted(PromptSet):
    """Shapes, as many as are asked for."""

    def read(self, spec):
        count = 4 if spec.limit is None else spec.limit
        return [
            PromptItem(ref=PromptRef(id=f"{n}", set="counted"), prompt=f"{n + 2} red circles")
            for n in range(count)
        ]
