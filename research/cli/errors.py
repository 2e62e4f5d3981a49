"""Unexpected errors: one line on the screen that names the user's own file and line, and the traceback in a file."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from research.core.state import InvalidArgument
from research.distributed import processes, rendezvous
from research.errors import one_line, user_frame

_LIBRARY = Path(__file__).parents[1]


def describe_error(error: BaseException) -> str:
    """Returns an error as one line: file and line of the user's own code, if it comes from there, its type and its message.

    >>> describe_error(ValueError("no traceback"))
    'ValueError: no traceback'
    """
    frame = user_frame(error)
    message = one_line(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        frame, message = (error.filename, error.lineno or 0), error.msg
    where = "" if frame is None else f"{frame[0]}:{frame[1]}: "
    return f"{where}{type(error).__name__}{': ' if message else ''}{message}"


def traceback_file(directory: Path) -> Path:
    """Returns where this process writes a traceback: error.txt, or error-3.txt in process 3 of several."""
    return directory / ("error.txt" if jax.process_count() == 1 else f"error-{jax.process_index()}.txt")


@contextlib.contextmanager
def errors_as_one_line(directory: Path) -> Iterator[None]:
    """Turns every unexpected exception into an `InvalidArgument` of one line, and writes its traceback into a run's directory.

    The line starts with the user's own file and line if the error comes from there. Raises `PeerLost` if another process is gone.
    """
    try:
        yield
    except InvalidArgument as error:
        frame = _user_cause(error)
        if frame is None:
            raise
        location = f"{frame[0]}:{frame[1]}: "
        message = str(error) if str(error).startswith(location) else f"{location}{error}"
        raise InvalidArgument(f"{message}{write_traceback(traceback_file(directory))}") from error
    except Exception as error:
        where = write_traceback(traceback_file(directory))
        if processes.is_peer_failure(error):
            raise rendezvous.PeerLost(f"another process is gone{where}, to go on: just resume {directory}") from error
        raise InvalidArgument(f"{_describe_write_error(error, directory) or describe_error(error)}{where}") from error


def _describe_write_error(error: Exception, directory: Path) -> str | None:
    """Returns one line about a file of a run that can't be read or written; None for other errors, and for the user's files."""
    if not isinstance(error, OSError) or error.strerror is None or user_frame(error) is not None:
        return None
    advice = "free space or fix permissions, then run the same command again"
    return f"{error.filename or directory}: it can't be written or read ({error.strerror}); {advice}"


def _user_cause(error: InvalidArgument) -> tuple[str, int] | None:
    """Returns file and line of the user's code if the library raised an error because that code failed, else None."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    cause: BaseException | None = error
    while cause is not None and Path(innermost).is_relative_to(_LIBRARY):
        cause = cause.__cause__
        frame = None if cause is None else user_frame(cause)
        if frame is not None:
            return frame
    return None


def write_traceback(path: Path) -> str:
    """Writes the traceback of the current exception to a file. Returns where it is, as the end of a message.

    >>> write_traceback(Path("/dev/null/error.txt"))
    ''
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), "utf-8", "replace")
    except OSError:  # the disk may be what failed
        with contextlib.suppress(OSError):
            path.unlink()
        return ""
    return f"; the traceback is in {path}"


def remove_tracebacks(directory: Path) -> None:
    """Removes the tracebacks of earlier attempts from the directory of a run that has finished."""
    for path in directory.glob("error*.txt"):
        if re.fullmatch(r"error(-\d+)?\.txt", path.name):
            path.unlink(missing_ok=True)
