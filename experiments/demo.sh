#!/usr/bin/env bash
# From the source of Python's standard library to explained, searchable features of SmolLM2, on two cores.
# Stopped anywhere, it goes on there when started again. Everything it writes lies in demo/.
# With ELASTICSEARCH_URL set (and ELASTICSEARCH_API_KEY), that server is used instead of one of its own.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin model=inputs/smollm2 out=demo key=${ELASTICSEARCH_API_KEY:-none}
export PATH=$bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0
mkdir -p $out

step() { printf '\n== %s\n' "$1"; }

step "1/5 tokenise the standard library"
python generate_tokenized_dataset.py 2 8000 --num_processes 2 --min_tokens 64 --chunk_documents \
    --tokenizer_name $model --dataset_name inputs/stdlib --save_path $out/tokens

step "2/5 train an autoencoder on layer 10 of SmolLM2: 1536 -> 6144"
python train_autoencoder_from_tokens.py 10 mlp_activations --dataset_path $out/tokens --model_name $model \
    --save_path $out/run --num_batches 240 --batch_size_autoencoder 1024 --num_batches_preload 60 \
    --learning_rate 1e-3 --batches_between_ckpt 120 --resume

step "3/5 collect the contexts that activate each feature"
[ -e $out/samples.pt ] || python generate_interpretation_samples.py 600 --dataset_path $out/tokens \
    --autoencoder_path $out/run/240.pt --save_path $out/samples.pt

step "4/5 explain features with two processes, score them, index them"
server=${ELASTICSEARCH_URL:-}
if [ -z "$server" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    trap 'noida-db down --data-dir $out/server >/dev/null 2>&1 || true' EXIT
    noida-db down --data-dir $out/server >/dev/null 2>&1 || true  # of a demo that was killed
    noida-db up --only elasticsearch --data-dir $out/server --elasticsearch-port "$port" >$out/server.log 2>&1
    server=http://127.0.0.1:$port
fi
# SmolLM2 is a small model to explain with: it gets the features that fire on one word of Python.
features=$(python experiments/keyword_features.py $out/samples.pt $out/tokens 20)
deepspeed --num_gpus 2 interpret_autoencoder_deepspeed.py "$server" "$key" --num_gpus 2 --parallel data \
    --dataset_path $out/tokens --interpretation_samples_path $out/samples.pt \
    --autoencoder_path $out/run/240.pt --interpretation_model_name $model --features $features --batch_size 10

step "5/5 look: the index, a search, and a page"
index=smollm2_mlp_activations_10_1536_6144_0.001_1.0
python experiments/print_table.py "$server" $index --api_key "$key"
printf '\nsearch q=import:\n'
python experiments/print_table.py "$server" $index --api_key "$key" --query import
python -m sae.report $out/samples.pt --dataset_path $out/tokens --autoencoder_path $out/run/240.pt \
    --explanations $out/samples.explanations.jsonl --out $out/report.html
echo "open $out/report.html in a browser; plots of the training lie in $out/run/images"
