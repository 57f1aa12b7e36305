"""Pages against what a browser's parser makes of them."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from examples import HOSTILE

from jaxcls.ui.page import STATIC, join_modules, make_page

IMAGES = {"img-src": "data:"}


class Elements(HTMLParser):
    """The elements of a page: tag, attributes, text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[list] = []
        self.is_within = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        self.is_within = True

    def handle_endtag(self, tag):
        self.is_within = False

    def handle_data(self, data):
        if self.is_within:
            self.found[-1][2] += data

    def all(self, tag: str) -> list[list]:
        return [element for element in self.found if element[0] == tag]


def test_hostile_data_comes_back_and_adds_no_element():
    data = {"results": {"names": HOSTILE}, "thumbnails": ["<!--", "]]>"]}
    page = make_page(HOSTILE[0], data, sources=IMAGES).decode()
    elements = Elements(page)
    assert json.loads(elements.all("script")[0][2]) == {"names": list(HOSTILE)}
    assert json.loads(elements.all("script")[1][2]) == ["<!--", "]]>"]
    assert len(elements.all("script")) == 3
    assert elements.all("title")[0][2] == HOSTILE[0]


def test_the_policy_allows_the_pages_own_script_and_style_alone():
    elements = Elements(make_page("", {}, sources=IMAGES).decode())
    (policy,) = (a["content"] for _, a, _ in elements.all("meta") if a.get("http-equiv"))
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        text = elements.all(tag)[-1][2]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"


def test_a_title_that_is_not_utf_8_is_written():
    assert "a?b" in make_page("a\udce4b", {}, sources=IMAGES).decode()


def test_joined_modules_import_nothing_and_share_no_name():
    joined = join_modules("page.js")
    assert "import" not in re.findall(r"^\w+", joined, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", joined, re.MULTILINE)
    assert len(names) == len(set(names)) > 40


def test_a_module_comes_after_what_it_imports_once():
    joined = join_modules("page.js")
    assert joined.count("function nameElement(") == 1
    assert (
        joined.index("class Results") < joined.index("class Selection") < joined.index("showResults(document")
    )


def test_only_the_entry_exports():
    assert "\nexport " not in join_modules("page.js")
    assert re.findall(r"^export \w+ \w+", join_modules("matrix.js"), re.MULTILINE) == [
        "export function confusionView"
    ]


def test_no_module_writes_html_and_those_of_results_ask_no_network():
    for path in STATIC.iterdir():
        text = path.read_text("utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "</"):
            assert word not in text, (path.name, word)
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path.name
    assert not re.search(r"fetch\(|XMLHttp|WebSocket|sendBeacon", join_modules("page.js"))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which reads the joined modules")
def test_the_joined_module_is_one():
    check = subprocess.run(
        ["node", "--input-type=module", "--check"],
        input=join_modules("page.js"),
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stderr
