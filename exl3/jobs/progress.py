"""Progress of long work: a bar on a terminal, a line now and then in a file."""

import sys
import time

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Counts work of known total and tells what is done, what is being done, how long is left."""

    def __init__(self, total: float, title: str) -> None:
        self.title, self.step = title, ""
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=title,
            disable=not self.terminal,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.total, self.done, self.skipped = total, 0.0, 0.0
        self.began = self.told = time.monotonic()

    def doing(self, step: str) -> None:
        """Names the step that is under way."""
        self.step = step
        self.bar.set_postfix_str(step, refresh=True)
        self._line()

    def advance(self, amount: float) -> None:
        self.done += amount
        self.bar.update(amount)
        self._line()

    def skip(self, amount: float) -> None:
        """Work that an earlier run has done: it says nothing about the speed of this one."""
        self.skipped += amount
        self.done += amount
        if self.terminal:
            self.bar.initial += amount
            self.bar.update(amount)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.terminal:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> None:
        now = time.monotonic()
        fresh = self.done - self.skipped
        if self.terminal or now - self.told < LINE_EVERY or fresh <= 0:
            return
        self.told = now
        left = (now - self.began) * (self.total - self.done) / fresh
        print(
            f"{self.title}: {100 * self.done / self.total:.0f}%, {self.step}, "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )
