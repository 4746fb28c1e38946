"""What a caller can get wrong. Each message is one line: the field or file, what came, what to do.

The command line turns these into exit code 2, a service into HTTP 4xx. Anything else that is
raised is a defect of this project.
"""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 1500  # characters; a damaged file can hold names of any length


class GenTronError(Exception):
    """Base of every error that a caller, an operator or a damaged file can cause.

    Whatever it was made from (a library's complaint, a field of a file), its text is one line
    without control characters, so that it can go into a log, a header or a terminal as it is.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes it keeps its text and fields, whatever its constructor takes."""
        return _restored, (type(self), self.args, vars(self))


def _restored(
    kind: type[GenTronError], texts: tuple[Any, ...], fields: dict[str, Any]
) -> GenTronError:
    error = kind.__new__(kind)
    error.args = texts
    vars(error).update(fields)
    return error


def one_line(text: str) -> str:
    """Line ends and what surrounds them become a space, other control characters escapes; what is
    longer than `MAX_MESSAGE` characters is cut in the middle."""
    joined = " ".join(part.strip() for part in text.splitlines() if part.strip())
    if len(joined) > MAX_MESSAGE:
        joined = f"{joined[: MAX_MESSAGE - 300]} ... {joined[-250:]}"
    return escaped(joined)


def escaped(text: str) -> str:
    """Control characters (line ends, those that steer terminals) and unpaired surrogates as
    escapes; everything that can be printed as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RequestError(GenTronError, ValueError):
    """A request asks for something that cannot be done; `field` names the argument at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


class KeyReusedError(RequestError):
    """An idempotency key came with another request than the first time."""


class BundleError(GenTronError):
    """A bundle or checkpoint is missing, damaged or of a kind this version cannot read."""


class BackendError(GenTronError):
    """A backend was asked for that cannot run here, or that did not do what was asked."""


class NonFiniteError(GenTronError):
    """A component produced NaN or infinity; names the component and, in the loop, the step."""


class ParityError(GenTronError):
    """An exported graph disagrees with the PyTorch module it was traced from."""


class ResourceError(GenTronError):
    """This machine lacks the memory or the disk space that the job needs."""


class StorageError(GenTronError):
    """A job or its result cannot be kept: full disk, damaged or foreign folder, in use."""


class OutputError(GenTronError):
    """A result could not be written: missing folder, unknown suffix, full disk."""


class BusyError(GenTronError):
    """The service has as much to do as it takes on; `retry_after` says in how many seconds there
    should be room again."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(GenTronError):
    """A request's deadline passed, or cannot be met."""


class CancelledError(GenTronError):
    """A request was cancelled, by its client or because the service closes."""


class RefusedError(GenTronError):
    """The operator's filter refused a prompt or a picture."""
