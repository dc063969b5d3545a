"""How trainings are run: one with all that is measured during it, many in a pool, many on a GPU."""
