"""The errors that jaxcls raises on purpose; the command line prints each as one line.

A message says what is wrong, where, and what to do about it. Anything else that
escapes is a defect.
"""


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


class WeightsError(JaxclsError):
    """Pretrained weights that cannot be fetched, are damaged, or fit another network."""


class ClassifierError(JaxclsError):
    """A saved classifier that is incomplete, damaged or of an unknown format."""


class TrainingError(JaxclsError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class MissingExtraError(JaxclsError):
    """An optional dependency that is not installed.

    Args:
        package: the import that failed.
        purpose: what needs it.
        install: the command that brings it.
    """

    def __init__(self, package: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: {install}")
