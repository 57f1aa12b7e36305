"""Where files go, by environment; and that private folders are private."""

import json
import os
import stat
from pathlib import Path

import pytest

from jaxcls.storage import Storage, make_private_folder


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
