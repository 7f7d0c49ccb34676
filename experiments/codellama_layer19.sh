#!/usr/bin/env bash
# The full-size example: the MLP activations of CodeLlama-7b's layer 19, explained by CodeLlama-34b.
# Needs the hub (a login for bigcode/the-stack-dedup), two GPUs for training and four for explaining, and an
# ElasticSearch: docs/elasticsearch.md. Started again after any stop, it goes on there.
set -eu
cd "$(dirname "$0")/.."
out=${1:?folder to write to} server=${2:?ElasticSearch address} key=${3:?@FILE with its API key}
export PATH=$PWD/.venv/bin:$PATH

python generate_tokenized_dataset.py 16 10000 --num_processes 16 --min_tokens 256 --data_dir data/python \
    --save_path "$out/tokens"
python train_autoencoder_from_tokens.py 19 mlp_activations --dataset_path "$out/tokens" --num_batches 100000 \
    --neuron_resampling_method anthropic --skip_positions 1 --save_path "$out/run" --resume
[ -e "$out/samples.pt" ] || python generate_interpretation_samples.py 50000 --dataset_path "$out/tokens" \
    --autoencoder_path "$out/run/100000.pt" --save_path "$out/samples.pt" \
    --log_freq_lower -4.7 --log_freq_upper -1  # fires 256 times in these 12.8 million tokens; on a tenth of them
deepspeed --num_gpus 4 interpret_autoencoder_deepspeed.py "$server" "$key" --num_gpus 4 \
    --dataset_path "$out/tokens" --interpretation_samples_path "$out/samples.pt" \
    --autoencoder_path "$out/run/100000.pt"
