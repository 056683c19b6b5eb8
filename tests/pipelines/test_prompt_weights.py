"""Weighted and long prompts, against transformers' CLIP and a hand-made division into chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ldmfast
from ldmfast.errors import LdmfastError
from ldmfast.pipelines import read_settings
from ldmfast.pipelines.prompt_weights import weigh
from ldmfast.pipelines.text import encode_prompts

SYNTAX = [  # what ComfyUI makes of it, but for square brackets and brackets without a partner
    ("", []), ("a cat", [("a cat", 1)]), ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
    ("((word))", [("word", 1.21)]), ("[word]", [("word", 1 / 1.1)]), ("[[a] b]", [("a", 1.1**-2), (" b", 1 / 1.1)]),
    ("(a (b:1.5) c)", [("a ", 1.1), ("b", 1.5), (" c", 1.1)]), ("(a (b) c:2)", [("a ", 2), ("b", 2.2), (" c", 2)]),
    ("((a):1.5)", [("a", 1.65)]), ("([a]:3)", [("a", 3 / 1.1)]), ("(a:-.5)", [("a", -0.5)]), ("(a:1e1 )", [("a", 10)]),
    ("(a:b)", [("a:b", 1.1)]), ("(4:3:0.8)", [("4:3", 0.8)]), ("(:1.5)", [(":1.5", 1.1)]),
    ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
    (r"\(a\) \[b\] (c\):1.4)", [("(a) [b] ", 1), ("c)", 1.4)]), ("a\\b", [("a\\b", 1)]), ("()", []),
    ("a (b", [("a (b", 1)]), ("a) b", [("a) b", 1)]), ("(a] b)", [("a] b", 1.1)]), ("([a) b", [("[a", 1.1), (" b", 1)]),
    ("(" * 3000 + "x", [("(" * 3000 + "x", 1)]), ("(a:0)", [("a", 0)]),
]


@pytest.mark.parametrize("prompt, expected", SYNTAX)
def test_syntax(prompt, expected):
    found = weigh(prompt)
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert [w for _, w in found] == pytest.approx([w for _, w in expected], rel=1e-12)


CATS = [("cat cat cat cat cat", 1.0)] * 15  # 75 tokens
PROMPTS = [  # each prompt, and by hand its chunks of (words, weight)
    ("a (red:1.3) cat, [blurry]", [[("a", 1), ("red", 1.3), ("cat,", 1), ("blurry", 1 / 1.1)]]),
    ("", [[]]),
    (" ".join(["cat"] * 100), [CATS, CATS[:5]]),
    (" ".join(["cat"] * 75), [CATS]),
    ("dog BREAK (a house BREAK on a hill:0.7)", [[("dog", 1)], [("a house", 0.7)], [("on a hill", 0.7)]]),
    # a piece of fewer than 8 tokens is not torn apart, one of 8 is
    (" ".join(["cat"] * 73) + " (big old red dog:1.4)",
     [[*CATS[:14], ("cat cat cat", 1)], [("big old red dog", 1.4)]]),
    (" ".join(["cat"] * 73) + " (one two three four five six seven eight:1.4)",
     [[*CATS[:14], ("cat cat cat", 1), ("one two", 1.4)], [("three four five six seven eight", 1.4)]]),
    ("((" + " ".join(["cat"] * 160) + ")) dog",
     [[(t, 1.21) for t, _ in CATS]] * 2 + [[("cat " * 10, 1.21), ("dog", 1)]]),
]


def expected_states(tokenizer, model, chunked, sdxl: bool):
    """(tokens, width) fp64 of one prompt, and the pooled row of its first chunk."""
    def encode(words):
        ids, weights = [49406], [1.0]
        for text, weight in words:
            new = tokenizer(text).input_ids[1:-1]
            ids, weights = ids + new, weights + [weight] * len(new)
        ids += [49407] + [tokenizer.pad_token_id] * (76 - len(ids))
        assert len(ids) == 77
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        states = out.hidden_states[-2] if sdxl else out.last_hidden_state
        return states[0].double(), torch.tensor(weights + [1.0] * (77 - len(weights)), dtype=torch.float64), out

    origin = encode([])[0]
    rows, first = [], None
    for words in chunked:
        states, weights, out = encode(words)
        first = out if first is None else first
        rows.append(origin + weights[:, None] * (states - origin))
    return torch.cat(rows), first[0][0] if sdxl else None


def expected_embeds(theirs, chunked):
    """(tokens, width) and pooled row or None, from all of a pipeline's text encoders."""
    if getattr(theirs, "text_encoder_2", None) is None:
        return expected_states(theirs.tokenizer, theirs.text_encoder, chunked, False)
    first, _ = expected_states(theirs.tokenizer, theirs.text_encoder, chunked, True)
    second, pooled = expected_states(theirs.tokenizer_2, theirs.text_encoder_2, chunked, True)
    return torch.cat([first, second], dim=-1), pooled


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_states_of_every_encoder(kind, request):
    theirs, folder = request.getfixturevalue(kind)
    encoders = ldmfast.Pipeline.from_pretrained(folder).loaded.text_encoders
    texts = [prompt for prompt, _ in PROMPTS]
    together = encode_prompts(encoders, [*texts, texts[0]], weighting=True)
    assert torch.equal(together.states[0], together.states[-1])
    for i, (prompt, chunked) in enumerate(PROMPTS):
        states, pooled = expected_embeds(theirs, chunked)
        alone = encode_prompts(encoders, [prompt], weighting=True, one_by_one=True)
        assert alone.states.shape == (1, *states.shape) and alone.tokens is None
        assert (alone.states[0] - states).abs().max() <= 2e-5, prompt[:40]
        assert together.tokens[i] == len(states)
        assert (together.states[i, :len(states)] - states).abs().max() <= 2e-5, prompt[:40]
        for found in (alone.pooled[0], together.pooled[i]) if kind == "sdxl" else ():
            assert (found - pooled).abs().max() <= 2e-5


CALL = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}


@pytest.mark.parametrize("kind, solver", [("sd", "ddim"), ("sdxl", "euler")])
def test_pictures(kind, solver, request):
    """Three chunks against a negative prompt of one, which for diffusers is said three times as ComfyUI does: keys
    that are there three times weigh as much as if they were there once."""
    theirs, folder = request.getfixturevalue(kind)
    (prompt, chunked), (negative, negative_chunked) = PROMPTS[7], PROMPTS[0]
    states, pooled = expected_embeds(theirs, chunked)
    other, other_pooled = expected_embeds(theirs, negative_chunked)
    embeds = {"prompt_embeds": states[None].float(), "negative_prompt_embeds": other.repeat(3, 1)[None].float()}
    if kind == "sdxl":
        embeds |= {"pooled_prompt_embeds": pooled[None], "negative_pooled_prompt_embeds": other_pooled[None]}
    expected = theirs(**embeds, **CALL, generator=torch.Generator().manual_seed(1)).images
    native = ldmfast.Pipeline.from_pretrained(folder)
    call = {**CALL, "negative_prompt": negative, "generator": 1, "solver": solver, "progress": False}
    got = native(prompt, **call, prompt_weighting=True).images
    assert np.abs(got - expected).max() <= 1e-4
    with pytest.warns(UserWarning, match="cut off"):
        assert np.abs(native(prompt, **call).images - expected).max() > 1e-3, "off unless asked for"


def test_neighbours_do_not_matter(ours, tmp_path):
    """In exact mode a picture is the same beside prompts of other lengths, and a plain prompt the same as without."""
    prompts = ["a cat", PROMPTS[2][0], PROMPTS[4][0]]
    call = {"num_inference_steps": 2, "progress": False, "negative_prompt": "(bad:1.2)", "prompt_weighting": True}
    together = ours(prompts, generator=[3, 4, 5], **call)
    for i, prompt in enumerate(prompts):
        alone = ours(prompt, generator=3 + i, **call).images[0]
        assert np.array_equal(np.asarray(together.images[i]), np.asarray(alone))
    plain = {**call, "negative_prompt": "", "output_type": "np", "generator": 1}
    assert np.array_equal(ours("a cat", **plain).images, ours("a cat", **plain | {"prompt_weighting": False}).images)
    file = together.save(tmp_path / "a.png")[1]
    again = ours.repeat(read_settings(file), progress=False)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(together.images[1]))


def test_a_weight_that_is_no_number(ours):
    with pytest.raises(LdmfastError, match=r"a weight in the prompt '\(a:1e999\)' is inf: give numbers like 1.2"):
        ours("(a:1e999)", prompt_weighting=True)
