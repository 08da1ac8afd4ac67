"""The sentences that explain each key of a recipe; those of the sections that prepare rows stand in `preparation_texts.py`.

`finetune recipes NAME` writes them beside the keys of a copied recipe, and `finetune recipes --keys` makes `docs/keys.md` of
them. A key is named as in `--set section.key=value`. `source` stands for one entry of data.train, data.eval or
data.sources, `task` for one of data.tasks, `endpoint` for one of endpoints, and `export` for the options of a stage that exports.
"""

from collections.abc import Mapping

from finetune.recipe.preparation.preparation_texts import PREPARATION_KEYS

KEYS: Mapping[str, str] = {
    "method": "The training method.",
    "model": "The base checkpoint, and how its weights are held in memory.",
    "model.checkpoint": (
        "The base checkpoint: an alias that `finetune checkpoints` lists, a hub id with an optional @revision, or a folder. "
        "A run directory continues that run: its adapter, or its weights."
    ),
    "model.architecture": (
        "llama trains the model as Llama weights; native trains an intermediate checkpoint in the native architecture "
        "(yulanmini), with all its factors, and export folds the result."
    ),
    "model.quantize": (
        "How the linear layers of the base model are held: nf4 (4 bits) or int8 take less memory and need adapter.kind: lora."
    ),
    "model.dtype": (
        "The type of the weights. auto is float32 on a CPU, bfloat16 on a GPU that supports it, else float16. Where all weights "
        "are trained, auto holds them in float32 and multiplies in the smaller type (pretrain and anneal: it holds them in "
        "bfloat16, with float32 copies in the optimizer)."
    ),
    "model.attention": "The attention kernel; auto leaves the choice to transformers, and in training to model.speed.",
    "model.stream_layers": (
        "Keep the base model's layers in main memory and copy them to the GPU two at a time. It needs adapter.kind: lora and one "
        "GPU; the result has the same bits, and each step takes longer where copying is slower than computing."
    ),
    "model.max_positions": "The longest position in tokens, to extend the context; null keeps the checkpoint's.",
    "model.rope_theta": "The base of the rotary position embedding (RoPE); null keeps the checkpoint's.",
    "model.speed": (
        "auto tries on the first batch what is faster and computes the same, and uses it: FlashAttention and Liger's kernels where "
        "installed, compiled layers (torch.compile) in runs of 10 minutes and more, 16-bit copies of the adapter. A resumed run does "
        "as it began. none tries nothing."
    ),
    "data": "The rows to train and evaluate on, and how they become tokens.",
    "data.train": (
        "The rows to train on: a file, a folder, a glob such as my/*.jsonl, or a list of these. An entry may also be a mapping, "
        "which takes a part of its rows or names a data set of the hub."
    ),
    "data.mixture": "A phase of the authors' pre-training whose proportions data.sources follow, instead of data.train.",
    "data.sources": (
        "Your own files for the data sets or categories of data.mixture, such as {code: mine.parquet, fineweb-edu: web/*.jsonl}."
    ),
    "data.eval": "The rows to evaluate on, written like data.train.",
    "data.held_out": (
        "Rows that are taken out of data.train to evaluate on, chosen by the seed: a share below 1, or a number of rows."
    ),
    "data.tasks": (
        "Tasks that the model is evaluated on while it trains, such as [{name: gsm8k, limit: 100, every: 0.5}]. Their scores are "
        "eval_task/NAME/SCORE in metrics.jsonl, and trainer.metric_for_best_model may name one."
    ),
    "data.format": "How the rows are written; auto takes the first format whose keys the first row of a file has.",
    "data.columns": "Your names for the keys of a format, such as {prompt: question, completion: answer}.",
    "data.template": (
        "The chat template; auto takes the tokenizer's own where it can be trained with, else yulan-mini. A .jinja file works too."
    ),
    "data.system": "A system message for rows that have none of their own.",
    "data.max_tokens": (
        "The longest row in tokens, prompt and answer together (of a pair, with its longer answer). For grpo and rloo it limits "
        "the prompt; for pretrain and anneal it is the length of a packed row."
    ),
    "data.overflow": (
        "What happens to longer rows: error stops the run, drop leaves them out, truncate cuts off their end, split makes "
        "several rows of a plain text and leaves other long rows out."
    ),
    "data.train_on": (
        "Which text is trained: every answer of the assistant, the last answer, or the whole row with its questions."
    ),
    "data.substitute": "Values for placeholders in the rows: {name: Lan} replaces {{name}} with Lan.",
    "data.deduplicate": "Leave out every row that equals an earlier one.",
    "data.bad_rows": (
        "What happens to rows that cannot be used, such as broken JSON, turns out of order or an empty answer: error stops the "
        "run, drop leaves them out, counts them and names the first."
    ),
    "data.merge_turns": "Join turns of one speaker that follow each other, by a blank line, instead of refusing the row.",
    "data.encoding": "The encoding of JSON, CSV and text files that are not UTF-8, such as gb18030 or utf-16.",
    "data.workers": (
        "How many processes turn rows into tokens. With 1 the tokenizer already uses all cores; more processes help only on "
        "machines with more than about four cores."
    ),
    "data.seed": (
        "Draws the held-out rows and the rows of a mixture; null takes the recipe's seed. With it, runs of other seeds train and "
        "evaluate on the same rows."
    ),
    "source.path": "A file, a folder or a glob.",
    "source.hub": "A data set of the hub, as owner/name, instead of path.",
    "source.config": "The configuration of the hub's data set, where it has several.",
    "source.split": "The split of the hub's data set; null takes train.",
    "source.revision": "The branch, tag or commit of the hub's data set; null takes the newest.",
    "source.weight": (
        "The share of this source among the sources that have a weight. The source that runs out first decides how many rows "
        "are taken; no row is repeated."
    ),
    "source.rows": "How many rows are taken, drawn by the seed; null takes all.",
    "task.name": "The task, as `finetune evaluate --tasks` names it.",
    "task.limit": "Take the first rows of the task only; null takes all.",
    "task.every": (
        "The share of the run's steps after which the task is evaluated again, such as 0.25; it is always evaluated after the last "
        "step, and null means then only. A task that trainer.metric_for_best_model names is evaluated at each evaluation."
    ),
    "task.path": "A file with the rows of the task; without it they are read from the hub.",
    "task.exemplars": "A file with the rows that stand in a prompt as examples; without it they are read from the hub.",
    "task.chat": "Ask in the model's chat template.",
    "adapter": "Which weights are trained.",
    "adapter.kind": "lora trains a LoRA adapter, none trains all weights of the model.",
    "adapter.rank": "The rank of LoRA's matrices: the higher, the more parameters are trained.",
    "adapter.alpha": "The scale of the adapter: its output is multiplied by alpha / rank.",
    "adapter.dropout": "The share of LoRA's inputs that is set to 0 at random in training.",
    "adapter.targets": "Which linear layers get an adapter: all-linear, or a list of names.",
    "adapter.rslora": "Multiply the adapter's output by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).",
    "adapter.dora": "Train the magnitude of the weights separately from their direction (DoRA).",
    "adapter.init": (
        "What the adapter begins with. default and eva change nothing; eva starts from directions in which the rows vary. pissa, "
        "olora and corda take a part of the weights, corda by what the rows use, saved as LoRA of twice the rank. loftq takes "
        "what nf4 rounds off; its export needs --base dequantized."
    ),
    "adapter.layers": "The numbers of the layers that get an adapter, from 0 on, such as [20, 21, 22]; an empty list means all.",
    "adapter.loraplus_ratio": (
        "How much larger the learning rate of LoRA's B is than that of A, which trainer.learning_rate sets (LoRA+); null means equal."
    ),
    "adapter.train_tokens": (
        "Token ids whose rows of the embedding and of the output head are trained too, such as [104, 105, 106] for a base model "
        "that never saw the tokens of its chat template."
    ),
    "adapter.modules_to_save": (
        "Modules that are trained whole beside the linear layers, as float32 copies: embed_tokens, lm_head, norm (the last one), "
        "input_layernorm, post_attention_layernorm (those of all layers). The adapter's file holds them, and only PEFT can apply it; "
        "an export merges them."
    ),
    "rewards": "How the answers of the methods grpo and rloo are scored; other methods take no rewards.",
    "rewards.rules": (
        "Rules with their weights, such as {final_answer: 1.0, truncated: 0.5}. Weights are positive, also those of penalties, "
        "whose values are negative."
    ),
    "rewards.length_tokens": "The number of tokens up to which the rule length gives 1; from twice as many on it gives 0.",
    "rewards.judge": "A reward model that scores the answers, with the rules or without any.",
    "rewards.judge.run": (
        "The run directory of a finished reward run: a LoRA adapter of the same base checkpoint, quantized in the same way, with "
        "the same template."
    ),
    "rewards.judge.weight": "The factor on the reward model's score.",
    "rewards.judge.clip": "The lowest and the highest score. A score outside is clipped to this range before it is multiplied by the weight.",
    "optimizer": "AdamW of the methods pretrain and anneal; for other methods set trainer.learning_rate, trainer.optim and so on.",
    "optimizer.states": (
        "The optimizer state to begin with: fresh (zero moments), published (the one in the checkpoint's own folder), or a folder "
        "with latest_universal. auto is fresh for pretrain and published for anneal."
    ),
    "optimizer.learning_rate": (
        "The learning rate of a fresh optimizer; a published state brings its own. null is 1e-2, which suits only a run that "
        "trains all weights of the native architecture: there muP scales it down for the matrices."
    ),
    "optimizer.weight_decay": (
        "The weight decay of matrices and embedding tables; biases, norms and alphas have none. null is 0.1; a published state "
        "brings its own."
    ),
    "optimizer.moments": (
        "Where and how AdamW's moments are held: float32 on the GPU; 8bit, which takes 6 bytes less for each weight and rounds the "
        "moments; or cpu, in main memory, which makes every step slower."
    ),
    "optimizer.save_states": "Also write the optimizer state at the end, so that the next run can begin with it.",
    "schedule": (
        "Length and learning-rate schedule of the methods pretrain and anneal; for other methods set trainer.num_train_epochs, "
        "trainer.lr_scheduler_type and so on."
    ),
    "schedule.unit": "The unit of every number in this section: optimizer steps, or tokens.",
    "schedule.count": (
        "Where warmup, decay_start and decay_end count from: run is the first step of this run; states is the beginning of the "
        "training that the optimizer state comes from, in steps."
    ),
    "schedule.length": "How long the run is, in schedule.unit; null is one epoch.",
    "schedule.warmup": "How long the learning rate rises from 0 to its full value, in schedule.unit.",
    "schedule.decay": "How the learning rate falls to 0; none keeps it. auto is none for pretrain and 1-sqrt for anneal.",
    "schedule.decay_start": "Where the learning rate begins to fall, in schedule.unit; null is the end of the warm-up.",
    "schedule.decay_end": "Where the learning rate reaches 0, in schedule.unit; null is the end of the run.",
    "trainer": (
        "Options of the method's trainer. Every option of its TRL or transformers configuration class may stand here under its own "
        "name, except those that the kit sets."
    ),
    "trainer.auto": (
        "Pick the micro-batch size, gradient checkpointing, activation offloading and the optimizer that fit the memory, and keep "
        "the effective batch size. Not for grpo, rloo, pretrain and anneal. `trainer: auto` sets this key alone."
    ),
    "trainer.global_batch": "The effective batch size in rows, over all processes. With trainer.auto: true the kit splits it into micro-batches.",
    "trainer.early_stopping_patience": (
        "Stop after so many evaluations in a row that are not better than the best one. Needs load_best_model_at_end: true and held-out "
        "rows; trainer.metric_for_best_model names what is compared, the held-out loss by default. A resumed run counts anew."
    ),
    "answers": (
        "The run answers a few prompts before the training, at each evaluation and after the training, and keeps the answers; this is the "
        "most tokens of each. 0 keeps none."
    ),
    "row_losses": (
        "The run measures the loss of so many training rows before and after the training, spread evenly, so that report.html can show "
        "the rows of the highest loss. Empty takes one row for 32 that are trained on, 4 to 256, about 2 % of the run's time. 0 "
        "measures none."
    ),
    "output": "The run directory; empty means runs/NAME in the current folder, where NAME is that of the recipe file.",
    "seed": "The seed for held-out rows, drawn rows, the order of the rows, and new weights.",
    "stages": (
        "A list of stages, which makes the recipe a chain. Each stage that trains continues from the one before; keys outside "
        "stages hold for every stage that trains."
    ),
    "stages.name": "The name of a stage, and of its folder in the output.",
    "stages.recipe": "A recipe file or a shipped recipe as the basis of the stage; the stage's own keys override it.",
    "stages.synthesize": (
        "Let the newest run before this stage write rows: the section synthesize, whose endpoint is that run unless it names another. "
        "The next stage trains on the rows, so it names no data.train."
    ),
    "stages.export": "Export the newest run before this stage; the options are those of `finetune export`.",
    "export.dtype": "The type of the exported weights; auto keeps the stored one.",
    "export.max_shard_size": "The largest weight file, such as 2GB.",
    "export.base": (
        "What the adapter of a quantized run is merged into: the full-precision base model (full), its dequantized form, or the "
        "one of the two with the lower held-out loss (auto)."
    ),
    "export.gguf": "The types in which GGUF files for llama.cpp and Ollama are written beside it, such as [q8_0].",
    "export.verify": "Open the exported model again and compare its logits with those of the run.",
    **PREPARATION_KEYS,
}
