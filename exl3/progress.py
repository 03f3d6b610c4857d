"""Progress of long work: a bar on a terminal, a line now and then in a file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Counts work of known total and tells what is done, what is being done, how long is left.

    quiet: shows nothing.
    """

    def __init__(self, total: float, title: str, quiet: bool = False) -> None:
        self.title, self.step, self.quiet = title, "", quiet
        self.terminal = sys.stderr.isatty() and not quiet
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
        if self.terminal or self.quiet or now - self.told < LINE_EVERY or fresh <= 0:
            return
        self.told = now
        left = (now - self.began) * (self.total - self.done) / fresh
        print(
            f"{self.title}: {100 * self.done / self.total:.0f}%, {self.step}, "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )


@contextmanager
def no_transformers_bar() -> Iterator[None]:
    """Without the bar that transformers shows for every load and save."""
    from transformers.utils import logging as transformers_logging  # here: it takes a second

    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
