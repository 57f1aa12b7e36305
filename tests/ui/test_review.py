"""The page of `jaxcls review`: its photos, and the whole of it in a browser."""

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import uvicorn
from browser import open_browser
from conftest import write_photos
from examples import make_photos, make_predictions, unreadable
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from starlette.testclient import TestClient

from jaxcls.data.source import MemorySource
from jaxcls.errors import UsageError
from jaxcls.evaluation.metrics import evaluate
from jaxcls.ui.app import make_app
from jaxcls.ui.review_page import review_page

TOKEN = "a token"
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
FIRST_PIXEL = """
const image = document.querySelector(".cell img");
if (!image?.naturalWidth) return null;
const context = document.createElement("canvas").getContext("2d");
context.drawImage(image, 0, 0);
return [...context.getImageData(9, 9, 1, 1).data.slice(0, 3)];
"""


@pytest.fixture(scope="module")
def client():
    """A browser that has opened the page: twelve photos, of which one is damaged."""
    photos = make_photos(12)
    items = [b"no photo" if i == 5 else photos.source[i] for i in range(12)]
    predictions = unreadable(make_predictions(photos), 5, "bad")
    page = review_page(
        predictions, evaluate(predictions), replace(photos, source=MemorySource(items)), model="cups"
    )
    with TestClient(make_app(page, TOKEN), base_url="http://127.0.0.1:8000") as client:
        client.get("/", params={"token": TOKEN})
        yield client


def test_the_page_has_results_and_no_embedded_photo(client):
    page = client.get("/").text
    assert 'id="results"' in page
    assert 'id="thumbnails"' not in page


@pytest.mark.parametrize("kind", ["thumbnails", "photos"])
def test_a_photo_is_shown(client, kind):
    answer = client.get(f"/{kind}/2")
    assert answer.headers["content-type"] == "image/webp"
    image = np.asarray(Image.open(BytesIO(answer.content)).convert("RGB"), float)
    differences = [np.abs(image - make_photos(3).image(i)).mean() for i in range(3)]
    assert differences[2] < min(differences[:2]) / 2


@pytest.mark.parametrize(
    "path", ["/photos/12", "/photos/-1", "/photos/x", "/photos/5", "/weights/1", "/photos"]
)
def test_what_is_not_there_is_not_found(client, path):
    assert client.get(path).status_code == 404


def test_photos_are_for_this_page_alone(client):
    assert client.get("/photos/2", headers={"host": "evil.example"}).status_code == 421
    stranger = TestClient(client.app, base_url=client.base_url)
    assert stranger.get("/photos/2").status_code == 401


def test_other_photos_are_refused():
    predictions = make_predictions(make_photos(6))
    with pytest.raises(UsageError, match="not of the photos"):
        review_page(predictions, evaluate(predictions), make_photos(7), model="cups")


@contextmanager
def served(colour: str, port: int = 0) -> Iterator[tuple[int, str]]:
    """The port and the address of a page of three photos, all of one colour."""
    photos = make_photos(3)
    items = [np.full((36, 48, 3), COLOURS[colour], np.uint8)] * 3
    predictions = make_predictions(photos)
    page = review_page(
        predictions, evaluate(predictions), replace(photos, source=MemorySource(items)), model=colour
    )
    with socket.create_server(("127.0.0.1", port)) as listener:
        config = uvicorn.Config(make_app(page, colour), log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            port = listener.getsockname()[1]
            yield port, f"http://127.0.0.1:{port}/?token={colour}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.browser
def test_a_later_page_at_the_same_port_shows_its_own_photos():
    port = 0
    with open_browser() as driver:
        for colour in COLOURS:
            with served(colour, port) as (port, address):
                driver.get(address)
                pixel = WebDriverWait(driver, 20).until(lambda d: d.execute_script(FIRST_PIXEL))
                np.testing.assert_allclose(pixel, COLOURS[colour], atol=20)


@pytest.mark.slow
@pytest.mark.browser
def test_review_from_the_command_line(served_model, tmp_path):
    """Over its own address, as one that SSH forwards has it: another port would do."""
    folder = write_photos(tmp_path / "photos", {"blue": 3, "green": 3, "red": 3})
    (folder / "red" / "3.png").write_bytes(b"no photo")
    command = [sys.executable, "-m", "jaxcls.cli", "review", str(served_model), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            first = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=\S+", first)
            assert address, first or process.stderr.read()
            assert f"ssh -N -L {address[1]}:127.0.0.1:{address[1]}" in process.stdout.readline()
            with open_browser() as driver:
                driver.get(address[0])
                WebDriverWait(driver, 20).until(
                    lambda d: all(
                        d.execute_script(
                            "return [...document.querySelectorAll('.cell img')].map((i) => i.naturalWidth)"
                        )
                    )
                )
                assert len(driver.find_elements(By.CSS_SELECTOR, ".cell img")) == 9
                assert driver.find_element(By.CSS_SELECTOR, ".filters .status").text == "10 of 10 images"
                driver.find_element(By.CSS_SELECTOR, ".grid").send_keys(Keys.ENTER)
                whole = driver.find_element(By.CSS_SELECTOR, ".viewer img")
                WebDriverWait(driver, 20).until(
                    lambda d: d.execute_script("return arguments[0].naturalWidth", whole) == 48
                )
                assert driver.get_log("browser") == []
        finally:
            process.terminate()
