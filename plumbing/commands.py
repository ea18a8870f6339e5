"""One shell for all scripts: argument types, Ctrl-C, too little memory, errors in one line, exit codes, a closed stdout.

A script that imports torch takes seconds to start, so `begin` parses its arguments first, and this file imports no torch.
Exit codes: 0 done, 1 some inputs failed or nothing could be done, 2 wrong arguments, 130 Ctrl-C.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path

from packaging.version import Version

SCRIPT = Path(sys.argv[0]).name or "python"


# --- argument types, optional packages --------------------------------------------------------------------------------


def whole(low=1, high=2**63 - 1):
    """An argument's type: a whole number from low to high."""

    def convert(text):
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return convert


def real(text):
    """An argument's type: a number from 0 on, neither infinite nor NaN."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")


def optional(package, what, least="", install=""):
    """An optional package, imported where it is used. ValueError with its `pip install` if it is missing, or too old."""
    name = package.replace("_", "-")
    pip = "pip install " + (install or (f"'{name}>={least}'" if least else name))
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise ValueError(f"expected the package {name} for {what}, which is not installed: {pip}") from None
    if least and Version(module.__version__) < Version(least):
        raise ValueError(f"expected {name} {least} or newer for {what}, got {module.__version__}: {pip}")
    return module


# --- the beginning and the end of a script ----------------------------------------------------------------------------


def begin(parse_args, on_interrupt, at_once=False):
    """Parses the command line and takes over Ctrl-C. Returns the arguments.

    on_interrupt: what Ctrl-C says. It raises SystemExit wherever the script is, so that a file in the writing is removed;
    at_once ends the process instead, for threads that may be minutes from the end of their work.
    """
    args = parse_args()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be valid UTF-8
    signal.signal(signal.SIGINT, interruption(on_interrupt, at_once))
    return args


def interruption(text, at_once=False):
    """The handler of Ctrl-C; a second one ends the process. Of torchrun's processes the first one speaks."""

    def interrupted(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{SCRIPT}: interrupted; {text}\n".encode())
        if at_once or not run.entered:  # libraries that are being imported may turn an exit into something else
            os._exit(130)
        sys.exit(130)

    return interrupted


def import_without_training_packages():
    """Imports diffusers without peft, transformers, accelerate and scipy: half of a cold start, and restoring needs none."""
    hidden = [name for name in ("peft", "transformers", "accelerate", "scipy") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None is Python's word for "not installed"
    from diffusers import AutoencoderKL, ControlNetModel, LCMScheduler, UNet2DConditionModel  # noqa: F401

    for name in hidden:
        del sys.modules[name]


def run(work, args, memory="use --device cpu, or a machine with more memory", fault=1):
    """work(args), an exit code or None for 0. What a user can cause becomes one line on stderr, and the exit code `fault`.

    memory: what to do about too little of it. Any other error is one of the code itself and comes through.
    """
    run.entered = True
    try:
        with enough_memory("this command", memory):
            return work(args) or 0
    except Exception as e:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # Ctrl-C, whose exit a library may turn into an error
            return 130
        if not isinstance(e, (ValueError, OSError)):
            raise
        complain((str(e).strip() or repr(e)).splitlines()[-1])  # a data worker's error ends with what was raised there
        return fault


run.entered = False


# --- one line a fault ---------------------------------------------------------------------------------------------------


def say(text):
    """Prints a line at once. Output that nobody reads, as after `| head -1` or `>&-`, is no failure."""
    try:
        print(text, flush=True)
    except OSError as e:
        if not isinstance(e, BrokenPipeError):  # a full disk
            complain(f"expected to print, got {e.strerror}: the lines end here, the work goes on")
        sys.stdout = open(os.devnull, "w")  # Python would try to flush the rest at its end


def complain(error):
    """Names a fault on stderr. Returns 1, to be counted."""
    print(f"{SCRIPT}: {error}", file=sys.stderr, flush=True)
    return 1


@contextlib.contextmanager
def enough_memory(what, remedy):
    """Turns running out of memory, which Python, numpy and torch each report in another way, into a ValueError of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        texts = ("out of memory", "can't allocate memory")  # torch on a GPU, on a CPU
        if isinstance(e, RuntimeError) and not any(text in str(e) for text in texts):
            raise
        raise ValueError(f"expected enough memory for {what}, got too little: {remedy}") from e
