"""How each kind of attention module is found, swapped and put back: one adapter per kind."""
