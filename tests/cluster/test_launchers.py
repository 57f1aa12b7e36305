"""What starts `jaxcls train` on many machines says what it understands, and what JAX reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml
from conftest import free_port, write_photos

from jaxcls.classifier import create_model
from jaxcls.commands.training import Train
from jaxcls.parallel import SETTINGS

FOLDER = Path(__file__).parents[2] / "experiments" / "cluster"
JOBSET = yaml.safe_load((FOLDER / "train.jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]
(CONTAINER,) = JOB["template"]["spec"]["template"]["spec"]["containers"]
SECONDS = 300


def understood(command):
    """The options of a command line `jaxcls train ...`, as the command line reads them."""
    assert command[:2] == ["jaxcls", "train"]
    train = tyro.cli(Train, args=command[2:])
    assert train.distributed
    assert train.resume
    return train


# On PATH stand programs in place of those of SLURM and Open MPI.


@pytest.fixture
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return write


def run(script, *arguments):
    return subprocess.run(
        ["bash", FOLDER / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm(code, programs, monkeypatch):
    """Processes that were told to end, and saved, are queued again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    programs("srun", f'printf "%s\\n" "$@"; exit {code}')
    programs("scontrol", 'echo "scontrol $@"')
    done = run("train.sbatch", "all photos", "run", "--batch-size", "512")
    words = done.stdout.splitlines()
    is_requeued = words[-1] == "scontrol requeue 7"
    assert (done.returncode, is_requeued) == ((0, True) if code == 143 else (code, False)), done.stderr
    command = words[words.index("jaxcls") : -1 if is_requeued else None]
    train = understood(command)
    assert (train.data, train.out, train.config.batch_size) == (Path("all photos"), Path("run"), 512)


def test_slurm_is_asked_in_words_that_it_knows():
    text = (FOLDER / "train.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # "B:" would send it to the script alone
    assert "requeue" in options


def test_open_mpi(programs, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    programs(
        "mpirun",
        'while [ "$1" != bash ]; do shift; done\n'
        "export OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_RANK=11 OMPI_COMM_WORLD_LOCAL_RANK=3\n"
        'exec "$@"',
    )
    programs("jaxcls", f'for name in {" ".join(SETTINGS)} JAX_LOCAL_DEVICE_IDS; do echo "${{!name}}"; done\n'
             'printf "%s\\n" jaxcls "$@"')  # fmt: skip
    done = run("train_mpi.sh", hosts, "photos", "run", "--batch-size", "512")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:4] == ["node1:55527", "16", "11", "3"]
    assert understood(words[4:]).config.batch_size == 512


def environment():
    return {each["name"]: each for each in CONTAINER["env"]}


def test_jobset_names_its_first_pod_and_counts_its_processes():
    found = environment()
    assert set(SETTINGS) <= found.keys()
    name, job = JOBSET["metadata"]["name"], JOB["name"]
    assert found["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-{job}-0-0.{name}:55527"
    number = int(found["JAX_NUM_PROCESSES"]["value"])
    spec = JOB["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], JOB["replicas"]) == (number, number, 1)
    assert spec["completionMode"] == "Indexed"
    index = found["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    understood(CONTAINER["command"])


def test_jobset_is_restarted_as_a_whole():
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert JOBSET["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    assert JOBSET["spec"]["failurePolicy"] == {"maxRestarts": 10}
    assert JOB["template"]["spec"]["backoffLimit"] == 0


def test_kubernetes_takes_the_job():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="in the extra slow")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **JOB["template"]}
    kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.slow
def test_what_the_pods_run_trains_as_one(tmp_path):
    """Their command in their environment, but on this machine and for one epoch."""
    write_photos(tmp_path / "photos", {"blue": 8, "red": 9})
    create_model("resnet18", 2, image_size=32).save(tmp_path / "start")
    address = f"localhost:{free_port()}"
    given = {"JAX_COORDINATOR_ADDRESS": address, "KUBERNETES_SERVICE_HOST": "10.0.0.1", "XLA_FLAGS": ""}
    values = {
        name: each.get("value", "").replace("/data", str(tmp_path)) for name, each in environment().items()
    }
    words = [word.replace("/data", str(tmp_path)) for word in CONTAINER["command"][1:]]
    words += ["--backbone", str(tmp_path / "start"), "--batch-size", "6", "--num-epochs", "1"]
    pods = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxcls.cli", *words],
            env={**os.environ, **values, **given, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(int(values["JAX_NUM_PROCESSES"]))
    ]  # fmt: skip
    try:
        texts = [pod.communicate(timeout=SECONDS)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], texts
    assert "in 2 processes" in texts[0]
    assert "Kubernetes environment detected" not in "".join(texts)  # JAX looks no further than it was told
    assert (tmp_path / "run" / "classifier").is_dir()
