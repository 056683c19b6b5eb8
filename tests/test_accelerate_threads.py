"""One accelerated diffusers pipeline called by many threads, and that one thread sees no difference."""

from __future__ import annotations

import functools
import inspect
import pickle
import threading

import accelerate_models as make
import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

import ldmfast

PROMPTS = ("a red circle above a blue square", "three yellow rings", "a purple triangle on a gray background, and more")
KINDS = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)


def components() -> dict:
    tokenizer = CLIPTokenizerFast.from_pretrained("ldmfast/assets/tiny", subfolder="tokenizer")
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48,
                                        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
                                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    return dict(unet=make.unet(), vae=make.vae_kl(latent_channels=4), text_encoder=text.eval(), tokenizer=tokenizer,
                scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), safety_checker=None,
                feature_extractor=None, image_encoder=None, requires_safety_checker=False)


def pipelines(precision: str = "exact", parts: dict | None = None) -> dict:
    """The three kinds around the same parts, scheduler and tokenizer included."""
    parts = parts or components()
    found = {}
    for kind in KINDS:
        found[kind] = pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        ldmfast.accelerate(pipe, precision=precision)
    return found


def draw(pipes: dict, i: int) -> np.ndarray:
    """Call i: most of them of the first pipeline, with one or two prompts, other sizes, steps and guidance."""
    generator = torch.Generator().manual_seed(i)
    given = dict(prompt=list(PROMPTS[i % 3:][:1 + i % 2]), num_inference_steps=1 + i % 2,
                 guidance_scale=(1.0, 3.0, 5.0)[i % 3], generator=generator,
                 output_type="np", return_dict=bool(i % 2))
    kind = KINDS[(i % 10 > 7) + (i % 10 > 8)]
    size = 16 + 8 * (i % 3)
    if kind is StableDiffusionPipeline:
        given |= dict(height=size, width=16)
    else:
        picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(100 + i))
        given |= dict(image=picture, strength=0.9, num_inference_steps=2 + i % 2)
        if kind is StableDiffusionInpaintPipeline:
            given |= dict(mask_image=(picture[:, :1] > 0.5).float(), height=size, width=size)
    if i % 6 == 5:  # ends after its first step, and no other does
        given |= dict(num_inference_steps=3, callback_on_step_end=stop)
    return pipes[kind](**given)[0]


def stop(pipe, step, timestep, kwargs):
    pipe._interrupt = True
    return kwargs


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_64_threads_of_20_mixed_calls_equal_serial(precision):
    pipes = pipelines(precision)
    wanted = [draw(pipes, i) for i in range(20)]
    assert len({w.tobytes() for w in wanted}) == 20, "calls that are mixed up must be told apart"
    wrong, gate = [], threading.Barrier(64)

    def work(k):
        gate.wait()
        for i in torch.randperm(20, generator=torch.Generator().manual_seed(k)).tolist():
            try:
                if not np.array_equal(draw(pipes, i), wanted[i]):
                    wrong.append((k, i))
            except Exception as error:
                wrong.append((k, i, repr(error)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(64)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    print(f"64 threads x 20 mixed calls of one diffusers pipeline in {precision}: {len(wrong)} not equal to serial")
    assert not wrong, wrong[:5]
    assert np.array_equal(draw(pipes, 3), wanted[3])


def test_one_thread_sees_no_difference():
    """The object itself runs and keeps what diffusers leaves there; a copy does, too."""
    signature = inspect.signature(StableDiffusionPipeline.__call__)
    pipes, given = pipelines(), dict(prompt="a red circle", num_inference_steps=3, guidance_scale=4.0)
    pipe, seen = pipes[StableDiffusionPipeline], []

    def look(given, step, timestep, kwargs):
        seen.append(given is pipe and given.scheduler is pipe.scheduler and given.guidance_scale == 4.0)
        given._interrupt = step == 1
        return kwargs

    assert type(pipe) is StableDiffusionPipeline and inspect.signature(type(pipe).__call__) == signature
    pipe(**given, callback_on_step_end=look)
    assert seen == [True, True] and pipe.interrupt and pipe.num_timesteps == 4 and pipe.guidance_scale == 4.0
    assert len(pipe.scheduler.timesteps) == 4 and pipe.scheduler.counter == 2
    with pytest.raises(ValueError, match="Provide either `prompt`"):
        pipe()

    twin, other = pickle.loads(pickle.dumps(pipe)), StableDiffusionPipeline(**components())
    other.set_progress_bar_config(disable=True)
    ldmfast.restore(pipe)
    wanted, got = (p(**given, output_type="np", generator=torch.Generator().manual_seed(1)).images
                   for p in (other, twin))
    assert np.abs(wanted - got).max() <= 1e-4
    ldmfast.restore(twin)
    assert vars(pipe).keys() == vars(other).keys()


def test_a_pipeline_of_two_tokenizers_and_a_wrapper_of_somebody_else():
    """SD 3 keeps a number by the name of tokenizer_max_length. Who wraps the call of an accelerated class stays."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained("ldmfast/assets/tiny_dit", text_encoder_3=None,
                                                              tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    plain = type(pipe).__call__
    ldmfast.accelerate(pipe)

    def picture(i):
        return pipe(PROMPTS[i % 3], num_inference_steps=2, max_sequence_length=1, output_type="np",
                    generator=torch.Generator().manual_seed(i)).images

    wanted, found = [picture(i) for i in range(4)], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: picture(i)})) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(found[i], wanted[i]) for i in range(4))

    ours = type(pipe).__call__
    assert ours is not plain
    type(pipe).__call__ = theirs = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    ldmfast.restore(pipe)
    assert type(pipe).__call__ is theirs
    type(pipe).__call__ = plain


class Own(StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_the_class_is_diffusers_own_again():
    plain, pipe = Own.__call__, ldmfast.accelerate(Own(**components()))
    twin = pickle.loads(pickle.dumps(pipe))
    assert Own.__call__ is not plain and len(twin("a red circle", num_inference_steps=1).images) == 1
    ldmfast.restore(pipe)
    assert Own.__call__ is not plain, "the copy is accelerated still"
    ldmfast.restore(twin)
    assert Own.__call__ is plain


def test_what_calls_may_change_together_waits():
    """A call inside a call's callback shares what the thread has, as in diffusers; another thread's gets a copy, or
    waits where models are offloaded, carry adapters or are upcast, and where the scheduler cannot be copied."""
    from ldmfast.accelerated import threads

    pipe = pipelines()[StableDiffusionPipeline]
    found = []

    def elsewhere():
        worker = threading.Thread(target=lambda: found.append(threads._place(pipe)))
        worker.start()
        worker.join()
        return found[-1]

    with threads._turn(pipe) as chosen:
        assert chosen is pipe and threads._place(pipe) == (pipe, {})
        twin, taken = elsewhere()
        assert type(twin) is type(pipe) and twin.unet is pipe.unet and not taken
        assert twin.scheduler is not pipe.scheduler and twin.components.keys() == pipe.components.keys()
        pipe.unet.peft_config = {}
        assert elsewhere() is None
        del pipe.unet.peft_config
        pipe.vae.half().register_to_config(force_upcast=True)
        assert elsewhere() is None
        pipe.vae.float()
        pipe.scheduler.uncopied = threading.Lock()
        with threads._turn(pipe):
            assert elsewhere() is not None, "the copy that was made before still serves"
    with threads._turn(pipe):
        assert elsewhere() is None
    assert not threads._used
