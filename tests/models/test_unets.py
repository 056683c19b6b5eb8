"""UNets against diffusers on the same random weights, every config, and the ways they are called."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from model_cases import SD1, SMALL, UNETS, UNetCase, diffusers_out, draw, error, prompt, rms
from torch import nn

from ldmfast.errors import LdmfastError, ShapeError
from ldmfast.models import Model, UNet2DCondition, from_diffusers

FP32 = 1e-4  # of the output's RMS: the project's parity bound in exact precision


@cache
def pair(name: str) -> tuple[nn.Module, Model]:
    theirs = UNETS[name].build()
    return theirs, from_diffusers(theirs)


@pytest.mark.parametrize("name", UNETS)
def test_matches_diffusers(name: str) -> None:
    case, (theirs, ours) = UNETS[name], pair(name)
    for size in case.sizes:
        for n in (1, 2):
            sample, conditions = case.sample(n, size), case.conditions(n)
            expected = diffusers_out(theirs, sample, 37, **conditions)
            got = ours(sample, 37, **conditions)
            assert got.shape == expected.shape
            assert error(got, expected) <= FP32, (name, size, n)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "scale_shift", "ldm_unconditional"])
def test_bfloat16_is_as_good_as_diffusers(name: str) -> None:
    """Against the fp32 result, at most twice the error that diffusers makes in bfloat16."""
    case, (theirs, ours) = UNETS[name], pair(name)
    low, low_ours = case.build().to(torch.bfloat16), from_diffusers(theirs, dtype=torch.bfloat16)
    assert low_ours.dtype == torch.bfloat16 and ours.dtype == torch.float32
    sample, conditions = case.sample(2), case.conditions(2)
    exact = diffusers_out(theirs, sample, 37, **conditions)

    def cast(x):
        if isinstance(x, dict):
            return {k: cast(v) for k, v in x.items()}
        return x.bfloat16() if x.is_floating_point() else x

    conditions = cast(conditions)
    allowed = 2 * rms(diffusers_out(low, sample.bfloat16(), 37, **conditions).float() - exact)
    assert rms(low_ours(sample.bfloat16(), 37, **conditions).float() - exact) <= allowed


@pytest.mark.parametrize("name", UNETS)
def test_prepared_state_gives_the_same_bits(name: str) -> None:
    """One state for many timesteps equals the computation step by step, also when only some are asked for."""
    case, (_, ours) = UNETS[name], pair(name)
    sample, conditions = case.sample(2), case.conditions(2)
    times = [999.0, 41.0, 500.0, *map(float, range(100, 140)), 1.0]
    given = {k: v for k, v in conditions.items()}
    state = ours.prepare(times, **given)
    for t in (999.0, 41.0, 1.0):
        assert torch.equal(ours(sample, t, state=state), ours(sample, t, **conditions))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "classes"])
def test_a_state_beside_another_has_the_same_bits(name: str) -> None:
    """Other pictures at the same times: what depends on times alone is the first's; where conditions enter, or times
    differ, nothing is."""
    case, (_, ours) = UNETS[name], pair(name)
    first, second = ({k: {n: x[i:i + 1] for n, x in v.items()} if isinstance(v, dict) else v[i:i + 1]
                      for k, v in case.conditions(2).items()} for i in range(2))
    times, sample = [999.0, 41.0, 1.0], case.sample(1)
    beside = ours.prepare(times, **first)
    state = ours.prepare(times, **second, beside=beside)
    assert (state.times is beside.times) == (name == "sd1")
    others = ours.prepare([41.0, 7.0], **second, beside=beside)
    for t, one in ((999.0, state), (41.0, state), (41.0, others), (7.0, others)):
        assert torch.equal(ours(sample, t, state=one), ours(sample, t, **second))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "classes", "ldm_unconditional"])
@pytest.mark.parametrize("n", [0, 3])
def test_batch_sizes(name: str, n: int) -> None:
    case, (theirs, ours) = UNETS[name], pair(name)
    sample, conditions = case.sample(n), case.conditions(n)
    got = ours(sample, 5, **conditions)
    assert got.shape == (n, theirs.config.out_channels, 16, 16)
    if n:
        assert error(got, diffusers_out(theirs, sample, 5, **conditions)) <= FP32


@pytest.mark.parametrize("timestep", [3, 3.5, torch.tensor(3), torch.tensor(3.5), torch.tensor([3.5]),
                                      torch.tensor([3, 700]), torch.tensor([3.5, 0.25])])
def test_timestep_kinds(timestep) -> None:
    case, (theirs, ours) = UNETS["sd1"], pair("sd1")
    sample, conditions = case.sample(2), case.conditions(2)
    got = ours(sample, timestep, **conditions)
    assert error(got, diffusers_out(theirs, sample, timestep, **conditions)) <= FP32


def test_number_timesteps_of_the_unconditional_model_lose_their_fraction() -> None:
    case, (theirs, ours) = UNETS["ldm_unconditional"], pair("ldm_unconditional")
    sample = case.sample(1)
    for timestep in (3.9, torch.tensor(3.9)):
        assert error(ours(sample, timestep), diffusers_out(theirs, sample, timestep)) <= FP32
    assert torch.equal(ours(sample, 3.9), ours(sample, 3.9, state=ours.prepare([3.9, 8.0])))


def test_timesteps_of_a_state_can_differ_by_picture() -> None:
    case, (_, ours) = UNETS["sdxl"], pair("sdxl")
    sample, conditions = case.sample(2), case.conditions(2)
    state = ours.prepare([10, 20, 30], **conditions)
    both = ours(sample, torch.tensor([30, 10]), state=state)
    assert torch.equal(both, ours(sample, torch.tensor([30, 10]), **conditions))
    with pytest.raises(LdmfastError, match=r"timestep 11\.0 was not prepared"):
        ours(sample, 11, state=state)
    with pytest.raises(LdmfastError, match="together with a prepared state"):
        ours(sample, 10, conditions["encoder_hidden_states"], state=state)


def test_prompt_mask() -> None:
    case, (theirs, ours) = UNETS["sd1"], pair("sd1")
    sample, conditions = case.sample(2), case.conditions(2)
    mask = torch.ones(2, 11)
    mask[0, 4:], mask[1, :3] = 0, 0
    plain = ours(sample, 9, **conditions)
    for m in (mask, mask.bool()):
        got = ours(sample, 9, encoder_attention_mask=m, **conditions)
        assert error(got, diffusers_out(theirs, sample, 9, encoder_attention_mask=m, **conditions)) <= FP32
        assert error(got, plain) > 0.01
        state = ours.prepare([9], encoder_attention_mask=m, **conditions)
        assert torch.equal(got, ours(sample, 9, state=state))


def test_self_attention_mask() -> None:
    """A mask over pixels fits where all transformers work at one resolution: here the first level, no middle."""
    case = UNetCase(SMALL | {"mid_block_type": None}, prompt)
    theirs = case.build()
    ours = from_diffusers(theirs)
    sample, conditions = case.sample(2, (6, 4)), case.conditions(2)
    mask = (draw(2, 24, seed=9) > 0).float()
    got = ours(sample, 9, attention_mask=mask, **conditions)
    assert error(got, diffusers_out(theirs, sample, 9, attention_mask=mask, **conditions)) <= FP32
    assert error(got, ours(sample, 9, **conditions)) > 0.01


def residuals(case: UNetCase, ours: Model, n: int, size: tuple[int, int]) -> tuple[list, torch.Tensor]:
    """Random tensors of the shapes of the skips and of the middle, found by hooks."""
    shapes: list[torch.Size] = []
    handles = [ours.conv_in.register_forward_hook(lambda m, a, y: shapes.append(y.shape))]
    handles += [b.register_forward_hook(lambda m, a, y: shapes.extend(s.shape for s in y[1]))
                for b in ours.down_blocks]
    handles.append(ours.mid_block.register_forward_hook(lambda m, a, y: shapes.append(y.shape)))
    ours(case.sample(n, size), 1, **case.conditions(n))
    for handle in handles:
        handle.remove()
    drawn = [draw(*s, seed=20 + i) for i, s in enumerate(shapes)]
    return drawn[:-1], drawn[-1]


@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
def test_controlnet_residuals(size: tuple[int, int]) -> None:
    case, (theirs, ours) = UNETS["sd1"], pair("sd1")
    down, mid = residuals(case, ours, 2, size)
    sample, conditions = case.sample(2, size), case.conditions(2)
    extra = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
    expected = diffusers_out(theirs, sample, 9, **conditions, **extra)
    assert error(ours(sample, 9, **conditions, **extra), expected) <= FP32
    kept = [d.clone() for d in down]
    state = ours.prepare([9], **conditions)
    assert error(ours(sample, 9, state=state, **extra), expected) <= FP32
    assert all(torch.equal(a, b) for a, b in zip(kept, down))
    with pytest.raises(ShapeError, match="down_block_additional_residuals: 11 tensors for 12 places"):
        ours(sample, 9, state=state, down_block_additional_residuals=down[1:], mid_block_additional_residual=mid)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_t2i_adapter_residuals(name: str) -> None:
    case, (theirs, ours) = UNETS[name], pair(name)
    sample, conditions = case.sample(2), case.conditions(2)
    levels = theirs.config.block_out_channels
    sizes = [16 // 2 ** min(i, len(levels) - 1) for i in range(len(levels))]
    # a level without transformers gets its residual behind its downsampling
    sizes = [s // 2 if t == "DownBlock2D" and i < len(levels) - 1 else s
             for i, (s, t) in enumerate(zip(sizes, theirs.config.down_block_types))]
    adapters = [draw(2, c, s, s, seed=30 + i) for i, (c, s) in enumerate(zip(levels, sizes))]
    expected = diffusers_out(theirs, sample, 9, down_intrablock_additional_residuals=[a.clone() for a in adapters],
                             **conditions)
    got = ours(sample, 9, down_intrablock_additional_residuals=adapters, **conditions)
    assert len(adapters) == len(levels) and error(got, expected) <= FP32
    older = ours(sample, 9, down_block_additional_residuals=adapters, **conditions)
    assert torch.equal(older, got)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "dual_cross_attention", "attention_blocks", "scale_shift"])
def test_activations_stay_channels_last(name: str) -> None:
    """Every image that a module takes or gives is dense in NHWC order: nothing is laid out anew on the way."""
    case, (_, ours) = UNETS[name], pair(name)
    seen: list[str] = []
    wrong: list[str] = []

    def check(label: str):
        def hook(module, args, output):
            outputs = output[1] if isinstance(output, tuple) else [output]
            for x in [a for a in args if isinstance(a, torch.Tensor)] + list(outputs):
                if isinstance(x, torch.Tensor) and x.ndim == 4:
                    seen.append(label)
                    if not x.is_contiguous(memory_format=torch.channels_last):
                        wrong.append(label)
        return hook

    handles = [m.register_forward_hook(check(k)) for k, m in ours.named_modules() if k]
    sample = case.sample(2, (24, 16))
    extra = {}
    if name == "sd1":
        down, mid = residuals(case, ours, 2, (24, 16))
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    ours(sample, 3, **case.conditions(2), **extra)
    for handle in handles:
        handle.remove()
    assert len(seen) > 50 and not wrong


def test_nothing_is_left_on_the_modules() -> None:
    """A call changes no attribute of any module: threads share them."""
    case, (_, ours) = UNETS["sdxl"], pair("sdxl")

    def snapshot():
        return {k: {a: id(v) for a, v in vars(m).items()} for k, m in ours.named_modules()}

    before = snapshot()
    ours(case.sample(2), 3, **case.conditions(2))
    assert snapshot() == before


def test_two_threads_equal_serial() -> None:
    case, (_, ours) = UNETS["sd1"], pair("sd1")
    calls = [(case.sample(n, size) * (i + 1), 10.0 * i, case.conditions(n))
             for i, (n, size) in enumerate([(1, (16, 16)), (2, (13, 17)), (3, (8, 8)), (1, (24, 16))] * 2)]
    serial = [ours(x, t, **c) for x, t, c in calls]
    found: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        for i in range(start, len(calls), 2):
            x, t, c = calls[i]
            found[i] = ours(x, t, state=ours.prepare([t], **c))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected) for i, expected in enumerate(serial))


def test_runs_with_and_without_inference_mode() -> None:
    case, (_, ours) = UNETS["sd1"], pair("sd1")
    sample, conditions = case.sample(1), case.conditions(1)
    plain = ours(sample, 3, **conditions)
    with torch.inference_mode():
        assert torch.equal(ours(sample, 3, **conditions), plain)
    assert not plain.requires_grad


def test_time_embedding_does_not_depend_on_its_batch() -> None:
    """The rows of the time path are computed in blocks of a fixed size, so that prepare() is exact by
    construction: any number of timesteps and of pictures gives the same row."""
    _, ours = pair("sdxl")
    conditions = UNETS["sdxl"].conditions(3)
    one = {"encoder_hidden_states": conditions["encoder_hidden_states"][:1],
           "added_cond_kwargs": {k: v[:1] for k, v in conditions["added_cond_kwargs"].items()}}
    many = ours.prepare(list(range(37)), **conditions)
    single = ours.prepare([17], **one)
    assert many.widths == single.widths and torch.equal(many.times[17, 0], single.times[0, 0])


@pytest.mark.parametrize("arguments, message", [
    ({"sample": draw(1, 3, 8, 8)}, r"sample has shape \(1, 3, 8, 8\), needs \(pictures, 4, height, width\)"),
    ({"sample": draw(4, 8, 8)}, r"sample has shape \(4, 8, 8\)"),
    ({"encoder_hidden_states": None}, r"encoder_hidden_states has shape None, needs \(pictures, tokens, 48\)"),
    ({"encoder_hidden_states": draw(2, 5, 47)}, r"needs \(pictures, tokens, 48\)"),
    ({"encoder_hidden_states": draw(3, 5, 48)}, "sample has 2 pictures, the conditions were given for 3"),
    ({"timestep": torch.tensor([1, 2, 3])}, "timestep has 3 entries"),
    ({"timestep": torch.tensor([])}, "timestep is empty"),
    ({"timestep": "soon"}, "timestep 'soon' is no number"),
    ({"timestep": torch.zeros(2, 2)}, r"timestep has shape \(2, 2\)"),
    ({"encoder_attention_mask": torch.ones(2, 5, 5)}, r"encoder_attention_mask has shape \(2, 5, 5\)"),
    ({"encoder_attention_mask": torch.ones(2, 4)}, "bias"),
    ({"attention_mask": torch.ones(1, 64)}, r"attention_mask has shape \(1, 64\)"),
    ({"timestep_cond": draw(2, 8)}, "timestep_cond has shape .2, 8., this model takes none"),
])
def test_wrong_shapes(arguments: dict, message: str) -> None:
    _, ours = pair("sd1")
    call = {"sample": draw(2, 4, 8, 8), "timestep": 1, "encoder_hidden_states": draw(2, 5, 48)} | arguments
    with pytest.raises(ShapeError, match=message) as caught:
        ours(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, arguments, message", [
    ("classes", {}, "this model is class-conditional: pass class_labels"),
    ("classes", {"class_labels": torch.tensor([3, 7])}, r"class_labels reach 3\.\.7, the model has classes 0\.\.6"),
    ("sdxl", {}, "added_cond_kwargs lacks text_embeds and time_ids"),
    ("sdxl", {"added_cond_kwargs": {"text_embeds": draw(2, 20), "time_ids": draw(2, 5)}}, "the 68 channels"),
    ("lcm", {"timestep_cond": draw(2, 15)}, r"needs \(pictures, 16\)"),
    ("dual_cross_attention", {}, r"a dual model needs 77 \+ 257"),
])
def test_wrong_conditions(name: str, arguments: dict, message: str) -> None:
    _, ours = pair(name)
    with pytest.raises(ShapeError, match=message):
        ours(UNETS[name].sample(2), 1, **prompt(2), **arguments)


def test_weights_are_shared_and_strict() -> None:
    theirs, ours = pair("sd1")
    own = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert own[name].data_ptr() == p.data_ptr() and own[name].stride() == p.stride()
    fresh = UNet2DCondition.from_config(SD1)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    case = UNETS["sd1"]
    assert torch.equal(fresh(case.sample(1), 1, **case.conditions(1)), ours(case.sample(1), 1, **case.conditions(1)))


def test_other_kwargs_are_refused() -> None:
    case, (_, ours) = UNETS["sd1"], pair("sd1")
    with pytest.raises(LdmfastError, match="cross_attention_kwargs"):
        ours(case.sample(1), 1, **case.conditions(1), cross_attention_kwargs={"gligen": {}})
    ours(case.sample(1), 1, **case.conditions(1), cross_attention_kwargs={"scale": 1.0})
