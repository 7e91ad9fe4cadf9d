"""A few PTX instructions in numpy, to test the GPU decoders without a GPU.

https://docs.nvidia.com/cuda/parallel-thread-execution: registers are arrays of 32 bits, one element for each thread.
"""

from __future__ import annotations

import re

import numpy as np

Register = np.ndarray

# packed types: bits of a number, start of the mantissa, digits with the implied one, exponent of the last digit
_FLOATS = {"bf16": (16, 7, 8, -133), "f16": (16, 10, 11, -24), "f32": (32, 23, 24, -149)}


def numbers(bits: Register, name: str) -> np.ndarray:
    """fp64 values of the lowest bits, interpreted as a type."""
    width, mantissa_bits, _, last = _FLOATS[name]
    bits = bits.astype(np.int64)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & ((1 << (width - 1 - mantissa_bits)) - 1)
    sizes = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa) * 2.0 ** (np.maximum(exponent, 1) - 1)
    return np.where(bits >> (width - 1) & 1, -1.0, 1.0) * sizes * 2.0**last


def bits_of(values: np.ndarray, name: str) -> Register:
    """The inverse of `numbers`, rounded to nearest, ties to even."""
    width, mantissa_bits, digits, last = _FLOATS[name]
    _, exponent = np.frexp(values)
    unit = np.maximum(exponent - digits, last)
    whole = np.rint(np.ldexp(np.abs(values), -unit)).astype(np.int64)
    # a mantissa that is rounded up to a power of two carries into the exponent
    found = np.where(whole >= 1 << mantissa_bits, whole + ((unit - last) << mantissa_bits), whole)
    return (found | np.signbit(values).astype(np.int64) << (width - 1)).astype(np.uint32)


def _packed(name: str, operate, *operands: Register) -> Register:
    if not name.endswith("x2"):
        return bits_of(operate(*(numbers(one, name) for one in operands)), name)
    half = name.removesuffix("x2")
    low = bits_of(operate(*(numbers(one & 0xFFFF, half) for one in operands)), half)
    high = bits_of(operate(*(numbers(one >> 16, half) for one in operands)), half)
    return low | high << np.uint32(16)


def _permute(a: Register, b: Register, selector: Register) -> Register:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(both)
    for byte in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * byte) & np.uint64(15)
        assert (nibble < 8).all()
        found |= (both >> (np.uint64(8) * nibble) & np.uint64(255)) << np.uint64(8 * byte)
    return found.astype(np.uint32)


def _logic(a: Register, b: Register, c: Register, table: int) -> Register:
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            terms = [one if row >> place & 1 else ~one for place, one in ((2, a), (1, b), (0, c))]
            found |= terms[0] & terms[1] & terms[2]
    return found


class SharedVariables:
    """Shared memory that PTX declares; it has arbitrary contents until something is stored.

    Loads must be without bank conflicts.
    """

    def __init__(self) -> None:
        self.num_threads = 1
        self.addresses: dict[str, int] = {}
        self._words = np.zeros(256, np.uint32)  # no variable starts at 0

    def declare(self, declaration: str) -> None:
        name, size = re.fullmatch(r"\.shared \.align 16 \.b8 (\w+)\[(\d+)\]", declaration).groups()
        if name in self.addresses:
            raise ValueError(f"{name} is declared twice.")
        self.addresses[name] = 4 * len(self._words)
        self._words = np.append(self._words, np.full(int(size) // 4, 0xFFFFFFFF, np.uint32))

    def load(self, places: Register) -> Register:
        indices = self._indices(places)
        banks = np.sort(indices.reshape(self.num_threads // 32, 32, -1) % 32, axis=1)
        if (banks != np.arange(32)[:, None]).any():
            raise RuntimeError("threads of a warp load from the same bank")
        return self._words[indices]

    def store(self, places: Register, values: list[Register]) -> None:
        for number, value in enumerate(values):
            self._words[self._indices(places + np.uint32(4 * number))] = value

    def _indices(self, places: Register) -> np.ndarray:
        if (places % 4).any() or (places < min(self.addresses.values())).any():
            raise IndexError("an access that is not aligned, or outside of the variables")
        return places // 4


def run(
    assembly: str, operands: dict[int, Register], num_results: int, variables: SharedVariables | None = None
) -> list[Register]:
    """Results 0 and on, of operands by their numbers."""
    size = len(next(iter(operands.values())))
    registers = {f"${number}": bits.astype(np.uint32) for number, bits in operands.items()}
    registers["%lanemask_lt"] = np.full(size, 0x00FF, np.uint32)
    registers["%lanemask_ge"] = np.full(size, 0xFFFFFF00, np.uint32)

    def read(text: str) -> Register:
        if text in registers:
            return registers[text]
        if variables is not None and text in variables.addresses:
            text = str(variables.addresses[text])
        number = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
        return np.full(size, number, np.uint32)

    for line in assembly.strip("{} ").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        if line.startswith(".shared"):
            variables.declare(line)
            continue
        name, rest = line.split(" ", 1)
        if name == "st.shared.v4.b32":
            place, *values = re.fullmatch(r"\[(\S+)\], {(\S+), (\S+), (\S+), (\S+)}", rest).groups()
            variables.store(read(place), [read(value) for value in values])
            continue
        to, *sources = re.split(r",\s*", rest)
        values = [read(one.strip("[]")) for one in sources]
        operation, *kinds = name.split(".")
        if operation == "mov":
            found = values[0]
        elif operation == "prmt":
            found = _permute(*values)
        elif operation == "lop3":
            found = _logic(*values[:3], int(sources[3], 16))
        elif operation in ("and", "or", "xor"):
            found = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation](*values)
        elif operation == "shr":
            found = values[0] >> values[1]
        elif name == "shf.l.wrap.b32":
            both = values[1].astype(np.uint64) << np.uint64(32) | values[0]
            found = (both << (values[2] & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        elif name == "add.u32":
            found = values[0] + values[1]
        elif name == "ld.shared.b32":
            found = variables.load(values[0])
        elif name == "mul.hi.u32":
            found = (values[0].astype(np.uint64) * values[1].astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
        elif operation in ("fma", "sub", "mul") and kinds[0] == "rn":
            operate = {"fma": lambda a, b, c: a * b + c, "sub": np.subtract, "mul": np.multiply}[operation]
            found = _packed(kinds[1], operate, *values)
        else:
            raise ValueError(f"{line!r} is not a supported instruction.")
        registers[to] = found
    return [registers[f"${number}"] for number in range(num_results)]
