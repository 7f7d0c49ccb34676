"""Print the features that fire most exclusively on one keyword of Python: what the demo explains.

    python experiments/keyword_features.py samples.pt tokens 24

For each feature of the samples, its activation in the kept contexts is added up per distinct token; printed
are the numbers of those whose strongest token is a keyword or a builtin, by that token's share.
"""

import builtins
import keyword
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sae.samples import load_samples
from sae.tokens import load_tokenizer, open_dataset

WORDS = {*keyword.kwlist, *dir(builtins), "self"}


def main(samples_path, dataset_path, count):
    samples = load_samples(samples_path)
    dataset, info = open_dataset(dataset_path)
    tokenizer = load_tokenizer(dataset_path, info)
    ids = torch.as_tensor(dataset.with_format("numpy", columns=["input_ids"])[:]["input_ids"])
    words = [tokenizer.decode([id]).strip() for id in range(len(tokenizer))]
    number = {word: place for place, word in enumerate(dict.fromkeys(words))}
    word_of_id = torch.tensor([number[word] for word in words])
    found = []
    for f, dim in enumerate(samples.features.tolist()):
        there = samples.rows[f] >= 0
        in_words = word_of_id[ids[samples.rows[f][there], : samples.activations.shape[2]].long()]
        per_word = torch.zeros(len(number)).index_add_(
            0, in_words.flatten(), samples.activations[f][there].float().flatten()
        )
        best = per_word.argmax().item()
        if words[word_of_id.eq(best).nonzero()[0]] in WORDS:
            found.append(((per_word[best] / per_word.sum()).item(), dim))
    print(*(dim for _, dim in sorted(found, reverse=True)[: int(count)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
