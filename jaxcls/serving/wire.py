"""Bodies of requests and answers, in the three protocols that the service speaks.

`parse_*` takes a body apart into jobs, one for each image, in order; `format_*` makes a body of the
answers to them.

| protocol | endpoint | several images | an image that cannot be scored |
| --- | --- | --- | --- |
| list of base64 | `POST /score` | yes | the JSON string of `{"error": ...}` in its place |
| images as they are | `POST /v1/predict` | multipart or JSON | an object with `error` in its place |
| Open Inference Protocol | `POST /v2/models/NAME/infer` | yes | refuses the request |

Nothing that a request says of itself is believed: lengths, shapes and types are checked against what is
there. A body that is not of the protocol's form raises RequestError and nothing else; whether bytes are an
image shows later. Pixels are views of the body.
"""

import json
import math
import struct
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from reprlib import repr as brief
from typing import Any, NoReturn, TypeVar

import numpy as np

from jaxcls.errors import MissingExtraError, RequestError
from jaxcls.predictions import Kind

MAX_IMAGES = 1024
"""Images in one request."""

MAX_JSON_VALUES = 2**22
"""Commas and opening brackets in one JSON text. Three bytes of it can become 72 bytes of memory."""

MAX_SIDE = 2**31 - 1
"""Longest side, in pixels, that a tensor's shape may state."""

MAX_RESIZE_SIDE = 4096
"""Longest side, in pixels, that a client may have an image resized to."""

SOFTMAX_NAMES = ("add_softmax", "softmax")
"""The parameters of `/score` that ask for probabilities, in lower case; clients write them in either."""

BINARY_HEADER = "Inference-Header-Content-Length"
"""The HTTP header that says how many bytes of a body are JSON; binary tensors follow them."""

OUTPUTS = {"scores": "FP32", "labels": "BYTES"}
"""The outputs of the Open Inference Protocol and their datatypes."""

UNSUPPORTED = frozenset({"classification", "shared_memory_region"})
"""Parameters of a requested output that are refused: who sends them would misread an answer without."""


@dataclass(frozen=True)
class Url:
    """An image to be fetched, from an address that nobody has checked."""

    address: str


@dataclass(frozen=True)
class Job:
    """One image of a request.

    Attributes:
        image: encoded; or pixels, uint8 [H, W, 3], read-only; or to be fetched.
        softmax: answer with probabilities instead of the scores as they are.
        resize: (width, height) in pixels to resize the image to before it is preprocessed.
    """

    image: bytes | np.ndarray | Url
    softmax: bool = False
    resize: tuple[int, int] | None = None


@dataclass(frozen=True)
class Answer:
    """What became of one job: exactly one of `scores` and `error` is set.

    Attributes:
        scores: finite float32 [K], after the softmax if it was asked for.
        error: why the image could not be scored.
        label: the best class; None where the classifier abstained.
        abstained: whether it did.
        status: of HTTP, for an error: 400, the image is at fault; 500, the service is.
    """

    scores: np.ndarray | None
    error: str | None = None
    label: str | None = None
    abstained: bool = False
    status: int = 400


# JSON.

_T = TypeVar("_T")
_KINDS = {bool: "true or false", int: "an integer", str: "a string", list: "a list", dict: "an object"}


def _expect(value: Any, kind: type[_T], what: str) -> _T:
    """The value, which must be of exactly this type: a boolean is no integer."""
    if type(value) is not kind:
        raise RequestError(400, f"{what} must be {_KINDS[kind]}, not {brief(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has two values of one name")
    return value


def _not_finite(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_not_finite)


def _parse_json(body: bytes) -> Any:
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise RequestError(413, f"more than {MAX_JSON_VALUES:,} values in JSON: send images as bytes")
    try:
        return _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"not JSON: {error}") from error


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _decode_base64(text: str, what: str) -> bytes:
    try:
        return a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise RequestError(400, f"{what} is not base64: {error}") from error


def _check_count(num_images: int) -> None:
    if not num_images:
        raise RequestError(400, "no images")
    if num_images > MAX_IMAGES:
        raise RequestError(413, f"{num_images:,} images; at most {MAX_IMAGES:,} are taken in one request")


# A list of base64.


def parse_score(body: bytes) -> list[Job]:
    """A JSON list of `{"image_in_base64": text, "parameters": {...} or null}`.

    The text may also be what Python makes of bytes, `b'...'`. Of the parameters, "add_softmax" or "softmax"
    in any case and "image_resize_dims" are known; others are ignored.
    """
    items = _expect(_parse_json(body), list, "the body")
    _check_count(len(items))
    return [_score_job(item, f"image {index}") for index, item in enumerate(items)]


def _score_job(item: Any, where: str) -> Job:
    item = _expect(item, dict, where)
    text = _expect(item.get("image_in_base64"), str, f"{where}: image_in_base64")
    if len(text) > 2 and text.startswith("b'") and text.endswith("'"):
        text = text[2:-1]
    parameters = item.get("parameters")
    parameters = {} if parameters is None else _expect(parameters, dict, f"{where}: parameters")
    softmax = [
        _expect(value, bool, f"{where}: {name}")
        for name, value in parameters.items()
        if name.lower() in SOFTMAX_NAMES
    ]
    image = _decode_base64(text, f"{where}: image_in_base64")
    return Job(image, any(softmax), _resize_dims(parameters.get("image_resize_dims"), where))


def _resize_dims(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = _expect(value, list, f"{where}: image_resize_dims")
    if len(sides) != 2 or not all(type(n) is int and 1 <= n <= MAX_RESIZE_SIDE for n in sides):
        raise RequestError(
            400,
            f"{where}: image_resize_dims {brief(sides)}: "
            f"[width, height] with integers from 1 to {MAX_RESIZE_SIDE} is taken",
        )
    return sides[0], sides[1]


def format_score(answers: Sequence[Answer]) -> bytes:
    """A JSON list of JSON *strings*, each of which parses to one image's scores, or to `{"error": ...}`."""
    values = ({"error": a.error} if a.scores is None else a.scores.tolist() for a in answers)
    return _to_json([_to_json(value).decode() for value in values])


# Images as they are.


def parse_predict(content_type: str, body: bytes) -> list[Job]:
    """One or several images, as the Content-Type header says.

    | Content-Type | body |
    | --- | --- |
    | `image/*`, `application/octet-stream` | one encoded image |
    | `multipart/form-data` | each file is an image; the field `softmax` may be `true` or `false` |
    | `application/json` | `{"images": [BASE64, {"base64": BASE64}, {"url": URL}, ...], "softmax": false}` |
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return [Job(body)]
    if media_type == "application/json":
        return _predict_json(body)
    if media_type == "multipart/form-data":
        return _predict_form(content_type, body)
    raise RequestError(
        415,
        f"Content-Type {brief(content_type)}: send image/*, application/octet-stream, "
        "multipart/form-data or application/json",
    )


def _predict_json(body: bytes) -> list[Job]:
    request = _expect(_parse_json(body), dict, "the body")
    images = _expect(request.get("images"), list, "images")
    softmax = _expect(request.get("softmax", False), bool, "softmax")
    resize = _resize_dims(request.get("image_resize_dims"), "the body")
    _check_count(len(images))
    return [
        Job(_predict_image(image, f"image {index}"), softmax, resize) for index, image in enumerate(images)
    ]


def _predict_image(image: Any, where: str) -> bytes | Url:
    if type(image) is str:
        return _decode_base64(image, where)
    image = _expect(image, dict, where)
    if ("base64" in image) == ("url" in image):
        raise RequestError(400, f"{where}: give either base64 or url")
    if "url" in image:
        return Url(_expect(image["url"], str, f"{where}: url"))
    return _decode_base64(_expect(image["base64"], str, f"{where}: base64"), f"{where}: base64")


def _predict_form(content_type: str, body: bytes) -> list[Job]:
    files, softmax = [], False
    for disposition, content in _form_parts(content_type, body):
        if b"filename" in disposition:
            files.append(content)
        elif disposition.get(b"name") == b"softmax":
            if content not in (b"true", b"false"):
                raise RequestError(400, f"softmax must be true or false, not {brief(content[:20])}")
            softmax = content == b"true"
    _check_count(len(files))
    return [Job(content, softmax) for content in files]


def _form_parts(content_type: str, body: bytes) -> list[tuple[dict[bytes, bytes], bytes]]:
    """Of each part of a form the options of its Content-Disposition, and its content."""
    try:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
    except ImportError as error:
        install = "pip install 'jaxcls[serve]'"
        raise MissingExtraError("python-multipart", "reading a form", install) from error

    parts: list[dict[str, bytes]] = []

    def begin_part() -> None:
        if len(parts) == 2 * MAX_IMAGES:  # room for as many fields as files
            raise RequestError(413, f"more than {2 * MAX_IMAGES:,} parts in a form")
        parts.append({"name": b"", "value": b"", "disposition": b"", "content": b""})

    def append_to(key: str) -> Callable[[bytes, int, int], None]:
        def append(data: bytes, start: int, end: int) -> None:
            parts[-1][key] += data[start:end]

        return append

    def end_header() -> None:
        part = parts[-1]
        if part["name"].lower() == b"content-disposition":
            part["disposition"] = part["value"]
        part["name"] = part["value"] = b""

    try:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin_part,
                "on_header_field": append_to("name"),
                "on_header_value": append_to("value"),
                "on_header_end": end_header,
                "on_part_data": append_to("content"),
            },
        )
        parser.write(body)
    except (FormParserError, UnicodeEncodeError) as error:
        raise RequestError(400, f"not multipart/form-data: {error}") from error
    if not boundary or parser.state != MultipartState.END:
        raise RequestError(400, "multipart/form-data without its closing boundary")
    return [(parse_options_header(part["disposition"])[1], part["content"]) for part in parts]


def format_predict(
    answers: Sequence[Answer], classes: Sequence[str], kind: Kind, model: str, timing_ms: float
) -> bytes:
    """`{"kind": ..., "predictions": [...]}`: what the scores are, and one object for each image.

    The object holds `label` (null where abstained), `score` (the best one), `scores` (of each class) and
    `abstained`; or `error`. All hold `model` and `timing_ms`, from the request's admission to its answer.
    """
    shared = {"model": model, "timing_ms": round(timing_ms, 3)}
    predictions = [{**_prediction(answer, classes), **shared} for answer in answers]
    return _to_json({"kind": kind, "predictions": predictions})


def _prediction(answer: Answer, classes: Sequence[str]) -> dict[str, Any]:
    if answer.scores is None:
        return {"error": answer.error}
    scores = answer.scores.tolist()
    return {
        "label": answer.label,
        "score": max(scores),
        "scores": dict(zip(classes, scores, strict=True)),
        "abstained": answer.abstained,
    }


# The Open Inference Protocol, version 2, with its extension for binary tensors.


@dataclass(frozen=True)
class InferRequest:
    """A request of the Open Inference Protocol.

    Attributes:
        jobs: its images.
        id: what the answer must repeat; "" for nothing.
        outputs: names of the tensors asked for -> whether as binary data.
    """

    jobs: list[Job]
    id: str
    outputs: Mapping[str, bool]


def parse_infer(body: bytes, header_length: int | str | None) -> InferRequest:
    """One input, named "images": UINT8 [N, H, W, 3] or, encoded, BYTES [N]; in JSON or as binary data.

    Encoded images in JSON are base64. The request's parameters may hold `softmax` and `binary_data_output`.

    Args:
        body: JSON, and binary data after it.
        header_length: the bytes of JSON, as the header `BINARY_HEADER` states them; None without it.
    """
    length = len(body) if header_length is None else _header_length(header_length, len(body))
    request = _expect(_parse_json(body[:length]), dict, "the request")
    parameters = _expect(request.get("parameters", {}), dict, "parameters")
    softmax = _expect(parameters.get("softmax", False), bool, "softmax")
    is_binary = _expect(parameters.get("binary_data_output", False), bool, "binary_data_output")
    return InferRequest(
        jobs=[Job(image, softmax) for image in _read_images(request, body, length)],
        id=_expect(request.get("id", ""), str, "id"),
        outputs=_read_outputs(request, is_binary),
    )


def _header_length(value: int | str, num_bytes: int) -> int:
    try:
        length = int(value)
    except ValueError:
        length = 0
    if not 0 < length <= num_bytes:
        raise RequestError(
            400, f"{BINARY_HEADER}: {brief(value)} is no number of bytes in a body of {num_bytes:,}"
        )
    return length


def _read_images(request: dict[str, Any], body: bytes, start: int) -> Iterable[bytes | np.ndarray]:
    """The images of the only input, whose binary data, if it has any, begin at `start`."""
    inputs = _expect(request.get("inputs"), list, "inputs")
    if len(inputs) != 1:
        raise RequestError(400, f'{len(inputs)} inputs; exactly one, named "images", is taken')
    tensor = _expect(inputs[0], dict, "the input")
    name, datatype = (_expect(tensor.get(key), str, f"the input's {key}") for key in ("name", "datatype"))
    shape = _expect(tensor.get("shape"), list, "the input's shape")
    if not all(type(n) is int and 0 <= n <= MAX_SIDE for n in shape):
        raise RequestError(400, f"shape {brief(shape)}: integers from 0 to {MAX_SIDE:,} are taken")
    if name != "images" or (datatype, len(shape)) not in _READERS:
        raise RequestError(
            400,
            f"input {brief(name)}, {brief(datatype)} {brief(shape)}: "
            "images UINT8 [N, H, W, 3] or, encoded, images BYTES [N] are taken",
        )
    _check_count(shape[0])
    parameters = _expect(tensor.get("parameters", {}), dict, "the input's parameters")
    stated = _expect(parameters.get("binary_data_size", 0), int, "binary_data_size")
    if stated != len(body) - start:
        raise RequestError(
            400, f"binary_data_size is {brief(stated)}, but {len(body) - start:,} bytes follow the JSON"
        )
    from_binary, from_json = _READERS[datatype, len(shape)]
    if stated:
        return from_binary(body, start, shape)
    return from_json(_expect(tensor.get("data"), list, "the input's data"), shape)


def _pixels_from_binary(data: bytes, start: int, shape: list[int]) -> np.ndarray:
    num_bytes = math.prod(shape)
    if shape[3] != 3 or num_bytes == 0 or len(data) - start != num_bytes:
        raise RequestError(400, f"{len(data) - start:,} bytes do not make pixels of the shape {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _pixels_from_json(data: list[Any], shape: list[int]) -> np.ndarray:
    """Pixels from numbers, flat or nested as the shape is."""
    try:
        for size in shape[1:]:
            if not (data and type(data[0]) is list):
                break
            if any(len(row) != size for row in data):
                raise ValueError("a list in it has another length")
            data = list(chain.from_iterable(data))
        return _pixels_from_binary(bytes(data), 0, shape)
    except (TypeError, ValueError) as error:
        raise RequestError(400, f"data are not integers 0 to 255 of the shape {shape}: {error}") from error


def _encoded_from_binary(data: bytes, start: int, shape: list[int]) -> list[bytes]:
    """Each image follows its length, four bytes, little-endian."""
    images = []
    for index in range(shape[0]):
        begin = start + _LENGTH.size
        if begin > len(data):
            raise RequestError(400, f"binary data end before image {index}")
        start = begin + _LENGTH.unpack_from(data, start)[0]
        images.append(data[begin:start])
    if start != len(data):
        raise RequestError(400, f"binary data do not end with image {shape[0] - 1}, as their lengths say")
    return images


def _encoded_from_json(data: list[Any], shape: list[int]) -> list[bytes]:
    if len(data) != shape[0]:
        raise RequestError(400, f"{len(data):,} images where the shape says {shape[0]:,}")
    wheres = [f"image {index}" for index in range(len(data))]
    return [
        _decode_base64(_expect(text, str, where), where) for text, where in zip(data, wheres, strict=True)
    ]


_LENGTH = struct.Struct("<I")
_READERS: dict[tuple[str, int], tuple[Callable[..., Any], Callable[..., Any]]] = {
    ("UINT8", 4): (_pixels_from_binary, _pixels_from_json),
    ("BYTES", 1): (_encoded_from_binary, _encoded_from_json),
}
"""(datatype, number of dimensions) -> how binary data and how JSON become images."""


def _read_outputs(request: dict[str, Any], is_binary: bool) -> dict[str, bool]:
    """The tensors asked for, by default all of them, and whether as binary data."""
    requested = {}
    for output in _expect(request.get("outputs", []), list, "outputs"):
        name = _expect(_expect(output, dict, "an output").get("name"), str, "an output's name")
        parameters = _expect(output.get("parameters", {}), dict, f"the parameters of {brief(name)}")
        if name not in OUTPUTS:
            raise RequestError(400, f"output {brief(name)}: choose from {', '.join(OUTPUTS)}")
        if unknown := parameters.keys() & UNSUPPORTED:
            raise RequestError(400, f"the output's parameter {unknown.pop()} is not supported")
        requested[name] = _expect(parameters.get("binary_data", is_binary), bool, "binary_data")
    return requested or dict.fromkeys(OUTPUTS, is_binary)


def format_infer(
    request: InferRequest, answers: Sequence[Answer], model: str, version: str
) -> tuple[dict[str, str], bytes]:
    """The headers and the body of an answer: "scores" FP32 [N, K] and "labels" BYTES [N].

    The label is empty where the classifier abstained.

    Raises:
        RequestError: an image could not be scored; the protocol knows no answer for the others alone.
    """
    for index, answer in enumerate(answers):
        if answer.scores is None:
            raise RequestError(answer.status, f"image {index}: {answer.error}")
    tensors = [_output(name, answers, is_binary) for name, is_binary in request.outputs.items()]
    header = {"model_name": model, "model_version": version, "outputs": [tensor for tensor, _ in tensors]}
    if request.id:
        header["id"] = request.id
    text, binary = _to_json(header), b"".join(data for _, data in tensors)
    if not binary:
        return {"Content-Type": "application/json"}, text
    return {"Content-Type": "application/octet-stream", BINARY_HEADER: str(len(text))}, text + binary


def _output(name: str, answers: Sequence[Answer], is_binary: bool) -> tuple[dict[str, Any], bytes]:
    """A tensor's JSON, and its binary data or nothing."""
    values = _OUTPUT_VALUES[name](answers)
    tensor = {"name": name, "datatype": OUTPUTS[name], "shape": values.shape}
    if not is_binary:
        return {**tensor, "data": values.ravel().tolist()}, b""
    data = _labels_to_binary(values) if OUTPUTS[name] == "BYTES" else values.astype("<f4").tobytes()
    return {**tensor, "parameters": {"binary_data_size": len(data)}}, data


def _labels_to_binary(labels: np.ndarray) -> bytes:
    # A class may be named for a folder whose name is not UTF-8.
    encoded = [label.encode(errors="backslashreplace") for label in labels]
    return b"".join(_LENGTH.pack(len(label)) + label for label in encoded)


_OUTPUT_VALUES: dict[str, Callable[[Sequence[Answer]], np.ndarray]] = {
    "scores": lambda answers: np.stack([a.scores for a in answers if a.scores is not None]),
    "labels": lambda answers: np.array([a.label or "" for a in answers], object),
}


def server_metadata(version: str) -> dict[str, Any]:
    """What `GET /v2` answers."""
    return {"name": "jaxcls", "version": version, "extensions": ["binary_tensor_data"]}


def model_metadata(
    name: str, version: str, classes: Sequence[str], size: int, platform: str
) -> dict[str, Any]:
    """What `GET /v2/models/NAME` answers: the tensors as a client gains most from them, and the classes.

    Pixels of other sizes are resized, and encoded images, BYTES [N], are taken as well.
    """
    shapes = {"scores": [-1, len(classes)], "labels": [-1]}
    return {
        "name": name,
        "versions": [version],
        "platform": platform,
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, size, size, 3]}],
        "outputs": [
            {"name": output, "datatype": datatype, "shape": shapes[output]}
            for output, datatype in OUTPUTS.items()
        ],
        "classes": list(classes),
    }
