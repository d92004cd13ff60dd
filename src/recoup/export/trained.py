"""What a file is compared with: at export the trained model, later what the folder recorded of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from recoup.export.answers import Answers
from recoup.export.onnx_decoding import Generation
from recoup.export.parity import Array, ParityError, equal
from recoup.nn import Batch, CodedModule, FakeQuantizer, cache_quantizers, is_coded
from recoup.schemes import Scheme

Stored = Mapping[str, Array]  # of one module, by the names of `tensors_of`
KEPT = ("key", "value")  # what a KV cache holds of a token
_ALWAYS = ("codes", "scale", "zero_point", "offset")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized module, as much of it as a reader of bytes needs.

    Args:
        scheme: its numbers.
        kind: the type of the converted module.
        shape: of its codes, (rows, columns).
        places: every name that it has in the model, the first one included.
    """

    scheme: Scheme
    kind: type
    shape: tuple[int, int]
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a folder has to agree with.

    Args:
        modules: the quantized modules that the file holds, by their first name.
        places: the first name of a module, by each of its names.
        example: the batch that was asked.
        answers: what the trained model answers.
        recorded: the part of it that goes into the folder.
        generation: of a model that the file decodes, what it says; None also where it was not recorded.
        lattices: the quantizers that belong to no module in `modules`, as those of outputs, by name.
        cached: the quantizers of keys and values, as `cached` names them.
        kept: the tensors that are not quantized, with the values of the file; None where nobody has them any
            more, and the sums of the files have to speak for them.
        routing: the experts that the trained model chose, see `routing_of`.
    """

    modules: Mapping[str, CodedModule]
    places: Mapping[str, str]
    example: Batch
    answers: Answers
    recorded: Answers
    generation: Generation | None = field(default=None, repr=False)
    lattices: Mapping[str, FakeQuantizer] = field(default_factory=dict)
    cached: Mapping[str, FakeQuantizer] = field(default_factory=dict)
    kept: Mapping[str, Tensor] | None = field(default=None, repr=False)
    routing: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def layers(self) -> dict[str, Layer]:
        """The modules, as a reader of bytes needs them."""
        return {path: layer_of(module, self._places(path)) for path, module in self.modules.items()}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Batch,
        answered: tuple[Answers, Answers],
        *,
        held: Mapping[str, CodedModule] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
    ) -> "Trained":
        """What a converted model is, and what it answers.

        Args:
            model: converted.
            example: the batch that was asked.
            answered: all of it, and the part that goes into the folder.
            held: the modules that the file holds; all by default.
            kept: see the class.
            routing: see the class.
        """
        modules, places = coded(model)
        held = modules if held is None else held
        whole, part = answered
        return cls(
            modules=held,
            places={place: path for place, path in places.items() if path in held},
            example=example,
            answers=whole,
            recorded=part,
            lattices=lattices(model),
            cached=cached(model),
            kept=kept,
            routing=routing or {},
        )

    def _places(self, path: str) -> tuple[str, ...]:
        return tuple(place for place, first in self.places.items() if first == path)


def layer_of(module: CodedModule, places: tuple[str, ...]) -> Layer:
    """A module, as a reader of bytes needs it."""
    rows, columns = module.weight.codes.shape
    return Layer(scheme=module.scheme, kind=type(module), shape=(rows, columns), places=places)


def coded(model: nn.Module) -> tuple[dict[str, CodedModule], dict[str, str]]:
    """The quantized modules of a converted model by their first name, and the first name by every name."""
    first: dict[int, str] = {}
    modules: dict[str, CodedModule] = {}
    places: dict[str, str] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        if is_coded(module):
            path = first.setdefault(id(module), place)
            modules.setdefault(path, module)
            places[place] = path
    return modules, places


def lattices(model: nn.Module) -> dict[str, FakeQuantizer]:
    """The quantizers of a converted model that are neither a coded module's inputs nor keys and values."""
    inputs = {id(getattr(module, "input_quantizer", None)) for module in model.modules() if is_coded(module)}
    inputs |= {id(quantizer) for quantizer in cached(model).values()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer) and id(module) not in inputs
    }


def cached(model: nn.Module) -> dict[str, FakeQuantizer]:
    """The quantizers of keys and values: "key" and "value", each after the name of its attention module."""
    return {
        f"{path}.{name}": quantizer
        for path, quantizers in cache_quantizers(model).items()
        for name, quantizer in zip(KEPT, quantizers, strict=True)
    }


def tensors_of(module: CodedModule) -> dict[str, Tensor]:
    """What is stored of a module on a lattice, and of which; a divisor is a global scale's reciprocal."""
    weight, quantizer = module.weight, getattr(module, "input_quantizer", None)
    found = {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "offset": weight.offset,
        "global_scale": weight.global_scale,
        "bias_codes": getattr(module, "bias_codes", None),
        "global_divisor": None if weight.global_scale is None else 1 / weight.global_scale,
    }
    if isinstance(quantizer, FakeQuantizer):
        inputs = quantizer.global_scale
        found["input_scale"] = None if quantizer.scale is None else quantizer.stored_qparams.scale
        found["input_global_divisor"] = None if inputs is None else 1 / inputs
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def check_stored(modules: Mapping[str, CodedModule], stored: Mapping[str, Stored]) -> tuple[int, int]:
    """Every tensor that was read back is the trained one; returns how many codes and scales there are.

    Raises:
        ParityError: one is not, or is missing; names it.
    """
    for path, module in modules.items():
        trained, found = tensors_of(module), stored[path]
        for name in (*(name for name in _ALWAYS if name in trained), *found):
            if name not in found or name not in trained:
                which = "not there" if name in trained else "there, and the scheme has none"
                raise ParityError(f"{path}: the {name.replace('_', ' ')} is {which}")
            equal(path, name.replace("_", " "), found[name], trained[name])
    return sum(each["codes"].size for each in stored.values()), sum(s["scale"].size for s in stored.values())


def check_cached(trained: Mapping[str, FakeQuantizer], stored: Mapping[str, Array]) -> int:
    """Every scale of keys and values that was read back is the trained one; returns how many there are.

    Raises:
        ParityError: one is not, or is missing, or is of what was not quantized; names it.
    """
    check_modules("the file has scales of keys and values for", stored, trained)
    for name, quantizer in trained.items():
        equal(name, "scale", stored[name], quantizer.stored_qparams.scale.detach().reshape(1))
    return len(stored)


def check_modules(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Exactly the modules of the plan are quantized.

    Raises:
        ParityError: they are not; names some.
    """
    if different := sorted(set(found) ^ set(wanted)):
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ParityError(f"{what} other modules than the plan: {', '.join(different[:3])}{more}")
