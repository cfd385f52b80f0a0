"""The code that the training examples share; each example adds its own data, model and loss.

arguments.py    parses the common flags, with defaults for a CPU and for a GPU
service.py      finds a running service, or starts one and stops it
data.py         turns photographs, folders and shards into batches of uint8 pictures
networks.py     defines normalisation inside the model, backbones and projection heads
loop.py         trains with AdversarialLoader
progress.py     shows progress on one live line
checkpoint.py   writes checkpoints that are complete or absent
run.py          runs an example, from its flags to its exit status

training = Training(model=model, data=data, loss=loss, optimizer=optimizer)    # in `build(options)`
run(build, parser)                                                             # in `__main__`
"""

from .arguments import example_parser
from .loop import Training
from .run import run

__all__ = ["Training", "example_parser", "run"]
