"""Who is let in, and what a file of keys must be like."""

import os

import pytest

from jaxcls.errors import UsageError
from jaxcls.serving.auth import Keys

OLD, NEW = "0123456789abcdef", "-._~+/ABCDEFGHabcdefgh=="


def write_keys(path, *lines, mode=0o600):
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path):
    return write_keys(tmp_path / "keys", "# for the shop", f"  {OLD}  # until May", "", NEW)


def test_every_key_of_the_file_opens(file):
    keys = Keys.read(file)
    assert keys.accepts(f"Bearer {OLD}")
    assert keys.accepts(f"bearer  {NEW} ")
    assert Keys.read(str(file)).accepts(f"Bearer {OLD}")


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", " ", "Bearer", "Bearer ", OLD, f"Basic {OLD}", f"Bearer{OLD}", f"Bearer {OLD[:-1]}",
        f"Bearer {OLD}x", f"Bearer {OLD.upper()}", f"Bearer {OLD} {NEW}", f"Bearer {OLD}, Bearer {NEW}",
        "Bearer # for the shop", "Bearer until May", f"Bearer {OLD}\xff", f"Bearer {OLD}\udcff",
        "\udcff \udcff", f"Bearer {OLD}\n", f"Token Bearer {OLD}", "Bearer " + "x" * 10**6,
    ],
)  # fmt: skip
def test_nothing_else_opens(file, authorization):
    assert not Keys.read(file).accepts(authorization)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_the_owners_file_is_read(tmp_path, mode):
    assert Keys.read(write_keys(tmp_path / "keys", OLD, mode=mode)).accepts(f"Bearer {OLD}")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o601, 0o620, 0o666, 0o700, 0o4600])
def test_a_file_open_to_others_is_refused(tmp_path, mode):
    path = write_keys(tmp_path / "keys", OLD, mode=mode)
    with pytest.raises(UsageError, match=f"chmod 600 {path}$"):
        Keys.read(path)


def test_of_a_link_the_file_behind_it_counts(tmp_path, file):
    link = tmp_path / "link"
    link.symlink_to(file)
    assert Keys.read(link).accepts(f"Bearer {OLD}")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Keys.read(link)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no key"),
        (["# none", "", "   "], "holds no key"),
        ([OLD, "short-secret"], "line 2: a key has 16 characters or more"),
        (["two words of a secret"], "line 1: .* letters, digits"),
        (["sécret-sécret-sécret"], "line 1"),
        (["secret=in=the=middle"], "line 1"),
        (["secret-secret-\0secret"], "line 1"),
        (["================"], "line 1"),
    ],
)
def test_files_without_proper_keys_are_refused_and_not_repeated(tmp_path, lines, message):
    with pytest.raises(UsageError, match=message) as caught:
        Keys.read(write_keys(tmp_path / "keys", *lines))
    assert "cret" not in str(caught.value)


def test_bytes_that_are_no_text_are_no_key(tmp_path):
    path = write_keys(tmp_path / "keys")
    path.write_bytes(b"# caf\xe9\n" + OLD.encode() + b"\r\n")
    assert Keys.read(path).accepts(f"Bearer {OLD}")
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(UsageError, match="line 1"):
        Keys.read(path)


def test_what_is_no_file_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path in (tmp_path / "missing", tmp_path, pipe):
        with pytest.raises(UsageError, match=str(path)):
            Keys.read(path)


def test_keys_rotate(file):
    keys = Keys.read(file)
    write_keys(file, NEW)
    assert keys.accepts(f"Bearer {OLD}")
    keys.reload()
    assert keys.accepts(f"Bearer {NEW}")
    assert not keys.accepts(f"Bearer {OLD}")


def test_a_bad_file_leaves_the_keys_as_they_were(file):
    keys = Keys.read(file)
    write_keys(file, "short")
    with pytest.raises(UsageError, match="line 1"):
        keys.reload()
    file.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        keys.reload()
    assert keys.accepts(f"Bearer {OLD}")


def test_keys_do_not_show(file):
    keys = Keys.read(file)
    assert repr(keys) == f"Keys('{file}', 2 keys)"
    shown = f"{keys!r} {keys!s} {vars(keys)}"
    assert OLD not in shown
    assert NEW not in shown
