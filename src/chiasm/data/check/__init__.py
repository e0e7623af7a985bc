"""Looking at data before training: a first look at some samples (``check``), and all of them (``check_all``)."""

from chiasm.data.check.first_look import Checked, check

__all__ = ["Checked", "check"]
