"""Blocks with numbers put in: definitions, hyperparameters and input shapes become graphs of primitive ops.

Equal blocks become one shared graph. A mistake poisons the values that depend on it and nothing else, so that one
run reports every independent finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.bind import bind, is_word
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.graph import BlockGraph, GraphNode, Ref
from tokenmix.compiler.library import Library
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, Note
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, Rate, coerce, describe, names_in
from tokenmix.dsl.limits import MAX_LOOP, MAX_NESTING, MAX_NODES

__all__ = ["Elaborator", "Failed", "default_value"]

# Statements run while elaborating one model. Sharing keeps real models far below; loops in loops would not end.
_MAX_STEPS = 200_000


class Failed(Exception):
    """The block has findings; they are already noted."""


class _Value:
    """A tensor on its way through a block: where it comes from and what it is."""

    __slots__ = ("ref", "tensor")

    def __init__(self, ref: Ref, tensor: Tensor):
        self.ref = ref
        self.tensor = tensor

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


class Elaborator:
    """Elaborates blocks of one library, each distinct one once.

    Attributes:
        findings: mistakes met so far.
        instances: definition -> every distinct (hyperparameters, input tensors) it was elaborated with.
        branches: id of an `if` -> the arms that were taken.
    """

    def __init__(self, library: Library):
        self.library = library
        self.findings: list[Finding] = []
        self.instances: dict[Definition, list[BlockGraph]] = {}
        self.branches: dict[int, set[bool]] = {}
        self._graphs: dict[tuple, BlockGraph | None] = {}
        self._stack: list[tuple[Definition, syntax.Call]] = []
        self._steps = 0

    def call(self, call: syntax.Call, arguments: dict[str, Any], inputs: tuple[Tensor, ...]) -> tuple[Op | BlockGraph, tuple[Tensor, ...]]:
        """Apply a block or op to inputs. Raises `Failed` where the block has findings, `Mistake` where the call does not fit."""
        target = self.library.find(call.callee)
        assert target is not None
        arguments = {k: _known_rate(v, p) for (k, v), p in zip(arguments.items(), target.signature.parameters, strict=True)}
        self._check_inputs(target.signature, inputs, call)
        if isinstance(target, Op):
            target.check(*inputs, **arguments)
            outputs = target.shape(*inputs, **arguments)
            return target, outputs if isinstance(outputs, tuple) else (outputs,)
        graph = self._block(target, call, arguments, inputs)
        return graph, graph.outputs

    def _check_inputs(self, signature: syntax.Signature, inputs: tuple[Tensor, ...], call: syntax.Call) -> None:
        many = bool(signature.inputs) and signature.inputs[-1].many
        if len(inputs) < len(signature.inputs) or len(inputs) > len(signature.inputs) and not many:
            raise Mistake(
                "TM1306", f"`{call.callee}` takes {len(signature.inputs)} tensors, got {len(inputs)}", call.callee_span
            )
        for i, tensor in enumerate(inputs):
            wanted = signature.inputs[min(i, len(signature.inputs) - 1)]
            if wanted.kinds and tensor.kind not in wanted.kinds:
                kinds = " or ".join(wanted.kinds)
                raise Mistake(
                    "TM1401",
                    f"`{call.callee}` takes a value of kind {kinds} as `{wanted.name}`, got a {tensor}",
                    call.callee_span,
                )

    def _block(self, definition: Definition, call: syntax.Call, arguments: dict[str, Any], inputs: tuple[Tensor, ...]) -> BlockGraph:
        key = (definition, tuple(arguments.items()), inputs)
        if key in self._graphs:
            graph = self._graphs[key]
            if graph is None:
                raise Failed
            return graph
        circle = [d for d, _ in self._stack]
        if definition in circle:
            names = [d.name for d in circle[circle.index(definition) :]] + [definition.name]
            raise Mistake("TM1210", f"block `{definition.name}` contains itself: {' -> '.join(names)}", call.callee_span)
        if len(self._stack) >= MAX_NESTING:
            raise Mistake("TM1104", f"blocks are nested more than {MAX_NESTING} deep", call.callee_span)
        static = definition.findings(self.library)
        if static:
            self.findings += static
            self._graphs[key] = None
            raise Failed
        self._stack.append((definition, call))
        try:
            graph = _Body(self, definition, arguments, inputs).run()
        finally:
            self._stack.pop()
        self._graphs[key] = graph
        if graph is None:
            raise Failed
        self.instances.setdefault(definition, []).append(graph)
        return graph

    def note(self, finding: Finding, fallback: syntax.Node) -> None:
        """Record a finding met inside the blocks on the stack.

        Inside a shipped block the text is right and the numbers it was given are not: the finding then points at the
        call in the user's text and names the shipped line as a further place.
        """
        if finding.span is None:
            finding = replace(finding, span=fallback.span)
        outer = next((i for i, (d, _) in enumerate(self._stack) if all(b.shipped for b, _ in self._stack[i:])), None)
        if outer is not None:
            definition, call = self._stack[outer]
            inner = self._stack[-1][0].name
            via = f" (by way of `{definition.name}`)" if inner != definition.name else ""
            notes = (*finding.notes, Note(f"asked for by block `{inner}`{via}", finding.span))
            finding = replace(finding, span=call.span, notes=notes, label=finding.label)
        elif self._stack[:-1]:
            definition, call = self._stack[-1]
            finding = replace(finding, notes=(*finding.notes, Note(f"in `{definition.name}`, called", call.span)))
        self.findings.append(finding)

    def step(self, node: syntax.Node) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise Mistake("TM1501", f"more than {_MAX_STEPS} statements run while the model is built", node.span)


def _known_rate(value: Any, parameter: syntax.Parameter) -> Any:
    if parameter.type is None or parameter.type.names != ("rate",):
        return value
    if isinstance(value, tuple):
        return tuple(_known_rate(v, replace(parameter, type=replace(parameter.type, many=False))) for v in value)
    return Rate(value == 0) if isinstance(value, float) else value


class _Return(Exception):
    def __init__(self, values: tuple[_Value, ...]):
        self.values = values


class _Poisoned(Exception):
    """An expression reads a poisoned value: its mistake is already noted."""


class _Body(Evaluator):
    """One run through a definition with numbers."""

    def __init__(self, owner: Elaborator, definition: Definition, arguments: dict[str, Any], inputs: tuple[Tensor, ...]):
        self.owner = owner
        self.definition = definition
        self.graph = BlockGraph(definition.name, definition, arguments, inputs)
        self.environment: dict[str, Any] = {}
        super().__init__(self.environment, f"block `{definition.name}`")
        for i, (declared, tensor) in enumerate(zip(definition.signature.inputs, inputs, strict=True)):
            self.environment[declared.name] = _Value(Ref(-1, i), tensor)
        for letter in inputs[0].letters:
            if letter in "CHWN":
                self.environment[letter] = getattr(inputs[0], letter)
        self.environment.update(arguments)
        self.failed = False
        self._loops: tuple[int, ...] = ()
        self._names: dict[str, int] = {}

    def run(self) -> BlockGraph | None:
        try:
            self._statements(self.definition.block.body)
        except _Return as done:
            self.graph.results = tuple(v.ref for v in done.values)
        except _Poisoned:
            self.failed = True
        return None if self.failed else self.graph

    def _statements(self, body: Sequence[syntax.Statement]) -> None:
        for statement in body:
            try:
                self.owner.step(statement)
                self._statement(statement)
            except Mistake as mistake:
                self.owner.note(mistake.finding, statement)
                if mistake.finding.id in ("TM1501", "TM1502"):
                    raise _Poisoned from None
                self._poison(statement)
            except (Failed, _Poisoned):
                self._poison(statement)

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
        depends_on_size = names_in(statement.condition) & {"H", "W", "N"}
        raise Mistake(
            "TM1404" if depends_on_size else "TM1403",
            statement.message or f"`{statement.condition.span.text}` does not hold",
            statement.condition.span,
            notes=self.values_of(statement.condition),
        )

    def _for(self, statement: syntax.For) -> None:
        start, stop = (
            coerce(self.value(e), _INT(e), e.span, "an end of the range") for e in (statement.start, statement.stop)
        )
        if stop - start > MAX_LOOP:
            raise Mistake(
                "TM1501", f"the loop runs {stop - start} times, the limit is {MAX_LOOP}", statement.stop.span
            )
        outer = self._loops
        for j in range(start, stop):
            self.environment[statement.variable.name] = j
            self._loops = (*outer, j)
            self._statements(statement.body)
        self._loops = outer

    # Expressions

    def eval_name(self, expr: syntax.Name) -> Any:
        value = super().eval_name(expr)
        if isinstance(value, _Poison):
            raise _Poisoned
        return value

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        if isinstance(value, _Poison):
            raise _Poisoned
        if not isinstance(value, _Value):
            return super().dimension(expr, value)
        if expr.dim not in value.tensor.letters:
            raise Mistake("TM1401", f"`{expr.name}` is a {value.tensor}, it has no {expr.dim}", expr.span)
        return getattr(value.tensor, expr.dim)

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
        number = right if tensor is left else left
        self._number(number, expr.right if tensor is left else expr.left)
        if expr.op == "*":
            return self._op("scale", expr, (tensor,), {"by": _plain(number)})
        if expr.op == "/" and tensor is left and number:
            return self._op("scale", expr, (tensor,), {"by": _plain(Fraction(1) / Fraction(number))})
        if expr.op == "+":
            return self._op("shift", expr, (tensor,), {"by": _plain(number)})
        if expr.op == "-" and tensor is left:
            return self._op("shift", expr, (tensor,), {"by": _plain(-number)})
        if expr.op == "-":
            negative = self._op("scale", expr, (tensor,), {"by": -1})
            return self._op("shift", expr, (negative,), {"by": _plain(number)})
        raise Mistake("TM1401", f"`{expr.op}` does not join a tensor and a number", expr.span)

    def _op(self, name: str, expr: syntax.Node, values: tuple[_Value, ...], arguments: dict[str, Any]) -> _Value:
        from tokenmix.blocks.ops import find_op

        op = find_op(name)
        assert op is not None
        inputs = tuple(v.tensor for v in values)
        try:
            op.check(*inputs, **arguments)
            output = op.shape(*inputs, **arguments)
        except Mistake as mistake:
            raise _placed(mistake, expr) from None
        assert isinstance(output, Tensor)
        node = self._add(name, op, arguments, values, (output,), expr)
        return _Value(Ref(node, 0), output)

    def eval_pipe(self, expr: syntax.Pipe) -> Any:
        value = self.value(expr.source)
        for call in expr.calls:
            value = self._apply(call, (self._tensor(value, call),))
        return value

    def eval_call(self, expr: syntax.Call) -> Any:
        if self.owner.library.find(expr.callee) is None and expr.callee in FUNCTIONS:
            return super().eval_call(expr)
        return self._apply(expr, ())

    def _apply(self, call: syntax.Call, flowing: tuple[_Value, ...]) -> Any:
        module = self.environment.get(call.callee)
        target = self.owner.library.find(call.callee)
        given = call.tensors if target is None or target.signature.inputs else ()
        tensors = flowing + tuple(self._tensor(self.value(a.value), a) for a in given)
        if isinstance(module, _Module):
            return self._apply_module(call, module, tensors)
        return self._results(self._node(call, tensors, self.definition.labels[id(call)]))

    def _apply_module(self, call: syntax.Call, module: _Module, tensors: tuple[_Value, ...]) -> Any:
        if call.arguments or call.label:
            raise Mistake("TM1306", f"{module} takes tensors only; its hyperparameters stand in its declaration", call.span)
        if not tensors:
            raise Mistake("TM1306", f"{module} is given no tensor", call.span)
        label = module.declaration.name.name
        node = self._node(module.declaration.call, tensors, label, first=module.first, shared=True)
        if module.first is None:
            module.first = self.graph.nodes[node]
        return self._results(node)

    def _node(
        self,
        call: syntax.Call,
        values: tuple[_Value, ...],
        label: str,
        first: GraphNode | None = None,
        shared: bool = False,
    ) -> int:
        target = self.owner.library.find(call.callee)
        assert target is not None, call.callee
        arguments = bind(
            target.signature,
            call,
            lambda p, e: self._argument(target, p, e),
            lambda p: default_value(p, target.name),
        )
        inputs = tuple(v.tensor for v in values)
        try:
            elaborated, outputs = self.owner.call(call, arguments, inputs)
        except Mistake as mistake:
            raise _placed(mistake, call) from None
        return self._add(label, elaborated, arguments, values, outputs, call, first, shared)

    def _argument(self, target: Definition | Op, parameter: syntax.Parameter, expr: syntax.Expr) -> Any:
        if is_word(parameter, expr, self.environment):
            assert isinstance(expr, syntax.Name)
            value: Any = expr.name
        else:
            value = self.value(expr)
        if isinstance(value, _Value | _Module) or isinstance(value, tuple) and any(isinstance(v, _Value) for v in value):
            raise Mistake(
                "TM1301",
                f"`{parameter.name}` of `{target.name}` is a hyperparameter, got {value}",
                expr.span,
                help="tensors stand before a `;`",
            )
        if type(value) is int and parameter.type is not None and parameter.type.names == ("int",) and not parameter.type.many:
            return value  # by far the most frequent case
        try:
            return coerce(value, parameter.type, expr.span, f"`{parameter.name}` of `{target.name}`")
        except Mistake as mistake:
            mistake.finding = replace(mistake.finding, notes=self.values_of(expr))
            raise

    def _add(
        self,
        label: str,
        target: Op | BlockGraph,
        arguments: dict[str, Any],
        values: tuple[_Value, ...],
        outputs: tuple[Tensor, ...],
        node: syntax.Node,
        first: GraphNode | None = None,
        shared: bool = False,
    ) -> int:
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
            arguments = {p.name: _known_rate(arguments[p.name], p) for p in target.signature.parameters}
            weights = dict(target.weights(*inputs, **arguments))
            tally = target.cost(inputs, outputs, **arguments)
        made = GraphNode(
            name, label, target, arguments, tuple(v.ref for v in values), outputs, node.span, weights,
            reused=first is not None, **({"tally": tally} if tally else {}),
        )  # fmt: skip
        if first is not None and (first.weights != weights or _blocks_differ(first.target, target)):
            raise Mistake("TM1402", f"`{label}` is used with inputs that need different weights", node.span)
        self.graph.nodes.append(made)
        if made.num_ops > MAX_NODES or len(self.graph.nodes) > MAX_NODES:
            raise Mistake("TM1502", f"the block grows past {MAX_NODES} ops", node.span)
        return len(self.graph.nodes) - 1

    def _results(self, node: int) -> Any:
        outputs = tuple(_Value(Ref(node, i), t) for i, t in enumerate(self.graph.nodes[node].outputs))
        return outputs if len(outputs) > 1 else outputs[0]

    def _tensor(self, value: Any, node: syntax.Node) -> _Value:
        if isinstance(value, _Value):
            return value
        if isinstance(value, tuple) and value and isinstance(value[0], _Value):
            raise Mistake(
                "TM1306", f"{len(value)} values come out before this and one is wanted", node.span, help="name each first"
            )
        raise Mistake("TM1301", f"a tensor is wanted here, got {describe(value)}", node.span)


def _blocks_differ(a: Op | BlockGraph, b: Op | BlockGraph) -> bool:
    return isinstance(a, BlockGraph) and isinstance(b, BlockGraph) and a.num_params != b.num_params


def _placed(mistake: Mistake, node: syntax.Node) -> Mistake:
    if mistake.finding.span is None:
        span = node.callee_span if isinstance(node, syntax.Call) else node.span
        mistake.finding = replace(mistake.finding, span=span)
    return mistake


def _plain(number: Any) -> Any:
    return float(number) if isinstance(number, Fraction) else number


def _INT(expr: syntax.Expr) -> syntax.TypeRef:
    return syntax.TypeRef(expr.span, ("int",))


def default_value(parameter: syntax.Parameter, owner: str) -> Any:
    """The value of a parameter's default, as its type wants it. Raises `Mistake`."""
    key = id(parameter)
    if key not in _DEFAULTS:
        assert parameter.default is not None
        if is_word(parameter, parameter.default, {}):
            value: Any = parameter.default.name  # type: ignore[union-attr]
        else:
            value = Evaluator({}, f"the head of `{owner}`").value(parameter.default)
            value = coerce(value, parameter.type, parameter.default.span, f"`{parameter.name}` of `{owner}`")
        _DEFAULTS[key] = (parameter, value)  # keeps the parameter, so that its id stays its own
    return _DEFAULTS[key][1]


_DEFAULTS: dict[int, tuple[syntax.Parameter, Any]] = {}


def _assigned(statement: syntax.Statement) -> list[str]:
    if isinstance(statement, syntax.Assign):
        return [t.name for t in statement.targets]
    if isinstance(statement, syntax.For):
        return [n for s in statement.body for n in _assigned(s)]
    if isinstance(statement, syntax.If):
        return [n for s in (*statement.then, *statement.otherwise) for n in _assigned(s)]
    return []


