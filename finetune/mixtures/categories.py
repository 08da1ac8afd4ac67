"""The category of text of every published data set. The authors published no categories; this kit assigns them by name.

Questions with answers for fine-tuning are `instruction`, whatever their subject. Other data sets are grouped by subject and language.
"""

from collections.abc import Container, Mapping

# Category -> description, in the order in which tables and plots show them.
CATEGORIES: Mapping[str, str] = {
    "web": "English pages, forums, news",
    "encyclopedia": "English Wikipedia, answers from Stack Exchange",
    "books": "English books and papers",
    "synthetic": "English textbooks and stories that a model wrote",
    "code": "programs, notebooks, texts about them",
    "mathematics": "pages, papers, proofs and problems of mathematics",
    "chinese": "Chinese pages, books, news, encyclopedias, law",
    "instruction": "questions with answers for fine-tuning, in any subject",
}

# The key is the name of a data set, or the part of the name before a slash. The longest matching key decides.
_CATEGORY_OF: Mapping[str, str] = {
    # English
    "dclm_baseline": "web",
    "fineweb-edu": "web",
    "dolma-unzip/reddit": "web",
    "cicg-news-en": "web",
    "rucweb": "web",
    "dolma-unzip/stackexchange": "encyclopedia",
    "wiki-baike-en": "encyclopedia",
    "TxT360/wiki_language/wiki-en-1": "encyclopedia",
    "TxT360/wiki_language/wiki-en-2": "encyclopedia",
    "TxT360/wiki_language/wiki-simple": "encyclopedia",
    "arxiv-paper-en": "books",
    "books3-book-en": "books",
    "gutenberg-book-en": "books",
    "LoC-PD-Books": "books",
    "longwanjuan-others": "books",
    "pes2o-paper-en": "books",
    "aa_math/cosmopedia": "synthetic",
    "smollm-corpus/cosmopedia-v2": "synthetic",
    # code
    "MNBVC/code": "code",
    "OpenCoder-LLM/fineweb-code-corpus-subset-no-stackexchange": "code",
    "OpenCoder-LLM/opc-annealing-corpus-langs/algorithmic_corpus": "code",
    "OpenCoder-LLM/opc-annealing-corpus-langs/synthetic_code_snippet": "code",
    "aa_math/AutoMathText/code": "code",
    "code_clean_deepseek": "code",
    "code_gen_qwen": "code",
    "ioccc": "code",
    "longwanjuan-python": "code",
    "starcoder_smollm_dedup": "code",
    "textbook_quality_programming": "code",
    "the-stack-v2": "code",
    "the_stack_v2_python_cleaned_scored_dedup": "code",
    "wjp_scored/code": "code",
    "wjp_scored/leetcode": "code",
    # mathematics
    "Lean-tactic": "mathematics",
    "OpenCoder-LLM/fineweb-math-corpus-dedup": "mathematics",
    "aa_math/AutoMathText/web": "mathematics",
    "aa_math/cosmopedia/auto_math_text": "mathematics",
    "aa_math/cosmopedia/khanacademy": "mathematics",
    "aa_math/proof-pile-2": "mathematics",
    "dclm_dedup-math-1-6": "mathematics",
    "dclm_math": "mathematics",
    "dm_math": "mathematics",
    "fineweb_math": "mathematics",
    "infimm-webmath-dedup": "mathematics",
    "math_cn": "mathematics",
    "math_gen_qwen": "mathematics",
    "mathtext": "mathematics",
    "open-web-math-pro": "mathematics",
    "the-stack-v2/Coq": "mathematics",
    "the-stack-v2/Lean": "mathematics",
    "wjp_scored/gsm8k.0": "mathematics",
    "wjp_scored/gsm8k.0_solvability": "mathematics",
    "wjp_scored/math": "mathematics",
    "basic-math-10m": "mathematics",
    # Chinese
    "MNBVC/gov": "chinese",
    "MNBVC/news": "chinese",
    "TxT360/wiki_language/wiki-zh-1": "chinese",
    "TxT360/wiki_language/wiki-zh-2": "chinese",
    "bdbk-baike-cn": "chinese",
    "bestsellers-book-cn": "chinese",
    "cbooks-book-cn": "chinese",
    "chinese-fineweb-edu_use": "chinese",
    "decay/chinese-poetry": "chinese",
    "exam-book-cn": "chinese",
    "legal_case-law-cn": "chinese",
    "textbooks-book-cn": "chinese",
    "wiki-baike-cn": "chinese",
    "zhihu-qa-cn": "chinese",
    # questions with answers
    "FOL-nli": "instruction",
    "Magpie-Reasoning-150K": "instruction",
    "MetaMathQA": "instruction",
    "OpenCoder-LLM/opc-annealing-corpus-langs/synthetic_qa-lang": "instruction",
    "OpenCoder-LLM/opencoder-sft-stage1-en": "instruction",
    "OpenCoder-LLM/opencoder-sft-stage2-text": "instruction",
    "Polytope": "instruction",
    "ScaleQuest": "instruction",
    "aa_code/sc2_magicoder": "instruction",
    "aa_math/math_sft_new_edu_scored_wo_temp": "instruction",
    "aa_math/math_sft_split": "instruction",
    "aa_math/math_sft_split_translate_mixed": "instruction",
    "ape210k": "instruction",
    "decay": "instruction",
    "dolma-unzip/tulu-flan": "instruction",
    "orca-math-word-problems-200k": "instruction",
    "reasoning-0.01": "instruction",
    "wjp_scored/mmlu.post.randomized": "instruction",
    "wjp_scored/reason_60000-860000": "instruction",
}


def find_category(name: str) -> str:
    """Return the category of a published data set.

    Raises:
        KeyError: neither the name nor a part of it is in the table.
    """
    return _CATEGORY_OF[find_longest_part(name, _CATEGORY_OF) or name]


def find_longest_part(name: str, known: Container[str]) -> str | None:
    """Return the longest known name that is `name` itself or a part of it before a slash, or None."""
    parts = name.split("/")
    return next((part for end in range(len(parts), 0, -1) if (part := "/".join(parts[:end])) in known), None)
