"""Small SD 3 and FLUX pipelines of diffusers, with random weights."""

from __future__ import annotations

from small_parts import TOKENIZER, randomise, text
from transformer_folders import t5, tokenizer


def _vae(channels: int = 4):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=1,
                        latent_channels=channels, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64, shift_factor=0.06,
                        scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False).eval()
    randomise(vae, 2)
    return vae


def _clip():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def _finished(pipe):
    randomise(pipe.transformer, 1)
    pipe.transformer.proj_out.weight.data.mul_(0.3)  # predictions near unit size, as a trained network's are
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(with_t5: bool = True, dynamic: bool = False):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    net = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
                                num_attention_heads=4, joint_attention_dim=80, caption_projection_dim=64,
                                pooled_projection_dim=64, pos_embed_max_size=12, qk_norm="rms_norm",
                                dual_attention_layers=(0,)).eval()
    parts = {"text_encoder_3": t5(80), "tokenizer_3": tokenizer()} if with_t5 else dict.fromkeys(
        ("text_encoder_3", "tokenizer_3"))
    schedule = {"shift": 1.0, "use_dynamic_shifting": True} if dynamic else {"shift": 3.0}
    return _finished(StableDiffusion3Pipeline(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(**schedule), vae=_vae(),
        text_encoder=text(32, 2, True, 3), tokenizer=_clip(), text_encoder_2=text(32, 3, True, 4),
        tokenizer_2=_clip(), **parts))


def flux(guidance: bool = True, kind: str = "FluxPipeline"):
    """kind: FluxControlPipeline has a picture beside its latents, FluxFillPipeline a mask, too."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    channels = {"FluxPipeline": 16, "FluxControlPipeline": 32, "FluxFillPipeline": 32 + 256}[kind]
    net = FluxTransformer2DModel(in_channels=channels, out_channels=16, num_layers=2, num_single_layers=2,
                                 attention_head_dim=16, num_attention_heads=4, joint_attention_dim=24,
                                 pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance).eval()
    schedule = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {}
    return _finished(getattr(diffusers, kind)(
        transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(**schedule), vae=_vae(),
        text_encoder=text(32, 2, False, 3), tokenizer=_clip(), text_encoder_2=t5(24), tokenizer_2=tokenizer()))
