"""A completion is the response and the end of its turn, in the shapes of published chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import transformers as hf

from dpo_mm.policies.vlm.completion import without_repeated_opening
from dpo_mm.policies.vlm.vlm_policy import VisionLanguage
from tests.contracts import tiny_vlms

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "gemma": (
        "<s>" + LOOP + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi": (
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "<|end|>",
    ),
    "llama-2": (
        LOOP + "{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}",
        " </s>",
    ),
    "llama-3": (
        "<s>" + LOOP + "<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "cohere": (
        LOOP + "<|start|>{{ m['role'] }}<|stop|>{{ m['content'] }}{{ '<end_of_response>' if m['role'] == 'assistant' }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>{% endif %}",
        "<end_of_response><|eot_id|>",
    ),
    "glm": (
        "<s>" + LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>",
    ),
    "no end": (
        LOOP + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "</s>",
    ),
    "reasoning": (
        "<s>" + LOOP + "{% set c = m['content'] %}{% if m['role'] == 'user' %}<|User|>{{ c }}"
        "{% else %}<|Assistant|>{{ c.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "</s>",
    ),
}
SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|start|>"]
SPECIAL += ["<end_of_response>", "<|stop|>", "<|eot_id|>", "<|User|>", "<|Assistant|>"]


def policy_with(template: str, stops: Sequence[str] = ()) -> VisionLanguage:
    """A tiny Llama with a published template. `generate` stops at the ends of all of them."""
    tokenizer = tiny_vlms.tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny_vlms._text(len(tokenizer)))).eval()
    ends = ("</s>", "<end_of_turn>", "<|end|>", "<|eot_id|>")
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([*ends, *stops])
    return VisionLanguage(model, tokenizer, "tiny")


def encode(policy: VisionLanguage, **row: Any) -> dict[str, str]:
    """Prompt, chosen and rejected of a row as text."""
    full = {"id": "r0", "prompt": "describe", "chosen": "a red square", "rejected": "a blue", **row}
    encoded = policy.encode([full])[0]
    return {side: policy.encoder.tokenizer.decode(encoded[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")}


def message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("name", TEMPLATES)
def test_completion_ends_with_the_turn_of_the_template(name: str) -> None:
    """Mutations that it catches: the tokenizer's </s> as the end, text after the end, an end on a truncated response."""
    template, end = TEMPLATES[name]
    policy = policy_with(template, ["<|user|>"] if name == "glm" else [])
    texts = encode(policy, rejected_truncated=True)
    assert texts["chosen"].lstrip() == "a red square" + end and texts["rejected"].lstrip() == "a blue"
    encoded = policy.encode([{"id": "0", "prompt": "describe", "chosen": "a red square", "rejected": "a"}])[0]
    stops = policy.base_model.generation_config.eos_token_id
    assert [token in stops for token in encoded["chosen_ids"].tolist()].index(True) == len(encoded["chosen_ids"]) - 1


def test_end_token_of_the_template_stops_generation_too() -> None:
    """The generation config of a base model does not list the end of its template's turn."""
    policy = policy_with(TEMPLATES["gemma"][0])
    policy.base_model.generation_config.eos_token_id = 2
    policy = VisionLanguage(policy.model, policy.processor, "tiny")
    end = policy.encoder.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert policy.encoder.stops == [2, end]
    assert encode(policy)["chosen"] == "a red square<end_of_turn>"


@pytest.mark.parametrize(("name", "config_stop"), [("phi", "<|endoftext|>"), ("cohere", "<|eot_id|>")])
def test_end_of_the_turn_does_not_need_the_generation_config(name: str, config_stop: str) -> None:
    """Mutation that it catches: the later <|endoftext|> of Phi's template, because it alone is in the generation config."""
    template, end = TEMPLATES[name]
    policy = policy_with(template)
    policy.base_model.generation_config.eos_token_id = policy.processor.convert_tokens_to_ids(config_stop)
    policy = VisionLanguage(policy.model, policy.processor, "tiny")
    assert encode(policy)["chosen"] == "a red square" + end


def test_end_token_in_a_response_is_not_doubled() -> None:
    policy = policy_with(TEMPLATES["gemma"][0])
    texts = encode(
        policy, chosen="a red square<end_of_turn>\nuser", rejected="a blue<end_of_turn>", rejected_truncated=True
    )
    assert texts["chosen"] == "a red square<end_of_turn>" and texts["rejected"] == "a blue"


def test_thought_that_the_template_opens_is_not_opened_twice() -> None:
    policy = policy_with(TEMPLATES["reasoning"][0])
    texts = encode(policy, chosen="<think>\nit is red</think>a red square", rejected="<think>no</think>a")
    assert texts["prompt"].endswith("<think>\n")
    assert texts["chosen"] == "it is red</think>a red square</s>" and texts["rejected"] == "no</think>a</s>"


@pytest.mark.parametrize(
    ("opening", "response", "expected"),
    [
        ("<|A|><think>\n", "<think>\nit is", "it is"),
        ("<|A|><think>\n", "<think>it is", "it is"),
        ("[/INST][THINK]", "[THINK]it is", "it is"),
        ("<|A|>", "> it is", "> it is"),
        ("A: ", "A: it is", "A: it is"),
        ("Response", "e", "e"),
    ],
)
def test_only_a_repeated_tag_is_removed(opening: str, response: str, expected: str) -> None:
    """Mutation that it catches: any overlap is removed, so that a quotation loses its >."""
    assert without_repeated_opening(opening, response) == expected


@pytest.mark.parametrize("name", ["gemma", "llama-3", "no end"])
def test_prefill_is_continued_in_its_turn(name: str) -> None:
    template, end = TEMPLATES[name]
    prompt = [message("user", "describe"), message("assistant", "Sure, it is")]
    texts = encode(policy_with(template), prompt=prompt, chosen=" a red square", rejected=" a blue")
    assert texts["prompt"].endswith("Sure, it is") and texts["prompt"].count("Sure") == 1
    assert texts["chosen"] == " a red square" + end


def test_whole_conversations_are_cut_to_the_response() -> None:
    policy = policy_with(TEMPLATES["gemma"][0])
    whole = lambda text: [message("user", "describe"), message("assistant", text)]
    texts = encode(policy, chosen=whole("a red square"), rejected=whole("a blue"))
    assert (texts["chosen"], texts["rejected"]) == ("a red square<end_of_turn>", "a blue<end_of_turn>")


IMAGE_URL = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"chosen": [message("assistant", "a"), message("user", "b"), message("assistant", "c")]},
            "chosen: the response",
        ),
        (
            {"rejected": [message("user", "other"), message("assistant", "c")]},
            "rejected: the response has messages of user",
        ),
        ({"chosen": [message("assistant", [{"type": "image"}])]}, "chosen: the response contains an image"),
        ({"chosen": [message("assistant", None)]}, "chosen: a message has no content"),
        ({"chosen": [{**message("assistant", ""), "tool_calls": [{"name": "f"}]}]}, "chosen: a message calls tools"),
        (
            {"prompt": [message("user", [{"type": "video", "video": "a.mp4"}])]},
            "prompt: a part of a message has the type 'video'",
        ),
        ({"prompt": [message("user", [{"type": "input_audio"}])]}, "the type 'input_audio'"),
        ({"prompt": [message("user", IMAGE_URL)]}, "the type 'image_url'"),
        ({"prompt": [message("user", [{"type": "image", "url": "https://x"}])]}, "Images must be in the column images"),
        ({"chosen": [{**message("assistant", "a"), "reasoning_content": "so"}]}, "a message has reasoning_content"),
        ({"prompt": [{**message("user", "a"), "images": ["a.png"]}]}, "a message has images"),
        ({"prompt": [message("user", [{"type": "text", "text": None}])]}, "a text part of a message has no text"),
        ({"prompt": 7}, "prompt: 7 is neither text nor a list of messages"),
        ({"tools": "{"}, "tools is not JSON"),
    ],
)
def test_content_that_would_be_lost_is_refused(row: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"row r0: .*{error}|row r0: {error}"):
        encode(policy_with(TEMPLATES["gemma"][0]), **row)


def test_tools_of_a_row_reach_the_template() -> None:
    template = "{% if tools %}TOOLS {{ tools[0]['name'] }}\n{% endif %}" + TEMPLATES["gemma"][0]
    assert "TOOLS zoom" in encode(policy_with(template), tools='[{"name": "zoom"}]')["prompt"]
    assert "TOOLS" not in encode(policy_with(template))["prompt"]
    template = template.replace("tools[0]['name']", "tools | tojson")
    schemas = [{"name": "zoom", "strict": None, "parameters": [{"x": 1, "y": None}]}]
    assert (
        'TOOLS [{"name": "zoom", "parameters": [{"x": 1}]}]' in encode(policy_with(template), tools=schemas)["prompt"]
    )


def test_texts_in_other_spellings_are_read() -> None:
    policy = policy_with(TEMPLATES["gemma"][0])
    parts = ["de", {"type": "input_text", "text": "scr"}, {"type": "text", "text": "ibe"}]
    texts = encode(policy, prompt=[message("human", parts)], chosen=[message("gpt", "a red square")])
    assert texts == encode(policy)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "internvl"])
def test_image_token_in_a_response_is_refused(family: str) -> None:
    """Otherwise the number of image tokens is wrong, and a step fails without the name of the row."""
    policy = VisionLanguage(*tiny_vlms.build(family), "tiny")
    row = tiny_vlms.rows(family, (1,))[0]
    with pytest.raises(ValueError, match=rf"row {family}-0: chosen contains .*image token"):
        policy.encode([{**row, "chosen": f"a {tiny_vlms.PLACEHOLDERS[family]} square"}])


def test_placeholder_without_an_image_is_refused() -> None:
    """A text model reads `<image>` as text. For another model, the image is missing."""
    policy = VisionLanguage(*tiny_vlms.build("qwen2_5_vl"), "tiny")
    with pytest.raises(ValueError, match="row r0: 0 images for 1 placeholders"):
        encode(policy, prompt="<image>describe")
    assert "<image>describe" in encode(policy_with(TEMPLATES["gemma"][0]), prompt="<image>describe")["prompt"]


def test_image_placeholder_in_the_text_is_the_place_of_the_image() -> None:
    """Qwen's placeholder is another one, so `<image>` stayed in the text next to the image."""
    row = tiny_vlms.rows("qwen2_5_vl", (1,))[0]
    policy = VisionLanguage(*tiny_vlms.build("qwen2_5_vl"), "tiny")
    decode = lambda prompt: policy.encoder.tokenizer.decode(policy.encode([{**row, "prompt": prompt}])[0]["prompt_ids"])
    text = decode("a <image>\nsquare")
    assert "<image>" not in text and decode("<image>\na square") == decode("a square") != text
    with pytest.raises(ValueError, match="1 images for 2 placeholders"):
        decode("<image><image> a")
