"""Small diffusers pipelines with random weights, saved as ordinary folders: what ldmfast loads and is compared with."""

from __future__ import annotations

import pytest
from pipeline_cases import make_sd, make_sdxl

import ldmfast


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """(diffusers pipeline, folder) of a reduced SD 1."""
    pipe, folder = make_sd(), tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def inpaint9(tmp_path_factory):
    pipe, folder = make_sd(9), tmp_path_factory.mktemp("inpaint9")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    pipe, folder = make_sdxl(), tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def ours(sd):
    """The reduced SD 1 in ldmfast."""
    return ldmfast.Pipeline.from_pretrained(sd[1])


@pytest.fixture(scope="session")
def picture():
    from PIL import Image

    return Image.radial_gradient("L").resize((64, 64)).convert("RGB")


@pytest.fixture(scope="session")
def mask():
    from PIL import Image

    m = Image.new("L", (64, 64), 0)
    m.paste(255, (16, 8, 56, 40))
    return m
