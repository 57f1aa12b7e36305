"""What an optimized program reads and writes, from the text that XLA prints of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

# "bf16[256,56,56,64]{3,2,1,0}"; the layout is of no interest here.
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)$")
_BITS = re.compile(r"\d+")
# These name or rename memory.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"})


@dataclass(frozen=True)
class Instruction:
    """One kernel or library call of a program.

    Attributes:
        operation: XLA's name: "fusion", "copy", "custom-call", ...
        target: of a custom call: "__cudnn$convForward", ...; else "".
        shape: of its result, as printed.
        num_bytes: of its operands, each once, and its result, in one run of it; whole arrays, also where it
            reads a slice or writes in place.
        times: that it runs, where it stands in a loop.
    """

    operation: str
    target: str
    shape: str
    num_bytes: int
    times: int


def instructions(text: str) -> list[Instruction]:
    """All that an optimized program runs, loops by the number of their turns.

    Raises:
        ValueError: how often something runs is not in the text.
    """
    computations, entry = _computations(text)
    return list(_run(computations, entry, 1))


def num_bytes(shape: str) -> int:
    """Of an array or a tuple of arrays, as printed."""
    return sum(
        _element_bytes(kind) * prod(int(extent) for extent in extents.split(",") if extent)
        for kind, extents in _ARRAY.findall(shape)
    )


def _element_bytes(kind: str) -> int:
    """`f8e4m3fn`, `bf16`, `s32`: the first number is the bits; `pred` takes a byte, `token` nothing."""
    if bits := _BITS.search(kind):
        return max(1, int(bits[0]) // 8)
    return int(kind == "pred")


Lines = list[tuple[str, ...]]


def _computations(text: str) -> tuple[dict[str, Lines], str]:
    """{name: (name, shape, operation, rest of the line) of each instruction}, and the name to start with."""
    found: dict[str, Lines] = {}
    entry, lines = "", Lines()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if start := _COMPUTATION.match(line):
            lines = found[start[2]] = []
            entry = start[2] if start[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction.groups())
    return found, entry


def _run(computations: dict[str, Lines], name: str, times: int) -> Iterator[Instruction]:
    shapes = {line[0]: line[1] for line in computations[name]}
    for _, shape, operation, rest in computations[name]:
        if operation == "while":
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            if not turns:
                raise ValueError(f"{name} has a loop of unknown length")
            yield from _run(computations, _called("body", rest), times * int(turns[1]))
        elif operation == "call":
            yield from _run(computations, _called("to_apply", rest), times)
        elif operation == "conditional" or operation.startswith("async"):
            raise ValueError(f"{name} has a {operation}, whose runs are not counted")
        elif operation not in _FREE:
            operands = set(re.findall(r"%([\w.-]+)", rest.split("), ")[0])) & shapes.keys()
            target = re.search(r'custom_call_target="([^"]+)"', rest)
            moved = num_bytes(shape) + sum(num_bytes(shapes[operand]) for operand in operands)
            yield Instruction(operation, target[1] if target else "", shape, moved, times)


def _called(role: str, rest: str) -> str:
    called = re.search(rf"\b{role}=%?([\w.-]+)", rest)
    assert called, rest
    return called[1]
