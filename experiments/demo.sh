#!/usr/bin/env bash
# From the source of Python's standard library to explained, searchable features of SmolLM2, on any laptop.
# Stopped anywhere, it goes on there when started again. Everything it writes lies in demo/.
# With ELASTICSEARCH_URL set (and ELASTICSEARCH_API_KEY), that server is used instead of one of its own.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin model=inputs/smollm2 out=demo key=${ELASTICSEARCH_API_KEY:-none}
export PATH=$bin:$PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_BUILD_OPS=0
mkdir -p $out

step() { printf '\n== %s\n' "$1"; printf '   %s\n' "${@:2}"; }

step "1/5 tokenise the standard library" \
    "Every file of it is cut into contexts of 64 tokens. About 10 seconds."
python generate_tokenized_dataset.py 2 8000 --num_processes 2 --min_tokens 64 --chunk_documents \
    --tokenizer_name $model --dataset_name inputs/stdlib --save_path $out/tokens

train() {
    python train_autoencoder_from_tokens.py 10 mlp_activations --dataset_path $out/tokens --model_name $model \
        --save_path $out/run --num_batches "$1" --batch_size_autoencoder 1024 --num_batches_preload 40 \
        --learning_rate 1e-3 --batches_between_ckpt 0 "${@:2}"
}

# How much of the work below fits into a few minutes is measured once, by the training script's own dry run.
if [ ! -e $out/sizes ]; then
    step "measuring this machine" "Three batches, to size what follows. About 15 seconds."
    rate=$(train 240 --dry_run | tee $out/dry_run.log | sed -n 's/.* at \([0-9]*\) tokens\/s.*/\1/p')
    python experiments/size_demo.py "$rate" >$out/sizes
fi
read -r rate batches contexts features minutes simulation explanations <$out/sizes
echo "   $rate tokens/s: $batches batches to train, $contexts contexts to look at, $features features to explain"

step "2/5 train an autoencoder on layer 10 of SmolLM2: 1536 activations -> 6144 features" \
    "Each batch is 1,024 tokens. About $minutes minutes, most of all there is to wait for."
train "$batches" --resume

step "3/5 collect the contexts that activate each feature" \
    "One pass over $contexts contexts counts how often each feature fires; a second reads its best ones."
[ -e $out/samples.pt ] || python generate_interpretation_samples.py "$contexts" --dataset_path $out/tokens \
    --autoencoder_path "$out/run/$batches.pt" --save_path $out/samples.pt

server=${ELASTICSEARCH_URL:-}
if [ -z "$server" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    trap 'noida-db down --data-dir $out/server >/dev/null 2>&1 || true' EXIT
    noida-db down --data-dir $out/server >/dev/null 2>&1 || true  # of a demo that was killed
    noida-db up --only elasticsearch --data-dir $out/server --elasticsearch-port "$port" >$out/server.log 2>&1
    server=http://127.0.0.1:$port
fi
step "4/5 explain the first $features features, score the explanations, index them" \
    "SmolLM2 explains itself: counts and prompts propose, the best proposal is kept and scored." \
    "One to two minutes. The launcher's log is $out/explain.log."
deepspeed --num_gpus 1 interpret_autoencoder_deepspeed.py "$server" "$key" --num_gpus 1 --parallel data \
    --dataset_path $out/tokens --interpretation_samples_path $out/samples.pt --simulation "$simulation" \
    --autoencoder_path "$out/run/$batches.pt" --interpretation_model_name $model --max_features "$features" \
    --num_explanations "$explanations" \
    >$out/explain.log || { tail -n 5 $out/explain.log; exit 1; }

step "5/5 look: the index, a search, and a page" "Best score first, as the index gives them back."
index=smollm2_mlp_activations_10_1536_6144_0.001_1.0
python experiments/print_table.py "$server" $index --api_key "$key"
grep -v '^\[' $out/explain.log | tail -n 2
printf '\nWhich features fire on self?\n'
python experiments/print_table.py "$server" $index --api_key "$key" --query self
python -m sae.report $out/samples.pt --dataset_path $out/tokens --autoencoder_path "$out/run/$batches.pt" \
    --explanations $out/samples.explanations.jsonl --out $out/report.html
python experiments/where_to_look.py $out/samples.explanations.jsonl $out/report.html
