"""Several processes that train one run: they find each other, agree, notice each other's end, and stop together.

JAX does the work: `jax.distributed` connects the processes, and its coordination service, which process 0 runs, stores
small texts and notices processes that end. This package adds the messages and the limits in time.
"""
