# SPDX-License-Identifier: MIT
"""The fixtures of test_all.py, which the tests of lab/ use by name, too; and one of their own."""
import pytest

from test_all import attack, kind, name, script, seeded     # noqa: F401


@pytest.fixture
def results():
    """Skips a test where the code was copied without results/."""
    from lab.test_house import findings
    findings()
