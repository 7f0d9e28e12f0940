"""What the model is asked."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

EXAMPLES = (
    (
        "Tom has 3 apples and buys 4 more. How many apples does he have?",
        "He starts with 3 and gets 4 more, so 3 + 4 = 7.",
        7,
    ),
    (
        "A box holds 6 eggs. How many eggs are in 2 boxes?",
        "Each box holds 6, so 2 boxes hold 2 * 6 = 12.",
        12,
    ),
    (
        "Ann had 10 coins and gave 3 to her brother. How many are left?",
        "She had 10 and gave 3 away, so 10 - 3 = 7.",
        7,
    ),
    (
        "There are 5 cats and each has 4 legs. How many legs are there?",
        "Each cat has 4 legs, so 5 cats have 5 * 4 = 20.",
        20,
    ),
    (
        "A bus had 8 people. At the stop 5 got on and 2 got off. How many are on the bus?",
        "It had 8, then 8 + 5 = 13, then 13 - 2 = 11.",
        11,
    ),
    (
        "Sara reads 2 pages a day. How many pages does she read in 7 days?",
        "She reads 2 pages on each of 7 days, so 2 * 7 = 14.",
        14,
    ),
    (
        "A rope of 12 metres is cut into 3 equal pieces. How long is each piece?",
        "The 12 metres are divided by 3, so 12 / 3 = 4.",
        4,
    ),
    (
        "Ben has 9 marbles and loses 4 of them. How many marbles does he have?",
        "He had 9 and lost 4, so 9 - 4 = 5.",
        5,
    ),
)
QUESTION = "Mia picks 5 red flowers and 6 blue flowers. How many flowers does she have?"
ANSWER = 11

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "List three fruits.",
    "What is 2 plus 2?",
    "Name a planet with rings.",
    "How do I boil an egg?",
    "Tell me a short story about a fox.",
    "What does a heart do?",
    "Translate 'good morning' to Spanish.",
    "Give me a name for a small dog.",
    "What is a prime number?",
    "Who wrote Romeo and Juliet?",
    "Explain rain to a child.",
    "What is the largest ocean?",
    "Write a line of a poem about winter.",
    "How many days are in a week?",
    "What is photosynthesis?",
    "Suggest a healthy breakfast.",
    "What is the opposite of cold?",
)
"""Twenty, by which decoding as a tree is compared with plain decoding, token by token."""

REPEAT = (
    "Repeat this text word for word: In 1776 the colonies declared that all men are created equal, "
    "that they are endowed by their Creator with certain unalienable Rights, that among these are "
    "Life, Liberty and the pursuit of Happiness."
)
"""What an n-gram drafter is for: an answer that quotes."""


def few_shot(examples: int = len(EXAMPLES)) -> str:
    """Worked examples, and a question that is not answered."""
    shown = [f"Q: {q}\nA: {why} The answer is {n}.\n" for q, why, n in EXAMPLES[:examples]]
    return "\n".join([*shown, f"Q: {QUESTION}\nA:"])


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A plain text's tokens, without any that mark a conversation."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def conversation(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Tokens of a question to the assistant, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return tokens(tokenizer, text)
