"""The interpreter: an LLM that writes explanations, and whose digit probabilities are the simulations.

Dims: B texts, L tokens of the interpreter, T scored positions of a context, V its vocabulary.
"""

import copy
from typing import NamedTuple

import torch

from sae import InputError
from sae.explanations import prompts


class Prefix(NamedTuple):
    """A text that many prompts begin with: its keys and values, computed once."""

    cache: object
    length: int  # in the interpreter's tokens

    def repeated(self, times):
        """A cache of its own for `times` texts: what a forward pass adds does not reach this prefix."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        if times > 1:
            cache.batch_repeat_interleave(times)
        return cache


class Interpreter:
    """`model`: any causal LM of transformers, DeepSpeed's shards of one too; `tokenizer` is its own.

    `earlier`: what stands for the activations of earlier tokens while a later one is read off.
    """

    earlier = "0"

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.head = model.get_output_embeddings()
        self.digit_ids = digit_ids(tokenizer)
        self.end_ids = _end_ids(model, tokenizer)
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # SentencePiece puts a space before whatever it is given: not so where a text goes on.
        marked = tokenizer.tokenize("a")[0].startswith("▁")
        self._before = "\n" if marked else ""
        head, self.explain_tail = prompts.split_chat(tokenizer, prompts.explain_messages)
        self.explain_prefix = self.prefix(head)
        head, self.simulate_tail = prompts.split_chat(tokenizer, prompts.simulate_messages)
        self.simulate_prefix = self.prefix(head)

    @torch.inference_mode()
    def prefix(self, text, after=None):
        """The Prefix of `text`, or of the Prefix `after` followed by `text`."""
        from transformers import DynamicCache

        cache = after.repeated(1) if after else DynamicCache(config=self.model.config)
        ids_BL = torch.tensor([self.encode(text, "" if after is None else self._before)[0]])
        self._logits(ids_BL, cache, torch.tensor([[0]]))
        return Prefix(cache, (after.length if after else 0) + ids_BL.shape[1])

    @torch.inference_mode()
    def explanations(self, questions, max_new_tokens=60):
        """One sentence per question (texts of prompts.explain_question), written greedily, all at once."""
        # The model goes on after the words that begin every reply, so it cannot begin with pleasantries.
        tail = f"{self.explain_tail}{prompts.REPLY}"
        encoded = [self.encode(question + tail, self._before)[0] for question in questions]
        length = max(map(len, encoded))
        ids_BL = torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded])
        start_B = torch.tensor([length - len(ids) for ids in encoded])
        mask_BL = (torch.arange(length) >= start_B[:, None]).long()
        mask_BL = torch.cat([mask_BL.new_ones(len(encoded), self.explain_prefix.length), mask_BL], 1)
        positions_BL = (mask_BL.cumsum(1) - 1)[:, self.explain_prefix.length :]
        cache = self.explain_prefix.repeated(len(encoded))
        replies, texts, done = [[] for _ in encoded], [""] * len(encoded), [False] * len(encoded)
        for _ in range(max_new_tokens):
            last_B1 = torch.full((len(encoded), 1), ids_BL.shape[1] - 1)
            next_B = self._logits(ids_BL, cache, last_B1, mask_BL, positions_BL)[:, 0].argmax(-1).cpu()
            for row, id in enumerate(next_B.tolist()):
                if not done[row] and id not in self.end_ids:
                    replies[row].append(id)
                    texts[row], done[row] = prompts.sentence(self.tokenizer.decode(replies[row]))
                else:
                    done[row] = True
            if all(done):
                break
            ids_BL, positions_BL = next_B[:, None], positions_BL[:, -1:] + 1
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(encoded), 1)], 1)
        return texts

    @torch.inference_mode()
    def readings(self, explanation, contexts, batch_size):
        """log p of each digit after each token of `contexts`, given `explanation`: [C, T, 10] float32, cpu.

        `contexts`: C lists of T visible tokens. One forward pass reads them all; the earlier tokens' numbers
        are written as 0, so nothing has to be generated.
        """
        prefix = self.prefix(explanation + self.simulate_tail, self.simulate_prefix)
        parts = []
        for start in range(0, len(contexts), batch_size):
            encoded = [self._lines(tokens) for tokens in contexts[start : start + batch_size]]
            length = max(len(ids) for ids, _ in encoded)
            # Padding stands behind the text, where a causal model does not see it.
            ids_BL = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in encoded])
            at_BT = torch.tensor([before for _, before in encoded])
            logits_BTV = self._logits(ids_BL, prefix.repeated(len(encoded)), at_BT)
            parts.append(logits_BTV[..., self.digit_ids].float().log_softmax(-1).cpu())
            if not parts[-1].isfinite().all():
                raise InputError("finite logits needed, the interpreter gave others: try --dtype bfloat16")
        return torch.cat(parts)

    def encode(self, text, before=""):
        """(ids, spans in the text) of a text that stands behind `before`."""
        coded = self.tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        skip = len(before)
        pairs = [(id, (start - skip, end - skip)) for id, (start, end) in pairs if not skip or end > skip]
        return [id for id, _ in pairs], [span for _, span in pairs]

    def _lines(self, tokens):
        """Ids of `token<tab>0` lines, and for each line the position whose logits predict its number."""
        text = prompts.lines(tokens, [self.earlier] * len(tokens))
        ids, spans = self.encode(text, self._before)
        starts = {start: place for place, (start, end) in enumerate(spans) if end > start}
        ends, at = [], 0
        for token in tokens:
            ends.append(at + len(token) + 1)
            at = ends[-1] + len(self.earlier) + 1
        missing = [place for place in ends if place not in starts]
        if missing:
            raise InputError("an interpreter whose tokenizer keeps digits apart needed, this one joins them")
        return ids, [starts[place] - 1 for place in ends]

    def _logits(self, ids_BL, cache, at_BT, mask_BL=None, positions_BL=None):
        """Logits [B, T, V] at the positions `at_BT` alone; `cache` grows by the L tokens."""
        length = cache.get_seq_length() + ids_BL.shape[1]
        if self.positions and length > self.positions:
            raise InputError(
                f"an interpreter that reads {length} tokens needed, this one reads {self.positions}: fewer "
                "--num_interpretation_samples or shorter contexts may fit"
            )
        at_BT = at_BT.to(self.device)

        def select(_head, inputs):
            hidden_BLD = inputs[0]
            return hidden_BLD.gather(1, at_BT[..., None].expand(-1, -1, hidden_BLD.shape[-1])), *inputs[1:]

        handle = self.head.register_forward_pre_hook(select)
        try:
            return self.model(
                input_ids=ids_BL.to(self.device),
                attention_mask=None if mask_BL is None else mask_BL.to(self.device),
                position_ids=None if positions_BL is None else positions_BL.to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
        finally:
            handle.remove()


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


def _end_ids(model, tokenizer):
    """Ids that end a reply: the tokenizer's end of text and those of the model's generation settings."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
