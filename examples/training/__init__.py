"""What the training examples share; each example itself says only what differs.

arguments.py    the flags that all have, and their defaults on a CPU and on a GPU
service.py      the address of a running service, or one that is started and stopped
data.py         photographs, folders and shards to batches of uint8 pictures
networks.py     normalisation inside the model, backbones, projection heads
loop.py         the training loop around AdversarialLoader
progress.py     one live line
checkpoint.py   files that are whole or not there
run.py          an example from its flags to its exit status

training = Training(model=model, data=data, loss=loss, optimizer=optimizer)    # in `build(options)`
run(build, parser)                                                             # in `__main__`
"""

from .arguments import example_parser
from .loop import Training
from .run import run

__all__ = ["Training", "example_parser", "run"]
