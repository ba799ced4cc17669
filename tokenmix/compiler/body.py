"""One run through a block definition with numbers: its statements become nodes of a graph.

A mistake poisons the values that depend on it and nothing else, so that one run reports every independent finding.
Where a mistake leaves no doubt about a shape (heads that do not divide the channels), the value goes on as a doubtful
one: what is wrong with it alone is no finding, but the blocks behind a block that keeps its shape are still looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.op import KINDS, Op, Tensor
from tokenmix.compiler.bind import bind, default_value, is_word, misfit
from tokenmix.compiler.blame import dimensions_in, failing_part, reads
from tokenmix.compiler.definition import DIMENSIONS, LETTERS, Definition
from tokenmix.compiler.graph import BlockGraph, GraphNode, Ref
from tokenmix.compiler.outcomes import Exhausted, Failed, Refused
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake, Note
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, Rate, coerce, describe
from tokenmix.dsl.limits import MAX_LOOP, MAX_NODES
from tokenmix.dsl.source import Span

if TYPE_CHECKING:
    from tokenmix.compiler.elaborate import Elaborator

__all__ = ["Body", "known_rate", "short"]


class _Value:
    """A tensor on its way through a block: where it comes from, what it is, and whether a finding stands behind it."""

    __slots__ = ("doubtful", "ref", "tensor")

    def __init__(self, ref: Ref, tensor: Tensor, doubtful: bool = False):
        self.ref = ref
        self.tensor = tensor
        self.doubtful = doubtful

    def __str__(self) -> str:
        return f"a {self.tensor}"


class _Poison:
    def __str__(self) -> str:
        return "a value that could not be computed"


class _Module:
    """A declared module: bound to shapes at its first use."""

    def __init__(self, declaration: syntax.ModuleDecl):
        self.declaration = declaration
        self.first: GraphNode | None = None
        self.uses = 0

    def __str__(self) -> str:
        return f"the module `{self.declaration.name.name}`"


def short(text: str) -> str:
    """A text on one line of a message."""
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:66] + " ..."


def known_rate(value: Any, parameter: syntax.Parameter) -> Any:
    if parameter.type is None or parameter.type.names != ("rate",):
        return value
    if isinstance(value, tuple):
        return tuple(known_rate(v, replace(parameter, type=replace(parameter.type, many=False))) for v in value)
    return Rate(value == 0) if isinstance(value, float) else value


class _Return(Exception):
    def __init__(self, values: tuple[_Value, ...]):
        self.values = values


class _Poisoned(Exception):
    """An expression reads a poisoned value: its mistake is already noted."""


class Body(Evaluator):
    """One run through a definition with numbers."""

    def __init__(
        self, owner: Elaborator, definition: Definition, arguments: dict[str, Any], inputs: tuple[Tensor, ...]
    ):
        self.owner = owner
        self.definition = definition
        self.graph = BlockGraph(definition.name, definition, arguments, inputs)
        self.environment: dict[str, Any] = {}
        super().__init__(self.environment, f"block `{definition.name}`")
        for i, (declared, tensor) in enumerate(zip(definition.signature.inputs, inputs, strict=True)):
            self.environment[declared.name] = _Value(Ref(-1, i), tensor)
        for letter in inputs[0].letters:
            if letter in DIMENSIONS:
                self.environment[letter] = getattr(inputs[0], letter)
        self.environment.update(arguments)
        self.failed = False
        self.faulty = False  # the definition has findings: what it does not know is one of them
        self.outputs: tuple[Tensor, ...] | None = None
        self._unmet: set[str] = set()
        self._loops: tuple[int, ...] = ()
        self._loop: syntax.For | None = None
        self._names: dict[str, int] = {}
        self._num_ops = 0

    def run(self) -> BlockGraph | None:
        muted = self.owner.muted
        try:
            self._statements(self.definition.block.body)
        except _Return as done:
            self.graph.results = tuple(v.ref for v in done.values)
            self.outputs = tuple(v.tensor for v in done.values)
        except _Poisoned:
            self.failed = True
        else:
            self.failed = True  # it does not return: a finding of the definition
        finally:
            self.owner.muted = muted
        return None if self.failed else self.graph

    def _statements(self, body: Sequence[syntax.Statement]) -> None:
        for statement in body:
            if self._unmet and not isinstance(statement, syntax.Require):
                self.owner.muted += 1  # what stands below a requirement relies on it; `run` sets this back
                self._unmet = set()
            try:
                self.owner.step()
                self._statement(statement)
            except Mistake as mistake:
                self._mistake(mistake, statement)
                self._poison(statement)
            except Failed:
                self._poison(statement)
            except _Poisoned:
                self._poison(statement)

    def _mistake(self, mistake: Mistake, statement: syntax.Statement) -> None:
        self.failed = True
        exhausted = (mistake.finding.span is None and mistake.finding.id == "TM1501") or mistake.finding.id == "TM1502"
        if exhausted:
            self.owner.muted = 0
            if mistake.finding.span is None:
                mistake.finding = replace(mistake.finding, span=self._loop_span() or statement.span)
        self.owner.note(mistake, statement, self)
        if exhausted:
            raise Exhausted

    def _loop_span(self) -> Span | None:
        loop = self._loop
        return loop.span.source.span(loop.variable.span.start, loop.stop.span.end) if loop else None

    def _poison(self, statement: syntax.Statement) -> None:
        self.failed = True
        if isinstance(statement, syntax.Return):
            raise _Poisoned
        for name in _assigned(statement):
            self.environment[name] = _Poison()

    def _statement(self, statement: syntax.Statement) -> None:
        if isinstance(statement, syntax.Assign):
            self._assign(statement)
        elif isinstance(statement, syntax.Return):
            values = tuple(self._tensor(self.value(v), v) for v in statement.values)
            raise _Return(values)
        elif isinstance(statement, syntax.Require):
            self._require(statement)
        elif isinstance(statement, syntax.ModuleDecl):
            self.environment[statement.name.name] = _Module(statement)
        elif isinstance(statement, syntax.If):
            taken = self._truth(self.value(statement.condition), statement.condition)
            self.owner.branches.setdefault(id(statement), set()).add(taken)
            self._statements(statement.then if taken else statement.otherwise)
        elif isinstance(statement, syntax.For):
            self._for(statement)

    def _assign(self, statement: syntax.Assign) -> None:
        value = self.value(statement.value)
        if len(statement.targets) == 1:
            if isinstance(value, tuple) and value and isinstance(value[0], _Value):
                raise Mistake(
                    "TM1306",
                    f"{len(value)} values come out here, and only `{statement.targets[0].name}` takes them",
                    statement.targets[0].span,
                    help="name each: `a, b = ...`",
                )
            self.environment[statement.targets[0].name] = value
            return
        if not isinstance(value, tuple) or len(value) != len(statement.targets):
            count = len(value) if isinstance(value, tuple) else 1
            raise Mistake(
                "TM1306", f"{len(statement.targets)} names for {count} value{'s' if count != 1 else ''}", statement.span
            )
        for target, part in zip(statement.targets, value, strict=True):
            self.environment[target.name] = part

    def _require(self, statement: syntax.Require) -> None:
        if self._truth(self.value(statement.condition), statement.condition):
            return
        self.failed = True
        condition = failing_part(statement.condition, self)
        names = {n.name for n in reads(condition)}
        if self._unmet & names:
            return  # most likely the same number's fault
        self._unmet |= names
        block = self.definition.name
        values = "; ".join(n.message for n in self.values_of(condition))
        mistake = Mistake(
            "TM1404" if dimensions_in(condition) & {"H", "W", "N"} else "TM1403",
            f"block `{block}`: {statement.message}"
            if statement.message
            else f"block `{block}` requires `{condition.span.text}`",
            condition.span,
            label=self._outcome(condition),
            notes=(
                Note(
                    f"required: `{short(condition.span.text)}`; here {values}{self._outcome(condition, ', so ')}",
                    condition.span,
                ),
            ),
            about=condition,
        )
        self.owner.note(mistake, statement, self)

    def _outcome(self, condition: syntax.Expr, before: str = "") -> str:
        """The number that a failed comparison is about, such as "`C % heads` is 2"."""
        if not isinstance(condition, syntax.Binary) or condition.op in ("and", "or"):
            return ""
        sides = [s for s in (condition.left, condition.right) if not isinstance(s, syntax.Literal | syntax.Name)]
        return (
            before + " and ".join(f"`{short(s.span.text)}` is {describe(self.value(s))}" for s in sides)
            if sides
            else ""
        )

    def _for(self, statement: syntax.For) -> None:
        start, stop = (
            coerce(self.value(e), _INT(e), e.span, "an end of the range", self.values_of(e))
            for e in (statement.start, statement.stop)
        )
        if stop - start > MAX_LOOP:
            raise Mistake(
                "TM1501",
                f"the loop runs {stop - start:,} times, the limit is {MAX_LOOP:,}",
                statement.stop.span,
                notes=self.values_of(statement.stop),
                about=statement.stop,
            )
        self.owner.branches.setdefault(id(statement), set()).add(start < stop)
        outer, self._loop = self._loops, self._loop or statement
        for j in range(start, stop):
            self.environment[statement.variable.name] = j
            self._loops = (*outer, j)
            self._statements(statement.body)
        self._loops = outer
        if not outer:
            self._loop = None

    # Expressions

    def eval_name(self, expr: syntax.Name) -> Any:
        if expr.name in DIMENSIONS and expr.name not in self.environment:
            first = self.definition.signature.inputs[0].name
            tensor = self.graph.inputs[0]
            raise Mistake(
                "TM1401", f"`{first}` is a {tensor}, it has no {expr.name}", expr.span, help=_has(tensor, first)
            )
        if self.faulty and expr.name not in self.environment:
            raise _Poisoned
        value = super().eval_name(expr)
        if isinstance(value, _Poison):
            raise _Poisoned
        return value

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        if isinstance(value, _Poison) or expr.dim not in LETTERS:
            raise _Poisoned
        if not isinstance(value, _Value):
            return super().dimension(expr, value)
        if expr.dim not in value.tensor.letters:
            raise Mistake(
                "TM1401",
                f"`{expr.name}` is a {value.tensor}, it has no {expr.dim}",
                expr.span,
                help=_has(value.tensor, expr.name),
            )
        if value.doubtful:
            raise _Poisoned
        return getattr(value.tensor, expr.dim)

    def eval_listof(self, expr: syntax.ListOf) -> Any:
        self.owner.step(len(expr.items))
        values = super().eval_listof(expr)
        for value, item in zip(values, expr.items, strict=True):
            if isinstance(value, _Value | _Module) or (
                isinstance(value, tuple) and any(isinstance(v, _Value) for v in value)
            ):
                raise Mistake(
                    "TM1301", "a list holds numbers, no tensors", item.span, help="`concat(a, b)` joins tensors"
                )
        return values

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        self.owner.step(sum(len(v) if isinstance(v, tuple) else 1 for v in values))
        if any(isinstance(v, _Value | _Module) for v in values):
            raise Mistake(
                "TM1301", f"`{expr.callee}` takes numbers, got {_kinds(values)}", expr.span, help=FUNCTIONS[expr.callee]
            )
        return super().function(expr, values)

    def negate(self, expr: syntax.Unary, operand: Any) -> Any:
        if isinstance(operand, _Value) and expr.op == "-":
            return self._op("scale", expr, (operand,), {"by": -1})
        return super().negate(expr, operand)

    def combine(self, expr: syntax.Binary, left: Any, right: Any) -> Any:
        tensors = [v for v in (left, right) if isinstance(v, _Value)]
        if not tensors:
            return super().combine(expr, left, right)
        if len(tensors) == 2:
            name = {"+": "add", "-": "sub", "*": "mul"}.get(expr.op)
            if name is None:
                raise Mistake("TM1401", f"`{expr.op}` does not join tensors", expr.span, help="`+`, `-` and `*` do")
            return self._op(name, expr, (left, right), {})
        (tensor,) = tensors
        number, side = (right, expr.right) if tensor is left else (left, expr.left)
        if expr.op in ("==", "!=", "<", "<=", ">", ">="):
            raise Mistake(
                "TM1401", f"`{expr.op}` compares numbers, got {tensor}", expr.span,
                help="conditions never look at tensors; `x.C` is a number",
            )  # fmt: skip
        if not isinstance(number, int | float | Fraction) or isinstance(number, bool):
            what = "a rate" if isinstance(number, Rate) else describe(number)
            raise Mistake("TM1301", f"`{expr.op}` joins a tensor with a tensor or a number, got {what}", side.span)
        if expr.op == "*":
            return self._op("scale", expr, (tensor,), {"by": _plain(number)})
        if expr.op == "/" and tensor is left:
            if not number:
                raise self._by_zero(expr)
            return self._op("scale", expr, (tensor,), {"by": _plain(Fraction(1) / Fraction(number))})
        if expr.op == "+":
            return self._op("shift", expr, (tensor,), {"by": _plain(number)})
        if expr.op == "-" and tensor is left:
            return self._op("shift", expr, (tensor,), {"by": _plain(-number)})
        if expr.op == "-":
            negative = self._op("scale", expr, (tensor,), {"by": -1})
            return self._op("shift", expr, (negative,), {"by": _plain(number)})
        raise Mistake(
            "TM1401", f"`{expr.op}` does not join a tensor and a number", expr.span, help="`+`, `-`, `*` and `x / 2` do"
        )

    def _op(self, name: str, expr: syntax.Node, values: tuple[_Value, ...], arguments: dict[str, Any]) -> _Value:
        from tokenmix.blocks.ops import find_op

        op = find_op(name)
        assert op is not None
        inputs = tuple(v.tensor for v in values)
        doubtful = any(v.doubtful for v in values)
        try:
            op.check(*inputs, **arguments)
            output = op.shape(*inputs, **arguments)
        except Mistake as mistake:
            if doubtful:
                raise _Poisoned from None
            raise _placed(mistake, expr, inputs) from None
        assert isinstance(output, Tensor)
        node = self._add(name, op, arguments, values, (output,), expr)
        return _Value(Ref(node, 0), output, doubtful)

    def eval_pipe(self, expr: syntax.Pipe) -> Any:
        value = self.value(expr.source)
        for call in expr.calls:
            value = self._apply(call, (self._tensor(value, call),))
        return value

    def eval_call(self, expr: syntax.Call) -> Any:
        if expr.callee in FUNCTIONS and self.owner.library.find(expr.callee) is None:
            return super().eval_call(expr)
        return self._apply(expr, ())

    def _apply(self, call: syntax.Call, flowing: tuple[_Value, ...]) -> Any:
        module = self.environment.get(call.callee)
        if isinstance(module, _Poison):
            raise _Poisoned
        target = self.owner.library.find(call.callee)
        given = call.tensors if target is None or target.signature.inputs else ()
        tensors = flowing + tuple(self._tensor(self.value(a.value), a) for a in given)
        if isinstance(module, _Module):
            return self._apply_module(call, module, tensors)
        return self._node(call, tensors, self.definition.labels[id(call)])

    def _apply_module(self, call: syntax.Call, module: _Module, tensors: tuple[_Value, ...]) -> Any:
        declared = Note("declared", module.declaration.span)
        if call.arguments or call.label:
            raise Mistake(
                "TM1306",
                f"{module} takes tensors only; its hyperparameters stand in its declaration",
                call.span,
                notes=(declared,),
            )
        if not tensors:
            raise Mistake("TM1306", f"{module} is given no tensor", call.span, notes=(declared,))
        label = module.declaration.name.name
        return self._node(module.declaration.call, tensors, label, module)

    def _node(self, call: syntax.Call, values: tuple[_Value, ...], label: str, module: _Module | None = None) -> Any:
        target = self.owner.library.find(call.callee)
        if target is None:
            raise _Poisoned  # a finding of the definition
        if self.faulty and misfit(target.signature, call):
            raise _Poisoned
        arguments = bind(
            target.signature,
            call,
            lambda p, e: self._argument(target, p, e),
            lambda p: default_value(p, target.name),
        )
        inputs = tuple(v.tensor for v in values)
        doubtful = any(v.doubtful for v in values)
        self.owner.muted += doubtful
        try:
            elaborated, outputs = self.owner.call(call, arguments, inputs)
        except Mistake as mistake:
            counted = self.faulty and mistake.finding.id == "TM1306"  # a finding of the definition
            if not doubtful and not counted:
                self._mistake(_placed(mistake, call, inputs), _Applied(call.span))
            return self._doubtful(mistake.outputs if isinstance(mistake, Refused) else None)
        except Failed as failed:
            return self._doubtful(failed.outputs)
        finally:
            self.owner.muted -= doubtful
        node = self._add(label, elaborated, arguments, values, outputs, call, module)
        results = tuple(_Value(Ref(node, i), t, doubtful) for i, t in enumerate(outputs))
        return results if len(results) > 1 else results[0]

    def _doubtful(self, outputs: tuple[Tensor, ...] | None) -> Any:
        """What comes out of a call with a finding; it is never a part of a graph."""
        self.failed = True
        if outputs is None:
            raise _Poisoned
        results = tuple(_Value(Ref(-1, 0), t, doubtful=True) for t in outputs)
        return results if len(results) > 1 else results[0]

    def _argument(self, target: Definition | Op, parameter: syntax.Parameter, expr: syntax.Expr) -> Any:
        if is_word(parameter, expr, self.environment):
            assert isinstance(expr, syntax.Name)
            value: Any = expr.name
        else:
            value = self.value(expr)
        if isinstance(value, _Value | _Module) or (
            isinstance(value, tuple) and any(isinstance(v, _Value) for v in value)
        ):
            inputs = target.signature.inputs
            raise Mistake(
                "TM1301",
                f"`{parameter.name}` of `{target.name}` is a hyperparameter, got {_kinds(value)}",
                expr.span,
                help="further tensors stand before a `;`" if len(inputs) > 1 else "its size is a number: `x.C`",
            )
        if (
            type(value) is int
            and parameter.type is not None
            and parameter.type.names == ("int",)
            and not parameter.type.many
        ):
            return value  # by far the most frequent case
        try:
            return coerce(value, parameter.type, expr.span, f"`{parameter.name}` of `{target.name}`")
        except Mistake as mistake:
            mistake.finding = replace(mistake.finding, notes=self.values_of(expr))
            mistake.about = expr
            raise

    def _add(
        self,
        label: str,
        target: Op | BlockGraph,
        arguments: dict[str, Any],
        values: tuple[_Value, ...],
        outputs: tuple[Tensor, ...],
        node: syntax.Node,
        module: _Module | None = None,
    ) -> int:
        self.owner.step()
        first, shared = module.first if module else None, module is not None
        if self._loops and not shared:
            label = f"{label}.{'_'.join(str(j) for j in self._loops)}"
        count = self._names[label] = self._names.get(label, 0) + 1
        name = label
        if count > 1:
            name = f"{label}@{count}" if shared else f"{label}_{count}"
            label = label if shared else name
        weights = {}
        tally = None
        if isinstance(target, Op):
            inputs = tuple(v.tensor for v in values)
            arguments = {p.name: known_rate(arguments[p.name], p) for p in target.signature.parameters}
            weights = dict(target.weights(*inputs, **arguments))
            tally = target.cost(inputs, outputs, **arguments)
        made = GraphNode(
            name, label, target, arguments, tuple(v.ref for v in values), outputs, node.span, weights,
            reused=first is not None, **({"tally": tally} if tally else {}),
        )  # fmt: skip
        if first is not None and (first.weights != weights or _blocks_differ(first.target, target)):
            raise Mistake(
                "TM1402",
                f"the module `{label}` is used with inputs that need different weights: {_weights(first, made)}",
                node.span, notes=(Note("first used", first.span),),
            )  # fmt: skip
        if module is not None and first is None:
            module.first = made
        self.graph.nodes.append(made)
        self._num_ops += made.num_ops
        if self._num_ops > MAX_NODES:
            raise Mistake(
                "TM1502", f"the block has more than {MAX_NODES:,} ops, those of its parts counted", node.span,
                help="fewer rounds of loops, or fewer blocks that each hold several blocks",
            )  # fmt: skip
        return len(self.graph.nodes) - 1

    def _tensor(self, value: Any, node: syntax.Node) -> _Value:
        if isinstance(value, _Value):
            return value
        if isinstance(value, tuple) and value and isinstance(value[0], _Value):
            raise Mistake(
                "TM1306", f"{len(value)} values come out before this and one is wanted", node.span,
                help="name each first: `a, b = ...`",
            )  # fmt: skip
        if isinstance(value, _Module):
            raise Mistake("TM1301", f"a tensor is wanted here, got {value}", node.span, help="call it: `name(x)`")
        raise Mistake("TM1301", f"a tensor is wanted here, got {describe(value)}", node.span)


@dataclass(frozen=True)
class _Applied(syntax.Statement):
    """Stands for the statement of a mistake that is noted where the call stands, since the value goes on."""


def _kinds(value: Any) -> str:
    values = value if isinstance(value, tuple | list) else [value]
    return " and ".join(str(v) for v in values if isinstance(v, _Value | _Module))


def _has(tensor: Tensor, name: str) -> str:
    return f"it has {', '.join(f'`{name}.{letter}`' for letter in tensor.letters)}"


def _weights(first: GraphNode, second: GraphNode) -> str:
    shapes = [
        " and ".join(
            f"{name} {shape}"
            for name, shape in node.weights.items()
            if first.weights.get(name) != second.weights.get(name)
        )
        for node in (first, second)
    ]
    return " against ".join(shapes) if all(shapes) else f"{first.num_params:,} against {second.num_params:,} parameters"


def _blocks_differ(a: Op | BlockGraph, b: Op | BlockGraph) -> bool:
    return isinstance(a, BlockGraph) and isinstance(b, BlockGraph) and a.num_params != b.num_params


def _placed(mistake: Mistake, node: syntax.Node, inputs: tuple[Tensor, ...]) -> Mistake:
    """A mistake of an op with the place of its use, and what disagrees beside the underlined words."""
    finding = mistake.finding
    if finding.span is None:
        span = node.callee_span if isinstance(node, syntax.Call) else node.span
        finding = replace(finding, span=span)
    if finding.id == "TM1402" and not finding.label and len({t.kind for t in inputs}) == 1:
        sizes = {letter: [getattr(t, letter) for t in inputs] for letter in KINDS[inputs[0].kind]}
        differ = [f"{k}: {' and '.join(str(d) for d in dims)}" for k, dims in sizes.items() if len(set(dims)) > 1]
        finding = replace(finding, label=", ".join(differ))
    mistake.finding = finding
    mistake.about = mistake.about or node
    return mistake


def _plain(number: Any) -> Any:
    return float(number) if isinstance(number, Fraction) else number


def _INT(expr: syntax.Expr) -> syntax.TypeRef:
    return syntax.TypeRef(expr.span, ("int",))


def _assigned(statement: syntax.Statement) -> list[str]:
    if isinstance(statement, syntax.Assign):
        return [t.name for t in statement.targets]
    if isinstance(statement, syntax.For):
        return [n for s in statement.body for n in _assigned(s)]
    if isinstance(statement, syntax.If):
        return [n for s in (*statement.then, *statement.otherwise) for n in _assigned(s)]
    return []
