"""`jaxcls annotate`: the command, what the page may ask for, and the page in a real browser."""

import os
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import numpy as np
import pytest
from browser import find_violations, look, open_browser
from conftest import draw, write_photos
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from starlette.testclient import TestClient

from jaxcls import cli
from jaxcls.data.annotations import JOURNAL, NO_LABEL, TRASH, Annotations, Change, list_photos
from jaxcls.data.beneath import Tree
from jaxcls.data.lineage import LINEAGE_FILE
from jaxcls.data.moves import apply_moves
from jaxcls.evaluation.label_errors import LabelErrors
from jaxcls.predictions import Predictions
from jaxcls.ui import desk
from jaxcls.ui.app import make_app
from jaxcls.ui.desk import Desk, Pictures, make_hints


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", {"blue": 3, "red": 3})


@contextmanager
def annotating(folder: Path):
    """The command at work: yields its process and the address that it printed."""
    command = [sys.executable, "-m", "jaxcls.cli", "annotate", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        yield server, address
    finally:
        server.kill()
        server.communicate()


@contextmanager
def visiting(address: str):
    """A client that has opened the address."""
    parts = urlsplit(address)
    own = f"http://{parts.netloc}"
    with httpx2.Client(base_url=own, headers={"origin": own}, trust_env=False) as visitor:
        visitor.get(f"/?token={parse_qs(parts.query)['token'][0]}")
        yield visitor


@pytest.fixture
def visitor(folder):
    """A client of the page, in this process."""
    served = Desk(Annotations(folder), make_hints(None, None))
    own = "http://127.0.0.1:8000"
    visitor = TestClient(make_app(served.page(), "token"), base_url=own, headers={"origin": own})
    visitor.get("/?token=token")
    yield visitor
    served.close()


def run(*arguments) -> int:
    return cli.main(["annotate", *map(str, arguments)])


# The command


def test_it_says_where_the_page_is_and_ends_with_ctrl_c(folder):
    with annotating(folder) as (server, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
        assert server.stdout.readline().startswith("from another machine, first: ssh -N -L ")
        with visiting(address) as visitor:
            visitor.post("/edit", json={"changes": [["blue/0.png", "blue", "red"]]}).raise_for_status()
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert errors.strip() == "photos that lie elsewhere than their labels say: 1; --apply moves them"


def test_apply_dry_run_and_back(folder, capsys):
    Annotations(folder).edit([Change("blue/0.png", "blue", "red"), Change("red/1.png", "red", TRASH)])
    assert run(folder, "--dry-run") == 0
    planned = "blue/0.png -> red/0-2.png\nred/1.png -> .jaxcls/trash/red/1.png\n"
    assert capsys.readouterr().out == planned + "photos that would be moved: 2\n"
    assert (folder / "blue/0.png").is_file()
    assert run(folder, "--apply") == 0
    assert capsys.readouterr().out == planned + "photos moved: 2\n"
    assert not (folder / "blue/0.png").exists()
    assert run(folder, "--undo-apply", "--dry-run") == 0
    assert ".jaxcls/trash/red/1.png -> red/1.png" in capsys.readouterr().out
    assert run(folder, "--undo-apply") == 0
    assert (folder / "blue/0.png").is_file()
    capsys.readouterr()
    assert run(folder, "--undo-apply") == 0
    assert capsys.readouterr().out == "photos moved: 0\n"


def test_photos_that_cannot_be_moved_make_it_fail(folder, capsys):
    Annotations(folder).edit([Change("blue/0.png", "blue", "green")])
    (folder / "green").symlink_to(folder.parent)
    assert run(folder, "--apply") == 1
    assert "jaxcls: blue/0.png -> green/0.png: " in capsys.readouterr().err


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, code, message in [
        ([tmp_path / "none"], 1, "none: no such folder"),
        ([tmp_path / "empty"], 1, "empty holds no images that could be annotated"),
        ([folder, "--apply", "--undo-apply"], 2, "choose one"),
        ([folder, "--apply", "--label-errors"], 2, "--model and --label-errors go with the page"),
        ([folder, "--unlabelled", "inbox"], 2, "'inbox' is no sub-folder of"),
        ([folder, "--port", "70000"], 2, "cannot listen on port 70000"),
    ]:
        assert run(*arguments) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    (folder / LINEAGE_FILE).touch()
    assert run(folder) == 1
    assert "holds augmented copies: annotate the folder of originals" in capsys.readouterr().err


# What the page may ask for


def test_two_pages_cannot_overwrite_each_other(folder, visitor):
    state = visitor.get("/state").json()
    edit = {"changes": [["blue/0.png", "blue", "red"], ["blue/1.png", "blue", TRASH]]}
    assert visitor.post("/edit", json=edit).json() == {
        "changes": [["blue/0.png", "red"], ["blue/1.png", TRASH]], "seq": 1, "undoable": 1, "redoable": None,
    }  # fmt: skip
    other = {"changes": [["blue/2.png", "blue", "red"], ["blue/0.png", "blue", TRASH]]}
    refused = visitor.post("/edit", json=other)
    assert (refused.status_code, refused.json()["present"]) == (409, {"blue/0.png": "red"})
    assert visitor.get(f"/state?seq={state['seq']}").json()["seq"] == 1
    assert visitor.get("/state?seq=1").status_code == 204
    assert visitor.post("/undo", json={"seq": 0}).status_code == 409
    assert visitor.post("/undo", json={"seq": 1}).json()["changes"] == [
        ["blue/0.png", "blue"], ["blue/1.png", "blue"],
    ]  # fmt: skip
    assert visitor.post("/redo", json={"seq": 2}).status_code == 200
    Annotations(folder).edit([Change("red/0.png", "red", "green")])  # of another process
    state = visitor.get("/state?seq=3").json()
    labels = {
        photo: state["names"][label] for photo, label in zip(state["ids"], state["labels"], strict=True)
    }
    assert labels["red/0.png"] == "green"
    assert labels["blue/0.png"] == "red"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (["../../etc/passwd", "blue", "red"], 404, "no photo here"),
        (["blue/9.png", "blue", "red"], 404, "no photo here"),
        (["blue/0.png", "blue", "../up"], 400, "cannot be a class: it begins with a dot"),
        (["blue/0.png", "blue", "a/b"], 400, "holds a slash"),
        (["blue/0.png", "blue", "a\u202eb"], 400, "control character"),
        (["blue/0.png", "blue", "Red"], 400, "'Red' and 'red' differ by no more than case"),
        (["blue/0.png", "blue"], 400, "an edit is"),
        (["blue/0.png", "blue", 7], 400, "an edit is"),
    ],
)
def test_edits_that_cannot_be_are_refused(folder, visitor, change, status, message):
    answer = visitor.post("/edit", json={"changes": [change]})
    assert answer.status_code == status
    assert message in answer.json()["error"]
    for body in ([], {"changes": [7]}, {"changes": []}, 7, {"changes": {}}):
        assert visitor.post("/edit", json=body).status_code == 400
    assert not (folder / JOURNAL).exists()


def test_photos_are_sent_small_and_none_from_elsewhere(folder, visitor):
    Image.fromarray(np.zeros((900, 2400, 3), np.uint8)).save(folder / "blue/0.png")
    sizes = {}
    for size in ("thumbnail", "whole"):
        answer = visitor.get("/photo", params={"id": "blue/0.png", "size": size})
        assert answer.headers["content-type"] == "image/webp"
        sizes[size] = Image.open(BytesIO(answer.content)).size
    assert sizes == {"thumbnail": (320, 120), "whole": (1600, 600)}
    again = visitor.get(
        "/photo", params={"id": "blue/0.png", "size": size}, headers={"if-none-match": answer.headers["etag"]}
    )
    assert again.status_code == 304
    outside = folder.parent / "secret.png"
    draw(0).save(outside)
    (folder / "blue/1.png").unlink()
    (folder / "blue/1.png").symlink_to(outside)  # exchanged after it was listed
    (folder / "blue/2.png").write_bytes(b"no image")
    for photo, status in [
        ("../secret.png", 404), (str(outside), 404), (".jaxcls/annotations.jsonl", 404), ("", 404),
        ("blue/1.png", 422), ("blue/2.png", 422),
    ]:  # fmt: skip
        answer = visitor.get("/photo", params={"id": photo, "size": "whole"})
        assert answer.status_code == status, photo
        assert b"error" in answer.content
    assert visitor.get("/photo", params={"id": "blue/0.png", "size": "9999"}).status_code == 404


def test_a_photo_is_labelled_on_after_its_file_was_moved(folder, visitor):
    visitor.post("/edit", json={"changes": [["blue/0.png", "blue", "red"]]})
    assert run(folder, "--apply") == 0
    assert visitor.post("/edit", json={"changes": [["blue/0.png", "red", "blue"]]}).status_code == 409
    state = visitor.get("/state?seq=1").json()
    assert "red/0-2.png" in state["ids"]
    assert visitor.post("/edit", json={"changes": [["red/0-2.png", "red", "blue"]]}).status_code == 200


def test_duplicates_are_found(folder, visitor):
    for name in ("one", "two"):
        draw(1).save(folder / f"red/{name}.png")
    visitor.get("/state")
    while (answer := visitor.get("/duplicates")).status_code == 202:
        time.sleep(0.05)
    assert answer.json() == {"groups": [["red/one.png", "red/two.png"]]}


def test_a_search_for_duplicates_that_failed_says_so_and_can_be_made_again(visitor, monkeypatch):
    def fail(dataset):
        raise MemoryError("no room")

    def wait() -> httpx2.Response:
        return wait_for(lambda: (answer := visitor.get("/duplicates")).status_code != 202 and answer)

    with monkeypatch.context() as patch:
        patch.setattr(desk, "find_duplicates", fail)
        failed = wait()
    assert failed.status_code == 500
    assert failed.json() == {"error": "duplicates: MemoryError('no room'): choose them again"}
    assert (again := wait()).status_code == 200
    assert again.json() == {"groups": []}


def test_a_search_among_photos_that_are_no_longer_all_is_stopped(folder, visitor, monkeypatch):
    """Its answer is not taken for that of the present photos either."""
    find, begun, goes_on, unreadable = desk.find_duplicates, threading.Event(), threading.Event(), []

    def find_late(dataset):
        if len(dataset) > 6:
            return find(dataset)
        begun.set()
        assert goes_on.wait(10)
        found = find(dataset)
        unreadable.extend(found.errors)
        return found

    monkeypatch.setattr(desk, "find_duplicates", find_late)
    assert visitor.get("/duplicates").status_code == 202
    assert begun.wait(10)
    for name in ("one", "two"):
        draw(1).save(folder / f"red/{name}.png")
    visitor.get("/state")
    answer = wait_for(lambda: (answer := visitor.get("/duplicates")).status_code != 202 and answer)
    goes_on.set()
    wait_for(lambda: len(unreadable) == 6)
    assert answer.json() == visitor.get("/duplicates").json() == {"groups": [["red/one.png", "red/two.png"]]}


def test_edits_wait_until_interrupted_moves_are_finished(folder, visitor, monkeypatch):
    visitor.post("/edit", json={"changes": [["blue/0.png", "blue", "green"]]})

    def interrupt(tree, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply_moves(Annotations(folder), list_photos(folder).ids)
    for path, body in [
        ("/edit", {"changes": [["blue/1.png", "blue", "red"]]}), ("/undo", {"seq": 1}), ("/redo", {"seq": 1}),
    ]:  # fmt: skip
        answer = visitor.post(path, json=body)
        assert answer.status_code == 409
        assert "interrupted: start `jaxcls annotate` again" in answer.json()["error"]


def test_no_photo_is_sent_for_another_while_the_list_is_made_anew(folder, visitor, monkeypatch):
    def ask() -> bytes:
        os.utime(folder / "red/0.png")  # so that it is encoded anew
        return visitor.get("/photo", params={"id": "red/0.png", "size": "thumbnail"}).content

    right, seen = ask(), []

    def ask_meanwhile(ids):
        seen.append(ask())
        return enumerate(ids)

    draw(9).save(folder / "blue/00.png")  # which shifts the others
    monkeypatch.setattr(desk, "enumerate", ask_meanwhile, raising=False)
    visitor.get("/state")
    assert seen
    assert {*seen, ask()} == {right}


OLD_STATE = """
const { Labelling } = await import(process.argv[1]);
const state = (seq, label) => ({ names: ["/unlabelled", "/trash", "blue", "red"], ids: ["a"], labels: [label],
  folders: [2], suggested: [-1], predicted: [-1], seq, undoable: seq || null, redoable: null });
let answerLate;
const ask = (path) => path === "edit"
  ? Promise.resolve({ changes: [["a", "red"]], seq: 1, undoable: 1, redoable: null })
  : new Promise((resolve) => { answerLate = () => resolve(state(0, 2)); });
const photos = new Labelling(state(0, 2), { ask });
const sync = photos.sync(-1);
await photos.edit(["a"], "red");
answerLate();
await sync;
console.log(photos.labelOf("a"), photos.seq, photos.undoable);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the module")
def test_a_state_that_comes_late_does_not_take_an_edit_back(tmp_path):
    module = tmp_path / "labelling.mjs"
    module.write_bytes((Path(desk.__file__).parent / "static/labelling.js").read_bytes())
    command = ["node", "--input-type=module", "-e", OLD_STATE, str(module)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("red 1 1\n", "")


def test_hints_by_id():
    errors = LabelErrors(
        ("blue", "red"), ("b", "a"), np.asarray([1, 0]), np.asarray([0, 1], np.int32),
        np.asarray([1, 0], np.int32), np.asarray([0.9, 0.1]), 0,
    )  # fmt: skip
    scores = np.asarray([[0.5, 0.25], [np.nan, np.nan], [0.1, 0.9]], np.float32)
    predictions = Predictions(
        scores, "probability", ("blue", "red"), ("a", "b", "c"), None, np.zeros(3, bool), {1: "cut short"}
    )
    hints = make_hints(errors, predictions)
    assert hints.doubts == {"b": 0.9, "a": 0.1}
    assert hints.suggested == {"b": "red", "a": "blue"}
    assert hints.leads == {"a": 0.25, "c": pytest.approx(0.8)}
    assert hints.predicted == {"a": "blue", "c": "red"}
    assert make_hints(None, None).leads is None


def test_kept_pictures_are_bounded():
    pictures = Pictures(max_bytes=10)
    for name in "abc":
        pictures.put(name, b"1234")
        pictures.get("a")
    pictures.put("a", b"12")
    assert [pictures.get(name) for name in "abc"] == [b"12", None, b"1234"]
    pictures.put("large", bytes(11))
    assert [pictures.get(name) for name in ("a", "c", "large")] == [None] * 3


# The page in a browser


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """60 photos of two classes, two of them alike, one that cannot be read, three without a label."""
    folder = tmp_path_factory.mktemp("many") / "tools"
    for number in range(60):
        path = folder / ("knife", "fork & <b>")[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(min(number, 58)).save(path)
    for number in range(3):
        draw(100 + number).save(folder / f"loose{number}.jpg")
    (folder / "knife/00.jpg").write_bytes(b"\xff\xd8\xff cut short")
    return folder


@pytest.fixture
def page(driver, many):
    """The page, just opened; the journal is empty."""
    (many / JOURNAL).unlink(missing_ok=True)
    look(driver, 1280, 800, dark=False)
    with annotating(many) as (server, address):
        driver.get(address)
        wait_for(lambda: find_all(driver, ".photo"))
        driver.server = server
        yield driver
        assert [line for line in driver.get_log("browser") if "422" not in line["message"]] == []
        driver.get("about:blank")  # asks for no further photos


def find(driver, selector: str):
    return driver.find_element(By.CSS_SELECTOR, selector)


def find_all(driver, selector: str) -> list:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def wait_for(condition, seconds: float = 10):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def press(driver, *keys: str) -> None:
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def label_of(driver, name: str) -> str:
    return find(driver, f"select[aria-label='Label of {name}']").get_property("value")


def shows(driver, name: str, label: str) -> None:
    wait_for(lambda: label_of(driver, name) == label)


def names(driver) -> list[str]:
    return [node.get_attribute("title") for node in find_all(driver, ".photo .caption bdi[title]")]


def show(driver, text: str) -> None:
    Select(find(driver, ".filters select")).select_by_visible_text(text)


FORK, KNIFE = "fork & <b>", "knife"


@pytest.mark.browser
def test_label_with_the_keyboard_undo_redo_and_reload(page, many):
    first, second, third = (f"{FORK}/{number:02}.jpg" for number in (1, 3, 5))
    press(page, "2")  # on to the next
    press(page, Keys.ARROW_RIGHT, "x")
    shows(page, first, KNIFE)
    shows(page, third, TRASH)
    assert label_of(page, second) == FORK
    assert "2 photos not yet moved" in find(page, "main > .muted").text
    press(page, "z")
    shows(page, third, FORK)
    press(page, "y")
    shows(page, third, TRASH)
    press(page, "z")
    shows(page, third, FORK)
    page.refresh()
    wait_for(lambda: find_all(page, ".photo"))
    assert [label_of(page, name) for name in (first, second, third)] == [KNIFE, FORK, FORK]
    annotations = Annotations(many)
    assert [annotations.label(name) for name in (first, second, third)] == [KNIFE, FORK, FORK]
    find(page, ".annotate-head button").click()  # Undo
    shows(page, first, FORK)


@pytest.mark.browser
@pytest.mark.slow
def test_many_are_labelled_at_once_with_a_new_class(page):
    cells = find_all(page, ".photo button.picture")
    cells[1].click()
    page.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {shiftKey: true, bubbles: true}))", cells[4]
    )
    assert find(page, ".label-bar .status").text == "4 photos selected"
    press(page, "l")
    press(page, *"constructor", Keys.ENTER)
    assert "constructor is a new class: press Enter once more" in find(page, ".label-bar .status").text
    press(page, Keys.ENTER)
    for number in (3, 5, 7, 9):
        shows(page, f"{FORK}/{number:02}.jpg", "constructor")
    assert label_of(page, f"{FORK}/11.jpg") == FORK
    assert [button.text for button in find_all(page, ".palette button")][2:3] == ["3 constructor"]
    press(page, "a", "3")
    shows(page, f"{FORK}/59.jpg", "constructor")
    press(page, "z")
    shows(page, f"{FORK}/59.jpg", FORK)


@pytest.mark.browser
def test_filters_pages_and_the_choice_below_each_photo(page):
    assert find(page, ".viewer-steps .muted").text == "1 / 2, 63 photos"
    press(page, "]")
    assert len(names(page)) == 15
    page.refresh()
    wait_for(lambda: len(names(page)) == 15)
    show(page, "without a label")
    assert names(page) == ["loose0.jpg", "loose1.jpg", "loose2.jpg"]
    label = find(page, "select[aria-label='Label of loose1.jpg']")
    label.click()
    assert [option.text for option in Select(label).options] == [FORK, KNIFE, "no label", "trash"]
    Select(label).select_by_visible_text("knife")
    wait_for(lambda: "1 photo not yet moved" in find(page, "main > .muted").text)
    assert len(names(page)) == 3  # it stays until the filter is chosen anew
    show(page, "class knife")
    assert len(names(page)) == 31
    show(page, "changed, not yet moved")
    assert names(page) == ["loose1.jpg"]
    show(page, "trash")
    assert names(page) == []
    assert "No photo is shown" in find(page, ".photo-pages").text
    show(page, "duplicates")
    assert wait_for(lambda: names(page)) == [f"{FORK}/59.jpg", f"{KNIFE}/58.jpg"]
    options = Select(find(page, ".filters select")).options
    assert [option.text for option in options if not option.is_enabled()] == [
        "probably mislabelled (needs label errors)",
        "the classifier sees another class (needs a classifier)",
    ]


@pytest.mark.browser
def test_photos_that_are_out_of_sight_are_not_labelled(page):
    press(page, "a")
    assert find(page, ".label-bar .status").text == "48 photos selected"
    press(page, "]")
    assert find(page, ".label-bar .status").text == ""
    first = names(page)[0]
    press(page, "x")
    shows(page, first, TRASH)
    assert "1 photo not yet moved" in find(page, "main > .muted").text


@pytest.mark.browser
@pytest.mark.slow
def test_zoom_and_label_there(page):
    press(page, "j", Keys.ENTER)
    assert wait_for(lambda: find(page, "#zoom-title").text) == f"{FORK}/03.jpg"
    wait_for(lambda: find(page, ".zoomed img").get_property("naturalWidth") == 160)
    press(page, "2")
    wait_for(lambda: find(page, "#zoom-title").text == f"{FORK}/05.jpg")
    shows(page, f"{FORK}/03.jpg", KNIFE)
    press(page, "k")
    assert find(page, "#zoom-title").text == f"{FORK}/03.jpg"
    press(page, Keys.ESCAPE)
    wait_for(lambda: not find(page, ".zoomed").is_displayed())


@contextmanager
def forwarded(port: int):
    """Another port that leads to this one, as `ssh -L` makes one: yields its number."""

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as other:
                ends = {self.request: other, other: self.request}
                while True:
                    for end in select.select(list(ends), [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        ends[end].sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Forward) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.browser
@pytest.mark.slow
def test_it_works_through_a_forwarded_port(driver, folder):
    with annotating(folder) as (_, address), forwarded(urlsplit(address).port) as port:
        driver.get(address.replace(str(urlsplit(address).port), str(port)).replace("127.0.0.1", "localhost"))
        wait_for(lambda: find_all(driver, ".photo"))
        press(driver, "2")
        shows(driver, "blue/0.png", "red")
        assert Annotations(folder).label("blue/0.png") == "red"
        driver.get("about:blank")


@pytest.mark.browser
@pytest.mark.slow
def test_what_another_page_did_is_not_overwritten(page, many):
    name = f"{FORK}/01.jpg"
    Annotations(many).edit([Change(name, FORK, NO_LABEL)])
    press(page, "2")
    wait_for(lambda: "changed meanwhile" in find(page, ".label-bar .status").text)
    assert label_of(page, name) == NO_LABEL
    page.get_log("browser")  # the browser itself writes 409 down


@pytest.mark.browser
@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_the_page_says_so(page, many):
    press(page, "2")
    shows(page, f"{FORK}/01.jpg", KNIFE)
    page.server.kill()
    page.server.wait()
    press(page, "x")
    wait_for(lambda: "No answer: is `jaxcls annotate` still running" in find(page, ".label-bar .status").text)
    assert label_of(page, f"{FORK}/03.jpg") == FORK
    assert Annotations(many).labels([f"{FORK}/01.jpg", f"{FORK}/03.jpg"]) == [KNIFE, FORK]
    page.get_log("browser")


OVERFLOW = """
if (document.documentElement.scrollWidth > innerWidth) return "wider than the screen";
const boxes = [...document.querySelectorAll(arguments[0])].filter((node) => node.offsetParent !== null)
  .map((node) => [node, node.getBoundingClientRect()]);
const touch = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1;
const clash = boxes.find(([a, p], i) => boxes.slice(i + 1).some(([b, q]) => !a.contains(b) && !b.contains(a) && touch(p, q)));
return clash ? clash[0].outerHTML : "";
"""  # noqa: E501
SCREENS = [(1280, 800, False), (1280, 800, True), (390, 844, False), (390, 844, True)]


@pytest.mark.browser
@pytest.mark.slow
def test_nothing_overlaps_on_four_screens(page):
    for screen in SCREENS:
        look(page, *screen[:2], dark=screen[2])
        for part in ("header *, main *:not(.photo, .photo *)", ".photo", ".label-bar *:not(.palette *)"):
            assert page.execute_script(OVERFLOW, part) == ""


@pytest.mark.browser
@pytest.mark.slow
def test_every_control_has_a_name_and_text_is_readable(page):
    for screen in SCREENS:
        look(page, *screen[:2], dark=screen[2])
        assert find_violations(page) == []
    press(page, Keys.ENTER)
    assert find_violations(page) == []
