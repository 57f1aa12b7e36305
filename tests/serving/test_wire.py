"""Bodies against other people's encoders, and bodies that nobody should send."""

import base64
import json
import random
import re
import struct
import sys

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from jsonschema import Draft202012Validator

from jaxcls.errors import MissingExtraError, RequestError
from jaxcls.serving import wire
from jaxcls.serving.openapi import make_document
from jaxcls.serving.wire import Answer, Job, Url, parse_infer, parse_predict, parse_score

PHOTOS = [b"\xff\xd8\xff the first photo", b"\x89PNG\r\n\x1a\n the second"]
CLASSES = ("cup", "plate", "Schüssel")
SCORES = np.array([[0.1, 2.5, -3e-7], [1e9, 0, 0.3]], np.float32)
ANSWERS = [
    Answer(SCORES[0], label="plate"),
    Answer(SCORES[1], abstained=True),
]
FAILURE = Answer(None, error='image "x" is cut short')
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def dump(value) -> bytes:
    return json.dumps(value).encode()


def images_of(jobs) -> list:
    return [job.image for job in jobs]


# /score: a list of base64.


def published_body(images, parameters) -> bytes:
    """The body as the published client writes it: the text of a bytes object, quotes and prefix included."""
    payload = []
    for image in images:
        encoded = base64.b64encode(image)
        image_request = {"image_in_base64": "{0}".format(encoded), "parameters": parameters}  # noqa: UP030, UP032
        payload.append(image_request)
    return json.dumps(payload).encode()


def test_score_takes_the_body_of_the_published_client():
    body = published_body(PHOTOS, {})
    assert b"b'/9j" in body
    assert parse_score(body) == [Job(photo) for photo in PHOTOS]


def test_score_takes_plain_base64_and_parameters_missing_or_null():
    body = dump([{"image_in_base64": b64(PHOTOS[0])}, {"image_in_base64": b64(b""), "parameters": None}])
    assert parse_score(body) == [Job(PHOTOS[0]), Job(b"")]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"add_softmax": True}, Job(b"", softmax=True)),
        ({"ADD_SOFTMAX": True}, Job(b"", softmax=True)),
        ({"Softmax": True}, Job(b"", softmax=True)),
        ({"softmax": False}, Job(b"")),
        ({"softmax": False, "ADD_SOFTMAX": True}, Job(b"", softmax=True)),
        ({"image_resize_dims": [640, 480]}, Job(b"", resize=(640, 480))),
        ({"image_resize_dims": None}, Job(b"")),
        ({"threshold": [0.5, {}], "": None, "softmax_temperature": 2}, Job(b"")),
    ],
)
def test_score_knows_its_parameters_and_ignores_others(parameters, expected):
    assert parse_score(published_body([b""], parameters)) == [expected]


def test_score_answers_json_strings():
    answer = json.loads(wire.format_score([*ANSWERS, FAILURE]))
    assert [type(element) for element in answer] == [str] * 3
    first, second, failed = map(json.loads, answer)
    np.testing.assert_array_equal(np.array([first, second], np.float32), SCORES)
    assert failed == {"error": 'image "x" is cut short'}


# /v1/predict: images as they are.


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "IMAGE/PNG; q=1", "image/x", "application/octet-stream"]
)
def test_predict_takes_one_image_as_it_is(content_type):
    assert parse_predict(content_type, PHOTOS[0]) == [Job(PHOTOS[0])]


@pytest.mark.parametrize("softmax", [None, False, True])
def test_predict_takes_json(softmax):
    body = {"images": [b64(PHOTOS[0]), {"base64": b64(PHOTOS[1])}, {"url": "http://x/ü.jpg"}], "more": 1}
    body |= {} if softmax is None else {"softmax": softmax}
    images = [*PHOTOS, Url("http://x/ü.jpg")]
    expected = [Job(image, softmax=bool(softmax)) for image in images]
    assert parse_predict("application/json; charset=utf-8", dump(body)) == expected


def form(files, fields=None) -> tuple[str, bytes]:
    """Content-Type and body as an HTTP client makes them."""
    request = httpx2.Request("POST", "http://x", files=files, data=fields or {})
    return request.headers["content-type"], request.read()


def test_predict_takes_the_files_of_a_form_in_order():
    nasty = b"\r\n--\r\n\r\n--boundary--\r\n\0\xff" * 9
    images = [*PHOTOS, nasty, b"", PHOTOS[0]]
    files = [("file", (f"{i} ü.jpg", image)) for i, image in enumerate(images)]
    assert parse_predict(*form(files)) == [Job(image) for image in images]
    assert parse_predict(*form(files, {"note": "x"})) == [Job(image) for image in images]
    assert parse_predict(*form(files, {"softmax": "true"})) == [Job(image, softmax=True) for image in images]
    assert parse_predict(*form(files, {"softmax": "false"})) == [Job(image) for image in images]


def test_predict_takes_a_form_written_by_hand():
    body = (
        b'--a b\r\ncontent-disposition: form-data; name="f"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\nPNG\r\n--a b--\r\nepilogue"
    )
    assert parse_predict('multipart/form-data; boundary="a b"', body) == [Job(b"PNG")]


def test_forms_need_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_multipart.exceptions", None)
    with pytest.raises(MissingExtraError, match=r"jaxcls\[serve\]"):
        parse_predict(*form({"file": PHOTOS[0]}))


def test_predict_answers_an_object_for_each_image():
    answer = json.loads(wire.format_predict([*ANSWERS, FAILURE], CLASSES, "margin", "tableware", 12.34567))
    shared = {"model": "tableware", "timing_ms": 12.346}
    assert answer == {
        "kind": "margin",
        "predictions": [
            {
                "label": "plate",
                "score": 2.5,
                "scores": dict(zip(CLASSES, SCORES[0].tolist(), strict=True)),
                "abstained": False,
                **shared,
            },
            {
                "label": None,
                "score": 1e9,
                "scores": dict(zip(CLASSES, SCORES[1].tolist(), strict=True)),
                "abstained": True,
                **shared,
            },
            {"error": 'image "x" is cut short', **shared},
        ],
    }


# The Open Inference Protocol.


def infer_body(array, *, binary=True, **options) -> tuple[bytes, int | None]:
    """Body and header length as tritonclient makes them."""
    datatype = "UINT8" if array.dtype == np.uint8 else "BYTES"
    tensor = triton.InferInput("images", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return triton.InferenceServerClient.generate_request_body([tensor], **options)


def read_infer(headers, body):
    """The answer as tritonclient reads it."""
    length = headers.get(wire.BINARY_HEADER)
    assert headers["Content-Type"] == ("application/json" if length is None else "application/octet-stream")
    return triton.InferenceServerClient.parse_response_body(body, header_length=length and int(length))


ENCODED = np.array(PHOTOS, object)
ENCODED_TEXT = np.array([b64(photo) for photo in PHOTOS], object)


@pytest.mark.parametrize("binary", [True, False])
def test_infer_takes_pixels(binary):
    body, length = infer_body(PIXELS, binary=binary)
    assert (length is None) == (not binary)
    images = images_of(parse_infer(body, length).jobs)
    np.testing.assert_array_equal(images, PIXELS)
    assert [image.dtype for image in images] == [np.uint8] * 2


def test_infer_takes_pixels_as_nested_lists():
    body = infer_json(data=PIXELS.tolist())
    np.testing.assert_array_equal(images_of(parse_infer(body, None).jobs), PIXELS)


def test_infer_does_not_copy_pixels():
    body, length = infer_body(PIXELS)
    whole = np.frombuffer(body, np.uint8)
    assert all(np.shares_memory(image, whole) for image in images_of(parse_infer(body, length).jobs))


def test_infer_takes_encoded_images():
    for body, length in (infer_body(ENCODED), infer_body(ENCODED_TEXT, binary=False)):
        assert parse_infer(body, length).jobs == [Job(photo) for photo in PHOTOS]


def test_infer_takes_the_header_as_text_or_number():
    body, length = infer_body(ENCODED)
    assert parse_infer(body, str(length)) == parse_infer(body, length)


def test_infer_softmax_is_a_parameter_of_the_request():
    body, length = infer_body(ENCODED, parameters={"softmax": True}, priority=3, timeout=10)
    assert [job.softmax for job in parse_infer(body, length).jobs] == [True, True]


def outputs_of(binaries):
    return [triton.InferRequestedOutput(name, binary_data=binary) for name, binary in binaries.items()]


@pytest.mark.parametrize(
    "binaries",
    [
        None,
        {"scores": True, "labels": True},
        {"labels": True, "scores": True},
        {"scores": False, "labels": False},
        {"scores": False, "labels": True},
        {"scores": True, "labels": False},
        {"labels": False},
        {"scores": True},
    ],
    ids=str,
)
def test_infer_answers_what_was_asked_for(binaries):
    outputs = binaries and outputs_of(binaries)
    request = parse_infer(*infer_body(ENCODED, outputs=outputs, request_id="ä-7"))
    headers, body = wire.format_infer(request, ANSWERS, "tableware", "3")
    assert (wire.BINARY_HEADER in headers) == (binaries is None or any(binaries.values()))
    result = read_infer(headers, body)
    response = result.get_response()
    names = list(binaries or ("scores", "labels"))
    assert [output["name"] for output in response["outputs"]] == names
    assert (response["id"], response["model_name"], response["model_version"]) == ("ä-7", "tableware", "3")
    if "scores" in names:
        assert result.as_numpy("scores").dtype == np.float32
        np.testing.assert_array_equal(result.as_numpy("scores"), SCORES)
    if "labels" in names:
        labels = [label if isinstance(label, str) else label.decode() for label in result.as_numpy("labels")]
        assert labels == ["plate", ""]


def test_infer_answers_json_unless_asked_otherwise():
    request = parse_infer(infer_json(), None)
    headers, body = wire.format_infer(request, ANSWERS, "m", "1")
    assert headers == {"Content-Type": "application/json"}
    answer = json.loads(body)
    assert "id" not in answer
    assert [output["name"] for output in answer["outputs"]] == ["scores", "labels"]
    assert answer["outputs"][1]["data"] == ["plate", ""]


def test_infer_an_output_says_otherwise_than_the_request():
    binary = {"parameters": {"binary_data_output": True}}
    for parameters, expected in (({}, True), ({"binary_data": False}, False)):
        outputs = {"outputs": [{"name": "scores", "parameters": parameters}]}
        assert parse_infer(infer_json(binary | outputs), None).outputs == {"scores": expected}


def test_infer_labels_may_be_of_any_text():
    answers = [Answer(SCORES[0], label="Schüssel"), Answer(SCORES[0], label="\udcff")]
    request = parse_infer(*infer_body(ENCODED))
    labels = read_infer(*wire.format_infer(request, answers, "m", "1")).as_numpy("labels")
    assert [label.decode() for label in labels] == ["Schüssel", "\\udcff"]


def test_infer_refuses_as_a_whole_what_fails_in_part():
    request = parse_infer(*infer_body(ENCODED))
    with pytest.raises(RequestError, match=r'^image 1: image "x" is cut short$') as caught:
        wire.format_infer(request, [ANSWERS[0], FAILURE], "m", "1")
    assert caught.value.status == 400


def test_metadata_describes_what_is_taken():
    metadata = wire.model_metadata("tableware", "3", CLASSES, 4, "jax")
    (images,) = metadata["inputs"]
    assert [images["shape"][0], images["shape"][-1]] == [-1, 3]
    array = np.zeros([2, *images["shape"][1:]], triton.triton_to_np_dtype(images["datatype"]))
    assert len(parse_infer(*infer_body(array)).jobs) == 2
    assert metadata["outputs"] == [
        {"name": "scores", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "labels", "datatype": "BYTES", "shape": [-1]},
    ]
    assert wire.server_metadata("0.1") == {
        "name": "jaxcls",
        "version": "0.1",
        "extensions": ["binary_tensor_data"],
    }


# Bodies that nobody should send.

DEEP = b"[" * 100_000
MANY = wire.MAX_IMAGES + 1
FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx\r\n'


def infer_json(request=None, **tensor) -> bytes:
    values = {"name": "images", "shape": list(PIXELS.shape), "datatype": "UINT8"}
    if "parameters" not in tensor:
        values["data"] = PIXELS.ravel().tolist()
    return dump({"inputs": [values | tensor], **(request or {})})


def infer_binary(data: bytes, size: object = None, **tensor) -> tuple[bytes, int]:
    header = infer_json(parameters={"binary_data_size": len(data) if size is None else size}, **tensor)
    return header + data, len(header)


def less_than_nothing() -> tuple[bytes, int]:
    """A negative header length that leads to the end of the JSON, and a size that goes with it."""
    header = infer_json(shape=[1, 1, 180, 3], parameters={"binary_data_size": 540}).ljust(300)
    return header + bytes(120), -120


def score_json(**item) -> bytes:
    return dump([{"image_in_base64": "", **item}])


JSON_BODIES = {
    "empty": (b"", 400),
    "not json": (b"{", 400),
    "not utf-8": (b'"\xff"', 400),
    "utf-16": ("[]".encode("utf-16"), 400),
    "lone surrogate in utf-8": (b'"\xed\xa0\x80"', 400),
    "byte order mark": (b"\xef\xbb\xbf[]", 400),
    "deep lists": (DEEP, 400),
    "deep objects": (b'{"a":' * 100_000, 400),
    "deep and closed": (DEEP + b"]" * 100_000, 400),
    "an integer of 10,000 digits": (b"1" * 10_000, 400),
    "trailing garbage": (b"[]]", 400),
    "NaN": (b"NaN", 400),
    "number": (b"1e999", 400),
    "null": (b"null", 400),
    "zero byte": (b"\0", 400),
    "many empty lists": (b"[" + b"[]," * wire.MAX_JSON_VALUES + b"[]]", 413),
}

HOSTILE = {
    **{f"score: {name}": (parse_score, (body,), status) for name, (body, status) in JSON_BODIES.items()},
    **{
        f"predict: {name}": (parse_predict, ("application/json", body), status)
        for name, (body, status) in JSON_BODIES.items()
    },
    **{f"infer: {name}": (parse_infer, (body, None), status) for name, (body, status) in JSON_BODIES.items()},
    **{
        f"score: {name}": (parse_score, (body,), status)
        for name, body, status in [
            ("no images", b"[]", 400),
            ("an object", b"{}", 400),
            ("10,000 images", dump([{"image_in_base64": ""}] * 10_000), 413),
            ("one image too many", dump([{"image_in_base64": ""}] * MANY), 413),
            ("an item that is a list", b"[[]]", 400),
            ("no image", b"[{}]", 400),
            ("image null", score_json(image_in_base64=None), 400),
            ("image number", score_json(image_in_base64=5), 400),
            ("wrong padding", score_json(image_in_base64="abc"), 400),
            ("wrong alphabet", score_json(image_in_base64="ab-_"), 400),
            ("line breaks", score_json(image_in_base64="YWJj\nYWJj"), 400),
            ("not ascii", score_json(image_in_base64="äöüß"), 400),
            ("surrogate", score_json(image_in_base64="\ud800"), 400),
            ("half a bytes object", score_json(image_in_base64="b'YWJj"), 400),
            ("one quote", score_json(image_in_base64="b'"), 400),
            ("twice the same name", b'[{"image_in_base64": "", "image_in_base64": ""}]', 400),
            ("NaN in a parameter", b'[{"image_in_base64": "", "parameters": {"x": NaN}}]', 400),
            ("infinity", b'[{"image_in_base64": "", "parameters": {"x": -Infinity}}]', 400),
            ("parameters a list", score_json(parameters=[]), 400),
            ("parameters a text", score_json(parameters="{}"), 400),
            ("softmax a number", score_json(parameters={"softmax": 1}), 400),
            ("softmax a text", score_json(parameters={"ADD_SOFTMAX": "True"}), 400),
            ("second softmax wrong", score_json(parameters={"softmax": True, "SOFTMAX": 0}), 400),
            *[
                (f"resize to {dims}", score_json(parameters={"image_resize_dims": dims}), 400)
                for dims in ([0, 1], [-1, 5], [1], [1, 2, 3], [True, True], [1.0, 2.0], ["1", "2"], {}, 224)
            ],
            ("huge resize", score_json(parameters={"image_resize_dims": [10**9, 10**9]}), 400),
            ("resize by 1e999", score_json(parameters={"image_resize_dims": [1e999, 1]}), 400),
        ]
    },
    **{
        f"predict: {name}": (parse_predict, ("application/json", body), status)
        for name, body, status in [
            ("a list", b"[]", 400),
            ("nothing", b"{}", 400),
            ("no images", b'{"images": []}', 400),
            ("images a text", b'{"images": "YWJj"}', 400),
            ("10,000 images", dump({"images": [""] * 10_000}), 413),
            ("bad base64", dump({"images": ["YWJj", "*"]}), 400),
            ("bad base64 in an object", dump({"images": [{"base64": "a"}]}), 400),
            ("base64 null", dump({"images": [{"base64": None}]}), 400),
            ("url a number", dump({"images": [{"url": 1}]}), 400),
            ("neither", dump({"images": [{}]}), 400),
            ("both", dump({"images": [{"base64": "", "url": ""}]}), 400),
            ("image null", dump({"images": [None]}), 400),
            ("softmax null", dump({"images": [""], "softmax": None}), 400),
            ("twice the same name", b'{"images": [""], "images": [""]}', 400),
        ]
    },
    **{
        f"predict: type {content_type!r}": (parse_predict, (content_type, b"x"), 415)
        for content_type in ("", "text/plain", "json", "imagejpeg", "multipart/mixed; boundary=b", "\udcff")
    },
    **{
        f"form: {name}": (parse_predict, (content_type, body), status)
        for name, content_type, body, status in [
            ("empty", FORM, b"", 400),
            ("no boundary", "multipart/form-data", PART + b"--b--\r\n", 400),
            ("empty boundary", "multipart/form-data; boundary=", b"--\r\n\r\nx\r\n----\r\n", 400),
            ("another boundary", "multipart/form-data; boundary=c", PART + b"--b--\r\n", 400),
            ("long boundary", "multipart/form-data; boundary=" + "b" * 10_000, PART, 400),
            ("boundary of odd letters", "multipart/form-data; boundary=\u20ac", PART, 400),
            ("not closed", FORM, PART, 400),
            ("cut short", FORM, PART[:-3], 400),
            ("without parts", FORM, b"--b--\r\n", 400),
            ("only a field", FORM, PART.replace(b"filename", b"x") + b"--b--\r\n", 400),
            ("no headers", FORM, b"--b\r\n\r\nx\r\n--b--\r\n", 400),
            ("bad header", FORM, b"--b\r\nContent Disposition\r\n\r\nx\r\n--b--\r\n", 400),
            ("long header", FORM, b"--b\r\nA: " + b"x" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n", 400),
            ("many headers", FORM, b"--b\r\n" + b"A: x\r\n" * 100 + b"\r\nx\r\n--b--\r\n", 400),
            ("one file too many", FORM, PART * MANY + b"--b--\r\n", 413),
            ("10,000 parts", FORM, b"--b\r\n\r\n\r\n" * 10_000 + b"--b--\r\n", 413),
            ("softmax a number", FORM, PART + PART.replace(b'"f"; filename', b"softmax; x") + b"--b--", 400),
        ]
    },
    **{
        f"infer: {name}": (parse_infer, arguments, status)
        for name, arguments, status in [
            ("a list", (b"[]", None), 400),
            ("nothing", (b"{}", None), 400),
            ("no inputs", (dump({"inputs": []}), None), 400),
            ("two inputs", (dump({"inputs": [{}, {}]}), None), 400),
            ("input a text", (dump({"inputs": ["images"]}), None), 400),
            ("parameters null", (infer_json({"parameters": None}), None), 400),
            ("softmax a text", (infer_json({"parameters": {"softmax": "true"}}), None), 400),
            ("binary_data_output 1", (infer_json({"parameters": {"binary_data_output": 1}}), None), 400),
            ("id a number", (infer_json({"id": 5}), None), 400),
            ("outputs null", (infer_json({"outputs": None}), None), 400),
            ("output a text", (infer_json({"outputs": ["scores"]}), None), 400),
            ("unknown output", (infer_json({"outputs": [{"name": "features"}]}), None), 400),
            ("output's name a list", (infer_json({"outputs": [{"name": []}]}), None), 400),
            *[
                (
                    f"output's {name}",
                    (infer_json({"outputs": [{"name": "scores", "parameters": {name: value}}]}), None),
                    400,
                )
                for name, value in (("binary_data", 1), ("classification", 3), ("shared_memory_region", "x"))
            ],
            ("another name", (infer_json(name="image"), None), 400),
            ("another datatype", (infer_json(datatype="FP32"), None), 400),
            ("datatype a list", (infer_json(datatype=[]), None), 400),
            ("datatype null", (infer_json(datatype=None), None), 400),
            *[
                (f"shape {shape}", (infer_json(shape=shape), None), 400)
                for shape in (
                    [], [120], [2, 5, 4, 1], [2, 5, 12], [2, 5, 4, 4], [1, 5, 4, 3], [-2, 5, -4, 3],
                    [0, 5, 4, 3], [2, 0, 4, 3], [2.0, 5, 4, 3], ["2", 5, 4, 3], [True, 5, 4, 3], "2543",
                    None, 10, {}, [[2], 5, 4, 3], [None] * 4, [2, 5, 4, 3, 1], [10**4000, 5, 4, 3],
                    [2, 2**31, 4, 3], [2, 2**31 - 1, 2**31 - 1, 3], [2, 10**4000, 10**4000, 10**4000],
                )
            ],
            ("shape of 1e999", (infer_json().replace(b"[2, 5, 4, 3]", b"[1e999, 5, 4, 3]"), None), 400),
            ("shape of NaN", (infer_json().replace(b"[2, 5, 4, 3]", b"[NaN, 5, 4, 3]"), None), 400),
            ("no pixels", (infer_json(shape=[2, 0, 4, 3], data=[]), None), 400),
            ("10,000 images", (infer_json(shape=[10_000, 1, 1, 3], data=[0] * 30_000), None), 413),
            ("more images than there are", (infer_json(shape=[MANY, 9, 9, 3], data=[]), None), 413),
            *[
                (f"data {name}", (infer_json(data=data), None), 400)
                for name, data in {
                    "missing": None,
                    "a number": 120,
                    "a text": "x" * 120,
                    "an object": {str(i): i for i in range(120)},
                    "too few": [0] * 119,
                    "too many": [0] * 121,
                    "empty": [],
                    "floats": [0.0] * 120,
                    "texts": ["1"] * 120,
                    "nulls": [None] * 120,
                    "beyond 255": [256] * 120,
                    "below 0": [-1] * 120,
                    "large": [10**4000] * 120,
                    "one list": [[0] * 120],
                    "ragged": [[0] * 61, [0] * 59],
                    "half nested": [[0] * 60, *[0] * 60],
                    "objects in it": [{str(i): i for i in range(5)}] * 2,
                    "another nesting": PIXELS.transpose(0, 2, 1, 3).tolist(),
                    "deeper": PIXELS[..., None].tolist(),
                    "one long text": ["x" * 10**6] + [0] * 119,
                }.items()
            ],
            ("encoded: fewer", (infer_json(datatype="BYTES", shape=[2], data=[""]), None), 400),
            ("encoded: more", (infer_json(datatype="BYTES", shape=[1], data=["", ""]), None), 400),
            ("encoded: none", (infer_json(datatype="BYTES", shape=[0], data=[]), None), 400),
            ("encoded: numbers", (infer_json(datatype="BYTES", shape=[1], data=[1]), None), 400),
            ("encoded: not base64", (infer_json(datatype="BYTES", shape=[1], data=["*"]), None), 400),
            *[
                (f"header length {length!r}", (infer_binary(PIXELS.tobytes())[0], length), 400)
                for length in (None, 0, -1, 1, 10**9, 10**4000, "", "x", "-5", "1e2", "9" * 10_000, "\udcff")
            ],
            ("sizes that agree on less than nothing", less_than_nothing(), 400),
            ("header length off by one", (lambda b, n: (b, n + 1))(*infer_binary(PIXELS.tobytes())), 400),
            *[
                (f"binary_data_size {size!r}", infer_binary(PIXELS.tobytes(), size), 400)
                for size in (0, 1, 119, 121, -120, 2**63, 120.0, "120", None or [], True, {})
            ],
            ("binary data of an input in JSON", (infer_json() + b"x", len(infer_json())), 400),
            ("too few pixels", infer_binary(PIXELS.tobytes()[:-1]), 400),
            ("too many pixels", infer_binary(PIXELS.tobytes() + b"x"), 400),
            ("no binary data", infer_binary(b""), 400),
            *[
                (f"lengths {data!r}", infer_binary(data, datatype="BYTES", shape=[2]), 400)
                for data in (
                    b"\0\0\0",
                    struct.pack("<I", 0),
                    struct.pack("<I", 0) + b"\0",
                    struct.pack("<II", 0, 1),
                    struct.pack("<II", 0, 2**32 - 1) + b"x",
                    struct.pack("<II", 2**32 - 1, 0),
                    struct.pack("<II", 4, 0),
                    struct.pack("<III", 0, 0, 0),
                )
            ],
            ("huge number of lengths", infer_binary(bytes(8), datatype="BYTES", shape=[2**31 - 1]), 413),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize(("parse", "arguments", "status"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_bodies_are_refused(parse, arguments, status):
    with pytest.raises(RequestError) as caught:
        parse(*arguments)
    assert caught.value.status == status
    message = str(caught.value)
    assert 5 < len(message) < 500
    message.encode()


GOOD = {
    "score": (published_body(PHOTOS, {"softmax": True, "image_resize_dims": [9, 9]}), parse_score),
    "json": (
        dump({"images": [b64(PHOTOS[0]), {"url": "http://x"}], "softmax": True}),
        lambda body: parse_predict("application/json", body),
    ),
    "form": (PART + PART + b"--b--\r\n", lambda body: parse_predict(FORM, body)),
    "infer": (infer_json({"id": "1", "outputs": [{"name": "scores"}]}), lambda body: parse_infer(body, None)),
    "pixels": (infer_body(PIXELS)[0], lambda body: parse_infer(body, infer_body(PIXELS)[1])),
    "encoded": (infer_body(ENCODED)[0], lambda body: parse_infer(body, infer_body(ENCODED)[1])),
}


def mutate(body: bytes, generator: random.Random) -> bytes:
    """One to four small accidents."""
    for _ in range(generator.randint(1, 4)):
        at, length = generator.randrange(len(body) + 1), generator.choice((0, 1, 2, 8, 40))
        new = generator.choice(
            (b"", generator.randbytes(generator.randint(1, 9)), body[at : at + 9], b'"', b"[", b"}", b"null",
             b"-1", b"1e999", b"NaN", b"\r\n--b", b"99999999999999999999", b"true", b"{}", b"\\ud800")
        )  # fmt: skip
        body = body[:at] + new + body[at + length :]
    return body


@pytest.mark.parametrize("name", GOOD)
def test_nothing_else_is_raised_for_damaged_bodies(name):
    body, parse = GOOD[name]
    parse(body)
    generator = random.Random(name)
    num_refused = 0
    for _ in range(1500):
        try:
            parse(mutate(body, generator))
        except RequestError as error:
            num_refused += 1
            str(error).encode()
    assert num_refused > 0


@pytest.mark.parametrize("name", GOOD)
def test_nothing_else_is_raised_for_noise(name):
    generator = random.Random(name)
    for _ in range(300):
        with pytest.raises(RequestError):
            GOOD[name][1](generator.randbytes(generator.randint(0, 200)))


# The document says the same as the code.

DOCUMENT = make_document("table ware", CLASSES, 32)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **DOCUMENT})


def test_document_is_made_of_schemas_that_resolve():
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert references == set(schemas)
    assert "/v2/models/table%20ware/infer" in DOCUMENT["paths"]


def test_document_states_where_a_key_is_needed():
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            is_open = path in ("/v2/health/live", "/v2/health/ready")
            assert ("401" in operation["responses"]) == ("security" in operation) == (not is_open)
    assert "401" not in json.dumps(make_document("m", CLASSES, 32, secured=False)["paths"])


def statuses(path: str) -> set[int]:
    (operation,) = DOCUMENT["paths"][path].values()
    return {int(status) for status in operation["responses"]}


def test_document_states_all_refusals():
    paths = {
        parse_score: "/score",
        parse_predict: "/v1/predict",
        parse_infer: "/v2/models/table%20ware/infer",
    }
    for parse, path in paths.items():
        raised = {status for used, _, status in HOSTILE.values() if used is parse}
        assert statuses(path) == raised | {200, 401, 429, 503}


def test_answers_are_as_the_document_says():
    for answer in json.loads(wire.format_score([*ANSWERS, FAILURE])):
        schema = DOCUMENT["components"]["schemas"]["ScoreAnswer"]["items"]["contentSchema"]
        Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(json.loads(answer))
    validator("ScoreAnswer").validate(json.loads(wire.format_score([*ANSWERS, FAILURE])))
    validator("PredictAnswer").validate(
        json.loads(wire.format_predict([*ANSWERS, FAILURE], CLASSES, "logit", "m", 1))
    )
    for request in (infer_json(), infer_json({"outputs": [{"name": "labels"}], "id": "7"})):
        answer = wire.format_infer(parse_infer(request, None), ANSWERS, "m", "1")[1]
        validator("InferAnswer").validate(json.loads(answer))
    validator("ServerMetadata").validate(wire.server_metadata("0.1"))
    validator("ModelMetadata").validate(wire.model_metadata("m", "1", CLASSES, 32, "jax"))


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


REPLACEMENTS = (
    None, True, False, 0, 1, -1, 3, 256, 2**31, 0.5, "", "a", "YQ==", "YWJj", "b'YQ=='", "scores", "UINT8",
    [], {}, [1], [1, 1], [""], [{}], {"url": ""}, {"base64": "", "url": ""}, {"base64": "YQ=="},
    {"softmax": True}, {"binary_data": True}, {"classification": 1}, {"image_in_base64": ""},
    {"name": "labels"}, 4096, 4097,
)  # fmt: skip


def alter(value, generator: random.Random):
    """A JSON value with one of its parts replaced, taken away or doubled."""
    value = json.loads(json.dumps(value))
    *path, last = generator.choice([place for place in places(value) if place])
    parent = value
    for key in path:
        parent = parent[key]
    match generator.choice(("replace", "replace", "remove", "double")):
        case "replace":
            parent[last] = generator.choice(REPLACEMENTS)
        case "remove":
            del parent[last]
        case "double" if isinstance(parent, list):
            parent.insert(last, parent[last])
        case "double":
            parent[last.upper()] = parent[last]
    return value


SCORE = {"image_in_base64": "b'YQ=='", "parameters": {"softmax": True, "image_resize_dims": [9, 8]}}
IMAGES = {"images": ["YQ==", {"base64": ""}, {"url": "x"}], "softmax": True}
PIXEL = {
    "name": "images",
    "shape": [1, 1, 1, 3],
    "datatype": "UINT8",
    "data": [[[[1, 2, 3]]]],
    "parameters": {},
}
BYTES = {"name": "images", "shape": [2], "datatype": "BYTES", "data": ["YQ==", ""]}
OUTPUT = {"name": "scores", "parameters": {"binary_data": False}}
INFER = {"id": "1", "parameters": {"softmax": True}, "outputs": [OUTPUT]}


@pytest.mark.parametrize(
    ("schema", "parse", "value", "is_exact"),
    [
        ("ScoreRequest", parse_score, [SCORE, SCORE], True),
        ("PredictRequest", lambda body: parse_predict("application/json", body), IMAGES, True),
        ("InferRequest", lambda body: parse_infer(body, None), {**INFER, "inputs": [PIXEL]}, False),
        ("InferRequest", lambda body: parse_infer(body, None), {**INFER, "inputs": [BYTES]}, False),
    ],
)
def test_the_document_and_the_parser_agree(schema, parse, value, is_exact):
    """What is taken is described; and the reverse, but for shapes, which schemas cannot compare with data."""
    judge, generator = validator(schema), random.Random(0)
    outcomes = set()
    for _ in range(1000):
        altered = alter(value, generator)
        if generator.random() < 0.3 and len(altered):
            altered = alter(altered, generator)
        try:
            parse(dump(altered))
            is_taken = True
        except RequestError:
            is_taken = False
        is_described = judge.is_valid(altered)
        outcomes.add((is_taken, is_described))
        assert is_described or not is_taken, altered
        assert is_taken or not is_described or not is_exact, altered
    assert outcomes >= {(True, True), (False, False)}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("infer: output")])
def test_the_document_refuses_what_outputs_must_not_ask_for(name):
    assert not validator("InferRequest").is_valid(json.loads(HOSTILE[name][1][0]))
