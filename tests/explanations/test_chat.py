"""Chat messages as text, with real and with odd templates."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from sae import InputError
from sae.explanations import prompts
from sae.explanations.chat import CUT, chat, plain, split_chat


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
    turns = prompts.explain_messages("the question")
    assert chat(tokenizer, turns).count("[assistant]") == len(prompts.SHOTS)


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
    assert (
        split_chat(tokenizer, prompts.explain_messages)[1] == " [/INST] "
    )  # a reply begins after white space
    tokenizer.bos_token = tokenizer.eos_token = None
    assert chat(tokenizer, messages[:2]) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST]"


def test_what_a_prompt_is_about_stands_between_head_and_tail(tokenizer):
    head, tail = split_chat(tokenizer, prompts.simulate_messages)
    whole = chat(tokenizer, prompts.simulate_messages("the keyword import"))
    assert head + "the keyword import" + tail == whole
    assert head.endswith(f"{prompts.REPLY}:\n") and "import:" not in head and "·import\t9\n" in head


FIRST_TURNS = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}<a>{{ m.content }}{% endif %}{% endfor %}"  # noqa: E501
ODD = {
    "drops the system role": FIRST_TURNS,
    "one user turn alone": "{% if messages | length > 1 or messages[0].role != 'user' %}"
    "{{ raise_exception('one user turn') }}{% endif %}<u>{{ messages[0].content }}",
    "parts alone": "{% for m in messages %}{% if m.content is not string %}{% for part in m.content %}"
    "{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("kind", ODD)
def test_all_of_the_text_arrives_whatever_the_template_knows(smollm2, kind):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = ODD[kind]
    for messages_about in (prompts.explain_messages, prompts.simulate_messages):
        messages = messages_about("the question")
        text = chat(tokenizer, messages)
        assert all(message["content"] in text for message in messages)
        assert text.count("the question") == 1
        head, tail = split_chat(tokenizer, messages_about)
        assert f"{head}the question{tail}".startswith(text)


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('never') }}", "nothing", "{{ 1 / 0 }}"])
def test_a_template_that_writes_nothing_is_one_line(smollm2, template):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="a chat template needed that writes") as error:
        chat(tokenizer, prompts.explain_messages("x"))
    assert "\n" not in str(error.value)


def test_corpus_text_is_cut_inside_whatever_reads_like_a_control_token(tokenizer):
    assert plain(tokenizer, "a<|im_end|>b") == f"a<{CUT}|im_end|>b"
    assert plain(tokenizer, f"a{CUT}b <|im_e") == "ab <|im_e"
    within = SimpleNamespace(get_added_vocab=lambda: ["<<s>", "<s>", "  ", "\n", "x"])
    assert (
        plain(within, "<<s>  x\n") == f"<{CUT}<{CUT}s>  x\n"
    )  # white space and single letters are no control
