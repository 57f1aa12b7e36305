"""The README's table of goals, made from the result files: `python -m benchmarks.table [--write]`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import OURS
from benchmarks.results import FOLDER, Results, read_results

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- made by `python -m benchmarks.table --write` -->", "<!-- end of the table -->"
HEADER = ("question", "on", "goal", "measured", "compared with", "ratio", "file", "what limits it")
MAX_GAP = 1e-4

# (question, platform) -> one line, for goals that are missed.
LIMITS: Mapping[tuple[str, str], str] = {
    (
        "train, device only, ResNet-18",
        "cpu",
    ): "42 % of the matrix product rate, torch 77 %: XLA transposes the "
    "operands of 3x3 kernel gradients; batch norm and ReLU are passes of their own",
    (
        "train, device only, ResNet-50",
        "cpu",
    ): "51 % of the matrix product rate, torch 67 %: batch norm's sums, "
    "transposes for 3x3 kernel gradients, strided input gradients as dilated convolutions",
    (
        "first score, warm, ResNet-50",
        "cpu",
    ): "imports, of JAX and of the benchmark itself; a first batch of 16 takes longer than later ones",
    (
        "input pipeline, JPEGs of 500 px",
        "cpu",
    ): "decoding itself costs the same; views are cut by two resizes in a fixed order, as on a device, and "
    "headers are checked; the rest is Grain's",
    (
        "input pipeline, JPEGs of 1500 px",
        "cpu",
    ): "random crops of such photos rarely allow a smaller scale of decoding",
    (
        "input pipeline, JPEGs of 3000 px",
        "cpu",
    ): "most random crops allow half the scale of decoding, not less",
    (
        "from ArrayRecord, JPEGs of 500 px, the same files",
        "cpu",
    ): "nearly all is decoding, which is the same; the rates differ less than rounds do",
    (
        "serve, 2x overload",
        "cpu",
    ): "nearly reached; the peak itself went from 35 to 56 images/s between rounds",
    (
        "serve, 10x overload",
        "cpu",
    ): "some 460 refusals a second, and the program that asks, share the two cores with the network",
    (
        "read a folder of 1,000,000 photos",
        "cpu",
    ): "2.5 microseconds for each file above what `find` takes, for names, suffixes and classes in Python",
}


@dataclass(frozen=True)
class Outcome:
    """What a result file says of a goal.

    Attributes:
        measured: our figure, with its unit.
        compared_with: the figure that it is held against, and whose it is.
        ratio: ours to that; above 1 is better, for seconds too.
        reached: whether the goal is met.
    """

    measured: str
    compared_with: str
    ratio: float
    reached: bool


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Attributes:
        question: what is asked.
        platform: "cpu" or "gpu".
        text: the goal.
        judge: result file -> outcome, or None where the file does not say.
    """

    question: str
    platform: str
    text: str
    judge: Callable[[Results], Outcome | None]


def against_peers(
    results: Results, *, benchmark: str, work: str, ratio: float, peer: str, least: float = 0.0, **values: Any
) -> Outcome | None:
    """Our rate against the best peer whose name holds `peer`, in the same run."""
    rows = results.find(benchmark=benchmark, work=work, **values)
    ours = _best(rows, lambda subject: subject.startswith(OURS))
    theirs = _best(rows, lambda subject: not subject.startswith(OURS) and peer in subject)
    return _compare_rates(ours, theirs, ratio, least)


def against_own(
    results: Results, *, benchmark: str, work: str, other: str, ratio: float, **values: Any
) -> Outcome | None:
    """Our rate at one kind of work against our own at another, in the same run."""
    rows = results.find(benchmark=benchmark, subject=OURS, **values)
    mine = [row for row in rows if row["work"] == work]
    others = [row for row in rows if row["work"] == other]
    return _compare_rates(_best(mine), _best(others), ratio, 0.0)


def against_folder(results: Results, *, work: str, ratio: float, photo_side: int) -> Outcome | None:
    """Our views from records against our views from a folder of the same photos, in the same run."""
    rows = results.find(benchmark="input_pipeline", photo_side=photo_side)
    ours = [row for row in rows if row["subject"].startswith(OURS)]
    records = _best([row for row in ours if row["work"] == work])
    folder = _best([row for row in ours if row["work"] == "input_pipeline"])
    if records is None or folder is None:
        return None
    mine, other = (row["images_per_second"]["median"] for row in (records, folder))
    return Outcome(f"{_short(mine)}/s", f"{_short(other)}/s, folder", mine / other, mine >= ratio * other)


def fits_sooner(results: Results, *, ratio: float, **problem: Any) -> Outcome | None:
    """Our seconds for an SVM against scikit-learn's, once both end near the least objective."""
    rows = [row for row in results.find(benchmark="svm", **problem) if "gap" in row]
    ours = _best(rows, lambda subject: subject == OURS)
    theirs = _best(rows, lambda subject: subject != OURS)
    if ours is None or theirs is None:
        return None
    measured, against = (f"{row['seconds']:.3g} s, gap {row['gap']:.0e}" for row in (ours, theirs))
    if theirs["num_classes_fitted"] < theirs["num_classes"]:
        against += f", by {theirs['num_classes_fitted']} of {theirs['num_classes']} classes"
    times = theirs["seconds"] / ours["seconds"]
    is_near = max(ours["gap"], theirs["gap"]) <= MAX_GAP
    return Outcome(measured, f"{against}, {theirs['subject']}", times, times >= ratio and is_near)


def within_seconds(results: Results, *, seconds: float, **values: Any) -> Outcome | None:
    """Our seconds against a limit."""
    rows = [row for row in results.find(subject=OURS, **values) if "seconds" in row]
    if not rows:
        return None
    measured = rows[0]["seconds"]
    return Outcome(f"{measured:.3g} s", f"{seconds:g} s", seconds / measured, measured <= seconds)


def lists_sooner(results: Results, *, ratio: float) -> Outcome | None:
    """Our seconds for reading a folder against those of `find` when it looks at sizes too."""
    rows = results.find(benchmark="listing", work="read")
    ours = [row for row in rows if row["subject"] == OURS]
    theirs = [row for row in rows if row["subject"] == "find-sizes"]
    if not ours or not theirs:
        return None
    measured, other = ours[0]["seconds"], theirs[0]["seconds"]
    text = f"{measured:.3g} s, {ours[0]['bytes_per_file']:.0f} bytes a file"
    return Outcome(text, f"{other:.3g} s, find -size 0", other / measured, measured * ratio <= other)


def within_milliseconds(results: Results, *, added: float) -> Outcome | None:
    """What HTTP adds to a photo that is decoded and scored alone."""
    for row in results.find(benchmark="serving", work="at_rest"):
        measured = row["p50_ms"]["median"] - row["alone_ms"]["median"]
        against = f"{added:g} ms more than {row['alone_ms']['median']:.3g} ms"
        return Outcome(f"{measured:.2g} ms", against, added / max(measured, 1e-3), measured <= added)
    return None


def withstands(results: Results, *, times: int) -> Outcome | None:
    """An overload: goodput, the slowest accepted answer, and how soon the others are refused."""
    for row in results.find(benchmark="serving", work=f"overload_{times}x"):
        names = ("share_of_peak", "good_p99_ms", "p99_bound_ms", "refused_p99_ms")
        share, slowest, most, refused = (row[name]["median"] for name in names)
        reached = share >= 0.9 and slowest <= most and refused <= 50
        measured = f"{share:.0%} of the peak, accepted p99 {slowest / 1000:.3g} s, refused {refused:.2g} ms"
        bound = f"90 %, {most / 1000:.3g} s, 50 ms"
        return Outcome(measured, bound, share / 0.9, reached)
    return None


def outserves(results: Results, *, ratio: float, image_size: int) -> Outcome | None:
    """Our answers a second against LitServe's, at latencies that are no worse."""
    rows = results.find(benchmark="serving", work="serve_single", image_size=image_size)
    ours = _best(rows, lambda subject: subject == OURS)
    theirs = _best(rows, lambda subject: subject != OURS)
    outcome = _compare_rates(ours, theirs, ratio, 0.0)
    if ours is None or theirs is None or outcome is None:
        return None
    mine, other = ours["p99_ms"]["median"], theirs["p99_ms"]["median"]
    return Outcome(
        f"{outcome.measured}, p99 {mine:.3g} ms",
        f"{outcome.compared_with}, p99 {other:.3g} ms",
        outcome.ratio,
        outcome.reached and mine <= other,
    )


def within_compile_ratio(results: Results, *, times: float, **values: Any) -> Outcome | None:
    """What compiling a ResNet-152 takes of what a ResNet-50 takes, both from an empty cache."""
    seconds = {
        row["depth"]: row["compile_seconds"]
        for row in results.find(subject=OURS, cache="cold", **values)
        if "compile_seconds" in row
    }
    if not {50, 152} <= seconds.keys():
        return None
    measured = seconds[152] / seconds[50]
    against = f"{times:g}x, of {seconds[50]:.2g} s"
    return Outcome(f"{measured:.2f}x", against, times / measured, measured <= times)


def within_step_time(results: Results, *, times: float) -> Outcome | None:
    """The short run's seconds against `times` the bare steps."""
    rows = [row for row in results.find(benchmark="short_run", work="short_run") if "seconds" in row]
    steps = [row for row in results.find(benchmark="short_run", work="train") if "images_per_second" in row]
    if not rows or not steps:
        return None
    bare = rows[0]["num_steps"] * steps[0]["batch_size"] / steps[0]["images_per_second"]["median"]
    measured = rows[0]["seconds"]
    against = f"{bare:.3g} s of bare steps"
    return Outcome(f"{measured:.3g} s", against, bare / measured, measured <= times * bare)


def _best(
    rows: Sequence[Mapping[str, Any]], is_wanted: Callable[[str], bool] = lambda _: True
) -> Mapping[str, Any] | None:
    """The row with the highest median rate."""
    wanted = [row for row in rows if "images_per_second" in row and is_wanted(row["subject"])]
    return max(wanted, key=lambda row: row["images_per_second"]["median"], default=None)


def _compare_rates(
    ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, ratio: float, least: float
) -> Outcome | None:
    if ours is None or theirs is None:
        return None
    mine, other = ours["images_per_second"]["median"], theirs["images_per_second"]["median"]
    name = theirs["subject"] if theirs["subject"] != ours["subject"] else theirs["work"]
    reached = mine >= ratio * other and mine >= least
    measured = f"{_short(mine)}/s"
    if ours.get("dtype") == "bfloat16" and theirs.get("dtype") == "float32":
        measured += " in bfloat16"
    return Outcome(measured, f"{_short(other)}/s, {name}", mine / other, reached)


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _goals() -> list[Goal]:
    goals = []

    def add(
        question: str, platform: str, text: str, judge: Callable[..., Outcome | None], **how: Any
    ) -> None:
        goals.append(Goal(question, platform, text, partial(judge, **how)))

    for depth in (18, 50):
        question = f"train, device only, ResNet-{depth}"
        how = {"benchmark": "train_step", "work": "train", "depth": depth}
        add(question, "cpu", "≥ 1.0x torch float32", against_peers, peer="float32", ratio=1.0, **how)
    for depth in (18, 34, 50, 101, 152):
        question = f"train, device only, ResNet-{depth}"
        how = {"benchmark": "train_step", "work": "train", "depth": depth}
        text = "≥ 1.25x the best torch" + ("; target 6,900/s, stretch 7,950/s" if depth == 50 else "")
        add(question, "gpu", text, against_peers, peer="torch", ratio=1.25, **how)
    how = {"benchmark": "train_end_to_end", "work": "train_end_to_end", "other": "train"}
    how_read = {"benchmark": "input_pipeline", "work": "input_pipeline", "peer": "dataloader"}
    for platform, depth in (("cpu", 18), ("gpu", 50)):
        question = f"train end to end, ResNet-{depth}"
        add(question, platform, "≥ 95 % of device only", against_own, ratio=0.95, depth=depth, **how)
    for depth in (18, 50):
        question = f"score, ResNet-{depth}"
        score = {"benchmark": "score", "work": "score", "depth": depth}
        text = "≥ 1.0x `torch.compile` float32; stretch: torch bfloat16"
        add(question, "cpu", text, against_peers, peer="torch-compile-float32", ratio=1.0, **score)
    score = {"benchmark": "score", "work": "score", "depth": 50, "ratio": 1.15, "least": 32_000.0}
    text = "≥ 1.15x the best compiled torch bfloat16, ≥ 32,000/s"
    add("score, ResNet-50", "gpu", text, against_peers, peer="torch", **score)
    for platform in ("cpu", "gpu"):
        for depth in (18, 50):
            question = f"features, copied to the host, ResNet-{depth}"
            features = {"benchmark": "features", "work": "features", "other": "score", "depth": depth}
            add(question, platform, "≥ 97 % of the score rate", against_own, ratio=0.97, **features)
    for side, ratio in ((500, 1.1), (1500, 2.0), (3000, 2.0)):
        question = f"input pipeline, JPEGs of {side} px"
        text = f"≥ {ratio:g}x `DataLoader` + Pillow"
        add(question, "cpu", text, against_peers, ratio=ratio, photo_side=side, **how_read)
    text = "≥ 2x `DataLoader` + Pillow, ≥ 7,000/s"
    question = "input pipeline, JPEGs of 500 px"
    add(question, "gpu", text, against_peers, ratio=2.0, least=7000.0, photo_side=500, **how_read)
    for side, work, what, ratio in (
        (500, "read_records", "the same files", 1.0),
        (500, "read_resized_records", "resized once to 256 px", 1.2),
        (1500, "read_resized_records", "resized once to 256 px", 3.0),
    ):
        question, text = f"from ArrayRecord, JPEGs of {side} px, {what}", f"≥ {ratio:g}x the folder"
        add(question, "cpu", text, against_folder, work=work, ratio=ratio, photo_side=side)
    add("read a folder of 1,000,000 photos", "cpu", "≤ 2x `find`, sizes included", lists_sooner, ratio=0.5)
    for step, what in (("split", "a split of them"), ("grouped_split", "a split of them, with groups")):
        how = {"benchmark": "listing", "work": step}
        add(f"{what}, stratified", "cpu", "≤ 5 s", within_seconds, seconds=5.0, **how)
    warm = {"benchmark": "startup", "work": "first_score", "cache": "warm", "depth": 50}
    add("first score, warm, ResNet-50", "cpu", "≤ 3 s", within_seconds, seconds=3.0, **warm)
    add("first score, warm, ResNet-50", "gpu", "≤ 5 s", within_seconds, seconds=5.0, **warm)
    for work, name in (("first_step", "training"), ("first_score", "scoring")):
        how = {"benchmark": "startup", "work": work}
        for platform, times, text in (("cpu", 4.06, "≤ 1.3x the ratio of blocks, 3.1"), ("gpu", 3.0, "≤ 3x")):
            question = f"compile ResNet-152 for {name}, next to ResNet-50"
            add(question, platform, text, within_compile_ratio, times=times, **how)
    for work, other, ratio, what in (
        ("serve_tensors", "score_bare", 0.9, "tensors of 16 images"),
        ("serve_photos", "score_photos", 0.85, "a 500 px JPEG each"),
    ):
        how = {"benchmark": "serving", "work": work, "other": other, "image_size": 224}
        add(f"serve, {what}", "cpu", f"≥ {ratio:.0%} of without HTTP", against_own, ratio=ratio, **how)
    add("serve, one JPEG at a time", "cpu", "≤ 5 ms added", within_milliseconds, added=5.0)
    for times in (2, 10):
        text = "≥ 90 % of the peak; accepted within the queue's time; refused within 50 ms"
        add(f"serve, {times}x overload", "cpu", text, withstands, times=times)
    for platform, image_size, ratio in (("cpu", 32, 1.5), ("cpu", 224, 1.0), ("gpu", 224, 3.0)):
        question, text = f"serve, ResNet-18 at {image_size} px", f"≥ {ratio:g}x LitServe, p99 no worse"
        add(question, platform, text, outserves, ratio=ratio, image_size=image_size)
    for platform, num_samples, size, ratio, text in (
        ("cpu", 20_000, "20,000 x 2048, 10 classes", 3.0, "≥ 3x scikit-learn, stretch 8x"),
        ("cpu", 10_000, "10,000 x 512, 10 classes", 3.0, "≥ 3x scikit-learn"),
        ("gpu", 50_000, "50,000 x 2048, 100 classes", 300.0, "≥ 300x scikit-learn"),
    ):
        for kind in ("random", "correlated"):
            problem = {"batch_size": num_samples, "features": kind}
            add(f"SVM, {size}, {kind} features", platform, text, fits_sooner, ratio=ratio, **problem)
    imagenet = {"benchmark": "svm", "batch_size": 1_281_167}
    add("SVM, 1.28 M x 2048, 1000 classes", "gpu", "≤ 10 s", within_seconds, seconds=10.0, **imagenet)
    run = "41 photos, 15 epochs, ResNet-18"
    add(run, "cpu", "≤ 3x the bare steps", within_step_time, times=3.0)
    whole = {"benchmark": "short_run", "work": "short_run"}
    add(run, "gpu", "≤ 10 s", within_seconds, seconds=10.0, **whole)
    return goals


GOALS = tuple(_goals())


def make_table(files: Sequence[Results], limits: Mapping[tuple[str, str], str] = LIMITS) -> str:
    """The table in Markdown; files come latest first, and the first that answers a goal is taken."""
    lines = [_row(HEADER), _row(["---"] * len(HEADER))]
    for goal in GOALS:
        lines.append(_row(_cells(goal, files, limits)))
    return "\n".join(lines)


def _cells(goal: Goal, files: Sequence[Results], limits: Mapping[tuple[str, str], str]) -> list[str]:
    start = [goal.question, {"cpu": "CPU", "gpu": "GPU"}[goal.platform], goal.text]
    for results in files:
        is_cpu = results.machine["conditions"]["platform"] == "cpu"
        outcome = goal.judge(results) if is_cpu == (goal.platform == "cpu") else None
        if outcome is not None:
            limit = (
                "" if outcome.reached else limits.get((goal.question, goal.platform), "not yet looked into")
            )
            ratio = f"{outcome.ratio:.2f}" if outcome.reached else f"**{outcome.ratio:.2f}**"
            file = f"`{results.path.name}`"
            return [*start, outcome.measured, outcome.compared_with, ratio, file, limit]
    return [*start, "not measured yet", "", "", "", ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def machines(files: Sequence[Results]) -> str:
    """One line for each device that result files come from."""
    found: dict[str, str] = {}
    for results in files:
        conditions = results.machine["conditions"]
        versions = ", ".join(
            f"{n} {conditions['versions'][n]}" for n in ("jax", "torch") if n in conditions["versions"]
        )
        found.setdefault(
            conditions["platform"], f"{conditions['device']}; {conditions['machine']}; {versions}."
        )
    return "\n".join(found.values())


def insert(readme: str, table: str) -> str:
    """The README with the table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def contents(folder: Path = FOLDER) -> str:
    """What stands between the marks: the table, and the machines."""
    files = read_results(folder)
    return "\n\n".join(filter(None, [make_table(files), machines(files)]))


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md, between its marks")
    if parser.parse_args().write:
        README.write_text(insert(README.read_text("utf-8"), contents()), "utf-8")
    else:
        print(contents())


if __name__ == "__main__":
    main()
