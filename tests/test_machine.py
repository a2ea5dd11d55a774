"""What the machine for PTX must not let pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

import dinat_triton as dt
from dinat_triton.offline.targets import find_target
from tests.oracles import gpu, ptx
from tests.oracles.ptx import Fault

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 128;
	setp.lt.u32 	%p1, %r1, 16;
BODY
	ret;
}
"""


def run(body: str, programs: int = 1) -> list[int]:
    """What becomes of numbers that count up. `%rd2` is a thread's own; `%r2`, `%r3` its and another's shared place."""
    x = torch.arange(64, dtype=torch.int32)
    body = body.replace("; ", ";\n").replace(": ", ":\n")
    ptx.launch(ptx.parse(KERNEL.replace("BODY", body)), (programs, 1, 1), 256, [x])
    return x.tolist()


COUNT, STORE = list(range(64)), "st.global.b32 [%rd2], %r5;"
SHARE = "ld.global.b32 %r4, [%rd2]; st.shared.b32 [%r2], %r4; bar.sync 0; ld.shared.b32 %r5, [%r3]; " + STORE
PART = "mov.b32 %r5, 1; @%p1 bra $L_few; mov.b32 %r5, 2; $L_few: bar.sync 0; " + STORE
RARE = (  # a block behind those that most threads take
    "@%p1 bra $L_rare; mov.b32 %r5, 2; $L_join: bar.sync 0; "
    f"{STORE} bra.uni $L_end; $L_rare: mov.b32 %r5, 1; bra.uni $L_join; $L_end:"
)
COPY = (
    "cp.async.ca.shared.global [%r2], [%rd2], 0x4, 4; cp.async.commit_group; cp.async.wait_group 0; "
    "ld.shared.b32 %r5, [%r2]; " + STORE
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SHARE, [*range(32, 64), *range(32)]),
        (SHARE.replace("bar.sync 0;", ""), "warps meet in shared memory without a barrier: ld.shared.b32"),
        (PART, [1] * 16 + [2] * 48),
        (PART.replace("$L_few: bar.sync 0;", "bar.sync 0; $L_few:"), "threads that must be together have parted"),
        (RARE, [1] * 16 + [2] * 48),
        (COPY, COUNT),
        (COPY.replace("wait_group 0", "wait_group 1"), [-1] * 64),
        (COPY.replace("[%rd2], 0x4, 4", "[%rd2+4096], 0x4, 0"), [0] * 64),  # nothing is read where nothing is copied
        ("ld.global.b32 %r4, [%rd2+4];", "outside the tensors"),
        ("st.global.b32 [%rd1+-4], %r1;", "outside the tensors"),
        ("ld.global.b32 %r4, [%rd2+2];", "4 bytes is misaligned"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd2];", "8 bytes is misaligned"),
        ("ld.shared.b32 %r4, [%r2+4];", "outside the shared memory"),
        ("setp.lt.u32 %p2, %r1, 0; @%p2 st.global.b32 [%rd1+-4], %r1;", COUNT),
    ],
)
def test_exchanges_and_faults(body: str, expected: list[int] | str) -> None:
    if isinstance(expected, list):
        assert run(body) == expected
    else:
        with pytest.raises(Fault, match=expected):
            run(body)


@pytest.mark.parametrize("programs", [2, ptx.PROGRAMS_IN_STEP + 1])
def test_programs_that_write_one_place_fault(programs: int) -> None:
    body = "mov.u32 %r4, %ctaid.x; setp.eq.u32 %p2, %r4, 0; @%p2 st.global.b32 [%rd2], %r1;"
    assert run(body, programs) == COUNT
    with pytest.raises(Fault, match="two programs write one place"):
        run(f"{body} setp.eq.u32 %p3, %r4, {programs - 1}; @%p3 st.global.b32 [%rd2], %r1;", programs)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the kernels are interpreted")
@pytest.mark.parametrize(
    ("target", "dilation", "left_out", "message"),
    [
        ("sm_80", 1, "bar.sync", "without a barrier"),
        ("sm_90", 2, "bar.sync", "without a barrier"),
        ("sm_90", 1, "fence.proxy", "without a fence"),
        ("sm_100", 1, "bar.sync", "without a barrier"),
        ("sm_100", 2, "fence.proxy", "without a fence"),
        ("sm_100", 1, "mbarrier.try_wait", "before a product has been waited for|where matrix units still read"),
    ],
)
def test_the_kernels_need_their_barriers_fences_and_waits(
    target: str, dilation: int, left_out: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse: Callable[[str], Any] = ptx.parse
    monkeypatch.setattr(ptx, "parse", lambda text: parse(text.replace(left_out, f"// {left_out}")))
    qkv = torch.randn(1, 14, 14, 3, 1, 32, dtype=torch.bfloat16, requires_grad=True)
    with gpu.pretended(find_target(target)), pytest.raises(Fault, match=message):
        dt.na2d(*qkv.unbind(3), 7, dilation=dilation, backend="triton").sum().backward()
