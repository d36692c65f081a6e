"""Both sides. What only one server can do; each module is optional to all the others."""
