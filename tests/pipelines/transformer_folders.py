"""Small diffusers pipelines around diffusion transformers, with random weights."""

from __future__ import annotations

from small_parts import randomise, vae

WORDS = ("a", "red", "cat", "two", "dogs", "on", "the", "moon", "in", "rain", "painting", "of", "an", "old", "house",
         "blurry", "very", "wide", "view")


def tokenizer():
    """T5's kind (unigram, ends with </s>), of whole words and letters."""
    from transformers import T5Tokenizer

    letters = [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz,.!"]
    words = [(f"▁{w}", -3.0 - 0.01 * i) for i, w in enumerate(WORDS)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0), *words, *letters],
                       extra_ids=0)


def t5(width: int = 24):
    from transformers import T5Config, T5EncoderModel

    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer()), d_model=width, d_kv=8, d_ff=48, num_layers=2,
                                      num_heads=3, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()
    randomise(encoder, 5)
    return encoder


def dit(scheduler=None):
    """scheduler: DDIM, or what the network predicts a velocity for (SiT)."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    # 1000 classes: diffusers' pipeline takes 1000 for "none", whatever the network says
    net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2,
                                in_channels=4, out_channels=8, num_embeds_ada_norm=1000).eval()
    return _pipe(DiTPipeline, net, "proj_out_2", scheduler=scheduler or DDIMScheduler(clip_sample=False))


def pixart(sigma: bool = False, sample_size: int = 8):
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    net = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=24, num_layers=2, sample_size=sample_size,
                                   patch_size=2, cross_attention_dim=48, caption_channels=24, out_channels=8).eval()
    return _pipe(PixArtSigmaPipeline if sigma else PixArtAlphaPipeline, net, "proj_out", text_encoder=t5(),
                 tokenizer=tokenizer(), scheduler=DPMSolverMultistepScheduler())


def _pipe(kind, net, last: str, **parts):
    randomise(net, 1)
    net.get_submodule(last).weight.data.mul_(0.3)  # predictions near unit size, as a trained network's are
    pipe = kind(transformer=net, vae=vae(2), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
