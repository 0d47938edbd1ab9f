"""Every error that a user can meet; each says what to do next.

All errors derive from :class:`DistKVError`. Those caused by a wrong argument are also :class:`ValueError`, those caused
by a time limit also :class:`TimeoutError`, so that callers may catch the built-in class. Every error can be pickled
(constructed from its arguments alone), because errors travel between workers, scheduler and client.
"""

from __future__ import annotations


class DistKVError(Exception):
    """Base class of all errors raised by this package."""


class ConfigError(DistKVError, ValueError):
    """A configuration key or value is wrong; the message names the key and the allowed values."""


class InvalidRequestError(DistKVError, ValueError):
    """A prompt or its sampling parameters cannot be served as given."""


class CapacityError(DistKVError):
    """Memory is too small; the message says how much is needed, how much there is, and what to change."""


class AdapterError(InvalidRequestError):
    """An adapter cannot be read, does not fit the model, or uses something unsupported."""


class PlanError(DistKVError):
    """The plan for a sequence does not fit what a worker holds of the sequence. This is a bug; please report it.

    Parameters
    ----------
    message
        What was planned, and what the worker holds.
    sequence
        Number of the planned sequence, or of the document that it shares.
    """

    def __init__(self, message: str, sequence: int) -> None:
        super().__init__(message, sequence)
        self.sequence = sequence

    def __str__(self) -> str:
        return str(self.args[0])


class StateLostError(DistKVError):
    """A home lacks the state or the windows from which a sequence continues; the scheduler recomputes the sequence.

    Parameters
    ----------
    message
        Which state is missing.
    sequence
        Number of the sequence.
    """

    def __init__(self, message: str, sequence: int) -> None:
        super().__init__(message, sequence)
        self.sequence = sequence

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(DistKVError):
    """The model cannot be found or loaded."""


class UnsupportedModelError(ModelError):
    """The model, or its combination with a setting, is one that DistAttention does not support."""


class ClusterError(DistKVError):
    """The Dask cluster cannot serve an engine: no workers, or a plugin that failed to start."""


class WorkerLostError(DistKVError):
    """A worker died or left while it served the request."""


class GangAbortedError(DistKVError):
    """A window or prefill chunk ended early because one of its members failed."""


class ChannelError(DistKVError, ConnectionError):
    """A channel to a peer broke, was closed, or carried something unexpected."""


class ChannelTimeoutError(ChannelError, TimeoutError):
    """A peer did not answer in time (``distkv.timeouts.receive``, or ``start`` while a gang begins)."""


class EngineClosedError(DistKVError):
    """The engine was closed, or its scheduler is gone."""


class DeviceError(DistKVError):
    """A worker cannot compute on the requested device, or the device has too little memory."""


class DeviceMemoryError(DeviceError):
    """A card ran out of memory during a step, which is repeated."""


class DeviceLostError(DeviceError):
    """A worker's card failed and no longer answers; the worker's process ends."""


class SavedDocumentError(DistKVError, ValueError):
    """A document cannot be saved, or a saved document cannot be loaded: another model, or damaged files."""


class SourceError(DistKVError, ValueError):
    """The source of a batch cannot be read: no such file, column or format."""


class OutputError(DistKVError):
    """The output of a batch cannot be written, is damaged, or belongs to another job or process."""


class TooManyErrorsError(DistKVError):
    """A batch stopped because more of its rows failed than were allowed."""


class MissingProgramError(DistKVError, ImportError):
    """A feature needs an optional package or program that is not installed; the message says how to install it."""


class ResultTimeoutError(DistKVError, TimeoutError):
    """A request was not answered within its caller's time limit; the request continues."""


def in_words(error: BaseException) -> str:
    """The text of an error, encodable in any file; errors of other libraries may have no text.

    Examples
    --------
    >>> in_words(TimeoutError())
    'TimeoutError: no answer in time'
    >>> in_words(OSError("the disk is full"))
    'OSError: the disk is full'
    >>> in_words(CapacityError("it needs 4 GiB"))
    'it needs 4 GiB'
    """
    said = _text(error)
    return said if isinstance(error, DistKVError) else f"{type(error).__name__}: {said}"


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # a class from outside this package
        text = ""
    text = text or ("no answer in time" if isinstance(error, TimeoutError) else "it gives no reason")
    return text.encode("utf-8", "backslashreplace").decode()


def portable(error: Exception, where: str) -> DistKVError:
    """An error that can be sent: ours as it is, others as text, because the receiver may not have their classes.

    It has no traceback, which would keep alive everything that the failed calls referred to, such as a model.
    """
    if isinstance(error, DistKVError):
        return type(error)(*error.args)  # copy.copy() keeps tracebacks where Dask has installed tblib
    return DistKVError(f"{type(error).__name__} on {where}: {_text(error)}")


def without_quotes(error: Exception) -> str:
    """What logs, events and pages say of an error: texts of other libraries and of bad requests may quote a user."""
    if type(error) is DistKVError:  # as portable() makes it
        return str(error).partition(": ")[0]
    ours = isinstance(error, DistKVError) and not isinstance(error, InvalidRequestError)
    return str(error) if ours else type(error).__name__
