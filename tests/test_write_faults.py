"""Files that cannot be written, and who may read those that are."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldmfast
from ldmfast.models import UNet2D
from ldmfast.pipelines.output import save_png
from ldmfast.pipelines.pipeline import ASSETS
from ldmfast.quantization import Plan, store
from ldmfast.quantization.calibrate import quantize

TINY = ASSETS / "tiny"
CONFIG = {"sample_size": 8, "block_out_channels": (32, 32), "down_block_types": ("DownBlock2D",) * 2,
          "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 8}


@pytest.fixture
def full_disk():
    """Files end at 64 KiB: a write behind that fails as on a full disk, with OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_int8_file_that_does_not_fit_the_disk(tmp_path, full_disk):
    """safetensors' writer raises an error of its own, which got through."""
    file = tmp_path / store.NAME
    file.write_bytes(b"of an earlier run")
    model = UNet2D.from_config(CONFIG)
    assert sum(p.numel() for p in model.parameters()) > 1 << 17
    with pytest.raises(ldmfast.CheckpointError, match="cannot be written") as error:
        store.save(file, model, Plan(), "f")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [file.name] and file.read_bytes() == b"of an earlier run"


def test_a_read_only_model_is_refused_before_it_is_measured(tmp_path, monkeypatch):
    """The pictures were drawn first, minutes of them. root may write anywhere, so the answer stands in here."""
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder / "unet")
    monkeypatch.setattr(ldmfast.Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ldmfast.CheckpointError, match="read-only"):
        quantize(folder, progress=False)


def test_writers_leave_the_umask_alone(tmp_path, monkeypatch):
    """It was set to 0 and back to see what it is: two threads at once could leave it so. int8 files had 0600."""
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
    try:
        threads = [threading.Thread(target=save_png, args=(Image.new("RGB", (8, 8)), tmp_path / f"{i}.png", {}))
                   for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        store.save(tmp_path / store.NAME, UNet2D.from_config(CONFIG).to(torch.bfloat16), Plan(), "f")
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert modes == dict.fromkeys([*(f"{i}.png" for i in range(4)), store.NAME], 0o640)
