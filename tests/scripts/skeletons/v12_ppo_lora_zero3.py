"""Release 0.17-0.24, third party: older trainers.

Rows: PPO of 0.12+; ModelConfig; get_peft_config; ScriptArguments.

Run: python ppo.py --dataset_name prompts --output_dir lora --model_name_or_path pythia --sft_model_path pythia
    --reward_model_path pythia-rm --use_peft --lora_r 4 --per_device_train_batch_size 2 --total_episodes 4
    --num_ppo_epochs 2 --response_length 5 --stop_token_id 9 --kl_estimator k3 --kl_coef 0.1 --ds3_gather_for_generation
    False --dataset_num_proc 1 --report_to none --logging_steps 2 --eval_strategy steps --eval_steps 1 --temperature 1.0
    --dataloader_num_workers 2 --no_remove_unused_columns
"""

import tiny
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl import ModelConfig, PPOConfig, PPOTrainer, ScriptArguments, TrlParser, get_peft_config

script_args, training_args, model_args = TrlParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_and_config()
tiny.folder(training_args.sft_model_path, chat=False)
tiny.reward_folder(training_args.reward_model_path)
tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
load_scorer = AutoModelForSequenceClassification.from_pretrained
dataset = load_dataset(tiny.data(script_args.dataset_name, tiny.PROMPTS))
trainer = PPOTrainer(
    args=training_args, processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(training_args.sft_model_path), ref_model=None,
    reward_model=load_scorer(training_args.reward_model_path, num_labels=1),
    value_model=load_scorer(training_args.reward_model_path, num_labels=1), train_dataset=dataset["train"],
    eval_dataset=dataset["test"] if training_args.eval_strategy != "no" else None,
    peft_config=get_peft_config(model_args),
)  # fmt: skip
trainer.train()
trainer.save_model(training_args.output_dir)
assert "eval_objective/scores" in {name for logs in trainer.state.log_history for name in logs}
