import pytest

from effitrain.core.errors import BudgetError, EffitrainError, InputError, Interrupted


@pytest.mark.parametrize(("kind", "code"), [(EffitrainError, 1), (InputError, 2), (BudgetError, 3), (Interrupted, 130)])
def test_exit_codes_are_those_of_the_command_line(kind: type[EffitrainError], code: int) -> None:
    assert kind("fact").exit_code == code


def test_message_is_fact_and_cause_then_the_next_step_on_its_own_line() -> None:
    error = InputError("No file a.json.", "The path is relative.", "Check --dataset.")
    assert str(error) == "No file a.json. The path is relative.\nCheck --dataset."
    assert (error.fact, error.cause, error.next_step) == (
        "No file a.json.",
        "The path is relative.",
        "Check --dataset.",
    )


def test_parts_left_out_leave_no_blanks() -> None:
    assert str(InputError("Fact.")) == "Fact."
    assert str(InputError("Fact.", next_step="Do this.")) == "Fact.\nDo this."


def test_budget_error_carries_the_plan() -> None:
    assert BudgetError("Too big.").plan is None
    assert BudgetError("Too big.", plan="the plan").plan == "the plan"
