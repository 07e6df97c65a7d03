"""The demo: `python -m longvq_layers.demo` swaps a pretrained model's attention, measures speed, trains a small model.

| file | what it does |
|---|---|
| `__main__.py` | the command line: runs the parts, prints the tables, writes the files |
| `settings.py` | every number of the full and of the quick demo, and the rows that the parts return |
| `data.py` | documents and source text out of the Python standard library |
| `quality.py` | part 1: a pretrained sentence encoder before and after `replace_attention` |
| `speed.py`, `memory.py` | part 2: time and peak memory of one architecture with its own attention and with ours |
| `training.py` | part 3: a byte language model of `LongVQBlock`s |
| `figure.py`, `report.py` | the picture, the tables |
"""
