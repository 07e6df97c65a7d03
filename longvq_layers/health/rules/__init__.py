"""The rules of `diagnose`: each reads a model or a monitor and yields findings.

| file | finds |
|---|---|
| `codebooks.py` | codebooks that are not trained, collapsed, dead or far from the keys |
| `parameters.py` | parameters that are not finite, weights that amplify too much |
| `ssm.py` | SSMs without a useful memory |
| `gradients.py` | gradients that are not finite, zero, or very different between blocks |
| `gates.py` | gates that are closed or open for all inputs |
| `attention.py` | uniform attention, a commitment loss that dominates |
"""
