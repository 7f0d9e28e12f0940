from __future__ import annotations

from pathlib import Path

import pytest

from deft_tvm import env
from deft_tvm.errors import InputError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_every_variable_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"DEBUG", "DUMP", "CHECK", "LOGS", "UNTUNED", "MODULE_PATH"}
    assert {variable.name for variable in env.VARIABLES} == {f"DEFT_TVM_{n}" for n in names}
    values = [variable.get() for variable in env.VARIABLES]
    assert values == [0, None, False, None, False, ()]
    for variable, text in zip(env.VARIABLES, ("3", "d", "1", "l", "0", "a:b"), strict=True):
        monkeypatch.setenv(variable.name, text)
    values = [variable.get() for variable in env.VARIABLES]
    assert values == [3, Path("d"), True, Path("l"), False, (Path("a"), Path("b"))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("DEBUG", "6", "DEFT_TVM_DEBUG is '6'; expected a level from 0 to 5"),
        ("DEBUG", "loud", "DEFT_TVM_DEBUG is 'loud'; expected a level from 0 to 5"),
        ("CHECK", "yes", "DEFT_TVM_CHECK is 'yes'; expected 0 or 1"),
        ("LOGS", "~no-such-user/x", "DEFT_TVM_LOGS is '~no-such-user/x'; expected "),
    ],
)
def test_a_bad_value_is_refused(
    name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DEFT_TVM_{name}", text)
    with pytest.raises(InputError, match=message):
        getattr(env, name).get()
