"""One class per block definition.

The definition is run once with formulas for its sizes. Every op writes a line into the constructor (where it has
weights or hyperparameters of its own) and an expression into `forward`. An `if` whose outcome is the same wherever the
model uses the block leaves no trace; the others become an `if` of the emitted source.
"""

from __future__ import annotations

import keyword
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tokenmix.blocks.op import KINDS, Op, Tensor
from tokenmix.blocks.ops import find_op
from tokenmix.compiler.bind import bind, hyperparameters, is_word
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.elaborate import Elaborator, default_value
from tokenmix.compiler.emit.formulas import (
    _LEVEL,
    Formula,
    Leaf,
    Recorder,
    Symbol,
    comment,
    hint_of,
    is_symbolic,
    leaves_of,
    rendering,
    symbol,
)
from tokenmix.compiler.graph import BlockGraph
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, Rate, names_in

__all__ = ["ClassText", "Emitter", "docstring", "literal"]

WIDTH = 120  # columns of the emitted source
_CHAIN = 3  # calls inside calls on one line, at most


@dataclass
class ClassText:
    """An emitted class.

    Attributes:
        arguments: constructor arguments that stand for channels of the inputs: name -> (input, letter).
        parameters: hyperparameters that the class takes, in order.
        text: the source.
    """

    name: str
    channels: dict[str, int]
    parameters: list[str]
    text: str = ""


def literal(value: Any) -> str:
    """A checked constant as Python source: numbers, booleans, words and lists of them. Nothing else gets through."""
    if isinstance(value, tuple):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, Fraction):
        value = float(value)
    if isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(float(value))
    raise TypeError(f"no literal for {value!r}")


def docstring(lines: Sequence[str], indent: str) -> list[str]:
    """Lines of a docstring; what could end it early is escaped."""
    clean = [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH - len(indent), subsequent_indent=line[: len(line) - len(line.lstrip())])
        or [""]
    ]
    clean = [line.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') for line in clean]
    if len(clean[0]) > WIDTH - len(indent) - 3:
        clean[:1] = textwrap.wrap(clean[0], WIDTH - len(indent) - 3)
    if len(clean) == 1 and len(clean[0]) < WIDTH - len(indent) - 6 and not clean[0].endswith('"'):
        return [f'{indent}"""{clean[0]}"""']
    return [f'{indent}"""{clean[0]}', *[f"{indent}{line}".rstrip() for line in clean[1:]], f'{indent}"""']


def paragraphs(doc: Sequence[str]) -> list[str]:
    """A block's doc comment as lines of a docstring: its first sentence, the rest, its source."""
    rest, source = [], []
    for line in doc:
        (source if source or line.startswith("Source:") else rest).append(line)
    lines: list[str] = []
    summary, _, more = " ".join(rest).partition(". ")
    for text in (summary + ("." if more else ""), more, " ".join(source)):
        if text:
            lines += ["", text] if lines else [text]
    return lines


class Emitter:
    """Writes the classes of one model.

    Args:
        elaborator: has elaborated every use of every block in the model.

    Attributes:
        classes: finished classes, callees before their callers.
        helpers: names used from `tokenmix.blocks.kernels`.
    """

    def __init__(self, elaborator: Elaborator, taken: set[str]):
        self.elaborator = elaborator
        self.library = elaborator.library
        self.classes: list[ClassText] = []
        self.helpers: set[str] = set()
        self._done: dict[tuple, ClassText] = {}
        self._taken = taken

    def class_of(self, definition: Definition, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> ClassText:
        """The class of a block for inputs of these kinds and these words, written at the first call."""
        key = (definition, *_choice(definition, inputs, arguments))
        if key not in self._done:
            instance = self.instance(definition, inputs, arguments)
            self._done[key] = _ClassWriter(self, definition, instance, self._name(definition.name)).write()
            self.classes.append(self._done[key])
        return self._done[key]

    def instance(self, definition: Definition, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> BlockGraph:
        """A use of the block in the model that runs through the same lines."""
        choice = _choice(definition, inputs, arguments)
        for graph in self.elaborator.instances.get(definition, []):
            if _choice(definition, graph.inputs, graph.arguments) == choice:
                return graph
        raise Mistake(
            "TM1702",
            f"block `{definition.name}` stands where the model never comes at its default input size",
            definition.signature.span,
            help="choose an `input` at which every block is reached",
        )

    def _name(self, block: str) -> str:
        base = "".join(part.capitalize() for part in block.split("_"))
        if keyword.iskeyword(base) or base in ("Tensor", "OrderedDict"):
            base += "Block"
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}{number}" if number > 2 else f"{base}Block"
        self._taken.add(name)
        return name


def _choice(definition: Definition, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple:
    """What decides which lines a class has: kinds of the inputs, and hyperparameters that choose among words."""
    words = tuple(arguments[p.name] for p in definition.signature.parameters if _is_choice(p))
    return tuple(t.kind for t in inputs), words


def _is_choice(parameter: syntax.Parameter) -> bool:
    return parameter.type is not None and len(parameter.type.names) > 1


@dataclass
class _Value:
    """A tensor in `forward`: the expression that makes it, and its shape in formulas."""

    code: str
    tensor: Tensor
    calls: int = 0  # calls nested in the expression

    def __str__(self) -> str:
        return f"a {self.tensor.kind}"


@dataclass
class _Several:
    """What an op with several outputs gives: one expression that makes them all."""

    code: str
    tensors: tuple[Tensor, ...]
    calls: int = 0


@dataclass
class _Module:
    declaration: syntax.ModuleDecl
    tensors: tuple[Tensor, ...] | None = None


@dataclass
class _Arm:
    """An `if` that surrounds what is being written: its condition, or the negation of it."""

    condition: Any
    positive: bool = True


@dataclass
class _Lines:
    """Lines of a method under construction, indented as they come."""

    lines: list[str] = field(default_factory=list)
    depth: int = 2

    def add(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    @contextmanager
    def indented(self):
        self.depth += 1
        before = len(self.lines)
        try:
            yield
        finally:
            self.depth -= 1
            if len(self.lines) == before:
                self.lines.append("")  # marks an empty body; the writer removes its head


class _ClassWriter(Evaluator):
    def __init__(self, emitter: Emitter, definition: Definition, instance: BlockGraph, name: str):
        self.emitter = emitter
        self.definition = definition
        self.instance = instance
        self.environment: dict[str, Any] = {}
        super().__init__(self.environment, f"block `{definition.name}`")
        self.recorder = Recorder()
        self.text = ClassText(name, {}, [])
        self.init = _Lines()
        self.forward = _Lines()
        self._checks: set[str] = set()
        self._result_type = "Tensor"
        self.arms: list[_Arm] = []
        self.loops: list[tuple[Leaf, Any, Any]] = []
        self.pending: list[set[str]] = []  # names that the rest of the expression being written still reads
        self._bind_inputs()

    def _bind_inputs(self) -> None:
        signature = self.definition.signature
        self.inputs: list[Tensor] = []
        for i, (declared, tensor) in enumerate(zip(signature.inputs, self.instance.inputs, strict=True)):
            dims = []
            for letter, number in zip(KINDS[tensor.kind], tensor.dims, strict=True):
                if letter == "C":
                    argument = "dim" if i == 0 else f"{declared.name}_dim"
                    while argument in {p.name for p in signature.parameters}:
                        argument = f"in_{argument}"
                    self.text.channels[argument] = i
                    dims.append(Formula.of(Leaf(argument, "argument", "C" if i == 0 else f"C_{declared.name}"), number))
                else:
                    name = letter if i == 0 else f"{letter}_{declared.name}"
                    dims.append(Formula.of(Leaf(name, "size", letter), number))
            symbolic = Tensor(tensor.kind, tuple(dims))
            self.inputs.append(symbolic)
            self.environment[declared.name] = _Value(declared.name, symbolic)
        first = self.inputs[0]
        for letter in first.letters:
            if letter in "CHWN":
                self.environment[letter] = getattr(first, letter)
        for parameter in signature.parameters:
            self.environment[parameter.name] = self._parameter(parameter)

    def _parameter(self, parameter: syntax.Parameter) -> Any:
        value = self.instance.arguments[parameter.name]
        if _is_choice(parameter):
            return value  # words choose what is written: each choice is a class of its own
        leaf = Leaf(parameter.name, "argument")
        if isinstance(value, int) and not isinstance(value, bool):
            return Formula.of(leaf, value)
        return symbol("{}", leaf, hint=value)

    # The whole class

    def write(self) -> ClassText:
        self._statements(self.definition.block.body)
        self._write_sizes()
        head = self._constructor()
        doc = paragraphs(self.definition.block.doc) or [f"Block `{self.definition.name}`."]
        lines = [f"class {self.text.name}(nn.Module):", *docstring(doc, "    "), "", *head]
        tensors = ", ".join(f"{i.name}: Tensor" for i in self.definition.signature.inputs)
        lines += ["", f"    def forward(self, {tensors}) -> {self._result_type}:", *self.forward.lines]
        self.text.text = "\n".join(line.rstrip() for line in lines)
        return self.text

    def _write_sizes(self) -> None:
        """Names for the sizes that `forward` mentions, at its top."""
        top = []
        for declared, tensor in zip(self.definition.signature.inputs, self.inputs, strict=True):
            names = [str(d) if isinstance(d, Formula) and leaves_of(d) <= _leaves("size") else "" for d in tensor.layout[:-1]]
            used = [n for n in names if n in self.recorder.sizes]
            if used:
                if len(names) == 2:
                    top.append(f"        {', '.join(n if n in used else '_' for n in names)} = {declared.name}.shape[1:3]")
                else:
                    top += [f"        {n} = {declared.name}.shape[{i + 1}]" for i, n in enumerate(names) if n in used]
        self.forward.lines[:0] = top

    def _constructor(self) -> list[str]:
        used = self.recorder.arguments
        self.text.channels = {name: i for name, i in self.text.channels.items() if name in used}
        parameters = [p for p in self.definition.signature.parameters if p.name in used]
        parameters.sort(key=lambda p: p.default is not None)
        self.text.parameters = [p.name for p in parameters]
        arguments = [f"{name}: int" for name in self.text.channels]
        for parameter in parameters:
            text = f"{parameter.name}: {self._annotation(parameter)}"
            if parameter.default is not None:
                text += f" = {literal(default_value(parameter, self.definition.name))}"
            arguments.append(text)
        if not self.init.lines and not self.recorder.stored:
            return self._no_constructor(arguments)
        stored = [f"        self.{name} = {name}" for name in [*self.text.channels, *self.text.parameters] if name in self.recorder.stored]
        checks = [line for line in self.init.lines if line in self._checks]
        rest = [line for line in self.init.lines if line not in self._checks]
        head = f"    def __init__(self, {', '.join(arguments)}):"
        if len(head) > WIDTH:
            head = "    def __init__(\n        self,\n        " + ",\n        ".join(arguments) + ",\n    ):"
        return [head, "        super().__init__()", *checks, *stored, *rest]

    def _no_constructor(self, arguments: list[str]) -> list[str]:
        # Nothing to set up: torch's own constructor does.
        self.text.channels, self.text.parameters = {}, []
        return []

    def _annotation(self, parameter: syntax.Parameter) -> str:
        names = {"int": "int", "odd": "int", "float": "float", "rate": "float", "bool": "bool", "str": "str"}
        if parameter.type is not None:
            base = names.get(parameter.type.names[0], "str") if len(parameter.type.names) == 1 else "str"
            return f"list[{base}]" if parameter.type.many else base
        value = hint_of(self.instance.arguments[parameter.name])
        return "list" if isinstance(value, tuple) else type(value).__name__

    # Statements

    def _statements(self, body: Sequence[syntax.Statement]) -> None:
        for i, statement in enumerate(body):
            self._rest = body[i + 1 :]
            self._statement(statement)

    def _statement(self, statement: syntax.Statement) -> None:
        if isinstance(statement, syntax.Assign):
            self._assign(statement)
        elif isinstance(statement, syntax.Return):
            self._return(statement)
        elif isinstance(statement, syntax.Require):
            self._require(statement)
        elif isinstance(statement, syntax.ModuleDecl):
            self.environment[statement.name.name] = _Module(statement)
        elif isinstance(statement, syntax.If):
            self._if(statement)
        elif isinstance(statement, syntax.For):
            self._for(statement)

    def _assign(self, statement: syntax.Assign) -> None:
        names = [t.name for t in statement.targets]
        value = self._flowing(statement.value, names[0] if len(names) == 1 else "")
        if isinstance(value, _Value):
            self._set(names[0], value)
        elif isinstance(value, _Several) or isinstance(value, tuple) and value and isinstance(value[0], _Value):
            several = value if isinstance(value, _Several) else _Several(", ".join(v.code for v in value), tuple(v.tensor for v in value))
            for name, tensor in zip(names, several.tensors, strict=True):
                self.environment[name] = _Value(name, tensor)
            shapes = {comment(t.layout) for t in several.tensors}
            self._line(f"{', '.join(names)} = {several.code}", f"each {shapes.pop()}" if len(shapes) == 1 else "")
        elif len(names) == 1:
            self._number_variable(names[0], value)
        else:
            for name, part in zip(names, value, strict=True):
                self._number_variable(name, part)

    def _number_variable(self, name: str, value: Any) -> None:
        # Numbers are written where they are used. One that changes from round to round of a loop has no such form.
        if self.loops and name in self.environment and self.environment[name] != value:
            raise Mistake(
                "TM1702", f"the number `{name}` changes from round to round of a loop", self.definition.signature.span,
                help="write it as a function of the loop variable",
            )  # fmt: skip
        self.environment[name] = value

    def _set(self, name: str, value: _Value) -> None:
        before = self.environment.get(name)
        self.environment[name] = _Value(name, value.tensor)
        if value.code == name:
            return
        shape = comment(value.tensor.layout)
        same = isinstance(before, _Value) and before.tensor == value.tensor
        self._line(f"{name} = {value.code}", "" if same else shape)

    def _line(self, code: str, remark: str = "") -> None:
        indent = 4 * self.forward.depth
        if remark and indent + len(code) + len(remark) + 4 <= WIDTH:
            code = f"{code}  # {remark}"
        self.forward.add(code)

    def _return(self, statement: syntax.Return) -> None:
        values = []
        for i, expr in enumerate(statement.values):
            self.pending.append({n for later in statement.values[i + 1 :] for n in names_in(later)})
            values.append(self._flowing(expr, self.definition.signature.inputs[0].name))
            self.pending.pop()
        self._result_type = "Tensor" if len(values) == 1 else f"tuple[{', '.join(['Tensor'] * len(values))}]"
        shapes = [comment(v.tensor.layout) for v in values]
        last = self.forward.lines[-1].strip() if self.forward.lines else ""
        if len(values) == 1 and last.startswith(f"{values[0].code} = ") and not self.forward.lines[-1].startswith(" " * (4 * self.forward.depth + 1)):
            # `x = f(x)` and `return x` are one line.
            self.forward.lines.pop()
            values[0].code = last.split(" = ", 1)[1].split("  # ")[0]
        self._line(f"return {', '.join(v.code for v in values)}", shapes[0] if len(values) == 1 else "")

    def _require(self, statement: syntax.Require) -> None:
        condition = self.value(statement.condition)
        if not is_symbolic(condition):
            return
        message = statement.message or f"{statement.condition.span.text} does not hold"
        at_run_time = any(leaf.role == "size" for leaf in leaves_of(condition))
        lines = self.forward if at_run_time else self.init
        with self._code(forward=at_run_time):
            text = str(_negated(condition))
        first = len(lines.lines)
        lines.add(f"if {text}:")
        lines.add(f"    raise ValueError({_quoted(message)})")
        if not at_run_time and not self.arms:
            self._checks |= set(lines.lines[first:])

    def _if(self, statement: syntax.If) -> None:
        condition = self.value(statement.condition)
        taken = self.emitter.elaborator.branches.get(id(statement), {True, False})
        runtime = any(leaf.role == "size" for leaf in leaves_of(condition))
        if isinstance(condition, bool):
            taken = {condition}
        if len(taken) == 1 and not runtime:
            self._statements(statement.then if True in taken else statement.otherwise)
            return
        if self._optional_layer(statement, condition):
            return
        with self._code(forward=True):
            head = f"if {condition}:"
        before = dict(self.environment)
        self.forward.add(head)
        first = len(self.forward.lines) - 1
        self._arm(statement.then, _Arm(condition, True))
        then = dict(self.environment)
        self.environment.clear()
        self.environment.update(before)
        otherwise = len(self.forward.lines)
        if statement.otherwise:
            self.forward.add("else:")
            self._arm(statement.otherwise, _Arm(condition, False))
            if self.forward.lines[-1] == "" and otherwise == len(self.forward.lines) - 2:
                del self.forward.lines[otherwise:]
        if self.forward.lines[first + 1] == "":
            # Nothing happens in the first arm.
            if len(self.forward.lines) == first + 2:
                del self.forward.lines[first:]
            else:
                self.forward.lines[first + 1] = "    " * (self.forward.depth + 1) + "pass"
        for name, value in then.items():
            other = self.environment.get(name)
            if isinstance(value, _Value) and isinstance(other, _Value) and value.tensor != other.tensor:
                if _comparable(value.tensor, other.tensor):
                    continue  # equal where it counts: channels and kind
                raise Mistake(
                    "TM1702", f"`{name}` has different channels in the two arms of an `if`", statement.span,
                    help="let both arms give the same shape",
                )  # fmt: skip
            self.environment.setdefault(name, value)

    def _arm(self, body: Sequence[syntax.Statement], arm: _Arm) -> None:
        self.arms.append(arm)
        with self.forward.indented():
            self._statements(body)
        self.arms.pop()

    def _optional_layer(self, statement: syntax.If, condition: Any) -> bool:
        """`if ...: x = x |> layer` becomes a layer that is the identity otherwise."""
        if statement.otherwise or len(statement.then) != 1 or self.loops or any(l.role == "size" for l in leaves_of(condition)):
            return False
        (inner,) = statement.then
        if not (
            isinstance(inner, syntax.Assign)
            and len(inner.targets) == 1
            and isinstance(inner.value, syntax.Pipe)
            and len(inner.value.calls) == 1
            and isinstance(inner.value.source, syntax.Name)
            and inner.value.source.name == inner.targets[0].name
            and not inner.value.calls[0].tensors
        ):
            return False
        call = inner.value.calls[0]
        target = self.emitter.library.find(call.callee)
        name = inner.targets[0].name
        value = self.environment.get(name)
        if target is None or not isinstance(value, _Value):
            return False
        arguments = self._arguments(target, call)
        constructor, outputs = self._construct(target, call, arguments, (value.tensor,))
        if constructor is None or len(outputs) != 1:
            return False
        with self._code():
            test = str(condition)
        label = self.definition.labels[id(call)]
        self.init.add(f"self.{label} = {constructor} if {test} else nn.Identity()")
        self._set(name, _Value(f"self.{label}({value.code})", outputs[0]))
        return True

    def _for(self, statement: syntax.For) -> None:
        start, stop = self.value(statement.start), self.value(statement.stop)
        leaf = Leaf(statement.variable.name, "loop")
        outer = self.environment.get(leaf.name)
        before = dict(self.environment)
        self.environment[leaf.name] = Formula.of(leaf, hint_of(start))
        self.loops.append((leaf, start, stop))
        with self._code(forward=True):
            head = f"for {leaf.name} in {_range(start, stop)}:"
        self.forward.add(head)
        first = len(self.forward.lines)
        with self.forward.indented():
            self._statements(statement.body)
        if self.forward.lines[first] == "":
            del self.forward.lines[first - 1 :]
        self.loops.pop()
        for name, value in before.items():
            now = self.environment.get(name)
            if isinstance(value, _Value) and isinstance(now, _Value) and not _comparable(value.tensor, now.tensor):
                raise Mistake(
                    "TM1702", f"the channels of `{name}` change from round to round of the loop", statement.variable.span,
                    help="write the rounds out, or give them to a stage's `blocks`",
                )  # fmt: skip
        if outer is not None:
            self.environment[leaf.name] = outer

    # Expressions

    @contextmanager
    def _code(self, *, forward: bool = False):
        with rendering(forward=forward, recorder=self.recorder):
            yield

    def _flowing(self, expr: syntax.Expr, target: str) -> Any:
        """Value of the expression of a statement; a long pipe is cut into lines that go through `target`."""
        if not isinstance(expr, syntax.Pipe):
            return self.value(expr)
        value = self._flowing(expr.source, target)
        for i, call in enumerate(expr.calls):
            reads = {n for later in expr.calls[i:] for n in names_in(later)}.union(*self.pending)
            if isinstance(value, _Value) and target and target not in reads and self._is_full(value, call, target):
                self._set(target, value)
                value = self.environment[target]
            value = self._apply(call, (self._tensor(value),))
        return value

    def _is_full(self, value: _Value, call: syntax.Call, target: str) -> bool:
        """Whether the line that makes `value` should end before another call is put around it."""
        around = len(self.definition.labels.get(id(call), call.callee)) + len("self.()")
        return value.calls >= _CHAIN or 4 * self.forward.depth + len(f"{target} = {value.code}") + around > WIDTH

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        return getattr(value.tensor, expr.dim)

    def negate(self, expr: syntax.Unary, operand: Any) -> Any:
        if isinstance(operand, _Value):
            return self._op("scale", (operand,), {"by": -1})
        if is_symbolic(operand):
            if isinstance(operand, Formula):
                return -operand if expr.op == "-" else operand
            return symbol(expr.op + "{}", operand, level=_LEVEL["sign"], inner=_LEVEL["sign"])
        return super().negate(expr, operand)

    def eval_unary(self, expr: syntax.Unary) -> Any:
        if expr.op == "not":
            operand = self.value(expr.operand)
            return _negated(operand) if is_symbolic(operand) else not operand
        return super().eval_unary(expr)

    def logic(self, expr: syntax.Binary) -> Any:
        left, right = self.value(expr.left), self.value(expr.right)
        if not is_symbolic(left):
            return left if left == (expr.op == "or") else right
        if not is_symbolic(right):
            return right if right == (expr.op == "or") else left
        level = _LEVEL[expr.op]
        return Symbol("{} " + expr.op + " {}", ((left, level), (right, level + 1)), level)

    def combine(self, expr: syntax.Binary, left: Any, right: Any) -> Any:
        tensors = [v for v in (left, right) if isinstance(v, _Value)]
        if tensors:
            return self._combine_tensors(expr.op, left, right)
        if not is_symbolic(left) and not is_symbolic(right):
            return super().combine(expr, left, right)
        if expr.op in ("==", "!=", "<", "<=", ">", ">="):
            level = _LEVEL["compare"]
            return Symbol("{} " + expr.op + " {}", ((left, level + 1), (right, level + 1)), level)
        if all(_is_integral(v) for v in (left, right)):
            return _INTEGRAL[expr.op](left, right)
        level = _LEVEL[expr.op]
        return Symbol("{} " + expr.op + " {}", ((left, level), (right, level + 1)), level, Rate(False))

    def _combine_tensors(self, op: str, left: Any, right: Any) -> _Value:
        if isinstance(left, _Value) and isinstance(right, _Value):
            return self._op({"+": "add", "-": "sub", "*": "mul"}[op], (left, right), {})
        tensor, number = (left, right) if isinstance(left, _Value) else (right, left)
        if op == "*":
            return self._op("scale", (tensor,), {"by": number})
        if op == "/":
            with self._code(forward=True):
                by = symbol("1 / {}", number, level=_LEVEL["/"], inner=_LEVEL["/"] + 1) if is_symbolic(number) else float(Fraction(1) / Fraction(number))
            return self._op("scale", (tensor,), {"by": by})
        if op == "+":
            return self._op("shift", (tensor,), {"by": number})
        if tensor is left:
            with self._code(forward=True):
                code = f"{tensor.code} - {number}"
            return _Value(code, tensor.tensor, tensor.calls)
        with self._code(forward=True):
            return _Value(f"{number} - {_operand_code(tensor.code)}", tensor.tensor, tensor.calls)

    def eval_conditional(self, expr: syntax.Conditional) -> Any:
        condition = self.value(expr.condition)
        if not is_symbolic(condition):
            return self.value(expr.then if condition else expr.otherwise)
        then, otherwise = self.value(expr.then), self.value(expr.otherwise)
        made = Symbol("{} if {} else {}", ((then, 1), (condition, 1), (otherwise, 0)), 0, hint_of(then))
        return Formula.of(made, hint_of(then)) if _is_integral(then) and _is_integral(otherwise) else made

    def eval_index(self, expr: syntax.Index) -> Any:
        base, index = self.value(expr.base), self.value(expr.index)
        if not is_symbolic(base) and not is_symbolic(index):
            return super().eval_index(expr)
        entries = hint_of(base)
        hint = entries[0] if isinstance(entries, tuple) and entries else None
        made = Symbol("{}[{}]", ((base, 9), (index, 0)), 9, hint)
        return Formula.of(made, hint) if isinstance(hint, int) and not isinstance(hint, bool) else made

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        if not any(is_symbolic(v) for v in values):
            return super().function(expr, values)
        name = expr.callee
        if name in ("floor", "ceil") and isinstance(values[0], Formula):
            if name == "floor":
                return Formula.of(symbol("{}", values[0], level=values[0].level), values[0].hint)
            return -(-values[0] // 1) if values[0]._is_whole() else Formula.of(symbol("-(-{})", values[0], level=_LEVEL["sign"], inner=_LEVEL["sign"]))
        template = ("math." if name in ("floor", "ceil", "sqrt") else "") + name + "(" + ", ".join(["{}"] * len(values)) + ")"
        hints = [hint_of(v) for v in values]
        hint = None
        if None not in hints:
            hint = super().function(expr, hints)
        made = symbol(template, *values, hint=hint)
        return Formula.of(made, hint) if isinstance(hint, int) else made

    def eval_pipe(self, expr: syntax.Pipe) -> Any:
        return self._flowing(expr, "")

    def eval_call(self, expr: syntax.Call) -> Any:
        if self.emitter.library.find(expr.callee) is None and expr.callee in FUNCTIONS:
            return super().eval_call(expr)
        return self._apply(expr, ())

    def _tensor(self, value: Any) -> _Value:
        assert isinstance(value, _Value), value
        return value

    def _op(self, name: str, values: tuple[_Value, ...], arguments: dict[str, Any]) -> _Value:
        op = find_op(name)
        assert op is not None
        inputs = tuple(v.tensor for v in values)
        output = op.shape(*inputs, **arguments)
        assert isinstance(output, Tensor)
        with self._code(forward=True):
            code = op.forward(*(v.code for v in values), inputs=inputs, **arguments)
        self.emitter.helpers |= set(op.helpers)
        return _Value(code, output, max(v.calls for v in values))

    def _apply(self, call: syntax.Call, flowing: tuple[_Value, ...]) -> Any:
        module = self.environment.get(call.callee)
        target = None if isinstance(module, _Module) else self.emitter.library.find(call.callee)
        values = list(flowing)
        arguments_are_tensors = target is None or target.signature.inputs
        for i, argument in enumerate(call.tensors if arguments_are_tensors else ()):
            self.pending.append({n for later in call.tensors[i + 1 :] for n in names_in(later.value)})
            values.append(self._tensor(self.value(argument.value)))
            self.pending.pop()
        if isinstance(module, _Module):
            return self._apply_module(module, tuple(values))
        assert target is not None
        arguments = self._arguments(target, call)
        return self._call(target, call, arguments, tuple(values), self.definition.labels[id(call)])

    def _apply_module(self, module: _Module, values: tuple[_Value, ...]) -> Any:
        call = module.declaration.call
        target = self.emitter.library.find(call.callee)
        assert target is not None
        label = module.declaration.name.name
        arguments = self._arguments(target, call)
        inputs = tuple(v.tensor for v in values)
        constructor, outputs = self._construct(target, call, arguments, inputs)
        if constructor is None:
            return self._function(target, arguments, values, outputs)
        if module.tensors is None:
            module.tensors = inputs
            self.init.lines.append("        " + f"self.{label} = {constructor}")
        return _result(f"self.{label}({', '.join(v.code for v in values)})", outputs, values)

    def _arguments(self, target: Definition | Op, call: syntax.Call) -> dict[str, Any]:
        def value(parameter: syntax.Parameter, expr: syntax.Expr) -> Any:
            if is_word(parameter, expr, self.environment):
                return expr.name  # type: ignore[union-attr]
            return self.value(expr)

        return bind(target.signature, call, value, lambda p: default_value(p, target.name))

    def _construct(
        self, target: Definition | Op, call: syntax.Call, arguments: dict[str, Any], inputs: tuple[Tensor, ...]
    ) -> tuple[str | None, tuple[Tensor, ...]]:
        """Constructor call of a submodule (None for a function), and its outputs."""
        if isinstance(target, Op):
            outputs = target.shape(*inputs, **arguments)
            self.emitter.helpers |= set(target.helpers)
            recorder = Recorder()
            with rendering(recorder=recorder):
                constructor = target.module(*inputs, **arguments)
            if recorder.sizes:
                raise Mistake(
                    "TM1702", f"the weights of `{call.callee}` would depend on the input size", call.span,
                    help="a size that weights depend on is a hyperparameter",
                )  # fmt: skip
            if constructor is not None:
                self.recorder.arguments |= recorder.arguments
            return constructor, outputs if isinstance(outputs, tuple) else (outputs,)
        text = self.emitter.class_of(target, inputs, arguments)
        given = {a.name for a in match_names(target, call)}
        with self._code():
            parts = [str(inputs[i].C) for i in text.channels.values()]
            parts += [f"{name}={_text(arguments[name])}" for name in text.parameters if name in given]
        shadow = _Shadow(self.emitter, target, self.emitter.instance(target, inputs, arguments), "")
        return f"{text.name}({', '.join(parts)})", shadow.results(inputs, arguments)

    def _call(
        self, target: Definition | Op, call: syntax.Call, arguments: dict[str, Any], values: tuple[_Value, ...], label: str
    ) -> Any:
        constructor, outputs = self._construct(target, call, arguments, tuple(v.tensor for v in values))
        if constructor is None:
            assert isinstance(target, Op)
            return self._function(target, arguments, values, outputs)
        place = self._place(label, constructor)
        if isinstance(target, Op) and target.is_parameter:
            return _Value(place, outputs[0])
        return _result(f"{place}({', '.join(v.code for v in values)})", outputs, values)

    def _function(
        self, target: Definition | Op, arguments: dict[str, Any], values: tuple[_Value, ...], outputs: tuple[Tensor, ...]
    ) -> Any:
        assert isinstance(target, Op)
        with self._code(forward=True):
            code = target.forward(*(v.code for v in values), inputs=tuple(v.tensor for v in values), **arguments)
        return _result(code, outputs, values)

    def _place(self, label: str, constructor: str) -> str:
        """Put a submodule into the constructor where the loops and conditions around it say; how `forward` finds it."""
        conditions = []
        for arm in self.arms:
            if any(leaf.role == "size" for leaf in leaves_of(arm.condition)):
                continue  # which way it goes is known at run time only; the layer must be there
            conditions.append(arm.condition if arm.positive else _negated(arm.condition))
        test: Any = None
        for condition in conditions:
            level = _LEVEL["and"]
            test = condition if test is None else Symbol("{} and {}", ((test, level), (condition, level + 1)), level)
        with self._code():
            tested = str(test) if test is not None else ""
            ranges = " ".join(f"for {leaf.name} in {_range(start, stop)}" for leaf, start, stop in self.loops)
        if not self.loops:
            line = f"self.{label} = {constructor}"
            if tested:
                self.init.lines += [f"        if {tested}:", f"            {line}"]
            else:
                self.init.lines.append(f"        {line}")
            return f"self.{label}"
        variables = [leaf.name for leaf, _, _ in self.loops]
        if len(variables) == 1 and not tested and self.loops[0][1] == 0:
            made = f"nn.ModuleList({constructor} {ranges})"
            if len(made) + len(label) > WIDTH - 16:
                made = f"nn.ModuleList(\n            {constructor}\n            {ranges}\n        )"
            self.init.lines.append(f"        self.{label} = {made}")
            return f"self.{label}[{variables[0]}]"
        key = f"str({variables[0]})" if len(variables) == 1 else 'f"' + "_".join(f"{{{v}}}" for v in variables) + '"'
        test_text = f" if {tested}" if tested else ""
        self.init.lines += [
            f"        self.{label} = nn.ModuleDict({{",
            f"            {key}: {constructor}",
            f"            {ranges}{test_text}",
            "        })",
        ]
        return f"self.{label}[{key}]"


class _Shadow(_ClassWriter):
    """Runs a called block for the shape of its results in the caller's formulas, and writes nothing."""

    def results(self, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        for declared, tensor in zip(self.definition.signature.inputs, inputs, strict=True):
            self.environment[declared.name] = _Value(declared.name, tensor)
        for letter in inputs[0].letters:
            if letter in "CHWN":
                self.environment[letter] = getattr(inputs[0], letter)
        self.environment.update(arguments)
        helpers = set(self.emitter.helpers)
        try:
            self._statements(self.definition.block.body)
        finally:
            self.emitter.helpers = helpers
        return self._returned

    def _return(self, statement: syntax.Return) -> None:
        self._returned = tuple(self._flowing(expr, "").tensor for expr in statement.values)


def match_names(target: Definition | Op, call: syntax.Call) -> list[syntax.Argument]:
    """The hyperparameters a call gives, each under its parameter's name."""
    from dataclasses import replace

    from tokenmix.compiler.bind import match_arguments

    matched, _ = match_arguments(target.signature, hyperparameters(target.signature, call), call)
    return [replace(argument, name=name) for name, argument in matched.items()]


def _result(code: str, outputs: tuple[Tensor, ...], values: tuple[_Value, ...]) -> Any:
    calls = max((v.calls for v in values), default=0) + 1
    if len(outputs) > 1:
        return _Several(code, outputs, calls)
    return _Value(code, outputs[0], calls)


def _leaves(role: str) -> Any:
    class _Any(set):
        def __ge__(self, other):
            return all(leaf.role == role for leaf in other)

    return _Any()


def _comparable(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in what the emitted code depends on: kind and channels."""
    if a.kind != b.kind:
        return False
    return "C" not in KINDS[a.kind] or a.C == b.C


def _negated(condition: Any) -> Any:
    opposite = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
    if isinstance(condition, Symbol):
        for sign, other in opposite.items():
            if condition.template == "{} " + sign + " {}":
                return Symbol("{} " + other + " {}", condition.parts, condition.level)
        if condition.template in ("{} and {}", "{} or {}"):
            word = "or" if "and" in condition.template else "and"
            (left, _), (right, _) = condition.parts
            level = _LEVEL[word]
            return Symbol("{} " + word + " {}", ((_negated(left), level), (_negated(right), level + 1)), level)
    return symbol("not {}", condition, level=_LEVEL["not"], inner=_LEVEL["not"])


def _is_integral(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | Fraction | Formula)


_INTEGRAL = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: (Fraction(a) if isinstance(a, int) else a) / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
}


def _range(start: Any, stop: Any) -> str:
    return f"range({stop})" if start == 0 else f"range({start}, {stop})"


def _text(value: Any) -> str:
    if isinstance(value, tuple) and is_symbolic(value):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return str(value) if is_symbolic(value) else literal(value)


def _quoted(message: str) -> str:
    import json

    return json.dumps(message, ensure_ascii=False)


def _operand_code(code: str) -> str:
    from tokenmix.blocks.broadcast import bracketed

    return bracketed(code)
