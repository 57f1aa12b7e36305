"""Photos and results by address: a path, or a URI of any store that `pyarrow.fs` knows (s3://, gs://, abfs://).

Keys stand in a URI as they are, nothing percent-encoded, as `aws s3 ls` prints them. Credentials, region and
endpoint (`AWS_ENDPOINT_URL_S3`) come from the store's own environment variables and files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from jaxcls.data import images
from jaxcls.data.folder import list_images
from jaxcls.data.lines import from_line, to_line
from jaxcls.errors import DatasetError, ImageError, UsageError
from jaxcls.storage import locked, remove_partial, write_whole

LIST_SUFFIX = ".txt"
OBJECT_STORES = ("s3", "gcs", "abfs")
"""Filesystems of pyarrow on which a file is there once it is whole, or not at all."""


def is_uri(address: str) -> bool:
    """Whether an address is a URI, not a path."""
    return "://" in address


def find_photos(sources: Sequence[str]) -> list[str]:
    """The addresses of photos, paths absolute.

    Args:
        sources: folders and URIs that end in no object: all photos below, in the order of their names; text
            files (`.txt`): the address in each line, relative to the list's folder; anything else: a photo,
            there or not.

    Raises:
        DatasetError: nothing is found at a source, or it cannot be read.
        UsageError: no sources; a URI that `pyarrow.fs` does not know, or that holds a password.
    """
    if not sources:
        raise UsageError("give at least one image, folder, list or URI")
    return [photo for source in sources for photo in _find(source)]


def read_photo(address: str) -> bytes:
    """The content of a photo, for `open_photo`.

    Raises:
        ImageError: it cannot be read, or exceeds `MAX_FILE_BYTES`.
    """
    if not is_uri(address):
        return images.read_bytes(address)
    filesystem, path = _locate(address)
    try:
        with filesystem.open_input_file(path) as file:
            if file.size() > images.MAX_FILE_BYTES:
                reason = f"{file.size():,} bytes; at most {images.MAX_FILE_BYTES:,} are read"
                raise ImageError(address, reason)
            return file.read()
    except FileNotFoundError as error:
        raise ImageError(address, "cannot be read: No such object") from error
    except (OSError, ValueError) as error:
        raise ImageError(address, f"cannot be read: {_first_line(error)}") from error


def to_text(addresses: Sequence[str]) -> bytes:
    """Addresses as the lines of a list, which `find_photos` reads."""
    return "".join(f"{to_line(address)}\n" for address in addresses).encode(errors="surrogateescape")


@dataclass(frozen=True)
class ResultFolder:
    """A folder of this machine, or of one that all nodes share, or a prefix of an object store.

    Attributes:
        address: a path or a URI.
    """

    address: str

    def __post_init__(self) -> None:
        if is_uri(self.address):
            filesystem, _ = _locate(self.address)
            if filesystem.type_name not in OBJECT_STORES:
                raise UsageError(f"{self.address}: results go into a folder or an object store")
        else:
            object.__setattr__(self, "address", str(Path(self.address).absolute()))

    def names(self) -> list[str]:
        """What lies in it; nothing where it is not there."""
        from pyarrow.fs import FileSelector

        filesystem, path = _locate(self.address)
        return [info.base_name for info in filesystem.get_file_info(FileSelector(path, allow_not_found=True))]

    def read(self, name: str) -> bytes:
        """A file's content."""
        filesystem, path = _locate(self.address)
        with filesystem.open_input_file(f"{path}/{name}") as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file in one step."""
        if not is_uri(self.address):
            write_whole(Path(self.address) / name, content)
            return
        filesystem, path = _locate(self.address)
        with filesystem.open_output_stream(f"{path}/{name}") as file:
            file.write(content)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, for this process alone while the block runs; an object store has no such locks.

        Raises:
            UsageError: another process is writing into it.
        """
        if is_uri(self.address):
            yield
            return
        folder = Path(self.address)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as is_ours:
            if not is_ours:
                raise UsageError(f"{folder}: another process is writing into it: wait, or choose another")
            remove_partial(folder)
            yield

    def count_rows(self) -> tuple[int, int]:
        """Of all Parquet files in it: the rows, and those with an `error`."""
        import pyarrow.dataset as arrow

        filesystem, path = _locate(self.address)
        rows = arrow.dataset(path, filesystem=filesystem, format="parquet")
        return rows.count_rows(), rows.count_rows(filter=arrow.field("error").is_valid())


def _find(source: str) -> list[str]:
    is_object = is_uri(source)
    if not is_object:
        source = str(Path(source).absolute())
        if Path(source).is_dir():
            return _below(source, _list_folder(Path(source)))
    if PurePosixPath(source).suffix.lower() == LIST_SUFFIX:
        return _read_list(source)
    return _find_objects(source) if is_object else [source]


def _list_folder(folder: Path) -> list[str]:
    listing = list_images(folder)
    listing.require_whole(folder)
    return [*listing.images, *listing.not_utf8]


def _find_objects(uri: str) -> list[str]:
    from pyarrow.fs import FileSelector, FileType

    filesystem, path = _locate(uri)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == FileType.File:
            return [uri]
        if kind == FileType.NotFound:
            raise DatasetError(f"{uri} is not there: give a prefix, an object, or a {LIST_SUFFIX} list")
        found = filesystem.get_file_info(FileSelector(path, recursive=True))
    except OSError as error:
        raise DatasetError(f"{uri} cannot be read: {_first_line(error)}") from error
    files = [info.path.removeprefix(f"{path}/") for info in found if info.type == FileType.File]
    return _below(uri, [name for name in files if PurePosixPath(name).suffix.lower() in images.SUFFIXES])


def _below(source: str, names: list[str]) -> list[str]:
    if not names:
        raise DatasetError(f"{source} holds no images")
    return [f"{source.rstrip('/')}/{name}" for name in sorted(names)]


def _read_list(address: str) -> list[str]:
    filesystem, path = _locate(address)
    try:
        with filesystem.open_input_file(path) as file:
            lines = file.read().decode(errors="surrogateescape").split("\n")
    except OSError as error:
        raise DatasetError(f"{address} cannot be read: {_first_line(error)}") from error
    photos = [from_line(line) for line in lines if line]
    if not photos:
        raise DatasetError(f"{address} lists no photos")
    folder = address.rpartition("/")[0]
    return [photo if is_uri(photo) or photo.startswith("/") else f"{folder}/{photo}" for photo in photos]


def _locate(address: str) -> tuple[Any, str]:
    """The filesystem of an address, and its path there."""
    if not is_uri(address):
        return _filesystem("")[0], address
    scheme, _, rest = address.partition("://")
    place, _, path = rest.partition("/")
    filesystem, base = _filesystem(f"{scheme}://{place}")
    return filesystem, f"{base.rstrip('/')}/{path.strip('/')}".rstrip("/")


@lru_cache
def _filesystem(root: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not root:
        return LocalFileSystem(), ""
    user, _, place = root.rpartition("@")
    if user.count(":") > 1:
        raise UsageError(
            f"...@{place}: no passwords in addresses: the store's environment variables take them"
        )
    try:
        return FileSystem.from_uri(root)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{root}: {_first_line(error)}: give a path, or a URI such as s3://") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
