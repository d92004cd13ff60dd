"""Serve one file by llama.cpp until whoever started this is gone.

    python llama_cpp_server.py < a line of JSON, kept open

A script, not a module, for a process of its own: where llama.cpp finds something in a file that it did not
expect, it ends the process. What is asked stands in the first line of stdin, so that no list of processes
shows the key; the answer is a line of JSON on stdout, the address or what is wrong.
"""

import json
import os
import sys
from typing import Any

import xllamacpp

os.environ["GGML_NO_BACKTRACE"] = "1"  # which would start a debugger
engine: Any = xllamacpp  # an extension, of which no type is known
_ERRORS = 1  # a level of its log, which goes to stderr


def main() -> None:
    """Load the file, say where, and wait for the end of stdin."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints is no answer
    asked = json.loads(sys.stdin.readline())
    try:
        server = engine.Server(parameters(**asked))
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}), file=answer, flush=True)
        return
    print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    sys.stdin.read()
    os._exit(0)  # there is nothing to save, and a request may be under way


def parameters(file: str, key: str, context: int, threads: int, *, hidden: bool, exact: bool) -> Any:
    """What `recoup.engines.llama_cpp.Server` says, in llama.cpp's words."""
    params = engine.CommonParams()
    params.model.path, params.api_keys = file, [key]
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_parallel, params.fit_params, params.warmup, params.ui = 1, False, False, False
    params.verbosity = _ERRORS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if hidden:
        params.embedding, params.embd_normalize = True, -1
        params.pooling_type = engine.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    if exact:
        params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    return params


if __name__ == "__main__":
    main()
