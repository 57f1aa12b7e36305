"""The registry's files: entries whose processes are gone, locks, damage."""

import json
import os
import subprocess
import sys

import pytest

from jaxcls.errors import DeploymentError
from jaxcls.serving import local
from jaxcls.serving.registry import (
    PROCESSES_LOCK,
    SUPERVISOR_LOCK,
    Asked,
    Entry,
    ReplicaReport,
    Report,
    Spec,
    list_entries,
)


@pytest.fixture
def entry(tmp_path):
    """What a deployment leaves when the power fails; its supervisor's pid is another process's by now."""
    entry = Entry(tmp_path / "deployments", "plates")
    with entry.changing():
        entry.create()
    entry.classifier(3).mkdir(parents=True)
    entry.write_spec(Spec(3, 4, 2, 600.0, {}))
    replica = ReplicaReport("3-1", 3, "ready", os.getpid(), 5)
    entry.write_report(Report(8080, 8081, 3, (replica,)))
    (entry.folder / SUPERVISOR_LOCK).write_text(str(os.getpid()))
    (entry.folder / PROCESSES_LOCK).touch()
    return entry


def test_what_is_written_is_read(entry):
    assert entry.read_spec() == Spec(3, 4, 2, 600.0, {})
    assert entry.read_report() == Report(8080, 8081, 3, (ReplicaReport("3-1", 3, "ready", os.getpid(), 5),))
    assert [found.name for found in list_entries(entry.folder.parent)] == ["plates"]


def test_what_is_not_asked_for_stays(entry):
    (entry.folder / "deployment.json").write_text(  # as the first versions wrote it
        json.dumps({"version": 3, "num_versions": 4, "num_replicas": 2, "timeout_seconds": 600, "config": {}})
    )
    previous, spec = entry.next_spec(Asked(timeout_seconds=1.0, config={"max_queue": 9}))
    assert (previous.version, previous.target) == (3, "local")
    assert spec == Spec(5, 5, 2, 1.0, {"max_queue": 9})
    asked = Asked(timeout_seconds=1.0, num_replicas="auto", address="127.0.0.1:6379", ray={"gpus": 1})
    new, spec = Entry(entry.folder.parent, "cups").next_spec(asked)
    assert new is None
    assert spec == Spec(1, 1, "auto", 1.0, {}, "127.0.0.1:6379", {"gpus": 1})
    assert spec.target == "ray"


def test_an_entry_without_processes_is_stopped_and_can_be_deleted(entry):
    status = local.read_status(entry)
    assert (status.state, status.replicas, status.service_url) == (
        "stopped",
        (),
        "http://127.0.0.1:8080/score",
    )
    local.delete(entry)  # and this process goes on
    assert not list(entry.folder.parent.iterdir())


def test_a_lock_lives_as_long_as_a_process_that_has_it(entry):
    hold = f"""
import sys
from pathlib import Path
from jaxcls.serving.registry import Entry
lock = Entry(Path({str(entry.folder.parent)!r}), "plates").hold({SUPERVISOR_LOCK!r})
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert entry.is_running()
        assert local.read_status(entry).state == "ready"
        holder.kill()
    assert not entry.is_running()


def test_one_change_at_a_time(entry):
    with entry.changing(), pytest.raises(DeploymentError, match="another process deploys or deletes plates"):
        local.delete(entry)
    local.delete(entry)


def test_files_are_private(entry):
    assert entry.folder.stat().st_mode & 0o777 == 0o700
    assert entry.folder.parent.stat().st_mode & 0o777 == 0o700
    for name in ("key", "deployment.json", "report.json"):
        assert (entry.folder / name).stat().st_mode & 0o777 == 0o600


def test_the_key_stays_and_is_the_first_that_the_file_lists(entry):
    key = entry.read_key()
    entry.create()
    assert entry.read_key() == key
    entry.key_file.write_text(f"# of March\n\nnew-key-of-the-operator  # of April\n{key}\n")
    assert entry.read_key() == "new-key-of-the-operator"


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"version": 1})])
@pytest.mark.parametrize("name", ["deployment.json", "report.json"])
def test_a_damaged_entry_says_so_and_can_be_deleted(entry, name, text):
    (entry.folder / name).write_text(text)
    with pytest.raises(DeploymentError, match=f"{name} is damaged: `jaxcls delete plates`"):
        entry.read_spec(), entry.read_report()
    local.delete(entry)
    assert not entry.exists()
