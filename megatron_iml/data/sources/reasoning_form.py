"""The form of OPT-IML's reasoning tasks, shared by the readers of chain-of-thought data.

What enters: a question, its answer and the reasoning between them. What leaves: source and target.

    "2 + 2?", "4", "Two and two make 4."
    ->  "Answer the following question by reasoning step by step.\\n2 + 2?"
        "Two and two make 4. The answer is 4"
"""

BENCHMARK = "Reasoning"
CATEGORY = "Reasoning"
# Of the paper's appendix; MATH has its own there.
QUESTION_INSTRUCTION = "Answer the following question by reasoning step by step."
MATH_INSTRUCTION = "Answer the following math question by reasoning step by step."


def reasoning_source(question: str) -> str:
    """Instruction sentence of the paper's appendix, then the question."""
    return f"{QUESTION_INSTRUCTION}\n{question.strip()}"


def reasoning_target(rationale: str, answer: str) -> str:
    """Reasoning first, so that the answer can depend on it."""
    return f"{rationale.strip()} The answer is {answer.strip()}"
