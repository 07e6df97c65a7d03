"""Growing sequences: the base class of layers with `initial_state` and `step`, their states, and checks."""
