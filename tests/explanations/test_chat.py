"""Chat messages as text, with real and with odd templates."""

import pytest
from transformers import AutoTokenizer

from sae.explanations import prompts
from sae.explanations.chat import chat, split_chat


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_the_chat_template_of_the_interpreter_is_used(tokenizer):
    text = chat(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_a_system_role_gets_it_in_the_first_turn(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    text = chat(tokenizer, [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert text == "[user]S\n\nU"


def test_without_a_template_the_llama_form_is_used(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = None
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
    ]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert chat(tokenizer, messages) == (
        f"{bos}[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 {eos}{bos}[INST] U2 [/INST]"
    )
    tokenizer.bos_token = tokenizer.eos_token = None
    assert chat(tokenizer, messages[:2]) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST]"


def test_what_a_prompt_is_about_stands_between_head_and_tail(tokenizer):
    head, tail = split_chat(tokenizer, prompts.simulate_messages)
    whole = chat(tokenizer, prompts.simulate_messages("the keyword import"))
    assert head + "the keyword import" + tail == whole
    assert head.endswith(f"{prompts.REPLY}:\n") and "import:" not in head and "·import\t9\n" in head
