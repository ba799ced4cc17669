"""A block definition with what can be said of it before any number is known: names, labels, unused things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tokenmix.blocks.op import KINDS, Op
from tokenmix.compiler.bind import default_value, hyperparameters, is_word, match_arguments, takes
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import MAX_FINDINGS, Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import FUNCTIONS, TYPES, listed
from tokenmix.dsl.source import Span

if TYPE_CHECKING:
    from tokenmix.compiler.library import Library

__all__ = ["DIMENSIONS", "MODULE_ATTRIBUTES", "Definition", "calls_in", "circles", "statements"]

DIMENSIONS = ("C", "H", "W", "N")
LETTERS = tuple(dict.fromkeys([*DIMENSIONS, *(letter for letters in KINDS.values() for letter in letters)]))

# Attributes that torch.nn.Module gives a meaning to; a submodule of such a name would hide them.
MODULE_ATTRIBUTES = frozenset(
    """T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict
    modules mtia named_buffers named_children named_modules named_parameters parameters register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook
    register_module register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory state_dict to to_empty train training type xpu zero_grad""".split()  # noqa: SIM905
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
        self.modules = {s.name.name: s for s in statements(block.body) if isinstance(s, syntax.ModuleDecl)}
        self.labels: dict[int, str] = {}
        self._label_findings: list[Finding] = []
        self._assign_labels()
        self._findings: WeakKeyDictionary[Library, list[Finding]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<block {self.name}>"

    @cached_property
    def calls(self) -> dict[Span, syntax.Call]:
        """Every call by its place in the text."""
        return {call.span: call for call in calls_in(self.block.body)}

    def _assign_labels(self) -> None:
        taken = set(self.modules)
        calls = [c for c in calls_in(self.block.body) if c.callee not in self.modules and c.callee not in FUNCTIONS]
        taken |= {c.label for c in calls if c.label}
        last: dict[str, int] = {}
        for call in calls:
            label = call.label
            if not label:
                label, number = call.callee, last.get(call.callee, 1)
                while label in taken:
                    number += 1
                    label = f"{call.callee}_{number}"
                last[call.callee] = number
            taken.add(label)
            self.labels[id(call)] = label
        self._check_labels(self.block.body, {})
        parameters = {p.name for p in self.signature.parameters}
        nodes: list[syntax.Call | syntax.ModuleDecl] = [*calls, *self.modules.values()]
        for node in nodes:
            label = node.name.name if isinstance(node, syntax.ModuleDecl) else node.label
            if label in MODULE_ATTRIBUTES or label in parameters:
                span = node.name.span if isinstance(node, syntax.ModuleDecl) else _label_span(node)
                why = (
                    "a hyperparameter has that name"
                    if label in parameters
                    else "every torch module has an attribute so named"
                )
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
            first = seen.get(call.label) or self.modules[call.label].name.span
            self._label_findings.append(
                Finding(
                    "TM1208",
                    f"two submodules are called `{call.label}`",
                    _label_span(call),
                    notes=(Note("first", first),),
                    help=f"give one another label; to use its weights twice, declare `module {call.label} = ...`",
                )
            )
        seen.setdefault(call.label, _label_span(call))

    def findings(self, library: Library) -> list[Finding]:
        """What is wrong with the definition whatever the numbers are. Looked up once per library."""
        if library not in self._findings:
            self._findings[library] = [*self._label_findings, *_Checker(self, library).findings]
        return self._findings[library]


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


def statements(body: Iterable[syntax.Statement]) -> Iterator[syntax.Statement]:
    """Every statement of a body, those inside of loops and arms too."""
    for statement in body:
        yield statement
        if isinstance(statement, syntax.For):
            yield from statements(statement.body)
        elif isinstance(statement, syntax.If):
            yield from statements(statement.then)
            yield from statements(statement.otherwise)


class _Checker:
    """One walk over a definition that notes unknown, unused, doubly defined and misfitting names."""

    def __init__(self, definition: Definition, library: Library):
        self.library = library
        self.definition = definition
        self.findings: list[Finding] = []
        self.used: set[str] = set()
        self._in_loop = 0
        self.lost = False  # whether an unknown name may stand for any of the unused ones
        block = definition.block
        self.defined: dict[str, Span] = {}
        heads: tuple[syntax.Input | syntax.Parameter, ...] = (*block.signature.inputs, *block.signature.parameters)
        for item in heads:
            if item.name in self.defined:
                self._add("TM1208", f"`{item.name}` stands twice in the head of `{block.name}`", item.span)
            self.defined[item.name] = item.span
        if not block.signature.inputs:
            self._add("TM1306", f"block `{block.name}` takes no tensor", block.signature.span)
        self._check_types()
        self.known = {*self.defined, *DIMENSIONS, "_"}
        self._body(block.body)
        if self._enough:
            return
        self._unused()
        if not block.body or not _returns(block.body[-1]):
            self._add(
                "TM1212",
                f"block `{block.name}` does not end with `return`",
                block.body[-1].span if block.body else block.span,
                help="the last line hands back the result: `return x`",
            )

    @property
    def _enough(self) -> bool:
        return len(self.findings) >= MAX_FINDINGS

    def _add(self, id: str, message: str, span: Span | None, **details) -> None:
        self.findings.append(Finding(id, message, span, **details))

    def _check_types(self) -> None:
        for item in self.definition.signature.inputs:
            for kind in item.kinds:
                if kind not in KINDS:
                    near = nearest(kind, KINDS)
                    help = f"did you mean `{near[0]}`?" if near else f"kinds: {', '.join(KINDS)}"
                    if kind in TYPES:
                        help = "hyperparameters stand behind a `;`: " + self._head_with_semicolon(item)
                    self._add("TM1206", f"no kind of tensor is called `{kind}`", item.span, help=help)
            if item.many:
                self._add("TM1306", "only ops take any number of tensors", item.span)
        for parameter in self.definition.signature.parameters:
            type_ = parameter.type
            if type_ is None and parameter.default is None:
                self._add("TM1202", f"`{parameter.name}` needs a type or a default", parameter.span, help="`name: int`")
            elif type_ is not None and (len(type_.names) == 1 or type_.many) and type_.names[0] not in TYPES:
                near = nearest(type_.names[0], TYPES)
                self._add(
                    "TM1206",
                    f"no type is called `{type_.names[0]}`",
                    type_.span,
                    help=f"did you mean `{near[0]}`?" if near else f"types: {', '.join(TYPES)}, [type], or words a | b",
                )
            elif parameter.default is not None:
                try:
                    default_value(parameter, self.definition.name)
                except Mistake as mistake:
                    self.findings.append(mistake.finding)

    def _head_with_semicolon(self, first: syntax.Input) -> str:
        signature = self.definition.signature
        at = signature.inputs.index(first)
        inputs = ", ".join(i.name for i in signature.inputs[:at]) or "x"
        return f"`block {signature.name}({inputs}; {first.span.text})`"

    def _body(self, body: Iterable[syntax.Statement]) -> None:
        body = list(body)
        for i, statement in enumerate(body):
            if self._enough:
                return
            if isinstance(statement, syntax.Return) and i < len(body) - 1:
                self._add(
                    "TM1405",
                    "nothing behind `return` is ever reached",
                    body[i + 1].span,
                    notes=(Note("returns", statement.span),),
                )
            self._statement(statement)

    def _statement(self, statement: syntax.Statement) -> None:
        if isinstance(statement, syntax.Assign):
            self._expression(statement.value)
            for target in statement.targets:
                self._define(target)
        elif isinstance(statement, syntax.ModuleDecl):
            self._call(statement.call, piped=True)
            if self._in_loop:
                self._add(
                    "TM1208",
                    f"`{statement.name.name}` would be declared anew in every round of the loop",
                    statement.name.span,
                    help="declare it in front of the loop; a layer for every round is a labelled call",
                )
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
            self.known |= {t.name for s in statements(statement.body) for t in _targets(s)}
            self._in_loop += 1
            self._body(statement.body)
            self._in_loop -= 1
            self.known = before | self.known
        elif isinstance(statement, syntax.If):
            self._expression(statement.condition)
            self._body(statement.then)
            self._body(statement.otherwise)

    def _define(self, name: syntax.Name) -> None:
        parameters = {p.name for p in self.definition.signature.parameters}
        if name.name in parameters:
            self._add("TM1208", f"`{name.name}` is a hyperparameter and cannot be assigned", name.span)
        target = self.library.find(name.name)
        # What a spec defines does not make a shipped text wrong.
        if (target is not None and not (self.definition.shipped and _is_own(target))) or name.name in FUNCTIONS:
            what = "a function on numbers" if target is None else "an op" if isinstance(target, Op) else "a block"
            self._add("TM1208", f"`{name.name}` is the name of {what}", name.span, help="choose another name")
        if name.name != "_":
            self.defined.setdefault(name.name, name.span)
            self.known.add(name.name)

    def _expression(self, expr: syntax.Expr, parameter: syntax.Parameter | None = None) -> None:
        if isinstance(expr, syntax.Name):
            if parameter is not None and is_word(parameter, expr, self.known):
                self._word(expr, parameter)
                return
            self._use(expr)
        elif isinstance(expr, syntax.Pipe):
            self._expression(expr.source)
            for call in expr.calls:
                self._call(call, piped=True)
        elif isinstance(expr, syntax.Call):
            self._call(expr, piped=False)
        elif isinstance(expr, syntax.Node):
            if isinstance(expr, syntax.Binary):
                self._compared_words(expr)
            for value in vars(expr).values():
                for item in value if isinstance(value, tuple) else (value,):
                    if isinstance(item, syntax.Node):
                        self._expression(item)  # type: ignore[arg-type]

    def _compared_words(self, expr: syntax.Binary) -> None:
        """`mode == "sotf"` can never be true where mode is `soft | hard`."""
        sides = (expr.left, expr.right)
        for name, text in (sides, sides[::-1]):
            if (
                not isinstance(name, syntax.Name)
                or not isinstance(text, syntax.Literal)
                or not isinstance(text.value, str)
            ):
                continue
            for parameter in self.definition.signature.parameters:
                words = parameter.type.names if parameter.type and len(parameter.type.names) > 1 else ()
                if parameter.name == name.name and words and text.value not in words:
                    near = nearest(text.value, words)
                    self._add(
                        "TM1301",
                        f'`{name.name}` is {" or ".join(words)}, never "{text.value}"',
                        text.span,
                        help=f'did you mean "{near[0]}"?' if near else "",
                    )

    def _word(self, word: syntax.Name, parameter: syntax.Parameter) -> None:
        assert parameter.type is not None
        if word.name not in parameter.type.names:
            near = nearest(word.name, [*parameter.type.names, *self.known])
            self._add(
                "TM1301",
                f"`{parameter.name}` must be {' or '.join(parameter.type.names)}, got {word.name}",
                word.span,
                help=f"did you mean `{near[0]}`?" if near else "",
            )

    def _use(self, name: syntax.Name) -> None:
        self.used.add(name.name)
        if name.name not in self.known and not self._enough:
            near = nearest(name.name, self.known - {"_"})
            help = f"did you mean `{near[0]}`?" if near else f"known here: {listed(sorted(self.known - {'_'}))}"
            self.used |= set(near)  # what is meant is not unused
            self.lost |= not near
            target = self.library.find(name.name)
            if target is not None or name.name in FUNCTIONS:
                help = f"it is called with brackets, `{name.name}(...)`, or stands behind a `|>`"
            self._add(
                "TM1206", f"nothing is called `{name.name}` in block `{self.definition.name}`", name.span, help=help
            )
            self.known.add(name.name)  # one finding per name
        if name.dim and name.dim not in LETTERS:
            self._add(
                "TM1206", f"no dimension is called `{name.dim}`",
                name.span.source.span(name.span.end - len(name.dim), name.span.end),
                help=f"dimensions: {', '.join(LETTERS)}",
            )  # fmt: skip

    def _call(self, call: syntax.Call, *, piped: bool) -> None:
        if self._enough:
            return
        modules = self.definition.modules
        target = self.library.find(call.callee)
        if target is None or target.signature.inputs:
            for argument in call.tensors:
                self._expression(argument.value)
        if call.callee in modules:
            self.used.add(call.callee)
            return
        if target is None:
            if call.callee not in FUNCTIONS and not self.library.may_hold(call.callee):
                self._unknown_block(call)
            for argument in call.arguments:
                self._expression(argument.value)
            return
        given = hyperparameters(target.signature, call)
        matched, findings = match_arguments(target.signature, given, call)
        if (
            piped
            and given
            and any(f.id == "TM1306" for f in findings)
            and not call.divided
            and self._is_input(given[0].value)
        ):
            tensor = given[0].value.span.text
            help = f"in a pipe the flowing value is the tensor: leave `{tensor}` out"
            findings = [
                Finding(
                    "TM1306", f"`{target.name}` is given a tensor among its hyperparameters", given[0].span, help=help
                )
            ]
            matched = {}
        findings += self._count_tensors(call, target, piped + (len(call.tensors) if given is call.arguments else 0))
        if findings and self.definition.shipped and _is_own(target):
            findings = [self._hidden(call, target, findings[0])]
        self.findings += findings
        inputs = {i.name for i in self.definition.signature.inputs}
        for parameter in target.signature.parameters:
            given_value = matched.get(parameter.name)
            if given_value is None:
                if parameter.default is None:
                    self.used.add(parameter.name)  # what is missing here is most likely not unused
            elif (
                isinstance(given_value.value, syntax.Name)
                and given_value.value.name in inputs
                and not given_value.value.dim
            ):
                self.used |= {parameter.name, given_value.value.name}
                tensor = given_value.value.name
                further = len(target.signature.inputs) > 1
                self._add(
                    "TM1301",
                    f"`{parameter.name}` of `{target.name}` is a hyperparameter, and `{tensor}` is a tensor",
                    given_value.value.span,
                    help="further tensors stand before a `;`" if further else f"a size is a number: `{tensor}.C`",
                )
            else:
                self._expression(given_value.value, parameter)
        for argument in given:
            if argument not in matched.values():
                self._expression(argument.value)

    def _is_input(self, expr: syntax.Expr) -> bool:
        return (
            isinstance(expr, syntax.Name)
            and not expr.dim
            and any(i.name == expr.name for i in self.definition.signature.inputs)
        )

    def _unknown_block(self, call: syntax.Call) -> None:
        near = nearest(call.callee, [*self.library.names(), *FUNCTIONS, *self.definition.modules])
        help = f"write `{near[0]}`, or list all with `tokenmix list`" if near else "list all with `tokenmix list`"
        if call.callee in self.known:
            help = f"`{call.callee}` is a value here; a product is written `{call.callee} * (...)`"
        self._add(
            "TM1203",
            f"no block or op is called `{call.callee}`",
            call.callee_span,
            label=f"known with a near name: {', '.join(near)}" if near else "",
            help=help,
        )

    def _hidden(self, call: syntax.Call, target: Definition | Op, finding: Finding) -> Finding:
        """A block of the spec hides a shipped one, and a shipped block calls it as it was."""
        from tokenmix.compiler.library import find_shipped

        assert isinstance(target, Definition)
        shipped = find_shipped(target.name)
        head = shipped.signature if shipped is not None else None
        return Finding(
            finding.id,
            f"block `{target.name}` hides the shipped one, which block `{self.definition.name}` calls otherwise: "
            f"{finding.message}",
            target.block.name_span,
            notes=(Note(f"called as `{_one_line(call.span.text)}`", call.span),),
            help="give the block another name, or the head of the shipped one" + (f": {takes(head)}" if head else ""),
        )

    def _count_tensors(self, call: syntax.Call, target: Definition | Op, given: int) -> list[Finding]:
        inputs = target.signature.inputs
        if self.definition.modules and any(m.call is call for m in self.definition.modules.values()):
            return []  # a declared module gets its tensors where it is called
        named = next((a for a in call.tensors if a.name), None)
        if named is not None:
            return [Finding("TM1306", f"tensors are given to `{call.callee}` by position, without a name", named.span)]
        if given == len(inputs) or (inputs and inputs[-1].many and given >= len(inputs)):
            return []
        wanted = ", ".join(i.name for i in inputs)
        help = ""
        if given > len(inputs) and not call.divided:
            help = f"hyperparameters stand behind a `;`: {call.callee}({wanted}; ...)"
        elif given < len(inputs):
            help = "in a pipe the flowing value is the first tensor; further tensors stand before a `;`"
        return [
            Finding(
                "TM1306",
                f"`{call.callee}` takes {len(inputs)} tensor{'s' if len(inputs) != 1 else ''} ({wanted}), got {given}",
                call.callee_span,
                help=help,
            )
        ]

    def _unused(self) -> None:
        # What stands in the place of another block is called as that one, whether or not it needs all it is given.
        hidden = self.library.hidden(self.definition.name)
        self.used |= {p.name for p in hidden.signature.parameters} if hidden else set()
        for name, span in self.defined.items():
            if self._enough:
                return
            if name not in self.used and name != self._first_input():
                what = "hyperparameter" if any(p.name == name for p in self.definition.signature.parameters) else "name"
                if what == "name" and self.lost:
                    continue
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


def _is_own(target: Definition | Op) -> bool:
    return isinstance(target, Definition) and not target.shipped


def _one_line(text: str) -> str:
    return " ".join(text.split())


def circles(library: Library) -> list[Finding]:
    """Blocks of a library that contain themselves, one finding for each circle."""
    findings: list[Finding] = []
    done: set[Definition] = set()
    for start in library.own():
        # Depth first without recursion: a path of (block, its calls not yet followed).
        path: list[tuple[Definition, Iterator[syntax.Call]]] = []
        on_path: dict[Definition, int] = {}

        def enter(definition: Definition) -> None:
            on_path[definition] = len(path)  # noqa: B023
            path.append((definition, iter(_all_calls(definition))))  # noqa: B023

        if start not in done:
            enter(start)
        while path:
            definition, calls = path[-1]
            call = next(calls, None)
            if call is None:
                path.pop()
                del on_path[definition]
                done.add(definition)
                continue
            target = None if call.callee in definition.modules else library.find(call.callee)
            if not isinstance(target, Definition) or target in done:
                continue
            if target not in on_path:
                enter(target)
                continue
            circle = [d for d, _ in path[on_path[target] :]]
            findings.append(_circle(circle, call))
    return findings


def _circle(circle: list[Definition], closing: syntax.Call) -> Finding:
    from tokenmix.compiler.library import find_shipped

    names = " -> ".join([d.name for d in circle] + [circle[0].name])
    own = next(d for d in circle if not d.shipped)
    after = circle[(circle.index(own) + 1) % len(circle)]
    call = next((c for c in _all_calls(own) if c.callee == after.name), closing)
    help = "a block cannot use itself, however its numbers change; write a loop: `for j in 0..depth:`"
    if find_shipped(own.name) is not None:
        help = f"in a spec with a block `{own.name}` that name means this block everywhere; give it another name"
    return Finding("TM1210", f"block `{circle[0].name}` contains itself: {names}", call.callee_span, help=help)


def _all_calls(definition: Definition) -> list[syntax.Call]:
    return [*(m.call for m in definition.modules.values()), *calls_in(definition.block.body)]
