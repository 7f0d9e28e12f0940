"""Inline PTX of generated kernels as calls of the functions in ``emulation/ptx.h``."""

from __future__ import annotations

import re

ASM = re.compile(r"\basm\s*(?:volatile|__volatile__)?\s*\(")
LITERAL = re.compile(r'\s*"((?:[^"\\]|\\.)*)"')
OPERAND = re.compile(r'\s*"[=+]?\w+"\s*\((.*)\)\s*$', re.S)
MATRICES = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16")
PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32")
COPY = re.compile(r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\w+)*")
GROUP_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2")
PLAIN = {
    "cp.async.commit_group",
    "cp.async.wait_group",
    "cp.async.wait_all",
    "fence.proxy.async.shared::cta",
    "wgmma.fence.sync.aligned",
    "wgmma.commit_group.sync.aligned",
    "wgmma.wait_group.sync.aligned",
}
ALONE = {"griddepcontrol.launch_dependents", "griddepcontrol.wait"}
"""Of no consequence to a kernel that runs by itself."""
ROUNDED_PAIR = re.compile(r"cvt\.rn\.(f16|bf16)x2\.f32")
ELEMENTS = {"f16": "half", "bf16": "nv_bfloat16"}


def without_inline_ptx(source: str) -> str:
    """`source` with every ``asm`` statement replaced, up to its semicolon.

    Raises:
        NotImplementedError: an instruction that the emulation does not have.
    """
    parts, end = [], 0
    while found := ASM.search(source, end):
        closing = _closing(source, found.end())
        parts += [source[end : found.start()], _calls(source[found.end() : closing])]
        end = closing + 1
    return "".join([*parts, source[end:]])


def _calls(statement: str) -> str:
    """The calls for what stands between the parentheses of one ``asm``."""
    template, operands = _taken_apart(statement)
    instructions = (text.strip() for text in template.strip().strip("{}").split(";"))
    return "; ".join(_call(text, operands) for text in instructions if text)


def _call(instruction: str, operands: list[str]) -> str:
    """One instruction, whose ``%2`` is ``operands[2]``."""
    name, _, text = instruction.partition(" ")
    given = [part.strip() for part in re.sub(r"[{}\[\]]", "", text).split(",")]
    given = [operands[int(part[1:])] if part.startswith("%") else part for part in given if part]
    listed = ", ".join(given)
    if name in ALONE:
        return ""
    if name in PLAIN:
        return f"ptx_{re.sub(r'[.:]+', '_', name)}({listed})"
    if name == ".reg" and given[0].startswith(".pred "):
        return f"bool {given[0].removeprefix('.pred ')}"
    if name == "setp.ne.b32":
        return f"{given[0]} = {given[1]} != {given[2]}"
    if COPY.fullmatch(name):
        return f"ptx_cp_async({listed})"
    if found := MATRICES.fullmatch(name):
        *held, address = given
        transposed = "true" if found[1] else "false"
        return f"ptx_ldmatrix<{transposed}>({', '.join([address, *held])})"
    if found := PRODUCT.fullmatch(name):
        return f"ptx_mma_m16n8k16<{ELEMENTS[found[1]]}>({listed})"
    if found := GROUP_PRODUCT.fullmatch(name):
        return _group_product(ELEMENTS[found[2]], int(found[1]), given)
    if name == "mad.wide.s32":
        return f"ptx_mad_wide_s32({listed})"
    if found := ROUNDED_PAIR.fullmatch(name):
        return f"ptx_cvt_rn_x2<{ELEMENTS[found[1]]}>({listed})"
    raise NotImplementedError(f"inline PTX {name!r}; give emulation/ptx.h a function for it")


def _group_product(element: str, columns: int, given: list[str]) -> str:
    """Sums, a left factor of four registers or a descriptor, the right one's, and immediates."""
    sums, others = given[: columns // 2], given[columns // 2 :]
    in_registers = len(others) == 9
    of_left = 4 if in_registers else 1
    left, (right, onto, *signs) = others[:of_left], others[of_left:]
    assert signs[:2] == ["1", "1"] and (in_registers or signs[2] == "0"), "as kernels use it"
    lists = ", ".join(f"{{{', '.join(part)}}}" for part in ([f"&{c}" for c in sums], left))
    kind = f"{element}, {columns}, {str(in_registers).lower()}, {signs[-1]}"
    return f"ptx_wgmma<{kind}>({lists}, {right}, {onto})"


def _taken_apart(statement: str) -> tuple[str, list[str]]:
    """The template of an ``asm`` and the expressions of its operands, outputs first."""
    template, end = "", 0
    while found := LITERAL.match(statement, end):
        template += found[1].replace("\\n", " ").replace("\\t", " ")
        end = found.end()
    sections = _split(statement[end:].lstrip().removeprefix(":").replace("::", ": :"), ":")
    operands = [text for section in sections[:2] for text in _split(section, ",") if text]
    return template.replace("%%", "%"), [f"({_expression(text)})" for text in operands]


def _expression(operand: str) -> str:
    found = OPERAND.match(operand)
    assert found is not None, f"operand {operand!r} of an asm statement"
    return found[1]


def _split(text: str, mark: str) -> list[str]:
    """The parts of `text` between the `mark`s outside of parentheses, brackets and quotes."""
    parts, depth, quoted, begin = [], 0, False, 0
    for place, letter in enumerate(text):
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "([") - (letter in ")]")
        if letter == mark and depth == 0 and not quoted:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def _closing(text: str, begin: int) -> int:
    """The place of the parenthesis that closes the one before `begin`."""
    depth, quoted = 1, False
    for place in range(begin, len(text)):
        quoted ^= text[place] == '"'
        depth += 0 if quoted else (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError("an asm statement is not closed")
