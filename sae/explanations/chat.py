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
    added = {token for token in tokenizer.get_added_vocab() if len(token) > 1 and token.strip()}
    if not added:
        return text.replace(CUT, "")
    control = re.compile("|".join(map(re.escape, added)))
    parts, rest = [], text.replace(CUT, "")
    while found := control.search(rest):
        parts.append(rest[: found.start() + 1])
        rest = rest[found.start() + 1 :]
    return CUT.join([*parts, rest])


def chat(tokenizer, messages):
    """The messages (system, user and assistant in turn) as text, ready for the reply.

    A template that refuses or drops the system text gets it at the head of the first user turn; one that
    knows no turns gets everything in a single one; content is given as parts where text does not arrive.
    Raises InputError where nothing brings all of it into the text.
    """
    system, first, *rest = messages
    merged = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    single = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    template = None if tokenizer.chat_template else LLAMA_TEMPLATE
    reason = "it leaves out some of the text"
    for turns in (messages, merged, single):
        for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
            given = [turn | {"content": content(turn["content"])} for turn in turns]
            try:
                text = tokenizer.apply_chat_template(
                    given, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception as err:  # a template is a program: it can fail in any way
                reason = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
                continue
            if all(message["content"].strip() in text for message in messages):
                return text
    raise InputError(
        f"a chat template needed that writes what it is given, this interpreter's fails: {reason}"
    )


def split_chat(tokenizer, messages_about):
    """The text before and after what `messages_about(what)` puts last: (same for every `what`, the rest).

    A reply begins after white space, as those of the few-shot part do.
    """
    head, _, tail = chat(tokenizer, messages_about(_MARK)).rpartition(_MARK)
    return head, tail if tail[-1:].isspace() else f"{tail} "
