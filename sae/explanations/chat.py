"""Chat messages as the text that a model continues, whatever its template makes of system texts and turns.

What comes from a corpus passes through `plain`: none of it becomes a control token of the interpreter.
"""

import re

from sae import InputError

# What Llama 2 and CodeLlama were trained on, for tokenizers that bring no template of their own.
LLAMA_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m.content | trim }}"
    "\n<</SYS>>\n\n{% elif m.role == 'user' %}{% if loop.index0 != 1 or messages[0].role != 'system' %}"
    "{{ bos_token }}[INST] {% endif %}{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
CUT = "\x00"  # the texts before and after it are encoded apart
_MARK = "\ue000what\ue000"  # no template changes characters of the private use area


def plain(tokenizer, text):
    """A text of a corpus with a CUT inside whatever reads like one of the tokenizer's added tokens."""
    added = [re.escape(token) for token in tokenizer.get_added_vocab() if len(token) > 1 and token.strip()]
    text = text.replace(CUT, "")
    # One may begin within another: each is cut behind its first character.
    return re.sub(f"(?={'|'.join(added)})(.)", f"\\1{CUT}", text, flags=re.DOTALL) if added else text


def chat(tokenizer, messages):
    """The messages (system, user and assistant in turn) as text, ready for the reply.

    A template that refuses or drops the system text gets it at the head of the first user turn; one that
    knows no turns gets everything in a single one; content is given as parts where text does not arrive.
    Raises InputError where nothing brings all of it into the text.
    """
    system, first, *rest = messages
    merged = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    single = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    options = {"tokenize": False, "add_generation_prompt": True}
    if not tokenizer.chat_template:
        options["chat_template"] = LLAMA_TEMPLATE
    reason = "it leaves out some of the text"
    for turns in (messages, merged, single):
        in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for given in (turns, in_parts):
            try:
                text = tokenizer.apply_chat_template(given, **options)
            except Exception as err:  # a template is a program: it can fail in any way
                reason = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
                continue
            if all(message["content"].strip() in text for message in messages):
                return text
    needed = "a chat template needed that writes what it is given"
    raise InputError(f"{needed}, this interpreter's fails: {reason}")


def split_chat(tokenizer, messages_about):
    """The text before and after what `messages_about(what)` puts last: (same for every `what`, the rest).

    A reply begins after white space, as those of the few-shot part do.
    """
    head, _, tail = chat(tokenizer, messages_about(_MARK)).rpartition(_MARK)
    return head, tail if tail[-1:].isspace() else f"{tail} "
