"""A reward function of a user, in TRL's form."""


def close(prompts, completions, *, answer, **columns):
    """1 for the right sum, less the further off it is."""
    values = []
    for messages, wanted in zip(completions, answer, strict=True):  # prompts are chats, so completions are, too
        text = messages[0]["content"]
        off = (
            abs(int(text) - int(wanted)) if text.isdecimal() and text.isascii() else 100 - len(set(text) & set(wanted))
        )
        values.append(max(0.0, 1.0 - off / 101))
    return values
