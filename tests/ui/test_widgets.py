"""The views as notebook widgets: what the kernel answers, and all three in JupyterLab."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from urllib.parse import urlencode

import nbformat
import numpy as np
import pytest
from browser import open_browser
from conftest import write_photos
from examples import make_photos, make_predictions, unreadable
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

import jaxcls
from jaxcls.data.annotations import Annotations, Change
from jaxcls.data.lineage import LINEAGE_FILE
from jaxcls.data.moves import apply_moves
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, MissingExtraError, UsageError
from jaxcls.evaluation.metrics import evaluate
from jaxcls.evaluation.thresholds import ALWAYS


@pytest.fixture
def photos(tmp_path):
    return jaxcls.read_folder(write_photos(tmp_path / "photos", {"blue": 3, "red": 3}))


class Front:
    """What a notebook's front end does with a widget: ask by message, and keep what comes back."""

    def __init__(self, widget, monkeypatch) -> None:
        self.widget, self.sent = widget, []
        monkeypatch.setattr(widget, "send", lambda content, buffers: self.sent.append((content, buffers)))

    def ask(self, *requests: tuple[str, object]) -> list[tuple[int, bytes]]:
        """Status and body for each request; all are asked at once."""

        async def ask_all() -> None:
            for number, (path, body) in enumerate(requests):
                message = {"id": str(number), "path": path, "body": body}
                self.widget._handle_custom_msg(message, [])
            while len(self.sent) < len(requests):
                await asyncio.sleep(0.001)

        self.sent.clear()
        asyncio.run(asyncio.wait_for(ask_all(), 30))
        answers = {content["id"]: (content["status"], buffers[0]) for content, buffers in self.sent}
        return [answers[str(number)] for number in range(len(requests))]


def test_photos_are_labelled_by_message(photos, monkeypatch):
    widget = jaxcls.ui.annotate(photos)
    front = Front(widget, monkeypatch)
    changes = [["blue/0.png", "blue", "red"], ["blue/1.png", "blue", "/trash"], ["red/0.png", "red", "green"]]
    [(status, body)] = front.ask(("edit", {"changes": changes}))
    assert status == 200
    assert json.loads(body)["seq"] == 1
    relabelled = widget.dataset()
    assert relabelled.classes == ("blue", "green", "red")
    names = [relabelled.classes[label] for label in relabelled.labels]
    assert dict(zip(relabelled.ids.tolist(), names, strict=True)) == {
        "blue/0.png": "red",
        "blue/2.png": "blue",
        "red/0.png": "green",
        "red/1.png": "red",
        "red/2.png": "red",
    }
    np.testing.assert_array_equal(relabelled.image(0), photos.image(0))
    [(status, body)] = front.ask(("edit", {"changes": [["blue/0.png", "blue", "green"]]}))
    assert (status, json.loads(body)["present"]) == (409, {"blue/0.png": "red"})
    assert front.ask(("state?seq=1", None)) == [(204, b"")]
    front.ask(("undo", {"seq": 1}))
    assert widget.dataset().classes == ("blue", "red")
    widget.close()


def test_what_a_page_did_meanwhile_is_in_the_dataset(photos, tmp_path):
    widget = jaxcls.ui.annotate(photos)
    Annotations(tmp_path / "photos").edit([Change("blue/0.png", "blue", "red")])
    assert widget.dataset().class_counts().tolist() == [2, 4]
    widget.close()


def test_only_the_photos_of_the_dataset_are_shown_and_changed(photos, monkeypatch):
    widget = jaxcls.ui.annotate(photos.select([4, 0]))
    assert widget.data["ids"] == ["blue/0.png", "red/1.png"]
    front = Front(widget, monkeypatch)
    [(status, _)] = front.ask(("edit", {"changes": [["blue/1.png", "blue", "red"]]}))
    assert status == 404
    assert widget.dataset().ids.tolist() == ["red/1.png", "blue/0.png"]
    widget.close()


def test_names_of_all_kinds_come_by_message(photos, tmp_path, monkeypatch):
    names = [f"blue/{name}" for name in ("50% a?b#c&d+e=f.png", "%41;~ .png", "写真 ä.png")]
    for number, name in enumerate(names):
        (tmp_path / "photos/blue" / f"{number}.png").rename(tmp_path / "photos" / name)
    photos = jaxcls.read_folder(tmp_path / "photos")
    widget = jaxcls.ui.annotate(photos)
    paths = [f"photo?{urlencode({'id': name, 'size': 'thumbnail'})}" for name in names]
    for name, (status, body) in zip(
        names, Front(widget, monkeypatch).ask(*[(p, None) for p in paths]), strict=True
    ):
        assert status == 200
        shown = np.asarray(Image.open(BytesIO(body)).convert("RGB"), np.float64)
        assert abs(shown - photos.image(photos.ids.tolist().index(name))).mean() < 20
    widget.close()


def test_photos_that_were_moved_are_not_given_with_an_old_label(photos, tmp_path):
    widget = jaxcls.ui.annotate(photos)
    annotations = Annotations(tmp_path / "photos")
    annotations.edit([Change("blue/0.png", "blue", "red")])
    apply_moves(annotations, ["blue/0.png"])
    with pytest.raises(DatasetError, match=r"1 of these photos, such as blue/0.png, .*read_folder"):
        widget.dataset()
    widget.close()


def test_photos_behind_links_are_left_out(tmp_path):
    folder = write_photos(tmp_path / "photos", {"blue": 2, "red": 2})
    (folder / "blue/linked.png").symlink_to(folder / "red/0.png")
    photos = jaxcls.read_folder(folder)
    assert "blue/linked.png" in photos.ids
    widget = jaxcls.ui.annotate(photos)
    assert widget.dataset().ids.tolist() == ["blue/0.png", "blue/1.png", "red/0.png", "red/1.png"]
    widget.close()


def test_the_notebook_may_change_its_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    widget = jaxcls.ui.annotate(jaxcls.read_folder("photos"))
    front = Front(widget, monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    [(status, _)] = front.ask(("edit", {"changes": [["blue/0.png", "blue", "red"]]}))
    assert status == 200
    assert Annotations(tmp_path / "photos").label("blue/0.png") == "red"
    widget.close()


def test_what_fails_in_the_kernel_is_said_and_logged(photos, monkeypatch, caplog):
    widget = jaxcls.ui.annotate(photos)

    def fail(annotations, seq):
        raise MemoryError("no room")

    monkeypatch.setattr(Annotations, "undo", fail)
    [(status, body)] = Front(widget, monkeypatch).ask(("undo", {"seq": 1}))
    assert (status, json.loads(body)) == (
        500,
        {"error": "the kernel failed to answer: MemoryError('no room')"},
    )
    assert "in fail" in caplog.text
    widget.close()


def test_hints_come_with_the_photos(photos):
    scores = np.asarray([[3, 1], [1, 2], [3, 0], [0, 3], [0, 3], [0, 3]], np.float32)
    predictions = jaxcls.Predictions(
        scores, "margin", photos.classes, tuple(photos.ids), photos.labels, np.zeros(6, np.bool_)
    )
    widget = jaxcls.ui.annotate(photos, predictions=predictions)
    data = widget.data
    assert data["leads"][:2] == [2, 1]
    assert data["names"][data["predicted"][1]] == "red"
    assert data["doubts"] is None
    widget.close()


def test_pictures_come_in_buffers_many_at_once(monkeypatch):
    photos = make_photos(12)
    items = [b"no photo" if i == 5 else photos.source[i] for i in range(12)]
    predictions = unreadable(make_predictions(photos), 5, "bad")
    widget = jaxcls.ui.review(predictions, replace(photos, source=MemorySource(items)))
    answers = Front(widget, monkeypatch).ask(*[(f"photos/{i}?v=1", None) for i in range(13)])
    assert [status for status, _ in answers] == [200] * 5 + [404] + [200] * 6 + [404]
    for i in (0, 1, 2, 11):
        shown = np.asarray(Image.open(BytesIO(answers[i][1])).convert("RGB"), np.float64)
        assert abs(shown - photos.image(i)).mean() < 12


def test_the_widget_shows_what_the_page_shows():
    photos = make_photos(12)
    predictions = make_predictions(photos)
    data = jaxcls.ui.review(predictions, photos).data
    assert data["ids"] == predictions.ids
    assert data["numbers"][1]["value"] == pytest.approx(evaluate(predictions).accuracy("micro"))
    assert data["model"] is None
    assert data["note"] == "12 photos."


def test_thresholds_are_of_the_answered_images():
    predictions = make_predictions(make_photos(12))
    predictions = replace(predictions, abstained=np.arange(12) < 3)
    explorer = jaxcls.ui.thresholds(evaluate(predictions))
    assert explorer.data["truth"] == predictions.labels[3:].tolist()
    assert explorer.data["labelled"] == [3, 3, 3]
    assert explorer.chosen == {}


def test_chosen_thresholds_are_the_classifiers():
    classifier = jaxcls.create_model("resnet18", 3)
    abstaining = classifier.with_thresholds({"class 1": 0.25})
    np.testing.assert_array_equal(abstaining.head.thresholds, np.asarray([ALWAYS, 0.25, ALWAYS], np.float32))
    assert abstaining.with_thresholds({}).head.thresholds is None
    with pytest.raises(UsageError, match="no class 'cup'; known are class 0, class 1, class 2"):
        classifier.with_thresholds({"cup": 1.0})
    with pytest.raises(UsageError, match=r"that of .class 1. is NaN"):
        classifier.with_thresholds({"class 1": np.nan})


def test_photos_without_a_folder_cannot_be_labelled(photos, tmp_path):
    with pytest.raises(UsageError, match=r"not those of one folder.*read_folder"):
        jaxcls.ui.annotate(make_photos(3))
    other = jaxcls.read_folder(write_photos(tmp_path / "other", {"green": 2, "red": 2}))
    with pytest.raises(UsageError, match="not those of one folder"):
        jaxcls.ui.annotate(photos.merge(other))
    (tmp_path / "photos" / LINEAGE_FILE).touch()
    with pytest.raises(DatasetError, match="holds augmented copies"):
        jaxcls.ui.annotate(photos)


def test_without_the_extra_the_way_out_is_said(monkeypatch):
    monkeypatch.setattr("jaxcls.ui.extra.EXTRA", ("anywidget", "no_such_package"))
    with pytest.raises(MissingExtraError, match=r"needs no_such_package.*pip install 'jaxcls\[ui\]'"):
        _ = jaxcls.ui.review


# In JupyterLab

CELLS = [
    "import json, numpy as np, jaxcls; from pathlib import Path\n"
    'photos = jaxcls.read_folder("photos")\n'
    "scores = 2 * np.eye(2, dtype=np.float32)[photos.labels]\n"
    "scores[0] = [0, 1]\n"
    "predictions = jaxcls.Predictions(\n"
    '    scores, "logit", photos.classes, tuple(photos.ids), photos.labels, np.zeros(len(photos), bool)\n'
    ")",
    "desk = jaxcls.ui.annotate(photos); desk",
    "jaxcls.ui.review(predictions, photos)",
    "explorer = jaxcls.ui.thresholds(jaxcls.evaluate(predictions)); explorer",
]
TELL = 'Path("told.json").write_text(json.dumps([desk.dataset().class_counts().tolist(), explorer.chosen]))'
RUN_ALL = """
const [done] = arguments;
const notebook = jupyterapp.shell.currentWidget;
const run = () => jupyterapp.commands.execute("notebook:run-all-cells");
notebook.sessionContext.ready.then(run).then(() => done());
"""
COUNT_ADDRESSES = """
const { createObjectURL, revokeObjectURL } = URL;
window.addresses = { made: 0, kept: new Set() };
URL.createObjectURL = (blob) => {
  const address = createObjectURL(blob);
  window.addresses.made += 1;
  window.addresses.kept.add(address);
  return address;
};
URL.revokeObjectURL = (address) => {
  window.addresses.kept.delete(address);
  revokeObjectURL(address);
};
"""
EXECUTE = """
const [code, done] = arguments;
const { kernel } = jupyterapp.shell.currentWidget.sessionContext.session;
kernel.requestExecute({ code }).done.then((reply) => done(reply.content.status));
"""
BEGIN = """
const [code] = arguments;
jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({ code });
"""


@contextmanager
def jupyter_lab(folder: Path):
    """A server of this machine that opens the notebooks of a folder: yields its address and token."""
    own = {f"JUPYTER_{name}_DIR": str(folder / f".{name}") for name in ("CONFIG", "RUNTIME", "DATA")}
    own |= {"IPYTHONDIR": str(folder / ".ipython"), "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings")}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, "--LabApp.expose_app_in_browser=True"],
        cwd=folder, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        written = (folder / ".RUNTIME").glob
        while not (found := [file for file in written("jpserver-*.json") if file.stat().st_size > 0]):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        about = json.loads(found[0].read_text())
        yield about["url"], about["token"]
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def open_notebook(folder: Path, cells: list[str]):
    """A browser in which a notebook was run: yields its driver, and what finds the views in its outputs."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": kernel}, cells=[nbformat.v4.new_code_cell(cell) for cell in cells]
    )
    nbformat.write(notebook, folder / "look.ipynb")
    with jupyter_lab(folder) as (address, token), open_browser() as driver:
        wait = WebDriverWait(driver, 60)
        driver.set_script_timeout(60)
        driver.get(f"{address}lab/tree/look.ipynb?token={token}&reset")
        wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"))
        wait.until(
            lambda _: driver.execute_script("return Boolean(jupyterapp.shell.currentWidget?.sessionContext)")
        )
        driver.execute_script(COUNT_ADDRESSES)
        driver.execute_async_script(RUN_ALL)

        def views(count: int) -> list:
            hosts = (By.CSS_SELECTOR, "[data-lm-suppress-shortcuts]")
            wait.until(lambda _: len(driver.find_elements(*hosts)) == count)
            return [host.shadow_root for host in driver.find_elements(*hosts)]

        yield driver, wait, views


def click(part, selector: str) -> None:
    node = part.find_element(By.CSS_SELECTOR, selector)
    node.parent.execute_script("arguments[0].scrollIntoView({ block: 'center' })", node)
    node.click()


in_jupyter_lab = pytest.mark.skipif(
    find_spec("jupyterlab") is None, reason="needs JupyterLab: pip install -e '.[slow]'"
)


@pytest.mark.slow
@pytest.mark.browser
@in_jupyter_lab
def test_all_three_in_jupyter_lab(tmp_path):
    write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    with open_notebook(tmp_path, CELLS) as (driver, wait, views):
        desk, results, explorer = views(3)

        # Keys label photos, and are none of JupyterLab's: x would cut a cell.
        click(desk, ".photo button.picture")
        for key in ("2", "j", "x", "x"):
            driver.switch_to.active_element.send_keys(key)
        wait.until(lambda _: "3 photos not yet moved" in desk.find_element(By.CSS_SELECTOR, "main").text)
        assert len(driver.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell")) == len(CELLS)

        # A cell of the matrix shows its images, whose pictures come from the kernel.
        click(results, ".matrix button.wrong")
        assert results.find_element(By.CSS_SELECTOR, ".filters .status").text == "1 of 12 images"
        click(results, ".cell")
        assert results.find_element(By.CSS_SELECTOR, "#viewer-title").text == "blue/0.png"
        picture = results.find_element(By.CSS_SELECTOR, ".viewer img")
        wait.until(lambda _: driver.execute_script("return arguments[0].naturalWidth", picture) > 0)
        driver.switch_to.active_element.send_keys(Keys.ESCAPE)

        # A chosen threshold is known to the kernel.
        click(explorer, ".explorer-controls button")
        assert driver.execute_async_script(EXECUTE, TELL) == "ok"
        assert json.loads((tmp_path / "told.json").read_text()) == [[3, 7], {"blue": 2}]

        assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


LATE_PICTURES = """
from jaxcls.ui import review_page
def encode_late(*arguments, encode=review_page.encode):
    while not Path("go").exists():
        time.sleep(0.01)
    return encode(*arguments)
review_page.encode = encode_late
"""
SCROLL = """
const [grid, done] = arguments;
const steps = Array.from({ length: 41 }, (_, step) => (grid.scrollHeight * step) / 40);
const scroll = () => {
  if (steps.length === 0) return done();
  grid.scrollTop = steps.shift();
  requestAnimationFrame(scroll);
};
scroll();
"""
ARE_ALL_SHOWN = "return [...arguments[0].querySelectorAll('img')].every((image) => image.naturalWidth > 0)"


@pytest.mark.slow
@pytest.mark.browser
@in_jupyter_lab
def test_views_share_a_widget_and_ask_for_what_is_in_sight(tmp_path):
    write_photos(tmp_path / "photos", {"blue": 300, "red": 300})
    cells = [
        f"import time; {CELLS[0]}{LATE_PICTURES}",
        *CELLS[1:],
        "desk",
        "explorer.chosen = {'red': 1}; explorer",
    ]
    with open_notebook(tmp_path, cells) as (driver, wait, views):
        desk, results, explorer, other_desk, other_explorer = views(5)

        (choice,) = other_explorer.find_elements(By.CSS_SELECTOR, ".choices li")
        assert choice.text.startswith("red ≥ 1 ")

        # Pictures of photos that were scrolled past are never asked for, and no picture stays in memory.
        for view in (desk, other_desk):
            wait.until(lambda _, view=view: driver.execute_script(ARE_ALL_SHOWN, view))
        num_before = driver.execute_script("return addresses.made")
        grid = results.find_element(By.CSS_SELECTOR, ".grid")
        driver.execute_async_script(SCROLL, grid)
        (tmp_path / "go").touch()
        wait.until(lambda _: driver.execute_script(ARE_ALL_SHOWN, grid))
        wait.until(lambda _: driver.execute_script("return addresses.kept.size") == 0)
        assert driver.execute_script("return addresses.made") < num_before + 150

        # While a cell runs, labels change; another view of the widget hears of it.
        running = "while not Path('stop').exists(): time.sleep(0.01)"
        driver.execute_script(BEGIN, running)
        click(desk, ".photo button.picture")
        driver.switch_to.active_element.send_keys("2")
        for view in (desk, other_desk):
            pending = view.find_element(By.CSS_SELECTOR, "main > .muted")
            wait.until(lambda _, pending=pending: pending.text.startswith("1 photo not yet moved"))
        (tmp_path / "stop").touch()

        # What was chosen in one view is kept by the choice in another.
        click(explorer, ".explorer-controls button")
        Select(other_explorer.find_element(By.CSS_SELECTOR, "select")).select_by_visible_text("red")
        click(other_explorer, ".explorer-controls button")
        for view in (explorer, other_explorer):
            wait.until(lambda _, view=view: len(view.find_elements(By.CSS_SELECTOR, ".choices li")) == 2)
        assert driver.execute_async_script(EXECUTE, "desk.close(); " + TELL) == "ok"
        assert json.loads((tmp_path / "told.json").read_text()) == [[299, 301], {"red": 1, "blue": 2}]
        views(3)
