"""What the original's gradients say about every linear, kept in a file."""

import json
from pathlib import Path

from exl3.errors import UserError
from exl3.files import write_json

NAME = "sensitivities.json"


class Sensitivities:
    """By blocks, which come one after another: key → KLD per unit of relative squared error, mean
    per token (`exl3.sensitivity.rounding_kld`)."""

    def __init__(
        self, folder: str | Path, identity: dict[str, str], blocks: int, own: bool = True
    ) -> None:
        """identity: what they depend on. own: a file of something else is what an earlier job left,
        and forgotten; UserError where it is not our own, or damaged."""
        self.path, self.identity, self.blocks = Path(folder) / NAME, identity, blocks
        self._found: dict[str, dict[str, float]] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text())
            found = {i: _numbers(of) for i, of in content["blocks"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it and try again") from None
        if content.get("of") == identity:
            self._found = found
        elif not own:
            raise UserError(f"{self.path} is of another model or other rows; give another folder")

    def has(self, i: int) -> bool:
        """Whether block i's are known."""
        return str(i) in self._found

    def save(self, i: int, klds: dict[str, float]) -> None:
        """Adds block i's to the file."""
        self._found[str(i)] = klds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"of": self.identity, "blocks": self._found})

    @property
    def complete(self) -> bool:
        return all(self.has(i) for i in range(self.blocks))

    def by_key(self) -> dict[str, float]:
        return {key: kld for klds in self._found.values() for key, kld in klds.items()}


def _numbers(klds: dict[str, float]) -> dict[str, float]:
    return {str(key): float(kld) for key, kld in klds.items()}
