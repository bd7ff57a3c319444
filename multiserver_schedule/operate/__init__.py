"""
The verbs of the people who use it and are on call for it: the commands and the admin call the same functions.

    listing      what is due next, who holds it, how it went; the next due times of all tasks
    explanation  one task: its schedule in words, what is in force, the next clock change
    steer        pause, resume, interrupt, and a run that is asked for
    holders      who holds a lock, and how it is freed by hand
    clocks       is a store's clock right, and what has it left behind where it was ahead?
    backfill     due times of the past that nobody ran
    pruning      what is old enough to be deleted
    examination  is everything as it should be here?
    overdue      what nobody does although its time has come
    words        a schedule in words
    stores       what they all need
"""

from __future__ import annotations

from .backfill import Gap, Hand, Progress, Tried, fill, find_gap
from .clocks import Righted, SetRight, set_clock_right
from .examination import Finding, examine, in_maintenance
from .explanation import ClockChange, Explanation, explain
from .holders import Holder, Released, UnlockRefused, holder, unlock
from .listing import ByHand, Coming, Everything, Listing, Overview, overview, run_by_hand, timeline
from .pruning import Pruning, prune
from .steer import Steered, Wanted, interrupt, pause, resume, to_trigger, want
from .stores import Misused, Refused, sound

__all__ = [
    "ByHand",
    "ClockChange",
    "Coming",
    "Everything",
    "Explanation",
    "Finding",
    "Gap",
    "Hand",
    "Holder",
    "Listing",
    "Misused",
    "Overview",
    "Progress",
    "Pruning",
    "Refused",
    "Released",
    "Righted",
    "SetRight",
    "Steered",
    "Tried",
    "UnlockRefused",
    "Wanted",
    "examine",
    "explain",
    "fill",
    "find_gap",
    "holder",
    "in_maintenance",
    "interrupt",
    "overview",
    "pause",
    "prune",
    "resume",
    "run_by_hand",
    "set_clock_right",
    "sound",
    "timeline",
    "to_trigger",
    "unlock",
    "want",
]
