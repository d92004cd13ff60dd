"""One cell of the table of artefact_speed.py, in a process of its own: prints one line of JSON.

    python artefact_speed_job.py '{"measure": "time", "subject": "encoder", "setting": "8 x 64", ...}'

A subject is a model; its ways are what runs it: torch, the files that recoup exports, and the files that the
engines' own quantizers write of the same float model. A file is written once, in a process of its own. What
a user of a file does is done here with onnxruntime and NumPy alone, so that memory is the engine's.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Feeds = dict[str, np.ndarray[Any, Any]]
Run = Callable[[], Any]
PROMPT, NEW_TOKENS = 32, 64
CALIBRATION = 64  # samples
REST = 0.1  # seconds


@dataclass(frozen=True, kw_only=True)
class Way:
    """What runs a subject.

    Args:
        write: everything that `load` reads, into this folder, which is empty; None where that is the asset.
        load: (folder, feeds, threads) -> one run over the feeds.
        file: what is weighed in that folder.
    """

    load: Callable[[Path, Feeds, int], Run]
    write: Callable[[Path], None] | None = None
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and what runs it: the first of the ways is what the others are compared with."""

    ways: dict[str, Way]
    settings: dict[str, Callable[[], Feeds]]


def main(job: Job) -> Job:
    subject = SUBJECTS[job["subject"]]()
    found = MEASURES[job["measure"]](subject, job)
    packages = ("torch", "onnxruntime", "xllamacpp", "torchao", "transformers")
    return job | found | {"versions": {name: version(name) for name in packages}}


def written(subject: Subject, job: Job) -> Job:
    """The file of one way, and its bytes."""
    way, folder = subject.ways[job["way"]], folder_of(job, job["way"])
    assert way.write is not None
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        unfinished.mkdir(parents=True)
        way.write(unfinished)
        unfinished.rename(folder)
    return {"bytes": sum(part.stat().st_size for part in folder.glob(f"{way.file}*"))}


def timed(subject: Subject, job: Job) -> Job:
    """Seconds of every way, in turns; the order changes from turn to turn, and the first turn warms up.

    In its turn a way runs a few times, the first of them for the caches. Before it, everybody rests: threads
    of torch and of onnxruntime look for work for a while after the last, and would take the next one's time.
    """
    feeds = subject.settings[job["setting"]]()
    runs = {
        name: way.load(folder_of(job, name), feeds, job["threads"])
        for name, way in subject.ways.items()
        if name not in job["without"]
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(1 + job["turns"]):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(REST)
            taken = [timed_once(runs[name]) for _ in range(1 + job["repeats"])]
            if turn:
                seconds[name].append(statistics.median(taken[1:] or taken))
    reference = seconds[names[0]]
    speedups = {
        name: [one / other for one, other in zip(reference, taken, strict=True)]
        for name, taken in seconds.items()
    }
    return {
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "speedup": {name: statistics.median(found) for name, found in speedups.items()},
        "speedups": speedups,
    }


def timed_once(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(subject: Subject, job: Job) -> Job:
    """The most that a process holds which loads one way and runs it twice; of llama.cpp, its server's."""
    feeds = subject.settings[job["setting"]]()
    run = subject.ways[job["way"]].load(folder_of(job, job["way"]), feeds, job["threads"])
    for _ in range(2):
        run()
    process = getattr(run, "process", os.getpid())
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"peak bytes": 1024 * int(line.split()[1])}


MEASURES: dict[str, Callable[[Subject, Job], Job]] = {"write": written, "time": timed, "peak": peak}


def folder_of(job: Job, way: str) -> Path:
    return Path(job["artefacts"]) / job["subject"] / way.replace(" ", "-").replace("/", "-")


# What runs a model.


def torch_model(make: Callable[[], Any], *, call: Callable[[Any, Any], Any] | None = None) -> Way:
    """A model in torch, made of what `make` returns."""

    def load(folder: Path, feeds: Feeds, threads: int) -> Run:
        import torch

        del folder
        torch.set_num_threads(threads)
        model = make().eval()
        dtype = next(model.parameters()).dtype
        batch = {name: torch.from_numpy(value) for name, value in feeds.items()}
        batch = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.items()}

        def run() -> Any:
            with torch.inference_mode():
                return model(**batch) if call is None else call(model, batch)

        return run

    return Way(load=load)


def onnx_file(write: Callable[[Path], None], *, decodes: bool = False) -> Way:
    """A file in a session of onnxruntime with the default options."""

    def load(folder: Path, feeds: Feeds, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        if decodes:
            return partial(decode, session, feeds["input_ids"])
        names = {value.name for value in session.get_inputs()}
        return partial(session.run, None, {name: value for name, value in feeds.items() if name in names})

    return Way(load=load, write=write, file="model.onnx")


def decode(session: Any, prompt: np.ndarray[Any, Any]) -> list[int]:
    """Greedy, one token after the other, with the keys and values of those before."""
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    names = {value.name for value in session.get_inputs()}
    feeds: dict[str, Any] = {}
    for past in pasts:
        _, heads, _, width = past.shape
        feeds[past.name] = onnx_value(np.zeros((1, heads, 0, width), np.float32))
    answers = [value.name for value in session.get_outputs()]
    tokens, ids, seen = list[int](), prompt, 0
    for _ in range(NEW_TOKENS):
        seen += ids.shape[1]
        place = np.arange(seen - ids.shape[1], seen)[None]
        given = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64), "position_ids": place}
        feeds |= {name: onnx_value(value) for name, value in given.items() if name in names}
        found = dict(zip(answers, session.run_with_ort_values(None, feeds), strict=True))
        tokens.append(int(found["logits"].numpy()[0, -1].argmax()))
        ids = np.array([[tokens[-1]]])
        for past in pasts:
            feeds[past.name] = found[past.name.replace("past_key_values", "present")]
    return tokens


def onnx_value(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def gguf_file(write: Callable[[Path], None]) -> Way:
    """A file in llama.cpp, which decodes in a process of its own."""

    def load(folder: Path, feeds: Feeds, threads: int) -> Run:
        from recoup.engines.llama_cpp import Server

        server = Server(folder, context=PROMPT + NEW_TOKENS, hidden=False, threads=threads)
        (ids,) = feeds["input_ids"].tolist()
        run = partial(server.generate, ids, max_new_tokens=NEW_TOKENS)
        vars(run)["process"] = server._process.pid
        return run

    return Way(load=load, write=write, file="model.gguf")


def torch_program(write: Callable[[Path], None]) -> Way:
    """A program of torch.export."""

    def load(folder: Path, feeds: Feeds, threads: int) -> Run:
        import torch

        from recoup.engines.pytorch import PytorchModel

        torch.set_num_threads(threads)
        model = PytorchModel(folder)
        batch = {name: torch.from_numpy(value) for name, value in feeds.items() if name in model.inputs}
        return partial(model, **batch)

    return Way(load=load, write=write, file="model.pt2")


def exported(
    make: Callable[[], Any],
    recipe: Any,
    target: str,
    calibration: Callable[[], Any],
    *,
    fold: bool = False,
) -> Callable[[Path], None]:
    """What recoup writes: rounded to nearest, because speed does not depend on how well it is rounded."""

    def write(folder: Path) -> None:
        import recoup
        from recoup.export import TARGETS

        model, batches = make().eval(), calibration()
        if fold:
            recoup.transforms.fuse(model, batches[0])
        if recipe is None:
            TARGETS[target].write(model, folder, batches[0])
            return
        parsed = recoup.Recipe.model_validate({"scheme": recipe} if isinstance(recipe, str) else recipe)
        recoup.prepare(model, recoup.resolve(model, parsed))
        TARGETS[target].settle(recoup.calibrate(model, batches))
        recoup.export(model, folder, target, example=batches[0])

    return write


# The encoder: MiniLM on 64 tokens.


def encoder() -> Subject:
    def make(dtype: str = "float32") -> Any:
        import torch
        from transformers import AutoModel

        from recoup.tasks.assets import fetch

        return AutoModel.from_pretrained(
            fetch("minilm"), dtype=getattr(torch, dtype), add_pooling_layer=False
        )

    def plain() -> Any:
        """As the task loads it for export: attention of plain products."""
        from recoup.tasks.assets import fetch
        from recoup.tasks.pretrained import load_encoder

        return load_encoder(fetch("minilm"))[0]

    def feeds(rows: int) -> Feeds:
        ids = np.random.default_rng(0).integers(1000, 30000, (rows, 64))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def batches() -> Any:
        import torch

        return [{name: torch.from_numpy(value) for name, value in feeds(8).items()}]

    def written_by_recoup(scheme: str | None, target: str = "onnx") -> Callable[[Path], None]:
        return exported(plain, scheme, target, batches)

    def own(folder: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with float_file(written_by_recoup(None)) as file:
            quantize_dynamic(file, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)

    return Subject(
        ways={
            "torch float32": torch_model(make),
            "torch bfloat16": torch_model(partial(make, "bfloat16")),
            "onnxruntime float32": onnx_file(written_by_recoup(None)),
            "onnxruntime's quantize_dynamic": onnx_file(own),
            "recoup onnx w8a8": onnx_file(written_by_recoup("w8a8")),
            "recoup onnx w8a8-ort": onnx_file(written_by_recoup("w8a8-ort")),
            "recoup onnx w8a8-ort-static": onnx_file(written_by_recoup("w8a8-ort-static")),
            "recoup onnx w7a8-ort": onnx_file(written_by_recoup("w7a8-ort")),
            "recoup onnx w7a8-ort-static": onnx_file(written_by_recoup("w7a8-ort-static")),
            "recoup pytorch w8a8": torch_program(written_by_recoup("w8a8", "pytorch")),
        },
        settings={f"{rows} x 64": partial(feeds, rows) for rows in (1, 8)},
    )


@contextmanager
def float_file(write: Callable[[Path], None]) -> Iterator[Path]:
    """The float model.onnx, while a quantizer reads it, as it is made ready for it."""
    import tempfile

    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        ready = Path(temporary) / "ready.onnx"
        quant_pre_process(Path(temporary) / "model.onnx", ready, skip_symbolic_shape=True)
        yield ready


# The convolutional network: EfficientNet-Lite0 on 224 x 224 pixels.


def cnn() -> Subject:
    sys.path.append(str(Path(__file__).parents[1] / "recipes"))
    size = 224

    def make(dtype: str = "float32", layout: str = "contiguous_format") -> Any:
        import torch
        from efficientnet_fashion_mnist import WEIGHTS, EfficientNetLite0
        from safetensors.torch import load_file

        from recoup.tasks.assets import locate

        model = EfficientNetLite0(1000)
        model.load_state_dict(load_file(locate(WEIGHTS, Path())))
        return model.to(dtype=getattr(torch, dtype), memory_format=getattr(torch, layout))

    def images(rows: int) -> Any:
        from efficientnet_fashion_mnist import MEAN, STD

        from recoup.tasks.assets import locate
        from recoup.tasks.images import Preprocessing, read

        see = Preprocessing(size=(size, size), mean=(MEAN,), std=(STD,))
        return see(read(locate("asset:fashion-mnist/test.parquet", Path()))[:rows])

    def feeds(rows: int) -> Feeds:
        pixels = np.random.default_rng(0).normal(size=(rows, 3, size, size))
        return {"pixel_values": pixels.astype(np.float32)}

    def batches() -> Any:
        return [{"pixel_values": pixels} for pixels in images(CALIBRATION).split(8)]

    integers = {
        "scheme": "w7a8-ort-static",
        "outputs": ["*._project_conv", "_blocks.?", "_blocks.1?", "_relu6"],
    }

    def written_by_recoup(recipe: Any, target: str = "onnx") -> Callable[[Path], None]:
        return exported(make, recipe, target, batches, fold=True)

    def own(folder: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.rest = iter([{"pixel_values": batch["pixel_values"].numpy()} for batch in batches()])

            def get_next(self) -> Any:
                return next(self.rest, None)

        with float_file(written_by_recoup(None)) as file:
            quantize_static(
                file, folder / "model.onnx", Reader(),
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
            )  # fmt: skip

    return Subject(
        ways={
            "torch float32": torch_model(make),
            "torch float32, channels last": torch_model(partial(make, layout="channels_last")),
            "torch bfloat16": torch_model(partial(make, "bfloat16")),
            "onnxruntime float32": onnx_file(written_by_recoup(None)),
            "onnxruntime's quantize_static": onnx_file(own),
            "recoup onnx w8a8-ort-static": onnx_file(written_by_recoup("w8a8-ort-static")),
            "recoup onnx w7a8-ort-static": onnx_file(written_by_recoup("w7a8-ort-static")),
            "recoup onnx w7a8-ort-static, outputs": onnx_file(written_by_recoup(integers)),
        },
        settings={f"{rows} x 3 x {size} x {size}": partial(feeds, rows) for rows in (1, 8)},
    )


# The language model: SmolLM2-135M, 64 words after a prompt of 32.


def llm() -> Subject:
    rules = [{"match": "model.embed_tokens", "scheme": "q8_0a16"}, {"match": "lm_head", "scheme": "q8_0"}]

    def make(dtype: str = "float32") -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from recoup.tasks.assets import fetch

        return AutoModelForCausalLM.from_pretrained(fetch("smollm2-135m"), dtype=getattr(torch, dtype))

    def int8_by_torchao() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = make("bfloat16")
        quantize_(model, Int8WeightOnlyConfig())
        return model

    def generate(model: Any, batch: Any) -> Any:
        return model.generate(
            **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    def feeds() -> Feeds:
        ids = np.random.default_rng(0).integers(1000, 30000, (1, PROMPT))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def batches() -> Any:
        import torch

        return [{"input_ids": torch.from_numpy(feeds()["input_ids"])}]

    def written_by_recoup(recipe: Any, target: str = "onnx") -> Callable[[Path], None]:
        return exported(make, recipe, target, batches)

    def own_onnx(folder: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        written_by_recoup(None)(folder)
        file = onnx.load(folder / "model.onnx")
        quantizer = MatMulNBitsQuantizer(file, block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        onnx.save(quantizer.model.model, folder / "model.onnx")

    def own_gguf(folder: Path) -> None:
        from types import SimpleNamespace

        import gguf
        from gguf.scripts.gguf_new_metadata import copy_with_new_metadata

        written_by_recoup(None, "gguf")(folder)
        file = folder / "model.gguf"
        reader, kinds, tensors = gguf.GGUFReader(file), gguf.GGMLQuantizationType, []
        for tensor in reader.tensors:
            kind = kinds.Q8_0 if tensor.name.startswith("token_embd") else kinds.Q4_0
            kind = kind if len(tensor.shape) == 2 else tensor.tensor_type
            data = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), kind)
            tensors.append(
                SimpleNamespace(name=tensor.name, data=data, tensor_type=kind, n_bytes=data.nbytes)
            )
        given = SimpleNamespace(fields=reader.fields, tensors=tensors, endianess=reader.endianess)
        architecture = reader.get_field("general.architecture").contents()
        copy_with_new_metadata(given, gguf.GGUFWriter(folder / "quantized", architecture), {}, [])
        (folder / "quantized").replace(file)

    return Subject(
        ways={
            "torch bfloat16": torch_model(partial(make, "bfloat16"), call=generate),
            "torch float32": torch_model(make, call=generate),
            "torchao int8 weights": torch_model(int8_by_torchao, call=generate),
            "onnxruntime float32": onnx_file(written_by_recoup(None), decodes=True),
            "onnxruntime's MatMulNBitsQuantizer": onnx_file(own_onnx, decodes=True),
            "recoup onnx w4a8-ort": onnx_file(written_by_recoup("w4a8-ort"), decodes=True),
            "recoup onnx w4a16": onnx_file(written_by_recoup("w4a16"), decodes=True),
            "llama.cpp float32": gguf_file(written_by_recoup(None, "gguf")),
            "llama.cpp's Q4_0 by gguf-py": gguf_file(own_gguf),
            "recoup gguf q4_0": gguf_file(written_by_recoup({"scheme": "q4_0", "rules": rules}, "gguf")),
            "recoup gguf q8_0": gguf_file(written_by_recoup({"scheme": "q8_0", "rules": rules}, "gguf")),
        },
        settings={f"{NEW_TOKENS} after {PROMPT}": feeds},
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {"encoder": encoder, "cnn": cnn, "llm": llm}


if __name__ == "__main__":
    sys.stdout.flush()
    print(json.dumps(main(json.loads(sys.argv[1]))))
