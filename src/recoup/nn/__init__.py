"""The modules that carry numbers: all their state is in `state_dict`.

`fake_quantizer.py` is one tensor, `modules.py`, `conv.py`, `experts.py` and `recurrent.py` the prepared
modules (`twin.py` is what they have in common, `fits.py` what they refuse), `output.py` the output of any
module, `coded.py` the converted ones, `kv_cache.py` what attention keeps, `call.py` how a model is called.
"""

from recoup.nn.call import Batch, call, cut, device_of, evaluating, moved, size_of, without_labels
from recoup.nn.coded import (
    CODED_MODULES,
    CodedConv,
    CodedConv1D,
    CodedConv1d,
    CodedConv2d,
    CodedConv3d,
    CodedConvTranspose,
    CodedConvTranspose1d,
    CodedConvTranspose2d,
    CodedConvTranspose3d,
    CodedEmbedding,
    CodedEmbeddingBag,
    CodedExperts,
    CodedGRU,
    CodedLinear,
    CodedLSTM,
    CodedModule,
    Codes,
    is_coded,
)
from recoup.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from recoup.nn.experts import QuantExperts, routers
from recoup.nn.fake_quantizer import FakeQuantizer, NonFiniteError, quantization_off
from recoup.nn.fits import check_shape, check_surroundings
from recoup.nn.integer_bias import make_room, seen_bias
from recoup.nn.kv_cache import cache_quantizers, caching, quantize_cache
from recoup.nn.modules import (
    QUANT_MODULES,
    QuantConv1D,
    QuantEmbedding,
    QuantEmbeddingBag,
    QuantLinear,
    is_prepared,
    quant_type,
)
from recoup.nn.output import OUTPUT, output_quantizer_of, output_quantizers, quantize_output
from recoup.nn.recurrent import QuantGRU, QuantLSTM
from recoup.nn.twin import (
    OneWeight,
    QuantModule,
    SeveralWeights,
    Weight,
    quantizers_of,
    weight_names,
    weight_of,
)

__all__ = [
    "CODED_MODULES",
    "OUTPUT",
    "QUANT_MODULES",
    "Batch",
    "CodedConv",
    "CodedConv1D",
    "CodedConv1d",
    "CodedConv2d",
    "CodedConv3d",
    "CodedConvTranspose",
    "CodedConvTranspose1d",
    "CodedConvTranspose2d",
    "CodedConvTranspose3d",
    "CodedEmbedding",
    "CodedEmbeddingBag",
    "CodedExperts",
    "CodedGRU",
    "CodedLSTM",
    "CodedLinear",
    "CodedModule",
    "Codes",
    "FakeQuantizer",
    "NonFiniteError",
    "OneWeight",
    "QuantConv1D",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantExperts",
    "QuantGRU",
    "QuantLSTM",
    "QuantLinear",
    "QuantModule",
    "SeveralWeights",
    "Weight",
    "cache_quantizers",
    "caching",
    "call",
    "check_shape",
    "check_surroundings",
    "cut",
    "device_of",
    "evaluating",
    "is_coded",
    "is_prepared",
    "make_room",
    "moved",
    "output_quantizer_of",
    "output_quantizers",
    "quant_type",
    "quantization_off",
    "quantize_cache",
    "quantize_output",
    "quantizers_of",
    "routers",
    "seen_bias",
    "size_of",
    "weight_names",
    "weight_of",
    "without_labels",
]
