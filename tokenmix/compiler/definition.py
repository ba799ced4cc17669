"""A block definition with what can be said of it before any number is known: names, labels, unused things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenmix.blocks.op import KINDS, Op
from tokenmix.compiler.bind import hyperparameters, is_word, match_arguments
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, nearest
from tokenmix.dsl.expressions import FUNCTIONS, TYPES
from tokenmix.dsl.source import Span

if TYPE_CHECKING:
    from tokenmix.compiler.library import Library

__all__ = ["DIMENSIONS", "MODULE_ATTRIBUTES", "Definition", "calls_in"]

DIMENSIONS = ("C", "H", "W", "N")

# Attributes that torch.nn.Module gives a meaning to; a submodule of such a name would hide them.
MODULE_ATTRIBUTES = frozenset(
    """T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict
    modules mtia named_buffers named_children named_modules named_parameters parameters register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook
    register_module register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory state_dict to to_empty train training type xpu zero_grad""".split()
)


class Definition:
    """A block as written, with a stable label for every call.

    Attributes:
        labels: id of a call node -> name of the submodule it becomes: the label as written, else the name of what is
            called, numbered from the second on.
        shipped: whether it comes with tokenmix, so that a mistake in its use is the caller's.
    """

    def __init__(self, block: syntax.Block, *, shipped: bool = False):
        self.block = block
        self.shipped = shipped
        self.name = block.name
        self.signature = block.signature
        self.modules = {s.name.name: s for s in _statements(block.body) if isinstance(s, syntax.ModuleDecl)}
        self.labels: dict[int, str] = {}
        self._label_findings: list[Finding] = []
        self._assign_labels()
        self._findings: dict[int, list[Finding]] = {}

    def __repr__(self) -> str:
        return f"<block {self.name}>"

    def _assign_labels(self) -> None:
        taken = set(self.modules)
        calls = [c for c in calls_in(self.block.body) if c.callee not in self.modules and c.callee not in FUNCTIONS]
        taken |= {c.label for c in calls if c.label}
        for call in calls:
            label = call.label
            if not label:
                label, number = call.callee, 1
                while label in taken:
                    number += 1
                    label = f"{call.callee}_{number}"
            taken.add(label)
            self.labels[id(call)] = label
        self._check_labels(self.block.body, {})
        parameters = {p.name for p in self.signature.parameters}
        for node in [*calls, *self.modules.values()]:
            label = node.name.name if isinstance(node, syntax.ModuleDecl) else node.label
            if label in MODULE_ATTRIBUTES or label in parameters:
                span = node.name.span if isinstance(node, syntax.ModuleDecl) else _label_span(node)
                why = "a hyperparameter has that name" if label in parameters else "every torch module has an attribute so named"
                self._label_findings.append(Finding("TM1211", f"no submodule can be called `{label}`: {why}", span))

    def _check_labels(self, body: Iterable[syntax.Statement], seen: dict[str, Span]) -> dict[str, Span]:
        """Explicit labels are unique, except in arms of an `if` that exclude each other."""
        for statement in body:
            if isinstance(statement, syntax.If):
                then = self._check_labels(statement.then, dict(seen))
                seen = {**then, **self._check_labels(statement.otherwise, dict(seen))}
                for call in calls_in((statement.condition,)):
                    self._note_label(call, seen)
            elif isinstance(statement, syntax.For):
                seen = self._check_labels(statement.body, seen)
            else:
                for call in calls_in((statement,)):
                    self._note_label(call, seen)
        return seen

    def _note_label(self, call: syntax.Call, seen: dict[str, Span]) -> None:
        if not call.label:
            return
        if call.label in seen or call.label in self.modules:
            first = seen.get(call.label) or self.modules[call.label].span
            self._label_findings.append(
                Finding(
                    "TM1208",
                    f"two submodules are called `{call.label}`",
                    _label_span(call),
                    help=f"first at {first}; declare `module {call.label} = ...` to use one set of weights twice",
                )
            )
        seen.setdefault(call.label, _label_span(call))

    def findings(self, library: Library) -> list[Finding]:
        """What is wrong with the definition whatever the numbers are. Looked up once per library."""
        key = id(library)
        if key not in self._findings:
            self._findings[key] = [*self._label_findings, *_Checker(self, library).findings]
        return self._findings[key]


def _label_span(call: syntax.Call) -> Span:
    return call.span.source.span(call.span.start, call.span.start + len(call.label))


def calls_in(node: object) -> Iterator[syntax.Call]:
    """Calls below a node in the order in which they run."""
    if isinstance(node, tuple | list):
        for item in node:
            yield from calls_in(item)
    elif isinstance(node, syntax.Call):
        yield from calls_in(node.tensors)
        yield from calls_in(node.arguments)
        yield node
    elif isinstance(node, syntax.ModuleDecl):
        return
    elif isinstance(node, syntax.Node):
        for value in vars(node).values():
            if isinstance(value, syntax.Node | tuple):
                yield from calls_in(value)


def _statements(body: Iterable[syntax.Statement]) -> Iterator[syntax.Statement]:
    for statement in body:
        yield statement
        if isinstance(statement, syntax.For):
            yield from _statements(statement.body)
        elif isinstance(statement, syntax.If):
            yield from _statements(statement.then)
            yield from _statements(statement.otherwise)


class _Checker:
    """One walk over a definition that notes unknown, unused, doubly defined and misfitting names."""

    def __init__(self, definition: Definition, library: Library):
        self.library = library
        self.definition = definition
        self.findings: list[Finding] = []
        self.used: set[str] = set()
        block = definition.block
        self.defined: dict[str, Span] = {}
        for item in (*block.signature.inputs, *block.signature.parameters):
            if item.name in self.defined:
                self._add("TM1208", f"`{item.name}` stands twice in the head of `{block.name}`", item.span)
            self.defined[item.name] = item.span
        if not block.signature.inputs:
            self._add("TM1306", f"block `{block.name}` takes no tensor", block.signature.span)
        self._check_types()
        self.known = {*self.defined, *DIMENSIONS, "_"}
        self._body(block.body)
        self._unused()
        if not block.body or not _returns(block.body[-1]):
            self._add(
                "TM1212",
                f"block `{block.name}` does not end with `return`",
                block.body[-1].span if block.body else block.span,
                help="the last line hands back the result: `return x`",
            )

    def _add(self, id: str, message: str, span: Span | None, **details) -> None:
        self.findings.append(Finding(id, message, span, **details))

    def _check_types(self) -> None:
        for item in self.definition.signature.inputs:
            for kind in item.kinds:
                if kind not in KINDS:
                    near = nearest(kind, KINDS)
                    self._add(
                        "TM1206",
                        f"no kind of value is called `{kind}`",
                        item.span,
                        help=f"did you mean `{near[0]}`?" if near else f"kinds: {', '.join(KINDS)}",
                    )
            if item.many:
                self._add("TM1306", "only ops take any number of tensors", item.span)
        for parameter in self.definition.signature.parameters:
            type_ = parameter.type
            if type_ is None and parameter.default is None:
                self._add("TM1202", f"`{parameter.name}` needs a type or a default", parameter.span, help="`name: int`")
            if type_ is not None and (len(type_.names) == 1 or type_.many) and type_.names[0] not in TYPES:
                near = nearest(type_.names[0], TYPES)
                self._add(
                    "TM1206",
                    f"no type is called `{type_.names[0]}`",
                    type_.span,
                    help=f"did you mean `{near[0]}`?" if near else f"types: {', '.join(TYPES)}, [type], or words a | b",
                )
            if parameter.default is not None:
                self._expression(parameter.default, parameter)

    def _body(self, body: Iterable[syntax.Statement]) -> None:
        body = list(body)
        for i, statement in enumerate(body):
            if isinstance(statement, syntax.Return) and i < len(body) - 1:
                self._add("TM1405", "nothing behind `return` is ever reached", body[i + 1].span)
            self._statement(statement)

    def _statement(self, statement: syntax.Statement) -> None:
        if isinstance(statement, syntax.Assign):
            self._expression(statement.value)
            for target in statement.targets:
                self._define(target)
        elif isinstance(statement, syntax.ModuleDecl):
            self._call(statement.call, piped=True)
            self._define(statement.name)
        elif isinstance(statement, syntax.Require):
            self._expression(statement.condition)
        elif isinstance(statement, syntax.Return):
            for value in statement.values:
                self._expression(value)
        elif isinstance(statement, syntax.For):
            self._expression(statement.start)
            self._expression(statement.stop)
            self._define(statement.variable)
            self.used.add(statement.variable.name)  # a loop may simply count
            # What one round assigns, the next round may read.
            before = set(self.known)
            self.known |= {t.name for s in _statements(statement.body) for t in _targets(s)}
            self._body(statement.body)
            self.known = before | self.known
        elif isinstance(statement, syntax.If):
            self._expression(statement.condition)
            self._body(statement.then)
            self._body(statement.otherwise)

    def _define(self, name: syntax.Name) -> None:
        parameters = {p.name for p in self.definition.signature.parameters}
        if name.name in parameters:
            self._add("TM1208", f"`{name.name}` is a hyperparameter and cannot be assigned", name.span)
        if self.library.find(name.name) is not None or name.name in FUNCTIONS:
            self._add("TM1208", f"`{name.name}` is the name of a block, op or function", name.span)
        if name.name != "_":
            self.defined.setdefault(name.name, name.span)
            self.known.add(name.name)

    def _expression(self, expr: syntax.Expr, parameter: syntax.Parameter | None = None) -> None:
        if isinstance(expr, syntax.Name):
            if parameter is not None and is_word(parameter, expr, self.known):
                return
            self._use(expr)
        elif isinstance(expr, syntax.Pipe):
            self._expression(expr.source)
            for call in expr.calls:
                self._call(call, piped=True)
        elif isinstance(expr, syntax.Call):
            self._call(expr, piped=False)
        elif isinstance(expr, syntax.Node):
            for value in vars(expr).values():
                for item in value if isinstance(value, tuple) else (value,):
                    if isinstance(item, syntax.Node):
                        self._expression(item)  # type: ignore[arg-type]

    def _use(self, name: syntax.Name) -> None:
        self.used.add(name.name)
        if name.name not in self.known:
            near = nearest(name.name, self.known - {"_"})
            self._add(
                "TM1206",
                f"nothing is called `{name.name}` in block `{self.definition.name}`",
                name.span,
                help=f"did you mean `{near[0]}`?" if near else "",
            )
            self.known.add(name.name)  # one finding per name
        if name.dim and name.dim not in {d for letters in KINDS.values() for d in letters}:
            self._add("TM1206", f"no dimension is called `{name.dim}`", name.span, help="C, H, W or N")

    def _call(self, call: syntax.Call, *, piped: bool) -> None:
        modules = self.definition.modules
        target = self.library.find(call.callee)
        if target is None or target.signature.inputs:
            for argument in call.tensors:
                self._expression(argument.value)
        if call.callee in modules:
            self.used.add(call.callee)
            return
        if target is None:
            if call.callee in FUNCTIONS:
                for argument in call.arguments:
                    self._expression(argument.value)
                return
            near = nearest(call.callee, [*self.library.names(), *FUNCTIONS, *modules])
            self._add(
                "TM1203",
                f"no block or op is called `{call.callee}`",
                call.callee_span,
                label=f"known with a near name: {', '.join(near)}" if near else "",
                help=f"write `{near[0]}`, or list all with `tokenmix list`" if near else "list all with `tokenmix list`",
            )
            for argument in call.arguments:
                self._expression(argument.value)
            return
        given = hyperparameters(target.signature, call)
        matched, findings = match_arguments(target.signature, given, call)
        self.findings += findings
        self._count_tensors(call, target, piped + (len(call.tensors) if given is call.arguments else 0))
        for parameter in target.signature.parameters:
            if parameter.name in matched:
                self._expression(matched[parameter.name].value, parameter)

    def _count_tensors(self, call: syntax.Call, target: Definition | Op, given: int) -> None:
        inputs = target.signature.inputs
        if self.definition.modules and any(m.call is call for m in self.definition.modules.values()):
            return  # a declared module gets its tensors where it is called
        if any(a.name for a in call.tensors):
            self._add("TM1306", f"tensors are given to `{call.callee}` by position", call.span)
        if given == len(inputs) or (inputs and inputs[-1].many and given >= len(inputs)):
            return
        wanted = ", ".join(i.name for i in inputs)
        help = "in a pipe the flowing value is the first tensor; further tensors stand before a `;`"
        if given > len(inputs) and not call.divided:
            help = f"hyperparameters stand behind a `;`: {call.callee}({wanted}; ...)"
        self._add(
            "TM1306",
            f"`{call.callee}` takes {len(inputs)} tensor{'s' if len(inputs) != 1 else ''} ({wanted}), got {given}",
            call.callee_span,
            help=help,
        )

    def _unused(self) -> None:
        for name, span in self.defined.items():
            if name not in self.used and name != self._first_input():
                what = "hyperparameter" if any(p.name == name for p in self.definition.signature.parameters) else "name"
                self._add("TM1207", f"the {what} `{name}` is never used", span, help="use it or leave it out")

    def _first_input(self) -> str:
        # The first tensor is used through C, H, W and N alone, too.
        inputs = self.definition.signature.inputs
        return inputs[0].name if inputs and self.used & set(DIMENSIONS) else ""


def _targets(statement: syntax.Statement) -> tuple[syntax.Name, ...]:
    return statement.targets if isinstance(statement, syntax.Assign) else ()


def _returns(statement: syntax.Statement) -> bool:
    if isinstance(statement, syntax.If):
        return bool(statement.otherwise) and _returns(statement.then[-1]) and _returns(statement.otherwise[-1])
    return isinstance(statement, syntax.Return)
