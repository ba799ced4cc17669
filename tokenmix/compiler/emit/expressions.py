"""Expressions of a block definition as Python: what flows, for `forward`; what is fixed, for the constructor."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.broadcast import bracketed
from tokenmix.blocks.op import Op, Tensor
from tokenmix.blocks.ops import find_op
from tokenmix.compiler.bind import bind, default_value, hyperparameters, is_word, match_arguments
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.emit.formulas import (
    LEVEL,
    Formula,
    Leaf,
    Recorder,
    Symbol,
    hint_of,
    is_symbolic,
    leaves_of,
    real,
    rendering,
    symbol,
)
from tokenmix.compiler.emit.text import WIDTH, broken, range_text, text_of
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, Rate, names_in

if TYPE_CHECKING:
    from tokenmix.compiler.emit.classes import Emitter

__all__ = ["Arm", "ExpressionWriter", "Lines", "Module", "Several", "Value", "either", "negated"]

_CHAIN = 3  # calls inside calls on one line, at most


@dataclass
class Value:
    """A tensor in `forward`: the expression that makes it, and its shape in formulas."""

    code: str
    tensor: Tensor
    calls: int = 0  # calls nested in the expression

    def __str__(self) -> str:
        return f"a {self.tensor.kind}"


@dataclass
class Several:
    """What an op with several outputs gives: one expression that makes them all."""

    code: str
    tensors: tuple[Tensor, ...]
    calls: int = 0


@dataclass
class Module:
    """A declared module: the conditions under which it is used so far, and the constructor's line that makes it."""

    declaration: syntax.ModuleDecl
    uses: list[Any] = field(default_factory=list)
    line: int = 0


@dataclass
class Arm:
    """An `if` that surrounds what is being written: its condition, or the negation of it."""

    condition: Any
    positive: bool = True


@dataclass
class Lines:
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


class ExpressionWriter(Evaluator):
    """Evaluates expressions to Python text, noting in the constructor the submodules they need.

    Attributes:
        environment: what each name of the definition stands for: a `Value`, a number, a formula, a `Module`.
        recorder: names that the text refers to.
        init, forward: lines of the two methods so far.
        arms, loops: what surrounds the statement being written.
        pending: names that the rest of the expression being written still reads.
    """

    def __init__(self, emitter: Emitter, definition: Definition):
        self.emitter = emitter
        self.definition = definition
        self.environment: dict[str, Any] = {}
        super().__init__(self.environment, f"block `{definition.name}`")
        self.recorder = Recorder()
        self.init = Lines()
        self.forward = Lines()
        self.arms: list[Arm] = []
        self.loops: list[tuple[Leaf, Any, Any]] = []
        self.pending: list[set[str]] = []
        self._place_span = definition.signature.span

    def _set(self, name: str, value: Value) -> None:
        """Write the line `name = value`."""
        raise NotImplementedError

    def _callee_outputs(
        self, target: Definition, inputs: tuple[Tensor, ...], arguments: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Results of a called block in the formulas of this one."""
        raise NotImplementedError

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
            if isinstance(value, Value) and target and target not in reads and self._is_full(value, call, target):
                self._set(target, value)
                value = self.environment[target]
            value = self._apply(call, (self._tensor(value),))
        return value

    def _is_full(self, value: Value, call: syntax.Call, target: str) -> bool:
        """Whether the line that makes `value` should end before another call is put around it."""
        around = len(self.definition.labels.get(id(call), call.callee)) + len("self.()")
        return value.calls >= _CHAIN or 4 * self.forward.depth + len(f"{target} = {value.code}") + around > WIDTH

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        return getattr(value.tensor, expr.dim)

    def negate(self, expr: syntax.Unary, operand: Any) -> Any:
        if isinstance(operand, Value):
            return self._op("scale", (operand,), {"by": -1})
        if is_symbolic(operand):
            if isinstance(operand, Formula):
                return -operand if expr.op == "-" else operand
            return symbol(expr.op + "{}", operand, level=LEVEL["sign"], inner=LEVEL["sign"])
        return super().negate(expr, operand)

    def eval_unary(self, expr: syntax.Unary) -> Any:
        if expr.op == "not":
            operand = self.value(expr.operand)
            return negated(operand) if is_symbolic(operand) else not operand
        return super().eval_unary(expr)

    def logic(self, expr: syntax.Binary) -> Any:
        left, right = self.value(expr.left), self.value(expr.right)
        if not is_symbolic(left):
            return left if left == (expr.op == "or") else right
        if not is_symbolic(right):
            return right if right == (expr.op == "or") else left
        level = LEVEL[expr.op]
        return Symbol("{} " + expr.op + " {}", ((left, level), (right, level + 1)), level)

    def combine(self, expr: syntax.Binary, left: Any, right: Any) -> Any:
        tensors = [v for v in (left, right) if isinstance(v, Value)]
        if tensors:
            return self._combine_tensors(expr.op, left, right)
        if not is_symbolic(left) and not is_symbolic(right):
            return super().combine(expr, left, right)
        if expr.op in ("==", "!=", "<", "<=", ">", ">="):
            level = LEVEL["compare"]
            return Symbol("{} " + expr.op + " {}", ((real(left), level + 1), (real(right), level + 1)), level)
        if all(_is_integral(v) for v in (left, right)):
            return _INTEGRAL[expr.op](left, right)
        level = LEVEL[expr.op]
        return Symbol("{} " + expr.op + " {}", ((real(left), level), (real(right), level + 1)), level, Rate(False))

    def eval_name(self, expr: syntax.Name) -> Any:
        value = super().eval_name(expr)
        running = {leaf for leaf, _, _ in self.loops}
        if is_symbolic(value) and any(leaf.role == "loop" and leaf not in running for leaf in leaves_of(value)):
            raise Mistake(
                "TM1702", f"the number `{expr.name}` is set in a loop and read behind it", expr.span,
                help="write it as a number of its own behind the loop",
            )  # fmt: skip
        return value

    def _combine_tensors(self, op: str, left: Any, right: Any) -> Value:
        if isinstance(left, Value) and isinstance(right, Value):
            return self._op({"+": "add", "-": "sub", "*": "mul"}[op], (left, right), {})
        tensor, number = (left, real(right)) if isinstance(left, Value) else (right, real(left))
        if op == "*":
            return self._op("scale", (tensor,), {"by": number})
        if op == "/":
            with self._code(forward=True):
                by = (
                    symbol("1 / {}", number, level=LEVEL["/"], inner=LEVEL["/"] + 1)
                    if is_symbolic(number)
                    else float(Fraction(1) / Fraction(number))
                )
            return self._op("scale", (tensor,), {"by": by})
        if op == "+":
            return self._op("shift", (tensor,), {"by": number})
        if tensor is left:
            with self._code(forward=True):
                code = f"{tensor.code} - {bracketed(str(number))}"
            return Value(code, tensor.tensor, tensor.calls)
        with self._code(forward=True):
            return Value(f"{bracketed(str(number))} - {bracketed(tensor.code)}", tensor.tensor, tensor.calls)

    def eval_conditional(self, expr: syntax.Conditional) -> Any:
        condition = self.value(expr.condition)
        if not is_symbolic(condition):
            return self.value(expr.then if condition else expr.otherwise)
        then, otherwise = self.value(expr.then), self.value(expr.otherwise)
        if isinstance(then, Value) or isinstance(otherwise, Value):
            raise Mistake(
                "TM1702", "a choice between tensors that depends on the input or differs between uses", expr.span,
                help="write it as an `if` with a line for each",
            )  # fmt: skip
        return either(then, condition, otherwise)

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
            return values[0].floor() if name == "floor" else values[0].ceil()
        if name == "sqrt" or any(isinstance(h, Fraction) and h.denominator > 1 for h in map(hint_of, values)):
            values = [real(v) for v in values]
        template = (
            ("math." if name in ("floor", "ceil", "sqrt") else "") + name + "(" + ", ".join(["{}"] * len(values)) + ")"
        )
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

    def _tensor(self, value: Any) -> Value:
        assert isinstance(value, Value), value
        return value

    def _op(self, name: str, values: tuple[Value, ...], arguments: dict[str, Any]) -> Value:
        op = find_op(name)
        assert op is not None
        inputs = tuple(v.tensor for v in values)
        output = op.shape(*inputs, **arguments)
        assert isinstance(output, Tensor)
        with self._code(forward=True):
            code = op.forward(*(v.code for v in values), inputs=inputs, **arguments)
        self.emitter.helpers |= set(op.helpers)
        return Value(code, output, max(v.calls for v in values))

    def _apply(self, call: syntax.Call, flowing: tuple[Value, ...]) -> Any:
        module = self.environment.get(call.callee)
        target = None if isinstance(module, Module) else self.emitter.library.find(call.callee)
        values = list(flowing)
        arguments_are_tensors = target is None or target.signature.inputs
        for i, argument in enumerate(call.tensors if arguments_are_tensors else ()):
            self.pending.append({n for later in call.tensors[i + 1 :] for n in names_in(later.value)})
            values.append(self._tensor(self.value(argument.value)))
            self.pending.pop()
        if isinstance(module, Module):
            return self._apply_module(module, tuple(values))
        assert target is not None
        arguments = self._arguments(target, call)
        return self._call(target, call, arguments, tuple(values), self.definition.labels[id(call)])

    def _apply_module(self, module: Module, values: tuple[Value, ...]) -> Any:
        call = module.declaration.call
        target = self.emitter.library.find(call.callee)
        assert target is not None
        label = module.declaration.name.name
        arguments = self._arguments(target, call)
        inputs = tuple(v.tensor for v in values)
        constructor, outputs = self._construct(target, call, arguments, inputs)
        if constructor is None:
            return self._function(target, arguments, values, outputs)
        if not module.uses:
            module.line = len(self.init.lines)
            self.init.lines.append(f"        self.{label} = {constructor}")
        module.uses.append(self._test())
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
        given = {a.name for a in _given_arguments(target, call)}
        with self._code():
            parts = [str(inputs[i].C) for i in text.channels.values()]
            parts += [f"{name}={text_of(arguments[name])}" for name in text.parameters if name in given]
        return f"{text.name}({', '.join(parts)})", self._callee_outputs(target, inputs, arguments)

    def _call(
        self,
        target: Definition | Op,
        call: syntax.Call,
        arguments: dict[str, Any],
        values: tuple[Value, ...],
        label: str,
    ) -> Any:
        constructor, outputs = self._construct(target, call, arguments, tuple(v.tensor for v in values))
        if constructor is None:
            assert isinstance(target, Op)
            return self._function(target, arguments, values, outputs)
        self._place_span = call.span
        learned = isinstance(target, Op) and target.is_parameter
        place = self._place(label, constructor, "Parameter" if learned else "Module")
        if learned:
            with self._code(forward=True):
                self._learned(label, text_of(arguments["value"]))
            return Value(place, outputs[0])
        return _result(f"{place}({', '.join(v.code for v in values)})", outputs, values)

    def _function(
        self,
        target: Definition | Op,
        arguments: dict[str, Any],
        values: tuple[Value, ...],
        outputs: tuple[Tensor, ...],
    ) -> Any:
        assert isinstance(target, Op)
        with self._code(forward=True):
            code = target.forward(*(v.code for v in values), inputs=tuple(v.tensor for v in values), **arguments)
        return _result(code, outputs, values)

    def _test(self) -> Any:
        """Under which condition on constructor arguments the statement being written runs; None for always."""
        test: Any = None
        for arm in self.arms:
            if _at_run_time(arm.condition):
                continue
            condition = arm.condition if arm.positive else negated(arm.condition)
            level = LEVEL["and"]
            test = condition if test is None else Symbol("{} and {}", ((test, level), (condition, level + 1)), level)
        return test

    def _learned(self, label: str, value: str) -> None:
        """Remember a learned parameter and where it begins."""

    def _place(self, label: str, constructor: str, kind: str = "Module") -> str:
        """Put a submodule into the constructor where the loops and conditions around it say; how `forward` finds it.

        Args:
            kind: "Module" or "Parameter", which torch keeps in containers of their own.
        """
        if any(_at_run_time(arm.condition) for arm in self.arms):
            raise Mistake(
                "TM1702", f"the layer `{label}` stands in an `if` that depends on the input size", self._place_span,
                help="its weights are there for every size or for none: apply it outside, or declare "
                "`module name = ...` in front of the `if` and use it in both arms",
            )  # fmt: skip
        test = self._test()
        with self._code():
            tested = str(test) if test is not None else ""
            ranges = " ".join(f"for {leaf.name} in {range_text(start, stop)}" for leaf, start, stop in self.loops)
        if not self.loops:
            line = f"self.{label} = {constructor}"
            if tested:
                self.init.lines += [f"        if {tested}:", *broken(f"            {line}")]
            else:
                self.init.lines += broken(f"        {line}")
            return f"self.{label}"
        variables = [leaf.name for leaf, _, _ in self.loops]
        if len(variables) == 1 and not tested and self.loops[0][1] == 0:
            made = f"nn.{kind}List({constructor} {ranges})"
            if len(made) + len(label) > WIDTH - 16:
                made = f"nn.{kind}List(\n            {constructor}\n            {ranges}\n        )"
            self.init.lines.append(f"        self.{label} = {made}")
            return f"self.{label}[{variables[0]}]"
        key = f"str({variables[0]})" if len(variables) == 1 else 'f"' + "_".join(f"{{{v}}}" for v in variables) + '"'
        test_text = f" if {tested}" if tested else ""
        self.init.lines += [
            f"        self.{label} = nn.{kind}Dict({{",
            f"            {key}: {constructor}",
            f"            {ranges}{test_text}",
            "        })",
        ]
        return f"self.{label}[{key}]"


def _given_arguments(target: Definition | Op, call: syntax.Call) -> list[syntax.Argument]:
    """The hyperparameters a call gives, each under its parameter's name."""
    matched, _ = match_arguments(target.signature, hyperparameters(target.signature, call), call)
    return [replace(argument, name=name) for name, argument in matched.items()]


def _result(code: str, outputs: tuple[Tensor, ...], values: tuple[Value, ...]) -> Any:
    calls = max((v.calls for v in values), default=0) + 1
    if len(outputs) > 1:
        return Several(code, outputs, calls)
    return Value(code, outputs[0], calls)


def negated(condition: Any) -> Any:
    """The opposite of a condition, comparisons turned round."""
    opposite = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
    if isinstance(condition, Symbol):
        for sign, other in opposite.items():
            if condition.template == "{} " + sign + " {}":
                return Symbol("{} " + other + " {}", condition.parts, condition.level)
        if condition.template in ("{} and {}", "{} or {}"):
            word = "or" if "and" in condition.template else "and"
            (left, _), (right, _) = condition.parts
            level = LEVEL[word]
            return Symbol("{} " + word + " {}", ((negated(left), level), (negated(right), level + 1)), level)
    return symbol("not {}", condition, level=LEVEL["not"], inner=LEVEL["not"])


def _at_run_time(condition: Any) -> bool:
    return any(leaf.role == "size" for leaf in leaves_of(condition))


def either(then: Any, condition: Any, otherwise: Any) -> Any:
    """`then if condition else otherwise`, for numbers. What it is worth in the use at hand is not known."""
    made = Symbol("{} if {} else {}", ((then, 1), (condition, 1), (otherwise, 0)), 0)
    return Formula.of(made) if _is_integral(then) and _is_integral(otherwise) else made


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
