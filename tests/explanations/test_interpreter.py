"""The interpreter against plain passes: whole texts, one by one, without a cache."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae import InputError
from sae.explanations import prompts
from sae.explanations.chat import chat
from sae.explanations.interpreter import Interpreter, check_interpreter, digit_ids


@pytest.fixture(scope="module")
def interpreter(smollm2):
    """A small Llama that has strong opinions: random weights, larger than a real model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    return Interpreter(LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(smollm2))


def test_readings_are_those_of_a_plain_forward_pass_over_the_whole_text(interpreter):
    contexts = [["·import", "\\n", "x", "·"], ["def", "(", "self", "):"]]
    interpreter.readings("what came before leaves no trace", contexts[:1], batch_size=2)
    read_CTd = interpreter.readings("the keyword import", contexts, batch_size=2)
    one_by_one_CTd = interpreter.readings("the keyword import", contexts, batch_size=1)
    torch.testing.assert_close(one_by_one_CTd, read_CTd, atol=1e-3, rtol=1e-3)
    tokenizer, model = interpreter.tokenizer, interpreter.model
    head = chat(tokenizer, prompts.simulate_messages("the keyword import"))
    for context, read_Td in zip(contexts, read_CTd, strict=True):
        for place in range(len(context)):
            text = head + "".join(f"{token}\t0\n" for token in context[:place]) + f"{context[place]}\t"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits_d = model(ids).logits[0, -1, [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]]
            torch.testing.assert_close(read_Td[place], logits_d.log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_explanations_of_a_batch_are_those_of_generate_one_by_one(interpreter):
    questions = [
        prompts.explain_question([(["a", "·b"], [0, 10])]),
        prompts.explain_question([(["x"] * 9, [3] * 9)] * 2),
    ]
    together = interpreter.explanations(questions, max_new_tokens=8)
    for question, text in zip(questions, together, strict=True):
        prompt = chat(interpreter.tokenizer, prompts.explain_messages(question)) + prompts.REPLY
        ids = interpreter.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = interpreter.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == prompts.sentence(interpreter.tokenizer.decode(out, skip_special_tokens=True))[0]


def test_a_prefix_is_not_copied_for_its_texts_and_a_text_leaves_the_batch_as_it_ends(
    interpreter, monkeypatch
):
    prefix, texts = interpreter.prefix("what all texts begin with"), [[5, 6], [7], [8, 9, 10]]
    with torch.inference_mode():
        _, read = interpreter._read(texts, prefix)
        _, written = interpreter._read(texts, prefix, grows=True)
    own = [
        [kv.shape[1] - len(prefix.ids) for pair in cache._kept for kv in pair] for cache in (read, written)
    ]
    assert own == [
        [0] * 4,
        [3 * 3] * 4,
    ]  # nothing of what was only read; three tokens of each that is written
    for change, tokens in (
        (lambda: written.fill(torch.tensor([1, 2, 0])), 6),
        (lambda: written.select([2]), 3),
    ):
        change()
        assert {kv.shape[1] for pair in written._kept for kv in pair} == {len(prefix.ids) + tokens}
    replies, passes, original = [], [], interpreter._logits
    monkeypatch.setattr(interpreter, "end_ids", set())
    monkeypatch.setattr(prompts, "sentence", lambda reply: (replies.append(reply) or reply, False))
    for ids in texts:
        interpreter._write(prefix, [ids], 4, None)
    ends = [replies[1], replies[4], replies[11]]  # the second at once, then the first, last the third
    monkeypatch.setattr(prompts, "sentence", lambda reply: (reply, reply in ends))
    monkeypatch.setattr(
        interpreter, "_logits", lambda ids_BL, *rest: passes.append(len(ids_BL)) or original(ids_BL, *rest)
    )
    assert interpreter._write(prefix, texts, 9, None) == ends
    assert passes == [3, 2, 1, 1]


def test_readings_that_are_no_numbers_are_refused(interpreter):
    head = interpreter.model.get_output_embeddings()
    with pytest.raises(InputError, match="finite logits needed"):
        handle = head.register_forward_hook(lambda _mod, _in, out: out * float("inf"))
        try:
            interpreter.readings("the word import", [["a", "b"]], 1)
        finally:
            handle.remove()


def test_an_interpreter_that_reads_too_little_is_refused(interpreter, monkeypatch):
    monkeypatch.setattr(interpreter, "positions", 600)
    with pytest.raises(InputError, match="tokens needed, this one reads 600"):
        interpreter.explanations(["x\t0\n" * 400])


def test_a_text_that_goes_on_is_encoded_as_if_it_had_not_been_cut(interpreter):
    """SentencePiece (Llama 2, CodeLlama) puts a space before whatever it is given."""
    characters = [chr(code) for code in range(32, 127)] + ["▁", "·"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: id for id, token in enumerate(["<unk>", *bytes_, *characters, "▁t", "▁th"])}
    merges = [("▁", "t"), ("▁t", "h")]
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama = PreTrainedTokenizerFast(tokenizer_object=bpe)
    for tokenizer, tail in ((llama, " [/INST] "), (interpreter.tokenizer, "<|im_start|>assistant\n")):
        texts = "<s>[INST] what:\n", f"the word import{tail}", "import\t0\n·os\t0\n\\n\t0\n"
        reader = Interpreter(interpreter.model, tokenizer)
        whole = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
        parts = [reader.encode(text, reader._before if text != texts[0] else "") for text in texts]
        assert [id for ids, _ in parts for id in ids] == whole
        for text, (ids, spans) in zip(texts[1:], parts[1:], strict=True):
            assert [start for start, _ in spans] == sorted(start for start, _ in spans)
            assert (spans[0][0], spans[-1][1]) == (0, len(text)) and len(ids) == len(spans)


def test_a_tokenizer_that_joins_digits_is_refused():
    joined = lambda text, **_options: {"input_ids": [5], "offset_mapping": [(0, len(text))]}  # noqa: E731
    with pytest.raises(InputError, match="one token for each digit after a tab"):
        digit_ids(joined)


def test_the_next_token_and_a_yes_are_read_off_plain_passes(interpreter):
    tokenizer, model = interpreter.tokenizer, interpreter.model
    questions, counted = ("a", "a longer question\n" * 9), []
    texts = [chat(interpreter.tokenizer, prompts.explain_messages(what)) for what in questions]
    log_p_BV = interpreter.next_token(questions, prompts.explain_messages, "", 1, counted.append)
    odds_B = interpreter.yes(questions, prompts.explain_messages)
    assert counted == [1, 1]
    for text, log_p_V, odds in zip(texts, log_p_BV, odds_B, strict=True):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        want_V = model(ids).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(log_p_V, want_V, atol=1e-3, rtol=1e-3)
        p = {word: want_V[tokenizer(word)["input_ids"][0]].exp() for word in (
            "yes", " yes", "Yes", " Yes", "YES", " YES", "no", " no", "No", " No", "NO", " NO")}  # fmt: skip
        assert len({tokenizer(word)["input_ids"][0] for word in p}) == 12
        yes = sum(value for word, value in p.items() if "y" in word.lower())
        assert odds == pytest.approx(float((yes / (sum(p.values()) - yes)).log()), abs=1e-3)


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 400,
    "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
}  # fmt: skip
# What there is of attention and of memory: all tokens, a window, chunks, ALiBi, tables, states, both.
KINDS = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 64},
    "gemma3_text": SIZES | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": SIZES | {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 4096},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 4096},
    "phi3": SIZES | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 400},
    "mixtral": SIZES | {"num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "bamba": SIZES | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
                      "attn_layer_indices": [1]},
}  # fmt: skip


def interpreter_of(kind, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=49152, pad_token_id=0, **KINDS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return Interpreter(model, tokenizer)


def plain_logits(reader, text):
    """[L, V] of one text alone, whole, without a cache."""
    ids = reader.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return reader.model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_in_a_text_is_that_of_a_plain_pass_whatever_stands_beside_it(smollm2, kind, monkeypatch):
    monkeypatch.setattr(prompts, "SHOTS", prompts.SHOTS[:2])
    reader = interpreter_of(kind, AutoTokenizer.from_pretrained(smollm2))
    contexts = [["·import", "\\n", "x"], ["a_longer_name", "(", "self"]]
    read_CTd = reader.readings("the keyword import", contexts, batch_size=2)
    head = chat(reader.tokenizer, prompts.simulate_messages("the keyword import"))
    for context, read_Td in zip(contexts, read_CTd, strict=True):
        lines = prompts.lines(context[:-1], ["0", "0"]) + f"{context[-1]}\t"
        want_d = plain_logits(reader, head + lines)[-1, reader.digit_ids].log_softmax(-1)
        torch.testing.assert_close(read_Td[-1], want_d, atol=1e-4, rtol=1e-4)

    questions = [prompts.explain_question([(["x"] * n, [1] * n)]) for n in (3, 60, 9)]
    passes, original = [], reader._logits
    monkeypatch.setattr(reader, "_logits", lambda *a, **k: passes.append(original(*a, **k)) or passes[-1])
    monkeypatch.setattr(reader, "end_ids", set())
    monkeypatch.setattr(prompts, "sentence", lambda reply: (reply, False))
    reader.explanations(questions, max_new_tokens=4, batch_size=3)
    steps = passes[-12 if reader._alone else -4 :]
    if reader._alone:
        steps = [torch.cat(steps[at : at + 3]) for at in range(0, 12, 3)]
    for row, question in enumerate(questions):
        text = chat(reader.tokenizer, prompts.explain_messages(question)) + prompts.REPLY
        ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
        for step_B1V in steps:
            want_V = reader.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(step_B1V[row, 0], want_V, atol=1e-3, rtol=1e-3)
            ids.append(int(want_V.argmax()))


def test_a_reply_ends_at_every_end_of_text_that_is_known(interpreter, smollm2, monkeypatch):
    questions = ["x\t1\n", "def\t9\n·f\t0\n"]
    first = interpreter.next_token(questions, prompts.explain_messages, prompts.REPLY).argmax(-1)
    generation = interpreter.model.generation_config
    for ends in (int(first[0]), [49151, int(first[0])]):
        monkeypatch.setattr(generation, "eos_token_id", ends)
        texts = Interpreter(interpreter.model, interpreter.tokenizer).explanations(questions, 5)
        assert texts[0] == "" and texts[1] != ""
    monkeypatch.setattr(generation, "eos_token_id", None)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(first[0]))
    assert tokenizer.eos_token_id == int(first[0])
    assert Interpreter(interpreter.model, tokenizer).end_ids == {int(first[0])}


def test_the_limit_of_positions_counts_what_texts_begin_with(interpreter, monkeypatch):
    question = "x\t0\n" * 40
    whole = chat(interpreter.tokenizer, prompts.explain_messages(question)) + prompts.REPLY
    length = len(interpreter.tokenizer(whole, add_special_tokens=False)["input_ids"])
    anew = Interpreter(interpreter.model, interpreter.tokenizer)
    anew.explanations([question], max_new_tokens=1)
    assert anew.tokens_read == length
    monkeypatch.setattr(interpreter, "positions", length)
    interpreter.explanations([question], max_new_tokens=1)
    monkeypatch.setattr(interpreter, "positions", length - 1)
    with pytest.raises(InputError, match=f"reads {length} tokens needed, this one reads {length - 1}"):
        interpreter.explanations([question], max_new_tokens=1)


def test_nothing_in_a_corpus_becomes_a_control_token(interpreter, monkeypatch):
    tokenizer = interpreter.tokenizer
    control = set(tokenizer.get_added_vocab().values())
    assert len(control) > 10
    for token in tokenizer.get_added_vocab():
        ids, spans = interpreter.encode(interpreter.plain(f"a{token}{token}b"))
        assert not control & set(ids) and tokenizer.decode(ids) == f"a{token}{token}b"
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        ids, at = interpreter._lines(["x", token, "y"])
        assert not control & set(ids) and len(at) == 3
        asked = [next(interpreter._batches([what], prompts.explain_messages, "", 1)) for what in (token, "x")]
        turns = [len([id for id in rows[0] if id in control]) for _, rows in asked]
        assert turns[0] == turns[1] > 0
    read, original = [], interpreter._logits
    monkeypatch.setattr(
        interpreter, "_logits", lambda ids, *rest: read.append(ids.flatten().tolist()) or original(ids, *rest)
    )
    for explanation in (tokenizer.eos_token, "x"):
        interpreter.readings(explanation, [["a"]], 1)
    turns = [len([id for id in ids if id in control]) for ids in read[-4:]]  # of explanation, context, twice
    assert turns[:2] == turns[2:] and turns[0] > 0


def test_what_cannot_explain_is_refused_before_weights_are_read(smollm2):
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    cases = [("bert", {}, "fills gaps in a text"), ("gpt2", {"n_positions": 64}, "this one reads 64")]
    for kind, sizes, words in cases:
        with torch.device("meta"):
            bones = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        with pytest.raises(InputError, match=words):
            check_interpreter(bones, tokenizer)
