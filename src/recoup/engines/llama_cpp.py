"""llama.cpp: load a folder with model.gguf and run it, by the server in the wheel `xllamacpp`.

The server answers two questions: the hidden states of a whole sequence after the last norm, and the
probabilities of the next token after a prefix, for every word. A language model's logits at every place are
the first with one product more, that of the output matrix: `LlamaCpp` computes it here, from the bytes in the
file, with the inputs as llama.cpp's kernels quantize them. The second comes whole from llama.cpp, one prefix
at a time: what `export` proves a file with.

The server runs in a process of its own, which llama.cpp ends where it finds what it did not expect: a file
that makes it do so is an error here, and nothing more. It listens on the loopback interface, on a port of its
own; a key made for it keeps others out.
"""

import contextlib
import http.client
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.gguf_file import FILE, field, model_file, read, size_bytes
from recoup.engines.outputs import Outputs
from recoup.nn import Batch
from recoup.numerics import fake_quantize, qparams_of
from recoup.schemes import preset

__all__ = ["FILE", "SCHEMES", "LlamaCpp", "Prompts", "Server", "field", "ids_of", "model_file", "peak_bytes",
           "read", "size_bytes"]  # fmt: skip
# The types of a file that are trained lattices, and the schemes that train them.
SCHEMES = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1", "MXFP4": "mxfp4-gguf", "TQ2_0": "tq2_0"}
_ROUNDED = {"F16": torch.float16, "BF16": torch.bfloat16}
_LEAST_CONTEXT = 256  # llama.cpp pads to it
_LAST_SECONDS = 10  # that a process has to end
_NO_METADATA = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    StopIteration,
    NotImplementedError,
)


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
        self.file = model_file(path)
        with _metadata(self.file) as reader:
            self._whole = _whole_word(reader)  # llama.cpp's own error says nothing of what is wrong
        if find_spec("xllamacpp") is None:
            raise ImportError("running a GGUF file needs xllamacpp: pip install 'recoup[gguf]'")
        self.context, self._key = max(context, _LEAST_CONTEXT), secrets.token_hex()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`_end` closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("llama_cpp_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,  # Ctrl-C is for whoever asks, who ends this one
        )  # fmt: skip
        weakref.finalize(self, _end, self._process, self._log)
        asked = {
            "file": str(self.file),
            "key": self._key,
            "context": self.context + (not hidden),  # an answer of one word needs one place more
            "threads": torch.get_num_threads() if threads is None else threads,
            "hidden": hidden,
            "exact": exact,
        }
        answer = self._first_answer(json.dumps(asked))
        if "error" in answer:
            raise ValueError(f"{self.file}: llama.cpp does not load it ({answer['error']}); export it again")
        self._address = answer["address"].removeprefix("http://")

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

    def generate(self, ids: list[int], *, max_new_tokens: int) -> list[int]:
        """The most likely words after a prompt that is read from scratch, but for those that would end it."""
        body: dict[str, Any] = {"prompt": ids, "n_predict": max_new_tokens, "cache_prompt": False}
        body |= {"temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self._ask("/completion", body)["tokens"]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without the tokens that begin and end a sequence."""
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]

    def _first_answer(self, asked: str) -> dict[str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            print(asked, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": self._how_it_ended()}

    def _how_it_ended(self) -> str:
        """By a signal, mostly; and the line of its log that says most."""
        try:
            code = self._process.wait(timeout=_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed the connection"
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").splitlines()
        said = next((line for line in log if "ASSERT" in line or "rror" in line), "")
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"it ended its process with {how}{': ' * bool(said)}{said.strip()[:200]}"

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self._address)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (ConnectionError, http.client.HTTPException):
            raise ValueError(f"{self.file}: llama.cpp does not run it ({self._how_it_ended()})") from None
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
        with _metadata(self.file) as reader:
            self.longest = _longest(reader)
            softcap = reader.get_field(f"{field(reader, 'general.architecture')}.final_logit_softcapping")
            self.softcap = None if softcap is None else float(softcap.contents())
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            # The same where they are tied.
            head = tensors["output.weight" if "output.weight" in tensors else "token_embd.weight"]
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
    """A file in llama.cpp that reads every sequence of a batch, or goes on with it: for its speed.

    Called, it answers nothing. The server keeps the model's last place for a word that follows, so a sequence
    that fills the context is read up to it.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        self.file, self.threads, self._server = model_file(path), threads, None
        with _metadata(self.file) as reader:
            self.longest = _longest(reader) - 1

    def forward(self, input_ids: Tensor, **others: Any) -> None:
        """One pass over each; other inputs of the batch are not llama.cpp's."""
        del others
        input_ids = input_ids[:, : self.longest]
        server = self._serving(input_ids.shape[1])
        for ids in input_ids.tolist():
            server.read_prompt(ids)

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """The most likely words, one sequence after the other, but for those that would end one.

        Args:
            input_ids: the prompts (samples, tokens), without padding.
            max_new_tokens: of every sample.

        Returns:
            The new tokens (samples, max_new_tokens).

        Raises:
            ValueError: prompt and new tokens are longer than the model's sequences.
        """
        tokens = input_ids.shape[1] + max_new_tokens
        if tokens > self.longest + 1:
            raise ValueError(
                f"{self.file}: {tokens} tokens asked, a sequence of it has at most {self.longest + 1}"
            )
        server = self._serving(tokens)
        return torch.tensor(
            [server.generate(ids, max_new_tokens=max_new_tokens) for ids in input_ids.tolist()]
        )

    def _serving(self, context: int) -> Server:
        if self._server is None or self._server.context < context:
            self._server = Server(self.file, context=context, hidden=False, threads=self.threads)
        return self._server


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


def _longest(reader: Any) -> int:
    """Tokens of the longest sequence that the model takes."""
    found = int(field(reader, f"{field(reader, 'general.architecture')}.context_length"))
    if found < 1:
        raise ValueError(f"a context of {found} tokens")
    return found


@contextlib.contextmanager
def _metadata(file: Path) -> Generator[Any]:
    """A reader of the file; what it does not say inside is an error of the file."""
    reader = read(file)
    try:
        yield reader
    except _NO_METADATA as error:
        raise ValueError(f"{file}: not what recoup writes of a language model ({error!r})") from None


def _end(process: "subprocess.Popen[str]", log: IO[bytes]) -> None:
    process.kill()
    process.communicate()  # closes what it was asked through
    log.close()


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
