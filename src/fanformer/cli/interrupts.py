"""What Ctrl-C does to a command: ends it without a traceback, from the first line that runs on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 130
_IMPORT_SYSTEM = "<frozen importlib._bootstrap"
_SECONDS_UNTIL_AGAIN = 0.01
_SHOW_CURSOR = b"\x1b[?25h"


def heed_from_now() -> None:
    """Let Ctrl-C end the process at once, if it is the command and no other program; importing this module does so."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.stem in ("fanformer", "HybridFun") or program == Path(__file__).with_name("main.py"):
        _install(_end_at_once)


@contextmanager
def heeded() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, or end the process where that would be of no use.

    While a module is imported, which is before the work or at a pause of it, the process ends at once: torch's
    extensions abort when an exception goes through them. One that is lost in a destructor or the like, where Python
    prints and drops it, is raised again soon after. What had Ctrl-C before gets it back; a command that ends leaves it
    to the system.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not _install(_on_interrupt):
        yield
        return
    hook = sys.unraisablehook
    sys.unraisablehook = _raised_again_instead_of(hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is _end_at_once else previous)


def _install(handler: Callable[[int, FrameType | None], None]) -> bool:
    """Take Ctrl-C over from Python; return False where somebody else has it, or it is ignored."""
    ours = (signal.default_int_handler, _end_at_once, _on_interrupt)
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) not in ours:
        return False
    signal.signal(signal.SIGINT, handler)
    return True


def _end_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(Exception):  # the signal may have come in the middle of writing
        sys.stdout.flush()
    if os.name == "posix" and os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # a progress bar has hidden it
    os._exit(INTERRUPTED)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        _end_at_once(number, frame)
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False


def _raised_again_instead_of(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    def on_unraisable(event: Any) -> None:
        if not issubclass(event.exc_type, KeyboardInterrupt):
            hook(event)
            return
        again = threading.Timer(_SECONDS_UNTIL_AGAIN, _send_again)
        again.daemon = True
        again.start()

    return on_unraisable


def _send_again() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # ends a wait of that thread, too
    else:
        signal.raise_signal(signal.SIGINT)


heed_from_now()
