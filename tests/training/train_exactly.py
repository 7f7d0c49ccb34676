"""The training script, run after run in one process, so that sums can be compared: products in float32, a
line of the log for every batch, dead features looked after early. sys.argv[1], JSON: of each run its words,
and after how many lines of the log it stops (null: never).
"""

import functools
import json
import sys
from pathlib import Path

import torch

import train_autoencoder_from_tokens as script
from sae import models, processes
from sae.training import folder, sweep, trainer

models.fast_dtype = lambda _device: torch.float32
processes.join = functools.cache(processes.join)
folder.draw = sweep.draw = lambda *_: None  # pictures take longer than the runs
trainer.LOG_INTERVAL, trainer.AUX_WINDOW = 1, 5
load_model = models.load_model


def load_one_that_listens(*args):
    """With random weights as they are, what is put in place of a layer's output changes nothing behind it."""
    model = load_model(*args)
    model.model.layers[1].mlp.down_proj.weight.data *= 1000
    return model


models.load_model = load_one_that_listens


def run(words, stop):
    sys.argv[1:] = words
    args = script.parse_args()[1]
    metrics = Path(args.save_path) / "metrics.jsonl"
    script.main(args, lambda: bool(stop) and len(metrics.read_bytes().splitlines()) >= stop)


for one in json.loads(sys.argv[1]):
    run(*one)
processes.Parser("").exit()
