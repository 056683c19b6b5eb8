"""What loading a model takes beyond the weights that it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resident
import torch
from safetensors.torch import save_file

from ldmfast.models import UNet2DCondition
from ldmfast.ops import _heap

UNET = {"_class_name": "UNet2DConditionModel", "num_class_embeds": 10,
        "block_out_channels": [64, 128, 256], "cross_attention_dim": 128,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}

LOAD = """
import ctypes, json, sys
import resident, torch
from ldmfast import checkpoints
from ldmfast.models import UNet2DCondition
from ldmfast.quantization import Plan

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

def holes():
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    return libc.mallinfo2().fordblks

def tensors(module):
    for m in module.modules():
        for v in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()):
            v = v.held[1] if type(v).__name__ == "Packed" else v
            if isinstance(v, torch.Tensor):
                yield v

def load():
    global unet
    int8 = Plan() if precision == "int8" else None
    weights = parts.stream("model", None if int8 else torch.bfloat16)
    unet = UNet2DCondition.from_weights(parts.config("model"), weights, pack=True, int8=int8, dtype=torch.bfloat16)

torch.set_num_threads(1)
precision, parts = sys.argv[1], checkpoints.open_folder(sys.argv[2])
load()  # the first time brings the libraries' code into memory
del unet
resident.now()
before = holes()
peak = resident.peak(load)
kept = sum({id(t): t.numel() * t.element_size() for t in tensors(unet)}.values())
print(json.dumps({"kept": kept, "peak": peak, "holes": holes() - before,
                  "compiler": [n for n in ("torch._dynamo", "sympy", "triton") if n in sys.modules]}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("unet")
    (made / "config.json").write_text(json.dumps(UNET))
    torch.manual_seed(0)
    save_file(UNet2DCondition.from_config(UNET).state_dict(), made / "diffusion_pytorch_model.safetensors")
    return made


@resident.NEEDED
@pytest.mark.skipif(_heap._glibc() is None, reason="needs glibc's malloc, as it is set up by us")
@pytest.mark.parametrize("precision", ("bf16", "int8"))
def test_loading_takes_a_tenth_more_than_it_keeps_and_leaves_no_holes(folder: Path, precision: str):
    """Packing weights in the heap left holes of a tenth of an SD 1.5 UNet, and drawing an embedding's first numbers on
    the meta device imported torch's compiler, 130 MiB."""
    code = LOAD.replace("import resident, torch", "import resident, torch; resident.check()", 1)
    environment = {k: v for k, v in os.environ.items() if k not in _heap._SET_BY_USER}
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, precision, str(folder)], capture_output=True, text=True,
                          check=False, env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
                              [str(tests), str(tests.parent)])})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # beside them: one layer (the largest has 5 MiB here as stored) and the pieces that files are read in
    assert found["peak"] <= 1.1 * found["kept"] + 16 * resident.MIB, found
    assert found["holes"] <= found["kept"] / 50, found
    assert not found["compiler"]


def test_a_malloc_that_takes_less_gets_the_most_that_it_takes(monkeypatch: pytest.MonkeyPatch):
    """Older versions of glibc refuse a threshold above 32 MiB; that of loading, 256 KiB, must not stay."""
    taken: dict[int, int] = {}

    class Old:
        def malloc_trim(self, pad: int) -> int:
            return 1

        def mallopt(self, what: int, value: int) -> int:
            if what == _heap._MMAP_THRESHOLD and value > 32 << 20:
                return 0
            taken[what] = value
            return 1

    monkeypatch.setattr(_heap, "_glibc", lambda: Old())
    with _heap.freed_at_once():
        assert taken[_heap._MMAP_THRESHOLD] == 256 << 10
    assert taken == {_heap._MMAP_THRESHOLD: 32 << 20, _heap._TRIM_THRESHOLD: 512 << 20}
