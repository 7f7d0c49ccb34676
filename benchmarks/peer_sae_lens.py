"""The same training run by SAELens, for the last line of `benchmarks/train.py --peer`.

    make .venv-interop/.done
    .venv-interop/bin/python benchmarks/peer_sae_lens.py MODEL DATASET BATCHES

prints the seconds of the training loop alone. SAELens gets what makes it fastest here: the LLM in bfloat16,
autocast, no evaluation, no logging, and a model cut behind the hookpoint (by itself it would run all layers).
"""

import os
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}

import datasets
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, StandardTrainingSAEConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner

D, F, ROWS, CONTEXTS, LAYER = 1536, 6144, 1024, 16, 10


def main():
    model, dataset_path, batches = sys.argv[1:]
    dataset = datasets.load_from_disk(dataset_path).select_columns(["input_ids"])
    cuda = torch.cuda.is_available()
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=1.0, device="cuda" if cuda else "cpu"),
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": torch.bfloat16, "num_hidden_layers": LAYER + 1},
        hook_name=f"model.layers.{LAYER}.mlp.act_fn",
        dataset_path=dataset_path,
        context_size=dataset.features["input_ids"].length,
        prepend_bos=False,
        sequence_separator_token=None,
        streaming=False,
        store_batch_size_prompts=CONTEXTS,
        n_batches_in_buffer=25,
        train_batch_size_tokens=ROWS,
        training_tokens=int(batches) * ROWS,
        lr=1e-3,
        autocast=True,
        autocast_lm=True,
        prefetch_llm_batches=cuda,
        device="cuda" if cuda else "cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=dataset)
    start = time.perf_counter()
    runner.run()
    print(f"{time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
