"""The modules that carry numbers: all their state is in `state_dict`.

`fake_quantizer.py` is one tensor, `modules.py` and `conv.py` the prepared modules (`twin.py` is what they
have in common, `lora.py` an adapter inside of one), `output.py` the output of any module, `coded.py` the
converted ones, `kv_cache.py` what attention keeps, `call.py` how a model is called.
"""

from recoup.nn.call import Batch, call, cut, device_of, evaluating, moved, size_of, without_labels
from recoup.nn.coded import (
    CODED_MODULES,
    CodedConv,
    CodedConv1D,
    CodedConv1d,
    CodedConv2d,
    CodedEmbedding,
    CodedLinear,
    CodedModule,
    Codes,
    is_coded,
)
from recoup.nn.conv import QuantConv1d, QuantConv2d
from recoup.nn.fake_quantizer import FakeQuantizer, NonFiniteError, quantization_off
from recoup.nn.integer_bias import make_room, seen_bias
from recoup.nn.kv_cache import cache_quantizers, caching, quantize_cache
from recoup.nn.lora import LoRA, low_rank_of, refuse_peft
from recoup.nn.modules import (
    QUANT_MODULES,
    QuantConv1D,
    QuantEmbedding,
    QuantLinear,
    is_prepared,
    quant_type,
)
from recoup.nn.output import OUTPUT, output_quantizer_of, output_quantizers, quantize_output
from recoup.nn.twin import QuantModule

__all__ = [
    "CODED_MODULES",
    "OUTPUT",
    "QUANT_MODULES",
    "Batch",
    "CodedConv",
    "CodedConv1D",
    "CodedConv1d",
    "CodedConv2d",
    "CodedEmbedding",
    "CodedLinear",
    "CodedModule",
    "Codes",
    "FakeQuantizer",
    "LoRA",
    "NonFiniteError",
    "QuantConv1D",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantModule",
    "cache_quantizers",
    "caching",
    "call",
    "cut",
    "device_of",
    "evaluating",
    "is_coded",
    "is_prepared",
    "low_rank_of",
    "make_room",
    "moved",
    "output_quantizer_of",
    "output_quantizers",
    "quant_type",
    "quantization_off",
    "quantize_cache",
    "quantize_output",
    "refuse_peft",
    "seen_bias",
    "size_of",
    "without_labels",
]
