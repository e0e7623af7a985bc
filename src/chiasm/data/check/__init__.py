"""Looking at data before training: a first look at some samples (``check``), and all of them (``check_all``)."""

from chiasm.data.check.examine import Rules, Way
from chiasm.data.check.first_look import Checked, check
from chiasm.data.check.kinds import KINDS, Finding, Kind
from chiasm.data.check.run import check_all
from chiasm.data.check.summary import Summary

__all__ = ["KINDS", "Checked", "Finding", "Kind", "Rules", "Summary", "Way", "check", "check_all"]
