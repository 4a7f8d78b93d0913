"""Choosing a precision for every layer: the plan that stays nearest to the teacher within a budget."""

from kdq.search.budget import Budget
from kdq.search.plan import Option, Plan, PlannedLayer
from kdq.search.precision import Precision
from kdq.search.run import search_precision

__all__ = ["Budget", "Option", "Plan", "PlannedLayer", "Precision", "search_precision"]
