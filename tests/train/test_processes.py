"""Two processes under torchrun train one model, and go on together."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_train_one_model_and_go_on_to_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "tests.train.two_processes", str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (whole, again), (whole_of_second, again_of_second) = (
        json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)
    )
    assert whole[0] == whole_of_second[0]  # one model
    assert [entry["step"] for entry in whole[1]] == [0, 1, 2, 3, 4]
    assert whole[1][1:] != whole_of_second[1][1:]  # and batches of their own
    assert again == whole
    assert again_of_second[0] == whole[0]
    names = sorted(path.name for path in (tmp_path / "stopped").iterdir())
    assert names == ["step-000003", "step-000004"]  # one of the two writes
