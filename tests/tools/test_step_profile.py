"""The profile of a train step tells operations apart by their lines of XLA's text."""

import pytest

from tools.bench import step_profile as tool


def line(rest: str, op_name: str = "") -> str:
    named = f', metadata={{op_name="jit(train_step)/{op_name}"}}' if op_name else ""
    return f"  {rest}{named}\n"


TEXT = "ENTRY %main {\n" + "".join([
    line('%ffi_call.5 = f32[4,8,8,64]{3,2,1,0} custom-call(%a), custom_call_target="bmjax_conv"', "jvp(Net)/ffi_call"),
    line("%ynn_fusion.1 = f32[64,64]{1,0} fusion(%c), kind=kCustom, calls=%x", "transpose(jvp(Net))/conv2/dot_general"),
    line("%dot.3 = f32[64,64]{1,0} dot(%c, %d)", "optimizer"),
    line("%convolution.2 = f32[4,8,8,64]{3,2,1,0} convolution(%a, %b), window={size=1x1}"),
    line("%reduce_fusion = f32[64]{0} fusion(%e), kind=kLoop, calls=%y", "jvp(Net)/reduce_sum"),
    line("%copy.7 = f32[64,64]{0,1} copy(%ynn_fusion.1)"),
    line("ROOT %add_fusion = f32[64]{0} fusion(%f), kind=kLoop, calls=%z", "add"),
])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("ffi_call.5", "kernel `conv`", "forward"),
        ("ynn_fusion.1", "matrix products", "backward"),
        ("dot.3", "matrix products", "rest"),
        ("convolution.2", "XLA's convolutions", "rest"),
        ("reduce_fusion", "sums", "forward"),
        ("copy.7", "copies", "rest"),
        ("add_fusion", "element by element", "rest"),
    ],
)
def test_kinds_and_parts(name, kind, part):
    lines = dict(tool.OPERATION.findall(TEXT))
    assert (tool.kind(lines[name]), tool.part(lines[name])) == (kind, part)
