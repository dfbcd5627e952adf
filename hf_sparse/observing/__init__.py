"""One pass of data through a model, with observers at the sites of its MLP blocks.

Measuring, calibrating, explaining and the evaluations of a training all ask the same: run the user's model,
whatever it is wrapped in, in evaluation mode over texts or batches, leave padding out, and look at what
passes a site of each block. What is looked for is an :class:`Observer`, or a :class:`CallObserver` if several
sites belong together; the rest is here.
"""

from hf_sparse.observing.calls import CallObserver
from hf_sparse.observing.observer import BlockObserver, Observer
from hf_sparse.observing.passes import Pass, blocks_of, observe

__all__ = ["BlockObserver", "CallObserver", "Observer", "Pass", "blocks_of", "observe"]
