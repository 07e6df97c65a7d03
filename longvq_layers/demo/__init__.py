"""The demo: `python -m longvq_layers.demo` swaps a pretrained model's attention, measures speed, trains a small model.

| file | what it does |
|---|---|
| `__main__.py` | the command line: runs the parts, prints the tables, writes the files |
| `settings.py`, `results.py` | every number of the full and of the quick demo; the rows that the parts return |
| `quality.py` | part 1: a pretrained sentence encoder before and after `replace_attention` |
| `speed.py`, `memory.py`, `random_bert.py` | part 2: time and memory of one model with its own attention and ours |
| `training.py` | part 3: a byte language model of `LongVQBlock`s |
| `figure.py`, `report.py` | the picture, the tables |
"""
