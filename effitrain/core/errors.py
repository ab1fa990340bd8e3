"""Errors a user can act on: the fact with its numbers, the likely cause, the next step."""

from typing import Any


class EffitrainError(Exception):
    """An error with a cause and a next step, and the exit code of the command line.

    Args:
        fact: what is wrong, with the numbers or names involved.
        cause: the usual reason, when it is known.
        next_step: what to do or type now.
    """

    exit_code = 1

    def __init__(self, fact: str, cause: str = "", next_step: str = ""):
        self.fact, self.cause, self.next_step = fact, cause, next_step
        super().__init__(" ".join(part for part in (fact, cause) if part) + (f"\n{next_step}" if next_step else ""))


class InputError(EffitrainError):
    """Bad input or usage: a missing file, a wrong column, an unknown key (exit code 2)."""

    exit_code = 2


class BudgetError(EffitrainError):
    """Nothing fits the memory budget; ``plan`` holds the ledger and what would fit (exit code 3)."""

    exit_code = 3

    def __init__(self, fact: str, cause: str = "", next_step: str = "", plan: Any = None):
        super().__init__(fact, cause, next_step)
        self.plan = plan


class Interrupted(EffitrainError):
    """The user or the system asked to stop, and the state was saved (exit code 130)."""

    exit_code = 130
