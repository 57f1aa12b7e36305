"""Where files go, by environment; and that private folders are private."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import write_photos

import jaxcls
import jaxcls.storage
from jaxcls.errors import UsageError
from jaxcls.storage import Storage, file_sha256, locked, make_private_folder, whole_folder, write_whole


def test_home_holds_all_three_roots():
    storage = Storage.from_environment({"JAXCLS_HOME": "/data/jaxcls", "XDG_CACHE_HOME": "/cache"})
    assert storage == Storage(
        Path("/data/jaxcls/outputs"), Path("/data/jaxcls/persistent"), Path("/data/jaxcls/temp")
    )


def test_a_tilde_is_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert Storage.from_environment({"JAXCLS_HOME": "~/photos"}).temp == Path("/home/ada/photos/temp")


@pytest.mark.parametrize("unset", [{}, {"JAXCLS_HOME": "", "XDG_CACHE_HOME": ""}])
def test_without_a_home_outputs_are_here_and_the_rest_is_cached(monkeypatch, unset):
    monkeypatch.setenv("HOME", "/home/ada")
    storage = Storage.from_environment(unset)
    assert storage.outputs == Path("jaxcls_outputs")
    assert storage.persistent == Path("/home/ada/.cache/jaxcls/persistent")
    assert storage.temp == Path("/home/ada/.cache/jaxcls/temp")


def test_the_cache_folder_can_be_elsewhere():
    storage = Storage.from_environment({"XDG_CACHE_HOME": "/cache"})
    assert storage.persistent == Path("/cache/jaxcls/persistent")


def test_default_asks_the_process_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path))
    assert Storage.default().outputs == tmp_path / "outputs"


def test_it_prints_as_json():
    printed = str(Storage(Path("o"), Path("p"), Path("t")))
    assert json.loads(printed) == {"storage": {"outputs": "o", "persistent": "p", "temp": "t"}}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_private_folders_are_the_owners_alone(tmp_path):
    path = tmp_path / "a" / "b"
    assert make_private_folder(path) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    make_private_folder(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.setattr(jaxcls.storage, "_in_use", None)


@pytest.mark.usefixtures("unset")
def test_a_program_sets_its_storage_once(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path))
    ours = Storage(outputs="results", persistent="~/kept", temp=tmp_path / "temp")
    assert (ours.outputs, ours.persistent) == (Path("results"), Path.home() / "kept")
    assert ours.use() is ours
    assert Storage.default() is ours
    Storage(outputs="results", persistent="~/kept", temp=tmp_path / "temp").use()
    with pytest.raises(UsageError, match=r"results.* is in use already: set the storage once"):
        replace(ours, outputs="elsewhere").use()
    assert Storage.default() == ours


def test_scratch_is_private_and_goes_with_the_block(tmp_path):
    storage = Storage(tmp_path, tmp_path, tmp_path / "temp")
    with storage.scratch() as first, storage.scratch() as second:
        (first / "a").mkdir()
        (first / "a" / "b").write_text("text")
        assert stat.S_IMODE(first.stat().st_mode) == 0o700
        assert sorted((tmp_path / "temp").iterdir()) == sorted([first, second])
    assert not list((tmp_path / "temp").iterdir())
    with pytest.raises(ZeroDivisionError), storage.scratch():
        raise ZeroDivisionError
    assert not list((tmp_path / "temp").iterdir())


def test_scratch_of_a_killed_process_goes_with_the_next_and_that_of_a_living_one_stays(tmp_path):
    code = f"""
import sys
from jaxcls.storage import Storage
with Storage({str(tmp_path)!r}, {str(tmp_path)!r}, {str(tmp_path)!r}).scratch() as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""
    (tmp_path / "of the user's").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    killed, living = (Path(process.stdout.readline().strip()) for process in processes)
    processes[0].kill()
    processes[0].wait()
    assert (killed / "half").exists()
    Storage(tmp_path, tmp_path, tmp_path).clean()
    assert not killed.exists()
    assert (living / "half").exists()
    processes[1].communicate()
    assert {path.name for path in tmp_path.iterdir()} == {"of the user's"}
    processes[0].communicate()


def storage_in(folder):
    return Storage(folder, folder, folder)


def test_processes_that_come_and_go_at_once_do_not_disturb_each_other(tmp_path):
    code = """
import sys
from pathlib import Path
from jaxcls.storage import Storage
folder = Path(sys.argv[1])
sys.stdin.read()
for _ in range(60):
    with Storage(folder, folder, folder).scratch() as scratch:
        (scratch / "mine").write_text("mine")
        assert (scratch / "mine").read_text() == "mine"
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "temp"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for process in processes:
        process.stdin.close()
    errors = [process.stderr.read().decode() for process in processes]
    assert [process.wait() for process in processes] == [0] * 6, errors
    for process in processes:
        process.stderr.close()
    assert not list((tmp_path / "temp").iterdir())


def leave(folder, name):
    """What a killed process of this machine leaves behind."""
    left = Path(tempfile.mkdtemp(prefix=f"{name}+{quote(socket.gethostname())}+", dir=folder))
    (left / "half").write_text("half")
    return left


def test_scratch_of_another_machine_stays(tmp_path, monkeypatch):
    """Where several machines share a file system, a lock may hold for one of them only."""
    ours = leave(tmp_path, "jaxcls")
    monkeypatch.setattr(socket, "gethostname", lambda: "another/machine")
    storage_in(tmp_path).clean()
    assert ours.exists()
    with storage_in(tmp_path).scratch() as theirs:
        monkeypatch.undo()
        with storage_in(tmp_path).scratch():
            assert not ours.exists()
            assert theirs.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave a folder to somebody else")
def test_scratch_of_another_user_stays_and_stops_nobody(tmp_path):
    code = """
import os
import sys
from pathlib import Path
from jaxcls.storage import Storage
folder = Path(sys.argv[1])
os.setuid(65534)
storage = Storage(folder, folder, folder)
storage.clean()
with storage.scratch() as scratch:
    assert scratch.parent == folder
"""
    with tempfile.TemporaryDirectory() as shared:  # not `tmp_path`, which is closed to others
        Path(shared).chmod(0o1777)
        theirs = leave(Path(shared), "jaxcls")
        subprocess.run([sys.executable, "-c", code, shared], cwd="/", check=True)
        assert list(Path(shared).iterdir()) == [theirs]


def test_without_locks_there_is_scratch_and_nothing_passes_for_left_over(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    left = leave(tmp_path, "jaxcls")
    with storage_in(tmp_path).scratch() as first, storage_in(tmp_path).scratch():
        assert first.exists()
    assert list(tmp_path.iterdir()) == [left]
    with whole_folder(tmp_path / "a") as folder:
        (folder / "text").write_text("text")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", left]


# Whole folders


def write_folder(path, text, **options):
    with whole_folder(path, **options) as folder:
        (folder / "text").write_text(text)


def kill_within(code, path):
    """Run code that ends in reading its input, up to there, and kill it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


KILLED_WHILE_WRITING = """
import sys
from pathlib import Path
from jaxcls.storage import whole_folder
with whole_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "text").write_text("half")
    print("here", flush=True)
    sys.stdin.read()
"""
KILLED_BETWEEN_THE_RENAMES = """
import sys
from pathlib import Path
from jaxcls.storage import whole_folder
rename = Path.rename
def stop(path, target):
    if path.name == "new":
        print("here", flush=True)
        sys.stdin.read()
    return rename(path, target)
Path.rename = stop
with whole_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "text").write_text("new")
"""


def test_what_a_killed_process_was_writing_goes_with_the_next(tmp_path):
    path = tmp_path / "a"
    write_folder(tmp_path / "a+b", "another")
    kill_within(KILLED_WHILE_WRITING, tmp_path / "a+b")
    (others,) = tmp_path.glob(".*")
    kill_within(KILLED_WHILE_WRITING, path)
    assert not path.exists()
    assert len(list(tmp_path.glob(".*"))) == 2
    with whole_folder(path, replace=True) as living:
        write_folder(path, "first")
        assert living.exists()
        assert len(list(tmp_path.glob(".*"))) == 2
    assert list(tmp_path.glob(".*")) == [others]


def test_a_process_that_is_killed_between_the_renames_loses_nothing(tmp_path):
    path = tmp_path / "a"
    write_folder(path, "old")
    kill_within(KILLED_BETWEEN_THE_RENAMES, path)
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(path, replace=True):
        raise KeyboardInterrupt
    assert (path / "text").read_text() == "old"
    kill_within(KILLED_BETWEEN_THE_RENAMES, path)
    with pytest.raises(FileExistsError):
        write_folder(path, "newer")
    assert (path / "text").read_text() == "old"
    write_folder(path, "newer", replace=True)
    assert (path / "text").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_what_appears_during_the_writing_is_replaced_only_if_asked_to(tmp_path):
    path = tmp_path / "a"
    for make in (path.mkdir, lambda: path.symlink_to("nowhere"), lambda: path.write_text("mine")):
        with pytest.raises(FileExistsError), whole_folder(path):
            make()
        assert os.path.lexists(path)
        with pytest.raises(FileExistsError), whole_folder(path):
            raise AssertionError("it is known from the start")
        write_folder(path, "new", replace=True)
        assert (path / "text").read_text() == "new"
        shutil.rmtree(path)
    assert not list(tmp_path.iterdir())


# Locks and files


def test_a_lock_keeps_others_out_until_its_block_ends(tmp_path):
    with locked(tmp_path) as is_ours:
        assert is_ours
        with locked(tmp_path) as is_ours:
            assert not is_ours
    with locked(tmp_path) as is_ours:
        assert is_ours


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_any_name_and_mode_are_written_by_several_at_once(tmp_path):
    path = tmp_path / ("n" * 255)
    contents = [bytes([number]) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda content: write_whole(path, content), contents))
            assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, b"secret", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.slow
def test_commands_write_nothing_outside_the_three_roots(tmp_path, backbone):
    """Neither at home, nor where they run, nor where the system keeps what is temporary."""
    photos = write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    network = jaxcls.create_model("resnet18", ("blue", "red"), image_size=32).save(tmp_path / "network")
    (tmp_path / "queries.json").write_text(
        json.dumps({name: [str(photos / name)] for name in ("blue", "red")})
    )
    places = {
        name: tmp_path / "empty" / name for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    }
    for place in (*places.values(), tmp_path / "empty" / "cwd"):
        place.mkdir(parents=True)
    given = {path: file_sha256(path) for path in tmp_path.rglob("*") if path.is_file()}
    outputs = tmp_path / "jaxcls" / "outputs"
    run, tested = outputs / "run", outputs / "evaluation"
    commands = (
        ("augment", photos, "--pipeline", "Fliplr(0.5)"),
        ("train", photos, "--backbone", network, "--num-epochs", "1", "--batch-size", "4", "--out", run),
        ("evaluate", run / "classifier", photos, "--ids", run / "test_ids.txt", "--out", tested),
        ("pack", photos, "--out", outputs / "packed"),
        ("svm", photos, "--backbone", network, "--out", outputs / "svm"),
        ("info", photos, "--inventory", outputs / "inventory.txt"),
        ("gather", tmp_path / "queries.json", "--out", outputs / "gathered"),
    )
    environment = {name: str(place) for name, place in places.items()} | {
        "PATH": os.environ["PATH"], "JAXCLS_HOME": str(tmp_path / "jaxcls"), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "jaxcls.cli", *map(str, command)],
            cwd=tmp_path / "empty" / "cwd", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
    roots = {path.name for path in (tmp_path / "jaxcls").iterdir()}
    assert roots <= {"outputs", "persistent", "temp"}
    assert not [path for path in (tmp_path / "empty").rglob("*") if path.is_file()]
    assert not list((tmp_path / "jaxcls").glob("temp/*"))
    assert {path for path in tmp_path.rglob("*") if path.is_file() and "jaxcls" not in path.parts} == set(
        given
    )
    assert all(file_sha256(path) == sha256 for path, sha256 in given.items())
