"""The sentences that explain the keys of `clean`, `synthesize` and `endpoints`; `endpoint` stands for one entry of the last."""

from collections.abc import Mapping

PREPARATION_KEYS: Mapping[str, str] = {
    "clean": "The steps of `finetune clean`, in the order in which they run; each is off unless it is set. Training reads none of it.",
    "clean.unreadable": "Leave out what cannot be read as a row: broken lines, turns out of order, empty questions or answers.",
    "clean.rules": "Leave out rows with these findings of `finetune lint`.",
    "clean.thresholds": "From where on a row has a finding of clean.rules; the defaults are those of `finetune lint`.",
    "clean.thresholds.too_long": "The longest row that stays, in tokens; null takes data.max_tokens.",
    "clean.thresholds.mojibake": "In how many places a row must hold text in a wrong encoding.",
    "clean.thresholds.other_language": "The share of a text by which one script is its language. A higher share finds fewer rows.",
    "clean.thresholds.mixed_scripts": "The share of an answer that a second script must have.",
    "clean.thresholds.repeated_punctuation": (
        "How often an answer must repeat a mark, such as 4 for !!!!. Mixed !? count from 2 more, an ellipsis from 1 more, dots from 9 more."
    ),
    "clean.thresholds.one_word": "Answers of at most so many words leave; two Chinese letters count as a word.",
    "clean.exact_duplicates": "Leave out rows that equal an earlier one, as data.deduplicate does.",
    "clean.near_duplicates": "Leave out rows that are nearly the same as one that stays, by MinHash signatures.",
    "clean.near_duplicates.threshold": "The share of word groups from which two texts are nearly the same, such as 0.8; null turns the step off.",
    "clean.near_duplicates.ngram": "How many consecutive words make a group. A Chinese, Japanese or Korean letter is a word.",
    "clean.near_duplicates.permutations": "The length of a signature: more permutations estimate the share more exactly and take more memory.",
    "clean.near_duplicates.compare": (
        "What is compared: the trained text, the question, or both. A row leaves if one of them is nearly that of a row that stays. "
        "Texts of fewer than ten groups are not compared."
    ),
    "clean.near_duplicates.best_by": (
        "The key of a row that holds its score; of rows that are nearly the same, the one with the highest score stays. Empty keeps the first."
    ),
    "clean.decontaminate": "Leave out rows that share consecutive words with an evaluation set.",
    "clean.decontaminate.against": (
        "The evaluation sets: files in any format that can be read, and tasks by their names. Every text in their rows counts."
    ),
    "clean.decontaminate.task_data": (
        "The folder that holds the rows of the tasks, such as gsm8k.jsonl or gsm8k_test.jsonl, or the file of the only one; empty takes the hub's."
    ),
    "clean.decontaminate.ngram": "How many consecutive words a row must share.",
    "clean.judge": "Let a model score each answer from 1 to 5 for instruction following, informativeness and truthfulness.",
    "clean.judge.endpoint": "The name of the judge in endpoints; empty turns the step off.",
    "clean.judge.drop_lowest": "The share of the scored rows that leaves: those with the lowest mean of the scores.",
    "clean.judge.prompt": "The prompt: a name in templates/judge, or a .jinja file of yours.",
    "clean.judge.attempts": "How often a row is asked about until the judge's answer holds scores. A row without scores stays, and is counted.",
    "clean.judge.max_tokens": "The longest answer of the judge in tokens.",
    "clean.complexity": (
        "Leave out rows whose length_weight x tokens + loss_weight x loss is too high. The loss is that of the trained text under "
        "model.checkpoint."
    ),
    "clean.complexity.drop_above": "The highest complexity that stays; null turns the step off.",
    "clean.complexity.length_weight": "The weight of the length in tokens.",
    "clean.complexity.loss_weight": "The weight of the loss, in nats per token.",
    "clean.complexity.batch_size": "How many rows the model reads at a time. It changes no result.",
    "clean.verify": "Leave out rows whose final answer differs from the true one.",
    "clean.verify.answers": "Compare the final answers by the rule of the reward final_answer.",
    "clean.verify.truth": "The key of a row that holds the true answer. Rows without it stay.",
    "clean.mix": "Draw rows by the seed, so that groups of rows have given shares.",
    "clean.mix.shares": (
        "Groups with their shares, such as {maths: 0.22, code: 0.03, Latin: 0.39, Chinese: 0.36}. A group is a value of clean.mix.key, a "
        "script, or both with a space between them."
    ),
    "clean.mix.key": "The key of a row that holds its kind; without it and a classifier, rows are grouped by script alone.",
    "clean.mix.classifier": (
        "The folder of a checkpoint that classifies texts (safetensors, as transformers saves it); the kind of a row is the label that it "
        "finds likeliest for the question and the answer."
    ),
    "clean.mix.rows": "The most rows in all; null takes as many as the shares allow.",
    "synthesize": "What `finetune synthesize` writes. Training reads none of it.",
    "synthesize.job": (
        "answers lets a model answer the prompts of data.train, questions makes questions and answers of its texts, variations makes "
        "new rows of its rows, and pairs makes preference rows of several answers to each prompt."
    ),
    "synthesize.endpoint": "The name of the writer in endpoints.",
    "synthesize.samples": "How many answers each prompt gets, or how many questions are made of a text.",
    "synthesize.temperature": "The sampling temperature; 0 takes the likeliest token each time.",
    "synthesize.max_tokens": "The longest answer in tokens.",
    "synthesize.system": "A system message for prompts that have none of their own. The written rows do not hold it.",
    "synthesize.keep": (
        "Which answers are kept: all, the best by score, or those whose final answer is that of the reference answer (verified)."
    ),
    "synthesize.rules": "Reward rules with their weights, which score the answers.",
    "synthesize.length_tokens": "The number of tokens up to which the rule length gives 1.",
    "synthesize.judge": "The name of a judge in endpoints, which scores the answers instead of rules.",
    "synthesize.reward_run": "The run directory of a reward model, which scores the answers instead of rules.",
    "synthesize.margin": "For pairs: the best answer's score must be higher than the worst one's by more than this.",
    "synthesize.variations": "Which variations are made of each row.",
    "synthesize.attempts": "How often a model is asked until its answer has the form that is needed.",
    "endpoints": (
        "The models that write or judge, by names of your choice, such as {teacher: {model: qwen, base_url: http://localhost:8000/v1}}. "
        "Nothing is sent to any other place."
    ),
    "endpoint.model": "The name of the model on the server; without base_url a checkpoint or a run on this machine.",
    "endpoint.base_url": "The address of an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama or a remote one.",
    "endpoint.key_variable": "The environment variable that holds the server's key; empty for a server without keys.",
    "endpoint.concurrency": "How many requests are under way at the same time; a model on this machine takes one.",
    "endpoint.timeout_seconds": "How long an answer may take.",
    "endpoint.retries": "How often a request is sent again after a fault, with growing pauses or as the server's Retry-After says.",
    "endpoint.max_requests": "The most requests of one run; answers that are known already do not count.",
    "endpoint.max_tokens_total": "The most tokens of one run, prompts and answers together.",
    "endpoint.max_cost": "The most that one run may cost, in the currency of the prices.",
    "endpoint.prompt_price": "The price of a million tokens of prompts.",
    "endpoint.answer_price": "The price of a million tokens of answers.",
}
