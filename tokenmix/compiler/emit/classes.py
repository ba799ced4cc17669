"""One class per block definition.

The definition is run once with formulas for its sizes. Every op writes a line into the constructor (where it has
weights or hyperparameters of its own) and an expression into `forward`. An `if` whose outcome is the same wherever the
model uses the block leaves no trace; the others become an `if` of the emitted source.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmix.blocks.op import KINDS, Op, Tensor
from tokenmix.compiler.bind import default_value
from tokenmix.compiler.definition import Definition, calls_in
from tokenmix.compiler.elaborate import Elaborator
from tokenmix.compiler.emit.expressions import Arm, ExpressionWriter, Module, Several, Value, either, negated
from tokenmix.compiler.emit.formulas import Formula, Leaf, comment, hint_of, is_symbolic, leaves_of, symbol
from tokenmix.compiler.emit.text import WIDTH, broken, docstring, literal, paragraphs, quoted, range_text
from tokenmix.compiler.graph import BlockGraph
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import Evaluator, names_in

__all__ = ["ClassText", "Emitter"]


@dataclass
class ClassText:
    """An emitted class.

    Attributes:
        channels: constructor arguments that stand for the channels of an input: name -> number of the input.
        parameters: hyperparameters that the class takes, in order.
        learned: lines that put the class's own learned parameters, in a `module` of it, back to where they begin.
        text: the source.
    """

    name: str
    channels: dict[str, int]
    parameters: list[str]
    learned: list[str] = field(default_factory=list)
    text: str = ""


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

    def labels(self) -> dict[str, bool]:
        """Labels in the blocks written so far, and whether each is a learned parameter."""
        found = {}
        for definition, *_ in self._done:
            for call in calls_in(definition.block.body):
                target = self.library.find(call.callee)
                if id(call) in definition.labels:
                    found[definition.labels[id(call)]] = isinstance(target, Op) and target.is_parameter
            found |= dict.fromkeys(definition.modules, False)
        return found

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


class _ClassWriter(ExpressionWriter):
    """Writes the class of one definition as one of its uses in the model runs through it."""

    def __init__(self, emitter: Emitter, definition: Definition, instance: BlockGraph, name: str):
        super().__init__(emitter, definition)
        self.instance = instance
        self.text = ClassText(name, {}, [])
        self._checks: set[str] = set()
        self._modules: dict[str, Module] = {}
        self._result_type = "Tensor"
        self._returned: tuple[Tensor, ...] = ()
        self._bind_inputs()

    def _callee_outputs(
        self, target: Definition, inputs: tuple[Tensor, ...], arguments: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        return _Shadow(self.emitter, target, self.emitter.instance(target, inputs, arguments), "").results(
            inputs, arguments
        )

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
            self.environment[declared.name] = Value(declared.name, symbolic)
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

    def _learned(self, label: str, value: str) -> None:
        place, value = f"module.{label}", value.replace("self.", "module.")
        dictionary = any(f"self.{label} = nn.ParameterDict(" in line for line in self.init.lines)
        variables = [leaf.name for leaf, _, _ in self.loops]
        if not self.loops:
            lines = [f"nn.init.constant_({place}, {value})"]
        elif not any(re.search(rf"\b{v}\b", value) for v in variables):
            lines = [f"for parameter in {place}{'.values()' if dictionary else ''}:"]
            lines.append(f"    nn.init.constant_(parameter, {value})")
        else:  # each round begins elsewhere
            lines = []
            for leaf, start, stop in self.loops:
                with self._code(forward=True):
                    rounds = range_text(start, stop).replace("self.", "module.")
                lines.append("    " * len(lines) + f"for {leaf.name} in {rounds}:")
            key = 'f"' + "_".join(f"{{{v}}}" for v in variables) + '"'
            if dictionary:
                lines.append("    " * len(lines) + f"if {key} in {place}:")
            lines.append(
                "    " * len(lines) + f"nn.init.constant_({place}[{key if dictionary else variables[0]}], {value})"
            )
        if self.arms and not self.loops:  # some uses of the block have none
            lines = [f'if hasattr(module, "{label}"):', *(f"    {line}" for line in lines)]
        self.text.learned += lines

    # The whole class

    def write(self) -> ClassText:
        self._statements(self.definition.block.body)
        self._check_results()
        self._condition_modules()
        self._write_sizes()
        head = self._constructor()
        doc = paragraphs(self.definition.block.doc) or [f"Block `{self.definition.name}`."]
        lines = [f"class {self.text.name}(nn.Module):", *docstring(doc, "    "), *(["", *head] if head else [])]
        tensors = ", ".join(f"{i.name}: Tensor" for i in self.definition.signature.inputs)
        lines += ["", f"    def forward(self, {tensors}) -> {self._result_type}:", *self.forward.lines]
        self.text.text = "\n".join(line.rstrip() for line in lines)
        return self.text

    def _condition_modules(self) -> None:
        """A declared module that some uses of the block never come to is made only where it is come to."""
        modules = [m for m in self._modules.values() if m.uses]
        for module in sorted(modules, key=lambda m: -m.line):  # from the last line up, so that places stay
            label = module.declaration.name.name
            graphs = self.emitter.elaborator.instances[self.definition]
            if None in module.uses or all(any(n.label == label for n in g.nodes) for g in graphs):
                continue
            tests = []
            for use in module.uses:
                with self._code():
                    text = str(use)
                loops = [leaf.name for leaf in leaves_of(use) if leaf.role == "loop"]
                if loops:
                    raise Mistake(
                        "TM1702", f"`{label}` is used in some rounds of a loop, and in some uses of the block in none",
                        module.declaration.span, help="use it once outside the loop, or give the block another name",
                    )  # fmt: skip
                tests.append(text)
            condition = " or ".join(dict.fromkeys(tests if len(set(tests)) == 1 else [f"({t})" for t in tests]))
            line = self.init.lines[module.line].strip()
            self.init.lines[module.line : module.line + 1] = [f"        if {condition}:", f"            {line}"]

    def _check_results(self) -> None:
        """The formulas of the results must give the numbers of the use they were written from."""
        for symbolic, real in zip(self._returned, self.instance.outputs, strict=True):
            for formula, number in zip(symbolic.dims, real.dims, strict=True):
                hint = hint_of(formula)
                assert hint is None or hint == number, f"{self.definition.name}: {formula} is {hint}, not {number}"

    def _write_sizes(self) -> None:
        """Names for the sizes that `forward` mentions, at its top."""
        top = []
        for declared, tensor in zip(self.definition.signature.inputs, self.inputs, strict=True):
            sizes = [
                isinstance(d, Formula) and all(leaf.role == "size" for leaf in leaves_of(d)) for d in tensor.layout
            ]
            names = [str(d) if size else "" for d, size in zip(tensor.layout, sizes, strict=True)]
            used = [n for n in names if n in self.recorder.sizes]
            if used and tensor.kind == "map":
                both = ", ".join(n if n in used else "_" for n in names[:2])
                top.append(f"        {both} = {declared.name}.shape[1:3]")
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
            return self._no_constructor()
        stored = [
            f"        self.{name} = {name}"
            for name in [*self.text.channels, *self.text.parameters]
            if name in self.recorder.stored
        ]
        checks = [line for line in self.init.lines if line in self._checks]
        rest = [line for line in self.init.lines if line not in self._checks]
        head = f"    def __init__(self, {', '.join(arguments)}):"
        if len(head) > WIDTH:
            head = "    def __init__(\n        self,\n        " + ",\n        ".join(arguments) + ",\n    ):"
        return [head, "        super().__init__()", *checks, *stored, *rest]

    def _no_constructor(self) -> list[str]:
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
            module = self._modules[statement.name.name] = Module(statement)
            self.environment[statement.name.name] = module
        elif isinstance(statement, syntax.If):
            self._if(statement)
        elif isinstance(statement, syntax.For):
            self._for(statement)

    def _assign(self, statement: syntax.Assign) -> None:
        names = [t.name for t in statement.targets]
        value = self._flowing(statement.value, names[0] if len(names) == 1 else "")
        if isinstance(value, Value):
            self._set(names[0], value)
        elif isinstance(value, Several) or (isinstance(value, tuple) and value and isinstance(value[0], Value)):
            several = (
                value
                if isinstance(value, Several)
                else Several(", ".join(v.code for v in value), tuple(v.tensor for v in value))
            )
            for name, tensor in zip(names, several.tensors, strict=True):
                self.environment[name] = Value(name, tensor)
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

    def _set(self, name: str, value: Value) -> None:
        before = self.environment.get(name)
        self.environment[name] = Value(name, value.tensor)
        if value.code == name:
            return
        shape = comment(value.tensor.layout)
        same = isinstance(before, Value) and before.tensor == value.tensor
        self._line(f"{name} = {value.code}", "" if same else shape)

    def _line(self, code: str, remark: str = "") -> None:
        indent = 4 * self.forward.depth
        if remark and indent + len(code) + len(remark) + 4 <= WIDTH:
            code = f"{code}  # {remark}"
        for part in broken(" " * indent + code):
            self.forward.add(part[indent:])

    def _return(self, statement: syntax.Return) -> None:
        values = []
        for i, expr in enumerate(statement.values):
            self.pending.append({n for later in statement.values[i + 1 :] for n in names_in(later)})
            values.append(self._flowing(expr, self.definition.signature.inputs[0].name))
            self.pending.pop()
        self._returned = tuple(v.tensor for v in values)
        self._result_type = "Tensor" if len(values) == 1 else f"tuple[{', '.join(['Tensor'] * len(values))}]"
        shapes = [comment(v.tensor.layout) for v in values]
        last = self.forward.lines[-1].strip() if self.forward.lines else ""
        if (
            len(values) == 1
            and last.startswith(f"{values[0].code} = ")
            and not self.forward.lines[-1].startswith(" " * (4 * self.forward.depth + 1))
        ):
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
            text = str(negated(condition))
        first = len(lines.lines)
        lines.add(f"if {text}:")
        lines.add(f"    raise ValueError({quoted(message)})")
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
        self._arm(statement.then, Arm(condition, True))
        then = dict(self.environment)
        self.environment.clear()
        self.environment.update(before)
        otherwise = len(self.forward.lines)
        if statement.otherwise:
            self.forward.add("else:")
            self._arm(statement.otherwise, Arm(condition, False))
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
            if other is not None and not isinstance(value, Value | Module) and value != other:
                self.environment[name] = either(value, condition, other)
            if isinstance(value, Value) and isinstance(other, Value) and value.tensor != other.tensor:
                if _comparable(value.tensor, other.tensor):
                    continue  # equal where it counts: channels and kind
                raise Mistake(
                    "TM1702", f"`{name}` has different channels in the two arms of an `if`", statement.span,
                    help="let both arms give the same shape",
                )  # fmt: skip
            self.environment.setdefault(name, value)

    def _arm(self, body: Sequence[syntax.Statement], arm: Arm) -> None:
        self.arms.append(arm)
        with self.forward.indented():
            self._statements(body)
        self.arms.pop()

    def _optional_layer(self, statement: syntax.If, condition: Any) -> bool:
        """`if ...: x = x |> layer` becomes a layer that is the identity otherwise."""
        if (
            statement.otherwise
            or len(statement.then) != 1
            or self.loops
            or any(leaf.role == "size" for leaf in leaves_of(condition))
        ):
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
        if target is None or not isinstance(value, Value):
            return False
        arguments = self._arguments(target, call)
        constructor, outputs = self._construct(target, call, arguments, (value.tensor,))
        if constructor is None or len(outputs) != 1:
            return False
        with self._code():
            test = str(condition)
        label = self.definition.labels[id(call)]
        self.init.add(f"self.{label} = {constructor} if {test} else nn.Identity()")
        # Where the use at hand goes without the layer, its formulas are those of the input.
        shape = outputs[0] if self._holds(statement.condition) else value.tensor
        self._set(name, Value(f"self.{label}({value.code})", shape))
        return True

    def _holds(self, condition: syntax.Expr) -> bool:
        """Whether a condition on hyperparameters and channels holds in the use at hand."""
        first = self.instance.inputs[0]
        names = {letter: getattr(first, letter) for letter in first.letters} | self.instance.arguments
        try:
            return bool(Evaluator(names, "").value(condition))
        except Mistake:  # it reads a number that the block computes: the layer is there in some use
            return True

    def _for(self, statement: syntax.For) -> None:
        if self.emitter.elaborator.branches.get(id(statement)) == {False}:
            return  # no use of the block ever enters the loop
        start, stop = self.value(statement.start), self.value(statement.stop)
        leaf = Leaf(statement.variable.name, "loop")
        outer = self.environment.get(leaf.name)
        before = dict(self.environment)
        self.environment[leaf.name] = Formula.of(leaf, hint_of(start))
        self.loops.append((leaf, start, stop))
        with self._code(forward=True):
            head = f"for {leaf.name} in {range_text(start, stop)}:"
        self.forward.add(head)
        first = len(self.forward.lines)
        with self.forward.indented():
            self._statements(statement.body)
        if self.forward.lines[first] == "":
            del self.forward.lines[first - 1 :]
        self.loops.pop()
        for name, value in before.items():
            now = self.environment.get(name)
            if isinstance(value, Value) and isinstance(now, Value) and not _comparable(value.tensor, now.tensor):
                raise Mistake(
                    "TM1702", f"the channels of `{name}` change in a round of the loop", statement.variable.span,
                    help="write the rounds out, or give them to a stage's `blocks`",
                )  # fmt: skip
        if outer is not None:
            self.environment[leaf.name] = outer


class _Shadow(_ClassWriter):
    """Runs a called block for the shape of its results in the caller's formulas, and writes nothing."""

    def eval_name(self, expr: syntax.Name) -> Any:
        return Evaluator.eval_name(self, expr)  # the caller's loops are not this block's

    def results(self, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        for declared, tensor in zip(self.definition.signature.inputs, inputs, strict=True):
            self.environment[declared.name] = Value(declared.name, tensor)
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


def _is_size(dim: Any) -> bool:
    """Whether a dimension is known per input."""
    return isinstance(dim, Formula) and all(leaf.role == "size" for leaf in leaves_of(dim))


def _comparable(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in what the emitted code depends on: kind and channels."""
    if a.kind != b.kind:
        return False
    return "C" not in KINDS[a.kind] or a.C == b.C
