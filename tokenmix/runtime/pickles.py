"""Reading pickles of arrays without running them.

A pickle is a program: unpickling one from a stranger runs it. Here a small machine follows the few instructions with
which dicts, lists, texts, numbers and numpy arrays are written, and refuses all others. It imports nothing and calls
nothing; what a pickle may ask for is a name in `_GLOBALS`, answered by a record. Arrays are put together afterwards,
from a dtype, a shape and bytes that have been compared.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy

__all__ = ["PickledArray", "UnsafePickle", "read_pickle"]

# Instructions of one file; a checkpoint of 10,000 arrays has some 400,000. Each makes at most one small object, what it
# reads is as large as that part of the file, and what it makes of objects at hand, which may be the same ones every
# time, is counted: so memory is bounded by the size of the file.
MAX_INSTRUCTIONS = 2_000_000
# Bytes and entries made of objects at hand, per byte of the file. Where pickles of numpy put a byte into an array, they
# do so once, and before protocol 3 they encode it once.
MAX_COPIES = 2
MAX_ARGUMENTS = 8
MAX_DIMENSIONS = 32
MAX_BYTES = 2**63 - 1  # what numpy can address; an empty array may have sides whose product is more

# What a pickle of arrays asks for -> the record that answers. numpy 2 writes `numpy._core`, numpy 1 `numpy.core`.
_GLOBALS = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "array" for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "buffer" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    **{(module, name): name for module in ("builtins", "__builtin__") for name in ("tuple", "bytes")},
    ("collections", "OrderedDict"): "dict",
}
# Kinds of numbers: code of a dtype -> bytes of one.
_DTYPES = {"b1": 1} | {f"{kind}{size}": size for kind in "iu" for size in (1, 2, 4, 8)} | {"f2": 2, "f4": 4, "f8": 8}


class UnsafePickle(ValueError):
    """A pickle holds something other than arrays, texts, numbers and containers of them."""


@dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names; it stays a name."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


@dataclass(eq=False)
class PickledArray:
    """An array as a pickle describes it."""

    dtype: _Dtype | None = None
    shape: tuple[int, ...] = ()
    data: bytes | bytearray = b""
    by_columns: bool = False

    def numpy(self) -> numpy.ndarray:
        """The array, in the machine's byte order; read-only where no bytes had to be moved."""
        import numpy

        assert self.dtype is not None  # `read_pickle` returns no others
        order = self.dtype.order if self.dtype.order in "<>" else "="
        flat = numpy.frombuffer(memoryview(self.data).toreadonly(), dtype=numpy.dtype(order + self.dtype.code))
        array = flat.reshape(self.shape, order="F" if self.by_columns else "C")
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def read_pickle(path: Path) -> Any:
    """What a pickle holds, with `PickledArray` for arrays.

    Raises:
        UnsafePickle: if it asks for anything that is not needed to write arrays, or is too long.
        ValueError: if it is cut off or no pickle.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return _Machine(size).run(_Bounded(file, size))


class _Bounded:
    """A file that is never asked for more than it holds: lengths in it may be lies."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(10_000)

    def tell(self) -> int:
        return self._file.tell()


class _Machine:
    """The stack, the marks and the memo of a pickle (see `pickletools`)."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.left = MAX_COPIES * size
        self.unfilled = 0

    def run(self, file: Any) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MAX_INSTRUCTIONS:
                raise UnsafePickle(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise UnsafePickle(f"it uses the instruction {opcode.name}, which arrays do without")
            if opcode.name == "STOP":
                break
            try:
                step(self, argument)
            except (IndexError, KeyError):
                raise ValueError(f"the instruction {opcode.name} finds nothing to work on") from None
        if len(self.stack) != 1 or self.marks:
            raise ValueError("it does not end with one object")
        if self.unfilled:
            raise ValueError("an array is never filled")
        return self.stack[0]

    def spend(self, count: int) -> None:
        """Count bytes or entries that are made of objects at hand."""
        self.left -= count
        if self.left < 0:
            raise UnsafePickle(f"it unfolds to more than {MAX_COPIES} times its size")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise ValueError("a mark stands where a value should be")
        return self.stack.pop()

    def popped(self) -> list[Any]:
        """Everything above the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def last(self, kind: type) -> Any:
        """The object on top, which must be a container of that kind."""
        if not isinstance(self.stack[-1], kind):
            raise UnsafePickle(f"it fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def fill(self, pairs: list[Any]) -> None:
        into = self.last(dict)
        if len(pairs) % 2:
            raise ValueError("a key has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing nested tuples can take for ever: names are all that a checkpoint needs.
            if not isinstance(key, str | int):
                raise UnsafePickle(f"a key is a {type(key).__name__}, not a text")
            if isinstance(key, int) and key.bit_length() > 64:
                raise UnsafePickle(f"a key is a number of {key.bit_length()} bits, not a text")
            into[key] = value

    def name(self, module: Any, name: Any) -> None:
        if (module, name) not in _GLOBALS:
            raise UnsafePickle(f"it asks for the global {_shown(module)}.{_shown(name)}, which is not run")
        self.push(_Global(_GLOBALS[module, name]))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickle(f"it calls a {type(function).__name__}")
        maker = _CALLS.get(function.name)
        try:
            if maker is None or len(arguments) > MAX_ARGUMENTS:
                raise TypeError
            self.push(maker(self, *arguments))
        except TypeError:
            raise UnsafePickle(f"it calls `{function.name}` in a way that arrays do without") from None

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        fits = isinstance(state, tuple)
        if fits and isinstance(target, PickledArray) and target.dtype is None and len(state) == 5:
            _, shape, dtype, by_columns, data = state
            _fill_array(self, target, dtype, shape, data, by_columns is True)
        elif fits and isinstance(target, _Dtype) and len(state) >= 2 and state[1] in ("<", ">", "|", "="):
            if any(part is not None for part in state[2:5]):
                raise UnsafePickle("it has an array of records")
            target.order = state[1]
        else:
            raise UnsafePickle(f"it sets the state of a {type(target).__name__}")


def _shown(name: Any) -> str:
    if not isinstance(name, str):
        return type(name).__name__
    return name[:80] if name.isprintable() else ascii(name[:80])


def _dtype(machine: _Machine, code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str) or len(code) > 80 or code.lstrip("<>=|") not in _DTYPES:
        shown = "Python objects" if isinstance(code, str) and code.lstrip("|")[:1] == "O" else f"dtype {_shown(code)}"
        raise UnsafePickle(f"it has an array of {shown}; arrays of numbers are read and nothing else")
    number = code.lstrip("<>=|")
    return _Dtype(number, code[0] if code != number else "=")


def _array(machine: _Machine, cls: Any, *_: Any) -> PickledArray:
    if cls != _Global("ndarray"):
        raise TypeError
    machine.unfilled += 1
    return PickledArray()


def _whole_array(machine: _Machine, dtype: Any, shape: Any, data: Any, by_columns: bool = False) -> PickledArray:
    array = _array(machine, _Global("ndarray"))
    _fill_array(machine, array, dtype, shape, data, by_columns)
    return array


def _fill_array(machine: _Machine, array: PickledArray, dtype: Any, shape: Any, data: Any, by_columns: bool) -> None:
    if isinstance(data, str):  # Python 2 wrote bytes as texts
        data = _encode(machine, data, "latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise UnsafePickle("it has an array of something other than numbers")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("an array has no shape")
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) * _DTYPES[dtype.code] > MAX_BYTES:
        raise ValueError(f"an array has the shape {list(shape[:8])}")
    if math.prod(shape) * _DTYPES[dtype.code] != len(data):
        raise ValueError(f"an array of shape {list(shape[:8])} and dtype {dtype.code} has {len(data)} bytes")
    machine.spend(len(data))  # not copied here, but by those who make a tensor of it
    machine.unfilled -= 1
    array.dtype, array.shape, array.data, array.by_columns = dtype, shape, data, by_columns


def _encode(machine: _Machine, text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise TypeError
    machine.spend(len(text))
    return text.encode("latin-1")


def _tuple(machine: _Machine, items: Any) -> tuple:
    if not isinstance(items, tuple | list):
        raise TypeError
    machine.spend(len(items))
    return tuple(items)


def _empty(make: Callable[[], Any]) -> Callable[[_Machine], Any]:
    return lambda _: make()


_CALLS: dict[str, Callable[..., Any]] = {
    "array": _array,
    "scalar": lambda machine, dtype, data: _whole_array(machine, dtype, (), data),
    "buffer": lambda machine, data, dtype, shape, order: _whole_array(machine, dtype, shape, data, order == "F"),
    "dtype": _dtype,
    "encode": _encode,
    "tuple": _tuple,
    "bytes": _empty(bytes),
    "dict": _empty(dict),
}


def _steps() -> dict[str, Callable[[_Machine, Any], Any]]:
    def value(machine: _Machine, argument: Any) -> None:
        machine.push(argument)

    def constant(made: Any) -> Callable[[_Machine, Any], None]:
        return lambda machine, _: machine.push(made)

    def fresh(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
        return lambda machine, _: machine.push(make())

    def nothing(machine: _Machine, _: Any) -> None:
        pass

    def last_as_tuple(count: int) -> Callable[[_Machine, Any], None]:
        def step(machine: _Machine, _: Any) -> None:
            machine.push(tuple(reversed([machine.pop() for _ in range(count)])))

        return step

    def keep(machine: _Machine, number: Any) -> None:
        machine.memo[len(machine.memo) if number is None else number] = machine.stack[-1]

    def as_dict(machine: _Machine, _: Any) -> None:
        pairs = machine.popped()
        machine.push({})
        machine.fill(pairs)

    def set_item(machine: _Machine, _: Any) -> None:
        item, key = machine.pop(), machine.pop()
        machine.fill([key, item])

    def append(machine: _Machine, _: Any) -> None:
        item = machine.pop()
        machine.last(list).append(item)

    def extend(machine: _Machine, _: Any) -> None:
        items = machine.popped()
        machine.last(list).extend(items)

    def stack_global(machine: _Machine, _: Any) -> None:
        name, module = machine.pop(), machine.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise UnsafePickle("the name of a global is no text")
        machine.name(module, name)

    values = (
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
        "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
    )
    return {
        **dict.fromkeys(values.split(), value),
        **dict.fromkeys(["PROTO", "FRAME", "STOP"], nothing),
        **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"], keep),
        **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, number: machine.push(machine.memo[number])),
        "NONE": constant(None),
        "NEWTRUE": constant(True),
        "NEWFALSE": constant(False),
        "EMPTY_DICT": fresh(dict),
        "EMPTY_LIST": fresh(list),
        "EMPTY_TUPLE": constant(()),
        "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
        "POP": lambda machine, _: machine.pop(),
        "POP_MARK": lambda machine, _: machine.popped(),
        "TUPLE": lambda machine, _: machine.push(tuple(machine.popped())),
        "TUPLE1": last_as_tuple(1),
        "TUPLE2": last_as_tuple(2),
        "TUPLE3": last_as_tuple(3),
        "LIST": lambda machine, _: machine.push(machine.popped()),
        "DICT": as_dict,
        "SETITEM": set_item,
        "SETITEMS": lambda machine, _: machine.fill(machine.popped()),
        "APPEND": append,
        "APPENDS": extend,
        "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
        "STACK_GLOBAL": stack_global,
        "REDUCE": lambda machine, _: machine.call(),
        "BUILD": lambda machine, _: machine.build(),
    }


_STEPS = _steps()
