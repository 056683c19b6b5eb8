"""An accelerated model follows its weights, copies, pickles, moves, and serves many threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import accelerate.hooks
import accelerate_models as make
import diffusers
import pytest
import torch
from accelerate_models import inputs

import ldmfast

TINY = "ldmfast/assets/tiny"
pytestmark = pytest.mark.filterwarnings("error:ldmfast")


def _double(m):
    m.conv_in.weight.mul_(2)


def _double_data(m):
    for module in m.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.mul_(1.5)


def _load(m):
    m.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in m.state_dict().items()})


def _double_data_channels_last(m):
    """Weights in another order than row by row."""
    m.to(memory_format=torch.channels_last)
    m(*inputs())
    _double_data(m)


def _replace(m):
    m.conv_in.weight = torch.nn.Parameter(2 * m.conv_in.weight)


def _replace_module(m):
    """By one of its like: the weights that were looked at are as they were, but no longer the model's."""
    m.conv_in = copy.deepcopy(m.conv_in)
    m.conv_in.weight.mul_(2)


def _replace_one_number(m):
    """A parameter of one element compares like a number; it is another tensor all the same."""
    m.conv_out.bias = torch.nn.Parameter(m.conv_out.bias.clone())
    m.conv_out.bias.data.add_(3)


def _swap_data(m):
    for p in m.parameters():
        p.data = p.data * 1.2


CHANGES = {f.__name__.strip("_"): f for f in (_double, _double_data, _double_data_channels_last, _load, _replace,
                                              _replace_module, _replace_one_number, _swap_data)}


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_the_picture_follows_the_weights(name, precision, native_calls):
    theirs = make.unet(out_channels=1)
    ours = ldmfast.accelerate(copy.deepcopy(theirs), precision=precision)
    before = ours(*inputs()).sample
    for model in (ours, theirs):
        CHANGES[name](model)

    out = ours(*inputs()).sample

    calls = len(native_calls)
    if precision == "exact":
        wanted = theirs(*inputs()).sample
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    else:  # as if accelerated after the change
        wanted = ldmfast.accelerate(theirs, precision=precision)(*inputs()).sample
        assert torch.equal(out, wanted)
    assert (wanted - before).abs().max() > 0.05
    assert calls == (3 if name == "double_data_channels_last" else 2)


@torch.no_grad()
def test_exact_shares_the_weights_and_packed_copies_are_not_made_again():
    model = ldmfast.accelerate(make.unet())
    state = model.forward.state
    model(*inputs())
    native = state.judge(model).native
    own = {p.data_ptr() for p in native.parameters()}
    assert own == {p.data_ptr() for p in model.parameters()}
    model.train()  # not another network
    assert state.judge(model).native is native
    ldmfast.accelerate(model, precision="bf16")
    state = model.forward.state
    packed = state.judge(model).native
    model(*inputs())
    model.eval()(*inputs())
    assert state.judge(model).native is packed


@torch.no_grad()
def test_dtypes(native_calls):
    """In half precision our error against fp32 is at most twice diffusers' own."""
    exact = make.unet()
    wanted = exact(*inputs()).sample
    for dtype in (torch.float16, torch.bfloat16):
        theirs = copy.deepcopy(exact).to(dtype)
        ours = ldmfast.accelerate(copy.deepcopy(exact)).to(dtype)
        x, t, e = inputs()
        out, other = (m(x.to(dtype), t, e.to(dtype)).sample for m in (ours, theirs))
        assert out.dtype == dtype
        assert (out - wanted).abs().max() <= 2 * (other - wanted).abs().max() + torch.finfo(dtype).eps
        torch.testing.assert_close(ours.float()(*inputs()).sample, theirs.float()(*inputs()).sample, rtol=0, atol=1e-4)
    assert len(native_calls) == 4


@pytest.mark.parametrize("make_copy", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: torch.load(_file(m), weights_only=False)], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("build", [make.unet, make.vae_kl])
@torch.no_grad()
def test_copies_are_accelerated_and_independent(make_copy, build, native_calls):
    model = ldmfast.accelerate(build())
    given = inputs() if build is make.unet else (torch.rand(1, 3, 16, 16),)
    wanted = model(*given).sample
    count = len(native_calls)

    twin = make_copy(model)

    assert torch.equal(twin(*given).sample, wanted) and len(native_calls) == 2 * count
    for p in twin.parameters():
        p.mul_(1.1)
    assert not torch.equal(twin(*given).sample, wanted)
    assert torch.equal(model(*given).sample, wanted)
    ldmfast.restore(twin)
    assert len(native_calls) == 4 * count
    twin(*given)
    assert len(native_calls) == 4 * count


def _file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@torch.no_grad()
def test_a_model_is_freed_without_the_collector():
    """A network of gigabytes must not wait for a cycle to be found."""
    model = ldmfast.accelerate(make.unet())
    model(*inputs())
    ghost = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert ghost() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_saving_and_loading(tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY)
    pipe.save_pretrained(tmp_path / "before")
    ldmfast.accelerate(pipe, precision="bf16")
    pipe.unet(torch.randn(1, 8, 8, 8), 3, torch.randn(1, 16, pipe.unet.config.cross_attention_dim))
    pipe.save_pretrained(tmp_path / "after")
    names = {p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*") if p.is_file()}
    assert names == {p.relative_to(tmp_path / "after") for p in (tmp_path / "after").rglob("*") if p.is_file()}
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "after")
    assert "forward" not in vars(again.unet)


@torch.no_grad()
def test_hooks_of_the_accelerate_library_on_the_model(native_calls):
    """Model offload wraps forward; ours must be inside, also when it comes after the hook, and leave with it."""
    theirs = make.unet()
    wanted = theirs(*inputs()).sample
    seen = []

    class Watch(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module))
            return args, kwargs

    first = ldmfast.accelerate(copy.deepcopy(theirs))
    accelerate.hooks.add_hook_to_module(first, Watch())
    second = copy.deepcopy(theirs)
    accelerate.hooks.add_hook_to_module(second, Watch())
    ldmfast.accelerate(second)
    for count, model in enumerate((first, second, copy.deepcopy(first)), 1):
        torch.testing.assert_close(model(*inputs()).sample, wanted, rtol=0, atol=1e-4)
        assert len(seen) == len(native_calls) == count
    ldmfast.restore(second)
    assert torch.equal(second(*inputs()).sample, wanted) and len(seen) == 4 and len(native_calls) == 3
    accelerate.hooks.remove_hook_from_module(second)
    ldmfast.accelerate(second)
    second(*inputs())
    accelerate.hooks.remove_hook_from_module(first)
    first(*inputs())
    assert len(seen) == 4 and len(native_calls) == 5


@torch.no_grad()
def test_restore_inside_a_wrapper(native_calls):
    """Caching libraries wrap forward after us: ours cannot be taken out of there, and must step aside."""
    theirs = make.unet()
    model = ldmfast.accelerate(copy.deepcopy(theirs))
    inner = model.forward
    model.forward = lambda *a, **k: (2 * inner(*a, **k).sample,)
    torch.testing.assert_close(model(*inputs())[0], 2 * theirs(*inputs()).sample, rtol=0, atol=2e-4)
    ldmfast.restore(model)
    assert torch.equal(model(*inputs())[0], 2 * theirs(*inputs()).sample) and len(native_calls) == 1


@torch.no_grad()
def test_hooks_of_torch_on_the_model_itself(native_calls):
    model = ldmfast.accelerate(make.unet())
    wanted = model(*inputs()).sample
    handle = model.register_forward_hook(lambda m, x, out: (2 * out.sample,))
    assert torch.equal(model(*inputs())[0], 2 * wanted) and len(native_calls) == 2
    handle.remove()


@torch.no_grad()
def test_functional_call(native_calls):
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    before = ours(*inputs()).sample
    weights = {k: 1.1 * v for k, v in theirs.named_parameters()}
    out, wanted = (torch.func.functional_call(m, weights, inputs()).sample for m in (ours, theirs))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    assert torch.equal(ours(*inputs()).sample, before) and len(native_calls) == 3


def test_signature():
    import inspect

    model = make.unet()
    wanted = inspect.signature(model.forward)
    assert inspect.signature(ldmfast.accelerate(model).forward) == wanted


def test_random_numbers_are_not_touched():
    """Building the native network and the blueprint draws nothing from torch's generator."""
    model = make.unet()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        ldmfast.accelerate(model, precision="bf16")(*inputs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_64_threads_of_20_mixed_calls_equal_serial(precision):
    """Shapes, timesteps and conditions differ from call to call; half of the threads start on a model without a
    network yet, which several of them then want at once."""
    model = ldmfast.accelerate(make.unet(), precision=precision)
    residuals = [torch.randn(1, c, s, s) for c, s in ((32, 16), (32, 16), (32, 8), (64, 8))]
    calls = []
    for i in range(20):
        x, t, e = inputs(batch=1 + i % 2, size=16 if i % 3 == 0 else 8 + i % 5, tokens=1 + i % 9, seed=i)
        extra = {}
        if i % 6 == 0:
            extra = dict(down_block_additional_residuals=[r.expand(len(x), -1, -1, -1) for r in residuals],
                         mid_block_additional_residual=torch.ones(len(x), 64, 8, 8))
        elif i % 4 == 1:
            extra = dict(encoder_attention_mask=torch.ones(e.shape[:2]))
        calls.append(((x, 37 * i if i % 2 else t, e), extra))

    @torch.no_grad()
    def run(net, order):
        return {i: net(*calls[i][0], **calls[i][1]).sample for i in order}

    wanted = run(model, range(20))
    fresh = copy.deepcopy(model)
    wrong, gate = [], threading.Barrier(64)

    def work(k):
        try:
            order = torch.randperm(20, generator=torch.Generator().manual_seed(k)).tolist()
            gate.wait()
            got = run(fresh if k % 2 else model, order)
            wrong.extend((k, i) for i in range(20) if not torch.equal(got[i], wanted[i]))
        except Exception as error:
            wrong.append((k, repr(error)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(64)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
