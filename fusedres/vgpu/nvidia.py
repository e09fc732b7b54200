"""NVIDIA's intrinsics and PTX statements, as calls into the runtime."""

import re

from fusedres.vgpu import bulk
from fusedres.vgpu.errors import NotExecutable
from fusedres.vgpu.ir import AsmCall, Body, Dialect, IntrinsicRule, members_of, size_of
from fusedres.vgpu.ptx import Address, Registers, Statement, parse_ptx
from fusedres.vgpu.rules import arithmetic, axis, block_barrier, meeting, nothing, runtime

INTRINSICS: list[tuple[str, IntrinsicRule]] = [
    (r"read\.ptx\.sreg\.tid\.x", runtime("vgpu_thread")),
    (r"read\.ptx\.sreg\.laneid", runtime("vgpu_lane")),
    (r"read\.ptx\.sreg\.ctaid\.([xyz])", axis("vgpu_block")),
    (r"read\.ptx\.sreg\.nctaid\.([xyz])", axis("vgpu_blocks")),
    (r"barrier\.cta\.sync\.aligned\.all|barrier0", block_barrier),
    (r"bar\.warp\.sync", meeting("vgpu_warp_barrier")),
    (r"wgmma\.fence\.sync\.aligned", nothing),
    (r"fence\.proxy\.async(\.shared_cta)?", meeting("vgpu_fence_async")),
    (r"elect\.sync", meeting("vgpu_elect")),
    (r"cp\.async\.bulk\.commit\.group", bulk.commit),
    (r"cp\.async\.bulk\.wait\.group(\.read)?", bulk.wait),
    (r"shfl\.sync\.(bfly|idx|up|down)\.(?:i32|f32)", meeting(r"vgpu_shuffle_\1")),
    (r"vote\.ballot\.sync", meeting("vgpu_ballot")),
    (r"redux\.sync\.(add|and|or|xor|min|max|umin|umax)", meeting(r"vgpu_redux_\1")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x([124])\.b16(?:\.p3)?", meeting(r"vgpu_ldmatrix_x\1")),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x([124])\.trans\.b16(?:\.p3)?", meeting(r"vgpu_ldmatrix_x\1_trans")),
    (r"stmatrix\.sync\.aligned\.m8n8\.x([124])\.b16(?:\.p3)?", meeting(r"vgpu_stmatrix_x\1")),
    (r"stmatrix\.sync\.aligned\.m8n8\.x([124])\.trans\.b16(?:\.p3)?", meeting(r"vgpu_stmatrix_x\1_trans")),
    (r"cp\.async\.commit\.group", runtime("vgpu_copy_commit")),
    (r"cp\.async\.wait\.group", runtime("vgpu_copy_wait")),
    (r"cp\.async\.wait\.all", runtime("vgpu_copy_wait_all")),
    (r"wgmma\.commit_group\.sync\.aligned", meeting("vgpu_wgmma_commit")),
    (r"wgmma\.wait_group\.sync\.aligned", meeting("vgpu_wgmma_wait")),
    (r"ex2\.approx(?:\.ftz)?(?:\.f32|\.f)?", runtime("exp2f")),
    (r"lg2\.approx(?:\.ftz)?(?:\.f32|\.f)?", runtime("log2f")),
    (r"sqrt\.(?:approx|rn)(?:\.ftz)?\.f", runtime("sqrtf")),
    (r"rsqrt\.approx(?:\.ftz)?\.f", runtime("vgpu_rsqrt")),
    (r"rcp\.(?:approx|rn)(?:\.ftz)?\.f", arithmetic("fdiv float 1.0, %p0")),
    (r"fma\.rn(?:\.ftz)?\.f", runtime("fmaf")),
    (r"fabs(?:\.ftz)?\.f(?:32)?", runtime("fabsf")),
    (r"div\.(?:full|approx|rn)(?:\.ftz)?(?:\.f)?", arithmetic("fdiv float %p0, %p1")),
]


_HINTS = r"(?:\.(?:ca|cg|cs|cv|wb|wt|nc|L1::\w+|L2::\w+))*"
_ACCESS = re.compile(rf"(ld|st)(?:\.volatile)?\.(global|shared)(?:::cta)?{_HINTS}(?:\.v([248]))?\.b(8|16|32|64)")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(?:16|8)\.row\.col\.f32\.(bf16|f16|tf32)\.\1\.f32")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16|8)\.f32\.(bf16|f16|tf32)\.\2")
_BITWISE = {"and.b32": "and", "or.b32": "or", "xor.b32": "xor", "shl.b32": "shl", "shr.b32": "lshr"}
_TYPES = {"bf16": 0, "f16": 1, "tf32": 2}


def statement(body: Body, call: AsmCall) -> None:
    """The body of an inline assembly statement."""
    registers = Registers(call)
    if phase := bulk.PHASE_WAIT.fullmatch(call.template):
        bulk.wait_for_phase(body, phase, registers)
        return
    statements = parse_ptx(call.template)
    if bulk.knows(statements):
        bulk.emit(body, statements, registers)
        return
    *moves, last = statements
    access, wgmma, mma = _ACCESS.fullmatch(last.opcode), _WGMMA.fullmatch(last.opcode), _MMA.fullmatch(last.opcode)
    if all(each.opcode in _BITWISE and each.predicate is None for each in statements):
        _bitwise(body, call, statements, registers)
        return
    if any(not re.fullmatch(r"mov\.[bu]\d+", move.opcode) for move in moves):
        raise NotExecutable(f"the PTX statements {call.template!r}")
    if access is not None and access[1] == "ld":
        _load(body, last, access, registers, {str(m.operands[0]): str(m.operands[1]) for m in moves})
    elif moves:
        raise NotExecutable(f"the PTX statements {call.template!r}")
    elif access is not None:
        _store(body, last, access, registers)
    elif _COPY.fullmatch(last.opcode):
        _copy(body, last, registers)
    elif mma is not None:
        _, a, b, c = (operand for operand in last.operands if isinstance(operand, list))
        body.meet(f"vgpu_mma_{mma[1]}", *(registers.typed(register) for register in (*a, *b, *c)))
    elif wgmma is not None:
        _wgmma(body, last, int(wgmma[1]), _TYPES[wgmma[2]], registers)
    elif last.opcode == "wgmma.wait_group.sync.aligned":
        _wait(body, call, str(last.operands[0]))
    elif re.fullmatch(r"mov\.[bu](16|32|64)", last.opcode) and last.predicate is None:
        _move(body, last, registers)
    elif last.opcode == "cvt.rna.tf32.f32" and last.predicate is None:
        _round_to_tf32(body, last, registers)
    elif last.opcode.startswith("createpolicy."):
        body.give("0")
    elif last.opcode == "fence.proxy.async.shared::cta":
        body.meet("vgpu_fence_async")
    else:
        raise NotExecutable(f"the PTX statement {call.template!r}")


def _branch(body: Body, predicate: str | None, registers: Registers) -> None:
    condition = "true" if predicate is None else registers.value(predicate)
    body.line(f"br i1 {condition}, label %on, label %off")
    body.line("on:")


def _off(body: Body) -> None:
    """The other side of `_branch`: the lane takes no part, which its warp's access has to know."""
    body.line("br label %end")
    body.line("off:")
    body.call("void", "vgpu_idle", ("i32", f"%p{len(body.parameters) - 1}"))
    body.line("br label %end")
    body.line("end:")


def _site(body: Body) -> tuple[str, str]:
    return "i32", f"%p{len(body.parameters) - 1}"


def _load(body: Body, load: Statement, access: re.Match[str], registers: Registers, defaults: dict[str, str]) -> None:
    target, address = load.operands[:2]
    if not isinstance(address, Address):
        raise NotExecutable(f"the PTX statement {load}")
    outputs = target if isinstance(target, list) else [str(target)]
    bits, types = int(access[4]), members_of(body.returns)
    bytes_ = str(len(outputs) * bits // 8)
    _branch(body, load.predicate, registers)
    at = body.at(registers.value(address.register), address.offset)
    body.call("void", f"vgpu_{access[2]}_read", ("ptr", at), ("i32", bytes_), ("i32", bytes_), _site(body))
    loaded = []
    for index, type_ in enumerate(types):
        piece = body.at(at, index * bits // 8)
        if 8 * size_of(type_) == bits:
            loaded.append(body.value(f"load {type_}, ptr {piece}, align {bits // 8}"))
        else:
            narrow = body.value(f"load i{bits}, ptr {piece}, align {bits // 8}")
            loaded.append(body.value(f"zext i{bits} {narrow} to {type_}"))
    _off(body)
    values = []
    for output, type_, value in zip(outputs, types, loaded, strict=True):
        default = registers.value(defaults[output]) if output in defaults else "zeroinitializer"
        values.append(body.value(f"phi {type_} [ {value}, %on ], [ {default}, %off ]"))
    body.give_members(values)


def _store(body: Body, store: Statement, access: re.Match[str], registers: Registers) -> None:
    address, source = store.operands[:2]
    if not isinstance(address, Address) or not isinstance(source, str | list):
        raise NotExecutable(f"the PTX statement {store}")
    sources = source if isinstance(source, list) else [source]
    bits = int(access[4])
    size = ("i32", str(len(sources) * bits // 8))
    values = []
    for register in sources:
        type_, value = registers.typed(register)
        if 8 * size_of(type_) > bits:
            type_, value = f"i{bits}", body.value(f"trunc {type_} {value} to i{bits}")
        values.append((type_, value))
    shared = access[2] == "shared"
    held = body.value(f"alloca [{size[1]} x i8], align 16") if shared else ""
    _branch(body, store.predicate, registers)
    at = body.at(registers.value(address.register), address.offset)
    if not shared:
        body.call("void", "vgpu_global_write", ("ptr", at), size, size, _site(body))
    for index, (type_, value) in enumerate(values):
        place = body.at(held if shared else at, index * bits // 8)
        body.line(f"store {type_} {value}, ptr {place}, align {bits // 8}")
    if shared:
        body.call("void", "vgpu_shared_write", ("ptr", at), ("ptr", held), size, size, _site(body))
    _off(body)
    body.give()


def _copy(body: Body, copy: Statement, registers: Registers) -> None:
    destination, source, size, *filled = copy.operands
    if not isinstance(destination, Address) or not isinstance(source, Address):
        raise NotExecutable(f"the PTX statement {copy}")
    size_value = ("i32", registers.value(str(size)))
    filled_value = ("i32", registers.value(str(filled[0]))) if filled else size_value
    _branch(body, copy.predicate, registers)
    to = body.at(registers.value(destination.register), destination.offset)
    from_ = body.at(registers.value(source.register), source.offset)
    body.call("void", "vgpu_copy", ("ptr", to), ("ptr", from_), size_value, filled_value, _site(body))
    _off(body)
    body.give()


def _wgmma(body: Body, wgmma: Statement, columns: int, type_: int, registers: Registers) -> None:
    _, a, b, *flags = wgmma.operands
    accumulate, scale_a, scale_b, *transposed = (str(flag) for flag in flags)
    if (scale_a, scale_b) != ("1", "1"):
        raise NotExecutable("wgmma that negates an operand")
    in_registers = isinstance(a, list)
    # With a in registers only b can be transposed.
    flags_of_a, flags_of_b = ("0", transposed[0] if transposed else "0") if in_registers else (transposed or ["0", "0"])
    if accumulate.startswith("$"):
        accumulated = ("i32", body.value(f"zext i1 {registers.value(accumulate)} to i32"))
    else:
        accumulated = ("i32", accumulate)
    operands: list[tuple[str, str]] = [("i64", "0" if isinstance(a, list) else registers.value(str(a)))]
    operands.append(("i64", registers.value(str(b))))
    operands += [registers.typed(register) for register in a] if isinstance(a, list) else [("i32", "0")] * 4
    operands += [("i32", str(number)) for number in (columns, type_, int(in_registers), flags_of_a, flags_of_b)]
    operands.append(accumulated)
    tied = columns // 2 if len(body.parameters) > columns // 2 else 0
    operands += [(body.parameters[index], f"%p{index}") for index in range(tied)]
    body.meet("vgpu_wgmma", *operands)


def _wait(body: Body, call: AsmCall, outstanding: str) -> None:
    """Wait, and hand on the registers that the multiplications were writing."""
    held = body.value("alloca i32, align 4")
    body.line(f"store i32 {int(outstanding)}, ptr {held}")
    body.join("vgpu_wgmma_wait", held, "null")
    if body.returns == "void":
        body.give()
        return
    values = []
    for index, type_ in enumerate(members_of(body.returns)):
        if call.parameters[index] == type_:
            values.append(f"%p{index}")
        else:
            values.append(body.value(f"ptrtoint {call.parameters[index]} %p{index} to {type_}"))
    body.give_members(values)


def _move(body: Body, move: Statement, registers: Registers) -> None:
    type_, value = registers.typed(str(move.operands[1]))
    body.give(value if type_ == body.returns else body.value(f"bitcast {type_} {value} to {body.returns}"))


def _bitwise(body: Body, call: AsmCall, statements: list[Statement], registers: Registers) -> None:
    """Statements that each make one output of 32 bits from inputs and numbers, no output from another."""
    types, results = members_of(body.returns), {}
    for each in statements:
        output, *sources = (str(operand) for operand in each.operands)
        if not registers.is_output(output) or any(registers.is_output(source) for source in sources):
            raise NotExecutable(f"the PTX statements {call.template!r}")
        first, second = (_bits(body, source, registers) for source in sources)
        results[output] = body.value(f"{_BITWISE[each.opcode]} i32 {first}, {second}")
    if len(results) != len(types) or any(size_of(type_) != 4 for type_ in types):
        raise NotExecutable(f"the PTX statements {call.template!r}")
    values = [results[f"${index}"] for index in range(len(types))]
    body.give_members([
        value if type_ == "i32" else body.value(f"bitcast i32 {value} to {type_}")
        for type_, value in zip(types, values, strict=True)
    ])  # fmt: skip


def _bits(body: Body, operand: str, registers: Registers) -> str:
    """A number, or 32 bits of a register whatever their type."""
    if not operand.startswith("$"):
        return registers.value(operand)
    type_, value = registers.typed(operand)
    return value if type_ == "i32" else body.value(f"bitcast {type_} {value} to i32")


def _round_to_tf32(body: Body, convert: Statement, registers: Registers) -> None:
    """To the nearest, away from zero where two are; 13 bits of the fraction become zero, infinity and NaN remain."""
    type_, value = registers.typed(str(convert.operands[1]))
    bits = value if type_ == "i32" else body.value(f"bitcast {type_} {value} to i32")
    raised = body.value(f"add i32 {bits}, {1 << 12}")
    rounded = body.value(f"and i32 {raised}, {-1 << 13}")
    exponent = body.value(f"and i32 {bits}, {0xFF << 23}")
    special = body.value(f"icmp eq i32 {exponent}, {0xFF << 23}")
    result = body.value(f"select i1 {special}, i32 {bits}, i32 {rounded}")
    body.give(result if body.returns == "i32" else body.value(f"bitcast i32 {result} to {body.returns}"))


# As Triton's options have it: denormal numbers count as zero in libdevice, and square roots are approximate.
REFLECTED = {"__CUDA_FTZ": 1, "__CUDA_PREC_SQRT": 0}

NVIDIA = Dialect("nvvm", INTRINSICS, statement, REFLECTED)
