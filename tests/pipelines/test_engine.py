"""The graph engine with its CPU stand-in: what is recorded and replayed is, bit for bit, what runs eagerly.

The stand-in (ldmfast/engine/recorded.py) runs the recorded operators again on the same tensors and refuses what a CUDA
capture refuses, so all the bookkeeping is tested here; CUDA graphs themselves have never run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

import ldmfast
from ldmfast.engine import CaptureError, CudaGraphs, Engine, RecordedGraphs


@pytest.fixture(scope="module")
def tiny() -> ldmfast.Pipeline:
    return ldmfast.Pipeline.tiny()


@pytest.fixture
def graphs() -> RecordedGraphs:
    return RecordedGraphs()


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A run that falls back to eager fails the test, unless it waits for the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ldmfast: runs eagerly")
        yield


def call(pipe: ldmfast.Pipeline, engine: Engine | None, *words: object, **options: object) -> torch.Tensor:
    pipe.engine = engine
    if callable(options.get("generator")):
        options["generator"] = options["generator"]()  # a new one a call: drawing changes it
    try:
        return pipe(*words, output_type="pt", progress=False, **options).images  # type: ignore[arg-type]
    finally:
        pipe.engine = None


def same(pipe: ldmfast.Pipeline, engine: Engine, *words: object, **options: object) -> None:
    eager = call(pipe, None, *words, **options)
    assert torch.isfinite(eager).all()
    for _ in range(2):
        assert torch.equal(call(pipe, engine, *words, **options), eager), options


TEXT = "a red circle above a blue square"
RUNS = {
    "multistep": {"solver": "dpmpp_2m", "num_inference_steps": 5},
    "scaled input": {"solver": "euler", "num_inference_steps": 4},
    "noise": {"solver": "euler_a", "num_inference_steps": 4, "generator": [5, 6], "num_images_per_prompt": 2},
    "one stream of noise": {"solver": "ddpm", "num_inference_steps": 3, "num_images_per_prompt": 2,
                            "generator": lambda: torch.Generator().manual_seed(3)},
    "two evaluations a step": {"solver": "heun", "num_inference_steps": 3},
    "predictor and corrector": {"solver": "unipc", "num_inference_steps": 4},
    "many registers": {"solver": "pndm", "num_inference_steps": 6},
    "unguided": {"guidance_scale": 1.0, "num_inference_steps": 3},
    "rescaled guidance": {"guidance_rescale": 0.7, "num_inference_steps": 3},
    "oblong": {"height": 64, "width": 96, "num_inference_steps": 3},
    "one step": {"num_inference_steps": 1},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_a_replayed_call_is_the_eager_one(tiny, graphs, name, precision):
    pipe = tiny if precision == "exact" else ldmfast.Pipeline.tiny(precision="bf16")
    same(pipe, Engine(graphs), TEXT, **{"generator": 3, **RUNS[name]})


def test_one_graph_serves_other_steps_solvers_prompts_seeds_and_scales(tiny, graphs):
    """Everything that is not a shape is read from buffers: 3 shapes of state, 3 captures (and one decoder)."""
    engine = Engine(graphs)
    for words, options in (
            (TEXT, {"num_inference_steps": 4}), ("a green star", {"num_inference_steps": 7, "guidance_scale": 3.0}),
            (TEXT, {"num_inference_steps": 3, "negative_prompt": "a green star", "generator": 9})):
        same(tiny, engine, words, **{"generator": 1, "solver": "dpmpp_2m", **options})
    assert graphs.captures == 2 and len(engine) == 2
    same(tiny, engine, TEXT, generator=1, solver="dpmpp_2m", num_inference_steps=65)  # more rows than the buffers have
    assert graphs.captures == 3


def test_least_recently_used_graphs_go(tiny, graphs):
    engine = Engine(graphs, limit=4)  # a loop and a decoder for each of two sizes
    sizes = [(64, 64), (64, 96), (96, 64)]
    images = {s: call(tiny, None, TEXT, height=s[0], width=s[1], generator=2, num_inference_steps=2) for s in sizes}

    def captures(size: tuple[int, int]) -> int:
        before = graphs.captures
        out = call(tiny, engine, TEXT, height=size[0], width=size[1], generator=2, num_inference_steps=2)
        assert torch.equal(out, images[size]) and len(engine) <= 4
        return graphs.captures - before

    a, b, c = sizes
    assert [captures(s) for s in (a, b, a, c, a, b)] == [2, 2, 0, 2, 0, 2]  # c comes when a was used later than b
    engine.clear()
    assert len(engine) == 0 and captures(a) == 2


def test_threads_share_one_engine(tiny, graphs):
    engine = Engine(graphs, limit=4)
    jobs = [{"generator": i, "num_inference_steps": 2 + i % 2, "height": 64 + 32 * (i % 2),
             "solver": ("dpmpp_2m", "euler_a")[i % 2]} for i in range(6)]
    wanted = [call(tiny, None, TEXT, **job) for job in jobs]
    tiny.engine = engine
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        found[i] = tiny(TEXT, output_type="pt", progress=False, **jobs[i]).images

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiny.engine = None
    assert all(torch.equal(found[i], wanted[i]) for i in range(len(jobs)))


def test_weights_written_in_place_need_no_capture_and_replaced_ones_get_one(sd, graphs):
    """A LoRA is merged in place, or lies beside the weights in tensors that are: the next replay reads them."""
    pipe, engine = ldmfast.Pipeline.from_pretrained(sd[1]), Engine(graphs)
    options = {"generator": 4, "num_inference_steps": 2, "height": 64, "width": 64}
    before = call(pipe, engine, "a", **options)
    captures = graphs.captures
    norm = pipe.unet.conv_norm_out
    with torch.inference_mode():
        norm.weight.mul_(1.5)
    merged = call(pipe, engine, "a", **options)
    assert graphs.captures == captures and not torch.equal(before, merged)
    assert torch.equal(merged, call(pipe, None, "a", **options))
    norm.weight = torch.nn.Parameter(norm.weight * 2, requires_grad=False)
    replaced = call(pipe, engine, "a", **options)
    assert graphs.captures == captures + 1 and not torch.equal(replaced, merged)
    assert torch.equal(replaced, call(pipe, None, "a", **options))


def test_sdxl_conditions_pictures_and_masks(sdxl, inpaint9, ours, picture, mask, graphs):
    engine = Engine(graphs, limit=16)
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "generator": 1}
    large = ldmfast.Pipeline.from_pretrained(sdxl[1])
    same(large, engine, ["a", "b"], **{**size, "generator": [1, 2]})
    same(large, engine, ["a", "b"], original_size=(128, 32), **{**size, "generator": [1, 2]})
    captures = graphs.captures
    assert captures == 2
    same(ours, engine, "a", image=picture, strength=0.6, num_inference_steps=5, generator=1)
    same(ours, engine, "a", image=picture, mask_image=mask, num_inference_steps=4, generator=1)
    nine = ldmfast.Pipeline.from_pretrained(inpaint9[1])
    same(nine, engine, "a", image=picture, mask_image=mask, num_inference_steps=4, generator=1)


def test_callbacks_replace_and_cancel(tiny, graphs):
    engine = Engine(graphs)

    def halve(call, step, t, tensors):
        seen.append((step, t, tensors["latents"].clone()))
        if step == 3:
            call.cancel()
        return {"latents": tensors["latents"] * 0.5} if step == 1 else None

    runs = []
    for used in (None, engine):
        seen: list = []
        tiny.engine = used
        out = tiny(TEXT, generator=1, num_inference_steps=6, solver="dpmpp_2m", callback_on_step_end=halve,
                   output_type="latent", progress=False)
        runs.append((out.images, out.cancelled, seen))
    tiny.engine = None
    (a, cancelled, first), (b, also, second) = runs
    assert cancelled and also and torch.equal(a, b) and len(first) == len(second) == 4
    assert all(s == r and t == u and torch.equal(x, y) for (s, t, x), (r, u, y) in zip(first, second))


def test_a_call_inside_a_callback_runs_eagerly(tiny, graphs):
    inner, engine = [], Engine(graphs)

    def again(call, step, t, tensors):
        if step == 0:
            with pytest.raises(ldmfast.LdmfastError, match="a call of this thread is using its graph"):
                engine.clear()
            with pytest.warns(RuntimeWarning, match="runs eagerly.*callback called the pipeline"):
                inner.append(tiny(TEXT, generator=8, num_inference_steps=2, output_type="pt", progress=False).images)

    out = call(tiny, engine, TEXT, generator=1, num_inference_steps=2, callback_on_step_end=again)
    assert torch.equal(out, call(tiny, None, TEXT, generator=1, num_inference_steps=2))
    assert torch.equal(inner[0], call(tiny, None, TEXT, generator=8, num_inference_steps=2))


def test_eager_runs_name_their_reason_once(tiny, graphs):
    engine, options = Engine(graphs), {"generator": 1, "num_inference_steps": 2}
    wanted, seen = call(tiny, None, TEXT, **options), []
    hook = tiny.unet.conv_in.register_forward_hook(lambda *a: seen.append(1))
    try:
        with pytest.warns(RuntimeWarning, match="without CUDA graphs: forward hooks are registered"):
            assert torch.equal(call(tiny, engine, TEXT, **options), wanted)
        told = len(seen)
        assert told and torch.equal(call(tiny, engine, TEXT, **options), wanted)  # silent now, and eager still
        assert len(seen) == 2 * told
    finally:
        hook.remove()
    assert torch.equal(call(tiny, engine, TEXT, **options), wanted) and len(seen) == 2 * told


def test_a_network_that_reads_values_on_the_host_is_refused_by_name(tiny, graphs, monkeypatch):
    run = type(tiny.unet).run

    def peeking(self, sample, step, *rest):
        return run(self, sample * (2.0 if float(sample.sum()) == 0.125 else 1.0), step, *rest)

    options = {"generator": 1, "num_inference_steps": 2}
    monkeypatch.setattr(type(tiny.unet), "run", peeking)
    wanted = call(tiny, None, TEXT, **options)
    with pytest.warns(RuntimeWarning, match=r"cannot be captured \(aten::\w+ reads a tensor's value on the host"):
        assert torch.equal(call(tiny, engine := Engine(graphs), TEXT, **options), wanted)
    captures = graphs.captures
    assert torch.equal(call(tiny, engine, TEXT, **options), wanted)  # tried once, and not again
    assert graphs.captures == captures


def test_the_stand_in_replays_writes_views_and_copies():
    """What it must tell apart: a view (nothing to do), a copy (done again), a write (done again in place)."""
    x, out = torch.arange(6.0).view(2, 3), torch.zeros(3, 2)

    def body() -> None:
        turned = x.t()
        copied = turned.reshape(-1)  # cannot be a view
        out.copy_(turned)
        out.view(-1)[1:3].add_(copied[1:3])

    replay = RecordedGraphs().capture(body)
    x.mul_(10)
    replay()
    expected = x.t().clone(memory_format=torch.contiguous_format)
    expected.view(-1)[1:3] += x.t().reshape(-1)[1:3]
    assert torch.equal(out, expected)
    with pytest.raises(CaptureError, match="lift_fresh copies host numbers"):
        RecordedGraphs().capture(lambda: out.add_(torch.tensor(1.0)))


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is waited for")


def test_cuda_graphs_order_their_stream_and_run_a_body_before_its_capture(monkeypatch):
    """The calls that CudaGraphs makes of torch.cuda, seen by stand-ins: the only test it has without a GPU."""
    log: list[str] = []
    refuse: list[str] = []

    @contextmanager
    def graph(g, *, pool, stream, capture_error_mode):
        assert (pool, stream.name, capture_error_mode) == ("pool", "engine", "thread_local")
        log.append("capture")
        yield
        if refuse:
            raise RuntimeError(refuse.pop())
        log.append("captured")

    fakes = {"Stream": lambda device: Stream("engine", log), "current_stream": lambda device: Stream("caller", log),
             "graph_pool_handle": lambda: "pool", "current_device": lambda: 3, "device": lambda d: nullcontext(),
             "stream": lambda s: nullcontext(), "graph": graph,
             "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: log.append("replay")})()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = CudaGraphs(torch.device("cuda"))
    assert graphs.device == torch.device("cuda", 3)
    with graphs.order():
        graphs.capture(lambda: log.append("body"))()
    graphs.drain()
    assert log == ["engine waits for caller", "body", "capture", "body", "captured", "replay",
                   "caller waits for engine", "engine is waited for"]
    refuse.append("operation not permitted\nwhen stream is capturing")
    with pytest.raises(CaptureError, match=r"^operation not permitted$"):
        graphs.capture(lambda: None)
