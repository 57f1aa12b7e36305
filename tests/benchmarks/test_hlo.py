"""Bytes of a program's text against those counted by hand."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.hlo import Instruction, instructions, num_bytes
from benchmarks.traffic import Size, describe, score
from jaxcls.parallel import DATA_AXIS

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%fused (p: f32[4,8], q: f32[8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %b = f32[4,8]{1,0} broadcast(%q), dimensions={1}
  ROOT %a = f32[4,8]{1,0} add(%p, %b)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %copied = f32[4,8]{1,0} copy(%x), metadata={op_name="step(x)"}
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %copied)
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x: f32[4,8], kernel: bf16[8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %kernel = bf16[8]{0} parameter(1)
  %conv = (f32[8]{0}, /*index=1*/u8[0]{0}) custom-call(%x.1, %kernel, %x.1), custom_call_target="__cudnn$conv"
  %first = f32[8]{0} get-tuple-element(%conv), index=0
  %sum = f32[4,8]{1,0} fusion(%x.1, %first), kind=kLoop, calls=%fused
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %sum)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_runs_and_what_it_reads_and_writes():
    assert instructions(PROGRAM) == [
        Instruction("custom-call", "__cudnn$conv", "(f32[8]{0}, u8[0]{0})", 128 + 16 + 32, 1),
        Instruction("fusion", "", "f32[4,8]{1,0}", 128 + 32 + 128, 1),
        Instruction("copy", "", "f32[4,8]{1,0}", 128 + 128, 3),
    ]


def test_sizes_of_what_is_printed():
    shapes = (
        "f32[]",
        "bf16[2,3]{1,0:T(8,128)}",
        "pred[5]",
        "f8e4m3fn[7]",
        "(s8[2], (f64[3], u8[0]))",
        "token[]",
    )
    assert [num_bytes(shape) for shape in shapes] == [4, 12, 5, 7, 26, 0]


def test_loops_within_loops_and_calls_are_multiplied():
    inner = PROGRAM.replace("ENTRY %main", "%inner").replace("ENTRY", "")
    outer = """
%again (state: f32[4,8]) -> f32[4,8] {
  %s = f32[4,8]{1,0} parameter(0)
  ROOT %called = f32[4,8]{1,0} call(%s), to_apply=%inner
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x.2 = f32[4,8]{1,0} parameter(0)
  ROOT %loop.2 = f32[4,8]{1,0} while(%x.2), body=%again, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert [one.times for one in instructions(inner + outer)] == [5, 5, 15]


def test_what_runs_an_unknown_number_of_times_is_refused():
    with pytest.raises(ValueError, match="main has a loop of unknown length"):
        instructions(re.sub(r", backend_config=.*", "", PROGRAM))


def test_a_program_of_this_machine_is_described():
    compiled = score(Size(18, 2, 32), Mesh(np.asarray(jax.devices()[:1]), (DATA_AXIS,))).compile()
    described = describe(compiled, 2)
    assert sum(described["by_kind"].values()) == pytest.approx(described["megabytes_per_image"])
    assert described["megabytes_per_image"] > 22 / 2  # the kernels alone
    assert (described["scatters"], described["float32_convolutions"]) == (0, 0)
