"""The training script, run after run in one process, where sums can be compared: products in float32, a line
of the log for every batch, dead features looked after early. sys.argv[1]: the runs' words, as JSON.
"""

import functools
import json
import sys

import torch

import train_autoencoder_from_tokens as script
from sae import models, processes
from sae.training import trainer

models.fast_dtype = lambda _device: torch.float32
processes.join = functools.cache(processes.join)
trainer.LOG_INTERVAL = 1
trainer.AUX_WINDOW = 5

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    script.main(script.parse_args()[1], lambda: False)
