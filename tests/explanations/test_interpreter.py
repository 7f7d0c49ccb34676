"""The interpreter against plain passes: whole texts, one by one, without a cache."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae import InputError
from sae.explanations import prompts
from sae.explanations.chat import chat
from sae.explanations.interpreter import Interpreter, digit_ids


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
    texts = [interpreter.chat(prompts.explain_messages(what)) for what in ("a", "a longer question\n" * 9)]
    counted = []
    log_p_BV = interpreter.next_token(texts, batch_size=2, progress=counted.append)
    odds_B = interpreter.yes(texts)
    assert counted == [2]
    for text, log_p_V, odds in zip(texts, log_p_BV, odds_B, strict=True):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        want_V = model(ids).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(log_p_V, want_V, atol=1e-3, rtol=1e-3)
        p = {word: want_V[tokenizer(word)["input_ids"][0]].exp() for word in (
            "yes", " yes", "Yes", " Yes", "YES", " YES", "no", " no", "No", " No", "NO", " NO")}  # fmt: skip
        assert len({tokenizer(word)["input_ids"][0] for word in p}) == 12
        yes = sum(value for word, value in p.items() if "y" in word.lower())
        assert odds == pytest.approx(float((yes / (sum(p.values()) - yes)).log()), abs=1e-3)
