"""Tasks to train and compare sequence models with; none downloads anything. See docs/tasks.md.

| file | what it has |
|---|---|
| `base.py` | `Batch`, `Task`: batches as a pure function of split, step, batch size and seed |
| `registry.py` | `get`, `options`, `NAMES` |
| `listops.py`, `listops_trees.py` | ListOps: the task, the random trees |
| `recall.py`, `copying.py` | multi-query associative recall, selective copying |
| `digits.py` | scikit-learn's handwritten digits |
| `python_source.py`, `standard_library.py` | bytes of the standard library: the tasks, the text |
| `lra/` | the Long Range Arena from the user's files: text, pictures |
"""

from longvq_layers.tasks.base import IGNORED, SPLITS, Batch, Task
from longvq_layers.tasks.python_source import bits_per_byte
from longvq_layers.tasks.registry import NAMES, get, options

__all__ = ["IGNORED", "NAMES", "SPLITS", "Batch", "Task", "bits_per_byte", "get", "options"]
