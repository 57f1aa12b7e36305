"""Reports and the page of `jaxcls review` in a real browser."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from browser import find_violations, look, open_browser
from examples import HOSTILE, make_photos, make_predictions, unreadable, write_example
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from sklearn.metrics import f1_score

from jaxcls.evaluation.metrics import evaluate
from jaxcls.evaluation.thresholds import ALWAYS, are_below
from jaxcls.ui.results import describe

pytestmark = pytest.mark.browser

SCREENS = [(1280, 800, False), (1280, 800, True), (390, 844, False), (390, 844, True)]


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def predictions():
    """Of 90 photos, one unreadable, one unlabelled, a few abstained from, one wrongly labelled."""
    predictions = unreadable(make_predictions(make_photos(90)), 8, "cut short")
    labels = predictions.labels.copy()
    labels[20] = -1
    scores = predictions.scores.round(1)  # so that some are equal
    scores[33], labels[33] = [9, -3, -3], 1
    return replace(predictions, scores=scores, labels=labels, abstained=np.isin(np.arange(90), [3, 40]))


@pytest.fixture(scope="module")
def report(tmp_path_factory, predictions):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_example(path, predictions, replace(make_photos(90), labels=predictions.labels))
    return path


@pytest.fixture
def page(driver, report):
    """The report, just opened from disk."""
    look(driver, 1280, 800, dark=False)
    driver.get_log("performance")
    driver.get(report.as_uri())
    yield driver
    assert driver.get_log("browser") == []


def find(driver, selector: str):
    return driver.find_element(By.CSS_SELECTOR, selector)


def find_all(driver, selector: str) -> list:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def press(driver, *keys: str) -> None:
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def field(driver, label: str):
    return driver.find_element(By.XPATH, f"//label[span[text()='{label}']]/*[not(self::span)]")


def shown(driver) -> int:
    """How many images the grid says that it has."""
    return int(find(driver, ".filters .status").text.split(" of ")[0].replace(",", ""))


def opened(driver) -> str:
    """The id of the image in the viewer."""
    return find(driver, "#viewer-title").text


def slide_to(driver, slider, position: int) -> None:
    driver.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, position
    )


def test_a_report_opened_from_disk_asks_for_nothing_else(page, report):
    assert "my model on table ware" in find(page, "h1").text
    entries = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {
        entry["params"]["request"]["url"]
        for entry in entries
        if entry["method"] == "Network.requestWillBeSent" and "request" in entry["params"]
    }
    assert report.as_uri() in urls
    assert {url.partition(":")[0] for url in urls - {report.as_uri()}} <= {"data"}


def test_numbers_are_those_of_the_evaluation(page, predictions):
    rows = [row.text for row in find_all(page, "#numbers table tbody tr")]
    accuracy = evaluate(predictions).accuracy("micro")
    assert any(row.startswith(f"accuracy (micro) {accuracy:.4f} ") for row in rows)
    assert "86 answered, 2 abstained, 1 unlabelled, 1 unreadable" in find(page, "#numbers").text


def test_a_class_counts_the_images_that_its_recall_is_of(page, predictions):
    metrics = evaluate(predictions).per_class()
    for k, row in enumerate(find_all(page, "#numbers [aria-label=Classes] tbody tr")):
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        assert cells[1] == f"{metrics.recall[k]:.3f}"
        assert cells[3] == str(metrics.support[k])


def test_a_cell_of_the_matrix_shows_its_images(page, predictions):
    confusion = evaluate(predictions).confusion_matrix()
    cell = find(page, ".matrix tbody tr:nth-child(1) td:nth-of-type(2) button")
    assert cell.text == str(confusion[0, 1])
    assert cell.accessible_name == f"{confusion[0, 1]} images of cup, taken for fork"
    cell.click()
    assert shown(page) == confusion[0, 1]
    assert cell.get_attribute("aria-pressed") == "true"
    wanted = np.flatnonzero((predictions.labels == 0) & (predictions.predicted == 1))
    assert len(find_all(page, ".cell")) == len(wanted)
    cell.click()
    assert shown(page) == 90


def test_the_matrix_of_many_classes_is_an_image_whose_cells_show_their_images(driver, tmp_path):
    classes = tuple(f"class {number}" for number in range(60))
    photos = make_photos(600, classes)
    scores = np.full((600, 60), -9, np.float32)
    scores[np.arange(600), photos.labels] = 1
    scores[photos.labels == 7, 50] = 2
    predictions = replace(make_predictions(photos), scores=scores)
    write_example(tmp_path / "report.html", predictions, photos)
    look(driver, 1280, 800, dark=False)
    driver.get((tmp_path / "report.html").as_uri())
    matrix = find(driver, ".matrix-image")
    assert len(matrix.find_elements(By.CSS_SELECTOR, ".right")) == 59
    (wrong,) = matrix.find_elements(By.CSS_SELECTOR, ".wrong")
    assert (wrong.get_attribute("x"), wrong.get_attribute("y")) == ("50", "7")
    side = matrix.rect["width"] / 60
    beside = (side * (50.5 + 1 - 30), side * (7.5 + 1 - 30))  # of the middle
    ActionChains(driver).move_to_element_with_offset(matrix, *map(round, beside)).perform()
    assert find(driver, "#confusion figure p").text == "10 images of class 7, taken for class 50."
    ActionChains(driver).click().perform()
    assert shown(driver) == 10
    assert matrix.find_element(By.CSS_SELECTOR, ".ring").get_attribute("x") == "49"
    assert find(driver, ".mistakes button").get_attribute("aria-pressed") == "true"
    ActionChains(driver).move_to_element_with_offset(matrix, *map(round, beside)).click().perform()
    assert shown(driver) == 600
    ActionChains(driver).move_to_element_with_offset(matrix, 0, round(side * 20)).perform()
    assert find(driver, "#confusion figure p").text == "Point at a cell."
    assert driver.get_log("browser") == []


def test_filter_by_answer(page, predictions):
    evaluation = evaluate(predictions)
    right = int(np.trace(evaluation.confusion_matrix()))
    counts = {
        "right": right,
        "wrong": evaluation.num_answered - right,
        "abstained": 2,
        "unlabelled": 1,
        "unreadable": 1,
    }
    for verdict, count in counts.items():
        Select(field(page, "Answer")).select_by_value(verdict)
        assert shown(page) == count


def test_filter_by_prediction(page, predictions):
    Select(field(page, "Prediction")).select_by_visible_text("(no answer)")
    assert shown(page) == 3
    Select(field(page, "Prediction")).select_by_visible_text("fork")
    assert shown(page) == (predictions.predicted == 1).sum()


def test_filter_by_score_and_name_sort_by_loss_and_show_all(page, predictions):
    best = predictions.probabilities()[~predictions.unreadable].max(axis=1)
    field(page, "Probability, from").send_keys("0.6")
    field(page, "Probability, to").send_keys("0.8")
    assert shown(page) == ((best >= 0.6) & (best <= 0.8)).sum()
    find(page, ".filters button").click()
    assert shown(page) == 90
    Select(field(page, "Order")).select_by_value("loss")
    chances, labels = predictions.probabilities(), predictions.labels
    chances = np.where((labels < 0) | predictions.unreadable, 2, chances[np.arange(90), labels])
    find(page, ".cell").click()
    assert opened(page) == predictions.ids[int(chances.argmin())]
    press(page, Keys.ESCAPE)
    press(page, "/", "00007")
    assert shown(page) == 1


def test_the_viewer_steps_and_slides(page, predictions):
    find(page, "body").click()
    press(page, "j", Keys.ARROW_RIGHT, "j", "k", Keys.ENTER)
    assert opened(page) == predictions.ids[1]
    press(page, Keys.ARROW_RIGHT, "j", Keys.ARROW_LEFT)
    assert opened(page) == predictions.ids[2]
    assert find(page, ".viewer-steps .muted").text == "3 / 90"
    slide_to(page, find(page, ".viewer-steps input"), 3)
    assert find(page, ".verdict").text == "abstained"
    bars = [row.text.split("\n")[:2] for row in find_all(page, ".bars li")]
    p = predictions.probabilities()[3]
    assert bars == [[predictions.classes[k], f"{p[k]:.3f}"] for k in np.argsort(-p)]
    press(page, Keys.END)
    assert opened(page) == predictions.ids[89]
    press(page, Keys.ESCAPE)
    assert not find(page, ".viewer").is_displayed()
    # The grid has come along.
    assert find(page, ".cell[aria-selected=true]").get_attribute("id") == "cell-89"


def test_an_unreadable_photo_says_why(page):
    Select(field(page, "Answer")).select_by_value("unreadable")
    find(page, ".cell").click()
    assert "cut short" in find(page, ".viewer-facts").text
    press(page, Keys.ESCAPE)


def test_curves_say_of_which_images_they_are(page):
    assert all("of all 88 labelled images" in text.text for text in find_all(page, "figure p"))
    scope = (
        "of all 88 labelled images, also the 2 on which the classifier abstained; the numbers above are of"
    )
    assert f"{scope} the 86 answered." in find(page, ".explorer").text


@pytest.mark.parametrize("classes", [("cup",), ("cup", "fork")])
@pytest.mark.parametrize("kind", ["logit", "probability", "margin"])
def test_of_one_class_there_is_no_roc_curve(driver, tmp_path, kind, classes):
    photos = replace(make_photos(5, classes), labels=np.zeros(5, np.int32))
    write_example(tmp_path / "report.html", make_predictions(photos, kind=kind), photos)
    driver.get((tmp_path / "report.html").as_uri())
    roc, pr = find_all(driver, ".plot")
    assert roc.get_attribute("aria-label") == "ROC curve, undefined: no images of other classes"
    assert roc.find_element(By.CSS_SELECTOR, ".curve").get_attribute("d") == ""
    assert not roc.find_element(By.CSS_SELECTOR, ".point").is_displayed()
    assert "average precision 1.000, of all 5 labelled images" in pr.get_attribute("aria-label")
    assert "NaN" not in find(driver, "#page").get_attribute("innerHTML")
    assert driver.get_log("browser") == []


def test_a_class_none_of_whose_scores_are_whole_has_no_threshold(driver, tmp_path, monkeypatch):
    """Class 0 is the best of all images, so all of its scores are there; of the others not all at the top."""
    monkeypatch.setattr("jaxcls.ui.report.describe", partial(describe, max_scores=30))
    photos = make_photos(60)
    predictions = replace(make_predictions(photos), scores=np.zeros((60, 3), np.float32))
    write_example(tmp_path / "report.html", predictions, photos)
    driver.get((tmp_path / "report.html").as_uri())
    slider, chooser = (find(driver, f".explorer-controls {tag}") for tag in ("input", "button"))
    assert slider.is_enabled()
    Select(field(driver, "Class")).select_by_value("1")
    assert not slider.is_enabled()
    assert not chooser.is_enabled()
    text = find(driver, ".explorer").text
    assert "No threshold can be chosen: more images share this class's highest score, 0," in text
    Select(field(driver, "Class")).select_by_value("0")
    assert slider.is_enabled()
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("position", [0, 60])
def test_the_slider_moves_the_points_and_the_counts(page, predictions, position):
    """Against the curves of `Evaluation`, of all labelled photos."""
    answered = replace(predictions, abstained=np.zeros(90, np.bool_))
    evaluation = evaluate(answered)
    Select(field(page, "Class")).select_by_value("1")
    slider = find(page, ".explorer input[type=range]")
    slide_to(page, slider, position)
    threshold = np.float32(find(page, ".explorer output").text)
    usable = (predictions.labels >= 0) & ~predictions.unreadable
    passed = usable & (predictions.scores[:, 1] >= threshold)
    own = usable & (predictions.labels == 1)
    expected = {
        "own-passed": (own & passed).sum(),
        "own-not": (own & ~passed).sum(),
        "others-passed": (~own & passed).sum(),
        "others-not": (usable & ~own & ~passed).sum(),
    }
    assert {key: int(find(page, f"[data-count={key}]").text) for key in expected} == expected
    roc, pr = evaluation.roc_curve("fork"), evaluation.pr_curve("fork")
    at = int(np.flatnonzero(roc.thresholds == threshold)[0])
    for figure, area, x, y in (
        (0, roc.area, roc.false_positive_rate[at], roc.true_positive_rate[at]),
        (1, pr.average_precision, pr.recall[at], pr.precision[at]),
    ):
        plot = find_all(page, ".plot")[figure]
        name = plot.get_attribute("aria-label")
        assert f"{area:.3f}" in name
        assert f"{x:.3f}" in name
        assert f"{y:.3f}" in name
        point = plot.find_element(By.CSS_SELECTOR, ".point")
        frame = plot.find_element(By.CSS_SELECTOR, ".frame")
        left, top, side = (float(frame.get_attribute(key)) for key in ("x", "y", "width"))
        assert float(point.get_attribute("cx")) == pytest.approx(left + side * x)
        assert float(point.get_attribute("cy")) == pytest.approx(top + side * (1 - y))


def test_chosen_thresholds_become_a_command(page, predictions):
    thresholds = np.full(3, -np.inf, np.float32)
    for label in (0, 2):
        Select(field(page, "Class")).select_by_value(str(label))
        slide_to(page, find(page, ".explorer input[type=range]"), 70)
        thresholds[label] = np.float32(find(page, ".explorer output").text)
        find(page, ".explorer-controls button").click()
    command = find(page, ".command").text
    assert command.startswith("jaxcls thresholds 'runs/my model' --set=cup=")
    assert [np.float32(part.rpartition("=")[2]) for part in command.split()[-2:]] == [
        thresholds[0],
        thresholds[2],
    ]
    usable = (predictions.labels >= 0) & ~predictions.unreadable
    scores, labels = predictions.scores[usable], predictions.labels[usable]
    kept = ~are_below(scores, thresholds)
    right = (scores.argmax(axis=1) == labels) & kept
    assert f"Answered: {kept.sum()} of 88" in find(page, ".effect").text
    assert f"{right.sum()} of {kept.sum()}" in find(page, ".effect").text
    find_all(page, ".choices ul button")[0].click()
    assert "cup" not in find(page, ".command").text


def test_the_slider_begins_at_a_stored_threshold_else_where_f1_is_best(driver, tmp_path):
    photos = make_photos(60)
    predictions = make_predictions(photos)
    stored = np.asarray([1.5, ALWAYS, ALWAYS], np.float32)
    write_example(tmp_path / "report.html", predictions, photos, thresholds=stored)
    driver.get((tmp_path / "report.html").as_uri())
    scores, labels = predictions.scores, predictions.labels
    assert np.float32(find(driver, ".explorer output").text) == scores[scores[:, 0] >= 1.5, 0].min()
    Select(field(driver, "Class")).select_by_value("2")
    best = max(scores[:, 2], key=lambda threshold: f1_score(labels == 2, scores[:, 2] >= threshold))
    shown_f1 = driver.find_element(By.XPATH, "//dt[text()='F1']/following-sibling::dd[1]").text
    assert shown_f1 == f"{f1_score(labels == 2, scores[:, 2] >= best):.3f}"
    find(driver, ".explorer-controls button").click()
    chosen = stored.copy()
    chosen[2] = np.float32(find(driver, ".explorer output").text)
    assert f"Answered: {(~are_below(scores, chosen)).sum()} of 60" in find(driver, ".effect").text


def test_the_wrong_label_is_shown(page, predictions):
    first = find(page, ".suspect")
    assert first.accessible_name.startswith(predictions.ids[33])
    first.click()
    assert opened(page) == predictions.ids[33]
    press(page, Keys.ESCAPE)


def test_help_lists_the_keys(page):
    find(page, "body").click()
    press(page, "?")
    assert find(page, ".help").is_displayed()
    press(page, Keys.ESCAPE)
    assert not find(page, ".help").is_displayed()


def test_hostile_names_stay_text(driver, tmp_path):
    photos = make_photos(12, HOSTILE)
    write_example(tmp_path / "report.html", make_predictions(photos), photos)
    look(driver, 1280, 800, dark=False)
    driver.get((tmp_path / "report.html").as_uri())
    assert driver.title == "my model on table ware"
    assert [name.get_attribute("textContent") for name in find_all(driver, ".matrix thead bdi")] == list(
        HOSTILE
    )
    assert not find_all(driver, "#page script, #page b")
    find_all(driver, ".explorer-controls button")[0].click()
    assert HOSTILE[0].replace("'", "'\\''") in find(driver, ".command").text
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 1280
    assert driver.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "dark"), SCREENS)
def test_nothing_runs_over_and_axe_finds_nothing_serious(page, width, height, dark):
    look(page, width, height, dark=dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert find_violations(page) == []
    find(page, ".cell").click()
    box = find(page, ".viewer").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert find_violations(page) == []
    press(page, Keys.ESCAPE)


@pytest.mark.slow
def test_ten_thousand_images_stay_usable(driver, tmp_path):
    photos = make_photos(10_000)
    predictions = make_predictions(photos)
    write_example(tmp_path / "report.html", predictions, photos)
    look(driver, 1280, 800, dark=False)
    driver.get((tmp_path / "report.html").as_uri())
    timing = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert timing < 5_000
    assert shown(driver) == 10_000
    assert len(find_all(driver, ".cell")) < 150
    grid = find(driver, ".grid")
    driver.execute_script("arguments[0].focus()", grid)
    press(driver, *[Keys.PAGE_DOWN] * 12, Keys.END)
    assert find(driver, ".cell[aria-selected=true]").get_attribute("aria-posinset") == "10000"
    assert len(find_all(driver, ".cell")) < 150
    milliseconds = driver.execute_script(
        "const start = performance.now(); const field = document.querySelector('.filters select');"
        "field.value = 'wrong'; field.dispatchEvent(new Event('change')); return performance.now() - start"
    )
    assert milliseconds < 500
    assert shown(driver) == int((predictions.predicted != predictions.labels).sum())
