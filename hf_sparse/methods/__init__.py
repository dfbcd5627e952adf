"""What acts on a model while it is trained: penalties, schedules, teachers, constraints."""

from hf_sparse.methods.acting import ActingTogether
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.methods.registry import methods, read_methods

__all__ = ["Acting", "ActingTogether", "Method", "Term", "Training", "methods", "read_methods"]
