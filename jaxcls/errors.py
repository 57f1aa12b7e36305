"""The errors that jaxcls raises on purpose; the command line prints each as one line.

A message says what is wrong, where, and what to do about it. Anything else that
escapes is a defect.
"""

import re


class JaxclsError(Exception):
    """Base of every deliberate error. Catch this to catch them all."""


class UsageError(JaxclsError):
    """An argument, option or configuration value that cannot work."""


class DatasetError(JaxclsError):
    """A folder, list or split that does not make a usable dataset."""


class ImageError(JaxclsError):
    """An image that cannot be read.

    Args:
        name: the file's path or record key; "" where the image came as bytes.
        reason: what is wrong with it, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        # The odd bytes of a name that is not UTF-8 are escaped: the message must fit into any table.
        name = name.encode(errors="backslashreplace").decode()
        super().__init__(f"{name}: {reason}" if name else reason)
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class DownloadError(JaxclsError):
    """A URL that is refused, or that does not bring what it was asked for.

    Args:
        url: as it was asked for; a user name and password in it are left out, and the end of a very long one.
        reason: what is wrong, without the URL. May quote the server; cut short too.
        is_transient: whether the same URL may work later.
        status: of the HTTP answer, where there was one that is the reason.
        retry_after: seconds that the server asks to wait for, else 0.
    """

    def __init__(
        self,
        url: str,
        reason: str,
        is_transient: bool = False,
        status: int | None = None,
        retry_after: float = 0.0,
    ) -> None:
        url, reason = _one_line(re.sub("//[^/?#]*@", "//", url)), _one_line(reason)
        super().__init__(f"{url}: {reason}" if url else reason)
        self.url = url
        self.reason = reason
        self.is_transient = is_transient
        self.status = status
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["DownloadError"], tuple[str, str, bool, int | None, float]]:
        return type(self), (self.url, self.reason, self.is_transient, self.status, self.retry_after)


def _one_line(text: str, limit: int = 300) -> str:
    """`text` fit for a log: a stranger's line ends and control codes would forge lines."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= limit else text[:limit] + "..."


class WeightsError(JaxclsError):
    """Pretrained weights that cannot be fetched, are damaged, or fit another network."""


class ClassifierError(JaxclsError):
    """A saved classifier that is incomplete, damaged or of an unknown format."""


class TrainingError(JaxclsError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class RequestError(JaxclsError):
    """A request that the service refuses.

    Args:
        status: of the HTTP answer: 400 and above.
        message: what is wrong with the request.
        retry_after: in seconds, when the same request may fare better; None: never.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ServiceError(JaxclsError):
    """A scoring service that cannot be reached, refuses, or does not answer as one.

    Args:
        message: what it said.
        status: the HTTP status of its last answer; None where there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class DeploymentError(JaxclsError):
    """A deployment that is not there, does not become ready, or is being changed by another process."""


class MissingExtraError(JaxclsError):
    """An optional dependency that is not installed.

    Args:
        package: the import that failed.
        purpose: what needs it.
        install: the command that brings it.
    """

    def __init__(self, package: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: {install}")
