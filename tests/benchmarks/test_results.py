"""Result files keep every row; the table says what they say; the README has that table."""

import pytest

from benchmarks import table
from benchmarks.machine import floor
from benchmarks.results import Results, read_results

MACHINE = {
    "conditions": {
        "platform": "cpu",
        "device": "1 x cpu",
        "machine": "a machine, 2 cores",
        "time": "2026-01-01T00:00:00+00:00",
        "versions": {"jax": "0.10.2", "torch": "2.13.0"},
    },
    "matmul_flops_per_second": {"float32": 100.0, "bfloat16": 400.0},
    "copy_bytes_per_second": 50.0,
}


def rated(subject, median, *, benchmark="train_step", work="train", **values):
    row = {"benchmark": benchmark, "work": work, "subject": subject, "depth": 50, "batch_size": 16}
    return {**row, "images_per_second": {"median": median}, **values}


def cells_of(text, question, on="CPU"):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {question} | {on} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_row_is_written_at_once_and_replaced_by_its_next_round(tmp_path):
    results = Results(tmp_path / "a.json", MACHINE)
    results.put(rated("jaxcls", 4.0))
    results.put(rated("torch-eager-float32", 5.0))
    results.put(rated("jaxcls", 6.0))
    (read,) = read_results(tmp_path)
    assert read.rows == [rated("jaxcls", 6.0), rated("torch-eager-float32", 5.0)]
    assert read.machine == MACHINE
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_table_compares_with_the_best_peer_of_the_same_file(tmp_path):
    old = {**MACHINE, "conditions": {**MACHINE["conditions"], "time": "2025-01-01T00:00:00+00:00"}}
    for name, machine, ours, theirs in (("old", old, 9.0, 1.0), ("new", MACHINE, 4.0, 5.0)):
        results = Results(tmp_path / f"{name}.json", machine)
        results.put(rated("jaxcls", ours, dtype="bfloat16"))
        results.put(rated("torch-eager-float32", theirs, dtype="float32"))
        results.put(rated("torch-compile-float32", theirs - 0.5, dtype="float32"))
        results.put(rated("torch-eager-bfloat16", 100.0))
        results.put({"benchmark": "train_step", "work": "train", "subject": "torch-x-float32", "note": "no"})
    question = "train, device only, ResNet-50"
    limits = {(question, "cpu"): "the cores"}
    cells = cells_of(table.make_table(read_results(tmp_path), limits), question)
    assert cells[3:] == ["4/s in bfloat16", "5/s, torch-eager-float32", "**0.80**", "`new.json`", "the cores"]


def test_what_was_not_measured_is_said_not_to_be(tmp_path):
    text = table.contents(tmp_path)
    assert text.count("not measured yet") == len(table.GOALS)
    assert cells_of(text, "train, device only, ResNet-50", on="GPU")[3] == "not measured yet"


def test_a_file_of_a_cpu_says_nothing_about_a_gpu(tmp_path):
    results = Results(tmp_path / "a.json", MACHINE)
    results.put(rated("jaxcls", 4.0))
    results.put(rated("torch-eager-bfloat16", 1.0))
    assert (
        cells_of(table.contents(tmp_path), "train, device only, ResNet-50", on="GPU")[3] == "not measured yet"
    )


def test_seconds_and_shares(tmp_path):
    results = Results(tmp_path / "a.json", MACHINE)
    start = {"benchmark": "startup", "work": "first_score", "subject": "jaxcls", "depth": 50}
    results.put({**start, "cache": "cold", "seconds": 20.0})
    results.put({**start, "cache": "warm", "seconds": 2.0})
    results.put(rated("jaxcls", 10.0, benchmark="features", work="score"))
    results.put(rated("jaxcls", 9.0, benchmark="features", work="features"))
    short = {"benchmark": "short_run", "subject": "jaxcls", "depth": 18, "batch_size": 32}
    results.put({**short, "work": "train", "images_per_second": {"median": 16.0}})
    results.put({**short, "work": "short_run", "seconds": 90.0, "num_steps": 30})
    text = table.contents(tmp_path)
    assert cells_of(text, "first score, warm, ResNet-50")[3:6] == ["2 s", "3 s", "1.50"]
    assert cells_of(text, "features, copied to the host, ResNet-50")[3:6] == [
        "9/s",
        "10/s, score",
        "**0.90**",
    ]
    # 30 steps of 32 images at 16 images/s are 60 s.
    assert cells_of(text, "41 photos, 15 epochs, ResNet-18")[3:6] == ["90 s", "60 s of bare steps", "0.67"]


def test_records_are_held_against_the_folder_of_the_same_photos(tmp_path):
    results = Results(tmp_path / "a.json", MACHINE)
    for work, subject, side, rate in (
        ("input_pipeline", "jaxcls-0", 500, 100.0),
        ("input_pipeline", "jaxcls-max", 500, 120.0),
        ("input_pipeline", "dataloader-max", 500, 900.0),
        ("input_pipeline", "jaxcls-0", 1500, 5.0),
        ("decode", "jaxcls-0", 500, 990.0),
        ("read_records", "jaxcls-0", 500, 108.0),
        ("read_resized_records", "jaxcls-0", 500, 150.0),
        ("read_resized_records", "jaxcls-max", 500, 180.0),
    ):
        results.put(rated(subject, rate, benchmark="input_pipeline", work=work, photo_side=side))
    text = table.contents(tmp_path)
    resized = cells_of(text, "from ArrayRecord, JPEGs of 500 px, resized once to 256 px")
    assert resized[3:6] == ["180/s", "120/s, folder", "1.50"]
    assert cells_of(text, "from ArrayRecord, JPEGs of 500 px, the same files")[5] == "**0.90**"
    question = "from ArrayRecord, JPEGs of 1500 px, resized once to 256 px"
    assert cells_of(text, question)[3] == "not measured yet"


@pytest.mark.parametrize(
    ("gap", "ratio"), [(5e-5, "4.00"), (2e-4, "**4.00**")], ids=["near", "not near enough"]
)
def test_a_fit_counts_where_its_objective_is_near_the_least(tmp_path, gap, ratio):
    results = Results(tmp_path / "a.json", MACHINE)
    problem = {
        "benchmark": "svm",
        "work": "svm",
        "features": "random",
        "batch_size": 20_000,
        "num_classes": 10,
    }
    results.put(rated("jaxcls", 10_000.0, **problem, seconds=2.0, gap=gap))
    results.put(rated("sklearn", 2500.0, **problem, seconds=8.0, gap=1e-6, num_classes_fitted=5))
    question = "SVM, 20,000 x 2048, 10 classes, random features"
    cells = cells_of(table.make_table([results], {(question, "cpu"): "the gap"}), question)
    assert cells[3:6] == [f"2 s, gap {gap:.0e}", "8 s, gap 1e-06, by 5 of 10 classes, sklearn", ratio]


def test_the_floor_by_hand():
    # 200 FLOP at 100/s are 2 s, 200 bytes at 50/s are 4 s; the step took 8 s.
    found = floor({"flops": 200.0, "bytes": 200.0, "dtype": "float32"}, 8.0, MACHINE)
    assert found == {
        "flops_seconds": 2.0, "bytes_seconds": 4.0, "mfu": 0.25, "bandwidth_share": 0.5, "share": 0.5
    }  # fmt: skip
    in_bfloat16 = floor({"flops": 200.0, "bytes": 0.0, "dtype": "bfloat16"}, 8.0, MACHINE)
    assert in_bfloat16["mfu"] == pytest.approx(0.0625)


def test_the_readme_has_the_table_of_the_files():
    readme = table.README.read_text("utf-8")
    assert table.insert(readme, table.contents()) == readme, "run `python -m benchmarks.table --write`"


def test_every_missed_goal_says_what_limits_it():
    assert "not yet looked into" not in table.contents()
