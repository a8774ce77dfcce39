"""What `EngineConfig.instrument` may name."""

import pytest

from isomoe.engine.instrument import load_instrument
from isomoe.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("planted:blunts_the_norm=3", "takes no =3; planted:blunts_the_norm alone would work"),
        ("planted:no_such", "no_such"),
        ("no_such_module:anything", "no_such_module"),
        ("json:dumps", "has no method in_chain"),
    ],
)
def test_what_is_no_instrument_is_refused_in_one_line(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_instrument(setting)
    assert "\n" not in str(caught.value)
