"""llama.cpp: load a folder with model.gguf and run it, by the server in the wheel `xllamacpp`.

The server answers two questions: the hidden states of a whole sequence after the last norm, and the
probabilities of the next token after a prefix, for every word. A language model's logits at every place are
the first with one product more, that of the output matrix: `LlamaCpp` computes it here, from the bytes in the
file, with the inputs as llama.cpp's kernels quantize them. The second comes whole from llama.cpp, one prefix
at a time: what `export` proves a file with.

The server listens on the loopback interface, on a port of its own; a key made for it keeps others out.
"""

import http.client
import json
import secrets
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.outputs import Outputs
from recoup.nn import Batch
from recoup.numerics import fake_quantize, qparams_of
from recoup.schemes import preset

FILE = "model.gguf"
# The types of a file that are trained lattices, and the schemes that train them.
SCHEMES = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1", "MXFP4": "mxfp4-gguf", "TQ2_0": "tq2_0"}
_INSTALL = "running a GGUF file needs {}: pip install 'recoup[gguf]'"
_ROUNDED = {"F16": torch.float16, "BF16": torch.bfloat16}
_LEAST_CONTEXT = 256  # llama.cpp pads to it
_ERRORS = 1  # a level of its log, which goes to stderr


class Server:
    """llama.cpp with one file, for token ids.

    Args:
        path: model.gguf, or the folder around it.
        context: the longest sequence, in tokens.
        hidden: to answer `hidden_states`; otherwise `log_probabilities`. A server does one of them.
        exact: keys and values of attention in float32, and attention step by step. llama.cpp's default keeps
            them in float16 and fuses.
        threads: of the engine; by default as many as torch has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or llama.cpp does not load it.
        ImportError: the extra is not installed.
    """

    def __init__(
        self, path: str | Path, *, context: int, hidden: bool, exact: bool = False, threads: int | None = None
    ) -> None:
        file = model_file(path)
        self._whole = _whole_word(read(file))  # llama.cpp's own error says nothing of what is wrong
        engine = _xllamacpp()
        self.context, self._key = max(context, _LEAST_CONTEXT), secrets.token_hex()
        params = engine.CommonParams()
        params.model.path = str(file)
        # An answer of one word needs one place more.
        params.n_ctx = params.n_batch = params.n_ubatch = self.context + (not hidden)
        params.n_parallel, params.fit_params, params.warmup, params.ui = 1, False, False, False
        params.verbosity, params.api_keys = _ERRORS, [self._key]
        threads = torch.get_num_threads() if threads is None else threads
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if hidden:
            params.embedding, params.embd_normalize = True, -1
            params.pooling_type = engine.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        if exact:
            params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        try:
            self._server: Any = engine.Server(params)
        except RuntimeError as error:
            raise ValueError(f"{file}: llama.cpp does not load it ({error}); export it again") from None

    def log_probabilities(self, ids: list[int], *, words: int) -> Tensor:
        """Of every word after this prefix (words,).

        Args:
            ids: a prefix of at least one token; what it shares with the last one is not computed again.
            words: in the vocabulary.
        """
        body: dict[str, Any] = {"prompt": ids, "n_predict": 1, "n_probs": words, "cache_prompt": True}
        # The probabilities are those before sampling; but where half a character is sampled, there are none.
        body |= {"temperature": 0, "logit_bias": [[self._whole, 1e6]]}
        (place,) = self._ask("/completion", body)["completion_probabilities"]
        found = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
        return torch.tensor([found.get(word, -torch.inf) for word in range(words)])

    def hidden_states(self, ids: list[int]) -> Tensor:
        """After the last norm, what the output matrix multiplies (tokens, width)."""
        (answer,) = self._ask("/embeddings", {"input": ids, "embd_normalize": -1})
        return torch.tensor(answer["embedding"])

    def read_prompt(self, ids: list[int]) -> None:
        """One pass over a sequence, from scratch, and nothing else: what is timed."""
        self._ask("/completion", {"prompt": ids, "n_predict": 1, "temperature": 0, "cache_prompt": False})

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without the tokens that begin and end a sequence."""
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self._server.listening_address.removeprefix("http://"))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp refuses {path}: {answer['error']['message']}")
        return answer


class LlamaCpp(nn.Module):
    """A file in llama.cpp on the CPU. Call it with `input_ids`; it answers logits at every place.

    Args:
        path: model.gguf, or the folder around it.
        exact: see `Server`; the default is llama.cpp's own.
        threads: of the engine; by default as many as torch has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or llama.cpp does not load it.
        ImportError: the extra is not installed.
    """

    def __init__(self, path: str | Path, *, exact: bool = False, threads: int | None = None) -> None:
        super().__init__()
        self.file, self.exact, self.threads = model_file(path), exact, threads
        reader = read(self.file)
        architecture = field(reader, "general.architecture")
        self.longest = _longest(reader)
        softcap = reader.get_field(f"{architecture}.final_logit_softcapping")
        self.softcap = None if softcap is None else float(softcap.contents())
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        head = tensors.get("output.weight", tensors["token_embd.weight"])  # the same where they are tied
        self.head_type = head.tensor_type.name
        self.head = torch.from_numpy(_dequantized(head))
        self._server = self._serve(min(_LEAST_CONTEXT, self.longest))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Outputs:
        """Logits (samples, tokens, words).

        Raises:
            ValueError: padding, an input that llama.cpp does not take, or a sequence longer than the model's.
        """
        unknown = [name for name, value in others.items() if value is not None and name != "labels"]
        if unknown or (attention_mask is not None and not bool((attention_mask == 1).all())):
            what = unknown[0] if unknown else "padding in attention_mask"
            raise ValueError(f"llama.cpp runs whole sequences of input_ids; given {what}")
        if input_ids.shape[1] > self.longest:
            raise ValueError(
                f"{self.file}: {input_ids.shape[1]} tokens asked, a sequence of it has at most {self.longest}"
            )
        if input_ids.shape[1] > self._server.context:
            self._server = self._serve(input_ids.shape[1])
        return Outputs(logits=torch.stack([self._logits(ids) for ids in input_ids.tolist()]))

    def _serve(self, context: int) -> Server:
        return Server(self.file, context=context, hidden=True, exact=self.exact, threads=self.threads)

    def _logits(self, ids: list[int]) -> Tensor:
        logits = _as_read(self._server.hidden_states(ids), self.head_type) @ self.head.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Prompts(nn.Module):
    """A file in llama.cpp that reads every sequence of a batch, and answers nothing: for its speed.

    The server keeps the model's last place for a word that follows, so a sequence that fills the context is
    read up to it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.file, self._server = model_file(path), None
        self.longest = _longest(read(self.file)) - 1

    def forward(self, input_ids: Tensor, **others: Any) -> None:
        """One pass over each; other inputs of the batch are not llama.cpp's."""
        del others
        input_ids = input_ids[:, : self.longest]
        if self._server is None or self._server.context < input_ids.shape[1]:
            self._server = Server(self.file, context=input_ids.shape[1], hidden=False)
        for ids in input_ids.tolist():
            self._server.read_prompt(ids)


def peak_bytes(folder: Path, batch: Batch) -> int:
    """Peak resident memory of a fresh process that loads the file and reads the batch.

    Raises:
        RuntimeError: that process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        ids = Path(temporary) / "ids.json"
        longest = _longest(read(folder)) - 1  # see `Prompts`
        ids.write_text(json.dumps(ids_of(batch)[:, :longest].tolist()))
        script = Path(__file__).with_name("llama_cpp_peak.py")
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(model_file(folder)), str(ids)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {folder} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    return int(done.stdout)


def ids_of(batch: Batch) -> Tensor:
    """The token ids of a batch (samples, tokens).

    Raises:
        ValueError: it has none.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            "gguf: llama.cpp reads token ids; bring an example {'input_ids': (samples, tokens)} of integers"
        )
    return ids


def model_file(path: str | Path) -> Path:
    """The file itself: the path, or model.gguf in the folder.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected an exported GGUF model")
    return file


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the file, without the tokenizer's own files and reports."""
    return model_file(folder).stat().st_size


def read(path: str | Path) -> Any:
    """A `gguf.GGUFReader` of a file that is whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged; says where.
        ImportError: the extra is not installed.
    """
    file = model_file(path)
    try:
        import gguf
    except ImportError:
        raise ImportError(_INSTALL.format("gguf")) from None
    try:
        _check_header(file)
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ValueError(f"{file}: no whole GGUF file ({error}); export it again") from None


def field(reader: Any, key: str) -> Any:
    """A value of the file's metadata; the file has it."""
    found = reader.get_field(key)
    if found is None:
        raise ValueError(f"the file's metadata has no {key}; export it again")
    return found.contents()


def _longest(reader: Any) -> int:
    """Tokens of the longest sequence that the model takes."""
    return int(field(reader, f"{field(reader, 'general.architecture')}.context_length"))


def _check_header(file: Path) -> None:
    """What the header counts has room in the file; the library's reader takes counts as they are."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        magic, _, tensors, values = struct.unpack("<4sIQQ", stream.read(24))
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        for count, what in ((tensors, "tensors"), (values, "metadata values")):
            if count > size:
                raise ValueError(f"its header counts {count} {what} in {size} bytes")
        for _ in range(values):
            _skip(stream, 8, size)
            _skip(stream, _number(stream, "<I"), size)


def _number(stream: BinaryIO, layout: str) -> int:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]


_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by the ids of GGUF's types


def _skip(stream: BinaryIO, kind: int, size: int) -> None:
    """Past one value of the metadata."""
    if kind == _ARRAY:
        items, count = _number(stream, "<I"), _number(stream, "<Q")
        if items in (_STRING, _ARRAY):
            for _ in range(min(count, size)):
                _skip(stream, items, size)
            return
        length = _SIZES[items] * count
    else:
        length = _number(stream, "<Q") if kind == _STRING else _SIZES[kind]
    if stream.tell() + length > size:
        raise ValueError(f"a value of {length} bytes in the header of a file of {size}")
    stream.seek(length, 1)


def _whole_word(reader: Any) -> int:
    """A word that is text by itself."""
    words, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    return next(i for i, word in enumerate(words) if kinds[i] == 1 and word.isascii() and word.isprintable())


def _as_read(x: Tensor, kind: str) -> Tensor:
    """The inputs of a product with weights of this type, as llama.cpp's kernels take them."""
    if kind in _ROUNDED:
        return x.to(_ROUNDED[kind]).float()
    if kind not in SCHEMES:
        return x
    spec = preset(SCHEMES[kind]).inputs
    assert spec is not None
    return fake_quantize(x, qparams_of(x, spec), spec)


def _dequantized(tensor: Any) -> np.ndarray[Any, Any]:
    from gguf import dequantize

    return np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # not of the file


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise ImportError(_INSTALL.format("xllamacpp")) from None
    return xllamacpp
