"""The emitted file: imports, one class per block, the model, its initialisation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.kernels import FAST, HELPERS, KINDS
from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.elaborate import Elaborator
from tokenmix.compiler.emit.classes import Emitter
from tokenmix.compiler.emit.formulas import Leaf, Recorder, Symbol, rendering, symbol
from tokenmix.compiler.emit.inline import definitions, import_lines
from tokenmix.compiler.emit.text import WIDTH, broken, docstring, literal, quoted
from tokenmix.compiler.graph import BlockGraph
from tokenmix.compiler.plan import Plan, Site, StagePlan, make_plan
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, FindingsError, Mistake
from tokenmix.dsl.expressions import Evaluator, RampRate, names_in
from tokenmix.dsl.parser import parse_expression
from tokenmix.dsl.source import Source

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model

__all__ = ["MARK", "emit"]

# First line of every emitted file: what `tokenmix build` may overwrite.
MARK = "# Emitted by tokenmix from"

_KERNELS = Path(__file__).parent.parent.parent / "blocks" / "kernels"


def emit(model: Model, *, standalone: bool = False) -> str:
    """The PyTorch source of a model without findings.

    Args:
        standalone: write the helper layers into the file, so that it needs nothing but torch.

    Raises:
        FindingsError: if a definition cannot be printed as one class.
    """
    try:
        return _Program(model).text(standalone)
    except Mistake as mistake:
        raise FindingsError([mistake.finding]) from None


class _Program:
    def __init__(self, model: Model):
        assert model.plan is not None and model.spec is not None
        self.model = model
        self.spec = model.spec
        self.plan: Plan = model.plan
        self.name = "".join(part.capitalize() for part in model.name.split("_"))
        self.elaborator = Elaborator(self.plan.library)
        self.graph = self._elaborate_all()
        taken = {self.name, *HELPERS, "Tensor", "OrderedDict"}
        self.emitter = Emitter(self.elaborator, taken)
        self.with_classes = "classes" in self.plan.parameters
        ramps = [r for site in self.plan.trunk() for r in _ramps(site.arguments)]
        # One ramp becomes the constructor's `drop_path`; rates of several ramps are written out as numbers.
        self.ramp = ramps[0] if len({(r.top, r.total) for r in ramps}) == 1 else None

    def _elaborate_all(self) -> BlockGraph:
        """Elaborate every use of every block: the classifier, the dense backbone, and the model without classes."""
        from tokenmix.compiler.model import assemble

        shape = self.model.input_shape
        plans = [(self.plan, False)]
        if self.plan.norms:
            plans.append((self.plan, True))
        classes = self.plan.parameters.get("classes")
        if classes is not None:
            findings: list[Finding] = []
            other = make_plan(self.spec, {**self.model.overrides, "classes": 0 if classes else 1000}, findings)
            if other is not None:
                plans.append((other, False))
        graphs = [assemble(self.model.name, plan, self.elaborator, shape, dense) for plan, dense in plans]
        for graph in graphs[:2]:
            if not isinstance(graph, BlockGraph):
                raise FindingsError(graph)
        assert isinstance(graphs[0], BlockGraph)
        return graphs[0]

    def text(self, standalone: bool) -> str:
        body = self._model_class()
        classes = [c.text for c in self.emitter.classes]
        used = {n for n in self.emitter.helpers if any(re.search(rf"\b{n}\b", t) for t in [*classes, body])}
        helpers = sorted(used | {KINDS[name] for name in used & KINDS.keys()})
        init = self._initialisation(helpers)
        parts = [*classes, body, init]
        code = "\n\n\n".join(parts)
        helper_text, imports = self._helpers(helpers, code, standalone)
        head = [f"{MARK} {self.model.name}. Edit the spec, not this file."]
        head += docstring(self._doc(), "")
        sections = ["\n".join(head), "\n".join(imports), *([helper_text] if helper_text else []), code]
        return sections[0] + "\n\n" + "\n\n\n".join(sections[1:]) + "\n"

    def _doc(self) -> list[str]:
        paper = self.spec.paper
        lines = [f"{self.name}" + (f": {paper['title']}" if "title" in paper else "") + "."]
        where = [paper[k] for k in ("venue", "year") if k in paper] + (
            [f"arXiv {paper['arxiv']}"] if "arxiv" in paper else []
        )
        if self.spec.doc:
            lines += ["", *self.spec.doc.strip().split("\n")]
        if where:
            lines += ["", f"Source: {', '.join(where)}."]
        lines += [f"{line.rstrip('.')}." for line in self.spec.status.lines()]
        cost = self.model.cost()
        shape = "x".join(str(s) for s in cost.input)
        lines += ["", f"{cost.params:,} parameters; {cost['mac']:,} multiply-adds for an input of {shape}."]
        lines.append("Feature maps are channels-last, (B, H, W, C), from the stem to the head.")
        return lines

    # Imports and helper layers

    def _helpers(self, helpers: list[str], code: str, standalone: bool) -> tuple[str, list[str]]:
        if not standalone:
            files: dict[str, list[str]] = {}
            for name in helpers:
                file = f"tokenmix.fast.{FAST[name]}" if name in FAST else f"tokenmix.blocks.kernels.{HELPERS[name]}"
                files.setdefault(file, []).append(name)
            lines = [f"from {file} import {', '.join(names)}" for file, names in sorted(files.items())]
            return "", import_lines(code, {}) + ([""] if lines else []) + lines
        parts: list[str] = []
        bound: dict[str, str] = {}
        for file in sorted({HELPERS[h] for h in helpers}):
            text, imported = definitions((_KERNELS / f"{file}.py").read_text(), set(helpers))
            parts.append(text)
            bound |= imported
        text = "\n\n\n".join(parts)
        return text, import_lines(text + "\n" + code, bound)

    # The model

    def _model_class(self) -> str:
        plan = self.plan
        lines = [f"class {self.name}(nn.Module):"]
        lines += docstring(self._model_doc(), "    ")
        arguments = []
        if self.with_classes:
            arguments.append(f"num_classes: int = {plan.parameters['classes']}")
        if plan.norms:
            arguments.append("features_only: bool = False")
        if self.ramp is not None:
            arguments.append(f"drop_path: float = {literal(self.ramp.top)}")
        init, forward = self._init_lines(), self._forward_lines()
        lines += ["", f"    def __init__({', '.join(['self', *arguments])}):", "        super().__init__()", *init]
        result = "Tensor | list[Tensor]" if plan.norms else "Tensor"
        lines += ["", f"    def forward(self, images: Tensor) -> {result}:", *forward]
        lines += [
            "",
            "    def init_weights(self) -> None:",
            '        """Draw fresh weights as the paper\'s code does."""',
            "        self.apply(init_weights)",
            *self._labelled(),
        ]
        return "\n".join(lines)

    def _model_doc(self) -> list[str]:
        channels = self.model.input_shape[0]
        lines = [
            f"Images (B, {channels}, H, W) to {'class scores' if self.with_classes else 'the result of the head'}.",
            "",
        ]
        lines.append("Args:")
        if self.with_classes:
            lines.append("    num_classes: width of the classifier; 0 gives the pooled features instead of scores.")
        if self.plan.norms:
            lines.append(
                "    features_only: return the map of every stage, normed, as a list of (B, C, H, W), and no scores."
            )
        if self.ramp is not None:
            lines.append("    drop_path: drop rate of the last block; the rates grow evenly from 0 at the first.")
        return lines if len(lines) > 3 or lines[-1] != "Args:" else lines[:1]

    def _init_lines(self) -> list[str]:
        plan = self.plan
        lines = []
        if self.ramp is not None:
            total = self.ramp.total
            step = f"drop_path * i / {total - 1}" if total > 1 else "0.0 * i"
            lines.append(f"        drops = [{step} for i in range({total})]")
        shape = Tensor("map", self.model.input_shape)
        if plan.stem is not None:
            lines += broken(f"        self.stem = {self._constructor(plan.stem, shape)}")
            shape = self._after(plan.stem)
        lines.append("        self.stages = nn.ModuleList([")
        for i, stage in enumerate(plan.stages):
            stage_lines, shape = self._stage(i, stage, shape)
            lines += stage_lines
        lines.append("        ])")
        heads = []
        if plan.head is not None:
            heads.append(f"self.head = {self._constructor(plan.head, shape)}")
        if plan.norms:
            lines.append("        self.features_only = features_only")
            norms = self._norms()
            if heads:
                lines += [
                    "        if features_only:",
                    *[f"            {n}" for n in norms],
                    "        else:",
                    f"            {heads[0]}",
                ]
            else:
                lines += ["        if features_only:", *[f"            {n}" for n in norms]]
        else:
            lines += [f"        {h}" for h in heads]
        lines.append("        self.init_weights()")
        return lines

    def _norms(self) -> list[str]:
        shapes = self._stage_shapes()
        made = [self._constructor(site, shape) for site, shape in zip(self.plan.norms, shapes, strict=True)]
        pattern = re.compile(r"^nn\.LayerNorm\((\d+)\)$")
        if all(pattern.match(m) for m in made):
            dims = ", ".join(pattern.match(m)[1] for m in made)  # type: ignore[index]
            return [f"self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in ({dims}{',' if len(made) == 1 else ''}))"]
        return ["self.norms = nn.ModuleList([", *[f"    {m}," for m in made], "])"]

    def _stage_shapes(self) -> list[Tensor]:
        """The map that each stage hands on; a stage without blocks hands on what it gets."""
        shape = self._after(self.plan.stem) if self.plan.stem else Tensor("map", self.model.input_shape)
        shapes = []
        for stage in self.plan.stages:
            for site in (stage.down, *stage.blocks, stage.body):
                shape = self._after(site) if site is not None else shape
            shapes.append(shape)
        return shapes

    def _after(self, site: Site) -> Tensor:
        return self._outputs[site.name]

    @cached_property
    def _outputs(self) -> dict[str, Tensor]:
        return {node.name: node.outputs[0] for node in self.graph.nodes}

    def _stage(self, i: int, stage: StagePlan, shape: Tensor) -> tuple[list[str], Tensor]:
        pad = " " * 16
        self.emitter.helpers.add("Stage")
        lines = [f"            Stage(  # stage {i + 1}"]
        if stage.down is not None:
            lines += broken(f"{pad}down={self._constructor(stage.down, shape)},")
            shape = self._after(stage.down)
        if stage.body is not None:
            lines += broken(f"{pad}body={self._constructor(stage.body, shape)},")
            shape = self._after(stage.body)
        else:
            rows = []
            shapes = [shape, *(self._after(site) for site in stage.blocks)]
            for first, last in _runs(stage.blocks, shapes, ramped=self.ramp is not None):
                site = stage.blocks[first]
                if last - first > 1:
                    rates = sorted({r.index for s in stage.blocks[first:last] for r in _ramps(s.arguments)})
                    source = f"drops[{rates[0]}:{rates[-1] + 1}]" if rates else f"range({last - first})"
                    variable = "drop" if rates else "_"
                    made = self._constructor(site, shape, variable)
                    row = f"*({made} for {variable} in {source}),"
                    if len(pad) + 4 + len(row) > WIDTH:
                        made = "\n".join(broken(f"{pad}        {made}"))
                        row = f"*(\n{made}\n{pad}        for {variable} in {source}\n{pad}    ),"
                    rows.append(row)
                    shape = self._after(stage.blocks[last - 1])
                else:
                    rows.append("\n".join(broken(f"{pad}    {self._constructor(site, shape)},")).lstrip())
                    shape = self._after(site)
            one = f"{pad}blocks=nn.Sequential({rows[0].rstrip(',')})," if len(rows) == 1 else ""
            if one and len(one) <= WIDTH:
                lines.append(one)
            else:
                lines += [f"{pad}blocks=nn.Sequential(", *[f"{pad}    {row}" for row in rows], f"{pad}),"]
        return [*lines, "            ),"], shape

    def _constructor(self, site: Site, shape: Tensor, rate: str = "") -> str:
        target = self.plan.library.find(site.call.callee)
        assert target is not None
        given = [a.name for a in site.call.arguments]
        symbolic = {
            a.name: a.value for a in site.call.arguments if self.with_classes and "classes" in names_in(a.value)
        }
        if isinstance(target, Op):
            self.emitter.helpers |= set(target.helpers)
            constructor = target.module(shape, **site.arguments)
            assert constructor is not None, site.call.callee  # functions are findings of the model
            return constructor
        text = self.emitter.class_of(target, (shape,), site.arguments)
        parts = [str(shape.C) for _ in text.channels]
        for name in text.parameters:
            if name in symbolic:
                parts.append(f"{name}={_class_expression(symbolic[name], self.plan.parameters)}")
            elif name in given:
                value = site.arguments[name]
                parts.append(f"{name}={literal(value) if self.ramp is None else _with_ramps(value, rate)}")
        return f"{text.name}({', '.join(parts)})"

    def _forward_lines(self) -> list[str]:
        channels = self.model.input_shape[0]
        last = self._stage_shapes()[-1] if self.plan.stages else None
        maps = last is not None and last.kind == "map"
        pad = " " * 8
        lines = []
        if self.model.fixed_size is not None:
            height, width = self.model.fixed_size
            lines += [
                f"{pad}if images.shape[2:] != ({height}, {width}):",
                f'{pad}    raise ValueError("made for images of {height}x{width}")',
            ]
        lines.append(f"{pad}x = images.permute(0, 2, 3, 1).contiguous()  # (B, H, W, {channels})")
        if self.plan.stem is not None:
            lines.append(f"{pad}x = self.stem(x)")
        if self.plan.norms:
            lines += [
                f"{pad}if self.features_only:",
                f"{pad}    features = []",
                f"{pad}    for stage, norm in zip(self.stages, self.norms):",
                f"{pad}        x = stage(x)",
                f"{pad}        features.append(norm(x){'.permute(0, 3, 1, 2)' if maps else ''})",
                f"{pad}    return features",
            ]
        lines += [f"{pad}for stage in self.stages:", f"{pad}    x = stage(x)"]
        if self.plan.head is not None:
            lines.append(f"{pad}return self.head(x)")
        else:
            lines.append(f"{pad}return x{'.permute(0, 3, 1, 2)' if maps else ''}")
        return lines

    # Initialisation

    def _initialisation(self, helpers: list[str]) -> str:
        defaults = {key: Source("<default>", text) for key, text in _DEFAULT_INIT.items()}
        rules = {**defaults, **{key: node.source for key, node in self.spec.init.items()}}
        used = set(helpers)
        lines = [
            "def init_weights(module: nn.Module) -> None:",
            '    """Initialise one layer; `Module.apply` reaches them all."""',
        ]
        branches: list[tuple[str, list[str]]] = []
        linear = self._draw(rules["linear"], "weight", "in_features", "out_features")
        pointwise = self._draw(rules["pointwise"], "weight", "in_features", "out_features")
        if "Pointwise" in used and pointwise != linear:  # it is a kind of nn.Linear and would be taken for one
            branches.append(("isinstance(module, Pointwise)", pointwise))
        branches.append(("isinstance(module, nn.Linear)", linear))
        if "HeadMixing" in used:
            mixing = self._draw(rules["pointwise"], "weight", "in_channels", "out_channels")
            branches.append(("isinstance(module, HeadMixing)", mixing))
        square = [name for name in ("Conv2d", "ConvTranspose2d") if name in used]
        if square:
            conv = self._draw(rules["conv"], "weight", "in_channels", "out_channels")
            classes = square[0] if len(square) == 1 else f"({', '.join(square)})"
            branches.append((f"isinstance(module, {classes})", conv))
        if "AxialConv2d" in used:
            conv = self._draw(
                rules["conv"], "weight", "in_channels", "out_channels", "(max(module.kernel_size) ** 0.5)"
            )
            branches.append(("isinstance(module, AxialConv2d)", conv))
        branches = [
            (test, [*body, "if module.bias is not None:", "    nn.init.zeros_(module.bias)"]) for test, body in branches
        ]
        if "WindowAttention" in used:
            branches.append(
                (
                    "isinstance(module, WindowAttention) and module.bias_table is not None",
                    self._draw(rules["position_table"], "bias_table", "", ""),
                )
            )
        if "PositionEmbedding" in used:
            table = self._draw(rules["position_table"], "table", "", "")
            branches.append(("isinstance(module, PositionEmbedding)", table))
        norms = "nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm"
        branches.append((f"isinstance(module, ({norms}))", ["module.reset_parameters()"]))
        branches += [(f"isinstance(module, {c.name})", c.learned) for c in self.emitter.classes if c.learned]
        for i, (test, body) in enumerate(branches):
            lines.append(f"    {'el' if i else ''}if {test}:")
            lines += [f"        {line}" for line in body]
        return "\n".join(lines)

    def _labelled(self) -> list[str]:
        """Lines that draw the weights of layers with a rule for their label."""
        labels = self.emitter.labels()
        linear = "nn.Linear"
        conv = "(nn.Conv2d, nn.ConvTranspose2d)" if "ConvTranspose2d" in self.emitter.helpers else "nn.Conv2d"
        side = "(math.prod(module.kernel_size) ** 0.5)" if "AxialConv2d" in self.emitter.helpers else ""
        layers: list[str] = []
        parameters: list[str] = []
        for label, node in self.spec.init_labels.items():
            if label not in labels:
                continue  # labels of blocks that this model does not have
            found = f'{quoted(label)} in name.split(".")'
            if labels[label]:
                draw = self._draw(node.source, "parameter", "", "")
                parameters += [f"    if {found}:", *(f"        {d.replace('module.parameter', 'value')}" for d in draw)]
                continue
            draws = {
                linear: self._draw(node.source, "weight", "in_features", "out_features"),
                conv: self._draw(node.source, "weight", "in_channels", "out_channels", *([side] if side else [])),
            }
            if draws[linear] == draws[conv]:  # the rule reads no sizes
                draws = {f"(nn.Linear, {conv.strip('()')})": draws[linear]}
            for classes, draw in draws.items():
                layers.append(f"    if {found} and isinstance(module, {classes}):")
                layers += [f"        {line}" for line in draw]
        lines = ["for name, module in self.named_modules():", *layers] if layers else []
        lines += ["for name, value in self.named_parameters():", *parameters] if parameters else []
        return [f"        {line}" for line in lines]

    def _draw(
        self, rule: Source, weight: str, inputs: str, outputs: str, side: str = "module.kernel_size[0]"
    ) -> list[str]:
        """The line that fills a weight from a rule such as `normal(sqrt(2 / in_channels))`.

        Args:
            side: the side of a square kernel with as many taps as the layer's.
        """
        expr = parse_expression(rule)
        if not isinstance(expr, syntax.Call) or expr.callee not in _DISTRIBUTIONS:
            raise Mistake(
                "TM1206", "an initialisation is one of " + ", ".join(sorted(_DISTRIBUTIONS.values())), expr.span
            )
        conv = inputs == "in_channels"
        names = {
            "in_channels": f"module.{inputs}",
            "out_channels": f"module.{outputs}",
            "kernel": side if conv else "1",
            "groups": "module.groups" if conv else "1",
        }
        if not inputs:
            names = {}
        values = {n: symbol("{}", Leaf(text, "loop"), hint=1.0) for n, text in names.items()}
        evaluator = _InitEvaluator(values, "an initialisation (in_channels, out_channels, kernel, groups)")
        arguments = [evaluator.value(a.value) for a in expr.tensors + expr.arguments]
        wanted = 0 if expr.callee in ("zeros", "ones") else 1
        if len(arguments) != wanted:
            raise Mistake("TM1306", f"write {_DISTRIBUTIONS[expr.callee]}", expr.span)
        with rendering(recorder=Recorder()):
            text = str(arguments[0]) if arguments else ""
        template = {"normal": "std={}", "trunc_normal": "std={}", "uniform": "-{0}, {0}", "constant": "{}"}
        if not arguments:
            return [f"nn.init.{expr.callee}_(module.{weight})"]
        if isinstance(arguments[0], Symbol):
            name = {"uniform": "bound", "constant": "value"}.get(expr.callee, "std")
            lines, text = [f"{name} = {text}"], name
        else:
            lines = []
        return [*lines, f"nn.init.{expr.callee}_(module.{weight}, {template[expr.callee].format(text)})"]


_DISTRIBUTIONS = {
    "normal": "normal(std)",
    "trunc_normal": "trunc_normal(std)",
    "uniform": "uniform(bound)",
    "constant": "constant(value)",
    "zeros": "zeros()",
    "ones": "ones()",
}

# Where a family says nothing: the truncated normal of vision transformers, and for convolutions the spread that keeps
# the variance of a ReLU network (He et al. 2015, by fan-out, as in timm and torchvision).
_DEFAULT_INIT = {
    "linear": "trunc_normal(0.02)",
    "position_table": "trunc_normal(0.02)",
    "pointwise": "normal(sqrt(2 / out_channels))",
    "conv": "normal(sqrt(2 * groups / (kernel**2 * out_channels)))",
}


class _InitEvaluator(Evaluator):
    """Prints arithmetic on attributes of a layer."""

    def combine(self, expr: syntax.Binary, left: Any, right: Any) -> Any:
        from tokenmix.compiler.emit.formulas import LEVEL

        if not isinstance(left, Symbol) and not isinstance(right, Symbol):
            return super().combine(expr, left, right)
        level = LEVEL[expr.op]
        inner = (level + 1, level) if expr.op == "**" else (level, level + 1)
        return Symbol("{} " + expr.op + " {}", ((left, inner[0]), (right, inner[1])), level)

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        if any(isinstance(v, Symbol) for v in values):
            prefix = "math." if expr.callee in ("sqrt", "ceil", "floor") else ""
            return symbol(prefix + expr.callee + "(" + ", ".join(["{}"] * len(values)) + ")", *values)
        return super().function(expr, values)


def _ramps(value: Any) -> Iterable[RampRate]:
    if isinstance(value, RampRate):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _ramps(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _ramps(item)


def _with_ramps(value: Any, rate: str) -> str:
    """A hyperparameter of a placed block as source; rates of the one ramp refer to the list `drops`."""
    if isinstance(value, RampRate):
        return rate or f"drops[{value.index}]"
    if isinstance(value, tuple) and value and all(isinstance(v, RampRate) for v in value):
        indices = [v.index for v in value]
        if indices == list(range(indices[0], indices[0] + len(indices))):
            return f"drops[{indices[0]}:{indices[-1] + 1}]"
    return literal(value)


def _runs(sites: list[Site], shapes: list[Tensor], *, ramped: bool) -> list[tuple[int, int]]:
    """Stretches of blocks that differ in nothing but their place on the ramp; `shapes` are what they get."""

    def key(i: int) -> tuple:
        plain = tuple((k, "ramp" if ramped and isinstance(v, RampRate) else v) for k, v in sites[i].arguments.items())
        return (id(sites[i].call), plain, shapes[i].kind, shapes[i].C)

    runs, first = [], 0
    for i in range(1, len(sites) + 1):
        if i == len(sites) or key(i) != key(first) or len(list(_ramps(sites[first].arguments))) > 1:
            runs.append((first, i))
            first = i
    return runs


def _class_expression(expr: syntax.Expr, parameters: dict[str, Any]) -> str:
    """An expression of the spec that reads `classes`, over the constructor's `num_classes`."""
    names = {**parameters, "classes": symbol("{}", Leaf("num_classes", "loop"), hint=parameters["classes"])}
    with rendering(recorder=Recorder()):
        value = _InitEvaluator(names, "this spec").value(expr)
        return str(value) if isinstance(value, Symbol) else literal(value)
