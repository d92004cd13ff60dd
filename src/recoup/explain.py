"""The dry run: what a plan does to every parameter of a model, as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import nn

from recoup.nn import quant_type, weight_names, weight_of
from recoup.schemes import Plan

_KERNEL = 6  # the place of this column


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter's fate. Bytes are of storage: codes, scales and zero points; `kernel` computes it."""

    parameter: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    bytes_before: int
    bytes_after: int
    reason: str
    kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What would happen to every parameter, to outputs, and to what attention keeps; prints as a table.

    Args:
        rows: of every parameter.
        outputs: the spec of every output that is quantized, by its module.
        cache: how keys and values are kept; "" where nothing is said of them.
        untied: what each parameter was tied to, before `untie` gave it values of its own.
    """

    rows: list[Row]
    outputs: dict[str, str] = field(default_factory=dict)
    cache: str = ""
    untied: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Of all parameters, tied ones counted once."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """The same when quantized."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def cost_of_untying(self) -> tuple[int, int]:
        """Bytes of the parameters that were tied to another's: in float, and when quantized."""
        own = [row for row in self.rows if row.parameter in self.untied]
        return sum(row.bytes_before for row in own), sum(row.bytes_after for row in own)

    def __str__(self) -> str:
        head = ("parameter", "shape", "scheme", "bits", "bytes before", "after", "computed as", "reason")
        cells = [head, *map(_cells, self.rows)]
        total = _cells(
            Row(
                parameter="total", shape=(), scheme="", reason="",
                bits=8 * self.bytes_after / max(sum(prod(row.shape) for row in self.rows), 1),
                bytes_before=self.bytes_before, bytes_after=self.bytes_after,
            )
        )  # fmt: skip
        if not any(row.kernel for row in self.rows):
            cells = [line[:_KERNEL] + line[_KERNEL + 1 :] for line in cells]
            total, head = total[:_KERNEL] + total[_KERNEL + 1 :], cells[0]
        widths = [max(len(line[i]) for line in [*cells, total]) for i in range(len(head))]
        right = {3, 4, 5}
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in [*cells, total]
        ]
        lines += [f"output of {module}: {spec}" for module, spec in self.outputs.items()]
        lines += filter(None, [self.cache])
        if self.untied:
            before, after = self.cost_of_untying
            pairs = ", ".join(f"{own} from {other}" for own, other in self.untied.items())
            lines.append(f"untied: {pairs}; takes {before:,} bytes more before and {after:,} after")
        return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module, plan: Plan, kernels: Mapping[str, str] | None = None) -> Explanation:
    """The dry run: parameter, scheme, bits, bytes before and after, and why. Never changes the model.

    Args:
        model: float.
        plan: from `resolve`.
        kernels: module -> what computes it in an engine, as `recoup.export.preflight` says.

    >>> import torch
    >>> from recoup import resolve
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.LayerNorm(4))
    >>> print(explain(model, resolve(model, "w4a16")))
    parameter  shape   scheme  bits  bytes before  after  reason
    0.weight   4 x 32  w4a16    5.0           512     80
    0.bias     4       float   32.0            16     16  bias
    1.weight   4       float   32.0            16     16  norm
    1.bias     4       float   32.0            16     16  norm
    total                       7.3           560    128
    """
    rows: list[Row] = []
    for path, parameter in model.named_parameters():
        before = parameter.numel() * parameter.element_size()
        module, _, leaf = path.rpartition(".")
        bits, scheme, reason = 8.0 * parameter.element_size(), "float", plan.kept.get(path, "")
        kernel = ""
        owner, kind = model.get_submodule(module), quant_type(model.get_submodule(module))
        if module in plan.modules and kind is not None and leaf in weight_names(kind, owner):
            shape = weight_of(kind, owner, leaf).shape
            bits, scheme = plan[module].bits_per_weight(*shape), plan.modules[module]
            kernel = (kernels or {}).get(module, "")
        elif leaf == "bias" and module in plan.modules and plan[module].integer_bias:
            bits, scheme, reason = 32.0, plan.modules[module], "bias: int32 steps of the products"
        after = round(parameter.numel() * bits / 8)
        rows.append(
            Row(
                parameter=path, shape=tuple(parameter.shape), scheme=scheme, bits=bits,
                bytes_before=before, bytes_after=after, reason=reason, kernel=kernel,
            )
        )  # fmt: skip
    outputs = {name: str(spec) for name, spec in plan.outputs.items()}
    cache = "" if plan.kv is None else f"KV cache of {len(plan.caches)} attention layers: {plan.kv}"
    untied: dict[str, str] = getattr(model, "recoup_untied", {})
    return Explanation(rows=rows, outputs=outputs, cache=cache, untied=untied)


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape))
    sizes = (f"{row.bits:.1f}", f"{row.bytes_before:,}", f"{row.bytes_after:,}")
    return (row.parameter, shape, row.scheme, *sizes, row.kernel, row.reason)
