"""What a model's step moves, computes and keeps, eager and on every rung of the ladder, counted without a GPU."""

from fusedres.explain.explanation import DTYPES, Explanation, Figures, Question, explain

__all__ = ["DTYPES", "Explanation", "Figures", "Question", "explain"]
