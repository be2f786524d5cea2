"""PTX text to instructions with resolved registers, labels and addresses.

Covers the modules that Triton writes: one entry function, constants, one extern shared array, scoped inline assembly.
Source: NVIDIA, "Parallel Thread Execution ISA", syntax and state spaces.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

KINDS = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid|nwarpid|clusterid|nclusterid|cluster_ctaid|cluster_ctarank)(\.[xyz])?$")


@dataclass(frozen=True)
class Register:
    name: str
    slot: int
    kind: str


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a constant or an array of shared or local memory."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """Two destinations, `value|predicate`; `_` is None."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int
    coordinates: tuple = ()


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    guard: tuple[Register, bool] | None
    """The predicate, and whether it is negated."""
    opcode: str
    operands: tuple

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    size: int


@dataclass
class Program:
    name: str
    parameters: list[Parameter]
    threads: int
    constants: dict[str, bytes]
    local: dict[str, int] = field(default_factory=dict)
    """Offsets of the arrays of local memory."""
    local_bytes: int = 0
    registers: list[Register] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,\[\]]*?\s([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)")
CONSTANT = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}")
STATEMENT = re.compile(r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:(?!:)|(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
ADDRESS = re.compile(r"([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*(?:,\s*\{([^}]*)\})?$")
SIZES = {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (8, 16, 32, 64)}


def parse(ptx: str) -> Program:
    """The module's only entry function.

    Raises:
        ValueError: on text that is no such module.
    """
    text = re.sub(r"//[^\n]*|^[ \t]*\.(?:loc|file)\b[^\n]*", "", ptx, flags=re.M)
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
    if head is None:
        raise ValueError(f"expected PTX with one .entry function, got {ptx[:60]!r}")
    parameters = [Parameter(m[2], m[1], SIZES[m[1]] * int(m[3] or 1)) for m in PARAMETER.finditer(head[2])]
    constants = {m[1]: bytes(int(byte) for byte in m[2].split(",")) for m in CONSTANT.finditer(text[: head.start()])}
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    program = Program(head[1], parameters, int(threads[1]) if threads else 0, constants)
    Parser(text, program).body(head.end())
    return program


def split(operands: str) -> list[str]:
    """Operands at the top level: commas inside brackets and braces do not separate."""
    return [piece.strip() for piece in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands) if piece.strip()]


class Parser:
    """Names resolved innermost scope first; jumps to labels that come later are resolved when the function ends."""

    def __init__(self, text: str, program: Program):
        self.text, self.program = text, program
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.scopes: list[dict[str, Register | str]] = [{}]

    def body(self, position: int) -> None:
        pending = []
        scope_id = 0
        while self.scopes:
            match = STATEMENT.match(self.text, position)
            if match is None:
                raise ValueError(f"line {self.line(position)}: expected a statement, got {self.text[position : position + 60].strip()!r}")
            position = match.end()
            if match["open"]:
                scope_id += 1
                self.scopes.append(self.labels_ahead(position, scope_id))
            elif match["close"]:
                self.scopes.pop()
            elif match["label"]:
                name = self.lookup(match["label"])
                self.program.labels[name if isinstance(name, str) else match["label"]] = len(pending)
            else:
                statement = " ".join(match["statement"].split())
                if statement.startswith("."):
                    self.declare(statement)
                elif statement:
                    line = self.line(match.start("statement") + len(match["statement"]) - len(match["statement"].lstrip()))
                    pending.append(self.instruction(statement, line))
        self.program.instructions = pending

    def line(self, position: int) -> int:
        return bisect_right(self.newlines, position - 1) + 1

    def labels_ahead(self, position: int, scope_id: int) -> dict[str, Register | str]:
        """Labels of a scope of inline assembly get names of their own: every copy of the assembly repeats them."""
        end = self.text.index("}", position)
        return {name: f"{name}@{scope_id}" for name in re.findall(r"^\s*([\w$]+)\s*:(?!:)", self.text[position:end], flags=re.M)}

    def lookup(self, name: str) -> Register | str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def register(self, name: str, kind: str) -> Register:
        register = Register(name, len(self.program.registers), kind)
        self.program.registers.append(register)
        return register

    def declare(self, statement: str) -> None:
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement):
            kind = "pred" if match[1] == "pred" else "b" + re.sub(r"\D", "", match[1])
            for name in match[2].split(","):
                stem, count = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name.strip()).groups()
                for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                    self.scopes[-1][full] = self.register(full, kind)
        elif match := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement):
            start = -(-self.program.local_bytes // int(match[1])) * int(match[1])
            self.program.local[match[2]] = start
            self.program.local_bytes = start + int(match[3])
        elif not statement.startswith(".pragma"):
            raise ValueError(f"directive {statement!r} is not covered")

    def instruction(self, statement: str, line: int) -> Instruction:
        match = INSTRUCTION.match(statement)
        if match is None:
            raise ValueError(f"line {line}: expected an instruction, got {statement[:60]!r}")
        guard = (self.operand(match[2]), bool(match[1])) if match[2] else None
        return Instruction(line, statement, guard, match[3], tuple(self.operand(piece) for piece in split(match[4])))

    def operand(self, text: str) -> object:
        if text[0] == "{":
            return Vector(tuple(self.operand(piece) for piece in split(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1].strip())
        if "|" in text:
            return Pair(*(None if name.strip() == "_" else self.operand(name.strip()) for name in text.split("|")))
        found = self.lookup(text)
        if found is not None:
            return Symbol(found) if isinstance(found, str) else found
        if SPECIAL.match(text):
            kind = "b32"
            self.scopes[0][text] = self.register(text, kind)
            return self.scopes[0][text]
        if text[0].isdigit() or text[0] == "-":
            return Immediate(number(text))
        return Symbol(text)

    def address(self, text: str) -> Address:
        if "," in text and "{" not in text:
            raise ValueError(f"address [{text}] is not covered")
        match = ADDRESS.match(text)
        if match is None:
            raise ValueError(f"address [{text}] is not covered")
        coordinates = tuple(self.operand(piece) for piece in split(match[3])) if match[3] else ()
        return Address(self.operand(match[1]), int(match[2] or "0", 0), coordinates)


def number(text: str) -> int:
    """The bits of a literal: integers in two's complement, 0f and 0d as the words of a float."""
    if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
        return int(text[2:], 16)
    if re.match(r"-?\d+\.\d+$", text):
        return int(np.float32(text).view(np.uint32))
    return int(text.rstrip("U"), 0)
