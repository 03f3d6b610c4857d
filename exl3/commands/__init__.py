"""The commands, by name: `exl3 convert ...`, `python -m exl3 convert ...`, `python convert.py ...`.

A command is a module with `main(argv, prog)`. It is imported only when it is called, and imports
what is heavy only when its arguments are read, so that --help answers at once.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

from exl3 import __version__, cli

# name: (module, what it does)
COMMANDS = {
    "convert": ("exl3.commands.convert", "convert a Hugging Face model to an EXL3 quant"),
    "verify": ("exl3.commands.verify", "check that a folder is a sound EXL3 model"),
    "optimize": ("exl3.commands.optimize", "choose the best layers of quants for a size"),
    "recompile": ("exl3.commands.recompile", "splice a quant by hand"),
    "compare": ("exl3.commands.compare_q", "compare quants: perplexity, KL divergence, a chart"),
    "compare-logits": (
        "exl3.commands.compare_q_logits",
        "write a model's logits, the reference of a comparison",
    ),
    "ppl": ("exl3.commands.ppl", "perplexity of one model, for a quick look"),
    "measure": ("exl3.commands.measure", "measure what the bits of each part of a model are worth"),
    "self-text": ("exl3.commands.self_text", "let a model write text to calibrate on"),
    "demo": ("exl3.commands.demo", "convert a small model at 4, 3 and 2 bits and compare"),
    "make-demo-model": ("exl3.commands.make_demo_model", "train a small language model to try"),
}


def main(argv: list[str] | None = None) -> None:
    """The console script `exl3` and `python -m exl3`."""
    program = Path(sys.argv[0]).stem
    program = "python -m exl3" if program == "__main__" else program
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        cli.run(lambda: print(_help(program), flush=True))
    elif name == "--version":
        print(f"exl3 {__version__}")
    elif name in COMMANDS:
        run(name, rest, f"{program} {name}")
    else:
        problem = f"there is no command {name!r}" if name else "which command?"
        print(f"Error: {problem}\n\n{_help(program)}", file=sys.stderr)
        sys.exit(2)


def run(name: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Runs a command by its name; argv and prog: those of this process unless given."""

    # Before torch is there: threads that wait for each other must not keep a busy machine's cores
    # from those they wait for (training took hours instead of minutes beside two other jobs).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def command() -> None:
        import_module(COMMANDS[name][0]).main(argv, prog)

    cli.run(command)


def _help(program: str) -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    return "\n".join(
        (
            f"usage: {program} COMMAND ...",
            "",
            "commands:",
            *lines,
            "",
            f"{program} COMMAND --help tells more about one.",
        )
    )
