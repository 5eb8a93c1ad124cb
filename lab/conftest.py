# SPDX-License-Identifier: MIT
"""The fixtures of test_all.py, which the tests of lab/ use by name, too."""
from test_all import attack, kind, name, script, seeded     # noqa: F401
