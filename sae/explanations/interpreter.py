"""The interpreter: an LLM that writes explanations, and whose probabilities are the simulations.

Dims: B texts, L tokens of the interpreter, S tokens with those before, T positions read, V its vocabulary.

What is read in a text does not depend on the texts beside it: the filling that makes them equally long stands
behind a text or before the beginning that all share, never in between, and no attention looks at it.
"""

import inspect
import re
from typing import NamedTuple

import torch

from sae import InputError
from sae.explanations import prompts
from sae.explanations.chat import CUT, plain, split_chat

MOST_PREFIXES = 8  # whose keys and values are kept


class Prefix(NamedTuple):
    """Ids that many texts begin with; each layer's keys and values, computed once, if the model has such."""

    ids: list[int]
    layers: list | None


class Interpreter:
    """`model`: any causal LM of transformers, a process's share of one too; `tokenizer` is its own."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.head = model.get_output_embeddings()
        self.digit_ids = digit_ids(tokenizer)
        # A reply ends at the tokenizer's end of text and at those of the model's generation settings.
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._alone = _rotates_by_length(model.config)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        # In Bloom and MPT distances alone matter (ALiBi).
        placed = self._takes_positions or model.config.model_type in ("bloom", "mpt")
        self._cached = placed and not self._alone and _keeps_keys_and_values(model)
        # SentencePiece puts a space before whatever it is given: not so where a text goes on.
        self._before = "\n" if tokenizer.tokenize("a")[0][0] in "▁Ġ" else ""
        self._prefixes, self.tokens_read = {}, 0

    def plain(self, text):
        """The text, none of which becomes a control token once it is encoded."""
        return plain(self.tokenizer, text)

    @torch.inference_mode()
    def prefix(self, text, after=None):
        """The Prefix of `text`, or of the Prefix `after` followed by `text`."""
        from transformers import DynamicCache

        before, layers = after or Prefix([], None), None
        ids = self.encode(text, self._before if after else "")[0]
        if self._cached:
            # Without the config it keeps all keys: a window's would be cut to those that the last token sees.
            cache = DynamicCache(before.layers)
            self._logits(torch.tensor([ids]), torch.tensor([[0]]), cache)
            layers = [(layer.keys, layer.values) for layer in cache.layers]
        return Prefix(before.ids + ids, layers)

    def explanations(self, questions, max_new_tokens=60, messages_about=None, batch_size=16, progress=None):
        """One sentence for each question, written greedily after the words that begin every reply: [str].

        `messages_about(question)`: chat messages that end with the question, by default one about lines.
        `progress(n)` is called whenever n more have been written.
        """
        texts, messages_about = [], messages_about or prompts.explain_messages
        for prefix, rows in self._batches(questions, messages_about, prompts.REPLY, batch_size):
            texts += self._write(prefix, rows, max_new_tokens, progress)
        return texts

    @torch.inference_mode()
    def _write(self, prefix, rows, max_new_tokens, progress):
        """The sentences that go on from `rows` of ids after `prefix`; a row leaves the batch as it ends."""
        texts, replies, alive = [""] * len(rows), [[] for _ in rows], list(range(len(rows)))
        logits_B1V, cache = self._read(rows, prefix, grows=True)
        if cache is not None:
            cache.fill(max(map(len, rows)) - torch.tensor([len(ids) for ids in rows]))
        while True:
            keep = []
            for place, id in enumerate(logits_B1V[:, 0].argmax(-1).tolist()):
                row, ended = alive[place], True
                if id not in self.end_ids:
                    replies[row].append(id)
                    texts[row], ended = prompts.sentence(self.tokenizer.decode(replies[row]))
                if not ended and len(replies[row]) < max_new_tokens:
                    keep.append(place)
                elif progress:
                    progress(1)
            alive = [alive[place] for place in keep]
            if not alive:
                return texts
            if cache is None:
                logits_B1V, _ = self._read([rows[row] + replies[row] for row in alive], prefix)
                continue
            if len(keep) < len(cache.fill_B):
                cache.select(keep)
            ids_B1 = torch.tensor([replies[row][-1:] for row in alive])
            logits_B1V = self._logits(ids_B1, torch.zeros_like(ids_B1), cache)

    @torch.inference_mode()
    def readings(self, explanation, contexts, batch_size, progress=None):
        """log p of each digit after each token of `contexts`, given `explanation`: [C, T, 10] float32, cpu.

        `contexts`: C lists of T visible tokens. One forward pass reads them all; the earlier tokens' numbers
        are written as 0, so nothing has to be generated.
        """
        head, tail = self._chat_prefix(prompts.simulate_messages)
        prefix = self.prefix(self.plain(explanation) + tail, head)
        parts = []
        for start in range(0, len(contexts), batch_size):
            rows, at = zip(*map(self._lines, contexts[start : start + batch_size]), strict=True)
            logits_BTV, _ = self._read(rows, prefix, at)
            parts.append(_log_p(logits_BTV[..., self.digit_ids]))
            if progress:
                progress(len(rows))
        return torch.cat(parts)

    @torch.inference_mode()
    def next_token(self, questions, messages_about, begin="", batch_size=16, progress=None):
        """log p of what comes next in a reply that begins with `begin`: [B, V] float32, cpu.

        `messages_about(question)`: chat messages that end with the question.
        """
        parts = []
        for prefix, rows in self._batches(questions, messages_about, begin, batch_size):
            parts.append(_log_p(self._read(rows, prefix)[0][:, 0]))
            if progress:
                progress(len(rows))
        return torch.cat(parts)

    def yes(self, questions, messages_about, batch_size=16, progress=None):
        """Log odds of yes over no as a reply's beginning, read as `next_token` does: [B] float32, cpu."""
        odds = []
        for word in ("yes", "no"):
            spelt = (space + form for space in ("", " ") for form in (word, word.title(), word.upper()))
            odds.append(sorted({self.encode(each, self._before)[0][0] for each in spelt}))
        log_p_BV = self.next_token(questions, messages_about, "", batch_size, progress)
        return log_p_BV[:, odds[0]].logsumexp(-1) - log_p_BV[:, odds[1]].logsumexp(-1)

    def encode(self, text, before=""):
        """(ids, spans in the text) of a text that stands behind `before`; each CUT is left out."""
        ids, spans, at = [], [], 0
        for piece in text.split(CUT):
            coded = self.tokenizer(before + piece, add_special_tokens=False, return_offsets_mapping=True)
            skip = len(before)
            for id, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
                if not skip or end > skip:
                    ids.append(id)
                    spans.append((at + start - skip, at + end - skip))
            at, before = at + len(piece), self._before
        return ids, spans

    def _batches(self, questions, messages_about, begin, batch_size):
        """(Prefix, rows of ids after it) of chats that end with the questions and the `begin` of a reply."""
        prefix, tail = self._chat_prefix(messages_about)
        for start in range(0, len(questions), batch_size):
            texts = [self.plain(each) + tail + begin for each in questions[start : start + batch_size]]
            yield prefix, [self.encode(text, self._before)[0] for text in texts]

    def _chat_prefix(self, messages_about):
        """(Prefix of what comes before the question, the text after it) of such chats."""
        head, tail = split_chat(self.tokenizer, messages_about)
        if head not in self._prefixes:
            if len(self._prefixes) == MOST_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            self._prefixes[head] = self.prefix(head)
        return self._prefixes[head], tail

    def _lines(self, tokens):
        """Ids of `token<tab>0` lines, and for each line the position whose logits predict its number."""
        text = prompts.lines(tokens, ["0"] * len(tokens))
        ids, spans = self.encode(self.plain(text), self._before)
        starts = {start: place for place, (start, end) in enumerate(spans) if end > start}
        ends, at = [], 0
        for token in tokens:
            ends.append(at + len(token) + 1)
            at = ends[-1] + len("0\n")
        if any(place not in starts for place in ends):
            raise InputError("an interpreter whose tokenizer keeps digits apart needed, this one joins them")
        return ids, [starts[place] - 1 for place in ends]

    def _read(self, rows, prefix, at=None, grows=False):
        """Logits [B, T, V] at the places `at` (the last) of rows of ids that follow `prefix`; and the cache.

        Of what it read the cache holds something only where it `grows`.
        """
        from sae.explanations.sharing import Shared

        at = at or [[len(ids) - 1] for ids in rows]
        if self._alone and len(rows) > 1:
            each = zip(rows, at, strict=True)
            return torch.cat([self._read([ids], prefix, [places])[0] for ids, places in each]), None
        cache, skip = None, 0
        if prefix.layers:
            cache = Shared(prefix.layers, grows)
        else:
            rows, skip = [prefix.ids + ids for ids in rows], len(prefix.ids)
        length = max(map(len, rows))
        # Filling stands behind a text, where a causal model does not see it.
        ids_BL = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
        return self._logits(ids_BL, torch.tensor(at) + skip, cache), cache

    def _logits(self, ids_BL, at_BT, cache=None):
        """Logits at the positions `at_BT` alone, of tokens after those of the `cache`."""
        length = (0 if cache is None else cache.get_seq_length()) + ids_BL.shape[1]
        if self.positions and length > self.positions:
            raise InputError(
                f"an interpreter that reads {length} tokens needed, this one reads {self.positions}: fewer "
                "--num_interpretation_samples or shorter contexts may fit"
            )
        inputs = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        if (fill_B := getattr(cache, "fill_B", None)) is not None:
            seen_BS = (torch.arange(length, device=self.device) >= fill_B[:, None]).long()
            inputs["attention_mask"] = seen_BS
            if self._takes_positions:
                inputs["position_ids"] = (seen_BS.cumsum(1) - 1)[:, -ids_BL.shape[1] :]
        at_BT, self.tokens_read = at_BT.to(self.device), self.tokens_read + ids_BL.numel()

        def select(_head, inputs):
            hidden_BLD = inputs[0]
            return hidden_BLD.gather(1, at_BT[..., None].expand(-1, -1, hidden_BLD.shape[-1])), *inputs[1:]

        handle = self.head.register_forward_pre_hook(select)
        try:
            return self.model(input_ids=ids_BL.to(self.device), **inputs).logits
        finally:
            handle.remove()


def _log_p(logits):
    log_p = logits.float().log_softmax(-1).cpu()
    if not log_p.isfinite().all():
        raise InputError("finite logits needed, the interpreter gave others: try --dtype bfloat16")
    return log_p


def _keeps_keys_and_values(model):
    """Whether all that later tokens need of earlier ones is keys and values, one of each for every token."""
    from transformers import DynamicCache

    from sae.explanations.sharing import Shared

    if getattr(model, "_is_stateful", False):
        return False
    cache = DynamicCache()
    try:
        for _ in range(2):
            token = torch.ones(1, 1, dtype=torch.long, device=model.device)
            model(input_ids=token, past_key_values=cache, use_cache=True)
        model(input_ids=token, past_key_values=Shared([(of.keys, of.values) for of in cache.layers], True))
        return {layer.keys.shape[2] for layer in cache.layers} == {2}
    except Exception:  # each model without such a cache fails in its own way
        return False


def _rotates_by_length(config):
    """Whether positions are turned by an angle that depends on how long the (longest) text is."""
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))
    return re.search(r"'(dynamic|longrope)'", rope) is not None


def check_interpreter(model, tokenizer):
    """Refuse, before weights are read, what cannot explain; `model` may be a `models.skeleton`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config.get_text_config()
    fills_gaps = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills_gaps and getattr(config, "is_decoder", None) is False:
        raise InputError(f"an interpreter that writes needed, a {config.model_type} fills gaps in a text")
    digit_ids(tokenizer)
    most = getattr(config, "max_position_embeddings", None)
    for messages_about in (prompts.explain_messages, prompts.simulate_messages):
        head, _ = split_chat(tokenizer, messages_about)
        length = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        if most and length > most:
            needed = f"an interpreter that reads {length} tokens and more needed"
            raise InputError(f"{needed}, this one reads {most}")


def digit_ids(tokenizer):
    """The ids of "0" to "9" after a tab. Raises InputError unless each is one token there, and its own."""
    ids = []
    for digit in range(10):
        coded = tokenizer(f"x\t{digit}\n", add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        ids += [id for id, span in tokens if span == (2, 3)][:1]
    if len(set(ids)) != 10:
        raise InputError(
            "an interpreter needed whose tokenizer has one token for each digit after a tab, "
            f"this one has {len(set(ids))} such tokens"
        )
    return ids
