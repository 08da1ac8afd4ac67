"""Read the text that tokens were made of, with a tokenizer of SentencePiece's kind."""

from itertools import groupby


def read_text(tokenizer, ids):
    """Return the rendered text of tokens.

    `decode` shows the space that such a tokenizer puts before the text behind a control token, and takes it away only where all begins.
    """
    control = tokenizer.added_tokens_decoder
    runs = groupby(ids, key=lambda token: token in control)
    return "".join(
        "".join(control[token].content for token in run) if is_control else tokenizer.decode(list(run))
        for is_control, run in runs
    )
