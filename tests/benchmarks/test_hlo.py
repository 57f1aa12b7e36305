"""Bytes of a program's text against those counted by hand."""

from benchmarks.hlo import Instruction, instructions, num_bytes

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
