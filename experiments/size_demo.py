"""How much of the demo fits into a few minutes on this machine; its argument is the rate of training.

python experiments/size_demo.py 2400

Prints: rate, batches to train, contexts to look at, features to explain, minutes of training, how
explanations are read and how many are made of each feature. 400 batches take
two to three minutes where bfloat16 is fast; two AVX2 cores do fewer.
"""

import sys

BATCH = 1024  # tokens
LONGEST_S = 200  # of training
BATCHES = (100, 400)
FAST = 1500  # tokens/s from which on lines are affordable: they are long to read


def main(rate):
    rate = max(1, int(rate))
    batches = max(BATCHES[0], min(BATCHES[1], LONGEST_S * rate // BATCH // 20 * 20))
    minutes = batches * BATCH / rate / 60
    contexts = 600
    explaining = ("contrastive", 3) if rate >= FAST else ("tokens", 2)
    print(rate, batches, contexts, 30, f"{minutes:.1f}", *explaining)


if __name__ == "__main__":
    main(sys.argv[1])
