"""The service describes itself: an OpenAPI 3.1 document of its endpoints."""

from collections.abc import Sequence
from typing import Any, get_args
from urllib.parse import quote

from jaxcls.predictions import Kind
from jaxcls.serving.wire import (
    BINARY_HEADER,
    MAX_IMAGES,
    MAX_RESIZE_SIDE,
    MAX_SIDE,
    OUTPUTS,
    SOFTMAX_NAMES,
    UNSUPPORTED,
)

OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no key: what watches a service asks them."""

TIME_HEADER = "X-Execution-Time-Ms"
"""The HTTP header of an answer with the milliseconds from the request's admission to its answer."""

Schema = dict[str, Any]

# The words of a schema.

_STRING, _BOOLEAN, _NUMBER = ({"type": kind} for kind in ("string", "boolean", "number"))


def _object(required: Schema, optional: Schema | None = None, **others: Any) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        **others,
    }


def _list(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": least, **({"maxItems": most} if most else {})}


def _integer(least: int, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least, **({"maximum": most} if most else {})}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# What is said of every endpoint.

_BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"

_REFUSALS = {
    400: "The request is not of the form that is described here, or its images cannot be scored.",
    401: "The request shows no valid key.",
    413: f"The body is too large, or holds more than {MAX_IMAGES} images.",
    415: "The body is of a type that is not taken.",
    429: "Too many images are waiting, or would be waiting for too long.",
    503: "The service is not ready or about to stop.",
}
_REFUSAL_HEADERS = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    429: {
        "Retry-After": {
            "description": "Seconds after which to try again.",
            "schema": _integer(0),
            "required": True,
        }
    },
}
_SCORING_REFUSALS = (400, 413, 429, 503)


def make_document(name: str, classes: Sequence[str], size: int, *, secured: bool = True) -> Schema:
    """The document, as plain values for JSON.

    Args:
        name: of the model.
        classes: names of its K classes, in the order of the scores.
        size: of the pictures that its network takes, in pixels.
        secured: whether it asks for a key.
    """
    model = f"/v2/models/{quote(name, safe='')}"
    operations = {
        ("post", "/score"): _operation(
            "Score images: JSON in, a list of JSON strings out",
            _answer("ScoreAnswer", {TIME_HEADER: _TIME}),
            _SCORING_REFUSALS,
            _json("ScoreRequest"),
        ),
        ("post", "/v1/predict"): _operation(
            "Score images, each with its label",
            _answer("PredictAnswer", {TIME_HEADER: _TIME}),
            (*_SCORING_REFUSALS, 415),
            {
                "image/*": {},
                "application/octet-stream": {},
                "multipart/form-data": {"schema": _ref("PredictForm")},
                **_json("PredictRequest"),
            },
        ),
        ("post", f"{model}/infer"): _operation(
            "Open Inference Protocol: score a tensor of images",
            {
                "description": "The tensors; those asked for as binary data follow the JSON.",
                "content": {**_json("InferAnswer"), "application/octet-stream": {}},
                "headers": {
                    TIME_HEADER: _TIME,
                    BINARY_HEADER: {"schema": _integer(1)},
                },
            },
            _SCORING_REFUSALS,
            {**_json("InferRequest"), "application/octet-stream": {}},
            [
                {
                    "name": BINARY_HEADER,
                    "in": "header",
                    "description": "Bytes of JSON in the body, where binary data follow it.",
                    "schema": _integer(1),
                }
            ],
        ),
        ("get", model): _operation("The model and its tensors", _answer("ModelMetadata")),
        ("get", f"{model}/ready"): _operation("Whether the model takes requests", _YES, (503,)),
        ("get", "/v2"): _operation("The server", _answer("ServerMetadata")),
        ("get", "/v2/health/live"): _operation("Whether the server runs", _YES),
        ("get", "/v2/health/ready"): _operation("Whether the server takes requests", _YES, (503,)),
        ("get", "/metrics"): _operation(
            "Figures for Prometheus",
            {"description": "The figures.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        ),
        ("get", "/openapi.json"): _operation("This document", _answer("Document")),
    }
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in operations.items():
        if secured and path not in OPEN_PATHS:
            operation["security"] = [{"key": []}]
            operation["responses"]["401"] = _refusal(401)
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{name}, served by jaxcls", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": _schemas(list(classes), size),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    summary: str,
    answer: Schema,
    refusals: Sequence[int] = (),
    body: Schema | None = None,
    parameters: Sequence[Schema] = (),
) -> Schema:
    responses = {"200": answer, **{str(status): _refusal(status) for status in refusals}}
    operation: Schema = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = list(parameters)
    if body:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _refusal(status: int) -> Schema:
    return {
        "description": _REFUSALS[status],
        "content": _json("Error"),
        "headers": _REFUSAL_HEADERS.get(status, {}),
    }


def _answer(name: str, headers: Schema | None = None) -> Schema:
    return {"description": "The answer.", "content": _json(name), "headers": headers or {}}


_YES = {"description": "Yes."}
_TIME = {
    "description": "Milliseconds from the request's admission to its answer.",
    "schema": {"type": "number", "minimum": 0},
    "required": True,
}


def _in_any_case(names: Sequence[str]) -> str:
    """A pattern of the names in capitals, small letters or both: JSON Schema has no flag for that."""
    letters = ("".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in name) for name in names)
    return f"^(?:{'|'.join(letters)})$"


def _schemas(classes: list[str], size: int) -> dict[str, Schema]:
    count, sides = _integer(1, MAX_IMAGES), _integer(1, MAX_SIDE)
    shared = {"model": _STRING, "timing_ms": {"type": "number", "minimum": 0}}
    values = _list(_NUMBER, len(classes), len(classes))
    resize_dims = {
        **_list(_integer(1, MAX_RESIZE_SIDE), 2, 2),
        "type": ["array", "null"],
        "description": "Width and height to resize the image to before it is preprocessed.",
    }
    score_parameters = {
        "type": ["object", "null"],
        "properties": {
            "image_resize_dims": resize_dims,
        },
        "patternProperties": {_in_any_case(SOFTMAX_NAMES): _BOOLEAN},
    }
    return {
        "Error": _object({"error": _STRING}),
        "Image": {"type": "string", "contentEncoding": "base64", "pattern": f"^{_BASE64}$"},
        "Class": {"enum": classes},
        "ScoreRequest": _list(
            _object(
                {
                    "image_in_base64": {
                        "type": "string",
                        "description": "base64, also in the form that Python prints bytes in.",
                        "pattern": f"^(?:{_BASE64}|b'{_BASE64}')$",
                    }
                },
                {"parameters": score_parameters},
            ),
            1,
            MAX_IMAGES,
        ),
        "ScoreAnswer": _list(
            {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"anyOf": [values, _ref("Error")]},
            },
            1,
        ),
        "PredictRequest": _object(
            {
                "images": _list(
                    {
                        "oneOf": [
                            _ref("Image"),
                            _object({"base64": _ref("Image")}, {"url": False}),
                            _object({"url": _STRING}, {"base64": False}),
                        ]
                    },
                    1,
                    MAX_IMAGES,
                )
            },
            {"softmax": _BOOLEAN, "image_resize_dims": resize_dims},
        ),
        "PredictForm": {
            "type": "object",
            "description": "Each file is an image, whatever its field is called; at least one is needed.",
            "properties": {"softmax": {"enum": ["true", "false"]}},
            "additionalProperties": {"contentMediaType": "application/octet-stream"},
            "minProperties": 1,
        },
        "PredictAnswer": _object(
            {
                "kind": {"description": "What the scores are.", "enum": list(get_args(Kind))},
                "predictions": _list({"oneOf": [_ref("Prediction"), _ref("Failure")]}, 1),
            }
        ),
        "Prediction": _object(
            {
                "label": {
                    "description": "The best class, or null where the classifier abstains.",
                    "anyOf": [_ref("Class"), {"type": "null"}],
                },
                "score": {**_NUMBER, "description": "Of the best class."},
                "scores": {
                    "type": "object",
                    "propertyNames": _ref("Class"),
                    "minProperties": len(classes),
                    "additionalProperties": _NUMBER,
                },
                "abstained": _BOOLEAN,
                **shared,
            },
        ),
        "Failure": _object({"error": _STRING, **shared}),
        "InferRequest": _object(
            {"inputs": _list({"oneOf": [_ref("Pixels"), _ref("EncodedImages")]}, 1, 1)},
            {
                "id": _STRING,
                "parameters": _object({}, {"softmax": _BOOLEAN, "binary_data_output": _BOOLEAN}),
                "outputs": _list(
                    _object(
                        {"name": {"enum": list(OUTPUTS)}},
                        {"parameters": _object({}, {"binary_data": _BOOLEAN, **_NOT_SUPPORTED})},
                    )
                ),
            },
        ),
        "Pixels": _object(
            {
                **_tensor("images", "UINT8", [count, sides, sides, {"const": 3}]),
                "data": _list({"anyOf": [_integer(0, 255), {"type": "array"}]}, 1),
            },
            _NO_BINARY_DATA,
            description=f"Of another size than {size} x {size} pixels, they are resized as photos are.",
        ),
        "EncodedImages": _object(
            {**_tensor("images", "BYTES", [count]), "data": _list(_ref("Image"), 1, MAX_IMAGES)},
            _NO_BINARY_DATA,
        ),
        "InferAnswer": _object(
            {
                "model_name": _STRING,
                "model_version": _STRING,
                "outputs": _list({"oneOf": [_ref("Scores"), _ref("Labels")]}, 1, len(OUTPUTS)),
            },
            {"id": _STRING},
        ),
        "Scores": _object(
            _tensor("scores", "FP32", [count, {"const": len(classes)}]), {"data": _list(_NUMBER)}
        ),
        "Labels": _object(
            _tensor("labels", "BYTES", [count]),
            {"data": _list({"anyOf": [_ref("Class"), {"const": ""}]})},
            description="The best class of each image; empty where the classifier abstains.",
        ),
        "ServerMetadata": _object({"name": _STRING, "version": _STRING, "extensions": _list(_STRING)}),
        "ModelMetadata": _object(
            {
                "name": _STRING,
                "versions": _list(_STRING),
                "platform": _STRING,
                "inputs": _list(_METADATA),
                "outputs": _list(_METADATA),
                "classes": {"const": classes},
            }
        ),
        "Document": {"type": "object"},
    }


def _tensor(name: str, datatype: str, dimensions: list[Schema]) -> Schema:
    length = len(dimensions)
    shape = {"type": "array", "prefixItems": dimensions, "minItems": length, "maxItems": length}
    return {"name": {"const": name}, "datatype": {"const": datatype}, "shape": shape}


_METADATA = _object({"name": _STRING, "datatype": _STRING, "shape": _list({"type": "integer"})})
_NO_BINARY_DATA = {"parameters": _object({}, {"binary_data_size": {"const": 0}})}
_NOT_SUPPORTED = dict.fromkeys(UNSUPPORTED, False)
